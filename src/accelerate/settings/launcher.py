"""Declares the options of `accelerate launch`: flags, keys of the configuration file and the child's variables.

A plan is built from `LaunchSettings`; its groups are in `settings.option_groups`. Nothing here inspects the machine:
`launch.host` fills facts about it into the last fields before a plan is built.
"""

from __future__ import annotations

import sys

from .clouds import SageMakerSettings, TpuCommandSettings
from .option import Settings, option, section
from .option_groups import (
    RESOURCES,
    AwsSettings,
    DeepSpeedSettings,
    DynamoSettings,
    Fp8Settings,
    FsdpSettings,
    MegatronSettings,
    MpirunSettings,
    ParallelismSettings,
    TpuSettings,
)

HARDWARE = "Hardware Selection Arguments"
PARADIGM = "Training Paradigm Arguments"
DISTRIBUTED = "Distributed GPUs"


class LaunchSettings(Settings):
    """Settings of one `accelerate launch`, completed by facts about the machine.

    Attributes:
        script: The script, module or program, as given.
        script_args: Its arguments, unchanged.
        compute_environment: ``LOCAL_MACHINE`` or ``AMAZON_SAGEMAKER``.
        deepspeed_fields: The DeepSpeed keys that the configuration file sets.
        sagemaker: The configuration file's settings of Amazon SageMaker.
        pod: The configuration file's settings of a TPU pod.
        python: The interpreter and its options.
        device: The device type that processes compute on, as in `runtime.devices`.
        threads: Default of OMP_NUM_THREADS.
        interface: The network interface for the rendezvous.
        directory: The working directory of the command.
    """

    config_file: str | None = option(None, "configuration file (yaml or json) instead of the default one")
    quiet: bool = option(False, "print nothing of the launcher's own", switch=True, flags=("-q",))
    module: bool = option(False, "run the script as a module, like python -m", switch=True, flags=("-m",))
    no_python: bool = option(False, "run the script itself, without python", switch=True)
    dry_run: bool = option(False, "print the command and its environment, and start nothing", switch=True)
    debug: bool = option(
        False,
        "compare shapes before each collective, and show torch's own messages",
        switch=True,
        env="ACCELERATE_DEBUG_MODE",
        ask="Should collective operations be checked for errors while running (slower, but shows what would hang)?",
    )

    cpu: bool = option(
        False,
        "compute on the CPU",
        group=HARDWARE,
        switch=True,
        key="use_cpu",
        ask="Do you want to run your training on CPU only (even if a GPU / Apple Silicon device is available)?",
    )
    multi_gpu: bool = option(False, "one process per GPU", group=HARDWARE, switch=True)
    tpu: bool = option(False, "compute on TPUs", group=HARDWARE, switch=True)
    ipex: bool = option(False, "accepted for older scripts, without effect", group=HARDWARE, switch=True)

    mixed_precision: str | None = option(
        None,
        "number format of the computation",
        group=RESOURCES,
        choices=("no", "fp16", "bf16", "fp8"),
        env="ACCELERATE_MIXED_PRECISION",
        ask="Do you wish to use FP16 or BF16 (mixed precision)?",
    )
    num_processes: int | None = option(
        None,
        "processes in all, over all machines",
        group=RESOURCES,
        minimum=1,
        ask="How many {devices} should be used for distributed training?",
    )
    num_machines: int | None = option(
        None,
        "machines",
        group=RESOURCES,
        minimum=1,
        ask="How many different machines will you use (use more than 1 for multi-node training)?",
    )
    num_cpu_threads_per_process: int | None = option(
        None,
        "threads of each process (default: cores divided by processes)",
        group=RESOURCES,
        minimum=1,
        env="OMP_NUM_THREADS",
    )
    enable_cpu_affinity: bool = option(
        False,
        "bind each process to the cores near its GPU",
        group=RESOURCES,
        switch=True,
        ask="Should each process be bound to the processor cores near its GPU (NUMA affinity)?",
    )
    dynamo: DynamoSettings = section(DynamoSettings)

    use_deepspeed: bool = option(
        False,
        "DeepSpeed",
        group=PARADIGM,
        switch=True,
        env="ACCELERATE_USE_DEEPSPEED",
        ask="Do you want to use DeepSpeed?",
    )
    use_fsdp: bool = option(
        False,
        "fully sharded data parallelism",
        group=PARADIGM,
        switch=True,
        env="ACCELERATE_USE_FSDP",
        ask="Do you want to use FullyShardedDataParallel?",
    )
    use_parallelism_config: bool = option(
        False,
        "a device mesh of several dimensions",
        group=PARADIGM,
        switch=True,
        env="ACCELERATE_USE_PARALLELISM_CONFIG",
        ask="Do you want to combine kinds of parallelism on a device mesh (ParallelismConfig)?",
    )
    use_megatron_lm: bool = option(
        False,
        "Megatron-LM",
        group=PARADIGM,
        switch=True,
        env="ACCELERATE_USE_MEGATRON_LM",
        ask="Do you want to use Megatron-LM?",
    )
    use_xpu: bool = option(False, "accepted for older scripts, without effect", group=PARADIGM, switch=True)

    gpu_ids: str | None = option(
        None,
        "GPUs to use on this machine, by commas, or all",
        group=DISTRIBUTED,
        ask="Which {devices} of this machine should be used? Their numbers, separated by commas, or all",
    )
    same_network: bool = option(
        False,
        "all machines are on one local network",
        group=DISTRIBUTED,
        switch=True,
        ask="Are all the machines on the same local network? Answer `no` if nodes are on the cloud and/or on different "
        "network hosts",
    )
    machine_rank: int | None = option(
        None, "number of this machine, from 0", group=DISTRIBUTED, minimum=0, ask="What is the rank of this machine?"
    )
    main_process_ip: str | None = option(
        None,
        "address of machine 0",
        group=DISTRIBUTED,
        ask="What is the IP address of the machine that will host the main process?",
    )
    main_process_port: int | None = option(
        None,
        "port of machine 0 (default 29500; 0 or a busy one: any free port)",
        group=DISTRIBUTED,
        minimum=0,
        ask="What is the port you will use to communicate with the main process?",
    )
    tee: str = option("0", "copy streams into log files: 1 stdout, 2 stderr, 3 both", group=DISTRIBUTED, flags=("-t",))
    log_dir: str | None = option(None, "folder for log files", group=DISTRIBUTED)
    role: str = option("default", "name of the processes for torch's agent", group=DISTRIBUTED)
    rdzv_backend: str = option(
        "static",
        "how machines find each other (static, c10d)",
        group=DISTRIBUTED,
        ask="Which rendezvous backend should the machines find each other with (static, c10d, ...)?",
    )
    rdzv_conf: str = option("", "more for the rendezvous: key=value,key=value", group=DISTRIBUTED)
    max_restarts: int = option(0, "how often failed processes are started again", group=DISTRIBUTED, minimum=0)
    monitor_interval: float = option(0.1, "seconds between looks at the processes", group=DISTRIBUTED, minimum=0.01)

    tpus: TpuSettings = section(TpuSettings)
    deepspeed: DeepSpeedSettings = section(DeepSpeedSettings)
    fsdp: FsdpSettings = section(FsdpSettings)
    megatron: MegatronSettings = section(MegatronSettings)
    fp8: Fp8Settings = section(Fp8Settings)
    aws: AwsSettings = section(AwsSettings)
    mpirun: MpirunSettings = section(MpirunSettings)
    parallelism: ParallelismSettings = section(ParallelismSettings)

    script: str = ""
    script_args: tuple[str, ...] = ()
    compute_environment: str = "LOCAL_MACHINE"
    deepspeed_fields: tuple[str, ...] = ()
    sagemaker: SageMakerSettings = SageMakerSettings()
    pod: TpuCommandSettings = TpuCommandSettings()
    python: tuple[str, ...] = (sys.executable,)
    device: str = "cuda"
    threads: int | None = None
    interface: str | None = None
    directory: str | None = None
    cores: int | None = None
    placed_by: str = ""
    mpi: str = "openmpi"
    elsewhere: bool = False
    peer_access: bool = True

    @property
    def machines(self) -> int:
        """How many machines take part."""
        return self.num_machines or 1

    @property
    def processes(self) -> int:
        """How many processes there are in all."""
        return self.num_processes or self.machines

    @property
    def processes_here(self) -> int:
        """How many processes this machine starts."""
        return self.processes // self.machines

    @property
    def on_cpu(self) -> bool:
        """Whether processes compute on the CPU."""
        return self.cpu or self.device == "cpu"
