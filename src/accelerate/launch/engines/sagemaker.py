"""Training jobs on Amazon SageMaker: converts settings to the arguments of an estimator, and starts it.

`build_job` is pure; `prepare_job` reads the tables that the settings name; `start` needs the SDK.
"""

from __future__ import annotations

import os.path
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ...settings import env
from ...settings.enums import SageMakerDistributedType
from ...settings.launcher import LaunchSettings
from ...settings.option import SettingsError
from ..console import log_line

INSTALL = 'Amazon SageMaker needs its SDK: pip install "accelerate[sagemaker]".'
_CREDENTIALS_HINT = (
    "set `profile` in the configuration file, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give them as flags"
)
_SCRIPT_MODE = "https://sagemaker.readthedocs.io/en/stable/frameworks/pytorch/using_pytorch.html"
# Default of the estimator's max_run, in seconds.
_MAX_RUN = 86400
_NUMBER = re.compile(r"-\d|-\.\d")
_INTEGER = re.compile(r"-?(0|[1-9]\d*)")
_SMALL_NUMBER = re.compile(r"-?\d+(\.\d+)?[eE]-\d+")


class TrainingJob(NamedTuple):
    """Arguments of a training job.

    Attributes:
        estimator: The arguments of ``sagemaker.huggingface.HuggingFace``.
        inputs: Channel -> location of its data, or None.
    """

    estimator: dict[str, Any]
    inputs: dict[str, str] | None = None


class JobTables(NamedTuple):
    """Contents of the tables that the settings name.

    Attributes:
        inputs: Channel -> location of its data.
        metrics: Name of a metric -> the regular expression that extracts it from the output.
    """

    inputs: dict[str, str] | None = None
    metrics: dict[str, str] | None = None


def prepare_job(settings: LaunchSettings, environment: Mapping[str, str]) -> TrainingJob:
    """Reads the tables that `settings` names, and builds the job.

    Raises:
        SettingsError: if settings, arguments of the script or a table cannot be used.
    """
    there = settings.sagemaker
    inputs = read_table(there.sagemaker_inputs_file, ("channel_name", "data_location"))
    metrics = read_table(there.sagemaker_metrics_file, ("metric_name", "metric_regex"))
    return build_job(settings, environment, JobTables(inputs, metrics))


def build_job(settings: LaunchSettings, environment: Mapping[str, str], tables: JobTables | None = None) -> TrainingJob:
    """Builds the job for `settings`.

    Args:
        settings: The settings of the launch.
        environment: Variables of the job's processes.
        tables: Contents of the tables that the settings name.

    Raises:
        SettingsError: if settings contradict each other, or the script's arguments cannot be passed on.
    """
    check(settings)
    tables = tables or JobTables()
    there = settings.sagemaker
    more = dict(there.additional_args or {})
    folder, script = os.path.split(settings.script)
    hyperparameters = parse_hyperparameters(settings.script_args)
    estimator: dict[str, Any] = {
        "image_uri": there.image_uri,
        "entry_point": script,
        "source_dir": folder or ".",
        "role": there.iam_role_name,
        "transformers_version": there.transformers_version,
        "pytorch_version": there.pytorch_version,
        "py_version": there.py_version,
        "base_job_name": there.base_job_name,
        "instance_count": settings.machines,
        "instance_type": there.ec2_instance_type,
        "debugger_hook_config": False,  # it hooks into training loops of other frameworks
        "distribution": _distribution(there.distributed),
        "metric_definitions": [{"Name": name, "Regex": regex} for name, regex in (tables.metrics or {}).items()],
        # Flags override the file, and the file overrides the variables of the launcher.
        "hyperparameters": {**_mapping(more.pop("hyperparameters", None), "hyperparameters"), **hyperparameters},
        "environment": {**environment, **_words(_mapping(more.pop("environment", None), "environment"))},
    }
    inputs = more.pop("inputs", None) or tables.inputs
    return TrainingJob(
        {name: value for name, value in {**estimator, **more}.items() if value not in (None, [])}, inputs
    )


def _mapping(value: Any, name: str) -> dict[str, Any]:
    if value is None or isinstance(value, dict):
        return value or {}
    raise SettingsError(f"additional_args.{name}: expected keys and values of its own, found {value!r}.")


def _words(variables: Mapping[str, Any]) -> dict[str, str]:
    return {str(name): str(value) for name, value in variables.items()}


