"""Two and four processes: the same scales and levels, bit for bit, the same first step, and curves of one process."""

import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bitnet.errors import UserError
from bitnet.layers import low_bit_layers
from bitnet.loss import next_token_loss
from bitnet.recipes import PEQA, QAT, BitNet
from bitnet.training.lit import LitBitNet
from bitnet.training.parallel import check_split_layer, check_tensor_parallel
from bitnet.training.precision import LatentFloat32
from bitnet.training.strategies import FullySharded

from ..conftest import ROOT
from ..runs import environment
from .spread_worker import batches, new_model, optimizer_of, rows_of

TWO = (
    "ternary:ddp:-:64",
    "ternary:fsdp:levels:64",
    "ternary:fsdp:latent:64",
    "ternary:tp:-:64",
    "binary:fsdp:levels:64",
    "grouped:fsdp:levels:64",  # scales of groups of inputs: found by whoever holds the group
    "grouped:tp:-:64",
    "blended:fsdp:latent:64",  # quantizers half blended in
    "blended:tp:-:64",
    "muon:fsdp:levels:64",
    "muon:tp:-:64",
    "int16:fsdp:levels:64",
    "int16:fsdp:latent:64",
    "chunked:fsdp:levels:64",
    "recomputed:fsdp:levels:64",
)
FOUR = (
    "ternary:ddp:-:64",
    "ternary:fsdp:levels:64",
    "ternary:fsdp:levels:70",  # 70 rows over four processes: 18, 18, 18, 16
    "ternary:fsdp:latent:70",
    "ternary:tp:-:64",
    "ternary:tp2:levels:64",
    "ternary:tp2:latent:64",
    "binary:tp2:levels:64",
    "none:tp2:latent:64",
    "grouped:tp2:levels:64",
    "muon:fsdp:latent:70",
    "muon:tp2:levels:64",
)
CASES = [*((2, mode) for mode in TWO), *((4, mode) for mode in FOUR)]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def launch(processes: int, file: Path, modes: tuple[str, ...]) -> dict[str, Any]:
    port = free_port()
    shared = environment(WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    command = [sys.executable, "-m", "tests.training.spread_worker", str(file), *modes]
    running = [
        subprocess.Popen(
            command, cwd=ROOT, env={**shared, "RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(processes)
    ]  # fmt: skip
    said = [process.communicate(timeout=300)[0] for process in running]
    assert all(process.returncode == 0 for process in running), "\n".join(said)[-3000:]
    return torch.load(file, weights_only=True)


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[tuple[int, str], Any]:
    folder = tmp_path_factory.mktemp("spread")
    results = {n: launch(n, folder / f"{n}.pt", modes) for n, modes in ((2, TWO), (4, FOUR))}
    return {(n, mode): result for n, modes in results.items() for mode, result in modes.items()}


def reorder(model: Any, seed: int) -> None:
    """Put the units of the feed-forward networks in another order: the same function, sums in another order."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for block in model.layers:
            f = block.feed_forward
            order = torch.randperm(f.w1.weight.shape[0], generator=generator)
            for layer in (f.w1, f.w3):
                layer.weight.copy_(layer.weight[order].clone())
            f.w2.weight.copy_(f.w2.weight[:, order].clone())
            f.ffn_sub_norm.weight.copy_(f.ffn_sub_norm.weight[order].clone())


def alone(kind: str, ffn: int, parts: int = 1, seed: int | None = None) -> dict[str, Any]:
    """One process; ``parts`` and ``seed`` change the order of sums and nothing else."""
    model = new_model(kind, ffn)
    if seed is not None:
        reorder(model, seed)
    optimizer = optimizer_of(model, kind)
    layers = low_bit_layers(model)
    result: dict[str, Any] = {
        "levels": {name: layer.quantized_weight()[0] for name, layer in layers.items()},
        "scales": {name: layer.quantized_weight()[1] for name, layer in layers.items()},
        "losses": [],
    }
    for step, batch in enumerate(batches()):
        total = 0.0
        for part in range(parts):
            loss = next_token_loss(model, rows_of(batch, part, parts)) / parts
            loss.backward()
            total += float(loss.detach())
        if step == 0:
            result["gradients"] = {name: p.grad.clone() for name, p in model.named_parameters()}
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        result["losses"].append(total)
    return result


@pytest.mark.parametrize("processes,mode", CASES)
def test_scales_and_levels_are_equal_and_the_first_step_agrees(found, processes, mode) -> None:
    kind, _, _, ffn = mode.split(":")
    here, one = found[processes, mode], alone(kind, int(ffn))
    assert here["levels"].keys() == one["levels"].keys() and here["scales"].keys() == one["scales"].keys()
    for name, levels in one["levels"].items():
        assert torch.equal(here["scales"][name], one["scales"][name])
        assert torch.equal(here["levels"][name], levels)
    assert here["losses"][0] == pytest.approx(one["losses"][0], abs=1e-5)
    for name, gradient in one["gradients"].items():
        error = (here["gradients"][name] - gradient).norm() / gradient.norm()
        assert float(error) < 0.02, name  # one int8 activation rounded the other way moves a gradient by per cents


@pytest.mark.parametrize("kind", ["ternary", "binary", "none", "grouped"])
def test_curves_stay_within_the_spread_of_reordered_sums(found, kind) -> None:
    one = torch.tensor(alone(kind, 64)["losses"])
    variants = [alone(kind, 64, parts, seed) for parts, seed in ((2, None), (4, None), (1, 1), (1, 2), (2, 3), (1, 4))]
    spread = max(float((torch.tensor(v["losses"]) - one).abs().max()) for v in variants)
    for (processes, mode), result in found.items():
        if mode.startswith(kind) and mode.endswith("64"):
            away = float((torch.tensor(result["losses"]) - one).abs().max())
            assert away <= 2 * spread + 1e-5, (processes, mode, away, spread)


@pytest.mark.parametrize(
    "processes,kind,layout,ffn",
    [(2, "ternary", "fsdp", 64), (2, "int16", "fsdp", 64), (4, "ternary", "fsdp", 70), (4, "ternary", "tp2", 64)],
)
def test_packed_gather_changes_no_bit(found, processes, kind, layout, ffn) -> None:
    levels, latent = (found[processes, f"{kind}:{layout}:{gather}:{ffn}"] for gather in ("levels", "latent"))
    assert levels["losses"] == latent["losses"]
    assert all(torch.equal(levels["weights"][name], w) for name, w in latent["weights"].items())
    # w1 and w3 of 70 rows cannot be shared out evenly by four: those are gathered as they are.
    assert (levels["packed"], latent["packed"]) == (10 if ffn == 70 else 14, 0)


def test_recomputed_blocks_change_no_bit(found) -> None:
    kept, again = (found[2, f"{kind}:fsdp:levels:64"] for kind in ("ternary", "recomputed"))
    assert kept["losses"] == again["losses"]
    assert all(torch.equal(again["weights"][name], w) for name, w in kept["weights"].items())


@pytest.mark.parametrize("processes,mode", [case for case in CASES if case[1].startswith("muon")])
def test_muon_makes_whole_matrices_orthogonal(found, processes, mode) -> None:
    """With the same gradients torch's own Muon, in one process, gets the same bits, or nearly those where torch adds up
    bfloat16 in another order. Pieces that are made orthogonal by themselves are another step (by 0.6 of its length)."""
    model = new_model("muon", int(mode[-2:]))
    optimizer = optimizer_of(model, "muon")
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    for gradients in found[processes, mode]["clipped"]:
        for name, p in model.named_parameters():
            p.grad = gradients[name]
        optimizer.step()
    assert len(found[processes, mode]["clipped"]) == 2
    for name, p in model.named_parameters():
        away = (found[processes, mode]["weights"][name] - p.detach()).norm() / (p.detach() - start[name]).norm()
        assert float(away) <= (0.1 if ":tp2:" in mode else 0.0), name


def test_bytes_of_a_step_of_muon(found) -> None:
    """14 matrices of 64 x 64: half of each to its owner in two bytes a number, and half of each back; else nothing."""
    assert found[2, "muon:fsdp:levels:64"]["sent"] == {"alltoall_base_": 2 * 2 * (14 // 2) * 64 * 64}


def test_bytes_of_a_gather(found) -> None:
    """Two blocks of 7 x 64 rows of 64, twice, with their norms; embedding and last norm once."""
    rows, norms, root = 2 * 7 * 64, 2 * 4 * 64 * 4, (96 * 64 + 64) * 4
    expected = {"ternary:fsdp:latent:64": 64 * 4, "ternary:fsdp:levels:64": 256 // 4, "binary:fsdp:levels:64": 256 // 8}
    for mode, row_bytes in expected.items():  # packed rows are whole blocks of 256 weights
        assert found[2, mode]["gathered"] == 2 * (rows * row_bytes + norms) + root


def test_what_cannot_be_cut_is_refused() -> None:
    model = new_model("ternary", 64)
    with pytest.raises(UserError, match="n_heads = 4 is not a multiple"):
        check_tensor_parallel(model.config, 3)
    wo = model.layers[0].attention.wo
    wo.act_bits = 4
    with pytest.raises(UserError, match="act_bits = 4"):
        check_split_layer("layers.0.attention.wo", wo)
    strategy = FullySharded(tensor_parallel=2)
    LitBitNet(model.config, BitNet(act4_from=0.9)).check_strategy(strategy)
    with pytest.raises(UserError, match=r"keep_8bit = \['w2'\]"):
        LitBitNet(model.config, BitNet(act4_from=0.9, keep_8bit=("w2",))).check_strategy(strategy)
    with pytest.raises(UserError, match=r"model.loss_chunk: tensor parallelism cuts the output head"):
        LitBitNet(model.config, BitNet(), loss_chunk=50).check_strategy(strategy)
    with pytest.raises(UserError, match="QAT: tensor parallelism is for recipes that train from scratch"):
        LitBitNet(model.config, QAT(group_size=16)).check_strategy(strategy)
    sharded = FullySharded()
    LitBitNet(model.config, QAT(group_size=16)).check_strategy(sharded)
    with pytest.raises(UserError, match="PEQA: its integers cannot be sharded"):
        LitBitNet(model.config, PEQA(group_size=16)).check_strategy(sharded)
    sharded.precision_plugin = LatentFloat32()
    with pytest.raises(UserError, match="sharded weights are of one dtype"):
        LitBitNet(model.config, BitNet()).check_strategy(sharded)
