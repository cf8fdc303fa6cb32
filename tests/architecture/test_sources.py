"""Rules that hold for every source file of the package, each shown to catch what it is for."""

from __future__ import annotations

import ast
import textwrap

import pytest

from tests.architecture import exceptions, rules

SOURCES = rules.sources()

# rule -> (where it need not hold, source that must be caught, source that must pass)
RULES: list[tuple[rules.Rule, dict[str, str], list[str], list[str]]] = [
    (
        rules.environment,
        exceptions.ENVIRONMENT,
        [
            "import os\nos.environ['A'] = '1'",
            "import os as o\no.getenv('A')",
            "from os import environ",
            "def f():\n    import os\n    os.putenv('A', '1')",
        ],
        ["import os\nos.path.join('environ', 'getenv')", "settings.environ = 1"],
    ),
    (
        rules.forward_replaced,
        exceptions.FORWARD,
        [
            "model.forward = wrapped",
            "setattr(model, 'forward', wrapped)",
            "object.__setattr__(model, 'forward', wrapped)",
            "del model.forward",
            "model.__dict__['forward'] = wrapped",
            "a, model.inner.forward = 1, 2",
        ],
        ["y = model.forward(x)", "class M:\n    def forward(self, x): ..."],
    ),
    (
        rules.distributed_type_compared,
        exceptions.DISTRIBUTED_TYPE,
        [
            "if state.distributed_type == DistributedType.FSDP: ...",
            "x = 'FSDP' in (self.distributed_type, 1)",
            "if kind is enums.DistributedType.NO: ...",
            "if kind in (DistributedType.NO, DistributedType.FSDP): ...",
            "match state.distributed_type:\n    case _: ...",
        ],
        ["kind = DistributedType.FSDP", "strategy = TABLE[state.distributed_type]"],
    ),
    (
        rules.unsafe_loading,
        exceptions.UNSAFE_LOADING,
        [
            "import pickle\npickle.load(f)",
            "from pickle import loads as l\nl(b'')",
            "import torch\ntorch.load(f)",
            "import torch\ntorch.load(f, weights_only=safe)",
            "import numpy as np\nnp.load(f, allow_pickle=True)",
            "import yaml\nyaml.load(f, Loader=yaml.Loader)",
            "eval(text)",
        ],
        [
            "import torch\ntorch.load(f, weights_only=True)",
            "import yaml\nyaml.load(f, Loader=yaml.SafeLoader)",
            "import pickle\npickle.dumps(x)",
            "model.eval()",
        ],
    ),
    (
        rules.shell,
        exceptions.SHELL,
        [
            "import subprocess\nsubprocess.run(text, shell=True)",
            "import os\nos.system(text)",
            "from subprocess import getoutput\ngetoutput(text)",
        ],
        ["import subprocess\nsubprocess.run(['ls'], shell=False)"],
    ),
    (
        rules.private_torch,
        exceptions.PRIVATE_TORCH,
        [
            "from torch.utils._pytree import tree_map",
            "from torch.nn.modules.module import _IncompatibleKeys",
            "import torch._dynamo",
            "import torch\ntorch._C._something()",
            "import torch.distributed as dist\ndist.distributed_c10d._world.pg_map",
        ],
        [
            "import torch\ntorch.__version__",
            "module._parameters",
            "from . import _torch",
            "from torch import nn\nnn.Linear",
        ],
    ),
    (
        rules.imports_shop_window,
        exceptions.SHOP_WINDOW,
        [
            "import accelerate.utils",
            "from accelerate.utils import gather",
            "from ..utils.operations import gather",
            "from .. import utils",
            "import importlib\nimportlib.import_module('accelerate.utils.operations')",
        ],
        ["from torch.utils.data import DataLoader", "from .runtime import pytree"],
    ),
    (
        rules.long_functions,
        exceptions.LONG_FUNCTIONS,
        ["def f():\n" + "    x = 1\n" * 61],
        ["def f():\n    '''" + "\n" * 80 + "    '''\n" + "    x = 1\n" * 60],
    ),
]
NAMES = [rule.__name__ for rule, *_ in RULES]


def excused(path: str, finding: str, excuses: dict[str, str]) -> str | None:
    """The entry that excuses a finding: a file, a folder, or one function as "file: function"."""
    folders = [path.rsplit("/", count)[0] for count in range(1, path.count("/") + 1)]
    for entry in (path, *folders, f"{path}: {finding.split(':')[0]}"):
        if entry in excuses:
            return entry
    return None


