"""Models for the recipes: a random one of a few blocks, and the small trained one of benchmarks/post_training.py."""

import pytest
import torch

from benchmarks import post_training as toy
from bitnet.config import ModelConfig
from bitnet.model import Transformer

CONFIG = ModelConfig(
    vocab_size=64, dim=64, n_layers=2, n_heads=4, ffn_dim=128, max_seq_len=32, init_std=0.2, activation="silu",
    sub_norm=False,
)  # fmt: skip


def random_model(seed: int = 0, **sizes: object) -> Transformer:
    """Random weights, and norms that are not all ones."""
    torch.manual_seed(seed)
    model = Transformer(ModelConfig(**{**vars(CONFIG), **sizes}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 2.0)
    return model.eval()


def token_batches(count: int = 4, size: int = 4, length: int = 32, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(64, (size, length), generator=generator) for _ in range(count)]


@pytest.fixture(scope="session")
def parent() -> Transformer:
    """The trained float model; experiments work on copies of it."""
    return toy.parent(0)
