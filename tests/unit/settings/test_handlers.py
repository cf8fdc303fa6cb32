"""The documented handlers and configurations: defaults, what they hand on, what they refuse."""

from __future__ import annotations

import dataclasses
import datetime
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from accelerate.settings import env
from accelerate.settings.enums import DDPCommunicationHookType, DynamoBackend
from accelerate.settings.handlers import (
    AutocastKwargs,
    DataLoaderConfiguration,
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    GradScalerKwargs,
    InitProcessGroupKwargs,
    KwargsHandler,
    ProfileKwargs,
    ProjectConfiguration,
    TorchDynamoPlugin,
)


def test_importing_settings_leaves_torch_and_numpy_out():
    code = (
        "import accelerate.settings.handlers, accelerate.settings.fp8, sys\n"
        "print({'torch', 'numpy'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


class TestKwargsHandler:
    @given(st.integers(1, 10**6), st.floats(1.5, 4), st.booleans())
    def test_to_kwargs_is_what_differs(self, interval, factor, enabled):
        handler = GradScalerKwargs(growth_interval=interval, growth_factor=factor, enabled=enabled)
        wanted = {"growth_interval": interval, "growth_factor": factor, "enabled": enabled}
        defaults = {"growth_interval": 2000, "growth_factor": 2.0, "enabled": True}
        assert handler.to_kwargs() == {name: value for name, value in wanted.items() if value != defaults[name]}
        assert GradScalerKwargs(**handler.to_kwargs()) == handler

    def test_containers_are_copied_and_everything_else_is_shared(self):
        @dataclasses.dataclass
        class Mine(KwargsHandler):
            options: dict = dataclasses.field(default_factory=dict)
            callback: object = None

        handler = Mine({"a": 1}, callback := object())
        handler.to_dict()["options"]["b"] = 2
        assert handler.options == {"a": 1}
        assert handler.to_dict()["callback"] is callback

    def test_a_plain_subclass(self):
        class Mine(KwargsHandler):
            def __init__(self, size=1):
                self.size = size

        assert Mine(2).to_kwargs() == {"size": 2}
        assert Mine().to_kwargs() == {}

    def test_torch_takes_what_they_give(self):
        torch.amp.GradScaler("cpu", **GradScalerKwargs(init_scale=4.0).to_kwargs())
        torch.autocast("cpu", dtype=torch.bfloat16, **AutocastKwargs(cache_enabled=False).to_kwargs())


class TestDistributedDataParallelKwargs:
    def test_hooks_are_not_arguments_of_ddp(self):
        handler = DistributedDataParallelKwargs(static_graph=True, comm_hook="bf16", comm_state_option={"a": 1})
        assert handler.comm_hook is DDPCommunicationHookType.BF16
        assert handler.to_kwargs() == {"static_graph": True}
        assert handler.to_dict(ignore_keys=())["comm_state_option"] == {"a": 1}

    def test_two_handlers_share_no_options(self):
        first = DistributedDataParallelKwargs()
        first.comm_state_option["matrix_approximation_rank"] = 2
        assert DistributedDataParallelKwargs().comm_state_option == {}

    @pytest.mark.parametrize(("field", "value"), [("comm_hook", "fp8"), ("comm_wrapper", 3)])
    def test_an_unknown_hook(self, field, value):
        with pytest.raises(ValueError, match=rf"{field}={value!r}: expected one of \['no', 'fp16'"):
            DistributedDataParallelKwargs(**{field: value})

    def test_a_hook_that_is_no_wrapper(self):
        with pytest.raises(ValueError, match="comm_wrapper='power_sgd' does not wrap a hook.*set comm_hook"):
            DistributedDataParallelKwargs(comm_wrapper=DDPCommunicationHookType.POWER_SGD)


class TestInitProcessGroupKwargs:
    def test_defaults(self):
        handler = InitProcessGroupKwargs()
        assert (handler.backend, handler.init_method, handler.timeout) == ("nccl", None, None)

    @pytest.mark.parametrize("timeout", [90, 90.0, datetime.timedelta(minutes=1.5)])
    def test_a_timeout_in_seconds_or_as_timedelta(self, timeout):
        assert InitProcessGroupKwargs(timeout=timeout).to_kwargs() == {"timeout": datetime.timedelta(seconds=90)}

    @pytest.mark.parametrize("timeout", ["90", True, [90]])
    def test_a_timeout_of_another_type(self, timeout):
        with pytest.raises(TypeError, match="expected a datetime.timedelta or a number of seconds"):
            InitProcessGroupKwargs(timeout=timeout)

    @pytest.mark.parametrize("timeout", [0, -1, datetime.timedelta(seconds=-3)])
    def test_a_timeout_that_is_over_at_once(self, timeout):
        with pytest.raises(ValueError, match="more than zero seconds"):
            InitProcessGroupKwargs(timeout=timeout)


class TestProfileKwargs:
    def test_a_profile_of_the_cpu(self, tmp_path):
        trace = tmp_path / "trace.json"
        handler = ProfileKwargs(
            activities=["cpu"],
            schedule_option={"wait": 1, "warmup": 1, "active": 1, "repeat": 1},
            on_trace_ready=lambda profiler: profiler.export_chrome_trace(str(trace)),
            record_shapes=True,
        )
        with handler.build() as profiler:
            for _ in range(4):
                torch.ones(3, 3) @ torch.ones(3, 3)
                profiler.step()
        assert "aten::mm" in trace.read_text()

    def test_everything_is_recorded_by_default(self):
        with ProfileKwargs(with_flops=True).build() as profiler:
            torch.ones(8, 8) @ torch.ones(8, 8)
        assert sum(event.flops for event in profiler.key_averages()) == 2 * 8**3

    def test_an_unknown_activity(self):
        with pytest.raises(ValueError, match="activities has 'gpu'; this torch can profile cpu,.* cuda"):
            ProfileKwargs(activities=["cpu", "gpu"]).build()

    @pytest.mark.parametrize(
        ("schedule", "said"),
        [
            ({"wait": 1, "warmup": 1}, "'active' is missing"),
            ({"wait": 1, "warmup": 1, "active": 1, "skip": 2}, "'skip' is unknown"),
            ({}, "'wait' is missing, 'warmup' is missing, 'active' is missing"),
        ],
    )
    def test_a_schedule_with_wrong_keys(self, schedule, said):
        with pytest.raises(ValueError, match=f"{said}.*wait, warmup and active"):
            ProfileKwargs(schedule_option=schedule).build()


class TestGradientAccumulationPlugin:
    def test_defaults(self):
        plugin = GradientAccumulationPlugin()
        assert plugin.to_dict() == {
            "num_steps": None,
            "adjust_scheduler": True,
            "sync_with_dataloader": True,
            "sync_each_batch": False,
        }

    @pytest.mark.parametrize("steps", [0, -1, -100])
    def test_not_positive(self, steps):
        with pytest.raises(ValueError, match=f"num_steps={steps}: expected a number of batches, 1 or more"):
            GradientAccumulationPlugin(num_steps=steps)

    @pytest.mark.parametrize("steps", [1.5, "2", [3]])
    def test_not_a_whole_number(self, steps):
        with pytest.raises(TypeError, match="expected a whole number of batches"):
            GradientAccumulationPlugin(num_steps=steps)

    def test_an_integer_of_another_library(self):
        plugin = GradientAccumulationPlugin(num_steps=torch.tensor(3))
        assert plugin.num_steps == 3 and type(plugin.num_steps) is int


class TestDataLoaderConfiguration:
    def test_defaults(self):
        assert dataclasses.asdict(DataLoaderConfiguration()) == {
            "split_batches": False,
            "dispatch_batches": None,
            "even_batches": True,
            "use_seedable_sampler": False,
            "data_seed": None,
            "non_blocking": False,
            "use_stateful_dataloader": False,
            "seed_samples": None,
        }

    def test_stateful_loaders_without_torchdata(self, tmp_path):
        (tmp_path / "torchdata.py").write_text("")
        code = (
            f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
            "from accelerate.settings.handlers import DataLoaderConfiguration\n"
            "DataLoaderConfiguration(use_stateful_dataloader=True)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert "ImportError: use_stateful_dataloader=True needs torchdata 0.8 or later: `pip install" in done.stderr


class TestProjectConfiguration:
    def test_the_logging_folder_follows_until_it_is_set(self):
        configuration = ProjectConfiguration()
        assert (configuration.project_dir, configuration.logging_dir) == (None, None)
        configuration.set_directories("a")
        configuration.set_directories("b")
        assert (configuration.project_dir, configuration.logging_dir) == ("b", "a")

    @pytest.mark.parametrize("limit", [0, -1])
    def test_a_limit_that_keeps_nothing(self, limit):
        with pytest.raises(ValueError, match=f"total_limit={limit}: expected 1 or more checkpoints"):
            ProjectConfiguration(total_limit=limit)


class TestTorchDynamoPlugin:
    def test_a_backend_by_name_in_any_case(self):
        for name in ("inductor", "INDUCTOR", DynamoBackend.INDUCTOR):
            assert TorchDynamoPlugin(backend=name).backend is DynamoBackend.INDUCTOR

    def test_the_misspelled_backend_of_old_files(self):
        with env.patch_environment(ACCELERATE_DYNAMO_BACKEND="TORHCHXLA_TRACE_ONCE"):
            assert TorchDynamoPlugin().backend is DynamoBackend.TORCHXLA_TRACE_ONCE

    def test_an_unknown_backend(self):
        with pytest.raises(ValueError, match="backend: expected one of no, eager, .*, found 'fast'"):
            TorchDynamoPlugin(backend="fast")
        with (
            env.patch_environment(ACCELERATE_DYNAMO_BACKEND="fast"),
            pytest.raises(ValueError, match="environment variable ACCELERATE_DYNAMO_BACKEND: expected one of"),
        ):
            TorchDynamoPlugin()

    def test_arguments_come_before_the_environment(self):
        with env.patch_environment(
            ACCELERATE_DYNAMO_BACKEND="inductor",
            ACCELERATE_DYNAMO_MODE="max-autotune",
            ACCELERATE_DYNAMO_USE_FULLGRAPH="true",
            ACCELERATE_DYNAMO_USE_DYNAMIC="true",
        ):
            plugin = TorchDynamoPlugin(backend="eager", mode="default", fullgraph=False, dynamic=False)
        assert (plugin.backend, plugin.mode, plugin.fullgraph, plugin.dynamic) == (
            DynamoBackend.EAGER,
            "default",
            False,
            False,
        )

    def test_a_variable_is_no_default(self):
        with env.patch_environment(ACCELERATE_DYNAMO_BACKEND="EAGER", ACCELERATE_DYNAMO_USE_DYNAMIC="False"):
            assert TorchDynamoPlugin().to_kwargs() == {"backend": "eager", "dynamic": False}

    def test_torch_compile_takes_what_it_gives(self):
        plugin = TorchDynamoPlugin(backend="eager", fullgraph=True, use_regional_compilation=True)
        assert plugin.to_kwargs() == {"backend": "eager", "fullgraph": True}
        compiled = torch.compile(lambda x: x + 1, **plugin.to_kwargs())
        assert compiled(torch.zeros(2)).tolist() == [1, 1]
