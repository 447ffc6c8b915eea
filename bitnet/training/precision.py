"""bf16 everywhere but where it would stop the training of low-bit weights."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from lightning.pytorch.plugins.precision import HalfPrecision
from torch import Tensor, nn

from bitnet.layers import BitLinear, FakeQuantizedLinear


class LatentFloat32(HalfPrecision):
    """``bf16-true`` with float32 latent weights: parameters, activations and gradients are bf16, those are not.

    A step of the optimizer moves a latent weight by a thousandth of its size or less, and bf16 has 8 bits: most steps
    would be rounded away. Embeddings, head and norms are bf16, with their optimizer state.
    """

    def __init__(self) -> None:
        super().__init__("bf16-true")

    def tensor_init_context(self) -> AbstractContextManager[None]:
        return nullcontext()  # what is made in float32 can be kept in it

    module_init_context = tensor_init_context

    def convert_module(self, module: nn.Module) -> nn.Module:
        def narrowed(tensor: Tensor) -> Tensor:
            return tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor

        for part in module.modules():
            if not isinstance(part, BitLinear | FakeQuantizedLinear):
                apply: Any = part._apply
                apply(narrowed, recurse=False)
        return module
