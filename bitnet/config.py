"""What a model, its optimizer and its schedule are made of: frozen dataclasses, standard library only.

Every field is a key of the YAML files and an option of the command line; the string under a field is its help.
A config that cannot work is refused here, before any data is read or memory taken.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from bitnet.errors import UserError

Activation = Literal["silu", "relu2"]
OptimKind = Literal["adamw", "muon", "adafactor", "adamw8bit"]
LARGEST = 2**31 - 1
"""No size of a model is larger: products of two then fit into 64 bits."""


def _whole(owner: object, *names: str) -> None:
    """Sizes come from files of strangers too: "96", 96.0 and true are refused, not guessed at."""
    for name in names:
        value = getattr(owner, name)
        if type(value) is not int:
            raise UserError(f"{name} = {value!r}: must be a whole number.")
        if value > LARGEST:
            raise UserError(f"{name} = {value}: must be at most {LARGEST}.")


def _number(owner: object, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise UserError(f"{name} = {value!r}: must be a number.")


def _positive(owner: object, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if value <= 0:
            raise UserError(f"{name} = {value}: must be greater than 0.")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes and switches of the transformer.

    ``sub_norm`` with ``relu2`` is the graph of BitNet b1.58 2B4T (arXiv 2504.12285); without sub-norms and with
    ``silu`` it is Llama. Raises ``UserError`` for sizes that no transformer can have.
    """

    vocab_size: int = 32_000
    """Number of token ids (data.vocab_size sets it; a smaller text may fill fewer)."""
    dim: int = 768
    """Width of the residual stream."""
    n_layers: int = 12
    """Number of transformer blocks."""
    n_heads: int = 12
    """Number of query heads; the head dimension is dim / n_heads and must be even."""
    n_kv_heads: int | None = None
    """Number of key and value heads (grouped-query attention); n_heads when null."""
    ffn_dim: int = 2048
    """Width of the gated feed-forward network."""
    max_seq_len: int = 2048
    """Longest sequence in tokens (data.seq_len sets it)."""
    activation: Activation = "silu"
    """Activation of the gate: silu, or relu2 = max(x, 0) squared."""
    sub_norm: bool = True
    """RMSNorm on the inputs of wo and w2 (SubLN of the BitNet papers)."""
    tie_embeddings: bool = True
    """Let the output head share the embedding matrix."""
    norm_eps: float = 1e-5
    """Epsilon of every RMSNorm."""
    rope_theta: float = 10_000.0
    """Base of the rotary position embedding."""
    dropout: float = 0.0
    """Probability of dropping an element of the embeddings and of each block's two outputs."""
    init_std: float = 0.02
    """Standard deviation of the initial weights; wo and w2 get init_std / sqrt(2 n_layers)."""

    def __post_init__(self) -> None:
        if self.n_kv_heads is None:
            object.__setattr__(self, "n_kv_heads", self.n_heads)
        sizes = ("vocab_size", "dim", "n_layers", "n_heads", "n_kv_heads", "ffn_dim", "max_seq_len")
        _whole(self, *sizes)
        _number(self, "norm_eps", "rope_theta", "init_std", "dropout")
        if self.activation not in get_args(Activation):
            raise UserError(f"activation = {self.activation!r}: must be one of {', '.join(get_args(Activation))}.")
        for switch in ("sub_norm", "tie_embeddings"):
            if not isinstance(getattr(self, switch), bool):
                raise UserError(f"{switch} = {getattr(self, switch)!r}: must be true or false.")
        _positive(self, *sizes)
        _positive(self, "norm_eps", "rope_theta", "init_std")
        if self.dim % self.n_heads:
            raise UserError(f"dim = {self.dim} is not a multiple of n_heads = {self.n_heads}; heads must be equal.")
        if self.head_dim % 2:
            raise UserError(f"dim / n_heads = {self.head_dim} is odd; rotary embeddings need an even head dimension.")
        if self.n_heads % self.kv_heads:
            raise UserError(f"n_heads = {self.n_heads} is not a multiple of n_kv_heads = {self.kv_heads}.")
        if not 0.0 <= self.dropout < 1.0:
            raise UserError(f"dropout = {self.dropout}: must be at least 0 and less than 1.")

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    @property
    def kv_heads(self) -> int:
        """``n_kv_heads`` after null has been resolved."""
        assert self.n_kv_heads is not None
        return self.n_kv_heads

    def export_obstacles(self) -> dict[str, str | None]:
        """For each export format, ``None`` when these sizes allow it, else the reason why not.

        The rules are those of the programs that read the files: block sizes of the GGUF ternary types, four rows per
        byte in Hugging Face's packing, and activations that a runtime's graph has built in.
        """
        widths = {"dim": self.dim, "ffn_dim": self.ffn_dim}

        def multiple_of(block: int) -> str | None:
            wrong = [f"{name} = {value}" for name, value in widths.items() if value % block]
            return f"{' and '.join(wrong)}: not a multiple of {block}" if wrong else None

        rows = {**widths, "n_kv_heads * head_dim": self.kv_heads * self.head_dim}
        bad_rows = [f"{name} = {value}" for name, value in rows.items() if value % 4]
        hf = f"{' and '.join(bad_rows)}: packed rows come in fours" if bad_rows else None
        graph = None
        if self.activation == "relu2":
            graph = "llama.cpp computes silu here; relu2 needs ik_llama.cpp or bitnet.cpp"
        tied = None if self.tie_embeddings or not self.sub_norm else "llama.cpp's bitnet graph needs tied embeddings"
        return {
            "hf": hf,
            "gguf tq2_0, tq1_0": graph or tied or multiple_of(256),
            "gguf q2_0": graph or tied or multiple_of(64),
        }


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer. Latent weights take a learning rate several times that of a float model (arXiv 2310.11453, 2.2).

    What each kind keeps per parameter, and which learning rate it wants, is in docs/training.md.
    """

    kind: OptimKind = "adamw"
    """adamw, muon (for the matrices of the blocks, AdamW for the rest), adafactor, or adamw8bit (needs torchao)."""
    lr: float = 1.5e-3
    """Peak learning rate; adafactor takes it relative to the size of each tensor's values (try 0.03)."""
    matrix_lr: float | None = None
    """muon: peak learning rate of its matrices; null for lr, since its steps are scaled to the size of AdamW's."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of the first and second moment."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices; norms are never decayed."""

    def __post_init__(self) -> None:
        _positive(self, "lr", "eps")
        if self.matrix_lr is not None:
            _positive(self, "matrix_lr")
            if self.kind != "muon":
                raise UserError(f"matrix_lr = {self.matrix_lr}: only muon has it; kind is {self.kind}.")
        if self.weight_decay < 0:
            raise UserError(f"weight_decay = {self.weight_decay}: must be 0 or more.")
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise UserError(f"betas = {self.betas}: each must be at least 0 and less than 1.")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """How learning rate and weight decay move during a run; formulas in ``bitnet.training.schedules``."""

    kind: Literal["two_stage", "linear", "cosine", "wsd", "constant"] = "two_stage"
    """Shape of the learning rate; two_stage is BitNet's (linear, lower peak after the middle), wsd flat then linear."""
    warmup_steps: int = 375
    """Steps of linear warm-up."""
    min_ratio: float = 0.0
    """The learning rate never falls below this fraction of the peak."""
    stage2_at: float = 0.5
    """two_stage: fraction of the run at which the peak drops."""
    stage2_ratio: float = 2 / 3
    """two_stage: the second peak divided by the first."""
    decay_fraction: float = 0.2
    """wsd: the last fraction of the run, in which the learning rate falls to its minimum."""
    weight_decay_until: float = 1.0
    """Fraction of the run after which the weight decay is 0 (BitNet: 0.5, TriLM: 2/3)."""

    def __post_init__(self) -> None:
        if self.warmup_steps < 0:
            raise UserError(f"warmup_steps = {self.warmup_steps}: must be 0 or more.")
        for name in ("min_ratio", "stage2_at", "decay_fraction", "weight_decay_until"):
            value = getattr(self, name)
            if not 0.0 <= value <= 1.0:
                raise UserError(f"{name} = {value}: a fraction between 0 and 1 is needed.")
        _positive(self, "stage2_ratio")
