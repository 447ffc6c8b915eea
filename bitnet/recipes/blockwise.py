r"""Training one block at a time to give what the float block gives: EfficientQAT's Block-AP, ZeroQuant's distillation.

    minimize  mean (Block_q(X) - Block_float(X_float))^2        block after block

X_float are the states of the float model. X are those of the quantized blocks before (Block-AP, arXiv 2407.11062: later
blocks correct earlier ones) or the float ones too (ZeroQuant, arXiv 2206.01861, equation 6). The memory needed is that
of one block and of the states between two of them.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitnet.errors import UserError
from bitnet.layers import quantized_layers, swap_linears
from bitnet.layers.fake_quantized_linear import State
from bitnet.model import Block, Transformer
from bitnet.recipes.base import Progress, no_progress
from bitnet.recipes.calibration import Chain, Hidden
from bitnet.recipes.post_training import Bits, PostActBits, PostTraining


@dataclass(frozen=True, kw_only=True)
class BlockTraining(PostTraining):
    """Fields of recipes that train block by block."""

    needs_text: ClassVar[bool] = True

    block_steps: int = 128
    """Optimizer steps for each block; 0 leaves the weights rounded to nearest."""
    block_lr: float = 2e-5
    """Learning rate of the weights of a block."""
    block_grid_lr: float = 1e-4
    """Learning rate of its scales and zero points."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block_steps < 0 or min(self.block_lr, self.block_grid_lr) <= 0:
            raise UserError("block_steps must be 0 or more, block_lr and block_grid_lr positive.")

    quantized_inputs: ClassVar[bool] = True
    """Whether a block learns from what the quantized blocks before it give."""
    learns_grid: ClassVar[bool] = True
    """Whether scales and zero points are trained with the weights."""

    def prepare(self, model: nn.Module, batches: Iterable[Tensor] = (), progress: Progress = no_progress) -> list[str]:
        batches = list(batches)
        if not batches:
            return super().prepare(model)
        assert isinstance(model, Transformer)
        names = self.train_blocks(Chain(model, batches), progress)
        super().prepare(model)  # nothing is left to swap; sets what is trained
        return names

    def train_blocks(self, chain: Chain, progress: Progress) -> list[str]:
        """Replace the linears of every block and train them; the last eighth of the batches is held out."""
        held_out = max(1, len(chain.batches) // 8) if len(chain.batches) > 1 else 0
        exact = chain.embedded()
        quantized = exact
        names, errors = [], []
        for number, block in enumerate(chain.blocks):
            targets = chain.run(block, exact)
            inputs = quantized if self.quantized_inputs else exact
            changed = swap_linears(block, lambda name, linear: self.layer(name, linear, self.training_state()))
            names += [f"layers.{number}.{name}" for name in changed]
            cut = len(inputs) - held_out
            before = block_error(chain, block, inputs[cut:], targets[cut:]) if held_out else None
            self.train_block(chain, block, inputs[:cut], targets[:cut], number)
            for layer in quantized_layers(block).values():
                layer.freeze()
            if before is not None:
                errors.append((before, block_error(chain, block, inputs[cut:], targets[cut:])))
            quantized, exact = chain.run(block, quantized), targets
            progress("training blocks", number + 1, len(chain.blocks))
        self.found["block_errors"] = errors
        self.found["block_tokens"] = self.block_steps * max(batch.numel() for batch in chain.batches)
        return names

    def training_state(self) -> State:
        return "learned" if self.learns_grid else "latent"

    def train_block(self, chain: Chain, block: Block, inputs: Hidden, targets: Hidden, number: int) -> None:
        """AdamW with cosine decay to 1/20, one batch a step in a random order."""
        layers = quantized_layers(block).values()
        groups: list[dict[str, Any]] = [{"params": [x.weight for x in layers], "lr": self.block_lr}]
        if self.learns_grid:
            grids = [p for x in layers for p in (x.scale, x.zero_point) if p is not None]
            groups.append({"params": grids, "lr": self.block_grid_lr})
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: 0.05 + 0.95 * (1 + math.cos(math.pi * step / max(1, self.block_steps))) / 2
        )
        generator = torch.Generator().manual_seed(number)
        order: list[int] = []
        block.requires_grad_(False)
        for group in groups:
            for parameter in group["params"]:
                parameter.requires_grad_(True)
        for _ in range(self.block_steps):
            order = order or torch.randperm(len(inputs), generator=generator).tolist()
            i = order.pop()
            with torch.enable_grad():
                loss = F.mse_loss(chain.apply(block, inputs[i]), targets[i])
                loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()


@torch.no_grad()
def block_error(chain: Chain, block: Block, inputs: Hidden, targets: Hidden) -> float:
    """Mean squared difference of what ``block`` makes of ``inputs`` from ``targets``."""
    errors = [float(F.mse_loss(chain.apply(block, x), y)) for x, y in zip(inputs, targets, strict=True)]
    return sum(errors) / len(errors)


@dataclass(frozen=True, kw_only=True)
class PEQA(PostTraining):
    """PEQA (arXiv 2305.14152): round to nearest, then train nothing but the scales; integers and zero points stay.

    Swapping the scales swaps the task.
    """

    trains: ClassVar[bool] = True

    group_size: int = 0
    """Inputs that share a scale; 0, the paper's choice, for one scale per output."""

    def is_trained(self, name: str, parameter: nn.Parameter) -> bool:
        return name.endswith(".scale")


@dataclass(frozen=True, kw_only=True)
class EfficientQAT(BlockTraining):
    """EfficientQAT (arXiv 2407.11062): Block-AP trains weights, scales and zero points of one block at a time on the
    calibration batches; then ``fit`` trains the scales end to end (E2E-QP), with integers and zero points frozen.
    """

    trains: ClassVar[bool] = True

    bits: Bits = 2
    """Bits of the weights."""

    def is_trained(self, name: str, parameter: nn.Parameter) -> bool:
        return name.endswith(".scale")


@dataclass(frozen=True, kw_only=True)
class ZeroQuant(BlockTraining):
    """ZeroQuant (arXiv 2206.01861): weights in groups, activations per token, distillation layer by layer."""

    quantized_inputs: ClassVar[bool] = False
    learns_grid: ClassVar[bool] = False

    activation_bits: PostActBits = 8
    """Bits of the activations."""
    symmetric: bool = True
    """Without zero points."""
