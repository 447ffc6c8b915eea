"""Models to pack: small ones of every kind with random weights, and trained ones."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models

from bitnet.config import ModelConfig
from bitnet.model import Transformer
from bitnet.recipes import BitNet


def low_bit_model(
    seed: int = 0,
    *,
    act_bits: int | str = 8,
    weight: str = "ternary",
    recipe: dict[str, object] | None = None,
    **sizes: object,
) -> Transformer:
    """A model in eval mode whose logits are far from ties."""
    torch.manual_seed(seed)
    fields = {"vocab_size": 97, "dim": 96, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 100}
    config = ModelConfig(**{**fields, "max_seq_len": 128, "init_std": 0.2, **sizes})
    model = Transformer(config)
    BitNet(weight=weight, act_bits=act_bits, **(recipe or {})).prepare(model)
    return model.eval()


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer(models.BPE({chr(33 + i): i for i in range(50)}, []))


@pytest.fixture(scope="session", params=["ternary", "binary"])
def trained(
    request: pytest.FixtureRequest,
    stories: Path,
    tmp_path_factory: pytest.TempPathFactory,
    run_fit: Callable[..., None],
) -> Path:
    """Folder of a run of 60 steps, ternary or binary."""
    folder = tmp_path_factory.mktemp("runs") / request.param
    options = ["--trainer.max_steps=60", "--model.optim.lr=1e-2", f"--model.recipe.weight={request.param}"]
    run_fit(stories, folder, *options)
    return folder
