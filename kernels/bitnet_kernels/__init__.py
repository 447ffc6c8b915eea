"""Packed low-bit weights: their formats, the operators that multiply them, and plain-torch definitions of both."""

from bitnet_kernels.affine import FEW_TOKENS as FEW_TOKENS
from bitnet_kernels.affine import MAX_AFFINE_K as MAX_AFFINE_K
from bitnet_kernels.affine import affine_matmul as affine_matmul
from bitnet_kernels.affine import pack_codes as pack_codes
from bitnet_kernels.affine import row_bytes as row_bytes
from bitnet_kernels.affine import unpack_codes as unpack_codes
from bitnet_kernels.formats import BLOCK as BLOCK
from bitnet_kernels.formats import FORMATS as FORMATS
from bitnet_kernels.formats import MAX_K as MAX_K
from bitnet_kernels.formats import PackedFormat as PackedFormat
from bitnet_kernels.formats import pack_binary1 as pack_binary1
from bitnet_kernels.formats import pack_ternary2 as pack_ternary2
from bitnet_kernels.formats import pack_ternary_base3 as pack_ternary_base3
from bitnet_kernels.formats import unpack_binary1 as unpack_binary1
from bitnet_kernels.formats import unpack_ternary2 as unpack_ternary2
from bitnet_kernels.formats import unpack_ternary_base3 as unpack_ternary_base3
from bitnet_kernels.ops import packed_matmul as packed_matmul
from bitnet_kernels.ops import rms_norm_quantize as rms_norm_quantize
from bitnet_kernels.ops import wide_matmul as wide_matmul
from bitnet_kernels.reference import matmul_reference as matmul_reference
