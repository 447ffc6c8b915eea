"""Low-bit linear layers and the one function that puts them into a model."""

from bitnet.layers.bit_linear import BitLinear, level_shares, low_bit_layers
from bitnet.layers.swap import swap_linears

__all__ = ["BitLinear", "level_shares", "low_bit_layers", "swap_linears"]
