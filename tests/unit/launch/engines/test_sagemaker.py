"""A configuration file and the script's arguments to a training job on Amazon SageMaker, without the SDK."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import yaml

from accelerate.commands.config import SageMakerConfig
from accelerate.commands.launch import launch_command_parser
from accelerate.launch import parse
from accelerate.launch.engines import sagemaker
from accelerate.launch.plan import build_plan
from accelerate.settings.option import SettingsError
from accelerate.utils import prepare_sagemager_args_inputs

# The guide's example.
GUIDE = """
base_job_name: accelerate-sagemaker-1
compute_environment: AMAZON_SAGEMAKER
distributed_type: DATA_PARALLEL
ec2_instance_type: ml.p3.16xlarge
iam_role_name: xxxxx
image_uri: null
mixed_precision: fp16
num_machines: 1
profile: xxxxx
py_version: py38
pytorch_version: 1.10.2
region: us-east-1
transformers_version: 4.17.0
use_cpu: false
"""


def job(folder: Path, *words: str, flags: tuple[str, ...] = (), **changes: Any) -> sagemaker.TrainingJob:
    path = folder / "aws.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(GUIDE), **changes}))
    settings = parse.parse(["--config_file", str(path), *flags, *(words or ("train.py",))])
    return sagemaker.prepare_job(settings, build_plan(settings).environment)


class TestTheEstimator:
    def test_of_the_guides_example(self, tmp_path: Path) -> None:
        made = job(tmp_path, "code/train.py", "--lr", "5e-5", "--epochs", "3")
        assert made.estimator.pop("environment") == {
            "ACCELERATE_MIXED_PRECISION": "fp16",
            "ACCELERATE_USE_SAGEMAKER": "true",
            "ACCELERATE_SAGEMAKER_DISTRIBUTED_TYPE": "DATA_PARALLEL",
            "ACCELERATE_DYNAMO_BACKEND": "NO",
            "ACCELERATE_DYNAMO_MODE": "default",
            "ACCELERATE_DYNAMO_USE_FULLGRAPH": "False",
            "ACCELERATE_DYNAMO_USE_DYNAMIC": "False",
            "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": "False",
        }
        assert made.estimator == {
            "entry_point": "train.py",
            "source_dir": "code",
            "role": "xxxxx",
            "transformers_version": "4.17.0",
            "pytorch_version": "1.10.2",
            "py_version": "py38",
            "base_job_name": "accelerate-sagemaker-1",
            "instance_count": 1,
            "instance_type": "ml.p3.16xlarge",
            "debugger_hook_config": False,
            "distribution": {"smdistributed": {"dataparallel": {"enabled": True}}},
            "hyperparameters": {"lr": 5e-05, "epochs": 3},
        }
        assert made.inputs is None

    def test_flags_reach_the_jobs_environment(self, tmp_path: Path) -> None:
        flags = ("--mixed_precision", "bf16", "--dynamo_backend", "inductor", "--debug", "--cpu")
        environment = job(tmp_path, flags=flags, distributed_type="NO").estimator["environment"]
        assert environment["ACCELERATE_MIXED_PRECISION"] == "bf16"
        assert environment["ACCELERATE_DYNAMO_BACKEND"] == "INDUCTOR"
        assert environment["ACCELERATE_DEBUG_MODE"] == "true" and environment["ACCELERATE_USE_CPU"] == "True"
        assert "ACCELERATE_SAGEMAKER_DISTRIBUTED_TYPE" not in environment
        assert "OMP_NUM_THREADS" not in environment  # the cores of this machine say nothing about that one

    def test_what_the_file_adds_wins(self, tmp_path: Path) -> None:
        more = {
            "enable_network_isolation": True,
            "keep_alive_period_in_seconds": 600,
            "max_run": 60,
            "use_spot_instances": True,
            "max_wait": 120,
            "debugger_hook_config": None,
            "environment": {"ACCELERATE_MIXED_PRECISION": "no", "SEED": 3},
            "hyperparameters": {"lr": 1, "seed": 4},
        }
        made = job(tmp_path, "train.py", "--lr", "2", additional_args=more).estimator
        assert made["enable_network_isolation"] is True and made["keep_alive_period_in_seconds"] == 600
        assert (made["max_run"], made["use_spot_instances"], made["max_wait"]) == (60, True, 120)
        assert "debugger_hook_config" not in made
        assert made["environment"]["ACCELERATE_MIXED_PRECISION"] == "no" and made["environment"]["SEED"] == "3"
        assert made["hyperparameters"] == {"lr": 2, "seed": 4}  # but a flag wins over the file
        assert made["source_dir"] == "."

    def test_several_instances_and_the_local_mode(self, tmp_path: Path) -> None:
        assert job(tmp_path, num_machines=4, distributed_type="NO").estimator["instance_count"] == 4
        local = job(tmp_path, ec2_instance_type="local", distributed_type="NO").estimator
        assert local["instance_type"] == "local" and "distribution" not in local
        assert job(tmp_path, image_uri="mine:1").estimator["image_uri"] == "mine:1"

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"ec2_instance_type": None}, "needs ec2_instance_type"),
            ({"ec2_instance_type": None, "iam_role_name": None}, "needs ec2_instance_type and iam_role_name"),
            ({"distributed_type": "MODEL_PARALLEL"}, "MODEL_PARALLEL: .* additional_args: distribution"),
            ({"additional_args": ["x"]}, "additional_args: expected keys and values of its own"),
            ({"additional_args": {"use_spot_instances": True}}, "use_spot_instances needs additional_args.max_wait"),
            ({"additional_args": {"max_wait": 5}}, "set use_spot_instances as well"),
            ({"additional_args": {"use_spot_instances": True, "max_wait": 5}}, "max_wait is 5 seconds, less than max_run"),
            ({"additional_args": {"use_spot_instances": True, "max_wait": "1 h"}}, "max_wait: expected a whole number"),
            ({"additional_args": {"environment": "A=b"}}, "additional_args.environment: expected keys and values"),
            ({"sagemaker_inputs_file": "/none/there.tsv"}, "table /none/there.tsv cannot be read"),
            ({"ec2_instanc_type": "x"}, "unknown key ec2_instanc_type. Did you mean ec2_instance_type?"),
        ],
    )  # fmt: skip
    def test_what_cannot_be_used(self, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
        with pytest.raises(SettingsError, match=message):
            job(tmp_path, **changes)

    def test_model_parallelism_with_what_it_needs(self, tmp_path: Path) -> None:
        distribution = {"smdistributed": {"modelparallel": {"enabled": True}}, "mpi": {"enabled": True}}
        made = job(tmp_path, distributed_type="MODEL_PARALLEL", additional_args={"distribution": distribution})
        assert made.estimator["distribution"] == distribution

    @pytest.mark.parametrize("flag", ["--module", "--no_python"])
    def test_only_a_file_can_be_started(self, flag: str, tmp_path: Path) -> None:
        with pytest.raises(SettingsError, match=f"{flag} does not go with Amazon SageMaker"):
            job(tmp_path, flags=(flag,))

    def test_as_text(self, tmp_path: Path) -> None:
        text = sagemaker.format_job(job(tmp_path, "train.py", "--lr", "2"))
        calls: list[dict[str, Any]] = []

        class Estimator:
            def __init__(self, **arguments: Any) -> None:
                calls.append(arguments)

            def fit(self) -> None:
                pass

        exec(text.split("\n", 1)[1], {"HuggingFace": Estimator})
        assert calls == [job(tmp_path, "train.py", "--lr", "2").estimator]

    def test_a_misspelled_argument_is_named(self) -> None:
        class Base:
            def __init__(self, max_run: int = 0, **others: Any) -> None: ...

        class Estimator(Base):
            def __init__(self, entry_point: str, **others: Any) -> None: ...

        sagemaker._check_names(sagemaker.TrainingJob({"entry_point": "x", "max_run": 1}), Estimator)
        with pytest.raises(SettingsError, match="no argument max_runs. Did you mean max_run?"):
            sagemaker._check_names(sagemaker.TrainingJob({"max_runs": 1}), Estimator)


class TestHyperparameters:
    @pytest.mark.parametrize(
        ("words", "expected"),
        [
            ("", {}),
            ("--lr 1e-3 --epochs 3 --name bert", {"lr": 0.001, "epochs": 3, "name": "bert"}),
            ("--shift -3 --low -.5 --bias -0.25 -k -1e-4", {"shift": -3, "low": "-.5", "bias": -0.25, "k": -0.0001}),
            ("--fp16 True --eval False --word true", {"fp16": True, "eval": False, "word": "true"}),
            ("--layers 1 2 3 --names a -1 True", {"layers": [1, 2, 3], "names": ["a", -1, True]}),
            ("--a=b --c=d=e --empty= --minus=-x", {"a": "b", "c": "d=e", "empty": "", "minus": "-x"}),
            ("--learning-rate .1 --out_dir -", {"learning-rate": ".1", "out_dir": "-"}),
            # What would come back as another word stays text.
            ("--seed 007 --version 1.10 --big 1_000 --x nan --y 1e5 --z None", {
                "seed": "007", "version": "1.10", "big": "1_000", "x": "nan", "y": "1e5", "z": "None"}),
        ],
    )  # fmt: skip
    def test_words_by_name(self, words: str, expected: dict[str, Any]) -> None:
        found = sagemaker.parse_hyperparameters(words.split())
        assert found == expected and {name: type(value) for name, value in found.items()} == {
            name: type(value) for name, value in expected.items()
        }

    def test_spaces_stay_inside_a_word(self) -> None:
        assert sagemaker.parse_hyperparameters(["--text", "a b", "--q=c d"]) == {"text": "a b", "q": "c d"}

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            ("--train", "--train has no value: Amazon SageMaker does not support argparse actions"),
            ("--train --lr 1", "write --train True"),
            ("--lr 1 -v", "-v has no value"),
            ("data --lr 1", "argument 'data' of the script has no name"),
            ("--a=b c", "argument 'c' of the script has no name"),
            ("-- --lr 1", "argument '--' of the script has no name"),
            ("--tag a --tag b", "--tag comes twice"),
            ("-lr 1", "-lr: .* write --lr"),
        ],
    )
    def test_what_sagemaker_cannot_hand_on(self, words: str, message: str) -> None:
        with pytest.raises(SettingsError, match=message):
            sagemaker.parse_hyperparameters(words.split())


class TestTables:
    def test_inputs_and_metrics(self, tmp_path: Path) -> None:
        inputs, metrics = tmp_path / "inputs.tsv", tmp_path / "metrics.tsv"
        inputs.write_text("channel_name\tdata_location\ntrain\ts3://b/train\n\ntest\ts3://b/test \n")
        metrics.write_text("metric_name\tmetric_regex\naccuracy\t'accuracy': ([0-9.]+)\n")
        made = job(tmp_path, sagemaker_inputs_file=str(inputs), sagemaker_metrics_file=str(metrics))
        assert made.inputs == {"train": "s3://b/train", "test": "s3://b/test"}
        assert made.estimator["metric_definitions"] == [{"Name": "accuracy", "Regex": "'accuracy': ([0-9.]+)"}]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "line 1: expected the columns' names, channel_name<tab>data_location, found 'an empty file'"),
            ("train\ts3://b\n", "line 1: expected the columns' names"),
            ("channel_name\tdata_location\ntrain s3://b\n", "line 2: expected channel_name<tab>data_location"),
            ("channel_name\tdata_location\na\tb\n\na\tb\tc\n", "line 4: expected"),
            ("channel_name\tdata_location\na\t\n", "line 2: expected"),
            ("channel_name\tdata_location\na\tb\na\tc\n", "line 3: a comes twice"),
        ],
    )
    def test_a_mistake_is_named_with_its_line(self, text: str, message: str, tmp_path: Path) -> None:
        path = tmp_path / "inputs.tsv"
        path.write_text(text)
        with pytest.raises(SettingsError, match=f"{path}, {message}"):
            sagemaker.read_table(str(path), ("channel_name", "data_location"))


class TestSecrets:
    FLAGS = ("--aws_access_key_id", "AKIA123", "--aws_secret_access_key", "hush")

    def test_go_into_this_process_only(self, tmp_path: Path) -> None:
        job(tmp_path)
        settings = parse.parse(["--config_file", str(tmp_path / "aws.yaml"), *self.FLAGS, "train.py"])
        assert sagemaker.credentials(settings) == {
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_PROFILE": None,
            "AWS_SESSION_TOKEN": None,
            "AWS_ACCESS_KEY_ID": "AKIA123",
            "AWS_SECRET_ACCESS_KEY": "hush",
        }
        plan = build_plan(settings)
        shown = [
            repr(settings),
            repr(plan),
            sagemaker.format_job(sagemaker.prepare_job(settings, plan.environment)),
        ]
        assert not any("hush" in text or "AKIA123" in text for text in shown)

    def test_a_profile_or_nothing(self, tmp_path: Path) -> None:
        job(tmp_path)
        settings = parse.parse(["--config_file", str(tmp_path / "aws.yaml"), "train.py"])
        assert sagemaker.credentials(settings) == {"AWS_DEFAULT_REGION": "us-east-1", "AWS_PROFILE": "xxxxx"}

    def test_one_key_is_no_pair(self, tmp_path: Path) -> None:
        with pytest.raises(SettingsError, match="belong together"):
            job(tmp_path, flags=self.FLAGS[:2])


def test_the_documented_helper(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_PROFILE", "AWS_DEFAULT_REGION"):
        monkeypatch.setenv(name, "before")  # so that both are put back
    values = {**yaml.safe_load(GUIDE), "debug": False}
    args = launch_command_parser().parse_args(["code/train.py", "--lr", "1e-3"])
    arguments, inputs = prepare_sagemager_args_inputs(SageMakerConfig(**values), args)
    assert isinstance(arguments, argparse.Namespace) and inputs == {}
    assert arguments.hyperparameters == {"lr": 0.001} and arguments.entry_point == "train.py"
    import os

    assert (os.environ["AWS_PROFILE"], os.environ["AWS_DEFAULT_REGION"]) == ("xxxxx", "us-east-1")
