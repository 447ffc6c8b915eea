"""Optimizers against torch's own classes, step by step, and what each keeps per parameter."""

import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from bitnet.config import ModelConfig, OptimConfig, ScheduleConfig
from bitnet.errors import UserError
from bitnet.estimate import OPTIMIZERS, count_parameters, optimizer_bytes
from bitnet.loss import next_token_loss
from bitnet.model import Transformer
from bitnet.recipes import QAT, BitNet, EfficientQAT, QLoRA
from bitnet.training.optim import apply_schedule, build_optimizer, check_shardable, parameter_groups

KINDS = ("adamw", "muon", "adafactor", "adamw8bit")
WIDE = ModelConfig(vocab_size=256, dim=64, n_layers=2, n_heads=4, ffn_dim=128, max_seq_len=32)
"""Wide enough for 8-bit moments, which begin at 4,096 parameters."""


def wide_model() -> Transformer:
    torch.manual_seed(0)
    model = Transformer(WIDE)
    BitNet().prepare(model)
    return model


def backward(model: nn.Module, seed: int) -> None:
    ids = torch.randint(256, (2, 17), generator=torch.Generator().manual_seed(seed))
    model.zero_grad()
    next_token_loss(model, {"inputs": ids[:, :-1], "targets": ids[:, 1:]}).backward()


