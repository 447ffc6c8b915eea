"""Running a model one block at a time, and looking at what its linears read.

Only the hidden states between two blocks are kept, for all calibration batches: the memory of one block at a time.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bitnet.errors import UserError
from bitnet.model import Block, Transformer, rotary_angles, rotary_frequencies

Hidden = list[Tensor]
"""States (B, T, D) of every batch."""


class Chain:
    """The blocks of ``model`` in order, on fixed batches of token ids (B, T) int64."""

    def __init__(self, model: Transformer, batches: Iterable[Tensor]) -> None:
        self.model = model
        self.batches = list(batches)
        if not self.batches:
            raise UserError("no calibration text: this recipe looks at activations.")
        self.device = model.norm.weight.device

    @property
    def blocks(self) -> list[Block]:
        return list(self.model.layers)  # type: ignore[arg-type]

    @torch.no_grad()
    def embedded(self) -> Hidden:
        """What the first block reads."""
        return [self.model.embed(batch.to(self.device)) for batch in self.batches]

    def angles(self, x: Tensor) -> tuple[Tensor, Tensor]:
        config = self.model.config
        frequencies = rotary_frequencies(config.head_dim, config.rope_theta, x.device)
        return rotary_angles(torch.arange(x.shape[1], device=x.device), frequencies)

    def apply(self, block: Block, x: Tensor) -> Tensor:
        return block(x, self.angles(x), None)  # type: ignore[no-any-return]

    @torch.no_grad()
    def run(self, block: Block, hidden: Hidden) -> Hidden:
        """What ``block`` makes of every batch."""
        return [self.apply(block, x) for x in hidden]


@contextmanager
def watching(modules: dict[str, nn.Module], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call ``see(name, input)`` in every forward of the modules."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda module, args: see(name, args[0].detach())

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def linears(block: nn.Module) -> dict[str, nn.Linear]:
    """The float linears of a block by their path in it."""
    return {name: m for name, m in block.named_modules() if isinstance(m, nn.Linear)}


@torch.no_grad()
def second_moments(chain: Chain, block: Block, hidden: Hidden) -> dict[str, Tensor]:
    """``2 / tokens * X.T @ X`` float32 (K, K) of the inputs X of each linear of a block: the Hessian of its squared
    output error (arXiv 2210.17323, section 3). Linears that read the same tensor share one.
    """
    sums: dict[str, Tensor] = {}
    owner: dict[str, str] = {}
    last: dict[str, Any] = {"input": None, "name": ""}
    tokens = sum(x.shape[0] * x.shape[1] for x in hidden)

    def see(name: str, x: Tensor) -> None:
        if last["input"] is x or (last["input"] is not None and last["input"].data_ptr() == x.data_ptr()):
            owner[name] = last["name"]
            return
        last.update(input=x, name=name)
        owner[name] = name
        flat = x.reshape(-1, x.shape[-1]).float()
        if name not in sums:
            sums[name] = torch.zeros(flat.shape[1], flat.shape[1], device=flat.device)
        sums[name].addmm_(flat.t(), flat, alpha=2.0 / tokens)

    with watching(dict(linears(block)), see):
        chain.run(block, hidden)
    return {name: sums[owner[name]] for name in linears(block)}
