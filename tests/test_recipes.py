"""One contract for every recipe: it swaps what it should, keeps keys loadable, and its loss falls."""

import pytest
import torch
from torch import nn

from bitnet.config import ModelConfig
from bitnet.errors import UserError
from bitnet.layers import BitLinear
from bitnet.model import Transformer
from bitnet.recipes import BitNet, Recipe

RECIPES = [
    BitNet(),
    BitNet(weight="binary"),
    BitNet(act_bits=4),
    BitNet(act_bits="none"),
    BitNet(weight="none", act_bits="none"),
    BitNet(quantizer_warmup=5),
    BitNet(act4_from=0.5),
]
CONFIG = ModelConfig(vocab_size=64, dim=32, n_layers=2, n_heads=4, ffn_dim=48, max_seq_len=16)
LINEARS = {f"layers.{i}.attention.{w}" for i in (0, 1) for w in ("wq", "wk", "wv", "wo")} | {
    f"layers.{i}.feed_forward.{w}" for i in (0, 1) for w in ("w1", "w2", "w3")
}


def batch(seed: int = 0) -> dict[str, torch.Tensor]:
    """Counting sequences: learnable at once."""
    start = torch.randint(64, (16, 1), generator=torch.Generator().manual_seed(seed))
    rows = (start + torch.arange(17)) % 64
    return {"inputs": rows[:, :-1], "targets": rows[:, 1:]}


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_contract(recipe: Recipe) -> None:
    torch.manual_seed(0)
    model = Transformer(CONFIG)
    before = {name: p.clone() for name, p in model.named_parameters()}
    changed = recipe.prepare(model)
    assert set(changed) == (set() if recipe == BitNet(weight="none", act_bits="none") else LINEARS)
    assert type(model.lm_head) is nn.Linear and type(model.tok_embeddings) is nn.Embedding
    after = dict(model.named_parameters())
    assert after.keys() == before.keys() and all(torch.equal(after[n], before[n]) for n in before)
    Transformer(CONFIG).load_state_dict(model.state_dict())

    data = batch()
    copies = {k: v.clone() for k, v in data.items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(40):
        recipe.on_step(model, step, 40)
        loss = recipe.loss(model, data)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.isfinite(torch.tensor(losses)))
    assert losses[-1] < 0.7 * losses[0]
    assert all(torch.equal(data[k], copies[k]) for k in data)


def test_four_bits_spare_wo_and_w2() -> None:
    model = Transformer(CONFIG)
    BitNet(act_bits=4).prepare(model)
    bits = {n.rpartition(".")[2]: m.act_bits for n, m in model.named_modules() if isinstance(m, BitLinear)}
    assert bits == {"wq": 4, "wk": 4, "wv": 4, "w1": 4, "w3": 4, "wo": 8, "w2": 8}


def test_late_four_bits_and_what_is_served() -> None:
    recipe, model = BitNet(act4_from=0.95), Transformer(CONFIG)
    recipe.prepare(model)
    wq, wo = model.layers[0].attention.wq, model.layers[0].attention.wo
    for step, bits in ((0, 8), (94, 8), (95, 4), (99, 4)):
        recipe.on_step(model, step, 100)
        assert (wq.act_bits, wo.act_bits) == (bits, 8)
        assert recipe.served(step, 100) == BitNet(act_bits=bits)


@pytest.mark.parametrize("warmup", [10, 0.1])
def test_warmup_reaches_one(warmup) -> None:
    recipe, model = BitNet(quantizer_warmup=warmup), Transformer(CONFIG)
    recipe.prepare(model)
    seen = []
    for step in (0, 5, 10, 50):
        recipe.on_step(model, step, 100)
        seen.append(model.layers[1].feed_forward.w2.warmup)
    assert seen == [0.0, 0.5, 1.0, 1.0]


def test_recipes_take_modules_of_other_libraries() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
    )
    model = transformers.LlamaForCausalLM(config)
    changed = BitNet(act_bits=4).prepare(model)
    assert len(changed) == 7 and not any("lm_head" in name for name in changed)
    assert model.model.layers[0].mlp.down_proj.act_bits == 8
    assert torch.isfinite(model(torch.randint(50, (1, 6))).logits).all()


@pytest.mark.parametrize(
    "options,named",
    [
        ({"act4_from": 1.5}, "act4_from"),
        ({"act4_from": 1.0}, "act4_from"),  # no step would be left for 4 bits, but the checkpoint would say 4
        ({"quantizer_warmup": -1}, "quantizer_warmup"),
        ({"quantizer_warmup": 1.5}, "quantizer_warmup"),
        ({"act4_from": 0.9, "act_bits": 4}, "act_bits"),
        ({"quantize_from": 0.8, "quantizer_warmup": 0.5}, "quantizer_warmup"),  # 140 % of the run
        ({"mask_beyond": float("nan")}, "mask_beyond"),
    ],
)
def test_impossible_options_are_refused(options, named) -> None:
    with pytest.raises(UserError, match=named):
        BitNet(**options)
