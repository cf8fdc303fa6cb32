"""The role that a job on Amazon SageMaker takes on, made in the person's own account."""

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
    """Makes the role that SageMaker's jobs take on, with Amazon's own policy for SageMaker.

    Args:
        answers: ``profile``, or ``aws_access_key_id`` and ``aws_secret_access_key``; ``region``.

    Returns:
        One line that says what was done. A role of that name that is already there is kept as it is.

    Raises:
        SettingsError: when boto3 is not installed, or AWS refuses.
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
            client.delete_role(RoleName=ROLE_NAME)  # it would look whole the next time
            raise
    except (BotoCoreError, ClientError) as error:
        raise SettingsError(f"the role {ROLE_NAME} could not be made: {error}") from None
    return f"Made the role {ROLE_NAME} with the policy {POLICY}."
