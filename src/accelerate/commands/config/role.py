"""Creates the IAM role of Amazon SageMaker jobs in the user's account."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...settings.option import SettingsError

ROLE_NAME = "accelerate_sagemaker_execution_role"
POLICY = "arn:aws:iam::aws:policy/AmazonSageMakerFullAccess"
_TRUST = (
    '{"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Principal": {"Service": "sagemaker.amazonaws.com"}, '
    '"Action": "sts:AssumeRole"}]}'
)
KEYS_NOTE = (
    "The keys are not stored. When you launch, have them in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give\n"
    "--aws_access_key_id and --aws_secret_access_key."
)


def make_role(answers: Mapping[str, Any]) -> str:
    """Creates the role that SageMaker jobs assume, with Amazon's policy for SageMaker.

    Args:
        answers: ``profile``, or ``aws_access_key_id`` and ``aws_secret_access_key``; ``region``.

    Returns:
        A one-line report. An existing role of that name is kept unchanged.

    Raises:
        SettingsError: if boto3 is not installed, or AWS denies the request.
    """
    try:
        import boto3
        from botocore.exceptions import BotoCoreError, ClientError
    except ImportError:
        raise SettingsError(
            'making a role needs boto3: pip install "accelerate[sagemaker]", or make one yourself and give its name.'
        ) from None
    try:
        session = boto3.Session(
            profile_name=answers.get("profile"),
            aws_access_key_id=answers.get("aws_access_key_id"),
            aws_secret_access_key=answers.get("aws_secret_access_key"),
            region_name=answers["region"],
        )
        client = session.client("iam")
        try:
            client.create_role(RoleName=ROLE_NAME, AssumeRolePolicyDocument=_TRUST)
        except client.exceptions.EntityAlreadyExistsException:
            return f"The role {ROLE_NAME} is there already and is used as it is."
        try:
            client.attach_role_policy(RoleName=ROLE_NAME, PolicyArn=POLICY)
        except ClientError:
            client.delete_role(RoleName=ROLE_NAME)  # without the policy, the next run would take it for complete
            raise
    except (BotoCoreError, ClientError) as error:
        raise SettingsError(f"the role {ROLE_NAME} could not be made: {error}") from None
    return f"Made the role {ROLE_NAME} with the policy {POLICY}."
