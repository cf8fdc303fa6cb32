"""Makes SageMaker's role where AWS is played by moto, with the interpreter of `make clouds`: prints a json report."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import boto3
from moto import mock_aws

from accelerate.commands.config.role import ROLE_NAME, make_role
from accelerate.settings.option import SettingsError

ANSWERS: dict[str, Any] = {"aws_access_key_id": "AKIA", "aws_secret_access_key": "hush", "region": "us-east-1"}


def tried(answers: dict[str, Any]) -> str:
    """What `make_role` returns, or the message of what it raises."""
    try:
        return make_role(answers)
    except SettingsError as error:
        return str(error)


def run() -> dict[str, Any]:
    """What is said, and what AWS has then: with Amazon's policy, without it, and for a profile that does not exist."""
    report: dict[str, Any] = {}
    client = boto3.client("iam", region_name="us-east-1", aws_access_key_id="x", aws_secret_access_key="x")
    with mock_aws(config={"iam": {"load_aws_managed_policies": True}}):
        report["said"] = [tried(ANSWERS), tried(ANSWERS)]
        report["role"] = client.get_role(RoleName=ROLE_NAME)["Role"]["AssumeRolePolicyDocument"]
        report["policies"] = client.list_attached_role_policies(RoleName=ROLE_NAME)["AttachedPolicies"]
    with mock_aws():  # here, the policy does not exist
        report["without policy"] = tried(ANSWERS)
        report["left"] = client.list_roles()["Roles"]
    report["no profile"] = tried({"profile": "nobody", "region": "us-east-1"})
    return report


if __name__ == "__main__":
    os.environ["AWS_EC2_METADATA_DISABLED"] = "true"
    json.dump(run(), sys.stdout, default=str)
