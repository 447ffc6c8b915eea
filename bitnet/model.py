"""The transformer: a Llama-shaped decoder made of ``nn.Linear``, with no word about low bits in it.

Blocks are pre-norm with rotary positions, grouped-query attention and a gated feed-forward network::

    h = x + wo(attn_sub_norm(attention(wq n, wk n, wv n)))         n = attention_norm(x)
    y = h + w2(ffn_sub_norm(act(w1 m) * w3 m))                     m = ffn_norm(h)

With sub-norms this is the graph of BitNet b1.58 2B4T (arXiv 2504.12285), without them and with silu that of Llama.
Norms and rotary embeddings are spelled as in those programs, operation by operation, so that equal weights give equal
bits. Every linear of a block is reached by ``bitnet.layers.swap_linears``.

Shapes: B batch, T tokens of this call, S tokens including the cache, H query heads, G key/value heads,
K head dimension, D model width, V vocabulary.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from bitnet.config import ModelConfig
from bitnet.loss import ReadOut
from bitnet.recomputation import recomputed
from bitnet_kernels import rms_norm as fused_norm
from bitnet_kernels.cpu import native


class _NoInitialization(TorchFunctionMode):
    """Makes the functions of ``torch.nn.init`` leave their tensor alone."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


@contextmanager
def without_memory() -> Iterator[None]:
    """Modules made inside have shapes but no memory and no values, to be filled from a file.

    Initialization is switched off because on the meta device it would import a compiler's worth of torch: 150 MB.
    """
    with torch.device("meta"), _NoInitialization():
        yield


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, computed in float32 (arXiv 1910.07467).

    On a GPU the kernel computes it that also serves the packed model, with gradients and without.
    """

    training_kernel: Callable[[Tensor, Tensor, float], Tensor] | None = None
    """What computes this norm where it trains on a GPU, if something is to be done with the result at once."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if runs_kernels(x):
            from bitnet_kernels.triton_norm import rms_norm

            return rms_norm(x, self.weight, self.eps)
        if x.is_cuda and self.training_kernel is not None and not torch.compiler.is_compiling():
            return self.training_kernel(x, self.weight, self.eps)
        if torch.is_grad_enabled() and fused_norm.takes(x, self.weight):
            return fused_norm.rms_norm(x, self.weight, self.eps)
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)


