"""Order of rows: every row once an epoch, mixed as asked, and resumed at any point in the same order."""

import gc
import itertools
import threading
import time
from collections import Counter

import numpy as np
import pytest
import torch

from bitnet.data.ahead import Ahead, Feed
from bitnet.data.loader import EvalLoader, TrainLoader
from bitnet.loss import IGNORE


def loader(counts: list[int], batch_size: int = 3, seq_len: int = 4, **options) -> TrainLoader:
    """Source i, row r begins with the id 1000 i + seq_len r, so that a row can be recognised."""
    sources = [np.arange(1000 * i, 1000 * i + n * seq_len + 1, dtype=np.uint16) for i, n in enumerate(counts)]
    return TrainLoader(sources, seq_len, batch_size, **options)


def first_ids(batches) -> list[int]:
    return [int(i) for b in batches for i in b["inputs"][:, 0]]


def test_rows_overlap_by_one_and_targets_are_the_next_ids() -> None:
    batch = next(iter(loader([5])))
    assert batch["inputs"].shape == batch["targets"].shape == (3, 4)
    assert torch.equal(batch["inputs"] + 1, batch["targets"])
    assert batch["inputs"].dtype == torch.int64


def test_an_epoch_has_each_row_once_and_epochs_differ() -> None:
    data = loader([30])
    epochs = [first_ids(data) for _ in range(3)]
    assert len(data) == 10
    assert all(sorted(e) == list(range(0, 120, 4)) for e in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != sorted(epochs[0])
    assert first_ids(loader([30])) == epochs[0] and first_ids(loader([30], seed=1)) != epochs[0]


@pytest.mark.parametrize("geometry", [((2, 4), (1, 8), (4, 2)), ((2, 4), (1, 3), (2, 5))])
def test_another_number_of_ranks_or_rows_goes_on_with_the_next_row(geometry) -> None:
    """Five batches with each of (ranks, rows a rank): the order of one process, within an epoch of 107 rows."""
    state, rows = {"epoch": 0, "rows_done": 0}, []
    for ranks, batch_size in geometry:
        loaders = [loader([107], batch_size, rank=r, world_size=ranks) for r in range(ranks)]
        for data in loaders:
            data.load_state_dict(state)
        for batches in itertools.islice(zip(*loaders, strict=True), 4):
            rows += first_ids(batches)
        states = [data.state_dict() for data in loaders]
        assert all(s == states[0] for s in states)
        state = states[0]
    assert rows == first_ids(loader([107], 1))[: len(rows)] and len(rows) == sum(4 * r * b for r, b in geometry)
    last = loader([107], 8)
    last.load_state_dict(state)
    first_ids(last)  # what is left of this epoch
    assert first_ids(last)[:5] == [*first_ids(loader([107], 107)), *first_ids(_second_epoch())][107:112]


def _second_epoch() -> TrainLoader:
    data = loader([107], 1)
    data.load_state_dict({"epoch": 1, "rows_done": 0})
    return data


def test_state_of_an_older_version_is_taken_up() -> None:
    data = loader([30])  # 10 batches of 3 an epoch
    first_ids(data)
    expected = first_ids(data)
    old = loader([30])
    old.load_state_dict({"rows_done": 42})
    assert first_ids(old) == expected[12:]


def test_a_worker_ends_with_its_loader_and_passes_errors_on() -> None:
    data = loader([40], workers=1)
    iterator = iter(data)
    next(iterator)
    assert any(t.name == "bitnet-ahead" for t in threading.enumerate())
    del data, iterator
    gc.collect()
    assert not any(t.name == "bitnet-ahead" for t in threading.enumerate())

    def failing():
        yield 1
        raise KeyError("two")

    items = Ahead(failing(), 3)
    assert next(items) == 1
    with pytest.raises(KeyError, match="two"):
        next(items)
    with pytest.raises(StopIteration):
        next(items)


def test_a_worker_is_ahead_by_no_more_than_it_may() -> None:
    made, before = [], threading.active_count()

    def items():
        for i in range(100):
            made.append(i)
            yield i

    feed = Feed(3)
    reader = feed.over(items())
    assert next(reader) == 0
    deadline = time.monotonic() + 5
    while len(made) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)
    assert made == [0, 1, 2, 3, 4]  # one read, three ready, one in hand
    feed.close()
    assert list(reader) == [] and threading.active_count() == before


@pytest.mark.parametrize("depth", [0, 2])
def test_waiting_is_counted(depth) -> None:
    """Ten items of 20 ms, each used for 40 ms: without a thread all of the making is waited for, with one little."""

    def items():
        for i in range(10):
            time.sleep(0.02)
            yield i

    feed = Feed(depth)
    for _ in feed.over(items()):
        time.sleep(0.04)
    assert (feed.waited >= 0.2) if depth == 0 else (0.015 <= feed.waited < 0.15)


def test_weights_decide_the_shares_and_small_sources_go_round() -> None:
    data = loader([90, 10], batch_size=1, weights=[0.5, 0.5])
    drawn = Counter()
    for _ in range(4):
        epoch = first_ids(data)
        assert len(epoch) == 100 and sum(i >= 1000 for i in epoch) == 50
        drawn.update(i for i in epoch if i >= 1000)
    assert set(drawn.values()) == {20}  # 200 draws of 10 rows: each exactly 20 times
    assert len({i for i in first_ids(data) if i < 1000}) == 50
    assert sum(i >= 1000 for i in first_ids(loader([90, 10], batch_size=1, weights=[1, 0]))) == 0


def test_ranks_share_the_batches_of_one_process() -> None:
    alone = [b["inputs"] for b in loader([24], batch_size=4)]
    ranks = [[b["inputs"] for b in loader([24], batch_size=2, rank=r, world_size=2)] for r in (0, 1)]
    together = [torch.cat(pair) for pair in zip(*ranks, strict=True)]
    assert torch.equal(torch.stack(together), torch.stack(alone))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_covers_every_target_once(world_size) -> None:
    ids = np.arange(1, 40, dtype=np.uint16)
    targets = []
    for rank in range(world_size):
        data = EvalLoader(ids, 4, 3, rank=rank, world_size=world_size)
        batches = list(data)
        assert len(batches) == len(data)
        targets += [int(t) for b in batches for t in b["targets"].flatten() if t != IGNORE]
        assert all(b["inputs"].min() >= 0 for b in batches)
    assert sorted(targets) == list(range(2, 40))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
def test_all_ranks_validate_equally_often_and_together_see_every_token_once(world_size) -> None:
    """Ranks compute together (FSDP2 gathers in each forward), so one batch more on one of them would wait for ever."""
    ids = np.arange(1000, 1211, dtype=np.uint16)
    shares = [list(EvalLoader(ids, 10, 4, rank=rank, world_size=world_size)) for rank in range(world_size)]
    lengths = {len(share) for share in shares} | {len(EvalLoader(ids, 10, 4, rank=0, world_size=world_size))}
    assert len(lengths) == 1
    seen = torch.cat([batch["targets"].flatten() for share in shares for batch in share])
    assert sorted(seen[seen >= 0].tolist()) == list(range(1001, 1211))