def check(settings: LaunchSettings) -> None:
    """Checks the settings of a job.

    Raises:
        SettingsError: if they are incomplete, or contradict each other.
    """
    there = settings.sagemaker
    more = there.additional_args or {}
    where = "the configuration file for Amazon SageMaker"
    missing = [name for name in ("ec2_instance_type", "iam_role_name") if not getattr(there, name)]
    if missing:
        raise SettingsError(f"{where} needs {' and '.join(missing)}.")
    if settings.module or settings.no_python:
        flag = "--module" if settings.module else "--no_python"
        raise SettingsError(f"{flag} does not go with Amazon SageMaker, which starts a Python file: name the file.")
    keys = [settings.aws.aws_access_key_id, settings.aws.aws_secret_access_key]
    if any(keys) and not all(keys):
        raise SettingsError("--aws_access_key_id and --aws_secret_access_key belong together: give both, or neither.")
    if there.distributed == SageMakerDistributedType.MODEL_PARALLEL.value and "distribution" not in more:
        raise SettingsError(
            f"distributed_type MODEL_PARALLEL: {where} must configure SageMaker's model parallelism in "
            "additional_args: distribution."
        )
    spot, max_wait, max_run = more.get("use_spot_instances"), more.get("max_wait"), more.get("max_run", _MAX_RUN)
    if spot and max_wait is None:
        raise SettingsError(
            "additional_args.use_spot_instances needs additional_args.max_wait: how many seconds at most."
        )
    if max_wait is not None and not spot:
        raise SettingsError("additional_args.max_wait is about spot instances: set use_spot_instances as well.")
    if spot and _integer(max_wait, "max_wait") < _integer(max_run, "max_run"):
        raise SettingsError(
            f"additional_args.max_wait is {max_wait} seconds, less than max_run, {max_run}: it counts the wait for an "
            "instance and the run together."
        )


def _integer(value: Any, name: str) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise SettingsError(f"additional_args.{name}: expected a whole number of seconds, found {value!r}.")


def _distribution(distributed: str) -> dict[str, Any] | None:
    if distributed == SageMakerDistributedType.DATA_PARALLEL.value:
        return {"smdistributed": {"dataparallel": {"enabled": True}}}
    return None


# The script's arguments ----------------------------------------------------------------------------------------------


def parse_hyperparameters(words: Sequence[str]) -> dict[str, Any]:
    """Converts the script's arguments to SageMaker's hyperparameters, which the script receives as ``--name value``.

    Numbers and booleans are converted if SageMaker formats them as the same string (or a small number in another notation:
    1e-3, 0.001); other values stay strings. Several values become a list, which the script receives as one argument.

    Raises:
        SettingsError: for an argument without a name or a value, or a name that comes twice.
    """
    found: dict[str, Any] = {}
    position = 0
    while position < len(words):
        word = words[position]
        position += 1
        if not _is_flag(word):
            raise SettingsError(
                f"argument {word!r} of the script has no name: on Amazon SageMaker each needs one, as in --name {word}."
            )
        name, has_value, value = word.lstrip("-").partition("=")
        if not word.startswith("--") and len(name) > 1:
            raise SettingsError(
                f"{word}: Amazon SageMaker hands on names of several letters with two dashes: write --{name}."
            )
        values = [value] if has_value else []
        while position < len(words) and not _is_flag(words[position]) and not has_value:
            values.append(words[position])
            position += 1
        if not values:
            raise SettingsError(
                f"{word} has no value: Amazon SageMaker does not support argparse actions, such as store_true. Have the "
                f"script take a value (type=bool, or a type of its own), and write {word} True. See {_SCRIPT_MODE}"
            )
        if name in found:
            raise SettingsError(f"--{name} comes twice: Amazon SageMaker keeps one value of each name.")
        typed = [_typed(value) for value in values]
        found[name] = typed[0] if len(typed) == 1 else typed
    return found


def _is_flag(word: str) -> bool:
    """Returns whether a word names an argument; ``-3`` and ``-.5`` are numbers."""
    return len(word) > 1 and word.startswith("-") and word != "--" and not _NUMBER.match(word)


def _typed(text: str) -> Any:
    if text in ("True", "False"):
        return text == "True"
    if _INTEGER.fullmatch(text):
        return int(text)
    try:
        number = float(text)
    except ValueError:
        return text
    same = str(number) == text and text not in ("nan", "inf", "-inf")
    return number if same or _SMALL_NUMBER.fullmatch(text) else text


# Tables --------------------------------------------------------------------------------------------------------------


def read_table(path: str | None, columns: tuple[str, str]) -> dict[str, str] | None:
    """Reads a table of two tab-separated columns, with their names in the first line.

    Args:
        path: The file, or None for no table.
        columns: The columns' names.

    Raises:
        SettingsError: if the file cannot be read, or a line is not a pair; the message names file and line.
    """
    if path is None:
        return None
    heading = "<tab>".join(columns)
    try:
        with open(os.path.expanduser(path), encoding="utf-8") as file:
            lines = file.read().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"table {path} cannot be read: {error}") from None
    if not lines or tuple(lines[0].strip().split("\t")) != columns:
        found = lines[0] if lines else "an empty file"
        raise SettingsError(f"{path}, line 1: expected the columns' names, {heading}, found {found!r}.")
    table: dict[str, str] = {}
    for number, line in enumerate(lines[1:], start=2):
        if not line.strip():
            continue
        cells = [cell.strip() for cell in line.split("\t")]
        if len(cells) != 2 or not all(cells):
            raise SettingsError(f"{path}, line {number}: expected {heading}, found {line!r}.")
        if cells[0] in table:
            raise SettingsError(f"{path}, line {number}: {cells[0]} comes twice.")
        table[cells[0]] = cells[1]
    return table


