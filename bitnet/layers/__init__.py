"""Low-bit linear layers and the one function that puts them into a model."""

from bitnet.layers.activation_quantizer import ActivationScheme
from bitnet.layers.bit_linear import BitLinear, level_shares, low_bit_layers
from bitnet.layers.fake_quantized_linear import FakeQuantizedLinear, quantized_layers
from bitnet.layers.integer_products import Arithmetic
from bitnet.layers.lora_linear import LoRALinear
from bitnet.layers.scaled_bit_linear import ScaledBitLinear
from bitnet.layers.swap import swap_linears

__all__ = [
    "ActivationScheme",
    "Arithmetic",
    "BitLinear",
    "FakeQuantizedLinear",
    "LoRALinear",
    "ScaledBitLinear",
    "level_shares",
    "low_bit_layers",
    "quantized_layers",
    "swap_linears",
]
