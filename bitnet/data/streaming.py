"""Batches from a dataset that is read as it comes: larger than the disk, or endless, with exact resume.

Documents are tokenized on the fly and cut into rows as in ``tokens.py``. Rows are gathered into blocks; a block is
shuffled by ``(seed, block number)`` and handed out. The state is where the block began: the dataset's own position,
the ids left over from the row before, and how many batches of the block are done. To resume, the block is made again.
"""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from bitnet.data.corpora import BUILTIN, HUGGING_FACE, Reading, list_files, load_hugging_face, read_documents
from bitnet.data.loader import make_batch
from bitnet.errors import UserError


def _file_documents(files: list[Any], reading: Reading) -> Iterator[dict[str, str]]:
    for file in files:
        for document in read_documents(file, reading):
            yield {reading.text_key: document}


def open_stream(paths: list[str], weights: list[float] | None, reading: Reading, seed: int) -> Any:
    """A ``datasets.IterableDataset`` over all sources; its own state tells how far it has been read."""
    import datasets

    streams = []
    for path in paths:
        if path.startswith(HUGGING_FACE):
            streams.append(load_hugging_face(path, reading, streaming=True))
        elif path == BUILTIN:
            raise UserError("data.streaming needs data.path: the built-in text is not streamed.")
        else:
            arguments = {"files": list_files(path), "reading": reading}
            streams.append(datasets.IterableDataset.from_generator(_file_documents, gen_kwargs=arguments))
    if len(streams) == 1:
        return streams[0]
    total = sum(weights) if weights else len(streams)
    probabilities = [w / total for w in weights] if weights else None
    return datasets.interleave_datasets(streams, probabilities, seed=seed, stopping_strategy="all_exhausted")


def take_head(dataset: Any, text_key: str, val_bytes: int, sample_bytes: int) -> tuple[list[str], list[str], int]:
    """From the start of a stream: documents to validate on, a sample for a tokenizer, and how many records they are.

    Raises ``UserError`` when the stream ends before there is anything left to train on.
    """
    val: list[str] = []
    sample: list[str] = []
    val_size = sample_size = records = 0
    for record in dataset:
        text = record[text_key] or ""
        if val_size < val_bytes:
            records += 1
            if text.strip():
                val.append(text)
                val_size += len(text.encode())
        elif text.strip():
            sample.append(text)
            sample_size += len(text.encode())
            if sample_size >= sample_bytes:
                break
    if not sample:
        raise UserError(f"data.path: the stream ends within the first {val_bytes} bytes, which are held out.")
    return val, sample, records


class StreamLoader:
    """Endless batches of ``batch_size`` rows for one rank; ``length`` is what the trainer takes for an epoch."""

    def __init__(
        self,
        dataset: Any,
        tokenizer: Tokenizer,
        eos_id: int,
        seq_len: int,
        batch_size: int,
        *,
        text_key: str,
        block_batches: int,
        length: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.stream, self.tokenizer, self.eos_id = dataset, tokenizer, eos_id
        self.seq_len, self.batch_size, self.text_key = seq_len, batch_size, text_key
        self.block_batches, self.length, self.seed = block_batches, length, seed
        self.rank, self.world_size = rank, world_size
        self._block, self._passes, self._batches_done = 0, 0, 0
        self._leftover: list[int] = []
        self._position: Any = None

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        if self._position is not None:
            self.stream.set_epoch(self._passes)  # a position is taken up only in the epoch that it belongs to
            self.stream.load_state_dict(self._position)
        documents = iter(self.stream)
        while True:
            rows, documents, after = self._next_block(documents)
            order = np.random.default_rng([self.seed, self._block]).permutation(len(rows))
            per_batch = self.batch_size * self.world_size
            while self._batches_done < self.block_batches:
                first = self._batches_done * per_batch + self.rank * self.batch_size
                chosen = order[first : first + self.batch_size]
                self._batches_done += 1
                yield make_batch(torch.from_numpy(rows[chosen]))
            self._position, self._leftover, self._passes = after
            self._block, self._batches_done = self._block + 1, 0

    def _next_block(self, documents: Iterator[Any]) -> tuple[Any, Iterator[Any], tuple[Any, list[int], int]]:
        """Rows of one block (R, seq_len + 1), the iterator to go on with, and the state behind the block."""
        wanted = self.block_batches * self.batch_size * self.world_size * self.seq_len + 1
        ids, passes, fruitless = list(self._leftover), self._passes, False
        while len(ids) < wanted:
            record = next(documents, None)
            if record is None:
                if fruitless:
                    raise UserError("data.path: the stream has no text in it.")
                fruitless, passes = True, passes + 1
                self.stream.set_epoch(passes)
                documents = iter(self.stream)
                continue
            text = record[self.text_key]
            if text and text.strip():
                fruitless = False
                ids.extend(self.tokenizer.encode(text, add_special_tokens=False).ids)
                ids.append(self.eos_id)
        tokens = np.asarray(ids[:wanted], dtype=np.int64)
        starts = np.arange(0, wanted - 1, self.seq_len)
        rows = np.stack([tokens[s : s + self.seq_len + 1] for s in starts])
        return rows, documents, (self.stream.state_dict(), ids[wanted - 1 :], passes)

    def state_dict(self) -> dict[str, Any]:
        """Plain values only: the position is JSON text, since a checkpoint holds no objects."""
        return {
            "block": self._block,
            "batches_done": self._batches_done,
            "passes": self._passes,
            "leftover": torch.tensor(self._leftover, dtype=torch.int64),
            "position": json.dumps(self._position),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._block, self._batches_done, self._passes = state["block"], state["batches_done"], state["passes"]
        self._leftover = state["leftover"].tolist()
        self._position = json.loads(state["position"])
