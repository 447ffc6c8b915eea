"""The loader of packed models. An input is a description and the tensors' entries, with a NUL between; digests of the
header are made right, since no mutation could guess them. An input without a NUL is the file as it is."""

import json
from pathlib import Path

from common import NO_DIGEST, filled, fuzz, json_mutator, load_packed, seal_of, with_seal


def file_of(data: bytes) -> bytes:
    """The file that an input stands for; its tensors are filled."""
    description, nul, tensors = data.partition(b"\0")
    if not nul:
        return data
    quoted = json.dumps(description.decode("utf-8", "replace")).encode()
    entries = tensors.strip()[1:]
    header = b'{"__metadata__":{"bitnet":' + quoted + b',"sha256":"' + NO_DIGEST.encode() + b'"},' + entries
    return len(header).to_bytes(8, "little") + with_seal(header, NO_DIGEST, seal_of(header)) + filled(tensors)


def read(data: bytes, folder: Path) -> None:
    file = folder / "m.safetensors"
    file.write_bytes(file_of(data))
    load_packed(file)


if __name__ == "__main__":
    fuzz("packed", read, json_mutator)
