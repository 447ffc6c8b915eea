"""Writing a token folder (layout in ``tokens.py``): under a temporary name until it is whole, and what describes it."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from bitnet.data.corpora import python_version
from bitnet.data.tokens import FORMAT, Totals, file_digest
from bitnet.errors import UserError

HELD_OUT = 20
"""One text in so many is held out."""


@contextmanager
def complete_or_absent(folder: Path) -> Iterator[Path]:
    """A folder beside ``folder`` to write to, which gets its name when the body succeeds and vanishes when it fails."""
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield partial
        os.chmod(partial, 0o755)  # mkdtemp's are the user's own, and folders of tokens are shared
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def dtype_of_ids(tokenizer: Tokenizer) -> np.dtype[Any]:
    """The narrowest that holds every id."""
    return np.dtype("<u2" if tokenizer.get_vocab_size() <= 1 << 16 else "<u4")


def describe(
    folder: Path,
    tokenizer: Tokenizer,
    *,
    dtype: np.dtype[Any],
    eos_id: int,
    train: list[Totals],
    val: Totals,
    paths: list[str],
    val_paths: list[str],
    settings: dict[str, Any],
) -> None:
    """Write ``tokenizer.json`` and ``meta.json`` beside the ids: ``train`` and ``paths`` by source, and the
    ``settings`` that decide the content."""
    tokenizer.save(str(folder / "tokenizer.json"))
    meta = {
        "format": FORMAT,
        "dtype": dtype.str,
        "eos_id": eos_id,
        "vocab_size": tokenizer.get_vocab_size(),
        "train": [asdict(totals) for totals in train],
        "val": asdict(val),
        "paths": paths,
        "val_paths": val_paths,
        "settings": settings,
        "python": python_version(),
        "tokenizer_sha256": file_digest(folder / "tokenizer.json"),
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")


def write_token_folder(
    folder: Path, texts: Iterable[list[int]], tokenizer: Tokenizer, eos_id: int, *, source: str
) -> dict[str, int]:
    """Make ``folder`` of lists of ids, each followed by ``eos_id``; every ``HELD_OUT``-th is held out.

    Returns the numbers of tokens by part, ``train`` and ``val``. The folder is there whole or not at all.
    Raises ``UserError`` for fewer than two texts.
    """
    dtype = dtype_of_ids(tokenizer)
    train, val = Totals(), Totals()
    with complete_or_absent(folder) as partial:
        for number, ids in enumerate(texts):
            held = number % HELD_OUT == 0
            with (partial / ("val.bin" if held else "train-0.bin")).open("ab") as file:
                file.write(np.asarray([*ids, eos_id], dtype=dtype).tobytes())
            text = tokenizer.decode(ids, skip_special_tokens=False)
            if held:
                val = val.with_document(len(ids) + 1, text)
            else:
                train = train.with_document(len(ids) + 1, text)
        if not train.tokens or not val.tokens:
            raise UserError(f"{folder}: at least two texts are needed, one of them to hold out.")
        describe(
            partial, tokenizer, dtype=dtype, eos_id=eos_id, train=[train], val=val, paths=[source], val_paths=[],
            settings={"sources": [source]},
        )  # fmt: skip
    return {"train": train.tokens, "val": val.tokens}
