"""Integer matrix products for low-bit weights. ``reference`` defines what every faster kernel must equal."""

from bitnet_kernels.reference import matmul_reference as matmul_reference