def steps(model: nn.Module, *optimizers: torch.optim.Optimizer, first: int = 0, n: int = 4) -> list[torch.Tensor]:
    for seed in range(first, first + n):
        backward(model, seed)
        for optimizer in optimizers:
            optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def torchs_own(kind: str, model: nn.Module) -> list[torch.optim.Optimizer]:
    groups = parameter_groups(model)
    matrices, tables, norms = ({"params": p} for p in groups.values())
    decayed = [matrices, tables, {**norms, "weight_decay": 0.0}]
    betas, options = (0.9, 0.95), {"lr": 3e-3, "weight_decay": 0.1}
    match kind:
        case "adamw":
            return [torch.optim.AdamW(decayed, betas=betas, fused=True, **options)]
        case "muon":
            muon = torch.optim.Muon([matrices], lr=1e-3, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
            return [muon, torch.optim.AdamW(decayed[1:], betas=betas, fused=True, **options)]
        case "adafactor":
            return [torch.optim.Adafactor(decayed, **options)]
    from torchao.optim import AdamW8bit

    return [AdamW8bit(decayed, betas=betas, **options)]


def config_of(kind: str) -> OptimConfig:
    return OptimConfig(kind=kind, lr=3e-3, matrix_lr=1e-3 if kind == "muon" else None)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_have_the_bits_of_torchs_own_optimizers(kind) -> None:
    ours, theirs = wide_model(), wide_model()
    assert same(steps(ours, build_optimizer(ours, config_of(kind))), steps(theirs, *torchs_own(kind, theirs)))


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_it_goes_on_with_the_same_bits(kind, tmp_path) -> None:
    """Through a file that is read with ``weights_only``; the state is really used, and the schedule still works."""
    config, schedule = config_of(kind), ScheduleConfig(warmup_steps=2)
    model = wide_model()
    optimizer = build_optimizer(model, config)
    apply_schedule(optimizer, config, schedule, 0, 10)
    steps(model, optimizer)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    again = wide_model()
    again.load_state_dict(model.state_dict())
    loaded, fresh = build_optimizer(again, config), build_optimizer(again, config)
    content = torch.load(tmp_path / "state.pt", weights_only=True)
    tensors = [v for state in content["state"].values() for v in state.values()]
    assert {type(t) for t in tensors} == {torch.Tensor}
    loaded.load_state_dict(content)
    for each in (optimizer, loaded, fresh):
        apply_schedule(each, config, schedule, 5, 10)
    untouched = wide_model()
    untouched.load_state_dict(model.state_dict())
    expected = steps(model, optimizer, first=4)
    assert same(steps(again, loaded, first=4), expected)
    assert not same(steps(untouched, build_optimizer(untouched, config), first=4), expected)  # the state matters


def test_a_step_of_muon_is_an_orthogonal_matrix_of_adamws_size() -> None:
    """By singular values: all near 1 before the scaling, in the directions of the gradient's; root mean square 0.2."""
    model = nn.ModuleDict({"layer": nn.Linear(48, 96, bias=False), "norm": nn.LayerNorm(4)})
    weight = model["layer"].weight
    optimizer = build_optimizer(model, OptimConfig(kind="muon", lr=1e-2, weight_decay=0.0))
    before, gradient = weight.detach().clone(), torch.randn(96, 48)
    weight.grad = gradient
    optimizer.step()
    step = (before - weight.detach()) / 1e-2
    u, _, vh = torch.linalg.svd(gradient, full_matrices=False)
    directions = u.T @ (step / (0.2 * 96**0.5)) @ vh.T
    assert directions.diagonal().min() > 0.6 and directions.diagonal().max() < 1.3
    assert (directions - directions.diagonal().diag()).abs().max() < 0.1  # bf16
    # 48 unit singular values make a root mean square of 1 / sqrt(96)
    assert step.square().mean().sqrt().item() == pytest.approx(0.2, rel=0.2)


def test_eight_bit_moments_stay_near_those_of_adamw() -> None:
    config = replace(config_of("adamw"), lr=1e-3)
    moved = {}
    for kind in ("adamw", "adamw8bit"):
        model = wide_model()
        before = [p.detach().clone() for p in model.parameters()]
        after = steps(model, build_optimizer(model, replace(config, kind=kind)), n=10)
        moved[kind] = torch.cat([(a - b).flatten() for a, b in zip(after, before, strict=True)])
    assert nn.functional.cosine_similarity(moved["adamw"], moved["adamw8bit"], dim=0) > 0.97


def state_bytes(optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> int:
    """Bytes of the state of one parameter, in a checkpoint, step counter left out."""
    index = [p for group in optimizer.param_groups for p in group["params"]]
    state = optimizer.state_dict()["state"][next(i for i, p in enumerate(index) if p is parameter)]
    return sum(t.nbytes for name, t in state.items() if name != "step")


@pytest.mark.parametrize("kind", KINDS)
def test_state_bytes_per_parameter(kind) -> None:
    model = wide_model()
    optimizer = build_optimizer(model, config_of(kind))
    steps(model, optimizer, n=1)
    w1, embedding, norm = model.layers[0].feed_forward.w1.weight, model.tok_embeddings.weight, model.norm.weight
    found = [state_bytes(optimizer, p) / p.numel() for p in (w1, embedding, norm)]
    per_row_and_column = [4 * (128 + 64) / (128 * 64), 4 * (256 + 64) / (256 * 64), 4]
    expected = {
        "adamw": [8, 8, 8],
        "muon": [4, 8, 8],
        "adafactor": per_row_and_column,
        "adamw8bit": [2 + 2 * 4 / 256, 2 + 2 * 4 / 256, 8],  # two codes, and two scales a block; norms are small
    }
    assert found == expected[kind]
    total = sum(state_bytes(optimizer, p) for p in model.parameters())
    assert optimizer_bytes(WIDE, kind) == pytest.approx(total, rel=0.03)


def test_every_kind_is_known_to_the_estimate() -> None:
    assert tuple(OPTIMIZERS) == KINDS
    counts = count_parameters(WIDE)
    assert optimizer_bytes(WIDE, "adamw") == 8 * counts.total


def test_own_learning_rate_of_the_matrices() -> None:
    model = wide_model()
    schedule = ScheduleConfig(kind="linear", warmup_steps=0)
    for matrix_lr, expected in ((None, 1.5e-3), (0.02, 0.01)):
        config = OptimConfig(kind="muon", lr=3e-3, matrix_lr=matrix_lr)
        optimizer = build_optimizer(model, config)
        apply_schedule(optimizer, config, schedule, 50, 100)
        rates = {group["role"]: group["lr"] for group in optimizer.param_groups}
        assert rates == pytest.approx({"matrices": expected, "embeddings": 1.5e-3, "norms": 1.5e-3})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "recipe",
    [
        QAT(group_size=32, ranges="learned"),
        EfficientQAT(group_size=32),
        QLoRA(rank=4),
    ],
    ids=lambda recipe: type(recipe).__name__,
)
def test_parameters_that_a_recipe_adds(recipe, kind) -> None:
    """Learned scales, zero points and adapters belong to a group, and a step moves them."""
    torch.manual_seed(0)
    model = Transformer(WIDE)
    recipe.prepare(model)
    config = config_of(kind)
    roles = parameter_groups(model)
    if kind == "muon" and not roles["matrices"]:
        with pytest.raises(UserError, match="trains no matrices"):
            build_optimizer(model, config)
        return
    optimizer = build_optimizer(model, config)
    grouped = [p for group in optimizer.param_groups for p in group["params"]]
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert len(grouped) == len(trainable) and {id(p) for p in grouped} == {id(p) for p in trainable}
    before = [p.detach().clone() for p in trainable]
    steps(model, optimizer, n=3)  # adapters start at 0, so that the gradient of one half comes a step later
    still = [tuple(p.shape) for p, old in zip(trainable, before, strict=True) if torch.equal(p, old)]
    assert still == []


def test_what_cannot_be_is_refused_in_one_line(monkeypatch) -> None:
    with pytest.raises(UserError, match=r"matrix_lr = 0.01: only muon has it; kind is adamw"):
        OptimConfig(matrix_lr=0.01)
    with pytest.raises(UserError, match=r"matrix_lr = 0: must be greater"):
        OptimConfig(kind="muon", matrix_lr=0)
    for kind in ("adafactor", "adamw8bit"):
        with pytest.raises(UserError, match=f"{kind} does not work with sharded weights"):
            check_shardable(OptimConfig(kind=kind))
    check_shardable(OptimConfig(kind="muon"))
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(UserError, match="adamw8bit needs torchao, which is not installed: pip install torchao"):
        build_optimizer(wide_model(), OptimConfig(kind="adamw8bit"))
