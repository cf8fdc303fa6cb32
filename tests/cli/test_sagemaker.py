"""``accelerate launch`` on Amazon SageMaker: the SDK and moto's AWS, in an environment of their own (`make clouds`)."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from accelerate.commands.config.role import POLICY, ROLE_NAME

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / ".venv-clouds" / "bin" / "python"

pytestmark = pytest.mark.skipif(
    not (ROOT / ".venv-clouds" / ".ready").exists(), reason="SageMaker's SDK is not there: `make clouds` installs it"
)

# The guide's example, for a role that exists in moto's AWS.
FILE = {
    "base_job_name": "accelerate-sagemaker-1",
    "compute_environment": "AMAZON_SAGEMAKER",
    "distributed_type": "DATA_PARALLEL",
    "ec2_instance_type": "ml.p3.16xlarge",
    "iam_role_name": "trainer",
    "image_uri": None,
    "mixed_precision": "fp16",
    "num_machines": 2,
    "py_version": "py38",
    "pytorch_version": "1.10.2",
    "region": "us-east-1",
    "transformers_version": "4.17.0",
    "use_cpu": False,
}


class Aws:
    """Runs the command in a folder with a script, where AWS is moto's."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "code").mkdir()
        (folder / "code" / "train.py").write_text("print('trains')\n")
        (folder / "code" / "requirements.txt").write_text("accelerate\n")

    def start(
        self, *words: str, flags: tuple[str, ...] = (), keys: bool = True, status: str = "Completed", **changes: Any
    ) -> subprocess.Popen[str]:
        (self.folder / "aws.yaml").write_text(yaml.safe_dump({**FILE, **changes}))
        report = self.folder / "report.json"
        report.unlink(missing_ok=True)
        environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
        environment |= {"PYTHONPATH": str(ROOT / "src"), "HOME": str(self.folder), "PYTHONUNBUFFERED": "1"}
        environment |= {"AWS_EC2_METADATA_DISABLED": "true", "JOB_STATUS": status}
        if keys:
            environment |= {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing"}
        command = [str(PYTHON), str(ROOT / "tests" / "clouds" / "aws.py"), str(report)]
        return subprocess.Popen(
            [*command, "launch", "--config_file", "aws.yaml", *flags, "code/train.py", *words],
            cwd=self.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def launch(self, *words: str, **options: Any) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
        process = self.start(*words, **options)
        try:
            output, errors = process.communicate(timeout=200)
        finally:
            process.kill()
        report = self.folder / "report.json"
        done = subprocess.CompletedProcess(process.args, process.returncode, output, errors)
        return done, json.loads(report.read_text()) if report.exists() else {}


@pytest.fixture
def aws(tmp_path: Path) -> Aws:
    return Aws(tmp_path)


@pytest.mark.slow
def test_a_training_job_arrives_whole(aws: Aws) -> None:
    (aws.folder / "inputs.tsv").write_text("channel_name\tdata_location\ntrain\ts3://bucket/train\n")
    (aws.folder / "metrics.tsv").write_text("metric_name\tmetric_regex\nacc\taccuracy=([0-9.]+)\n")
    more = {"use_spot_instances": True, "max_wait": 86400, "keep_alive_period_in_seconds": 60}
    done, report = aws.launch(
        *("--lr", "1e-3", "--fp16", "True", "--layers", "1", "2", "--shift", "-3", "--name=a=b"),
        sagemaker_inputs_file="inputs.tsv",
        sagemaker_metrics_file="metrics.tsv",
        additional_args=more,
    )
    assert done.returncode == 0, done.stderr
    (made,) = report["jobs"]
    asked, job = made["asked"], made["job"]
    parameters = {name: json.loads(value) for name, value in job["HyperParameters"].items()}
    ours = {name: value for name, value in parameters.items() if not name.startswith("sagemaker_")}
    assert ours == {"lr": 0.001, "fp16": True, "layers": [1, 2], "shift": -3, "name": "a=b"}
    assert parameters["sagemaker_program"] == "train.py"
    assert parameters["sagemaker_distributed_dataparallel_enabled"] is True
    assert asked["Environment"]["ACCELERATE_MIXED_PRECISION"] == "fp16"
    assert asked["Environment"]["ACCELERATE_SAGEMAKER_DISTRIBUTED_TYPE"] == "DATA_PARALLEL"
    assert made["source"] == {"train.py": "print('trains')\n", "requirements.txt": "accelerate\n"}
    assert job["ResourceConfig"]["InstanceCount"] == 2
    assert job["ResourceConfig"]["InstanceType"] == "ml.p3.16xlarge"
    assert job["ResourceConfig"]["KeepAlivePeriodInSeconds"] == 60
    assert job["EnableManagedSpotTraining"] is True and job["StoppingCondition"]["MaxWaitTimeInSeconds"] == 86400
    assert job["RoleArn"] == "arn:aws:iam::123456789012:role/trainer"
    assert job["TrainingJobName"].startswith("accelerate-sagemaker-1-")
    image = job["AlgorithmSpecification"]["TrainingImage"]
    assert re.search(r"huggingface-pytorch-training:1\.10\.2-transformers4\.17\.0-gpu-py38", image)
    assert asked["AlgorithmSpecification"]["MetricDefinitions"] == [{"Name": "acc", "Regex": "accuracy=([0-9.]+)"}]
    (channel,) = job["InputDataConfig"]
    assert channel["ChannelName"] == "train"
    assert channel["DataSource"]["S3DataSource"]["S3Uri"] == "s3://bucket/train"
    lines = [line for line in done.stdout.splitlines() if not line.startswith("sagemaker.config")]
    assert lines[:3] == [
        "Configuring Amazon SageMaker environment",
        "Converting Arguments to Hyperparameters",
        "Creating Estimator",
    ]
    assert lines[-1].startswith("You can find your model data at: s3://") and lines[-1].endswith("/output/model.tar.gz")


@pytest.mark.slow
def test_keys_as_flags_are_shown_nowhere(aws: Aws) -> None:
    keys = ("--aws_access_key_id", "AKIAHUSH", "--aws_secret_access_key", "hush-hush")
    own = {"image_uri": "123456789012.dkr.ecr.us-east-1.amazonaws.com/mine:1", "distributed_type": "NO"}
    done, report = aws.launch(flags=keys, keys=False, **own)
    assert done.returncode == 0, done.stderr
    (made,) = report["jobs"]
    assert report.pop("who") == "AKIAHUSH"
    assert made["job"]["AlgorithmSpecification"]["TrainingImage"] == own["image_uri"]
    assert not re.search("AKIAHUSH|hush-hush", json.dumps(report) + done.stdout + done.stderr)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"iam_role_name": "nobody"}, "Amazon SageMaker: .*Role nobody not found"),
        ({"transformers_version": "4.1.0"}, "Amazon SageMaker: Unsupported huggingface version: 4.1.0"),
        ({"additional_args": {"use_spot_instance": True}}, "no argument use_spot_instance. Did you mean use_spot_"),
        ({"keys": False}, "no AWS credentials found: set `profile` in the configuration file"),
        ({"keys": False, "profile": "none"}, r"AWS: The config profile \(none\) could not be found"),
    ],
)
def test_a_refusal_is_one_line_and_code_2(changes: dict[str, Any], message: str, aws: Aws) -> None:
    done, report = aws.launch(**changes)
    said = [line for line in done.stderr.splitlines() if line.startswith("accelerate launch: ")]
    assert done.returncode == 2 and len(said) == 1 and re.search(message, said[0]), done.stderr
    assert "Traceback" not in done.stderr and not report.get("jobs")


