"""What `notebook_launcher` hands to torch's agent where several machines take part."""

from __future__ import annotations

from typing import Any

import pytest

from accelerate import debug_launcher, launchers, notebook_launcher

COMMON: dict[str, Any] = {"num_processes": 2, "num_nodes": 2}


def given_to_the_agent(monkeypatch: pytest.MonkeyPatch, **options: Any) -> dict[str, Any]:
    given: dict[str, Any] = {}

    def agent(function: Any, args: Any, config: dict[str, Any], variables: dict[str, str]) -> None:
        given.update(config, args=args, **variables)

    monkeypatch.setattr(launchers, "_launch_with_agent", agent)
    notebook_launcher(lambda *_: None, **{**COMMON, **options})
    return given


@pytest.mark.parametrize(
    ("option", "value", "key", "expected"),
    [
        ("args", (1,), "args", (1,)),
        ("num_processes", 3, "nproc_per_node", 3),
        ("num_nodes", 3, "max_nodes", 3),
        ("mixed_precision", "bf16", "ACCELERATE_MIXED_PRECISION", "bf16"),
        ("use_port", 1234, "rdzv_endpoint", "127.0.0.1:1234"),
        ("master_addr", "10.0.0.1", "rdzv_endpoint", "10.0.0.1:29500"),
        ("rdzv_endpoint", "10.0.0.2:7", "rdzv_endpoint", "10.0.0.2:7"),
        ("node_rank", 1, "rdzv_configs", {"rank": 1}),
        ("rdzv_backend", "c10d", "rdzv_backend", "c10d"),
        ("rdzv_conf", {"timeout": 7}, "rdzv_configs", {"rank": 0, "timeout": 7}),
        ("rdzv_id", "run", "run_id", "run"),
        ("max_restarts", 2, "max_restarts", 2),
        ("monitor_interval", 0.5, "monitor_interval", 0.5),
        ("log_line_prefix_template", "[${rank}]", "log_line_prefix_template", "[${rank}]"),
    ],
)
def test_the_agent_gets_what_is_asked_for(option, value, key, expected, monkeypatch):
    assert given_to_the_agent(monkeypatch, **{option: value})[key] == expected


def test_ranks_for_a_test_get_what_is_asked_for(monkeypatch):
    given: list[Any] = []
    monkeypatch.setattr(launchers, "_fork_ranks", lambda function, args, count, *_, **__: given.extend([args, count]))
    debug_launcher(lambda word: None, args=("word",), num_processes=3)
    assert given == [("word",), 3]
