"""``bitnet bench train``: what it prints and writes, and that its figures are those of real steps."""

import json

import pytest
import torch

from bitnet import BitNet, ModelConfig, Transformer
from bitnet.__main__ import main
from bitnet.config import OptimConfig
from bitnet.loss import next_token_loss
from bitnet.training.bench import measure
from bitnet.training.optim import build_optimizer

CONFIG = ModelConfig(vocab_size=90, dim=64, n_layers=2, n_heads=4, ffn_dim=128, max_seq_len=64)
NAMES = ["float", "ternary", "ternary_int16", "ternary_int8", "binary"]


def test_steps_are_those_of_training_and_gradients_on_integers_learn_as_well() -> None:
    found = {step.name: step for step in measure(NAMES, CONFIG, OptimConfig(), rows=2, seq_len=32, steps=3)}
    torch.manual_seed(0)
    model = Transformer(CONFIG)
    BitNet().prepare(model)
    optimizer = build_optimizer(model, OptimConfig())
    ids = torch.randint(90, (2, 33), generator=torch.Generator().manual_seed(0))
    batch = {"inputs": ids[:, :-1].contiguous(), "targets": ids[:, 1:].contiguous()}
    for _ in range(6):  # two before, three measured, one watched
        loss = next_token_loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert found["ternary"].loss == pytest.approx(loss.item(), rel=1e-6)
    assert found["ternary_int16"].loss == pytest.approx(found["ternary"].loss, abs=2e-2)
    assert found["ternary_int8"].loss == pytest.approx(found["ternary"].loss, abs=2e-2)
    assert found["ternary_int8"].loss != found["ternary"].loss
    assert found["float"].ratio == 1.0 and found["float"].quantizing == 0.0
    assert 0.0 < found["ternary"].quantizing < 1.0
    # Seven inputs a block at 4 bytes against four at one byte and the int8 weights, at 64 tokens.
    assert found["ternary"].kept < found["float"].kept
    for step in found.values():
        assert step.tokens_per_s == pytest.approx(64 / (step.ms / 1e3))


def test_command_writes_its_figures_and_draws_them(tmp_path, capsys) -> None:
    json_file, plot = tmp_path / "a.json", tmp_path / "a.png"
    command = ["bench", "train", "--config", "overlays/smoke", "--compare", "float,ternary", "--steps", "1"]
    assert main([*command, "--threads", "1", "--json", str(json_file), "--plot", str(plot)]) == 0
    written = json.loads(json_file.read_text())
    assert [step["name"] for step in written["runs"]["1"]] == ["float", "ternary"]
    assert written["rows"] == 4 and written["seq_len"] == 32 and written["model"]["dim"] == 32
    assert plot.stat().st_size > 5000
    printed = capsys.readouterr().out
    assert "ms per step" in printed and "ternary" in printed and "quantizing" in printed


@pytest.mark.parametrize("name", ["quaternary", "float_int8", "ternary_int4"])
def test_unknown_contestants_are_refused(name, capsys) -> None:
    assert main(["bench", "train", "--compare", name]) == 2
    assert name in capsys.readouterr().err