@pytest.mark.slow
def test_a_job_that_fails_is_one_line_and_code_1(aws: Aws) -> None:
    done, _ = aws.launch(distributed_type="NO", status="Failed")
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("accelerate launch: ")]
    assert done.returncode == 1 and "the job failed" in said and "the script raised" in said
    assert "You can find your model data" not in done.stdout


@pytest.mark.slow
def test_ctrl_c_ends_the_watching_and_says_how_to_end_the_job(aws: Aws) -> None:
    process = aws.start(distributed_type="NO", status="InProgress")
    assert process.stdout is not None
    try:
        for line in iter(process.stdout.readline, ""):
            if line.startswith("Creating Estimator"):
                break
        name = ""
        while not name:  # the SDK notes the name on stderr, then waits for the job
            assert process.stderr is not None
            said = process.stderr.readline() or pytest.fail("no job was started")
            name = said.partition("Creating training-job with name: ")[2].strip()
        shown = ""
        while not shown.endswith("Starting"):
            shown += process.stdout.read(1) or pytest.fail("the job is not watched")
        process.send_signal(signal.SIGINT)
        errors = process.communicate(timeout=100)[1]
    finally:
        process.kill()
    assert process.returncode == 130 and "Traceback" not in errors
    assert f"`aws sagemaker stop-training-job --training-job-name {name}` ends it" in errors


def test_the_role_is_made_once_and_does_not_stay_without_its_policy(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    environment |= {"PYTHONPATH": str(ROOT / "src"), "HOME": str(tmp_path)}
    command = [str(PYTHON), str(ROOT / "tests" / "clouds" / "role.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=True)
    report = json.loads(done.stdout)
    made, again = report["said"]
    assert made == f"Made the role {ROLE_NAME} with the policy {POLICY}." and "there already" in again
    assert [policy["PolicyArn"] for policy in report["policies"]] == [POLICY]
    assert report["role"]["Statement"][0]["Principal"] == {"Service": "sagemaker.amazonaws.com"}
    assert re.search("could not be made: .*does not exist", report["without policy"]) and report["left"] == []
    assert "could not be made: The config profile (nobody)" in report["no profile"]
