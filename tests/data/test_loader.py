"""Order of rows: every row once an epoch, mixed as asked, and resumed at any point in the same order."""

from collections import Counter

import numpy as np
import pytest
import torch

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


@pytest.mark.parametrize("counts,weights", [([17], None), ([12, 9], [0.3, 0.7])])
def test_resume_at_every_batch_gives_the_same_order(counts, weights) -> None:
    whole = loader(counts, weights=weights)
    order = [b["inputs"] for _ in range(2) for b in whole]
    per_epoch = len(whole)
    for stop in range(2 * per_epoch):
        started = loader(counts, weights=weights)
        seen = []
        while len(seen) < stop:
            for batch in started:
                seen.append(batch["inputs"])
                if len(seen) == stop:
                    break
        resumed = loader(counts, weights=weights)
        resumed.load_state_dict(started.state_dict())
        rest: list[torch.Tensor] = []
        while len(seen) + len(rest) < len(order):
            rest += [b["inputs"] for b in resumed]
        assert torch.equal(torch.stack(seen + rest), torch.stack(order)), stop


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
