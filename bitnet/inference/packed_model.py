"""The transformer that multiplies packed weights, joined and fused, with the results of the one that was trained.

``PackedBlock`` joins the matrices that read the same tensor (wq | wk | wv and w1 | w3) into one, each row keeping the
scale of its own matrix, and lets one kernel normalize and quantize what they read. ``PackedTransformer`` decodes on the
CPU with one native call for all blocks. Neither changes a bit of the result.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from bitnet.inference.packed_linear import HeadDtype, PackedLinear, QuantizedRows
from bitnet.layers import quantized_layers
from bitnet.loss import ReadOut
from bitnet.model import Block, KVCache, Transformer, attends_natively, rotary_angles, rotary_frequencies
from bitnet_kernels import FORMATS
from bitnet_kernels.cpu import native
from bitnet_kernels.cpu.decoder import Decoder, Readers


class _Readers:
    """Linears that read the same tensor, and the norm before it (or ``None``)."""

    def __init__(self, norm: nn.Module | None, linears: list[nn.Module]) -> None:
        self.norm = norm if hasattr(norm, "weight") else None
        self.linears = linears
        self.sizes = [int(linear.out_features) for linear in linears]  # type: ignore[arg-type]
        packed = [linear for linear in linears if isinstance(linear, PackedLinear)]
        forms = {(linear.form, linear.bias is None) for linear in packed}
        same = len(packed) == len(linears) and len(forms) == 1 and packed[0].act_bits != "none"
        self.joined = None if not same else packed[0] if len(packed) == 1 else _join(packed)

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        if self.joined is None:
            x = x if self.norm is None else self.norm(x)
            return tuple(linear(x) for linear in self.linears)
        norm = self.norm
        if self.joined.transform != "none":
            x, norm = self.joined.transformed(x if norm is None else norm(x)), None
        rows = QuantizedRows(x, norm, self.joined.act_bits)
        if rows.q.shape[0] == 1:
            return tuple(self.joined.multiply(rows).split(self.sizes, dim=-1))
        # Contiguous results, as in training: torch's elementwise functions round by the place in a vector.
        return tuple(linear.multiply(rows) for linear in self.linears)  # type: ignore[operator]


def _join(parts: list[PackedLinear]) -> PackedLinear | None:
    """One ``PackedLinear`` over the rows of all parts, whose weights become views of its own; ``None`` with biases."""
    if any(part.bias is not None for part in parts):
        return None
    first = parts[0]
    rows = [part.out_features for part in parts]
    with torch.device("meta"):
        per_row = "row" if first.scale_per == "matrix" else first.scale_per
        joined = PackedLinear(first.in_features, sum(rows), **first.form._replace(scale_per=per_row)._asdict())
    storage, next_ = first.packed.untyped_storage().data_ptr(), first.packed.storage_offset()
    adjoining = not first.packed.is_meta
    for part in parts:
        here = part.packed.untyped_storage().data_ptr(), part.packed.storage_offset()
        adjoining &= here == (storage, next_) and part.packed.is_contiguous()
        next_ += part.packed.numel()
    if adjoining:
        joined.packed = first.packed.as_strided((sum(rows), first.packed.shape[1]), first.packed.stride())
    else:
        joined.packed = torch.cat([part.packed for part in parts])
    for part, packed in zip(parts, joined.packed.split(rows), strict=True):
        part.packed = packed
    if joined.group_scale is not None:
        joined.group_scale = torch.cat([part.group_scale for part in parts])  # type: ignore[misc]
    else:
        joined.inv_scale = torch.cat([part.inv_scale.expand(n) for part, n in zip(parts, rows, strict=True)])  # type: ignore[union-attr]
    return joined


class PackedBlock(Block):
    """A ``Block`` with the same submodules and the same results; see the module's docstring."""

    def __init__(self, block: Block) -> None:
        nn.Module.__init__(self)
        self.attention_norm, self.attention = block.attention_norm, block.attention
        self.ffn_norm, self.feed_forward = block.ffn_norm, block.feed_forward
        self.join()

    def join(self) -> None:
        """Join the matrices anew, after their tensors have been replaced or filled."""
        a, f = self.attention, self.feed_forward
        self._qkv = _Readers(self.attention_norm, [a.wq, a.wk, a.wv])
        self._wo = _Readers(a.attn_sub_norm, [a.wo])
        self._gate = _Readers(self.ffn_norm, [f.w1, f.w3])
        self._w2 = _Readers(f.ffn_sub_norm, [f.w2])

    def readers(self) -> list[Readers] | None:
        """The block for native decoding, where all of it is packed, joined, on the CPU and in float32."""
        found = []
        for group in (self._qkv, self._wo, self._gate, self._w2):
            joined, weight = group.joined, getattr(group.norm, "weight", None)
            if joined is None or joined.act_bits != 8 or joined.bias is not None or not joined.packed.is_cpu:
                return None
            if joined.inv_scale is None or joined.transform != "none":
                return None
            if weight is not None and (weight.dtype != torch.float32 or not native.sums_like_torch(weight.numel())):
                return None
            planes, eps = FORMATS[joined.format].planes, getattr(group.norm, "eps", 0.0)
            found.append(Readers(weight, eps, joined.packed, joined.inv_scale, planes, joined.in_features))
        return found

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedBlock":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.join()
        return self

    def forward(
        self,
        x: Tensor,
        angles: tuple[Tensor, Tensor],
        mask: Tensor | None,
        cache: KVCache | None = None,
        layer: int = 0,
    ) -> Tensor:
        q, k, v = self._qkv(x)
        x = x + self._wo(self.attention.attend(q, k, v, angles, mask, cache, layer))[0]
        gate, up = self._gate(x)
        return x + self._w2(self.feed_forward.gated(gate, up))[0]


