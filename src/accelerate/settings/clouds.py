"""Settings of cloud machines in a configuration file: Amazon SageMaker and TPU pods.

These are top-level keys of the file without a flag of `accelerate launch`; `accelerate tpu-config` has flags of its own.
"""

from __future__ import annotations

from typing import Any

from .enums import SAGEMAKER_PYTHON_VERSION, SAGEMAKER_PYTORCH_VERSION, SAGEMAKER_TRANSFORMERS_VERSION
from .option import Settings, option


class SageMakerSettings(Settings):
    """A training job on Amazon SageMaker.

    Attributes:
        distributed: Value of a `SageMakerDistributedType` member; the key ``distributed_type`` in the file.
    """

    ec2_instance_type: str | None = option(
        None,
        "kind of instance, or local, or local_gpu",
        ask="Which EC2 instance type do you want to use for your training?",
    )
    iam_role_name: str | None = option(
        None, "role that the job takes on, by name or ARN", ask="What is the name or the ARN of the IAM role?"
    )
    profile: str | None = option(
        None,
        "profile of the AWS command line, where keys and a region are kept",
        ask="Which AWS profile do you want to use?",
    )
    region: str = option("us-east-1", "region of AWS", ask="Which AWS region do you want to use?")
    image_uri: str | None = option(
        None, "container image to use instead of Hugging Face's", ask="What is the URI of the Docker image?"
    )
    base_job_name: str = option("accelerate-sagemaker-1", "prefix of job names")
    transformers_version: str = option(SAGEMAKER_TRANSFORMERS_VERSION, "transformers in Hugging Face's image")
    pytorch_version: str = option(SAGEMAKER_PYTORCH_VERSION, "PyTorch in Hugging Face's image")
    py_version: str = option(SAGEMAKER_PYTHON_VERSION, "Python in Hugging Face's image")
    sagemaker_inputs_file: str | None = option(
        None,
        "table of data to bring to the instances",
        ask="What is the path to the file with the input channels (tab-separated: channel, location)?",
    )
    sagemaker_metrics_file: str | None = option(
        None,
        "table of numbers to read from the job's output",
        ask="What is the path to the file with the metrics (tab-separated: name, regular expression)?",
    )
    additional_args: dict[str, Any] | None = option(None, "more arguments of SageMaker's estimator, which win")

    distributed: str = "NO"


class TpuCommandSettings(Settings):
    """Commands to run on the workers of a TPU."""

    tpu_name: str | None = option(None, "name of the TPU", ask="What is the name of the TPU?")
    tpu_zone: str | None = option(None, "zone of the TPU", ask="What is the zone of the TPU?")
    command_file: str | None = option(
        None, "file with commands to run, one a line", ask="What is the path to the file with the commands, one a line?"
    )
    commands: tuple[str, ...] = option(
        (),
        "a command to run, may be repeated",
        flags=("--command",),
        ask="Which command should run on each host of the pod?",
    )
