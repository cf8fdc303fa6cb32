"""Batched PowerSGD: one low-rank approximation of all gradients of a bucket.

Replaces torch's ``batched_powerSGD_hook``, which passes a matrix to a helper that takes only stacks of matrices (seen in
2.13) and raises on its first compression. Same algorithm and same ``PowerSGDState``, so torch's documentation of the
options applies. torch is imported on use.

Source: Vogels, Karimireddy, Jaggi, "PowerSGD: Practical Low-Rank Gradient Compression for Distributed Optimization"
(NeurIPS 2019), algorithm 1, on the bucket reshaped to one square matrix.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


# torch compares a hook's annotations with types, which postponed annotations are not: hence none here.
def batched_power_sgd_hook(state, bucket):  # type: ignore[no-untyped-def]
    """Averages a bucket's gradients over ``state.process_group`` by a rank-r approximation.

    The n gradients form a square matrix M of side s = ceil(sqrt(n)). One power iteration approximates it as P Qᵀ, with P
    and Q of shape (s, r): all-reduce P = M Q, orthogonalize P, all-reduce Q = Mᵀ P. With error feedback, M - P Qᵀ is added
    to the next bucket. Communicates ``2 * r * s`` values instead of n.

    Args:
        state: A ``PowerSGDState``. Before ``start_powerSGD_iter``, gradients are all-reduced uncompressed.
        bucket: A ``GradBucket`` of flattened gradients, of any floating dtype.

    Returns:
        A future of the averaged gradients, in the bucket's buffer.
    """
    import torch.distributed as dist
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    group: Any = state.process_group or dist.group.WORLD
    if state.iter < state.start_powerSGD_iter:
        state.maybe_increase_iter(bucket)
        return allreduce_hook(group, bucket)

    gradients, index = bucket.buffer(), bucket.index()
    side = math.ceil(math.sqrt(gradients.numel()))
    square = gradients.new_zeros(side * side)
    square[: gradients.numel()] = gradients
    if state.use_error_feedback and index in state.error_dict:
        square += state.error_dict[index]
    matrix = square.view(side, side)
    right = _orthogonal(_start(state, index, side, gradients))
    ranks = group.size()

    def reduced(tensor: torch.Tensor) -> torch.futures.Future[Any]:
        future: torch.futures.Future[Any] = dist.all_reduce(tensor, group=group, async_op=True).get_future()
        return future

    def project_back(done: torch.futures.Future[Any]) -> torch.Tensor:
        left = _orthogonal(done.value()[0])
        state.p_memory_dict[index] = left
        product: torch.Tensor = reduced(matrix.t() @ left).wait()[0]
        return product.div_(ranks)

    def decompress(done: torch.futures.Future[Any]) -> torch.Tensor:
        state.q_memory_dict[index] = done.value()
        approximation = (state.p_memory_dict[index] @ done.value().t()).flatten()
        if state.use_error_feedback:
            state.error_dict[index] = square - approximation
        state.maybe_increase_iter(bucket)
        gradients.copy_(approximation[: gradients.numel()])
        result: torch.Tensor = gradients
        return result

    return reduced(matrix @ right).then(project_back).then(decompress)


def _start(state: Any, index: int, side: int, like: torch.Tensor) -> torch.Tensor:
    """Returns the initial Q: the previous one (warm start), or a random one that is equal on all ranks."""
    import torch

    known: torch.Tensor | None = state.q_memory_dict.get(index) if state.warm_start else None
    if known is not None and known.shape[0] == side:
        return known
    generator = torch.Generator().manual_seed(int(state.rng.randint(1_000_000_000)))
    factor = torch.randn(side, min(state.matrix_approximation_rank, side), generator=generator)
    return factor.to(device=like.device, dtype=like.dtype)


def _orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """Returns an orthonormal basis of the columns (QR); half precision is computed in float32."""
    import torch

    basis: torch.Tensor = torch.linalg.qr(matrix.float() if matrix.itemsize < 4 else matrix)[0]
    return basis.to(matrix.dtype)
