r"""Learning from a float teacher: LLM-QAT, and distillation into a 1.58-bit student.

    loss = mean over tokens of KL(p_teacher || p_student)

The mean is over all tokens, so that the loss does not depend on how long the sequences are. The teacher is frozen, is
no part of the model and is in no checkpoint.

LLM-QAT (arXiv 2305.17888) trains on text that the teacher has generated itself (``bitnet synthesize``), with weights,
activations and the key/value cache quantized without clipping. ``Distilled`` is BitDistill's recipe (arXiv 2510.13998):
a ternary student, cross-entropy, the teacher's logits, and the relations between the tokens of one layer's queries,
keys and values (MiniLM, arXiv 2012.15828).
"""

import copy
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitnet.errors import UserError
from bitnet.layers import ActivationScheme
from bitnet.layers.fake_quantized_linear import State
from bitnet.loss import IGNORE, batch_logits, next_token_loss
from bitnet.recipes.base import Progress, Recipe, no_progress
from bitnet.recipes.bitnet import BitNet
from bitnet.recipes.post_training import Bits, PostActBits, PostTraining


class Teacher:
    """A frozen copy of a model, in evaluation mode."""

    def __init__(self, model: nn.Module) -> None:
        self.model = copy.deepcopy(model).requires_grad_(False).eval()

    @torch.no_grad()
    def logits(self, batch: dict[str, Tensor]) -> Tensor:
        """Logits (B, T, V) of a batch; the teacher follows it to its device."""
        if next(self.model.parameters()).device != batch["inputs"].device:
            self.model.to(batch["inputs"].device)
        return batch_logits(self.model, batch)


@dataclass(frozen=True, kw_only=True)
class Taught(Recipe):
    """A recipe whose model learns from the float model that it was."""

    _teacher: list[Teacher] = field(default_factory=list, init=False, compare=False, repr=False)

    @property
    def needs_parent(self) -> bool:
        return True

    @property
    def teacher(self) -> Teacher:
        return self._teacher[0]

    def prepare(self, model: nn.Module, batches: Iterable[Tensor] = (), progress: Progress = no_progress) -> list[str]:
        if not next(model.parameters()).is_meta:
            self._teacher[:] = [Teacher(model)]
        return super().prepare(model, batches, progress)  # type: ignore[safe-super]


def soft_label_loss(student: Tensor, teacher: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """Mean KL(p_teacher || p_student) over the tokens whose target counts, a scalar; logits (B, T, V)."""
    p = F.log_softmax(teacher.float() / temperature, dim=-1)
    q = F.log_softmax(student.float() / temperature, dim=-1)
    nats = (p.exp() * (p - q)).sum(-1)
    counted = targets != IGNORE
    return (nats * counted).sum() / counted.sum().clamp(min=1) * temperature**2


@dataclass(frozen=True, kw_only=True)
class LLMQAT(Taught, PostTraining):
    """LLM-QAT (arXiv 2305.17888): data-free training; ``fit`` it on text of ``bitnet synthesize``."""

    trains: ClassVar[bool] = True

    bits: Bits = 4
    group_size: int = 0
    """Inputs that share a scale; 0, the paper's choice, for one scale per output."""
    symmetric: bool = True
    """Without zero points."""
    activation_bits: PostActBits = 8
    """Bits of the activations."""
    kv_bits: PostActBits = 8
    """Bits of keys (before their rotation) and values, one scale per token; none for float."""

    def options(self, name: str, linear: nn.Linear) -> dict[str, Any]:
        cached = self.kv_bits != "none" and name.endswith((".wk", ".wv"))
        return super().options(name, linear) | {
            "output": ActivationScheme(bits=self.kv_bits) if cached else None  # type: ignore[arg-type]
        }

    def state(self) -> State:
        return "latent"

    def is_trained(self, name: str, parameter: nn.Parameter) -> bool:
        return True

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return soft_label_loss(batch_logits(model, batch), self.teacher.logits(batch), batch["targets"])


@contextmanager
def _projections(model: Any, layer: int) -> Iterator[dict[str, Tensor]]:
    """Outputs (B, T, ...) of wq, wk and wv of one layer in the forward that runs inside."""
    attention = model.layers[layer].attention
    seen: dict[str, Tensor] = {}
    names = ("wq", "wk", "wv")

    def hook(name: str) -> Any:
        return lambda module, args, output: seen.__setitem__(name, output)

    handles = [getattr(attention, name).register_forward_hook(hook(name)) for name in names]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def relation_loss(student: Tensor, teacher: Tensor, heads: int) -> Tensor:
    """KL between the relations softmax(X X^T / sqrt(width)) of two (B, T, width) tensors, in ``heads`` parts each."""

    def relations(x: Tensor) -> Tensor:
        parts = x.float().unflatten(-1, (heads, -1)).transpose(1, 2)
        return F.log_softmax(parts @ parts.transpose(-1, -2) / math.sqrt(parts.shape[-1]), dim=-1)

    p, q = relations(teacher), relations(student)
    return (p.exp() * (p - q)).sum(-1).mean()


@dataclass(frozen=True, kw_only=True)
class Distilled(Taught, BitNet):
    """A low-bit student that learns from a float teacher (BitDistill, arXiv 2510.13998).

    The teacher is ``model.init_from``, so that the student begins with its weights; ``quantizer_warmup`` blends the
    quantizers in.
    """

    hard: float = 1.0
    """Weight of the cross-entropy with the text."""
    soft: float = 1.0
    """Weight of the divergence from the teacher's predictions."""
    temperature: float = 1.0
    """Divides the logits of both before they are compared."""
    relations: float = 0.0
    """Weight of the divergence of the token relations of one layer."""
    relation_layer: int = -1
    """The layer whose relations are compared."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temperature <= 0:
            raise UserError(f"temperature = {self.temperature}: must be positive.")
        if min(self.hard, self.soft, self.relations) < 0 or self.hard + self.soft + self.relations == 0:
            raise UserError("hard, soft and relations: none may be negative, and one must be positive.")

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        targets, teacher = batch["targets"], self.teacher
        if not self.soft and not self.relations:
            return next_token_loss(model, batch)
        with _projections(model, self.relation_layer) as ours:
            logits = batch_logits(model, batch)
        with _projections(teacher.model, self.relation_layer) as theirs:
            aims = teacher.logits(batch)
        loss = self.soft * soft_label_loss(logits, aims, targets, self.temperature)
        if self.hard:
            nats = F.cross_entropy(
                logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum"
            )
            loss = loss + self.hard * nats / (targets != IGNORE).sum().clamp(min=1)
        if self.relations:
            heads = model.config.n_kv_heads or model.config.n_heads  # type: ignore[union-attr]
            parts = [relation_loss(ours[name], theirs[name], heads) for name in ours]  # type: ignore[arg-type]
            loss = loss + self.relations * sum(parts) / len(parts)
        return loss
