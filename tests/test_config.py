"""Configs that cannot work are refused with the field, the value and the reason; exports are announced."""

import pytest

from bitnet.config import ModelConfig, OptimConfig, ScheduleConfig
from bitnet.errors import UserError, did_you_mean


@pytest.mark.parametrize(
    "kind,options,message",
    [
        (ModelConfig, {"dim": 0}, "dim = 0"),
        (ModelConfig, {"dim": 100, "n_heads": 3}, "dim = 100 is not a multiple of n_heads = 3"),
        (ModelConfig, {"dim": 12, "n_heads": 4}, "= 3 is odd"),
        (ModelConfig, {"n_heads": 12, "n_kv_heads": 5}, "n_kv_heads = 5"),
        (ModelConfig, {"dropout": 1.0}, "dropout = 1.0"),
        (ModelConfig, {"n_layers": -1}, "n_layers = -1"),
        (ModelConfig, {"norm_eps": 0.0}, "norm_eps"),
        (OptimConfig, {"lr": 0.0}, "lr = 0.0"),
        (OptimConfig, {"weight_decay": -0.1}, "weight_decay"),
        (OptimConfig, {"betas": (0.9, 1.0)}, "betas"),
        (ScheduleConfig, {"warmup_steps": -1}, "warmup_steps"),
        (ScheduleConfig, {"stage2_at": 1.5}, "stage2_at"),
    ],
)
def test_refused(kind, options, message) -> None:
    with pytest.raises(UserError, match=message):
        kind(**options)


def test_kv_heads_default_to_heads() -> None:
    assert ModelConfig(dim=64, n_heads=4).n_kv_heads == 4
    assert ModelConfig(dim=64, n_heads=4, n_kv_heads=2).kv_heads == 2


@pytest.mark.parametrize(
    "options,allowed",
    [
        ({"dim": 256, "n_heads": 4, "ffn_dim": 512}, {"hf", "gguf tq2_0, tq1_0", "gguf q2_0"}),
        ({"dim": 192, "n_heads": 4, "ffn_dim": 512}, {"hf", "gguf q2_0"}),
        ({"dim": 256, "n_heads": 4, "ffn_dim": 512, "activation": "relu2"}, {"hf"}),
        ({"dim": 256, "n_heads": 4, "ffn_dim": 510}, set()),
        ({"dim": 256, "n_heads": 4, "ffn_dim": 512, "tie_embeddings": False}, {"hf"}),
        (
            {"dim": 256, "n_heads": 4, "ffn_dim": 512, "tie_embeddings": False, "sub_norm": False},
            {"hf", "gguf tq2_0, tq1_0", "gguf q2_0"},
        ),
    ],
)
def test_exports_that_sizes_allow(options, allowed) -> None:
    obstacles = ModelConfig(**options).export_obstacles()
    assert {name for name, why in obstacles.items() if why is None} == allowed


def test_did_you_mean() -> None:
    assert did_you_mean("dimm", ["dim", "n_heads"]) == " Did you mean 'dim'?"
    assert did_you_mean("xyzzy", ["dim", "n_heads"]) == ""
