"""Batches from a dataset that is read as it comes: larger than the disk, or endless, with exact resume.

Documents are tokenized on the fly and cut into rows as in ``tokens.py``. Rows are gathered into blocks; a block is
shuffled by ``(seed, block number)`` and handed out. The state is where the block began: the dataset's own position,
the ids left over from the row before, and how many rows of the block are done. To resume, the block is made again.

With ``workers`` a thread makes the next block while this one is handed out, and tokenizes that many chunks of text at a
time. Reading, tokenizing and shuffling know nothing of the state; it follows the rows that the trainer has received.
"""

import json
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from bitnet.data.ahead import Feed
from bitnet.data.corpora import BUILTIN, HUGGING_FACE, Reading, list_files, load_hugging_face, read_documents, text_of
from bitnet.data.loader import Ids, make_batch
from bitnet.errors import UserError

CHUNK = 1 << 18
"""Characters of text that are tokenized in one call, and after which the position of the stream is noted."""


def _file_documents(files: list[Any], reading: Reading) -> Iterator[dict[str, str]]:
    for file in files:
        for document in read_documents(file, reading):
            yield {reading.text_key: document}


def open_streams(paths: list[str], reading: Reading) -> list[Any]:
    """A ``datasets.IterableDataset`` for each source; its own state tells how far it has been read."""
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
    return streams


def interleave(streams: list[Any], weights: list[float] | None, seed: int) -> Any:
    """One stream of all, until each has ended once; those that end before the others begin again."""
    import datasets

    if len(streams) == 1:
        return streams[0]
    total = sum(weights) if weights else len(streams)
    probabilities = [w / total for w in weights] if weights else None
    return datasets.interleave_datasets(streams, probabilities, seed=seed, stopping_strategy="all_exhausted")


def take_head(
    dataset: Any, path: str, text_key: str, val_bytes: int, sample_bytes: int
) -> tuple[list[str], list[str], int]:
    """From the start of a stream: documents to validate on, a sample for a tokenizer, and records before that sample.

    Raises ``UserError``, which names ``path``, when the stream ends before there is anything left to train on.
    """
    val: list[str] = []
    sample: list[str] = []
    val_size = sample_size = records = 0
    for record in dataset:
        text = text_of(record, text_key, path)
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
        raise UserError(
            f"data.path: {path}: the stream ends with the documents of its first {val_bytes} bytes, which are held "
            "out; give data.val_path, or lower data.stream_val_bytes."
        )
    return val, sample, records


@dataclass(frozen=True)
class Place:
    """Where a block begins."""

    block: int
    passes: int
    """How often the stream has ended before."""
    position: Any
    """The dataset's own state; None at its beginning."""
    leftover: Ids
    """Ids that were read already and belong to this block and those after it."""


@dataclass(frozen=True)
class _Texts:
    """Documents that come one after another, and where the stream stands behind them."""

    documents: list[str]
    passes: int
    position: Any


