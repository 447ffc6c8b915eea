"""Batches whose order is a function of two counters, so that the state of a loader is an epoch and a row in it.

Row ``n`` of an epoch (counted over all ranks) is decided by ``(seed, epoch, n)`` alone. A loader that is told "so much
is done" goes on exactly where another one stopped, in the middle of an epoch, whatever happened in between, and with as
many rows a batch, ranks and workers as it likes.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitnet.data.ahead import Feed
from bitnet.data.tokens import UNSAID, validation_rows
from bitnet.loss import IGNORE

Ids = np.ndarray[Any, np.dtype[Any]]

READY = 4
"""Batches that a worker keeps ready."""


def row_count(n_ids: int, seq_len: int) -> int:
    """Full rows of seq_len + 1 ids that advance by seq_len."""
    return max(0, (n_ids - 1) // seq_len)


def make_batch(rows: Tensor, separator: int | None = None) -> dict[str, Tensor]:
    """Rows (B, seq_len + 1) -> inputs and targets, each (B, seq_len); ids with ``UNSAID`` are no targets.

    With a ``separator``, the id behind each document, also document_ids (B, seq_len): the number of the document in its
    row that a token belongs to. The separator is still of the one that it ends.
    """
    read, targets = rows[:, :-1], rows[:, 1:]
    batch = {"inputs": read.clamp(min=0) % UNSAID, "targets": torch.where(targets < UNSAID, targets, IGNORE)}
    if separator is not None:
        ends = (read == separator).long()
        batch["document_ids"] = ends.cumsum(dim=1) - ends
    return batch


class TrainLoader:
    """Shuffled rows of one or more token files, mixed by ``weights``, for one rank of ``world_size``.

    An epoch draws as many rows as the files have together. Without weights each row comes exactly once; with them
    source i supplies its share of the draws, going round and round through its own shuffled rows.
    ``len`` is the number of batches in an epoch; rows that do not fill a batch of all ranks are left to chance.
    With ``workers`` a thread reads the next batches while the trainer computes. ``separator`` as of ``make_batch``.
    """

    def __init__(
        self,
        sources: list[Ids],
        seq_len: int,
        batch_size: int,
        *,
        weights: list[float] | None = None,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        separator: int | None = None,
    ) -> None:
        self.separator = separator
        self.sources, self.seq_len, self.batch_size, self.seed = sources, seq_len, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.counts = [row_count(len(s), seq_len) for s in sources]
        self.rows_per_epoch = sum(self.counts)
        self.draws = _shares(self.counts, weights)
        self.epoch, self.rows_done = 0, 0
        """The epoch, and how many of its rows have been handed to the trainer."""
        self.feed: Feed[dict[str, Tensor]] = Feed(READY if workers else 0)

    @property
    def rows_per_batch(self) -> int:
        return self.batch_size * self.world_size

    def __len__(self) -> int:
        return self.rows_per_epoch // self.rows_per_batch

    def plan(self, epoch: int) -> tuple[Ids, Ids]:
        """``(source, row)`` of every draw of an epoch, in order."""
        source = np.concatenate([np.full(n, i, dtype=np.int64) for i, n in enumerate(self.draws)])
        row = np.concatenate([self._rows_of(i, epoch) for i in range(len(self.sources))])
        order = np.random.default_rng([self.seed, epoch]).permutation(len(source))
        return source[order], row[order]

    def _rows_of(self, source: int, epoch: int) -> Ids:
        """The rows that ``source`` supplies in ``epoch``: draws n, n+1, ... of its endless shuffled sequence."""
        count, draws = self.counts[source], self.draws[source]
        if draws == 0:
            return np.empty(0, dtype=np.int64)
        first = epoch * draws
        rounds = range(first // count, (first + draws - 1) // count + 1)
        endless = np.concatenate([np.random.default_rng([self.seed, source, r]).permutation(count) for r in rounds])
        offset = first - rounds[0] * count
        return endless[offset : offset + draws]

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """The rest of the epoch, or the next one where no batch is left of it."""
        if self.rows_done + self.rows_per_batch > self.rows_per_epoch:
            self.epoch, self.rows_done = self.epoch + 1, 0
        for batch in self.feed.over(self._batches(self.epoch, self.rows_done)):
            self.rows_done += self.rows_per_batch
            yield batch

    def _batches(self, epoch: int, rows_done: int) -> Iterator[dict[str, Tensor]]:
        """This rank's batches behind the first ``rows_done`` rows of an epoch; changes nothing, so may run ahead."""
        source, row = self.plan(epoch)
        for first in range(rows_done, self.rows_per_epoch - self.rows_per_batch + 1, self.rows_per_batch):
            mine = range(first + self.rank * self.batch_size, first + (self.rank + 1) * self.batch_size)
            rows = [self._read(int(source[n]), int(row[n])) for n in mine]
            yield make_batch(torch.from_numpy(np.stack(rows)), self.separator)

    def _read(self, source: int, row: int) -> Ids:
        start = row * self.seq_len
        return self.sources[source][start : start + self.seq_len + 1].astype(np.int64)

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "rows_done": self.rows_done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.feed.close()
        self.epoch, self.rows_done = state.get("epoch", 0), state["rows_done"]
        if "epoch" not in state:  # of an older version, which counted on over all epochs
            self.epoch, self.rows_done = divmod(self.rows_done, len(self) * self.rows_per_batch)


def _shares(counts: list[int], weights: list[float] | None) -> list[int]:
    """Draws of each source in an epoch: all rows, or rows shared out by weight (largest remainders first)."""
    if weights is None:
        return list(counts)
    total = sum(counts)
    exact = [total * w / sum(weights) for w in weights]
    draws = [int(e) for e in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: draws[i] - exact[i])
    for i in by_remainder[: total - sum(draws)]:
        draws[i] += 1
    return draws


class EvalLoader:
    """Every row of a token file in order, the last one padded; ranks take batches in turn.

    All ranks get as many batches, because they compute them together; what is missing in the last round has no targets.
    """

    def __init__(
        self,
        ids: Ids,
        seq_len: int,
        batch_size: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        separator: int | None = None,
    ) -> None:
        self.separator = separator
        self.ids, self.seq_len, self.batch_size = ids, seq_len, batch_size
        self.rank, self.world_size = rank, world_size

    def __len__(self) -> int:
        rows = max(0, -(-(len(self.ids) - 1) // self.seq_len))
        batches = -(-rows // self.batch_size)
        return -(-batches // self.world_size)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        rows: list[Tensor] = []
        number = 0
        for row in validation_rows(self.ids, self.seq_len):
            rows.append(row)
            if len(rows) == self.batch_size:
                if number % self.world_size == self.rank:
                    yield make_batch(torch.stack(rows), self.separator)
                rows, number = [], number + 1
        if rows:
            if number % self.world_size == self.rank:
                yield make_batch(torch.stack(rows), self.separator)
            number += 1
        if number % self.world_size and self.rank >= number % self.world_size:
            yield make_batch(torch.full((1, self.seq_len + 1), UNSAID), self.separator)
