"""One contract for every post-training recipe, and what each family promises beyond it."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from bitnet.checkpoint import build, describe, load_state
from bitnet.errors import UserError
from bitnet.layers import BitLinear, FakeQuantizedLinear, LoRALinear, quantized_layers
from bitnet.loss import IGNORE
from bitnet.model import Transformer, without_memory
from bitnet.recipes import (
    AWQ,
    GPTQ,
    LLMQAT,
    PEQA,
    POST_TRAINING,
    QAT,
    RTN,
    BitNet,
    Distilled,
    EfficientQAT,
    LLMInt8,
    LoftQ,
    QALoRA,
    QLoRA,
    Recipe,
    SmoothQuant,
    SpQR,
    ZeroQuant,
)  # fmt: skip
from tests.recipes.conftest import CONFIG, random_model, token_batches

RECIPES: list[Recipe] = [
    RTN(), RTN(bits=8, group_size=0, symmetric=True, activation_bits=8), RTN(bits=3, group_size=32, activation_bits=4),
    GPTQ(group_size=32), GPTQ(bits=3, group_size=0, symmetric=True), AWQ(group_size=32), SpQR(bits=3),
    LLMInt8(), SmoothQuant(), SmoothQuant(level="o2", alpha="none"), SmoothQuant(level="o3", weight_scale="channel"),
    ZeroQuant(block_steps=2), EfficientQAT(group_size=32, block_steps=2), PEQA(), PEQA(bits=2, group_size=32),
    QAT(bits=2, group_size=32), QAT(ranges="learned"), QAT(activation_bits=8, act_scale="static", act_from=0.5),
    LLMQAT(), LLMQAT(kv_bits="none"), QLoRA(rank=4), QLoRA(quantizer="uniform", rank=4),
    LoftQ(bits=2, rank=4, rounds=2), QALoRA(rank=4), Distilled(relations=0.1),
]  # fmt: skip
FOLDING = (AWQ, SmoothQuant)
LINEARS = {
    f"layers.{i}.{part}"
    for i in (0, 1)
    for part in (*(f"attention.w{x}" for x in "qkvo"), *(f"feed_forward.w{i}" for i in (1, 2, 3)))
}


def counting(seed: int = 0) -> dict[str, torch.Tensor]:
    """Counting sequences: learnable at once."""
    start = torch.randint(64, (16, 1), generator=torch.Generator().manual_seed(seed))
    rows = (start + torch.arange(17)) % 64
    return {"inputs": rows[:, :-1], "targets": rows[:, 1:]}


def test_every_recipe_has_a_row() -> None:
    assert {type(recipe) for recipe in RECIPES} == {*POST_TRAINING.values(), Distilled}


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_contract(recipe: Recipe) -> None:
    model, data = random_model(init_std=0.05), token_batches()
    before = {name: p.clone() for name, p in model.named_parameters()}
    copies = [batch.clone() for batch in data]
    changed = recipe.prepare(model, data if recipe.needs_text else [])
    assert set(changed) == LINEARS and len(changed) == len(LINEARS)
    assert all(isinstance(model.get_submodule(name), FakeQuantizedLinear | BitLinear) for name in changed)
    assert type(model.lm_head) is nn.Linear and type(model.tok_embeddings) is nn.Embedding
    same = {"tok_embeddings.weight", "norm.weight"}
    if not isinstance(recipe, FOLDING):
        same |= {name for name in before if name.endswith("norm.weight")}
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], before[name]) for name in same)
    assert all(torch.equal(a, b) for a, b in zip(copies, data, strict=True))
    # The keys of the float model are all there, in its shapes: another recipe can start from it.
    state = model.state_dict()
    assert {name: p.shape for name, p in before.items()}.items() <= {n: t.shape for n, t in state.items()}.items()

    batch = counting()
    recipe.on_step(model, 0, 40)
    assert torch.isfinite(recipe.loss(model, batch))
    if not recipe.trains:
        assert not any(p.requires_grad for p in model.parameters())
        return
    trained = [p for p in model.parameters() if p.requires_grad]
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW(trained, lr=3e-3, weight_decay=0.0)
    losses = []
    for step in range(30):
        recipe.on_step(model, step, 30)
        loss = recipe.loss(model, batch)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.isfinite(torch.tensor(losses)))
    if not isinstance(recipe, LLMQAT):  # its teacher knows nothing about counting
        assert losses[-1] < losses[0] - 0.01
    assert all(torch.equal(dict(model.named_parameters())[name], p) for name, p in frozen.items())


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_a_saved_model_computes_the_same(recipe: Recipe) -> None:
    """Through the description and the state dict of a checkpoint, onto a model without memory."""
    model, data = random_model(), token_batches()
    recipe.prepare(model, data if recipe.needs_text else [])
    for p in model.parameters():  # as if it had been trained
        if p.requires_grad:
            p.data += 0.01 * torch.randn_like(p) * p.abs()
    tokenizer_json = "{}"
    description = describe(model.config, recipe.served(100, 100), tokenizer_json)
    config, again = build(description)
    with without_memory():
        loaded = Transformer(config)
        again.prepare(loaded)
    load_state(loaded, model.state_dict(), "here", assign=True)
    again.finalize(loaded)
    recipe.on_step(model, 100, 100)
    if isinstance(recipe, QALoRA):  # merged: the same numbers in another order
        torch.testing.assert_close(loaded.eval()(data[0]), model.eval()(data[0]), rtol=1e-4, atol=1e-4)
    else:
        assert torch.equal(loaded.eval()(data[0]), model.eval()(data[0]))
    for name, layer in quantized_layers(loaded).items():
        old: Any = model.get_submodule(name)
        assert torch.equal(layer.q, old.parts()[0].to(layer.q.dtype)), name


def test_scales_are_all_that_is_trained() -> None:
    counts = {}
    for group_size in (0, 32):
        model = random_model()
        PEQA(bits=2, group_size=group_size).prepare(model)
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert trained == {f"{name}.scale" for name in LINEARS}
        counts[group_size] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    rows = sum(layer.out_features for layer in quantized_layers(model).values())
    groups = sum(layer.out_features * layer.in_features // 32 for layer in quantized_layers(model).values())
    assert counts == {0: rows, 32: groups}


def test_swapping_the_scales_swaps_the_task() -> None:
    model = random_model()
    PEQA().prepare(model)
    x = token_batches()[0]
    scales = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    before = model(x)
    integers = {name: layer.q.clone() for name, layer in quantized_layers(model).items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    PEQA().loss(model, counting()).backward()
    optimizer.step()
    assert not torch.equal(model(x), before)
    model.load_state_dict({**model.state_dict(), **scales}, strict=False)
    for name, layer in quantized_layers(model).items():
        layer.set_codes(integers[name])  # they never changed, but loading has read them from the weights
    assert torch.equal(model(x), before)


def test_integers_do_not_move_while_scales_are_trained() -> None:
    model = random_model()
    recipe = EfficientQAT(group_size=32, block_steps=2)
    recipe.prepare(model, token_batches())
    integers = {name: (layer.q.clone(), layer.zero_point.clone()) for name, layer in quantized_layers(model).items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        recipe.loss(model, counting()).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, layer in quantized_layers(model).items():
        assert torch.equal(layer.q, integers[name][0]) and torch.equal(layer.zero_point, integers[name][1])


def test_block_targets_follow_the_float_chain_only() -> None:
    """Disturbing what the quantized blocks read leaves the targets as they were."""

    class Watched(EfficientQAT):
        def train_block(self, chain, block, inputs, targets, number):  # type: ignore[no-untyped-def]
            seen.extend(t.clone() for t in targets)
            for layer in quantized_layers(block).values():
                layer.scale.data *= factor

    model, data = random_model(), token_batches()
    runs = []
    for factor in (1.0, 1.5):  # noqa: B007 - read by the class above
        seen: list[torch.Tensor] = []
        Watched(group_size=32).prepare(copy.deepcopy(model), data)
        runs.append(seen)
    exact = [model.layers[0](x, angles, None) for x, angles in ((model.embed(b), chain_angles(model, b)) for b in data)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    held_in = len(runs[0]) // len(model.layers)
    assert 0 < held_in < len(exact)
    assert all(torch.equal(a, b) for a, b in zip(runs[0][:held_in], exact[:held_in], strict=True))


def chain_angles(model: Transformer, batch: torch.Tensor) -> Any:
    from bitnet.recipes.calibration import Chain

    return Chain(model, [batch]).angles(model.embed(batch))


def test_the_teacher_is_frozen_and_in_no_checkpoint() -> None:
    for recipe in (LLMQAT(), Distilled(hard=0.0)):
        model = random_model()
        plain = set(model.state_dict())
        recipe.prepare(model)
        teacher = recipe._teacher[0].model  # type: ignore[attr-defined]
        before = copy.deepcopy(teacher.state_dict())
        recipe.loss(model, counting()).backward()
        assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
        assert all(torch.equal(before[name], t) for name, t in teacher.state_dict().items())
        assert set(model.state_dict()) == plain


def test_a_batch_without_answers_teaches_nothing() -> None:
    recipe, model = Distilled(), random_model()
    recipe.prepare(model)
    batch = counting()
    batch["targets"] = torch.full_like(batch["targets"], IGNORE)
    loss = recipe.loss(model, batch)
    loss.backward()
    assert float(loss.detach()) == 0.0 and not any(p.grad.any() for p in model.parameters())


def test_soft_labels_do_not_depend_on_the_length() -> None:
    from bitnet.recipes.distillation import soft_label_loss

    a, b = torch.randn(2, 5, 11), torch.randn(2, 5, 11)
    targets = torch.zeros(2, 5, dtype=torch.long)
    once = soft_label_loss(a, b, targets)
    twice = soft_label_loss(torch.cat([a, a], 1), torch.cat([b, b], 1), torch.cat([targets, targets], 1))
    torch.testing.assert_close(once, twice)
    expected = nn.functional.kl_div(a.log_softmax(-1), b.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(once, expected.mean())
    targets[:, 2:] = -100
    torch.testing.assert_close(soft_label_loss(a, b, targets), expected[:, :2].mean())


def test_a_quantized_cache_changes_logits() -> None:
    outputs = []
    for kv_bits in ("none", 4):
        model = random_model()
        LLMQAT(kv_bits=kv_bits).prepare(model)
        outputs.append(model(token_batches()[0]))
        assert (model.layers[0].attention.wk.output is None) == (kv_bits == "none")
        assert model.layers[0].attention.wq.output is None
    assert not torch.equal(*outputs)


def test_late_activations_and_what_is_served() -> None:
    recipe, model = QAT(activation_bits=8, act_scale="static", act_from=0.5), random_model()
    recipe.prepare(model)
    layer = model.layers[0].attention.wq
    for step, quantizes in ((0, False), (49, False), (50, True), (99, True)):
        recipe.on_step(model, step, 100)
        assert layer.quantizes_activations is quantizes
        served, fresh = recipe.served(step, 100), random_model()
        served.prepare(fresh)
        assert fresh.layers[0].attention.wq.quantizes_activations is quantizes


# ---- adapters


@pytest.mark.parametrize("quantizer,bits", [("normal", 2), ("normal", 4), ("uniform", 2)])
def test_loftq(quantizer, bits) -> None:
    from bitnet.recipes.lora import loftq

    recipe = LoftQ(quantizer=quantizer, bits=bits, rank=8, group_size=64, double_quantization=False)
    linear = nn.Linear(128, 96, bias=False)
    layer: Any = recipe.layer("w", linear)
    w = linear.weight.detach()
    rounded = recipe.round(copy.deepcopy(layer), w)
    rest, a, b, errors = loftq(w, lambda x: recipe.round(layer, x), 8, 5)
    plain = float((rounded - w).norm() / w.norm())
    assert errors[0] < plain and errors == sorted(errors, reverse=True)
    q = recipe.round(layer, rest)
    spectrum = torch.linalg.svdvals((w - q).double())  # Eckart and Young
    assert float((w - q - b @ a).double().square().sum()) == pytest.approx(float(spectrum[8:].square().sum()), rel=1e-4)
    fresh: Any = recipe.layer("w", linear)
    x = torch.randn(5, 128)
    torch.testing.assert_close(fresh(x), x @ (fresh.dense() + fresh.lora_b @ fresh.lora_a).t(), rtol=1e-4, atol=1e-4)
    assert fresh.scaling == 1.0


def test_loftq_of_a_narrow_matrix_has_room_for_the_whole_rank() -> None:
    """A matrix of 16 rows has 16 singular values; what is saved must fit what is built again."""
    recipe = LoftQ(rank=24, group_size=64)
    layer: Any = recipe.layer("w", nn.Linear(64, 16, bias=False))
    assert layer.lora_a.shape == (24, 64) and layer.lora_b.shape == (16, 24)
    assert not layer.lora_a[16:].any() and not layer.lora_b[:, 16:].any() and layer.lora_a[:16].any()


def test_qlora_starts_at_the_rounded_model() -> None:
    model = random_model()
    plain = copy.deepcopy(model)
    QLoRA(quantizer="uniform", rank=4).prepare(model)
    RTN().prepare(plain)
    x = token_batches()[0]
    assert torch.equal(model(x), plain(x))
    trained = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"lora_a", "lora_b"}


def test_qa_lora_merges_into_float_zero_points() -> None:
    recipe = QALoRA(rank=4, group_size=32, alpha=8.0)
    layer: Any = recipe.layer("w", nn.Linear(128, 96, bias=False))
    assert isinstance(layer, LoRALinear) and tuple(layer.lora_a.shape) == (4, 4)
    layer.lora_b.data.normal_(std=0.02)
    x = torch.randn(10, 128)
    y = layer(x).detach()
    # Against the formula of the paper: the input is summed in each group.
    pooled = x.view(10, 4, 32).sum(-1)
    expected = x @ layer.dense().t() + 2.0 * pooled @ layer.lora_a.t() @ layer.lora_b.t()
    torch.testing.assert_close(y, expected.detach(), rtol=1e-4, atol=1e-4)
    layer.merge()
    assert float((layer(x) - y).detach().norm() / y.norm()) < 1e-6
    layer.zero_point.data.round_()
    assert float((layer(x) - y).detach().norm() / y.norm()) > 0.01


# ---- refusals


@pytest.mark.parametrize(
    "kind,options,named",
    [
        (RTN, {"bits": 9}, "bits"),
        (RTN, {"group_size": -1}, "group_size"),
        (RTN, {"activation_bits": 1}, "activation_bits"),
        (SmoothQuant, {"alpha": 1.5}, "alpha"),
        (LLMInt8, {"threshold": 0.0}, "threshold"),
        (SpQR, {"outliers": 0.9}, "outliers"),
        (SpQR, {"scale_bits": 0}, "scale_bits"),
        (SpQR, {"activation_bits": 8}, "activation_bits"),
        (GPTQ, {"damping": 0.0}, "damping"),
        (QLoRA, {"bits": 8}, "bits"),
        (QLoRA, {"rank": 0}, "rank"),
        (QLoRA, {"activation_bits": 8}, "activation_bits"),
        (LoftQ, {"rounds": 0}, "rounds"),
        (QALoRA, {"symmetric": True}, "zero points"),
        (QAT, {"act_from": 2.0}, "act_from"),
        (EfficientQAT, {"block_steps": -1}, "block_steps"),
        (Distilled, {"temperature": 0.0}, "temperature"),
        (Distilled, {"hard": 0.0, "soft": 0.0}, "positive"),
    ],
)
def test_impossible_options_are_refused(kind, options, named) -> None:
    with pytest.raises(UserError, match=named):
        kind(**options)


def test_what_cannot_be_quantized_is_refused() -> None:
    with pytest.raises(UserError, match=r"48 does not divide the 64 inputs of layers\.0\.attention\.wq"):
        RTN(group_size=48).prepare(random_model())
    model = random_model()
    BitNet().prepare(model)
    with pytest.raises(UserError, match=r"layers\.0\.attention\.wq is a trained low-bit layer"):
        RTN().prepare(model)


def test_the_config_of_these_tests_is_ordinary() -> None:
    assert CONFIG.head_dim == 16 and not CONFIG.sub_norm


@pytest.mark.parametrize("recipe", [LLMQAT(), Distilled(), Distilled(hard=0.0)], ids=str)
def test_documents_stay_apart_for_student_and_teacher(recipe: Recipe) -> None:
    """Two documents in a row give the loss of each alone, when attention is masked by document."""
    model = random_model()
    recipe.prepare(model)
    for parameter in model.parameters():
        parameter.data += 0.01 * torch.randn_like(parameter)
    halves = [counting(seed) for seed in (1, 2)]
    halves = [{key: rows[:, :8] for key, rows in half.items()} for half in halves]
    joined = {key: torch.cat([half[key] for half in halves], dim=1) for key in halves[0]}
    joined["document_ids"] = torch.arange(16).expand(16, -1) // 8
    # Rotary positions are relative, so a document is the same wherever it begins.
    expected = torch.stack([recipe.loss(model, half) for half in halves]).mean()
    torch.testing.assert_close(recipe.loss(model, joined), expected, rtol=1e-3, atol=1e-3)


def test_weights_that_are_no_numbers_are_refused() -> None:
    for value in (float("nan"), float("inf")):
        model = random_model()
        model.layers[1].attention.wo.weight.data[3, 4] = value
        with pytest.raises(UserError, match=r"layers\.1\.attention\.wo has weights that are NaN or infinite"):
            RTN().prepare(model)
