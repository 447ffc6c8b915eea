"""The benchmark of kernels: what it prints and writes, and that a wrong kernel is never timed."""

import json
from pathlib import Path

import pytest
import torch

from bitnet.__main__ import main
from bitnet_kernels import bench, configurations, tuning
from bitnet_kernels.configurations import Shape, Tile, choose, key_of, table, token_bucket


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "ROTATED_BYTES", 1 << 16)
    monkeypatch.setattr(bench, "ROUNDS", {"cpu": 2})
    monkeypatch.setattr(bench, "TURN_S", 1e-5)


def test_table_json_and_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, plot = tmp_path / "k.json", tmp_path / "k.png"
    command = ["bench", "kernels", "--shapes", "32x256,40x300", "--m", "1,3", "--device", "cpu", "--threads", "1"]
    assert main([*command, "--json", str(out), "--plot", str(plot)]) == 0
    content = json.loads(out.read_text())
    methods = {"ternary2", "binary1", "int8 (_int_mm)", "bf16", "fp32", "rms_norm_quantize"}
    assert len(content["results"]) == 2 * 2 * len(methods)
    assert {r["method"] for r in content["results"]} == methods
    for r in content["results"]:
        assert r["microseconds"] > 0
        assert 0 < r["percent_of_ceiling"] <= 100.001
        if r["method"] == "ternary2":
            row_bytes = -(-r["k"] // 256) * 64
            assert r["bytes"] == r["n"] * row_bytes + r["m"] * r["k"] + 4 * r["m"] * r["n"]
            assert r["gigabytes_per_s"] == pytest.approx(r["bytes"] / r["microseconds"] / 1e3)
            assert r["tera_operations_per_s"] == pytest.approx(2 * r["m"] * r["n"] * r["k"] / r["microseconds"] / 1e6)
    assert plot.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "40 x 300" in printed
    assert "ceilings measured in this run" in printed


def test_a_wrong_product_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = bench.packed_matmul
    monkeypatch.setattr(bench, "packed_matmul", lambda *a, **k: right(*a, **k) + 1)
    with pytest.raises(AssertionError, match="wrong at 1 x 8 x 256: nothing is timed"):
        bench._methods(1, 8, 256, ["ternary2"], torch.device("cpu"))


@pytest.mark.parametrize(
    "options,message",
    [
        (["--shapes", "bitnet-3b"], "--shapes bitnet-3b: must be one of bitnet-2b"),
        (["--shapes", "12x"], "--shapes 12x"),
        (["--m", "0"], "'0' is not a list of positive integers"),
        (["--m", "a,b"], "not a list of positive integers"),
        (["--formats", "ternary_base3"], "must be among ternary2, binary1"),
        (["--device", "tpu"], "--device tpu: must be cpu"),
        (["--device", "cpu", "--tune"], "--tune measures Triton tiles"),
        (["--threads", "0"], "--threads 0"),
    ],
)
def test_bad_input(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "kernels", *options]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1


def test_tuned_tiles_go_before_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITNET_CACHE", str(tmp_path))
    configurations.forget()
    shape, other = Shape(90, 16, 4096, 3584), Shape(90, 16, 4096, 640)
    tile = Tile(32, 16, 128, 4, 2, 4)
    assert choose(shape, 4) == table(shape, 4) != tile
    tuning._write({key_of(shape, 4): tile})
    assert choose(shape, 4) == tile
    assert choose(shape, 8) == table(shape, 8)
    assert choose(other, 4) == table(other, 4)
    Path(configurations.tuned_file()).write_text("{ damaged")
    configurations.forget()
    assert choose(shape, 4) == table(shape, 4)
    monkeypatch.undo()
    configurations.forget()


def test_candidates_fit_and_begin_with_the_table() -> None:
    for m in (1, 64, 2048):
        shape = Shape(89, m, 2560, 640)
        tiles = list(tuning.candidates(shape, 4))
        assert tiles[0] == table(shape, 4)
        assert len(tiles) == len(set(tiles)) > 10
        for tile in tiles:
            assert configurations.shared_bytes(tile, 4, 89) <= 99 * 1024


def test_a_sample_of_candidates_is_from_all_over_the_list() -> None:
    shape = Shape(90, 16, 4096, 3584)
    tiles = tuning.sample(shape, 4, 40)
    assert tiles == tuning.sample(shape, 4, 40)
    assert tiles[0] == table(shape, 4)
    assert len(set(tiles)) == 40
    assert {tile.rows for tile in tiles} == {32, 64, 128}
    assert {tile.split_k for tile in tiles} >= {1, 2, 4, 8}
    assert len(tuning.sample(shape, 4, 10**6)) == len(list(tuning.candidates(shape, 4)))


def test_candidates_that_do_not_compile_are_left_out() -> None:
    tiles = [Tile(16, 16, 64), Tile(32, 16, 64), Tile(64, 16, 64)]

    def call(tile: Tile) -> None:
        if tile.rows == broken:
            raise RuntimeError("out of resources")

    broken = 32
    assert tuning.runnable(tiles, call, torch.device("cpu")) == [tiles[0], tiles[2]]
    broken = 16  # the shipped one
    with pytest.raises(RuntimeError, match="out of resources"):
        tuning.runnable(tiles, call, torch.device("cpu"))


def test_token_buckets() -> None:
    assert [token_bucket(m) for m in (1, 2, 16, 17, 64, 65, 2048)] == [1, 16, 16, 32, 64, 128, 2048]
