"""The importer of GGUF files. An input is the header; zeros follow it, enough for the tensors of the seeds."""

from pathlib import Path

from common import fuzz, read_gguf


def read(data: bytes, folder: Path) -> None:
    file = folder / "m.gguf"
    file.write_bytes(data + bytes(250_000))
    read_gguf(file)


if __name__ == "__main__":
    fuzz("gguf", read)
