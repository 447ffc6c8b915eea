"""The recipe of the BitNet papers: ternary or binary weights and 8-bit or 4-bit activations from the first step on.

* weights: ternary absmean (arXiv 2402.17764) or binary sign (2310.11453), one scale per matrix;
* activations: int8 absmax per token; with ``act_bits: 4`` the inputs of wq wk wv w1 w3 take 4 bits and those of wo
  and w2 stay at 8 (a4.8, arXiv 2411.04965), which papers switch on late: ``act4_from: 0.95``;
* ``quantize_from`` trains in float first, and ``quantizer_warmup`` blends the quantizers in from then on: what was best
  in docs/recipes/pretraining.md, and how a float model is trained on.

Embeddings, the output head and the norms are never quantized. ``weight: none`` with ``act_bits: none`` is the float
twin: the same transformer, untouched.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch import Tensor, nn

from bitnet.errors import UserError
from bitnet.input_transforms import TransformName
from bitnet.layers import BitLinear, ScaledBitLinear, swap_linears
from bitnet.layers.bit_linear import ActBits, WeightKind
from bitnet.recipes.base import Progress, Recipe, no_progress
from bitnet.scale_rules import ScaledQuantizer, ScalePer, ScaleRule


@dataclass(frozen=True, kw_only=True)
class BitNet(Recipe):
    """BitNet pre-training (b1, b1.58, a4.8)."""

    weight: WeightKind = "ternary"
    """Weights of the linears in the blocks: ternary, binary, or none (float)."""
    act_bits: ActBits = 8
    """Bits of their inputs: 8, 4 (wo and w2 stay at 8), or none (float)."""
    act4_from: float | None = None
    """Switch from 8-bit to 4-bit activations after this fraction of the run; null for never."""
    quantizer_warmup: int | float = 0
    """Steps, or below 1 the fraction of the run, over which the quantizers are blended in, linearly; 0 for at once."""
    quantize_from: float = 0.0
    """Train in float before this fraction of the run."""
    scale: ScaleRule = "absmean"
    """How the scale of the weights is found: absmean, absmedian, rms, or twn (ternary only)."""
    scale_per: ScalePer = "matrix"
    """What has a scale of its own: the matrix, each row, or each group of so many inputs of a row."""
    learned_scale: bool = False
    """Multiply every scale by a trained factor."""
    mask_beyond: float | None = None
    """Weights whose magnitude exceeds so many scales get no gradient (QuEST: 1.5); null for the plain estimator."""
    transform: TransformName = "none"
    """What happens to the inputs of the ``keep_8bit`` linears: hadamard (BitNet v2), top_half (a4.8), or none."""
    keep_8bit: tuple[str, ...] = ("wo", "w2", "o_proj", "down_proj")
    """Names of the linears whose inputs never go below 8 bits."""

    def __post_init__(self) -> None:
        if self.act4_from is not None and not 0.0 <= self.act4_from < 1.0:
            raise UserError(f"act4_from = {self.act4_from}: a fraction below 1 is needed.")
        if self.act4_from is not None and self.act_bits != 8:
            raise UserError(f"act4_from needs act_bits = 8 to start from; it is {self.act_bits}.")
        if not 0.0 <= self.quantize_from < 1.0:
            raise UserError(f"quantize_from = {self.quantize_from}: a fraction below 1 is needed.")
        if self.mask_beyond is not None and not self.mask_beyond > 0.5:
            raise UserError(f"mask_beyond = {self.mask_beyond}: must exceed 0.5, where a weight becomes 0.")
        if self.weight == "none" and not self.has_plain_scale:
            raise UserError("scale, scale_per, learned_scale and mask_beyond need ternary or binary weights.")
        if self.weight != "none":
            self.quantizer  # noqa: B018 - refuses what does not fit
        if self.quantizer_warmup < 0 or (self.quantizer_warmup > 1 and self.quantizer_warmup % 1):
            raise UserError(f"quantizer_warmup = {self.quantizer_warmup}: a number of steps, or a fraction below 1.")
        if self.quantizer_warmup < 1 and self.quantize_from + self.quantizer_warmup > 1 + 1e-9:
            raise UserError(
                f"quantizer_warmup = {self.quantizer_warmup}: no run is long enough for it behind quantize_from = "
                f"{self.quantize_from}; their sum must be 1 at most."
            )

    @property
    def has_plain_scale(self) -> bool:
        """One absmean for each matrix, and the plain straight-through estimator: what the fast layer computes."""
        plain = self.scale == "absmean" and self.scale_per == "matrix"
        return plain and not self.learned_scale and self.mask_beyond is None

    @property
    def begins_in_float(self) -> bool:
        return bool(self.weight != "none" and (self.quantize_from or self.quantizer_warmup))

    @property
    def quantizer(self) -> ScaledQuantizer:
        assert self.weight != "none"
        return ScaledQuantizer(kind=self.weight, rule=self.scale, per=self.scale_per)

    def bits_of(self, name: str, act_bits: ActBits) -> ActBits:
        """Activation bits of the linear at path ``name``."""
        return 8 if act_bits == 4 and name.rpartition(".")[2] in self.keep_8bit else act_bits

    def prepare(self, model: nn.Module, batches: Iterable[Tensor] = (), progress: Progress = no_progress) -> list[str]:
        if self.weight == "none" and self.act_bits == "none":
            return []

        def bit_linear(name: str, linear: nn.Linear) -> nn.Module:
            act_bits = self.bits_of(name, self.act_bits)
            if self.has_plain_scale:
                layer = BitLinear.from_linear(linear, self.weight, act_bits)
            else:
                layer = ScaledBitLinear.from_float(
                    linear,
                    act_bits,
                    quantizer=self.quantizer,
                    learned=self.learned_scale,
                    gradient_clip=self.mask_beyond,
                )
            if name.rpartition(".")[2] in self.keep_8bit:
                layer.transform = self.transform
            return layer

        return swap_linears(model, bit_linear)

    def served(self, step: int, total_steps: int) -> "BitNet":
        late = self.act4_from is not None and step >= self.act4_from * total_steps
        return replace(
            self, act_bits=4 if late else self.act_bits, act4_from=None, quantizer_warmup=0, quantize_from=0.0
        )

    def blend(self, step: int, total_steps: int) -> float:
        since = step - self.quantize_from * total_steps
        steps = self.quantizer_warmup * (total_steps if self.quantizer_warmup < 1 else 1)
        return 0.0 if since < 0 else min(since / steps, 1.0) if steps else 1.0

    def on_step(self, model: nn.Module, step: int, total_steps: int) -> None:
        if self.quantizer_warmup == 0 and self.act4_from is None and self.quantize_from == 0.0:
            return
        act_bits, warmup = self.served(step, total_steps).act_bits, self.blend(step, total_steps)
        for name, module in model.named_modules():
            if isinstance(module, BitLinear):
                module.act_bits, module.warmup = self.bits_of(name, act_bits), warmup
