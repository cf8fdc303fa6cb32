"""Any bytes as a configuration file: settings that can be launched, or one message that names the file and the place.

`pytest --hypothesis-profile=thorough` tries 2,000 files instead of 300.
"""

from __future__ import annotations

import json
import os
import re
from datetime import date, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from accelerate.commands.config import ClusterConfig, SageMakerConfig, load_config_from_file
from accelerate.commands.config.rewrite import rewritten
from accelerate.commands.config.update import migrate
from accelerate.commands.to_fsdp2 import convert
from accelerate.launch.config_file import key_tables
from accelerate.launch.config_io import load, read
from accelerate.launch.config_io import parse as parse_text
from accelerate.launch.parse import parse
from accelerate.launch.plan import build_plan
from accelerate.settings.enums import DistributedType
from accelerate.settings.launcher import LaunchSettings
from accelerate.settings.option import SettingsError, option_specs

TOP, INSIDE = key_tables()
KNOWN = [*TOP, *INSIDE, "distributed_type", "compute_environment"]

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=10**4290, max_value=10**4290 + 9)
    | st.floats()
    | st.text()
    | st.binary(max_size=20)
    | st.dates(date(1, 1, 1))
    | st.datetimes(datetime(1, 1, 1))
    | st.sampled_from(["no", "NO", "yes", "FSDP", "MULTI_GPU", "TPU", "2", "-1", "1e999", "bf16", "true", "\0", "0x7f"])
)
keys = st.text(max_size=8) | st.sampled_from(KNOWN) | st.integers(-3, 3) | st.booleans() | st.none()
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3), max_leaves=8
)


def section(name: str) -> st.SearchStrategy[dict[Any, Any]]:
    return st.dictionaries(st.sampled_from(list(INSIDE[name])) | keys, values, max_size=4).map(lambda it: {name: it})


sensible = st.fixed_dictionaries(
    {"distributed_type": st.sampled_from(["NO", "FSDP", "MULTI_CPU", "MULTI_GPU", "DEEPSPEED", "MEGATRON_LM", "XLA"])},
    optional={
        "num_processes": st.integers(-1, 9),
        "num_machines": st.integers(0, 3),
        "mixed_precision": st.sampled_from(["no", "bf16", "fp8"]),
        "main_process_ip": st.text(max_size=5),
        "gpu_ids": st.text(max_size=5) | st.lists(st.integers(0, 3), max_size=2),
        "use_cpu": st.booleans(),
    },
)
contents = st.tuples(
    sensible | st.just({}), st.dictionaries(keys, values, max_size=3), st.sampled_from(list(INSIDE)).flatmap(section)
).map(lambda parts: {**parts[1], **parts[2], **parts[0]})


def as_json(content: Any) -> bytes:
    return json.dumps(content, default=str, skipkeys=True).encode()


def as_yaml(content: Any) -> bytes:
    return str(yaml.safe_dump(content, allow_unicode=True, default_flow_style=None)).encode(errors="surrogatepass")