def rotary_frequencies(head_dim: int, theta: float, device: torch.device) -> Tensor:
    """Radians per position of each pair, float32 (K / 2,), of the rotary embedding (arXiv 2104.09864)."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.int64, device=device).float() / head_dim
    return 1.0 / theta**exponent


def rotary_angles(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine, each float32 (..., K), of the rotary embedding at ``positions`` (...)."""
    angles = positions.float()[..., None] * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x (B, H, T, K): the first half of K is paired with the second."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class KVCache(nn.Module):
    """Keys and values of every layer for up to ``max_len`` tokens: two buffers (L, B, G, max_len, K).

    ``first`` int64 (B,) makes room for prompts of unequal length: sequence b begins at token ``first[b]`` of the cache,
    and what lies before it is padding that no token sees.
    """

    keys: Tensor
    values: Tensor
    first: Tensor | None

    def __init__(
        self, config: ModelConfig, batch_size: int, max_len: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__()
        shape = (config.n_layers, batch_size, config.kv_heads, max_len, config.head_dim)
        self.register_buffer("keys", torch.zeros(shape, device=device, dtype=dtype), persistent=False)
        self.register_buffer("values", torch.zeros(shape, device=device, dtype=dtype), persistent=False)
        self.register_buffer("first", None, persistent=False)
        self.length = 0
        self.place: Tensor | None = None
        """Where the tokens of this call go, as ``places`` has said."""

    @property
    def max_len(self) -> int:
        return self.keys.shape[3]

    def places(self, T: int) -> Tensor:
        """Where the next T tokens go, int64 (T,). Raises ``ValueError`` when they do not fit."""
        if self.length + T > self.max_len:
            raise ValueError(f"{self.length + T} tokens exceed the limit of {self.max_len}.")
        self.place = torch.arange(self.length, self.length + T, device=self.keys.device)
        return self.place

    @property
    def reach(self) -> int:
        """The most places that one new token may see."""
        return self.length + 1

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store (B, G, T, K) behind the ``length`` tokens already there; return all S = length + T of them."""
        end = self.length + k.shape[2]
        self.keys[layer, :, :, self.length : end] = k
        self.values[layer, :, :, self.length : end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def visible(self, places: Tensor) -> Tensor | None:
        """Which of the S tokens each query at ``places`` sees, (T, S) or (B, 1, T, S); ``None``: all up to itself."""
        T, S = places.shape[0], self.length + places.shape[0]
        if self.first is None and (S == T or T == 1):
            return None
        keys = torch.arange(S, device=places.device)
        causal = keys <= places[:, None]
        if self.first is None:
            return causal
        # Padding sees itself, so that it has something to see: nobody reads what comes out.
        return causal & (keys >= self.first.view(-1, 1, 1, 1)) | (keys == places[:, None])

    def advance(self, T: int) -> None:
        self.length += T


def attends_natively(x: Tensor) -> bool:
    """Whether one token at a time is attended to by the native CPU kernel, in a trained model and in a packed one."""
    eager_cpu = x.is_cpu and x.dtype == torch.float32 and not torch.compiler.is_compiling()
    return eager_cpu and native.library() is not None


MOST_IN_ONE_KERNEL = 4096
"""Places that one program of ``triton_decode`` reads in a row; with more, those of a head should be shared out."""


def attends_in_one_kernel(x: Tensor, cache: KVCache) -> bool:
    """Whether one token at a time is attended to by ``triton_decode``, in a trained model and in a packed one."""
    return runs_kernels(x) and cache.reach <= MOST_IN_ONE_KERNEL


def runs_kernels(x: Tensor) -> bool:
    """Whether this is eager work without gradients on one GPU, where each kernel less is time won."""
    return type(x) is Tensor and x.is_cuda and not torch.is_grad_enabled() and not torch.compiler.is_compiling()


class Attention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = config.n_heads, config.kv_heads, config.head_dim
        kv_dim = config.kv_heads * config.head_dim
        self.wq = nn.Linear(config.dim, config.dim, bias=False)
        self.wk = nn.Linear(config.dim, kv_dim, bias=False)
        self.wv = nn.Linear(config.dim, kv_dim, bias=False)
        self.wo = nn.Linear(config.dim, config.dim, bias=False)
        self.attn_sub_norm = RMSNorm(config.dim, config.norm_eps) if config.sub_norm else nn.Identity()

    def forward(
        self,
        x: Tensor,
        angles: tuple[Tensor, Tensor],
        mask: Tensor | None,
        cache: KVCache | None = None,
        layer: int = 0,
    ) -> Tensor:
        y = self.attend(self.wq(x), self.wk(x), self.wv(x), angles, mask, cache, layer)
        return self.wo(self.attn_sub_norm(y))  # type: ignore[no-any-return]

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        angles: tuple[Tensor, Tensor],
        mask: Tensor | None,
        cache: KVCache | None = None,
        layer: int = 0,
    ) -> Tensor:
        """Projections q (B, T, H * K), k and v (B, T, G * K) -> what the heads read, (B, T, H * K)."""
        B, T, _ = q.shape
        if T == 1 and cache is not None and attends_in_one_kernel(q, cache):
            from bitnet_kernels import triton_decode

            assert cache.place is not None
            keys, values = cache.keys[layer], cache.values[layer]
            q = triton_decode.rotate_and_append(q, k, v, angles, keys, values, cache.place)
            return triton_decode.attend(q, keys, values, cache.place, cache.first)
        q = q.view(B, T, self.n_heads, self.head_dim).transpose(1, 2)  # (B, H, T, K)
        k = k.view(B, T, self.n_kv_heads, self.head_dim).transpose(1, 2)  # (B, G, T, K)
        v = v.view(B, T, self.n_kv_heads, self.head_dim).transpose(1, 2)
        cos, sin = angles[0].to(q.dtype), angles[1].to(q.dtype)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.append(layer, k, v)
            if T == 1 and type(cache) is KVCache and not torch.is_grad_enabled() and attends_natively(q):
                return native.attend(q, k, v, cache.first).transpose(1, 2).flatten(2)
        causal = mask is None and q.shape[2] > 1
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=self.n_kv_heads != self.n_heads
        )
        return y.transpose(1, 2).flatten(2)


def relu2(x: Tensor) -> Tensor:
    y = F.relu(x)
    return y * y  # a power would become float32 under CUDA's autocast, and train other numbers than are served


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "relu2": relu2}


class FeedForward(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.w3 = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.w2 = nn.Linear(config.ffn_dim, config.dim, bias=False)
        self.ffn_sub_norm = RMSNorm(config.ffn_dim, config.norm_eps) if config.sub_norm else nn.Identity()
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(self.ffn_sub_norm(self.gated(self.w1(x), self.w3(x))))  # type: ignore[no-any-return]

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        """``activation(gate) * up``, (..., F)."""
        if self.activation is relu2 and runs_kernels(gate):
            from bitnet_kernels.triton_decode import relu2_gate

            return relu2_gate(gate, up)
        return self.activation(gate) * up


class Block(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        angles: tuple[Tensor, Tensor],
        mask: Tensor | None,
        cache: KVCache | None = None,
        layer: int = 0,
    ) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), angles, mask, cache, layer))
        return x + self.dropout(self.feed_forward(self.ffn_norm(x)))  # type: ignore[no-any-return]

    def norm_groups(self) -> Iterator[tuple[nn.Module, list[nn.Module]]]:
        """Each norm with the linears that read its output: where a per-channel factor can be folded."""
        a, f = self.attention, self.feed_forward
        yield self.attention_norm, [a.wq, a.wk, a.wv]
        yield self.ffn_norm, [f.w1, f.w3]
        if isinstance(a.attn_sub_norm, RMSNorm):
            yield a.attn_sub_norm, [a.wo]
        if isinstance(f.ffn_sub_norm, RMSNorm):
            yield f.ffn_sub_norm, [f.w2]


class Transformer(nn.Module):
    """Token ids (B, T) int64 -> logits (B, T, V).

    With ``cache``, the tokens follow those already in the cache, which grows by T. With ``document_ids`` (B, T), a
    token sees only tokens of its own document. With ``last_only``, the logits are those of the last token, (B, 1, V).
    With ``read_out``, the result is what that makes of the normed residual stream (B, T, D) and of the head.
    Raises ``ValueError`` when the sequence is longer than the model allows.
    """

    loss_chunk: int | None = None
    """Tokens whose logits a loss may hold at once (``bitnet.loss``); ``None`` for all."""
    recomputes_blocks = False
    """Whether backward computes the inside of each block again instead of keeping it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.tok_embeddings.weight
        self.init_weights()

    @property
    def decodes_as_graph(self) -> bool:
        """Whether a decoding step may be captured: its kernels and addresses must be the same for every token."""
        return False

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Normal weights; the two matrices that write to the residual stream shrink with depth (GPT-2's rule)."""
        residual_std = self.config.init_std / math.sqrt(2 * self.config.n_layers)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                std = residual_std if name.endswith(("wo.weight", "w2.weight")) else self.config.init_std
                nn.init.normal_(parameter, std=std, generator=generator)

    def forward(
        self,
        tokens: Tensor,
        cache: KVCache | None = None,
        document_ids: Tensor | None = None,
        last_only: bool = False,
        read_out: ReadOut | None = None,
    ) -> Tensor:
        T = tokens.shape[1]
        if cache is None:
            if self.config.max_seq_len < T:
                raise ValueError(f"{T} tokens exceed the limit of {self.config.max_seq_len}.")
            places = positions = torch.arange(T, device=tokens.device)
            mask = None if document_ids is None else same_document(positions, document_ids)
        elif document_ids is not None:
            raise ValueError("document_ids are for whole sequences; a cache holds one document.")
        else:
            places = cache.places(T)
            mask = cache.visible(places)
            positions = places if cache.first is None else (places - cache.first[:, None, None]).clamp_(min=0)
        frequencies = rotary_frequencies(self.config.head_dim, self.config.rope_theta, tokens.device)
        angles = rotary_angles(positions, frequencies)
        x = self.embed(tokens)
        recomputes = self.recomputes_blocks and self.training and cache is None and torch.is_grad_enabled()
        for layer, block in enumerate(self.layers):
            x = recomputed(block, x, angles, mask) if recomputes else block(x, angles, mask, cache, layer)
        if cache is not None:
            cache.advance(T)
        x = self.norm(x[:, -1:] if last_only else x)
        return self.lm_head(x) if read_out is None else read_out(x, self.lm_head)

    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids (...) -> the residual stream before the first block, (..., D)."""
        return self.dropout(self.tok_embeddings(tokens))  # type: ignore[no-any-return]

    def new_cache(self, batch_size: int, max_len: int | None = None) -> KVCache:
        weight = self.norm.weight  # every stored form of a model has it
        max_len = min(max_len or self.config.max_seq_len, self.config.max_seq_len)
        return KVCache(self.config, batch_size, max_len, weight.device, weight.dtype)


def same_document(positions: Tensor, document_ids: Tensor) -> Tensor:
    """Boolean mask (B, 1, T, T), True where a query sees a key: earlier, or itself, in its own document."""
    same = document_ids[:, None, :, None] == document_ids[:, None, None, :]
    return same & (positions[:, None] >= positions[None, :])


def float_model(config: ModelConfig, state: dict[str, Tensor]) -> Transformer:
    """The float model with the weights of ``state``, which it shares, for inference; a tied head may be left out."""
    with without_memory():
        model = Transformer(config)
    head = {"lm_head.weight": state["tok_embeddings.weight"]} if config.tie_embeddings else {}
    model.load_state_dict(state | head, assign=True)
    if config.tie_embeddings:
        model.lm_head.weight = model.tok_embeddings.weight
    return model.requires_grad_(False).eval()
