"""What went wrong in a step that ``watch.py`` has kept: its loss and gradients again, by layer, and the text in it.

The weights are those of a checkpoint. If that is of the step before, loss and gradient are those of the run; if it is
older, they are near. ``fit --ckpt_path last`` with a save at every step makes the steps in between again, exactly.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from bitnet.checkpoint import build, check_fits, find_checkpoint, load_state, model_state, read_checkpoint
from bitnet.data.tokenizer import parse_tokenizer
from bitnet.errors import UserError
from bitnet.layers import Arithmetic, low_bit_layers
from bitnet.loss import IGNORE, token_nats
from bitnet.model import Transformer, without_memory
from bitnet.recipes import Recipe
from bitnet.recipes.distillation import Taught
from bitnet.training.random_state import random_state, set_random_state
from bitnet.training.watch import FORMAT


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of the batch."""

    micro_batch: int
    row: int
    loss: float
    text: str


@dataclass(frozen=True, kw_only=True)
class Replay:
    """What a step comes to with the weights of ``checkpoint``."""

    checkpoint: Path
    checkpoint_step: int
    loss: float
    grad_norm: float
    gradients: list[tuple[str, float, float]]
    """``(parameter, norm of its gradient, norm of its values)``, those that are not finite first, then the largest."""
    rows: list[Row]
    """All rows, the one with the highest loss first."""
    first_broken: str
    """The first module whose output is not finite; empty when all are."""


def read_incident(file: str | Path) -> dict[str, Any]:
    """The content of a file of ``Watch``. Raises ``UserError`` when it is none."""
    if not Path(file).is_file():
        raise UserError(f"{file}: no such file; a run keeps them under incidents/.")
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"{file}: not a readable file of an incident ({type(error).__name__}).") from error
    found = content.get("incident_format") if isinstance(content, dict) else None
    if found != FORMAT:
        raise UserError(f"{file}: not the incident of a run (format {found}; this version reads {FORMAT}).")
    return content  # type: ignore[no-any-return]


def replay(file: str | Path, checkpoint: str | Path | None = None) -> Replay:
    """Forward and backward of the step in ``file`` with the newest weights of its run, or those of ``checkpoint``.

    A run in ``bf16-true`` is computed in float32 here.
    """
    incident = read_incident(file)
    path = find_checkpoint(checkpoint or Path(file).resolve().parent.parent)
    content = read_checkpoint(path)
    config, recipe = build({"config": incident["config"], "recipe": incident["recipe"]})
    tokenizer_json = content["bitnet"]["tokenizer"]
    check_fits(content["bitnet"], config, tokenizer_json, str(path))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = _model(incident, content, config, recipe, str(path)).to(device).train()
    for layer in low_bit_layers(model).values():
        layer.arithmetic = Arithmetic(**incident["arithmetic"])
    recipe.on_step(model, incident["step"] - 1, incident["total_steps"])
    batches = [{name: tensor.to(device) for name, tensor in batch.items()} for batch in incident["batches"]]
    before, precision = random_state(), torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(incident["matmul_precision"])
    try:
        loss, first_broken = _step(model, recipe, batches, incident)
        rows = _rows(model, batches, parse_tokenizer(tokenizer_json), incident)
    finally:
        torch.set_float32_matmul_precision(precision)
        set_random_state(before)
    gradients = _gradients(model)
    norm = torch.tensor([value for _, value, _ in gradients], dtype=torch.float64).norm()
    return Replay(
        checkpoint=path,
        checkpoint_step=int(content.get("global_step", 0)),
        loss=loss,
        grad_norm=float(norm),
        gradients=gradients,
        rows=rows,
        first_broken=first_broken,
    )


def _model(incident: dict[str, Any], content: dict[str, Any], config: Any, recipe: Recipe, where: str) -> Transformer:
    """The model in training form, filled; a recipe with a teacher gets it from the run that the weights came from."""
    state = model_state(content)
    if not isinstance(recipe, Taught):
        with without_memory():
            model = Transformer(config)
            recipe.prepare(model)
        load_state(model, state, where, assign=True)
        return model
    model = Transformer(config)
    parent = incident["init_from"]
    load_state(model, model_state(read_checkpoint(parent)), f"model.init_from = {parent}")
    recipe.prepare(model)
    load_state(model, state, where)
    return model


def _autocast(incident: dict[str, Any], device: torch.device) -> AbstractContextManager[Any]:
    kinds = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
    kind = kinds.get(incident["precision"])
    return torch.autocast(device.type, dtype=kind) if kind else nullcontext()


def _step(
    model: Transformer, recipe: Recipe, batches: list[dict[str, Tensor]], incident: dict[str, Any]
) -> tuple[float, str]:
    """Loss of the step, its gradients left in the parameters, and the first module that breaks."""
    losses = []
    with _first_broken(model) as broken:
        for batch, state in zip(batches, incident["random_states"], strict=True):
            set_random_state(state)
            with _autocast(incident, batch["inputs"].device):
                loss = recipe.loss(model, batch)
            (loss / len(batches)).backward()
            losses.append(loss.detach().float())
    return float(torch.stack(losses).mean()), broken[0] if broken else ""


@contextmanager
def _first_broken(model: nn.Module) -> Iterator[list[str]]:
    """Names of the modules whose output is not finite, in the order in which they have been computed."""
    found: list[str] = []

    def hook(name: str) -> Any:
        def look(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.is_floating_point() and not output.isfinite().all():
                found.append(name)

        return look

    handles = [m.register_forward_hook(hook(name)) for name, m in model.named_modules() if name]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _gradients(model: nn.Module) -> list[tuple[str, float, float]]:
    found = [
        (name, float(p.grad.float().norm()), float(p.detach().float().norm()))
        for name, p in model.named_parameters()
        if p.grad is not None
    ]
    return sorted(found, key=lambda entry: -entry[1] if entry[1] < float("inf") else float("-inf"))


@torch.no_grad()
def _rows(
    model: Transformer, batches: list[dict[str, Tensor]], tokenizer: Tokenizer, incident: dict[str, Any]
) -> list[Row]:
    """Loss of each row without dropout: what the text is worth, not what chance made of it."""
    model.eval()
    rows = []
    for number, batch in enumerate(batches):
        with _autocast(incident, batch["inputs"].device):
            nats = token_nats(model, batch).view_as(batch["targets"])
        counted = (batch["targets"] != IGNORE).sum(dim=1).clamp(min=1)
        for row, loss in enumerate((nats.sum(dim=1) / counted).tolist()):
            text = tokenizer.decode(batch["inputs"][row].tolist(), skip_special_tokens=False)
            rows.append(Row(micro_batch=number, row=row, loss=loss, text=text))
    return sorted(rows, key=lambda row: -row.loss if row.loss < float("inf") else float("-inf"))
