"""F: files of strangers are read whole, or refused in one line, and run nothing."""

import copy
import io
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models

from bitnet.inference.files import load_packed, save_packed
from bitnet.inference.header import seal_of, with_seal
from bitnet.inference.packing import pack
from bitnet.sharded_checkpoint import write_checksums
from tests.inference.conftest import low_bit_model
from tests.scorecard.trials import PATIENCE, costs, folder_of_parts, refusal

TENSOR, LAYER = "layers.0.attention.wq.inv_scale", "layers.0.attention.wq"
HUGE = 2**62


@pytest.fixture(scope="module")
def packed_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("packed") / "m.safetensors"
    tokenizer = Tokenizer(models.BPE({chr(33 + i): i for i in range(50)}, []))
    save_packed(pack(low_bit_model()), tokenizer, path)
    return path


def damage(whole: bytes) -> list[bytes]:
    """50 cuts, 50 flips of a bit of the header, 50 of the tensors."""
    header = 8 + int.from_bytes(whole[:8], "little")
    choose = random.Random(0)
    found = [whole[: choose.randrange(len(whole))] for _ in range(50)]
    for low, high in ((0, header), (header, len(whole))):
        for _ in range(50):
            content = bytearray(whole)
            content[choose.randrange(low, high)] ^= 1 << choose.randrange(8)
            found.append(bytes(content))
    return found


DESCRIPTIONS: list[dict[str, Any]] = [
    {"format_version": 2},
    {"config": {}},
    {"config": None},
    *({f"config.{key}": value} for key, value in {
        "n_layers": 10**9, "dim": 2**40, "vocab_size": 98, "ffn_dim": -1, "n_heads": 0, "max_seq_len": "x",
        "surprise": 1, "norm_eps": None, "activation": "eval",
    }.items()),
    *({"config.n_layers": 1}, {"config.dim": -96}, {"config.dim": "96"}),
    *({"head": head} for head in ("int8", "pickle")),
    *({"layers": layers} for layers in (
        {}, {LAYER: ["ternary2", 8]}, {"../../etc/passwd": ["ternary2", 8]},
    )),
    *({"digests": {}}, {"tokenizer": "{}"}, {"tokenizer": None}),
    *({f"layers.{LAYER}": form} for form in (
        ["int2", 8], ["binary1", 8], ["ternary2", 3], ["ternary2"], 7, ["ternary2", 8, "column"],
        ["ternary2", 8, 0], ["ternary2", 8, "row"], ["ternary2", 8, 64, 1],
    )),
]  # fmt: skip
ENTRIES: list[dict[str, Any]] = [
    *({"shape": shape} for shape in ([HUGE, 2], [-1], [0], [], ["1"], [1.0], None, 1)),
    *({"dtype": dtype} for dtype in ("F8", "F64", "I32", None)),
    *({"data_offsets": place} for place in ([0, 2**63], [4, 0], [-4, 0], [0], None)),
    {},
]


def with_header(whole: bytes, header: dict[str, Any], description: dict[str, Any]) -> bytes:
    """The file with another header, its digest made right again: damage that only checks of sense can find."""
    n = int.from_bytes(whole[:8], "little")
    header = {**header, "__metadata__": {"bitnet": json.dumps(description), "sha256": "0" * 64}}
    text = json.dumps(header, separators=(",", ":")).encode()
    text = with_seal(text, "0" * 64, seal_of(text))
    return len(text).to_bytes(8, "little") + text + whole[8 + n :]


def edited(whole: bytes) -> list[bytes]:
    header = json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])
    description = json.loads(header["__metadata__"]["bitnet"])
    found = []
    for change in DESCRIPTIONS:
        ((path, value),) = change.items()
        other = copy.deepcopy(description)
        owner, _, key = path.partition(".")
        if key:
            other[owner][key] = value
        else:
            other[owner] = value
        found.append(with_header(whole, header, other))
    for entry in ENTRIES:
        changed = {**header[TENSOR], **entry} if entry else {}
        found.append(with_header(whole, {**header, TENSOR: changed}, description))
    return found


@pytest.mark.check("F1", "damaged and edited packed models are refused, at once and without memory", 200)
def test_packed_models(packed_file, tmp_path, tally) -> None:
    whole = packed_file.read_bytes()
    load_packed(packed_file)
    sensible = json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])
    again = with_header(whole, sensible, json.loads(sensible["__metadata__"]["bitnet"]))
    file = tmp_path / "m.safetensors"
    file.write_bytes(again)
    load_packed(file)  # what the edits start from is sound
    for number, content in enumerate([*damage(whole), *edited(whole)]):
        file.write_bytes(content)
        text: list[str] = []
        seconds, memory = costs(lambda text=text: text.append(refusal(lambda: load_packed(file), file)))
        held = bool(text[0]) and seconds < 1 * PATIENCE and memory < len(whole) + 64e6
        tally(held, f"{number}: {text[0]!r}, {seconds:.2f} s, {memory / 1e6:.0f} MB")


SIZES = ((96, 100), (64, 257), (40, 33))