encodings = st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32", "latin-1", "cp037"])
structured = st.tuples(contents | values, st.sampled_from([as_json, as_yaml])).map(lambda it: it[1](it[0]))
recoded = st.tuples(structured, encodings).map(
    lambda it: it[0].decode(errors="replace").encode(it[1], errors="replace")
)
pieces = st.sampled_from(
    [
        *("a: &a [1, 2]\n", "b: *a\n", "<<: *a\n", "c: &c {fsdp_version: 2}\nfsdp_config:\n  <<: *c\n", "d: &d [*d]\n"),
        *("\tnum_processes: 2\n", "num_processes: 2\n", "num_processes: 2\nnum_processes: 3\n", "? [x]\n: y\n", "? \n"),
        *("use_cpu: !!python/object:os.system x\n", "gpu_ids: !!binary ====\n", "commands: !!set {a, b}\n", "--- \n"),
        *("debug: !!bool maybe\n", "debug: !!timestamp x\n", "debug: !!int ''\n", "debug: !!float .\n", "debug: =\n"),
        *(
            "num_machines: 2020-99-99\n",
            "num_machines: .nan\n",
            "num_machines: 0o9\n",
            "num_machines: 1:99:1\n",
            "...\n",
        ),
        *(
            "fsdp_config: {fsdp_version: 2}\n",
            "fp8_config: [\n",
            "}\n",
            "- x\n",
            "%YAML 9.9\n",
            "!",
            "|\n",
            "'",
            "\0",
            "\u2028",
        ),
        *("distributed_type: NO\n", "distributed_type: FSDP\n", "compute_environment: AMAZON_SAGEMAKER\n"),
    ]
)
fragments = st.lists(pieces, max_size=8).map(lambda parts: "".join(parts).encode())
damaged = st.tuples(structured, st.binary(max_size=4), st.floats(0, 1)).map(
    lambda it: it[0][: (cut := int(len(it[0]) * it[2]))] + it[1] + it[0][cut:]
)
files = structured | recoded | fragments | damaged | st.binary(max_size=60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files")


def laughs(levels: int, merge: bool = False) -> bytes:
    lines = ["a0: &a0 {num_processes: 2}"]
    for level in range(1, levels):
        inner = ", ".join([f"*a{level - 1}"] * 9)
        lines.append(f"a{level}: &a{level} " + (f"{{<<: [{inner}]}}" if merge else f"[{inner}]"))
    return "\n".join(lines).encode()


# What a message says where no key can be named: the text is no yaml or json, or no mapping.
PLACE = re.compile(
    r"line \d+|position \d+|char \d+|column \d+|keys and values such|as key|duplicate|is larger|nested more"
)


def check(data: bytes, name: str, folder: Path) -> None:
    path = folder / name
    path.write_bytes(data)
    places: list[str] = []
    try:
        content = load(str(path))
        places = [str(key) for key in content] + ["distributed_type"]
        places += [str(key) for value in content.values() if isinstance(value, dict) for key in value]
    except SettingsError:
        pass
    for reader in (
        launched,
        as_object,
        ClusterConfig.from_yaml_file,
        SageMakerConfig.from_yaml_file,
        updated,
        to_fsdp2,
    ):
        try:
            reader(str(path))
        except SettingsError as error:
            message = str(error)
            assert str(path) in message or reader is launched
            if reader is launched and str(path) not in message:  # the values do not go together; launch adds the file
                places = [*places, *(entry.dest for entry in option_specs(LaunchSettings))]
            named = any(place in message or repr(place)[:57] in message for place in places)
            where = PLACE.search(message)
            assert named or where or "Amazon SageMaker needs" in message, message
            assert "Traceback" not in message and len(message) < 20_000 and message.isprintable() or "\n  " in message


def launched(path: str) -> None:
    settings = parse(["--config_file", path, "s.py"])
    plan = build_plan(settings)
    for text in (*plan.command, *plan.environment, *plan.environment.values()):
        assert b"\0" not in os.fsencode(text)


def as_object(path: str) -> None:
    load_config_from_file(path).to_dict()


def updated(path: str) -> None:
    content = migrate(load(path), path).content
    assert migrate(content, path).changes == ()
    as_json = path.endswith(".json")
    assert repr(parse_text(rewritten(read(path), content, as_json).text.encode(), as_json)) == repr(content)


def to_fsdp2(path: str) -> None:
    content = convert(load(path), path).content
    assert not convert(content, path).converted


@given(files, st.sampled_from(["config.yaml", "config.json"]))
@settings(max_examples=max(300, settings().max_examples), deadline=None)
def test_any_file_is_settings_or_a_message(folder: Path, data: bytes, name: str) -> None:
    check(data, name, folder)


HOSTILE = {
    "aliases": (laughs(9), "stands for more than"),
    "merged aliases": (laughs(9, merge=True), "stands for more than"),
    "itself": (b"fsdp_config: &a {fsdp_version: *a}", "fsdp_config.fsdp_version refers to itself"),
    "brackets": (b"[" * 200_000, "nested more than"),
    "dashes": (b"- " * 200_000, "nested more than"),
    "large": (b"x" * (1 << 21), "is larger than 1 MiB"),
    "long number": (b"num_processes: " + b"9" * 5000, "line 1: num_processes: found a number of 5000 digits"),
    "long hexadecimal": (
        b"distributed_type: NO\nnum_processes: 0x" + b"f" * 5000,
        "line 2: num_processes: found a number of 5002 digits",
    ),
    "not a date": (
        b"distributed_type: NO\nlog_dir: 2020-99-99",
        "line 2: log_dir: '2020-99-99' cannot be read as timestamp",
    ),
    "not a number": (
        b"distributed_type: NO\ndeepspeed_config: {gradient_clipping: .nan}",
        "clipping: expected at least 0",
    ),
    "zero byte": (b'distributed_type: NO\ngpu_ids: "\\0"', "gpu_ids: expected a word, found '\\x00'"),
    "a python object": (b"gpu_ids: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
    "twice": (b"num_machines: 1\nuse_cpu: no\nnum_machines: 2\n", "key num_machines (line 3): duplicate"),
    "twice inside": (
        b"fsdp_config: {fsdp_version: 1, fsdp_version: 2}",
        "key fsdp_config.fsdp_version (line 1): duplicate",
    ),
    "latin-1": ("main_process_ip: müller".encode("latin-1"), "position 18"),
    "two spellings": (
        b"distributed_type: FSDP\nfsdp_config: {fsdp_cpu_offload: true, fsdp_offload_params: false}",
        "fsdp_config.fsdp_cpu_offload and fsdp_config.fsdp_offload_params are the same option",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_yaml(name: str, tmp_path: Path) -> None:
    data, message = HOSTILE[name]
    (tmp_path / "config.yaml").write_bytes(data)
    with pytest.raises(SettingsError) as caught:
        launched(str(tmp_path / "config.yaml"))
    assert message in str(caught.value) and str(tmp_path / "config.yaml") in str(caught.value)
    check(data, "config.yaml", tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 200_000, "nested more than"),
        ('{"additional_args": ' + '{"a": ' * 900 + "1" + "}" * 901, "nested more than"),
        ('{"distributed_type": "NO", "log_dir": "\\ud800"}', "log_dir: expected a word"),
        ('{"distributed_type": "NO", "num_processes": 1, "num_processes": 2}', "key num_processes: duplicate"),
        ('{"num_machines": ' + "9" * 5000 + "}", "num_machines: expected a whole number, found '999"),
    ],
    ids=["brackets", "braces", "half a character", "twice", "long number"],
)
def test_hostile_json(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(SettingsError) as caught:
        launched(str(tmp_path / "config.json"))
    assert message in str(caught.value) and str(tmp_path / "config.json") in str(caught.value)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_text_of_other_systems_is_read(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_bytes("distributed_type: MULTI_CPU\r\nlog_dir: ü\r\n".encode(encoding))
    assert parse(["--config_file", str(tmp_path / "config.yaml"), "s.py"]).log_dir == "ü"


def test_all_mistakes_of_a_file_are_told_at_once(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(
        "distributed_type: NONE\nnum_procesess: 2\nmixed_precision: fp1\n"
        "fsdp_config: {fsdp_versoin: 1, fsdp_use_orig_params: 7}\n"
    )
    with pytest.raises(SettingsError) as caught:
        launched(str(path))
    assert str(caught.value).splitlines() == [
        f"configuration file {path} has 5 problems:",
        "  unknown key num_procesess. Did you mean num_processes?",
        "  mixed_precision: expected one of no, fp16, bf16, fp8, found 'fp1'.",
        "  unknown key fsdp_config.fsdp_versoin. Did you mean fsdp_version?",
        "  fsdp_config.fsdp_use_orig_params: expected true or false, found 7.",
        f"  distributed_type: expected one of {', '.join(kind.value for kind in DistributedType)}, found 'NONE'.",
    ]


def test_thousands_of_mistakes_fit_a_screen(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("".join(f"key_{number}: 1\n" for number in range(5000)))
    with pytest.raises(SettingsError) as caught:
        launched(str(path))
    lines = str(caught.value).splitlines()
    assert lines[0].endswith("has 5000 problems:") and lines[-1] == "  … and 4980 more." and len(lines) == 22


def test_a_pipe_is_read_and_a_folder_is_not(tmp_path: Path) -> None:
    reader, writer = os.pipe()  # as a shell's <(…) gives it
    os.write(writer, b"distributed_type: MULTI_CPU\nnum_processes: 3\n")
    os.close(writer)
    assert parse(["--config_file", f"/dev/fd/{reader}", "s.py"]).num_processes == 3
    os.close(reader)
    with pytest.raises(SettingsError, match="cannot be read: .*Is a directory"):
        launched(str(tmp_path))


def test_a_key_in_the_wrong_place_is_sent_home(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(
        "distributed_type: FSDP\nfsdp_version: 2\nfsdp_config: {num_processes: 2, version: 2, fsdp_config: {}}\n"
    )
    with pytest.raises(SettingsError) as caught:
        launched(str(path))
    assert str(caught.value).splitlines()[1:] == [
        "  unknown key fsdp_version. It belongs under fsdp_config.",
        "  unknown key fsdp_config.num_processes. It belongs at the top of the file.",
        "  unknown key fsdp_config.fsdp_config. It belongs at the top of the file.",
    ]
