"""Estimates against models that are really built and steps that are really taken."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bitnet.config import ModelConfig
from bitnet.estimate import count_parameters, flops_per_token
from bitnet.model import Transformer

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "training_memory.py"


@pytest.mark.parametrize("sub_norm", [True, False])
@pytest.mark.parametrize("tie", [True, False])
def test_parameter_count(sub_norm, tie) -> None:
    config = ModelConfig(
        vocab_size=50, dim=24, n_layers=3, n_heads=6, n_kv_heads=2, ffn_dim=40, sub_norm=sub_norm, tie_embeddings=tie
    )
    model, counts = Transformer(config), count_parameters(config)
    assert counts.total == sum(p.numel() for p in model.parameters())
    assert counts.norms == sum(p.numel() for n, p in model.named_parameters() if "norm" in n)


def test_flops_are_those_that_torch_counts() -> None:
    """torch's counter takes attention as a full square; the estimate counts the causal half."""
    config = ModelConfig(vocab_size=64, dim=32, n_layers=2, n_heads=4, ffn_dim=48, max_seq_len=16)
    model, tokens = Transformer(config), torch.randint(64, (2, 16))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(tokens)
    counts = count_parameters(config)
    matrices = 2 * (counts.linear + 64 * 32)
    square = 2 * config.n_layers * config.dim * 16 * 2
    assert counter.get_total_flops() == 32 * (matrices + square)
    assert flops_per_token(config, 16, training=False) == matrices + square // 2
    assert flops_per_token(config, 16) == 3 * (matrices + square // 2)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak resident set as Linux reports it")
@pytest.mark.parametrize(
    "weight,switch",
    [
        ("ternary", "plain"),
        ("none", "plain"),
        ("ternary", "from float"),
        ("ternary", "the same, adafactor"),  # loss_chunk and checkpointing
        pytest.param("ternary", "loss_chunk", marks=pytest.mark.slow),
        pytest.param("ternary", "checkpointing", marks=pytest.mark.slow),
    ],
)
def test_training_memory_is_within_15_percent_of_the_measured_peak(weight, switch) -> None:
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, str(SCRIPT), "--one", "tiny", weight, switch]
    output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    result = json.loads(output.strip().splitlines()[-1])
    assert result["estimated"] == pytest.approx(result["measured"], rel=0.15)


def test_inspect_knows_the_switches(capsys) -> None:
    """The figures of a config change with its settings, as the estimate says they do."""
    from bitnet.inspection import inspect_config

    options = ("--model.loss_chunk=64", "--model.activation_checkpointing=true", "--model.optim.kind=muon")
    shown = []
    for overrides in (["--model.optim.kind=adamw"], options):
        inspect_config("tiny", list(overrides))
        shown.append(capsys.readouterr().out)
    assert "weights, gradients, adamw" in shown[0] and "weights, gradients, muon" in shown[1]
    activations = [next(line for line in text.splitlines() if " activations " in line) for text in shown]
    sizes = [float(line.split()[-2]) * {"MB": 1, "GB": 1000}[line.split()[-1]] for line in activations]
    assert sizes[1] < sizes[0] / 4
