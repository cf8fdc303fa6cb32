"""Questions that only select other questions, and all options that `accelerate config` can ask for, by name.

A routing question is declared like an option (`settings.option`), so its answer is parsed and validated in the same way.
Only those with a ``key`` are stored in the file.
"""

from __future__ import annotations

from ...settings.clouds import SageMakerSettings, TpuCommandSettings
from ...settings.launcher import LaunchSettings
from ...settings.option import OptionSpec, Settings, option, option_specs

# The file's `distributed_type` -> its label, and the unit that is counted. The documentation numbers the first four.
MACHINES = {
    "NO": ("No distributed training", "GPU(s)"),
    "MULTI_CPU": ("multi-CPU", "processes"),
    "MULTI_GPU": ("multi-GPU", "GPU(s)"),
    "XLA": ("TPU", "TPU cores"),
    "MULTI_XPU": ("multi-XPU (Intel)", "XPU(s)"),
    "MULTI_NPU": ("multi-NPU (Ascend)", "NPU(s)"),
    "MULTI_MLU": ("multi-MLU (Cambricon)", "MLU(s)"),
    "MULTI_SDAA": ("multi-SDAA (Tecorigin)", "SDAA(s)"),
    "MULTI_MUSA": ("multi-MUSA (Moore Threads)", "MUSA(s)"),
    "MULTI_HPU": ("multi-HPU (Gaudi)", "HPU(s)"),
    "MULTI_NEURON": ("multi-Neuron (Trainium)", "Neuron core(s)"),
}


class RoutingQuestions(Settings):
    """Questions whose answers select the next questions; ``help`` names those that follow a yes."""

    compute_environment: str = option(
        "LOCAL_MACHINE",
        "all the rest",
        choices=("LOCAL_MACHINE", "AMAZON_SAGEMAKER"),
        key="compute_environment",
        ask="In which compute environment are you running?",
    )
    machine: str = option(
        "NO",
        "what fits the device",
        choices=tuple(MACHINES),
        key="distributed_type",
        ask="Which type of machine are you using?",
    )
    mpirun: bool = option(False, "hostfile and threads", ask="Do you want accelerate to launch mpirun?")
    dynamo: bool = option(False, "a backend", ask="Do you wish to optimize your script with torch dynamo?")
    dynamo_details: bool = option(
        False, "the compiler's options", ask="Do you want to change the defaults of the compiler?"
    )
    deepspeed_file: bool = option(
        False, "the file's path", ask="Do you want to specify a json file to a DeepSpeed config?"
    )
    clipping: bool = option(False, "the largest norm", ask="Do you want to use gradient clipping?")
    moe: bool = option(False, "class names of layers", ask="Do you want to train a Mixture-of-Experts model (MoE)?")
    exclusion: bool = option(False, "a filter", ask="Do you want to leave out some hosts or devices of the hostfile?")
    inclusion: bool = option(False, "a filter", ask="Do you want to use only some hosts or devices of the hostfile?")
    no_split_modules: bool = option(
        False,
        "no class names",
        ask="Do you want to use the model's `_no_split_modules` to wrap (for Transformers models)?",
    )
    tpu_vms: bool = option(False, "their names", ask="Do you want to name single compute VMs of the pod?")
    tpu_variables: bool = option(False, "their values", ask="Do you want to set environment variables on the VMs?")
    tpu_startup: bool = option(False, "commands", ask="Should commands run on each host of the pod first?")
    tpu_file: bool = option(False, "a path", ask="Are these commands in a file?")
    tpu_install: bool = option(False, "a command", ask="Should accelerate be installed on each host of the pod?")

    # Amazon SageMaker
    sagemaker_mode: str = option(
        "NO",
        "instances that fit",
        choices=("NO", "DATA_PARALLEL"),
        key="distributed_type",
        ask="What is the distributed mode?",
    )
    authorization: str = option(
        "profile", "a profile, or keys", choices=("profile", "keys"), ask="How do you want to authorize?"
    )
    iam_role: str = option(
        "name",
        "a name, or nothing",
        choices=("name", "create"),
        ask="How will the training job get its permissions (IAM role)?",
    )
    image: bool = option(False, "its address", ask="Do you want to use a custom Docker image?")
    inputs: bool = option(False, "a path", ask="Do you want to provide SageMaker input channels with data locations?")
    metrics: bool = option(False, "a path", ask="Do you want to enable SageMaker metrics?")


ENTRIES: dict[str, OptionSpec] = {
    entry.dest: entry
    for settings in (LaunchSettings, SageMakerSettings, TpuCommandSettings, RoutingQuestions)
    for entry in option_specs(settings)
}
STEPS = frozenset(entry.dest for entry in option_specs(RoutingQuestions))