class StreamLoader:
    """Endless batches of ``batch_size`` rows for one rank; ``length`` is what the trainer takes for an epoch.

    A run keeps the size of the blocks that it began with, so that the order of rows stays the same when it goes on with
    another number of rows a batch.
    """

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
        workers: int = 0,
        separator: int | None = None,
    ) -> None:
        self.separator = separator
        self.stream, self.tokenizer, self.eos_id = dataset, tokenizer, eos_id
        self.seq_len, self.batch_size, self.text_key = seq_len, batch_size, text_key
        self.length, self.seed = length, seed
        self.rank, self.world_size, self.workers = rank, world_size, workers
        self.block_rows = block_batches * batch_size * world_size
        self._place = Place(0, 0, None, np.empty(0, dtype=np.int32))
        self._rows_done = 0
        self.feed: Feed[tuple[Ids, Place]] = Feed(1 if workers else 0)

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        per_batch = self.batch_size * self.world_size
        blocks = self.feed.over(self._blocks(self._place))
        rows: Ids | None = None
        while True:
            parts: list[Ids] = []
            missing = per_batch
            while missing:  # a batch lies in two blocks where a run goes on with another number of rows a batch
                if rows is None:
                    if (block := next(blocks, None)) is None:
                        return  # closed
                    rows, after = block
                parts.append(rows[self._rows_done : self._rows_done + missing])
                missing -= len(parts[-1])
                self._rows_done += len(parts[-1])
                if self._rows_done >= len(rows):
                    self._place, self._rows_done, rows = after, 0, None
            mine = np.concatenate(parts)[self.rank * self.batch_size : (self.rank + 1) * self.batch_size]
            yield make_batch(torch.from_numpy(mine.astype(np.int64)), self.separator)

    def _blocks(self, place: Place) -> Iterator[tuple[Ids, Place]]:
        """Shuffled rows (R, seq_len + 1) of one block after another, each with the place behind it."""
        wanted = self.block_rows * self.seq_len + 1
        encoded = self._encoded(place)
        while True:
            parts, passes, position = [place.leftover], place.passes, place.position
            found = len(place.leftover)
            while found < wanted:
                ids, passes, position = next(encoded)
                parts.append(ids)
                found += len(ids)
            ids = np.concatenate(parts)
            rows = np.lib.stride_tricks.sliding_window_view(ids[:wanted], self.seq_len + 1)[:: self.seq_len]
            order = np.random.default_rng([self.seed, place.block]).permutation(len(rows))
            place = Place(place.block + 1, passes, position, ids[wanted - 1 :].copy())
            yield rows[order], place

    def _encoded(self, place: Place) -> Iterator[tuple[Ids, int, Any]]:
        """Ids of one chunk of documents after another, with passes and position behind it."""
        if self.workers < 2:
            yield from map(self._encode, self._chunks(place))
            return
        pending: deque[Future[tuple[Ids, int, Any]]] = deque()
        with ThreadPoolExecutor(self.workers, thread_name_prefix="bitnet-tokenize") as pool:
            try:
                for texts in self._chunks(place):
                    pending.append(pool.submit(self._encode, texts))
                    if len(pending) > self.workers:
                        yield pending.popleft().result()
            except UserError:  # comes in its turn: behind what was read before it
                while pending:
                    yield pending.popleft().result()
                raise

    def _encode(self, texts: _Texts) -> tuple[Ids, int, Any]:
        """``encode`` would keep all other threads waiting; ``encode_batch_fast`` does not, and gives the same ids."""
        parts = []
        for encoding in self.tokenizer.encode_batch_fast(texts.documents, add_special_tokens=False):
            parts += [np.asarray(encoding.ids, dtype=np.int32), np.asarray([self.eos_id], dtype=np.int32)]
        return np.concatenate(parts), texts.passes, texts.position

    def _chunks(self, place: Place) -> Iterator[_Texts]:
        """The documents of the stream from ``place`` on, round and round."""
        limit = min(CHUNK, self.block_rows * self.seq_len)  # what is read beyond a block goes into the checkpoint
        passes, barren = place.passes, 0
        self.stream.set_epoch(passes)  # a position is taken up only in the epoch that it belongs to
        if place.position is not None:
            self.stream.load_state_dict(place.position)
        while barren < 2:  # the first may have been resumed at its very end
            barren += 1
            documents: list[str] = []
            size = 0
            for record in self.stream:
                text = text_of(record, self.text_key, "data.path")
                if text.strip():
                    documents.append(text)
                    size += len(text)
                if size >= limit:
                    yield _Texts(documents, passes, self.stream.state_dict())
                    documents, size, barren = [], 0, 0
            passes += 1
            if documents:
                yield _Texts(documents, passes, None)
                barren = 0
            self.stream.set_epoch(passes)
        raise UserError("data.path: the stream has no text in it.")

    def state_dict(self) -> dict[str, Any]:
        """Plain values only: the position is JSON text, since a checkpoint holds no objects."""
        return {
            "block": self._place.block,
            "block_rows": self.block_rows,
            "rows_done": self._rows_done,
            "passes": self._place.passes,
            "leftover": torch.from_numpy(self._place.leftover),
            "position": json.dumps(self._place.position),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.feed.close()
        leftover = state["leftover"].numpy().astype(np.int32)
        self._place = Place(state["block"], state["passes"], json.loads(state["position"]), leftover)
        if "batches_done" in state:  # of an older version, which could not go on with other rows a batch
            self._rows_done = state["batches_done"] * self.batch_size * self.world_size
        else:
            self._rows_done, self.block_rows = state["rows_done"], state["block_rows"]
