"""Low-bit linear layers and the one function that puts them into a model."""

from bitnet.layers.bit_linear import BitLinear
from bitnet.layers.swap import swap_linears

__all__ = ["BitLinear", "swap_linears"]
