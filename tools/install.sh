#!/bin/sh
# install.sh PYTHON VENV EXTRA [RELEASE...]: makes VENV if it is not there, and installs this tree with EXTRA into it, in the
# versions of constraints.txt. Each RELEASE is a requirement that replaces those versions: torch==2.6.0, with the releases
# of other packages that go with it. Called by the Makefile from the tree's root.
set -eu
python=$1 venv=$2 extra=$3
shift 3

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
    echo "This needs Python 3.10 or newer, and '$python' is not. Name one: make PYTHON=python3.11 …" >&2
    exit 1
fi
if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    echo "making $venv"
    "$python" -m venv --clear "$venv"
fi
pwd -P >"$venv/.place"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check --no-input --quiet --quiet "$@"; }

# torch goes first and by its exact version: asked for as somebody's dependency it may bring gigabytes of another build.
# Where that version cannot be had, the newest that fits will do; the other packages keep their tested versions.
constraints=constraints.txt
torch_version() {
    "$venv/bin/python" -c 'from importlib.metadata import version; print(version("torch").split("+")[0])' 2>/dev/null
}
if [ $# -gt 0 ]; then
    echo "installing $*"
    pip install "$@"
elif [ -z "$(torch_version)" ]; then
    echo "installing torch"
    pip install torch==2.13.0 || pip install 'torch>=2.6'
fi
if [ "$(torch_version)" != 2.13.0 ]; then
    [ $# -gt 0 ] || echo "torch 2.13.0, the tested version, is not to be had here: going on with another" >&2
    constraints="$venv/constraints.txt"
    grep -vE '^(torch|sympy|numpy)==' constraints.txt >"$constraints"  # torch decides which sympy and numpy it works with
    [ $# -eq 0 ] || printf '%s\n' "$@" >>"$constraints"
fi
echo "installing accelerate[$extra]"
pip install --constraint "$constraints" --editable ".[$extra]"
