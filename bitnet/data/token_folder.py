"""Writing a token folder (layout in ``tokens.py``) from lists of ids that no text was tokenized to."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from bitnet.data.corpora import python_version
from bitnet.data.tokens import FORMAT, Totals, file_digest
from bitnet.errors import UserError

HELD_OUT = 20
"""One text in so many is held out."""


def write_token_folder(
    folder: Path, texts: Iterable[list[int]], tokenizer: Tokenizer, eos_id: int, *, source: str
) -> dict[str, int]:
    """Make ``folder`` of ``texts``, each followed by ``eos_id``; every ``HELD_OUT``-th is held out.

    Returns the numbers of tokens by part, ``train`` and ``val``. The folder is there whole or not at all.
    Raises ``UserError`` for fewer than two texts.
    """
    dtype = np.dtype("<u2" if tokenizer.get_vocab_size() <= 1 << 16 else "<u4")
    totals = {"train": Totals(), "val": Totals()}
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        for number, ids in enumerate(texts):
            part = "val" if number % HELD_OUT == 0 else "train"
            with (partial / ("val.bin" if part == "val" else "train-0.bin")).open("ab") as file:
                file.write(np.asarray([*ids, eos_id], dtype=dtype).tobytes())
            text = tokenizer.decode(ids, skip_special_tokens=False)
            totals[part] = totals[part].with_document(len(ids) + 1, text)
        if not totals["train"].tokens or not totals["val"].tokens:
            raise UserError(f"{folder}: at least two texts are needed, one of them to hold out.")
        meta = {
            "format": FORMAT,
            "dtype": dtype.str,
            "eos_id": eos_id,
            "vocab_size": tokenizer.get_vocab_size(),
            "train": [asdict(totals["train"])],
            "val": asdict(totals["val"]),
            "paths": [source],
            "val_paths": [],
            "settings": {"sources": [source]},
            "python": python_version(),
        }
        tokenizer.save(str(partial / "tokenizer.json"))
        meta["tokenizer_sha256"] = file_digest(partial / "tokenizer.json")
        (partial / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
        os.chmod(partial, 0o755)
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return {part: total.tokens for part, total in totals.items()}
