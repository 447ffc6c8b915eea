"""Activation checkpointing: the same bits from less memory, and only where there is a backward to come."""

from dataclasses import replace

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from bitnet.loss import next_token_loss
from bitnet.model import Transformer
from bitnet.recipes import QAT, BitNet, Distilled


def batch_of(rows: int = 3, length: int = 16) -> dict[str, torch.Tensor]:
    ids = torch.randint(97, (rows, length + 1), generator=torch.Generator().manual_seed(1))
    documents = (torch.arange(length) > length // 3).long().expand(rows, -1)
    return {"inputs": ids[:, :-1], "targets": ids[:, 1:], "document_ids": documents}


def trained(config, recipe, recomputes, bf16=False, accumulates=False) -> dict[str, torch.Tensor]:
    """Loss, gradients, buffers and the random state after one backward of a model of fixed weights."""
    torch.manual_seed(0)
    model = Transformer(config)
    recipe.prepare(model)
    recipe.on_step(model.train(), 0, 10)
    model.recomputes_blocks = recomputes
    if accumulates:
        for module in model.modules():
            if hasattr(module, "hold"):
                module.hold(True)
    losses = []
    for _ in range(2):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            losses.append(recipe.loss(model, batch_of()))
        losses[-1].backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    found |= {f"buffer {n}": b for n, b in model.named_buffers()}
    return {**found, "loss": torch.stack(losses).detach(), "random": torch.get_rng_state()}


@pytest.mark.parametrize("options", [{}, {"bf16": True}, {"accumulates": True}], ids=["float32", "bf16", "window"])
@pytest.mark.parametrize(
    "recipe",
    [
        BitNet(),
        BitNet(weight="none", act_bits="none"),
        QAT(group_size=16, activation_bits=8, act_scale="static"),
        Distilled(relations=1.0),
    ],
    ids=["ternary", "float", "static-scales", "distilled"],
)
def test_same_bits(tiny_config, recipe, options) -> None:
    """Loss, gradients, what the forward leaves behind, and where the random numbers end: dropout draws them."""
    config = replace(tiny_config, dropout=0.2)
    plain, recomputed = (trained(config, recipe, on, **options) for on in (False, True))
    assert plain.keys() == recomputed.keys() and len(plain) > 10
    assert [name for name in plain if not torch.equal(plain[name], recomputed[name])] == []


def saved_bytes(model: Transformer, batch: dict[str, torch.Tensor]) -> int:
    """Bytes that a forward keeps for backward, each tensor once, parameters left out."""
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}
    alive = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        alive.append(tensor)  # so that no address is used twice
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        model(batch["inputs"])
    return sum(kept.values())


def test_only_the_inputs_of_the_blocks_are_kept(tiny_config) -> None:
    """What a block adds to the memory is its input: dim float32 numbers per token."""
    per_block = {}
    for recomputes in (False, True):
        kept = []
        for layers in (2, 6):
            model = Transformer(replace(tiny_config, n_layers=layers))
            BitNet().prepare(model)
            model.recomputes_blocks = recomputes
            kept.append(saved_bytes(model, batch_of()))
        per_block[recomputes] = (kept[1] - kept[0]) / 4
    tokens = 3 * 16
    # Beside the input, each block keeps a reference to the angles, which are there once.
    assert per_block[True] == 4 * 32 * tokens
    assert per_block[False] > 15 * per_block[True]


def test_evaluation_and_decoding_recompute_nothing(tiny_config, monkeypatch) -> None:
    import bitnet.model

    model, tokens = Transformer(tiny_config), batch_of()["inputs"]
    expected = model.eval()(tokens)
    calls = []
    monkeypatch.setattr(bitnet.model, "recomputed", lambda block, *inputs: calls.append(1) or block(*inputs))
    model.recomputes_blocks = True
    assert torch.equal(model(tokens), expected)  # eval mode, with gradients
    model.train()
    with torch.no_grad():
        model(tokens)
    model(tokens, model.new_cache(3))
    assert calls == []
    next_token_loss(model, batch_of()).backward()
    assert len(calls) == tiny_config.n_layers


def test_keys_of_the_state_dict_stay(tiny_config) -> None:
    model = Transformer(tiny_config)
    before = list(model.state_dict())
    model.recomputes_blocks, model.loss_chunk = True, 8
    next_token_loss(model, batch_of()).backward()
    assert list(model.state_dict()) == before
