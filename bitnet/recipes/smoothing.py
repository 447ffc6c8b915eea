r"""Moving scale from activations into weights without changing the function: what SmoothQuant and AWQ share.

    y = (x / s) @ (s * W).T        s (K,), one factor for each input channel

Dividing ``x`` costs nothing where a norm (or the matrix before) produces it: its weight is divided instead. All linears
that read the same tensor share one ``s``.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bitnet.model import Block, RMSNorm


@dataclass(frozen=True)
class Pair:
    """What produces a tensor, and the linears of a block that read it (by their path)."""

    producer: nn.Module
    """A norm, or a linear whose outputs reach the readers one to one."""
    readers: dict[str, nn.Linear]

    @torch.no_grad()
    def fold(self, s: Tensor) -> None:
        """Divide what the producer gives by ``s`` (K,), and multiply the columns of the readers by it."""
        weight = self.producer.weight
        assert isinstance(weight, Tensor)
        weight.div_(s if weight.ndim == 1 else s[:, None])
        for linear in self.readers.values():
            linear.weight.mul_(s)


def pairs(block: Block, matrices: bool = False) -> Iterator[Pair]:
    """Norms with their readers; with ``matrices`` also wv with wo and w3 with w2 where no norm lies between."""
    names = {id(m): name for name, m in block.named_modules()}

    def pair(producer: nn.Module, readers: list[nn.Module]) -> Pair:
        return Pair(producer, {names[id(m)]: m for m in readers})  # type: ignore[misc]

    for norm, linears in block.norm_groups():
        yield pair(norm, linears)
    a, f = block.attention, block.feed_forward
    # Grouped queries read one value for several heads, so its factor could not differ between them.
    if matrices and not isinstance(a.attn_sub_norm, RMSNorm) and a.n_heads == a.n_kv_heads:
        yield pair(a.wv, [a.wo])
    if matrices and not isinstance(f.ffn_sub_norm, RMSNorm):
        yield pair(f.w3, [f.w2])
