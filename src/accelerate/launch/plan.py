"""Builds a plan from settings: the command and the variables of a launch, as values.

`plan(argv) = build_plan(parse(argv))`. `build_plan` is pure: facts about the host come from the settings (`launch.host`), so
a plan can be printed, compared and tested without starting a process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ..runtime.cluster.cluster_env import DEFAULT_PORT
from ..settings.enums import SageMakerDistributedType
from ..settings.launcher import LaunchSettings
from ..settings.option import SettingsError, option_specs
from .parse import parse

# Device type -> the variable that restricts the visible devices. runtime.devices has them too, but takes longer to import
# than a plan takes to build.
_VISIBLE_DEVICES = {
    "cuda": "CUDA_VISIBLE_DEVICES",
    "xpu": "ZE_AFFINITY_MASK",
    "npu": "ASCEND_RT_VISIBLE_DEVICES",
    "mlu": "MLU_VISIBLE_DEVICES",
    "sdaa": "SDAA_VISIBLE_DEVICES",
    "musa": "MUSA_VISIBLE_DEVICES",
    "hpu": "HABANA_VISIBLE_MODULES",
    "neuron": "NEURON_RT_VISIBLE_CORES",
}
# Options of torch.distributed.run that have the same name here; passed on unless they have their default.
_TORCHRUN_OPTIONS = ("tee", "log_dir", "role", "rdzv_conf", "max_restarts", "monitor_interval")


class LaunchPlan(NamedTuple):
    """The command, variables and launcher of a launch.

    Attributes:
        launcher: ``python``, ``torch``, ``mpirun``, ``deepspeed``, ``tpu``, ``tpu-pod`` or ``sagemaker``.
        command: The command, as typed into a shell.
        environment: Variables to add.
        overridable: Names in `environment` whose existing value has precedence.
        worker: The command of one process, if `command` starts several.
        processes: Number of processes on this machine.
        machines: Number of machines.
        notices: Lines to print.
        parallel_commands: Further commands to start in parallel.
    """

    launcher: str
    command: list[str]
    environment: dict[str, str]
    overridable: frozenset[str] = frozenset()
    worker: tuple[str, ...] = ()
    processes: int = 1
    machines: int = 1
    notices: tuple[str, ...] = ()
    parallel_commands: tuple[tuple[str, ...], ...] = ()

    def merged_environment(self, here: Mapping[str, str]) -> dict[str, str]:
        """Returns the child's whole environment, given the launcher's."""
        kept = self.overridable & here.keys()
        return {**here, **{name: value for name, value in self.environment.items() if name not in kept}}


def plan(argv: Sequence[str]) -> LaunchPlan:
    """Builds the plan for a command line, without inspecting the host.

    Args:
        argv: The arguments after ``accelerate launch``.

    Raises:
        SettingsError: if they cannot be used.

    Example:
        >>> plan(["--mixed_precision", "bf16", "train.py"]).environment["ACCELERATE_MIXED_PRECISION"]
        'bf16'
    """
    return build_plan(parse(argv))


def build_plan(settings: LaunchSettings) -> LaunchPlan:
    """Builds the plan for `settings`, and chooses the launcher.

    Raises:
        SettingsError: if settings contradict each other.
    """
    launcher = select_launcher(settings)
    validate(settings, launcher)
    environment, overridable = _environment(settings, launcher)
    worker = _worker_command(settings, unbuffered=launcher == "torch")
    parallel_commands: list[list[str]] = []
    if launcher == "torch":
        command = [*settings.python, "-m", "torch.distributed.run", *_torchrun_arguments(settings)]
    elif launcher in ("tpu", "tpu-pod"):
        from .engines import tpu

        command = tpu.host_command(settings)
        if launcher == "tpu-pod":  # its variables are part of the remote command
            command, *parallel_commands = tpu.pod_commands(settings, environment)
            environment = {}
    elif launcher == "mpirun":
        from .engines import mpi

        command = [*mpi.command(settings, environment), *worker]
    elif launcher == "deepspeed":
        from .engines import deepspeed

        command = deepspeed.command(settings)
    else:
        command = list(worker)
    return LaunchPlan(
        launcher,
        command,
        environment,
        overridable,
        worker,
        settings.processes_here,
        settings.machines,
        _notices(settings),
        tuple(map(tuple, parallel_commands)),
    )


def require_script(settings: LaunchSettings) -> None:
    """Checks that the command line names a script.

    Raises:
        SettingsError: if it does not.
    """
    if not settings.script:
        raise SettingsError("no script given. Write it after the launcher's flags: accelerate launch [flags] script.py")


def validate(settings: LaunchSettings, launcher: str) -> None:
    """Checks settings against each other.

    Args:
        settings: The settings.
        launcher: The launcher that they select.

    Raises:
        SettingsError: if they contradict each other.
    """
    machines, processes, rank = settings.machines, settings.processes, settings.machine_rank or 0
    require_script(settings)
    if settings.module and settings.no_python:
        raise SettingsError("--module and --no_python contradict each other: give one of them.")
    if processes % machines:
        raise SettingsError(
            f"{processes} processes cannot be shared evenly by {machines} machines: --num_processes counts the "
            "processes of all machines, and must be a multiple of --num_machines."
        )
    if rank >= machines:
        raise SettingsError(
            f"machine_rank is {rank}, but with num_machines {machines} the machines are numbered 0 to {machines - 1}."
        )
    if settings.main_process_port is not None and settings.main_process_port > 65535:
        raise SettingsError(f"main_process_port: expected at most 65535, found {settings.main_process_port}.")
    if machines > 1 and settings.main_process_port == 0:
        raise SettingsError("main_process_port 0 means any free port, which other machines cannot guess: choose one.")
    if machines > 1 and settings.main_process_ip is None and launcher in ("torch", "mpirun"):
        raise SettingsError(f"{machines} machines need the address of machine 0: give --main_process_ip.")
    if launcher == "mpirun":
        from .engines import mpi

        mpi.check(settings)
    elif launcher == "deepspeed":
        from .engines import deepspeed

        deepspeed.check(settings)


def select_launcher(settings: LaunchSettings) -> str:
    """Returns the launcher that the settings select."""
    if settings.compute_environment == "AMAZON_SAGEMAKER":
        return "sagemaker"
    if settings.tpu:
        return "tpu-pod" if settings.tpus.tpu_use_cluster else "tpu"
    if settings.placed_by:  # a scheduler has started one launcher per process
        return "python"
    if settings.use_deepspeed and settings.machines > 1:
        return "torch" if settings.deepspeed.deepspeed_multinode_launcher == "standard" else "deepspeed"
    if settings.mpirun.hostfile is not None:
        return "mpirun"
    # Engines need a process group, even of one; and a launcher that execs the script cannot restart it.
    grouped = settings.use_deepspeed or settings.use_fsdp or settings.use_megatron_lm or settings.max_restarts > 0
    return "torch" if grouped or settings.processes > 1 or settings.machines > 1 else "python"


# Environment ---------------------------------------------------------------------------------------------------------


def _environment(settings: LaunchSettings, launcher: str) -> tuple[dict[str, str], frozenset[str]]:
    added = {"ACCELERATE_MIXED_PRECISION": settings.mixed_precision or "no"}
    overridable: dict[str, str] = {}
    if settings.debug:
        added["ACCELERATE_DEBUG_MODE"] = "true"
    if settings.enable_cpu_affinity:
        added["ACCELERATE_CPU_AFFINITY"] = "1"
    if settings.gpu_ids not in (None, "all") and settings.device in _VISIBLE_DEVICES:
        added[_VISIBLE_DEVICES[settings.device]] = str(settings.gpu_ids)
    if settings.num_cpu_threads_per_process is not None:
        added["OMP_NUM_THREADS"] = str(settings.num_cpu_threads_per_process)
    elif settings.threads is not None and launcher not in ("tpu", "tpu-pod", "sagemaker"):  # they set it themselves
        overridable["OMP_NUM_THREADS"] = str(settings.threads)
    if launcher == "sagemaker":
        return {**added, **_sagemaker_environment(settings)}, frozenset()
    if launcher in ("tpu", "tpu-pod"):
        if settings.mixed_precision == "bf16":
            added["XLA_DOWNCAST_BF16" if settings.tpus.downcast_bf16 else "XLA_USE_BF16"] = "1"
        return {**overridable, **added, **_section_variables(settings)}, frozenset(overridable)
    if settings.cpu or launcher in ("python", "mpirun"):
        added["ACCELERATE_USE_CPU"] = "True" if settings.cpu else "False"
    if settings.cpu:  # recommended by Intel for its OpenMP; other implementations ignore these
        overridable["KMP_BLOCKTIME"] = "1"
        if (
            settings.processes_here == 1 and not settings.placed_by
        ):  # several processes would be bound to the same cores
            overridable["KMP_AFFINITY"] = "granularity=fine,compact,1,0"
    added |= _rendezvous_variables(settings, launcher)
    overridable |= _interface_variables(settings, launcher)
    if not settings.peer_access and (launcher != "python" or settings.placed_by):
        overridable |= {"NCCL_P2P_DISABLE": "1", "NCCL_IB_DISABLE": "1"}
    if settings.use_deepspeed and settings.directory is not None:
        overridable["PYTHONPATH"] = settings.directory
    added |= _option_variables(settings, "dynamo")
    added["ACCELERATE_DYNAMO_BACKEND"] = settings.dynamo.backend.upper()
    added |= _section_variables(settings)
    return {**overridable, **added}, frozenset(overridable)


def _interface_variables(settings: LaunchSettings, launcher: str) -> dict[str, str]:
    """Returns the variables that select the ranks' network interface; none if each rank must detect its own."""
    # mpirun passes one environment to all machines, and an interface may have another name on each.
    same_on_all = launcher == "torch" or settings.placed_by or (launcher == "mpirun" and settings.machines == 1)
    if not same_on_all or settings.interface is None:
        return {}
    names = {"GLOO_SOCKET_IFNAME": settings.interface}
    if settings.interface.startswith("lo") and settings.device == "cuda" and not settings.cpu:
        names["NCCL_SOCKET_IFNAME"] = settings.interface  # between machines, NCCL uses all interfaces
    return names