@pytest.mark.check("F7", "saving what was loaded gives the same bytes, and the same model gives the same file", 100)
def test_saving_again(tmp_path, tally) -> None:
    tokenizer = Tokenizer(models.BPE({chr(33 + i): i for i in range(50)}, []))
    for seed in range(100):
        choose = random.Random(seed)
        weight = choose.choice(("ternary", "binary"))
        (dim, ffn_dim), tied = choose.choice(SIZES), choose.random() < 0.5
        format = choose.choice((None, "ternary_base3")) if weight == "ternary" else None
        head = choose.choice(("float32", "float16", "bfloat16", "int8"))
        files = [tmp_path / name for name in ("a.safetensors", "b.safetensors", "c.safetensors")]
        for file in files[:2]:
            model = low_bit_model(seed, weight=weight, dim=dim, ffn_dim=ffn_dim, n_layers=1, tie_embeddings=tied)
            save_packed(pack(model, head=head), tokenizer, file, format=format)
        save_packed(load_packed(files[0])[0], tokenizer, files[2], format=format)
        a, b, c = (file.read_bytes() for file in files)
        tally(a == b == c, f"{seed}: {weight} {format} {head}")


def zip_of(content: object, compression: int, repeat: int = 1) -> bytes:
    """A checkpoint as torch writes it, its zip written anew."""
    import warnings
    import zipfile

    plain, new = io.BytesIO(), io.BytesIO()
    torch.save(content, plain)
    with zipfile.ZipFile(plain) as old, zipfile.ZipFile(new, "w", compression) as out, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that appear twice
        for part in old.infolist():
            for _ in range(repeat):
                out.writestr(part.filename, old.read(part))
    return new.getvalue()


@pytest.mark.check("F4", "checkpoints that claim more than they hold are refused before memory is taken", 7)
def test_bombs(tmp_path, tally) -> None:
    import zipfile

    from bitnet.checkpoint import load_checkpoint, read_checkpoint

    entry = {"format_version": 1}
    large = {"bitnet": entry, "state_dict": {"model.a": torch.zeros(64 << 20)}}
    bomb = zip_of(large, zipfile.ZIP_DEFLATED)
    assert len(bomb) < 300_000
    small = {"bitnet": entry, "state_dict": {"model.a": torch.zeros(1 << 20)}}
    (tmp_path / "sound.ckpt").write_bytes(zip_of(small, zipfile.ZIP_STORED))
    read_checkpoint(tmp_path / "sound.ckpt")
    sound, meta, claims, parts = (
        folder_of_parts(tmp_path / name, {"bitnet": entry}) for name in ("sound", "meta", "claims", "parts")
    )
    read_checkpoint(sound)
    cases = {"deflated.ckpt": bomb, "lzma.ckpt": zip_of(small, zipfile.ZIP_LZMA)}
    wide = {"bitnet": entry, "state_dict": {"model.a": torch.zeros(1).expand(1 << 40)}}
    cases["expanded.ckpt"] = zip_of(wide, zipfile.ZIP_STORED)
    old = io.BytesIO()
    torch.save(small, old, _use_new_zipfile_serialization=False)
    cases["old.ckpt"] = old.getvalue()
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
    paths = [tmp_path / name for name in cases]
    (meta / "meta.pt").write_bytes(zip_of(large, zipfile.ZIP_DEFLATED))
    write_checksums(meta, 0)
    replace_in_index(claims, lambda index: enlarge(index, torch.Size([1 << 40])))
    (file,) = parts.glob("*.distcp")
    file.write_bytes(zip_of(torch.zeros(1 << 20), zipfile.ZIP_DEFLATED))
    replace_in_index(parts, lambda index: whole_file(index, file.stat().st_size))
    for path in (*paths, meta, claims, parts):
        text: list[str] = []
        _, memory = costs(lambda path=path, text=text: text.append(refusal(lambda: load_checkpoint(path), path)))
        tally(bool(text[0]) and memory < 16e6, f"{path.name}: {text[0]!r}, {memory / 1e6:.0f} MB")


def replace_in_index(folder: Path, change: Any) -> None:
    """Change what the index of a folder of parts says, and the checksums with it, as whoever means harm would."""
    import pickle

    index = pickle.loads((folder / ".metadata").read_bytes())
    change(index)
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    write_checksums(folder, 0)


def enlarge(index: Any, size: torch.Size) -> None:
    for tensor in index.state_dict_metadata.values():
        tensor.size = size
        for chunk in tensor.chunks:
            chunk.sizes = size


def whole_file(index: Any, length: int) -> None:
    for place in index.storage_data.values():
        place.offset, place.length = 0, length


NAMES = (
    "../outside.safetensors", "/etc/passwd", "a/../../outside.safetensors", "sub/x.safetensors", "..", "", ".",
    "x\0.safetensors", "/dev/zero", "C:\\x.safetensors", "..\\outside.safetensors", "x" * 5000, "pipe", "device",
)  # fmt: skip


@pytest.mark.check("F6", "names in an index reach no other folder, no pipe, no device", 28)
def test_hostile_names(tmp_path, tally) -> None:
    import os

    from bitnet.checkpoint import read_checkpoint
    from bitnet.interchange.hf_import import Folder

    inside = tmp_path / "model"
    inside.mkdir()
    (tmp_path / "outside.safetensors").write_bytes(b"secret")
    parts = folder_of_parts(tmp_path / "parts", {"bitnet": {"format_version": 1}})
    read_checkpoint(parts)
    os.mkfifo(inside / "pipe")
    (inside / "device").symlink_to("/dev/zero")
    before = sorted(path.name for path in tmp_path.iterdir())
    for name in NAMES:
        (inside / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
        tally(bool(refusal(lambda: Folder(inside), inside)), f"index of tensors: {name!r}")
        replace_in_index(parts, lambda index, name=name: rename(index, name))
        if name in ("pipe", "device"):
            (inside / name).rename(parts / name)
        tally(bool(refusal(lambda: read_checkpoint(parts), parts)), f"index of parts: {name!r}")
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def rename(index: Any, name: str) -> None:
    for place in index.storage_data.values():
        place.relative_path = name
