"""The importer of Hugging Face folders. An input is config.json, the header of model.safetensors, tokenizer_config.json
and the index, with a NUL between each and the next; what is left out is not written."""

import json
from pathlib import Path

from common import filled, fuzz, json_mutator, read_hf

NAMES = ("config.json", "model.safetensors", "tokenizer_config.json", "model.safetensors.index.json")
TOKENIZER = json.dumps({"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}})


def file_of(header: bytes) -> bytes:
    """A safetensors file whose tensors are filled."""
    return len(header).to_bytes(8, "little") + header + filled(header)


def read(data: bytes, folder: Path) -> None:
    (folder / "tokenizer.json").write_text(TOKENIZER)
    parts = data.split(b"\0")
    for name, part in zip(NAMES, [*parts, b"", b"", b""], strict=False):
        (folder / name).unlink(missing_ok=True)
        if part:
            (folder / name).write_bytes(file_of(part) if name == "model.safetensors" else part)
    read_hf(folder)


if __name__ == "__main__":
    fuzz("hf", read, json_mutator)
