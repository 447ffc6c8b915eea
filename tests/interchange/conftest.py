"""Models to exchange, and other programs asked in this process where that is faster."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bitnet.config import ModelConfig
from bitnet.data.tokenizer import train_tokenizer
from bitnet.interchange import check
from bitnet.interchange.opened import Opened, open_model
from bitnet.model import Transformer
from bitnet.recipes import BitNet

TEXT = [
    "The small dog ran over the green hill and sat down beside the river, where 12 ducks swam.",
    "\u201cWhere is my hat?\u201d asked the old man; nobody knew, not even the cat. It was 3.14 miles.",
    "na\u00efve caf\u00e9, \U0001f600 and \u4f60\u597d: bytes must come back as they were.\r\n\tdef f(x): return x**2",
]


def opened_model(
    seed: int = 0,
    *,
    weight: str = "ternary",
    act_bits: int | str = 8,
    scale_per: str | int = "matrix",
    scale: str = "absmean",
    split: str | None = None,
    **sizes: object,
) -> Opened:
    """A model with random weights, its logits far from ties, and a tokenizer of 300 tokens."""
    from bitnet.interchange.gguf_tokenizer import SPLITS

    torch.manual_seed(seed)
    tokenizer = train_tokenizer(TEXT, 300)
    if split:
        tokenizer.pre_tokenizer = SPLITS[split]
    fields = {"dim": 256, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 256, "max_seq_len": 128}
    config = ModelConfig(vocab_size=300, **{"init_std": 0.1, **fields, **sizes})
    model = Transformer(config)
    recipe = BitNet(weight=weight, act_bits=act_bits, scale_per=scale_per, scale=scale)
    recipe.prepare(model)
    return Opened(
        model=model.requires_grad_(False).eval(),
        tokenizer=tokenizer,
        recipe={"name": "BitNet", "weight": weight, "act_bits": act_bits},
    )


@pytest.fixture(scope="session")
def trained(stories: Path, tmp_path_factory: pytest.TempPathFactory, run_fit: Callable[..., None]) -> Path:
    """Folder of a ternary run of 80 steps whose sizes suit every format."""
    folder = tmp_path_factory.mktemp("runs") / "trained"
    options = [
        "--trainer.max_steps=80",
        "--model.optim.lr=5e-3",
        "--model.config.dim=256",
        "--model.config.ffn_dim=256",
    ]
    options += ["--data.seq_len=64"]
    run_fit(stories, folder, *options)
    return folder


@pytest.fixture(scope="session")
def trained_model(trained: Path) -> Opened:
    return open_model(trained)


@pytest.fixture
def transformers_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """transformers is asked in this process: starting one for each question would take seconds."""
    import json

    import numpy as np

    def run(script: Any, target: Path, request: dict[str, Any], program: str) -> dict[str, Any]:
        ask, out = tmp_path / "request.json", tmp_path / "answer.npz"
        ask.write_text(json.dumps(request))
        try:
            script.main(str(target), str(ask), str(out))
        except Exception as error:
            raise check.UserError(f"{program} could not read it ({error}).") from error
        with np.load(out) as answer:
            return {name: answer[name] for name in answer.files}

    monkeypatch.setattr(check, "_run", run)
