"""``PackedLinear``: a low-bit linear layer as it is served, and the stored forms of embedding and head.

``PackedLinear`` computes what an eval-mode ``BitLinear`` computes, bit for bit: int8 activations times packed weights,
summed in int32, divided once by both scales. Its scale is stored and never derived again from the weights.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitnet.input_transforms import TRANSFORMS, TransformName
from bitnet.layers.bit_linear import ActBits, BitLinear
from bitnet.layers.integer_products import dequantize
from bitnet.quantizers import ACTIVATION_QUANTIZERS, WEIGHT_QUANTIZERS
from bitnet.scale_rules import ScalePer
from bitnet_kernels import FORMATS, packed_matmul, rms_norm_quantize, wide_matmul

HeadDtype = Literal["float32", "float16", "bfloat16", "int8"]


class LayerForm(NamedTuple):
    """How a linear is packed."""

    format: str
    """A key of ``bitnet_kernels.FORMATS``."""
    act_bits: ActBits = 8
    scale_per: ScalePer = "matrix"
    """What has a scale of its own: the matrix, each row, or each group of so many inputs."""
    transform: TransformName = "none"
    """What happens to the inputs before they are quantized."""


class QuantizedRows:
    """Activations ready for ``PackedLinear``: int8 (M, K), inv_scale (M, 1), row sums (M,), and the shape they had."""

    __slots__ = ("dtype", "inv_scale", "q", "row_sum", "shape")

    def __init__(self, x: Tensor, norm: nn.Module | None, act_bits: ActBits) -> None:
        """Normalize x (..., K) by ``norm``, if one is given and does anything, and quantize it to ``act_bits``."""
        self.shape, self.dtype = x.shape[:-1], x.dtype
        weight = getattr(norm, "weight", None)
        if act_bits == 8:
            self.q, self.inv_scale, self.row_sum = rms_norm_quantize(x, weight, getattr(norm, "eps", 0.0))
            return
        assert act_bits == 4
        q, inv_scale = ACTIVATION_QUANTIZERS[4](x if norm is None else norm(x))
        self.q = q.reshape(-1, x.shape[-1]).to(torch.int8)
        self.inv_scale, self.row_sum = inv_scale.reshape(-1, 1), self.q.sum(dim=-1, dtype=torch.int32)


class PackedLinear(nn.Module):
    """y = x @ W.T with W (N, K) packed in ``format``, a key of ``bitnet_kernels.FORMATS``.

    Buffers: ``packed`` uint8 (N, bytes of a row) and ``inv_scale`` float32 (1,), or (N,) with a scale per row; with a
    scale per group of inputs ``group_scale`` float32 (N, groups) in its place. ``act_bits`` "none" keeps the
    activations in floating point: then the weights are unpacked at each call. Raises ``ValueError`` for a group of
    inputs that the format cannot hold.
    """

    packed: Tensor
    inv_scale: Tensor | None
    group_scale: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        format: str,
        act_bits: ActBits = 8,
        scale_per: ScalePer = "matrix",
        transform: TransformName = "none",
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.format, self.act_bits, self.scale_per, self.transform = format, act_bits, scale_per, transform
        bytes_of_row = FORMATS[format].row_bytes(in_features)
        self.register_buffer("packed", torch.empty(out_features, bytes_of_row, dtype=torch.uint8))
        groups = 0
        if isinstance(scale_per, int):
            if in_features % scale_per or scale_per % FORMATS[format].plane:
                raise ValueError(f"groups of {scale_per} do not fit {format} rows of {in_features} weights")
            groups = in_features // scale_per
        scales = 1 if scale_per == "matrix" else out_features
        self.register_buffer("inv_scale", None if groups else torch.empty(scales, dtype=torch.float32))
        of_groups = torch.empty(out_features, groups, dtype=torch.float32) if groups else None
        self.register_buffer("group_scale", of_groups)
        self.bias: Tensor | None = None

    @property
    def form(self) -> LayerForm:
        """What another layer of this kind is made with."""
        return LayerForm(self.format, self.act_bits, self.scale_per, self.transform)

    @classmethod
    @torch.no_grad()
    def from_bit_linear(cls, layer: BitLinear) -> "PackedLinear":
        """The served form of a trained layer, with the weights that it has now."""
        format = WEIGHT_QUANTIZERS[layer.weight_kind].format
        form = LayerForm(format, layer.act_bits, layer.scale_per, layer.transform)
        with torch.device("meta"):
            new = cls(layer.in_features, layer.out_features, **form._asdict())
        levels = layer.levels()
        new.packed = FORMATS[format].pack(levels.q)
        if levels.group_scale is None:
            new.inv_scale = levels.inv_scale.reshape(-1).clone()
        else:
            new.group_scale = levels.group_scale.clone()
        if layer.bias is not None:
            new.bias = nn.Parameter(layer.bias.detach().clone(), requires_grad=False)
        return new

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedLinear":
        scales = self.inv_scale, self.group_scale
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # Stored, not computed: no dtype of the model rounds them.
        self.inv_scale, self.group_scale = (s if s is None else s.to(self.packed.device) for s in scales)
        return self

    def weight_levels(self) -> Tensor:
        """The weights as int8 (N, K), unpacked."""
        return FORMATS[self.format].unpack(self.packed, self.out_features, self.in_features)

    def multiply(self, rows: QuantizedRows) -> Tensor:
        """Quantized activations -> (..., N), in the dtype that they had before."""
        y = packed_matmul(
            rows.q,
            self.packed,
            self.format,
            n=self.out_features,
            k=self.in_features,
            x_inv_scale=rows.inv_scale,
            w_inv_scale=self.inv_scale,
            group_scale=self.group_scale,
            group_size=self.scale_per if isinstance(self.scale_per, int) else 0,
            row_sum=rows.row_sum,
            out_dtype=rows.dtype,
        ).view(*rows.shape, self.out_features)
        return y if self.bias is None else y + self.bias

    def transformed(self, x: Tensor) -> Tensor:
        """The inputs as they are quantized."""
        return x if self.transform == "none" else TRANSFORMS[self.transform](x)

    def forward(self, x: Tensor) -> Tensor:
        x = self.transformed(x)
        if self.act_bits == "none":
            w = dequantize(self.weight_levels(), self.inv_scale, self.group_scale)
            return F.linear(x, w.to(x.dtype), self.bias)
        return self.multiply(QuantizedRows(x, None, self.act_bits))

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, format={self.format}, act_bits={self.act_bits}"


class Table(nn.Module):
    """A wide matrix (V, D) as it is stored: float16, bfloat16, or int8 with one factor a row (``scale``, float32).

    It serves as embedding, as head, or as both at once where they are tied.
    """

    weight: Tensor
    scale: Tensor | None

    def __init__(self, rows: int, columns: int, dtype: HeadDtype) -> None:
        super().__init__()
        self.register_buffer("weight", torch.empty(rows, columns, dtype=getattr(torch, dtype)))
        self.register_buffer("scale", torch.empty(rows) if dtype == "int8" else None)

    @classmethod
    def from_weight(cls, weight: Tensor, dtype: HeadDtype) -> "Table":
        with torch.device("meta"):
            new = cls(weight.shape[0], weight.shape[1], dtype)
        weight = weight.detach()
        if dtype == "int8":
            new.scale = (weight.float().abs().amax(dim=1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
            weight = (weight.float() / new.scale[:, None]).round_()
        new.weight = weight.to(new.weight.dtype)
        return new

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Table":
        weight, scale = self.weight, self.scale
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.weight = weight.to(self.weight.device)  # stored in a dtype of its own
        self.scale = None if scale is None else scale.to(self.weight.device)
        return self

    def rows(self, which: Tensor | slice) -> Tensor:
        """The chosen rows in float32."""
        rows = self.weight[which].float()
        return rows if self.scale is None else rows * self.scale[which].unsqueeze(-1)


class StoredEmbedding(nn.Module):
    """Token ids (...) -> rows of a ``Table``, float32 (..., D)."""

    def __init__(self, table: Table) -> None:
        super().__init__()
        self.table = table

    def forward(self, tokens: Tensor) -> Tensor:
        return self.table.rows(tokens)


class StoredHead(nn.Module):
    """x (..., D) -> logits (..., V) by a ``Table``: x stays in float32, the table is widened on the way."""

    CHUNK = 4096
    """Rows of the table that are widened at a time when there are many tokens."""
    FEW = 4
    """Tokens for which reading the table is the whole cost."""

    def __init__(self, table: Table) -> None:
        super().__init__()
        self.table = table

    def forward(self, x: Tensor) -> Tensor:
        weight, scale = self.table.weight, self.table.scale
        flat = x.reshape(-1, x.shape[-1])
        y = wide_matmul(flat, weight, scale) if flat.shape[0] <= self.FEW else None
        if y is None:
            y = flat.new_empty(flat.shape[0], weight.shape[0], dtype=torch.float32)
            for start in range(0, weight.shape[0], self.CHUNK):
                part = slice(start, start + self.CHUNK)
                y[:, part] = flat.float() @ self.table.rows(part).t()
        return y.view(*x.shape[:-1], -1)
