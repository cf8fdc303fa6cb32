"""External launchers that start the processes: MPI, DeepSpeed, SageMaker, TPU pods."""

from __future__ import annotations