class PackedTransformer(Transformer):
    """A ``Transformer`` whose low-bit linears are ``PackedLinear`` and whose blocks are ``PackedBlock``."""

    head_dtype: HeadDtype = "float32"
    """How embedding and head are stored."""
    _decoder: Decoder | None = None
    _decoder_is_made = False
    _frequencies: Tensor

    @property
    def decodes_as_graph(self) -> bool:
        """Not where a layer asks which of its inputs are outliers: the CPU waits for the answer."""
        return all(layer.outlier_threshold is None for layer in quantized_layers(self).values())

    def join_blocks(self) -> "PackedTransformer":
        """Turn plain blocks into ``PackedBlock``, once their linears are in place."""
        self.layers = nn.ModuleList(PackedBlock(block) for block in self.layers)  # type: ignore[arg-type]
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedTransformer":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._decoder_is_made = False
        return self

    def _native_decoder(self) -> Decoder | None:
        """The native decoder, made at the first token, or ``None`` where this model or machine cannot have one."""
        if not self._decoder_is_made:
            self._decoder, self._decoder_is_made = None, True
            layers = [block.readers() for block in self.layers]  # type: ignore[operator]
            norm, config = self.norm, self.config
            plain = norm.weight.dtype == torch.float32 and native.sums_like_torch(config.dim)
            if plain and all(layer is not None for layer in layers):
                self._frequencies = rotary_frequencies(config.head_dim, config.rope_theta, norm.weight.device)
                self._decoder = Decoder(
                    layers,
                    norm.weight,
                    norm.eps,
                    heads=config.n_heads,
                    kv_heads=config.kv_heads,
                    head_dim=config.head_dim,
                    activation=config.activation,
                )
        return self._decoder

    def embed(self, tokens: Tensor) -> Tensor:
        return super().embed(tokens).to(self.norm.weight.dtype)  # a stored table gives float32

    @staticmethod
    def _decodes_natively(cache: KVCache) -> bool:
        return not torch.is_grad_enabled() and attends_natively(cache.keys) and cache.length < cache.max_len

    def forward(
        self,
        tokens: Tensor,
        cache: KVCache | None = None,
        document_ids: Tensor | None = None,
        last_only: bool = False,
        read_out: ReadOut | None = None,
    ) -> Tensor:
        if type(cache) is not KVCache or tokens.shape[1] != 1 or read_out or not self._decodes_natively(cache):
            return super().forward(tokens, cache, document_ids, last_only, read_out)
        decoder = self._native_decoder()
        if decoder is None or not decoder.can_decode(tokens.shape[0]):
            return super().forward(tokens, cache, document_ids, last_only)
        x = self.embed(tokens[:, 0])
        positions = torch.tensor([cache.length]) if cache.first is None else cache.length - cache.first
        cos, sin = rotary_angles(positions, self._frequencies)
        decoder(x, cos, sin, cache.keys, cache.values, cache.length, cache.first)
        cache.advance(1)
        return self.lm_head(x.unsqueeze(1))  # type: ignore[no-any-return]
