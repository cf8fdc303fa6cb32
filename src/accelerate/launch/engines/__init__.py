"""Launchers that start the processes themselves: MPI, DeepSpeed, SageMaker, pods of TPUs."""

from __future__ import annotations
