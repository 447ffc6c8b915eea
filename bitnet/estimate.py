"""What a config costs before anything is run: parameters, bits, file sizes, training memory and FLOPs.

Counts are exact; the training memory is an estimate of the peak of one process (see ``training_memory``).
"""

from dataclasses import dataclass

from bitnet.config import ModelConfig

BITS = {"ternary": 1.6, "binary": 1.0, "none": 16.0}
"""Bits of a weight in the tightest shipped form: five trits in a byte, eight signs in a byte, bf16."""


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """Numbers of parameters by role."""

    linear: int
    embeddings: int
    norms: int

    @property
    def total(self) -> int:
        return self.linear + self.embeddings + self.norms


def count_parameters(config: ModelConfig) -> Parameters:
    """Exact counts: linears of the blocks, embedding and head (once if tied), norms."""
    kv_dim = config.kv_heads * config.head_dim
    attention = 2 * config.dim * config.dim + 2 * config.dim * kv_dim
    feed_forward = 3 * config.dim * config.ffn_dim
    norms = 2 * config.dim + (config.dim + config.ffn_dim if config.sub_norm else 0)
    matrices = 1 if config.tie_embeddings else 2
    return Parameters(
        linear=config.n_layers * (attention + feed_forward),
        embeddings=matrices * config.vocab_size * config.dim,
        norms=config.n_layers * norms + config.dim,
    )


def packed_bytes(config: ModelConfig, weight: str, bits: float | None = None, embedding_bits: int = 16) -> int:
    """Size of a packed model: ``bits`` per weight of a linear, the rest at ``embedding_bits``; scales in fp32."""
    counts = count_parameters(config)
    bits = BITS[weight] if bits is None else bits
    scales = 7 * config.n_layers * 32
    return round((counts.linear * bits + (counts.embeddings + counts.norms) * embedding_bits + scales) / 8)


def bits_per_parameter(config: ModelConfig, weight: str) -> float:
    """Average bits over all parameters of the packed file, embeddings at 16 bits."""
    return packed_bytes(config, weight) * 8 / count_parameters(config).total


def flops_per_token(config: ModelConfig, seq_len: int, training: bool = True) -> int:
    """FLOPs per token: 2 per weight and forward pass, attention scores included (causal: half), times 3 in training."""
    counts = count_parameters(config)
    head = config.vocab_size * config.dim
    attention = 2 * config.n_layers * config.dim * seq_len
    forward = 2 * (counts.linear + head) + attention
    return forward * (3 if training else 1)


@dataclass(frozen=True, kw_only=True)
class TrainingMemory:
    """Bytes of one training process above the idle interpreter."""

    weights: int
    gradients: int
    optimizer: int
    quantized: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.quantized + self.activations


def training_memory(config: ModelConfig, *, weight: str, act_bits: int | str, rows: int, seq_len: int, bf16: bool) -> TrainingMemory:
    """Peak bytes of one micro-batch of ``rows`` x ``seq_len`` tokens with AdamW and float32 latent weights.

    Weights, gradients and the two AdamW moments take 4 bytes each; the cached trits one. The activations are what
    autograd keeps, operation by operation (see the comments), plus the logits with their softmax and gradient, which
    are alive together at the turn from forward to backward.
    """
    counts = count_parameters(config)
    tokens = rows * seq_len
    compute = 2 if bf16 else 4
    quantized = weight != "none" and act_bits != "none"
    kv_dim = config.kv_heads * config.head_dim
    linear_input = (1 if quantized else compute) * (3 * config.dim + 2 * config.dim + config.dim + config.ffn_dim)
    if not quantized:  # the inputs of wq wk wv, and of w1 w3, are one tensor each
        linear_input = compute * (config.dim + config.dim + config.dim + config.ffn_dim)
    # RMSNorm keeps its input, the normalised input and the reciprocal; sub-norms as well.
    norms = 4 * 2 * (2 * config.dim + (config.dim + config.ffn_dim if config.sub_norm else 0))
    # q and k before and after the rotation meet cos and sin only; SDPA keeps q, k, v and its output.
    attention = compute * (2 * config.dim + 2 * kv_dim)
    # silu keeps its input; the product keeps both factors.
    gate = compute * 3 * config.ffn_dim
    per_token = config.n_layers * (linear_input + norms + attention + gate)
    logits = config.vocab_size * (3 * 4 + (compute if bf16 else 0))
    return TrainingMemory(
        weights=4 * counts.total,
        gradients=4 * counts.total,
        optimizer=8 * counts.total,
        quantized=counts.linear if quantized else 0,
        activations=tokens * (per_token + logits + 2 * 4 * config.dim),
    )
