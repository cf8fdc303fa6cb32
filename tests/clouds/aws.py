"""Runs `accelerate` with AWS played by moto: ``python aws.py REPORT WORD…``, with the interpreter of `make clouds`.

REPORT, a json file, receives what SageMaker was asked for, what it says about the job, and what was uploaded. The
variable JOB_STATUS says what becomes of a job: Completed, Failed or InProgress.
"""

from __future__ import annotations

import io
import json
import os
import sys
import tarfile
from pathlib import Path
from typing import Any

import boto3
from moto import mock_aws
from moto.sagemaker.models import FakeTrainingJob

from accelerate.commands.accelerate_cli import main

AWS: dict[str, Any] = {"region_name": "us-east-1", "aws_access_key_id": "ours", "aws_secret_access_key": "ours"}


made = FakeTrainingJob.__init__


def make(job: Any, **values: Any) -> None:
    """Makes moto's training job, which would always be completed at once."""
    made(job, **values)
    job.training_job_status = os.environ.get("JOB_STATUS", "Completed")
    if job.training_job_status == "Failed":
        job.failure_reason = "AlgorithmError: the script raised"


def uploaded(uri: str) -> dict[str, str]:
    """The text of each file of the archive at an S3 address."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    archive = boto3.client("s3", **AWS).get_object(Bucket=bucket, Key=key)["Body"].read()
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        members = ((member, tar.extractfile(member)) for member in tar.getmembers())
        return {member.name: file.read().decode() for member, file in members if file is not None}


def described(name: str) -> dict[str, Any]:
    """What SageMaker says about a job, and the source that it was given."""
    job = boto3.client("sagemaker", **AWS).describe_training_job(TrainingJobName=name)
    source = json.loads(job["HyperParameters"]["sagemaker_submit_directory"])
    return {"job": job, "source": uploaded(source)}


def run(words: list[str]) -> dict[str, Any]:
    """The exit code, and each job that was asked for."""
    requests: list[dict[str, Any]] = []
    FakeTrainingJob.__init__ = make
    with mock_aws(config={"core": {"mock_credentials": False}}):
        boto3.client("iam", **AWS).create_role(RoleName="trainer", AssumeRolePolicyDocument="{}")
        boto3.setup_default_session()
        boto3.DEFAULT_SESSION.events.register(
            "provide-client-params.sagemaker.CreateTrainingJob",
            lambda params, **_: requests.append(dict(params)),  # moto does not keep the job's environment
        )
        code = main(words)
        credentials = boto3.Session().get_credentials() if requests else None
        jobs = [{"asked": each, **described(each["TrainingJobName"])} for each in requests]
        return {"code": code, "who": credentials.access_key if credentials else None, "jobs": jobs}


if __name__ == "__main__":
    report = run(sys.argv[2:])
    Path(sys.argv[1]).write_text(json.dumps(report, default=str))
    sys.exit(report["code"])
