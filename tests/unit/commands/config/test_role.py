"""The role for Amazon SageMaker, made in moto's AWS."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from accelerate.commands.config.role import POLICY, ROLE_NAME, make_role
from accelerate.settings.option import SettingsError

ANSWERS: dict[str, Any] = {"aws_access_key_id": "AKIA", "aws_secret_access_key": "hush", "region": "us-east-1"}


def test_the_role_is_made_once() -> None:
    moto = pytest.importorskip("moto", reason="needs moto, which stands for AWS")
    import boto3

    with moto.mock_aws(config={"iam": {"load_aws_managed_policies": True}}):
        assert make_role(ANSWERS) == f"Made the role {ROLE_NAME} with the policy {POLICY}."
        client = boto3.client("iam", region_name="us-east-1")
        role = client.get_role(RoleName=ROLE_NAME)["Role"]
        [statement] = role["AssumeRolePolicyDocument"]["Statement"]
        assert statement["Principal"] == {"Service": "sagemaker.amazonaws.com"}
        [policy] = client.list_attached_role_policies(RoleName=ROLE_NAME)["AttachedPolicies"]
        assert policy["PolicyArn"] == POLICY
        assert "there already" in make_role(ANSWERS)


def test_a_role_that_gets_no_policy_does_not_stay() -> None:
    moto = pytest.importorskip("moto", reason="needs moto, which stands for AWS")
    import boto3

    with moto.mock_aws():  # here, the policy does not exist
        with pytest.raises(SettingsError, match="could not be made: .*does not exist"):
            make_role(ANSWERS)
        assert boto3.client("iam", region_name="us-east-1").list_roles()["Roles"] == []


def test_a_profile_that_is_not_there() -> None:
    pytest.importorskip("boto3", reason="needs boto3")
    with pytest.raises(SettingsError, match="could not be made: The config profile"):
        make_role({"profile": "nobody", "region": "us-east-1"})


def test_without_boto3(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(SettingsError, match=r'pip install "accelerate\[sagemaker\]"'):
        make_role(ANSWERS)