def _rendezvous_variables(settings: LaunchSettings, launcher: str) -> dict[str, str]:
    """Returns the rendezvous variables of ranks that an external launcher or a scheduler starts."""
    if launcher == "mpirun":
        from .engines import mpi

        return mpi.environment(settings)
    if launcher == "deepspeed":
        from .engines import deepspeed

        return deepspeed.environment(settings)
    if not settings.placed_by:
        return {}
    # Without these settings, ranks use the variables of MPI or SLURM.
    given = {"MASTER_ADDR": settings.main_process_ip, "MASTER_PORT": settings.main_process_port or None}
    return {name: str(value) for name, value in given.items() if value is not None}


def _sagemaker_environment(settings: LaunchSettings) -> dict[str, str]:
    """Returns the further variables of a job on Amazon SageMaker."""
    added = {"ACCELERATE_USE_SAGEMAKER": "true"}
    if settings.sagemaker.distributed != SageMakerDistributedType.NO.value:
        added["ACCELERATE_SAGEMAKER_DISTRIBUTED_TYPE"] = settings.sagemaker.distributed
    if settings.cpu:
        added["ACCELERATE_USE_CPU"] = "True"
    added |= _option_variables(settings, "dynamo")
    added["ACCELERATE_DYNAMO_BACKEND"] = settings.dynamo.backend.upper()
    return {**added, **_section_variables(settings)}