def format_job(job: TrainingJob) -> str:
    """Formats the job as the Python code that starts it."""
    arguments = "".join(f"    {name}={value!r},\n" for name, value in job.estimator.items())
    inputs = f"inputs={job.inputs!r}" if job.inputs else ""
    return f"from sagemaker.huggingface import HuggingFace\n\nHuggingFace(\n{arguments}).fit({inputs})"


# Action --------------------------------------------------------------------------------------------------------------


def credentials(settings: LaunchSettings) -> dict[str, str | None]:
    """Returns the variables with AWS credentials and region for this process; None removes a variable."""
    aws = settings.aws
    variables: dict[str, str | None] = {"AWS_DEFAULT_REGION": settings.sagemaker.region}
    if aws.aws_access_key_id is not None:
        # Keys on the command line override a profile, and must not be combined with the token of another login.
        variables |= {"AWS_PROFILE": None, "AWS_SESSION_TOKEN": None}
        variables["AWS_ACCESS_KEY_ID"] = aws.aws_access_key_id
        variables["AWS_SECRET_ACCESS_KEY"] = aws.aws_secret_access_key
    elif settings.sagemaker.profile is not None:
        variables["AWS_PROFILE"] = settings.sagemaker.profile
    return variables


def start(environment: Mapping[str, str], settings: LaunchSettings) -> int:
    """Starts the job and follows it to its end.

    Args:
        environment: Variables of the job's processes.
        settings: The settings of the launch.

    Returns:
        0 if the job succeeded, 1 if it failed, 130 after Ctrl-C, which does not end the job.

    Raises:
        SettingsError: if the job cannot be built, or is rejected.
    """

    def show(line: str) -> None:
        if not settings.quiet:
            print(line, flush=True)

    job = prepare_job(settings, environment)
    show("Configuring Amazon SageMaker environment")
    env.publish({**credentials(settings), "SAGEMAKER_SUPPRESS_V2_WARNING": "1"})
    show("Converting Arguments to Hyperparameters")
    try:
        import boto3
        from botocore.exceptions import BotoCoreError, ClientError

        if boto3.Session().get_credentials() is None:
            raise SettingsError(f"no AWS credentials found: {_CREDENTIALS_HINT}")
        from sagemaker.exceptions import UnexpectedStatusException
        from sagemaker.huggingface import HuggingFace
    except ImportError as error:
        raise SettingsError(f"{INSTALL} ({error})") from None
    except BotoCoreError as error:  # a profile that does not exist, for instance
        raise SettingsError(f"AWS: {_first_line(error)} ({_CREDENTIALS_HINT})") from None
    _check_names(job, HuggingFace)
    show("Creating Estimator")
    estimator: Any = None
    try:
        estimator = HuggingFace(**job.estimator)
        # Not waiting inside `fit`: the SDK's telemetry, around it, swallows a Ctrl-C.
        estimator.fit(inputs=job.inputs, wait=False)
        if estimator.latest_training_job is None:
            raise KeyboardInterrupt
        estimator.latest_training_job.wait()
    except UnexpectedStatusException as error:
        log_line(f"the job failed: {_first_line(error)}")
        return 1
    except (BotoCoreError, ClientError, ValueError, ImportError, OSError) as error:
        raise SettingsError(f"Amazon SageMaker: {_first_line(error)}") from None
    except KeyboardInterrupt:
        started = getattr(estimator, "latest_training_job", None)
        stop = f"`aws sagemaker stop-training-job --training-job-name {started.name}` ends it" if started else ""
        log_line(
            f"stopped watching, but the job continues: {stop}" if started else "interrupted before a job was started"
        )
        return 130
    show(f"\nYou can find your model data at: {estimator.model_data}")
    return 0


def _check_names(job: TrainingJob, kind: type) -> None:
    """Rejects misspelled arguments, which the SDK would silently ignore."""
    import difflib
    import inspect

    makers = [base.__init__ for base in kind.__mro__ if "__init__" in vars(base)]  # type: ignore[misc]
    known = {name for maker in makers for name in inspect.signature(maker).parameters}
    for name in job.estimator:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise SettingsError(f"additional_args: SageMaker's estimator has no argument {name}.{hint}")


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