@pytest.mark.parametrize(("rule", "excuses", "bad", "good"), RULES, ids=NAMES)
def test_rule_holds(rule: rules.Rule, excuses: dict[str, str], bad: list[str], good: list[str]) -> None:
    findings = [(path, finding) for path, tree in SOURCES.items() for finding in rule(tree)]
    used = {excused(path, finding, excuses) for path, finding in findings}
    broken = [f"{path}:{finding}" for path, finding in findings if excused(path, finding, excuses) is None]
    assert not broken, f"{(rule.__doc__ or '').strip()}\n" + "\n".join(broken)
    stale = [entry for entry in excuses if entry not in used and entry != "utils"]
    assert not stale, f"exceptions that no longer apply, remove them: {stale}"


@pytest.mark.parametrize(("rule", "excuses", "bad", "good"), RULES, ids=NAMES)
def test_rule_can_fail(rule: rules.Rule, excuses: dict[str, str], bad: list[str], good: list[str]) -> None:
    for text in bad:
        assert list(rule(ast.parse(textwrap.dedent(text)))), f"not caught:\n{text}"
    for text in good:
        assert not list(rule(ast.parse(textwrap.dedent(text)))), f"caught without cause:\n{text}"


def test_every_exception_has_a_reason() -> None:
    tables = [table for _, table, *_ in RULES]
    assert all(len(reason) > 10 for table in tables for reason in table.values())
    assert all(len(reason) > 10 for _, reason in exceptions.LONG_FILES.values())


def test_utils_only_re_exports() -> None:
    broken = [
        f"{path}:{finding}"
        for path, tree in SOURCES.items()
        if path.startswith("utils/")
        for finding in rules.defines_something(tree)
    ]
    assert not broken, "\n".join(broken)
    assert list(rules.defines_something(ast.parse("def helper(): ...")))


def asking_how_sharded(sources: dict[str, ast.Module]) -> tuple[list[str], set[str | None]]:
    """In the façade, checkpointing and data loading: conditions about FSDP or the mesh, and the excuses that were used."""
    layers = ("accelerator.py", "optimizer.py", "scheduler.py", "checkpointing/", "data_loader/")
    findings = [
        (path, finding)
        for path, tree in sources.items()
        if path.startswith(layers)
        for finding in rules.asks_how_sharded(tree)
    ]
    excuses = [excused(path, finding, exceptions.HOW_SHARDED) for path, finding in findings]
    broken = [f"{path}: {finding}" for (path, finding), excuse in zip(findings, excuses, strict=True) if excuse is None]
    return broken, set(excuses)


def test_facade_checkpoints_and_loaders_do_not_ask_how_a_model_is_sharded() -> None:
    broken, used = asking_how_sharded(SOURCES)
    assert not broken, f"{rules.asks_how_sharded.__doc__}\n" + "\n".join(broken)
    assert exceptions.HOW_SHARDED.keys() == used, "exceptions that no longer apply"


ASKING = [
    "def f(self):\n    if self.is_fsdp2: ...",
    "class A:\n    def f(self):\n        return 1 if self.state.fsdp_plugin is not None else 2",
    "x = [a for a in b if mesh['tp']]",
    "def f():\n    return parallelism_config and parallelism_config.tp_enabled",
    "while settings.tp_size > 1: ...",
    "match plugin.fsdp_version:\n    case _: ...",
    "assert self.torch_device_mesh is None",
]


@pytest.mark.parametrize("text", ASKING)
def test_asking_how_a_model_is_sharded_is_noticed(text: str) -> None:
    for path in ("accelerator.py", "checkpointing/manager.py", "data_loader/plan.py"):
        assert asking_how_sharded({path: ast.parse(text)})[0]
    assert not asking_how_sharded({"strategies/fsdp2.py": ast.parse(text)})[0]
    passed = "def f(self):\n    return build(mesh=self.mesh, fsdp=self.fsdp_plugin) if self.models else None"
    assert not asking_how_sharded({"accelerator.py": ast.parse(passed)})[0]


def too_long(lengths: dict[str, int]) -> list[str]:
    """Files beyond their limit, and exceptions that are no longer needed."""
    broken = []
    for path, lines in lengths.items():
        limit = exceptions.LONG_FILES.get(path, (exceptions.LONG_FILE, ""))[0]
        if lines > limit:
            broken.append(f"{path}: {lines} lines, at most {limit}")
        elif path in exceptions.LONG_FILES and lines <= exceptions.LONG_FILE:
            broken.append(f"{path}: {lines} lines, no exception needed")
    return broken


def test_files_stay_readable() -> None:
    lengths = {path: len((rules.PACKAGE / path).read_text(encoding="utf-8").splitlines()) for path in SOURCES}
    assert not too_long(lengths), "\n".join(too_long(lengths))
    assert too_long({"new.py": exceptions.LONG_FILE + 1})


def test_every_file_opens_with_its_contract() -> None:
    missing = [path for path, tree in SOURCES.items() if tree.body and ast.get_docstring(tree) is None]
    assert not missing, f"no module docstring: {missing}"
