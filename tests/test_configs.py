"""Every shipped config can be parsed and built, and costs what ``estimate`` says."""

import json

import pytest
import torch

from bitnet.estimate import count_parameters, packed_bytes
from bitnet.layers import BitLinear
from bitnet.model import Transformer
from bitnet.recipes import POST_TRAINING
from bitnet.training.cli import parse_config
from bitnet.training.shipped import shipped_configs
from tests.conftest import ROOT

PRESETS = sorted(name for name in shipped_configs() if "/" not in name)
POST_TRAINED = sorted(name for name in shipped_configs() if name.startswith("posttrain/"))
OVERLAYS = sorted(name for name in shipped_configs() if name.startswith("overlays/"))


def test_the_named_configs_are_there() -> None:
    assert {"tiny", "ternary_30m", "ternary_125m", "ternary_350m", "ternary_1b", "binary_125m", "float_125m"} <= set(
        PRESETS
    )
    assert {"overlays/bf16", "overlays/compile", "overlays/ddp", "overlays/fsdp", "overlays/smoke"} <= set(OVERLAYS)
    assert parse_config(["--config", "tiny", "--config", "overlays/checkpointing"]).activation_checkpointing
    assert parse_config(["--config", "posttrain/qat", "--config", "overlays/muon"]).optim.kind == "muon"


@pytest.mark.parametrize("name", [name for name in PRESETS if "float" not in name])
def test_the_papers_recipe_is_an_overlay(name) -> None:
    ours, theirs = (parse_config(["--config", name, *more]) for more in ([], ["--config", "overlays/papers"]))
    assert ours.recipe.begins_in_float and ours.optim.kind == "muon"
    assert not theirs.recipe.begins_in_float and (theirs.optim.kind, theirs.optim.matrix_lr) == ("adamw", None)
    assert theirs.recipe.weight == ours.recipe.weight and theirs.optim.lr == ours.optim.lr


@pytest.mark.parametrize("name", PRESETS)
def test_preset_builds_and_its_parameters_are_as_estimated(name) -> None:
    parsed = parse_config(["--config", name])
    with torch.device("meta"):
        model = Transformer(parsed.model)
    counts = count_parameters(parsed.model)
    assert sum(p.numel() for p in model.parameters()) == counts.total
    swapped = parsed.recipe.prepare(model)
    linears = [m for m in model.modules() if isinstance(m, BitLinear)]
    if name == "float_125m":
        assert not swapped
        return
    assert len(swapped) == 7 * parsed.model.n_layers == len(linears)
    assert sum(m.weight.numel() for m in linears) == counts.linear
    assert {m.weight_kind for m in linears} == {name.partition("_")[0] if name != "tiny" else "ternary"}


@pytest.mark.parametrize("name", POST_TRAINED)
def test_posttrain_config_puts_every_linear_on_its_grid(name) -> None:
    parsed = parse_config(["--config", name])
    assert parsed.recipe.needs_parent and parsed.recipe.trains
    with torch.device("meta"):
        model = Transformer(parsed.model)
    assert len(parsed.recipe.prepare(model)) == 7 * parsed.model.n_layers
    # Whatever config stands before it, no value of another recipe is carried over.
    after = parse_config(["--config", "tiny", "--config", name])
    assert after.recipe == parsed.recipe


def test_every_recipe_that_trains_has_a_config() -> None:
    names = {type(parse_config(["--config", name]).recipe).__name__ for name in POST_TRAINED}
    assert names == {kind.__name__ for kind in POST_TRAINING.values() if kind.trains} | {"Distilled"}


@pytest.mark.parametrize(
    "name,low,high",
    [
        ("ternary_30m", 28e6, 33e6),
        ("ternary_125m", 100e6, 130e6),
        ("ternary_350m", 330e6, 400e6),
        ("ternary_1b", 1.0e9, 1.4e9),
    ],
)
def test_presets_have_the_size_that_they_are_named_after(name, low, high) -> None:
    counts = count_parameters(parse_config(["--config", name]).model)
    assert low <= (counts.linear if name == "ternary_30m" else counts.total) <= high


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_overlays_merge_over_a_preset(overlay) -> None:
    alone = parse_config(["--config", "ternary_125m"])
    merged = parse_config(["--config", "ternary_125m", "--config", overlay])
    if overlay != "overlays/smoke":
        assert merged.model == alone.model and merged.data == alone.data
    if overlay != "overlays/papers":
        assert merged.recipe == alone.recipe


def test_tiny_suits_every_export() -> None:
    assert all(why is None for why in parse_config(["--config", "tiny"]).model.export_obstacles().values())


def test_packed_size_by_hand() -> None:
    config = parse_config(["--config", "tiny", "--data.vocab_size", "2048"]).model
    # 4 layers of 4 x 256 x 256 + 3 x 256 x 512 trits at 1.6 bits, 2048 x 256 embeddings and the norms at 16 bits
    trits, rest = 4 * (4 * 256 * 256 + 3 * 256 * 512), 2048 * 256 + 4 * (3 * 256 + 512) + 256
    assert packed_bytes(config, "ternary") == round((trits * 1.6 + rest * 16 + 28 * 32) / 8)


def test_published_learning_rates() -> None:
    """With AdamW half of ours: BitNet b1 125M, 2.4e-3; BitNet v2 400M, 1.8e-3; tips 1.3B, QuEST 30M, 1.2e-3."""
    import yaml

    from bitnet.training.shipped import find_config

    rates = {n: float(yaml.safe_load(find_config(n).read_text())["model"]["optim"]["lr"]) for n in PRESETS}
    del rates["tiny"]
    assert rates == {
        "binary_125m": 4.8e-3,
        "float_125m": 4.8e-3,  # as the twin it is compared with
        "ternary_125m": 4.8e-3,
        "ternary_1b": 2.4e-3,
        "ternary_30m": 2.4e-3,
        "ternary_350m": 3.6e-3,
    }


def test_rates_are_those_of_recorded_runs() -> None:
    """Each preset has the best rate of its recorded shape (docs/recipes/pretraining.md)."""
    runs = [
        run
        for file in (ROOT / "benchmarks/results").glob("arena_s_30m_*.json")
        for run in json.loads(file.read_text())["runs"]
        if "ternary" in run["name"]
    ]
    by_rate: dict[float, list[float]] = {}
    for run in runs:
        assert run["options"]["model.config.dim"] == 640
        by_rate.setdefault(run["options"]["model.optim.lr"], []).append(run["val_nats_per_token"])
    assert len(by_rate) == 3, "tried below and above"
    best = min(by_rate, key=lambda rate: max(by_rate[rate]))
    assert parse_config(["--config", "ternary_30m"]).optim.lr == best
    (file,) = (ROOT / "benchmarks/results").glob("arena_l_rates_gpu_*.json")
    runs = json.loads(file.read_text())["runs"]
    for name, prefix in {"ternary_125m": "125m", "ternary_350m": "350m", "ternary_1b": "2048x6"}.items():
        same = [run for run in runs if run["name"].startswith(f"{prefix}_ternary")]
        parsed = parse_config(["--config", name])
        assert {run["options"]["model.config.dim"] for run in same} == {parsed.model.dim}
        assert len(same) > 1
        best = min(same, key=lambda run: run["val_nats_per_token"])
        assert parsed.optim.lr == best["options"]["model.optim.lr"], name
