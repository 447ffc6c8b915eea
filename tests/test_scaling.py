"""The cost of training on several devices: figures worked out by hand."""

import json

import pytest

from bitnet.__main__ import main
from bitnet.config import ModelConfig
from bitnet.estimate import count_parameters, flops_per_token, training_memory
from bitnet.scaling import GPUS, estimate

CONFIG = ModelConfig(vocab_size=1000, dim=256, n_layers=4, n_heads=4, ffn_dim=512, max_seq_len=128)
COUNTS = count_parameters(CONFIG)
MEMORY = training_memory(CONFIG, weight="ternary", act_bits=8, rows=2, seq_len=128, bf16=True)


def of(**how):
    given = {"weight": "ternary", "rows": 2, "seq_len": 128, "micro_batches": 3, "devices": 4, "strategy": "fsdp"}
    return estimate(CONFIG, MEMORY, **{**given, **how})


def test_fully_sharded_by_hand() -> None:
    linear, norms, table = 4 * (4 * 256 * 256 + 3 * 256 * 512), COUNTS.norms, 1000 * 256
    assert (linear, table) == (COUNTS.linear, COUNTS.embeddings)
    packed, latent = of(), of(gather="latent")
    assert packed.gathered == 3 * 0.75 * (2 * linear / 4 + 8 * norms + 4 * table)
    assert latent.gathered == 3 * 0.75 * (8 * linear + 8 * norms + 4 * table)
    assert of(weight="binary").gathered == 3 * 0.75 * (2 * linear / 8 + 8 * norms + 4 * table)
    assert packed.reduced == latent.reduced == 3 * 0.75 * 4 * COUNTS.total
    assert packed.memory < latent.memory < MEMORY.total + 16 * COUNTS.total


def test_data_and_tensor_parallel_by_hand() -> None:
    assert of(strategy="ddp").reduced == 2 * 0.75 * 4 * COUNTS.total
    assert of(strategy="ddp").gathered == 0
    # Per block two sums forward and two backward of 2 x 128 x 256 numbers; embedding and head one each.
    assert of(strategy="tp").activations_sent == 3 * 2 * 0.75 * 4 * (2 * 128 * 256) * (4 * 4 + 2)
    assert of(strategy="tp").tokens == 3 * 2 * 128 and of().tokens == 4 * 3 * 2 * 128


def test_muon_sends_each_matrix_to_its_owner_and_back() -> None:
    assert of(optimizer="muon").optimizer_sent == 0.75 * 2 * 2 * COUNTS.linear / 4
    assert of(optimizer="muon").sent == of().sent + of(optimizer="muon").optimizer_sent
    assert of().optimizer_sent == of(optimizer="muon", strategy="ddp").optimizer_sent == 0


def test_a_step_takes_the_longer_of_computing_and_sending() -> None:
    few = of(utilisation=0.5)
    assert few.compute_s == pytest.approx(3 * 256 * flops_per_token(CONFIG, 128) / (989e12 * 0.5))
    assert few.communication_s == pytest.approx(few.sent / 450e9)
    assert few.tokens_per_s == pytest.approx(few.tokens / max(few.compute_s, few.communication_s))
    assert of(devices=16).communication_s == pytest.approx(of(devices=16).sent / GPUS["h100"].wide)
    assert of(int8=True).compute_s < of().compute_s


def test_recomputed_blocks_cost_a_forward_and_its_sums() -> None:
    more = of(recomputes=True).compute_s - of().compute_s
    attention = 2 * 4 * 256 * 128  # causal: half of two products of 128 x 256 in each of four layers
    assert more == pytest.approx(3 * 256 * (2 * COUNTS.linear + attention) / (989e12 * 0.45))
    assert of(strategy="tp", recomputes=True).activations_sent == 3 * 2 * 0.75 * 4 * (2 * 128 * 256) * (6 * 4 + 2)


def test_settings_that_save_memory_count(tmp_path) -> None:
    def found(*options: str) -> dict[str, float]:
        assert main(["inspect", "ternary_125m", "--devices", "8", "--json", str(tmp_path / "a.json"), *options]) == 0
        return json.loads((tmp_path / "a.json").read_text())["estimates"][0]

    plain, chunked = found(), found("--model.loss_chunk", "256")
    # 8 x 2048 tokens, logits of 32,000 numbers: three in float32 and one in bf16; what the head reads has a gradient.
    assert plain["memory"] - chunked["memory"] == (8 * 2048 - 256) * 32000 * 14 - 8 * 2048 * 4 * 768
    recomputed = found("--model.activation_checkpointing", "true")
    assert recomputed["memory"] < plain["memory"] and recomputed["compute_s"] > 1.2 * plain["compute_s"]


def test_command(tmp_path, capsys) -> None:
    file = tmp_path / "a.json"
    assert main(["inspect", "ternary_1b", "--devices", "8,64", "--json", str(file)]) == 0
    found = json.loads(file.read_text())["estimates"]
    assert [(e["devices"], e["gather"]) for e in found] == [
        (8, "latent"),
        (8, "levels"),
        (64, "latent"),
        (64, "levels"),
    ]
    assert found[1]["gathered"] < found[0]["gathered"] / 7
    said = capsys.readouterr().out
    assert "tokens/s" in said and "begins in float, so latent weights travel" in said
    assert main(["inspect", "ternary_1b", "--devices", "8", "--gather", "levels", "--int8", "--json", str(file)]) == 0
    assert json.loads(file.read_text())["estimates"][0]["compute_s"] < 0.6 * found[1]["compute_s"]
    assert main(["inspect", "ternary_1b", "--devices", "8", "--utilisation", "0"]) == 2
    assert main(["inspect", "ternary_1b", "--devices", "0"]) == 2