def _section_variables(settings: LaunchSettings) -> dict[str, str]:
    """Returns the variables of the sections in use."""
    added: dict[str, str] = {}
    if settings.deepspeed.gradient_accumulation_steps is not None:
        added["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] = str(settings.deepspeed.gradient_accumulation_steps)
    if settings.use_deepspeed:
        added["ACCELERATE_USE_DEEPSPEED"] = "true"
        added["ACCELERATE_CONFIG_DS_FIELDS"] = ",".join(settings.deepspeed_fields)
        added |= _option_variables(settings, "deepspeed")
    if settings.use_fsdp:
        added |= {"ACCELERATE_USE_FSDP": "true", **_option_variables(settings, "fsdp")}
    if settings.use_megatron_lm:
        added |= {"ACCELERATE_USE_MEGATRON_LM": "true", **_option_variables(settings, "megatron")}
    if settings.use_parallelism_config:
        added |= {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", **_mesh_variables(settings)}
    if settings.mixed_precision == "fp8" or settings.fp8.backend is not None:
        added |= _option_variables(settings, "fp8")
        for gemm, higher in zip(("FPROP", "DGRAD", "WGRAD"), settings.fp8.override_linear_precision, strict=True):
            added[f"ACCELERATE_FP8_OVERRIDE_{gemm}"] = "true" if higher else "false"
    return added


def _option_variables(settings: LaunchSettings, section: str) -> dict[str, str]:
    """Returns the variables of a section's options that have a value."""
    return {
        entry.variable: entry.render(value)
        for entry in option_specs(LaunchSettings)
        if entry.path[0] == section and entry.variable is not None and (value := entry.get(settings)) is not None
    }


def _mesh_variables(settings: LaunchSettings) -> dict[str, str]:
    """Returns the mesh's variables; options of a dimension only if its size is more than 1."""
    added = _option_variables(settings, "parallelism")
    details: dict[str, tuple[int, tuple[str, ...]]] = {"CP": (settings.parallelism.cp_size, ("COMM_STRATEGY",))}
    details["SP"] = (settings.parallelism.sp_size, ("SEQ_LENGTH", "SEQ_LENGTH_IS_VARIABLE", "ATTN_IMPLEMENTATION"))
    for dimension, (size, names) in details.items():
        for name in names if size == 1 else ():
            added.pop(f"PARALLELISM_CONFIG_{dimension}_{name}", None)
    if settings.parallelism.sp_size > 1:
        added.setdefault("PARALLELISM_CONFIG_SP_SEQ_LENGTH", "None")
    return added


# Commands ------------------------------------------------------------------------------------------------------------


def _worker_command(settings: LaunchSettings, unbuffered: bool) -> tuple[str, ...]:
    """Returns the command of one process."""
    if settings.no_python:
        return (settings.script, *settings.script_args)
    # Unbuffered, so that a rank that is killed does not lose the output in its buffer.
    options = ("-u",) if unbuffered and "-u" not in settings.python else ()
    module = ("-m",) if settings.module else ()
    return (*settings.python, *options, *module, settings.script, *settings.script_args)


def _torchrun_arguments(settings: LaunchSettings) -> list[str]:
    """Returns the arguments of torch.distributed.run."""
    port = DEFAULT_PORT if settings.main_process_port is None else settings.main_process_port
    arguments = ["--nnodes", str(settings.machines), "--nproc_per_node", str(settings.processes_here)]
    if settings.machines == 1 and settings.rdzv_backend == "static":
        arguments += ["--master_addr", "127.0.0.1", "--master_port", str(port)]
    elif settings.machines == 1:
        arguments += ["--rdzv_backend", settings.rdzv_backend, "--rdzv_endpoint", f"127.0.0.1:{port}"]
    else:
        arguments += ["--node_rank", str(settings.machine_rank or 0), "--rdzv_backend", settings.rdzv_backend]
        if settings.same_network and settings.rdzv_backend == "static":
            arguments += ["--master_addr", str(settings.main_process_ip), "--master_port", str(port)]
        else:
            address = str(settings.main_process_ip)
            arguments += ["--rdzv_endpoint", f"[{address}]:{port}" if ":" in address else f"{address}:{port}"]
    for entry in option_specs(LaunchSettings):
        if entry.dest in _TORCHRUN_OPTIONS and (value := entry.get(settings)) != entry.option.default:
            arguments += [f"--{entry.dest}", str(value)]
    if settings.module:
        arguments.append("--module")
    if settings.no_python:
        arguments.append("--no_python")
    return [*arguments, settings.script, *settings.script_args]


def _notices(settings: LaunchSettings) -> tuple[str, ...]:
    notices = []
    if settings.ipex or settings.use_xpu:
        notices.append(
            "--ipex and --use_xpu have no effect: PyTorch itself has replaced Intel's extension, which is discontinued."
        )
    return tuple(notices)
