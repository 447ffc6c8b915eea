"""What a model has cost: tokens, seconds and FLOPs of its own, and of the model that it started from.

Read from what a run folder says of itself: ``summary.json`` and ``config.yaml`` of a run, ``origin.json`` of
``bitnet quantize``. FLOPs count 2 per weight and forward pass and three times that in training; a calibration counts as
one forward pass over its tokens, training block by block as training on the tokens that each block saw.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from bitnet.config import ModelConfig
from bitnet.estimate import flops_per_token

DEEPEST = 20
"""Ancestors that are followed at most."""


@dataclass(frozen=True)
class Cost:
    """Sums over a run."""

    tokens: int = 0
    seconds: float = 0.0
    flops: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.tokens + other.tokens, self.seconds + other.seconds, self.flops + other.flops)


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _trained(folder: Path, config: ModelConfig) -> tuple[Cost, str | None] | None:
    """Cost of a run of ``fit`` and the path that it started from."""
    summary, file = _json(folder / "summary.json"), folder / "config.yaml"
    if not summary or not file.is_file():
        return None
    try:
        return _cost_of_steps(summary, yaml.safe_load(file.read_text(encoding="utf-8")), config)
    except (LookupError, TypeError, yaml.YAMLError):  # a file that was cut off, or written by hand
        return None


def _cost_of_steps(summary: dict[str, Any], settings: Any, config: ModelConfig) -> tuple[Cost, str | None]:
    data, trainer = settings["data"], settings["trainer"]
    devices = trainer.get("devices") if isinstance(trainer.get("devices"), int) else 1
    rows = data["batch_size"] * (trainer.get("accumulate_grad_batches") or 1) * max(1, devices or 1)
    tokens = summary["steps"] * rows * data["seq_len"]
    trained = Cost(tokens, summary["seconds"], tokens * flops_per_token(config, data["seq_len"]))
    return trained + _prepared(summary.get("preparation", {}), config), settings["model"].get("init_from")


def _prepared(found: dict[str, Any], config: ModelConfig) -> Cost:
    """What a recipe does before or without ``fit``: a look at calibration text, and training block by block."""
    looked_at, taught = found.get("calibration_tokens", 0), found.get("block_tokens", 0)
    forward = flops_per_token(config, 512, training=False)
    return Cost(looked_at + taught, found.get("seconds", 0.0), forward * (looked_at + 3 * taught))


def _quantized(folder: Path, config: ModelConfig) -> tuple[Cost, str | None] | None:
    origin = _json(folder / "origin.json")
    if "parent" not in origin:
        return None
    return _prepared(origin, config), origin["parent"]


def cost_of(path: Path, config: ModelConfig) -> tuple[Cost, Cost] | None:
    """``(own, parents')`` cost of the run at ``path``, or ``None`` where nothing is known."""
    folder = path if path.is_dir() else path.parent.parent if path.parent.name == "checkpoints" else path.parent
    own: Cost | None = None
    inherited = Cost()
    for _ in range(DEEPEST):
        found = _trained(folder, config) or _quantized(folder, config)
        if found is None:
            break
        cost, parent = found
        if own is None:
            own = cost
        else:
            inherited += cost
        if parent is None:
            break
        folder = Path(parent)
        folder = folder if folder.is_dir() else folder.parent.parent
    return None if own is None else (own, inherited)
