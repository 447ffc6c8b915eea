"""``FakeQuantizedLinear``: a linear layer on an integer grid (or a codebook), the layer of all post-training recipes.

A layer is in one of four states:

* ``latent``: ``weight`` (N, K) is trained, its grid follows its smallest and largest values (QAT);
* ``learned``: ``weight``, ``scale`` and ``zero_point`` are all trained (LSQ, EfficientQAT's Block-AP);
* ``frozen``: integers ``q`` (N, K) that never change; ``scale`` may be trained (E2E-QP, PEQA);
* ``packed``: the same integers as ``codes`` of b bits, scales in 16 bits, zero points in 8: what a packed file holds.

With float activations ``y = x @ W_hat.T`` with ``W_hat = (q - zero_point) * scale``. With integer activations every
program computes the same, bit for bit, with G groups of inputs that share a scale::

    y = (sum over g ascending of float32(sum over k in g of (q - zero_point) * x_q) * scale[n, g]) / x_inv_scale

The inner sums are exact integers. For a few tokens a kernel reads the packed codes, of a packed layer and of a frozen
one: with float activations its sums round in another order, so it serves both. Unless packed, a state dict has the
plain float layout: ``weight`` is ``W_hat`` of a frozen layer, beside ``scale`` and ``zero_point``; loading finds the
same integers again as ``round(W_hat / scale + zero_point)``.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitnet.affine import Scheme, dequantize_affine, fake_quantize_affine, fit, quantize_affine, stored_scale
from bitnet.codebook import Codebook
from bitnet.layers.activation_quantizer import ActivationQuantizer, ActivationScheme, filled
from bitnet.layers.grouped_product import Served, grouped_product
from bitnet_kernels import (
    FEW_TOKENS,
    MAX_AFFINE_K,
    affine_matmul,
    pack_codes,
    rms_norm_quantize,
    row_bytes,
    unpack_codes,
)

State = Literal["latent", "learned", "frozen", "packed"]


def _as_stored(values: Tensor, dtype: torch.dtype) -> nn.Parameter:
    if values.is_meta:
        return nn.Parameter(torch.empty(values.shape, dtype=dtype, device="meta"), requires_grad=False)
    return nn.Parameter(values.detach().to(dtype), requires_grad=False)


class FakeQuantizedLinear(nn.Module):
    """Drop-in for ``nn.Linear`` with weights on ``grid`` and, unless ``act`` is ``None``, integer activations.

    ``output`` quantizes what comes out per token: on wk and wv that is a quantized KV cache (before the rotation).
    ``outlier_threshold`` takes input columns with a magnitude above it in floating point (LLM.int8()).
    ``outliers`` reserves room for that many weights kept in 16-bit floating point (SpQR).
    """

    q: Tensor | None
    codes: Tensor | None
    outlier_at: Tensor | None
    outlier_values: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        grid: Scheme | Codebook,
        state: State = "frozen",
        act: ActivationScheme | None = None,
        output: ActivationScheme | None = None,
        outlier_threshold: float | None = None,
        outliers: int = 0,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.grid, self.state = grid, state
        self.act = None if act is None else ActivationQuantizer(act)
        self.output = None if output is None else ActivationQuantizer(output)
        self.quantizes_activations = True
        self.outlier_threshold = outlier_threshold
        self.weight: nn.Parameter | None = None
        self.scale: nn.Parameter | None = None
        self.zero_point: nn.Parameter | None = None
        self.bias: nn.Parameter | None = None
        self.register_buffer("q", None, persistent=False)
        self.register_buffer("codes", None)
        self._for_kernel: tuple[Tensor, Tensor, Tensor] | None = None
        self._kept: tuple[Tensor, Tensor, Tensor] | None = None
        self.register_buffer("outlier_at", filled((outliers,), 0, torch.int32) if outliers else None)
        self.register_buffer("outlier_values", filled((outliers,), 0.0) if outliers else None)
        if state != "latent":
            shape = self._rows.scale_shape((out_features, in_features))
            self.scale = nn.Parameter(filled(shape, 1.0), requires_grad=state == "learned")
            if not self.symmetric:
                self.zero_point = nn.Parameter(filled(shape, 0.0), requires_grad=state == "learned")
        if state == "frozen":
            self.q = filled((out_features, in_features), 0, self._codes_dtype)
        else:
            self.weight = nn.Parameter(filled((out_features, in_features), 0.0))

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, grid: Scheme | Codebook, state: State, **options: Any) -> Any:
        """The layer for ``linear``, its grid from its smallest and largest weights; on the meta device, the shapes."""
        new = cls(linear.in_features, linear.out_features, grid=grid, state=state, **options)
        new.bias = linear.bias
        if linear.weight.is_meta:
            return new
        new.to(linear.weight.device).train(linear.training)
        if state == "frozen":
            new.quantize_from(linear.weight)
            return new
        new.weight = nn.Parameter(linear.weight) if not isinstance(linear.weight, nn.Parameter) else linear.weight
        if state == "learned":
            assert isinstance(grid, Scheme)
            new.set_grid(*fit(linear.weight, grid))
        return new

    # ---- the weight

    @property
    def _rows(self) -> Scheme:
        return self.grid if isinstance(self.grid, Scheme) else self.grid.blocks

    @property
    def symmetric(self) -> bool:
        """Whether the integers have no zero point."""
        return isinstance(self.grid, Codebook) or self.grid.symmetric

    @property
    def _codes_dtype(self) -> torch.dtype:
        return self.grid.codes_dtype if isinstance(self.grid, Scheme) else torch.uint8

    @torch.no_grad()
    def set_grid(self, scale: Tensor, zero_point: Tensor | None) -> None:
        """Give ``scale`` and ``zero_point`` new values."""
        assert self.scale is not None
        self._for_kernel = None
        self.scale.data = scale.detach().clone()
        if self.zero_point is not None and zero_point is not None:
            self.zero_point.data = zero_point.detach().clone()

    @torch.no_grad()
    def set_codes(self, q: Tensor) -> None:
        """Give a frozen layer its integers, (N, K) in any dtype."""
        assert self.state == "frozen"
        self.q, self._for_kernel, self._kept = q.to(self._codes_dtype), None, None

    @torch.no_grad()
    def quantize_from(self, w: Tensor) -> None:
        """Round ``w`` (N, K) to nearest on the grid that covers it; the layer must be frozen."""
        if isinstance(self.grid, Codebook):
            self.set_grid(self.grid.fit(w), None)
        else:
            self.set_grid(*fit(w, self.grid))
        self.requantize(w)

    @torch.no_grad()
    def requantize(self, w: Tensor) -> None:
        """Round ``w`` (N, K) to nearest on the grid that the layer has."""
        assert self.scale is not None
        scale = stored_scale(self.scale)
        if isinstance(self.grid, Codebook):
            self.set_codes(self.grid.quantize(w, scale))
        else:
            zero_point = torch.zeros_like(scale) if self.zero_point is None else self.zero_point
            self.set_codes(quantize_affine(w, scale, zero_point, self.grid))

    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """``(q, scale, zero_point)`` as they are served: integers (N, K); (1, 1), (N, 1) or (N, G, 1) twice."""
        if self.state in ("frozen", "packed"):
            return self._integers(), *self._stored_grid()
        assert self.weight is not None and isinstance(self.grid, Scheme)
        scale, zero_point = self._grid_now()
        zero_point = zero_point.detach().round().clamp(self.grid.qmin, self.grid.qmax)
        return quantize_affine(self.weight, scale, zero_point, self.grid), scale, zero_point

    def _stored_grid(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point of a layer whose integers are fixed, in float32."""
        assert self.scale is not None
        scale = stored_scale(self.scale.float())
        return scale, torch.zeros_like(scale) if self.zero_point is None else self.zero_point.float()

    @property
    def _lowest(self) -> int:
        """The integer whose code is 0."""
        return self.grid.qmin if isinstance(self.grid, Scheme) else 0

    def _integers(self) -> Tensor:
        if self.q is not None:
            return self.q
        assert self.codes is not None
        q = unpack_codes(self.codes, self.grid.bits, self.in_features)
        return (q.to(torch.int16) + self._lowest).to(self._codes_dtype)

    @property
    def _is_skeleton(self) -> bool:
        """Whether the layer has shapes only, to be filled from a file."""
        return any(t is not None and t.is_meta for t in (self.weight, self.q, self.codes))

    @torch.no_grad()
    def pack(self) -> None:
        """Keep the integers as ``codes`` of ``grid.bits`` bits, and scales and zero points as they are stored."""
        self.freeze()
        assert self.scale is not None
        N, bytes_of_row = self.out_features, row_bytes(self.in_features, self.grid.bits)
        if self._is_skeleton:
            self.codes = torch.empty(N, bytes_of_row, dtype=torch.uint8, device="meta")
        else:
            self.codes = self._packed_codes()
        self.state, self.q, self._for_kernel, self._kept = "packed", None, None, None
        self.scale = _as_stored(self.scale if self.scale.is_meta else stored_scale(self.scale), torch.float16)
        if self.outlier_values is not None:
            self.outlier_values = _as_stored(self.outlier_values, torch.float16).data
        if self.zero_point is not None:
            self.zero_point = _as_stored(self.zero_point, torch.float32 if self.merges_adapter else torch.uint8)

    merges_adapter = False
    """Whether the zero points are floating point in the end."""

    def _packed_codes(self) -> Tensor:
        if self.codes is not None:
            return self.codes
        codes = (self._integers().to(torch.int16) - self._lowest).to(torch.uint8)
        return pack_codes(codes, self.grid.bits)

    def _grid_now(self) -> tuple[Tensor, Tensor]:
        assert self.weight is not None and isinstance(self.grid, Scheme)
        if self.scale is None:
            return fit(self.weight, self.grid)
        scale = stored_scale(self.scale)
        return scale, torch.zeros_like(scale) if self.zero_point is None else self.zero_point

    def dense(self) -> Tensor:
        """``W_hat`` float32 (N, K), differentiable in whatever is trained."""
        if self.state in ("frozen", "packed"):
            q, scale, zero_point = self.parts()
            if isinstance(self.grid, Codebook):
                w = self.grid.dequantize(q, scale)
            else:
                w = dequantize_affine(q, scale, zero_point, self.grid)
        else:
            assert self.weight is not None and isinstance(self.grid, Scheme)
            w = fake_quantize_affine(self.weight, *self._grid_now(), self.grid)
        if self.outlier_at is not None and self.outlier_values is not None:
            w = w.flatten().index_copy(0, self.outlier_at.long(), self.outlier_values.float()).view_as(w)
        return w

    @torch.no_grad()
    def freeze(self) -> None:
        """Turn the weight into integers for good; they are those that ``dense`` used."""
        if self.state not in ("frozen", "packed"):
            if self._is_skeleton:
                shape = self._rows.scale_shape((self.out_features, self.in_features))
                with torch.device("meta"):
                    q = torch.empty(self.out_features, self.in_features)
                    scale = zero_point = torch.empty(shape)
            else:
                q, scale, zero_point = (t.detach().clone() for t in self.parts())
            self.state, self.weight = "frozen", None
            self.set_codes(q)
            self.scale = nn.Parameter(scale)
            self.zero_point = None if self.symmetric else nn.Parameter(zero_point)
        self.requires_grad_(False)

    # ---- forward

    def forward(self, x: Tensor) -> Tensor:
        if self.act is not None:
            self.act.observe(x)
        if self.act is None or not self.quantizes_activations:
            y = self._float_forward(x)
        else:
            y = self._integer_forward(x.reshape(-1, self.in_features), self.act).view(*x.shape[:-1], -1)
        if self.bias is not None:
            y = y + self.bias
        return y if self.output is None else self.output.fake_quantize(y, *self.output.quantize(y))

    def _reads_codes(self, x: Tensor) -> bool:
        """Whether the product of ``x`` is left to the kernel for a few tokens."""
        few = (
            x.numel() <= FEW_TOKENS * self.in_features <= FEW_TOKENS * MAX_AFFINE_K
            and not torch.is_grad_enabled()
            and x.is_cpu
        )
        return few and self.state in ("frozen", "packed")

    def _kernel_parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Packed codes, scale and zero point (N, G) as the kernel reads them; kept where nothing can change them."""
        if self._for_kernel is not None:
            return self._for_kernel
        scale, zero_point = self._stored_grid()
        shape = (self.out_features, scale[0].numel())
        lifted = (zero_point - self._lowest).flatten(1).expand(shape).contiguous()
        parts = self._packed_codes(), scale.flatten(1).expand(shape).contiguous(), lifted
        if self.scale is not None and not self.scale.requires_grad:
            self._for_kernel = parts
        return parts

    def _kernel(self, x: Tensor, inv_scale: Tensor | None) -> Tensor:
        """``affine_matmul`` of x (M, K)."""
        codes, scale, zero_point = self._kernel_parts()
        return affine_matmul(
            x,
            codes,
            self.grid.bits,
            k=self.in_features,
            scale=scale,
            zero_point=zero_point,
            x_inv_scale=inv_scale,
            table=self.grid.levels(x.device) if isinstance(self.grid, Codebook) else None,
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FakeQuantizedLinear":
        self._for_kernel = self._kept = None
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call,no-any-return]

    def _float_forward(self, x: Tensor) -> Tensor:
        if self._reads_codes(x) and x.dtype == torch.float32:
            flat = x.reshape(-1, self.in_features)
            y = self._kernel(flat, None)
            if self.outlier_at is not None:
                y = self._add_outliers(y, flat)
            return y.view(*x.shape[:-1], self.out_features)
        return F.linear(x, self.dense().to(x.dtype))

    def _add_outliers(self, y: Tensor, x: Tensor) -> Tensor:
        """What the kept weights add to the product y (M, N) of the codes with x (M, K)."""
        assert self.outlier_at is not None and self.outlier_values is not None
        if self._kept is None:
            at = self.outlier_at.long()
            rows, columns = at // self.in_features, at % self.in_features
            q, scale, zero_point = self.parts()
            assert isinstance(self.grid, Scheme)
            coded = dequantize_affine(q, scale, zero_point, self.grid)[rows, columns]
            self._kept = rows, columns, self.outlier_values.float() - coded
        rows, columns, more = self._kept
        return y.index_add(1, rows, x[:, columns] * more)

    def _integer_forward(self, x: Tensor, act: ActivationQuantizer) -> Tensor:
        columns = None
        if self.outlier_threshold is not None:
            columns = (x.detach().abs() > self.outlier_threshold).any(dim=0)
            whole, x = x, x.masked_fill(columns, 0.0)
        if self._reads_codes(x) and columns is None and act.is_plain and not self.merges_adapter:
            q8, inv_scale, _ = rms_norm_quantize(x, None)
            return self._kernel(q8, inv_scale).to(x.dtype)
        x_q, inv_scale = act.quantize(x)
        if self._reads_codes(x) and not self.merges_adapter:
            y = self._kernel(x_q.to(torch.int8), inv_scale).to(x.dtype)
        else:
            q, scale, zero_point = self.parts()
            with torch.no_grad():
                centered = (self._rows.rows(q).float() - zero_point).view(self.out_features, self.in_features)
                y = (grouped_product(x_q, centered, scale.flatten(1)) / inv_scale).to(x.dtype)
        if torch.is_grad_enabled():
            y = Served.apply(act.fake_quantize(x, x_q, inv_scale), self.dense(), y)  # type: ignore[no-untyped-call]
        if columns is not None and bool(columns.any()):
            y = y + F.linear(whole[:, columns], self.dense()[:, columns])
        return y

    # ---- checkpoints

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.state == "frozen":
            destination[f"{prefix}weight"] = self.dense().detach()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *others: Any) -> None:
        rest = dict(state_dict)
        w = rest.pop(f"{prefix}weight", None) if self.state == "frozen" else None
        super()._load_from_state_dict(rest, prefix, *others)
        if self.state != "frozen":
            return
        if w is None or tuple(w.shape) != (self.out_features, self.in_features) or self.scale is None:
            missing: list[str] = others[2]
            missing.append(f"{prefix}weight")
            return
        if not self.scale.is_meta:
            self._recover(w)

    @torch.no_grad()
    def _recover(self, w: Tensor) -> None:
        """The integers behind ``w`` (N, K), which is ``dense()`` of a layer with this grid."""
        assert self.scale is not None
        if isinstance(self.grid, Codebook) or self.zero_point is None:
            self.requantize(w)
            return
        # One rounding at the end: zero points that an adapter was merged into are not integers.
        codes = self.grid.rows(w.float()) / stored_scale(self.scale) + self.zero_point
        self.set_codes(codes.round_().clamp_(self.grid.qmin, self.grid.qmax).view(w.shape))

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, grid={self.grid}, state={self.state}"


def quantized_layers(model: nn.Module) -> dict[str, FakeQuantizedLinear]:
    """The layers of ``model`` that are on a grid, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, FakeQuantizedLinear)}
