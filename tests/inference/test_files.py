"""Packed files: whole or refused, readable by the safetensors library, and no larger in memory than they must be."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from bitnet.__main__ import main
from bitnet.errors import UserError
from bitnet.inference.files import load_packed, save_packed
from bitnet.inference.header import read_header, verify
from bitnet.inference.packing import pack
from bitnet.model import Transformer
from bitnet.recipes import RTN
from tests.inference.conftest import low_bit_model

ROOT = Path(__file__).parents[2]


@pytest.fixture
def file(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    path = tmp_path / "m.safetensors"
    save_packed(pack(low_bit_model()), tokenizer, path)
    return path


@pytest.mark.parametrize("weight", ["ternary", "binary"])
def test_a_file_knows_its_kind_without_a_recipe(weight, tokenizer: Tokenizer, tmp_path: Path) -> None:
    save_packed(pack(low_bit_model(weight=weight)), tokenizer, tmp_path / "m.safetensors")
    assert read_header(tmp_path / "m.safetensors").recipe == {"name": "BitNet", "weight": weight, "act_bits": 8}


def test_integer_grids_want_their_recipe(tokenizer: Tokenizer, tmp_path: Path, tiny_config) -> None:
    model = Transformer(tiny_config)
    RTN(bits=4, group_size=16).prepare(model)
    with pytest.raises(UserError, match="recipe: weights on an integer grid need it"):
        save_packed(pack(model.eval()), tokenizer, tmp_path / "m.safetensors")
    assert not (tmp_path / "m.safetensors").exists()


@pytest.mark.parametrize("tie_embeddings", [True, False])
@pytest.mark.parametrize("head", ["float32", "float16", "bfloat16", "int8"])
@pytest.mark.parametrize("weight,format", [("ternary", None), ("ternary", "ternary_base3"), ("binary", "binary1")])
def test_round_trip(weight, format, head, tie_embeddings, tokenizer: Tokenizer, tmp_path: Path) -> None:
    packed = pack(low_bit_model(weight=weight, tie_embeddings=tie_embeddings), head=head)
    path = tmp_path / "m.safetensors"
    save_packed(packed, tokenizer, path, format=format, recipe={"name": "BitNet"})
    loaded, its_tokenizer = load_packed(path)
    assert its_tokenizer.to_str() == tokenizer.to_str()
    assert loaded.config == packed.config
    tokens = torch.randint(97, (2, 9))
    with torch.inference_mode():
        assert torch.equal(loaded(tokens), packed(tokens))
        caches = [m.new_cache(2, 12) for m in (loaded, packed)]
        for m, cache in zip((loaded, packed), caches, strict=True):
            m(tokens, cache)
        assert torch.equal(loaded(tokens[:, :1], caches[0]), packed(tokens[:, :1], caches[1]))
    again = tmp_path / "again.safetensors"
    save_packed(loaded, its_tokenizer, again, format=format, recipe={"name": "BitNet"})
    assert again.read_bytes() == path.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again.safetensors", "m.safetensors"]


def test_loaded_matrices_are_joined_without_a_copy(file: Path) -> None:
    loaded, _ = load_packed(file)
    for block in loaded.layers:
        joined = block._qkv.joined.packed
        assert joined.data_ptr() == block.attention.wq.packed.data_ptr()
        assert joined.untyped_storage().data_ptr() == block.feed_forward.w2.packed.untyped_storage().data_ptr()
        assert torch.equal(joined[-block.attention.wv.out_features :], block.attention.wv.packed)


def test_the_safetensors_library_reads_it(file: Path) -> None:
    theirs = load_file(file)
    ours, _ = load_packed(file)
    stored = {**dict(ours.named_parameters()), **dict(ours.named_buffers())}
    assert set(theirs) == set(stored)
    for name, tensor in theirs.items():
        assert torch.equal(tensor, stored[name]), name


def refused(path: Path) -> str:
    with pytest.raises(UserError) as error:
        load_packed(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_other_files(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    assert "cannot be read" in refused(path)
    for content in (b"", b"1234567", b"\xff" * 64, (2**63).to_bytes(8, "little") + b"{}", b"\x02" + bytes(7) + b"{}"):
        path.write_bytes(content)
        refused(path)
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(3)}, path)
    assert "not one that 'bitnet pack' wrote" in refused(path)


def test_a_format_that_cannot_hold_the_levels(tokenizer: Tokenizer, tmp_path: Path) -> None:
    packed = pack(low_bit_model())
    with pytest.raises(UserError, match="use ternary2"):
        save_packed(packed, tokenizer, tmp_path / "m.safetensors", format="binary1")
    with pytest.raises(UserError, match="must be one of"):
        save_packed(packed, tokenizer, tmp_path / "m.safetensors", format="q4")
    with pytest.raises(UserError, match="cannot be written"):
        save_packed(packed, tokenizer, tmp_path / "absent" / "m.safetensors")
    assert not list(tmp_path.iterdir())


def test_verify_and_inspect(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verify(read_header(file))
    assert main(["inspect", str(file), "--verify"]) == 0
    printed = capsys.readouterr().out
    assert "every digest is right" in printed
    assert "packed weights (ternary2)" in printed
    content = bytearray(file.read_bytes())
    content[-5] ^= 4
    file.write_bytes(content)
    assert main(["inspect", str(file)]) == 0  # the header alone is whole
    assert main(["inspect", str(file), "--verify"]) == 2
    assert "the digest of" in capsys.readouterr().err


MEASURE = """
import sys, torch

def peak():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) * 1024

before = peak()
from bitnet.inference.files import load_packed
model, tokenizer = load_packed(sys.argv[1])
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc to read the peak of memory")
@pytest.mark.parametrize("format", ["ternary2", "ternary_base3"])
def test_loading_takes_the_file_and_64_mb(format: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    sizes = {"dim": 1024, "ffn_dim": 2816, "n_layers": 6, "n_heads": 16, "vocab_size": 16_384, "init_std": 0.02}
    path = tmp_path / "m.safetensors"
    save_packed(pack(low_bit_model(**sizes), head="float16"), tokenizer, path, format=format)
    resident = path.stat().st_size
    if format == "ternary_base3":
        resident = int(resident * 2 / 1.6)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    done = subprocess.run([sys.executable, "-c", MEASURE, str(path)], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-1000:]
    assert int(done.stdout) < resident + 64e6, f"{int(done.stdout) / 1e6:.0f} MB for {resident / 1e6:.0f} MB"
