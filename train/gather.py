"""Rows of all ranks in rank order, with gradient."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def gather_rows(rows: Tensor) -> Tensor:
    """(B, …) of every rank to (W·B, …). Backward: each rank gets the sum over ranks of its rows' gradients."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return rows
    gathered: Tensor = _Gather.apply(rows)
    return gathered


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.rows = len(rows)
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        # All-reduce, not reduce-scatter: gloo has the first only, and features are few beside weights.
        total = gradients[0].contiguous()
        dist.all_reduce(total)
        return total[dist.get_rank() * ctx.rows : (dist.get_rank() + 1) * ctx.rows]
