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


OPTIMIZERS = ("adamw", "muon", "adafactor", "adamw8bit")
"""Optimizers whose state is known here: the kinds of ``OptimConfig``."""


def optimizer_bytes(config: ModelConfig, kind: str) -> int:
    """Bytes of the state of ``OptimConfig.kind``; per parameter, 8 for AdamW's two moments and 4 for Muon's one."""
    counts = count_parameters(config)
    kv_dim = config.kv_heads * config.head_dim
    match kind:
        case "adamw":
            return 8 * counts.total
        case "muon":
            return 4 * counts.linear + 8 * (counts.embeddings + counts.norms)
        case "adamw8bit":  # codes, and a float32 scale for each 256 of them; norms are too small for it
            return 2 * (counts.linear + counts.embeddings) * (256 + 4) // 256 + 8 * counts.norms
        case "adafactor":  # one number for each row and each column
            rows_and_columns = (
                2 * (config.dim + config.dim) + 2 * (config.dim + kv_dim) + 3 * (config.dim + config.ffn_dim)
            )
            tables = (1 if config.tie_embeddings else 2) * (config.vocab_size + config.dim)
            return 4 * (config.n_layers * rows_and_columns + tables + counts.norms)
    raise ValueError(f"{kind}: not one of {', '.join(OPTIMIZERS)}.")


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


def _kept_per_token(config: ModelConfig, quantized: bool, compute: int) -> int:
    """Bytes that autograd keeps of one block per token, operation by operation; products run in ``compute`` bytes."""
    dim, ffn, kv_dim = config.dim, config.ffn_dim, config.kv_heads * config.head_dim
    # The input of wq wk wv, and that of w1 w3, is kept once: as int8, or as it is.
    linear_inputs = (1 if quantized else compute) * (3 * dim + ffn)
    normed = 2 * dim + (dim + ffn if config.sub_norm else 0)
    # The input, float32; where torch spells the norm out (bf16, or no compiled kernels) also the normalised input.
    norms = (2 if compute == 2 else 1) * 4 * normed
    attention = compute * (
        dim + 2 * kv_dim + (0 if config.sub_norm else dim)
    )  # q, k, v; the output unless a norm has it
    gate = compute * 3 * ffn  # silu's input, and both factors of the product
    return linear_inputs + norms + attention + gate


def training_memory(
    config: ModelConfig,
    *,
    weight: str,
    act_bits: int | str,
    rows: int,
    seq_len: int,
    bf16: bool,
    optimizer: str = "adamw",
    loss_chunk: int | None = None,
    activation_checkpointing: bool = False,
    begins_in_float: bool = False,
) -> TrainingMemory:
    """Peak bytes of live tensors in one micro-batch of ``rows`` x ``seq_len`` tokens, float32 latent weights.

    Weights and gradients take 4 bytes each, the trits that autograd keeps one. Activations are what autograd saves, and
    the logits with their log-softmax and two gradients, which are alive together where forward turns into backward;
    with ``loss_chunk``, those of that many tokens. With ``activation_checkpointing``, the input of each block is kept,
    and what one block saves is there only when the logits no longer are. A run that ``begins_in_float`` takes what its
    larger phase takes; while quantizers are blended in, that is what the float phase takes. A CPU heap fragments: its
    resident set can be half as much again.
    """
    counts, tokens = count_parameters(config), rows * seq_len
    compute = 2 if bf16 else 4
    quantized = weight != "none" and act_bits != "none"
    logits = min(loss_chunk or tokens, tokens) * config.vocab_size * (3 * 4 + (compute if bf16 else 0))
    if loss_chunk is not None:  # the gradient of what the head reads is there at the same time
        logits += tokens * 4 * config.dim

    def kept(low_bit: bool) -> tuple[int, int]:
        """Trits and activations, where layers compute with low bits or in float."""
        trits = counts.linear if low_bit else 0
        block = tokens * _kept_per_token(config, low_bit, compute)
        if activation_checkpointing:
            return trits // config.n_layers, config.n_layers * tokens * 4 * config.dim + max(logits, block)
        return trits, config.n_layers * block + logits

    trits, activations = max((kept(phase) for phase in {quantized, quantized and not begins_in_float}), key=sum)
    return TrainingMemory(
        weights=4 * counts.total,
        gradients=4 * counts.total,
        optimizer=optimizer_bytes(config, optimizer),
        quantized=trits,
        activations=activations + tokens * 2 * 4 * config.dim,
    )
