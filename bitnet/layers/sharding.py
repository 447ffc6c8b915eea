"""Low-bit layers whose matrices are spread over processes, so that what they compute stays what one process would.

*Scales.* A scale belongs to a whole matrix. ``share_scales`` adds up what every piece says about itself, for all
layers in one all-reduce per optimizer step. The sums are those of integers (``bitnet.quantizers.exact_sums``), so the
scale has the same bits however the matrix is cut: over rows or columns, evenly or not.

*Low-bit all-gather.* FSDP2 gathers a block's weights before using them. A low-bit layer needs only their levels, and
can round its own piece by itself once it knows the scale: ``gather_levels`` makes FSDP2 gather packed levels, 2 bits or
1 bit a weight in place of 32. They are those that every process would have computed from the gathered weights.

*Tensor parallelism* (arXiv 1909.08053, with integers). ``Split("outputs")``: a process holds some of the outputs and
needs nothing else. ``Split("inputs")``: it holds some of the inputs, so a token's largest magnitude is the largest over
all processes, and its sums are parts of the sum: integers again, added exactly before they are scaled.
"""

from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from bitnet.quantizers import WEIGHT_QUANTIZERS
from bitnet_kernels import FORMATS


class Split(NamedTuple):
    """What this process holds of a matrix that is split over ``group``."""

    dim: Literal["outputs", "inputs"]
    group: Any

    def largest(self, magnitudes: Tensor) -> Tensor:
        """The largest of all processes, element by element."""
        magnitudes = magnitudes.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(magnitudes, dist.ReduceOp.MAX, self.group)
        return magnitudes

    def add_up(self, sums: Tensor) -> None:
        """Replace ``sums`` by the sums over all processes."""
        dist.all_reduce(sums, group=self.group)


class AddUp(torch.autograd.Function):
    """The sum of a tensor over the processes of a split. Each goes on with all of it, so the gradient is its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, split: Split) -> Tensor:
        x = x.clone()
        split.add_up(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def local_part(weight: Tensor) -> Tensor:
    """What this process holds of a parameter: differentiable, and the tensor itself where it is not spread."""
    part: Tensor = weight.to_local() if hasattr(weight, "to_local") else weight
    return part


def share_scales(layers: Iterable[Any], group: Any = None) -> None:
    """Give every low-bit layer the scale of its whole matrix, with one all-reduce for all of them.

    Every process of ``group`` (all, if not given) holds another piece of each matrix. To be called after each optimizer
    step, and before a forward that follows one.
    """
    layers = [layer for layer in layers if layer.needs_whole_scale]
    if not layers:
        return
    pieces = [WEIGHT_QUANTIZERS[layer.weight_kind].statistics(local_part(layer.weight).detach()) for layer in layers]
    sums = torch.stack(pieces)
    dist.all_reduce(sums, group=group)
    for layer, of_matrix in zip(layers, sums, strict=True):
        layer.shared_scale = WEIGHT_QUANTIZERS[layer.weight_kind].scale(of_matrix, layer.weight.numel())


class _PackedGather:
    """What FSDP2 looks for on a piece of a weight, as ``fsdp_pre_all_gather`` and ``fsdp_post_all_gather``."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self.format = FORMATS[WEIGHT_QUANTIZERS[layer.weight_kind].format]

    def before(self, mesh: Any) -> tuple[tuple[Tensor, ...], Any]:
        q = self.layer.local_levels()
        return (self.format.encode(q),), q.shape[1]

    def after(
        self, gathered: tuple[Tensor, ...], k: int, dtype: torch.dtype, *, out: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]] | None:
        levels = self.format.unpack(gathered[0], None, k).to(dtype)
        if out is None:
            return levels, (levels,)
        local = getattr(out, "_local_tensor", out)
        with torch.no_grad(), torch.autograd.grad_mode._unsafe_preserve_version_counter(local):
            local.copy_(levels)
        return None


def gather_levels(layers: Iterable[Any]) -> None:
    """Let FSDP2 gather the levels of these layers in packed form; needs ``share_scales`` before each forward.

    A matrix that the processes cannot share out evenly is left to be gathered as it is. Idempotent.
    """
    for layer in layers:
        piece = layer.weight._local_tensor
        if hasattr(piece, "fsdp_pre_all_gather") or not layer.needs_whole_scale:
            continue
        mesh, placements = layer.weight.device_mesh, layer.weight.placements
        rows = layer.weight.shape[0]
        for dim, placement in enumerate(placements):
            if placement.is_shard(0):
                if rows % mesh.size(dim):
                    break
                rows //= mesh.size(dim)
        else:
            gather = _PackedGather(layer)
            piece.fsdp_pre_all_gather, piece.fsdp_post_all_gather = gather.before, gather.after
            layer.weight_holds_levels = True
