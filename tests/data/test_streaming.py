"""Streams: the same rows as the text, shuffled in blocks, resumed exactly at every batch."""

import json
from pathlib import Path

import pytest
import torch

from bitnet.data.corpora import Reading
from bitnet.data.streaming import StreamLoader, open_stream, take_head
from bitnet.data.tokenizer import train_tokenizer
from bitnet.errors import UserError

from ..conftest import story_text


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """Three .jsonl shards of documents."""
    folder = tmp_path_factory.mktemp("shards")
    for shard in range(3):
        documents = story_text(8, seed=shard).split("\n<|endoftext|>\n")
        lines = [json.dumps({"text": f"{shard} {i} {d}"}) for i, d in enumerate(documents)]
        (folder / f"part-{shard}.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([story_text(10)], 300)


def stream(paths: list[str], tokenizer, weights=None, **options) -> StreamLoader:
    dataset = open_stream(paths, weights, Reading(), seed=0)
    settings = {"text_key": "text", "block_batches": 3, "length": 10**9, **options}
    return StreamLoader(dataset, tokenizer, 0, 16, 2, **settings)


def take(loader: StreamLoader, n: int) -> list[torch.Tensor]:
    rows = []
    for batch in loader:
        rows.append(torch.cat([batch["inputs"], batch["targets"][:, -1:]], dim=1))
        if len(rows) == n:
            break
    return rows


@pytest.mark.parametrize("prefix", ["", "hf:"])
def test_a_pass_holds_the_whole_text_in_shuffled_blocks(shards, tokenizer, prefix) -> None:
    text_ids: list[int] = []
    for shard in range(3):
        for line in (shards / f"part-{shard}.jsonl").read_text().split("\n"):
            text_ids += [*tokenizer.encode(json.loads(line)["text"]).ids, 0]
    rows = torch.cat(take(stream([f"{prefix}{shards}"], tokenizer), 30))
    expected = torch.tensor([text_ids[i : i + 17] for i in range(0, 60 * 16, 16)])
    assert not torch.equal(rows, expected)
    for block in range(10):  # 3 batches of 2 rows
        ours, theirs = (sorted(r[6 * block : 6 * block + 6].tolist()) for r in (rows, expected))
        assert ours == theirs


@pytest.mark.parametrize("mix", [False, True])
def test_resume_at_every_batch_is_exact_over_several_passes(shards, tokenizer, tmp_path, mix) -> None:
    (tmp_path / "other.txt").write_text(story_text(5, seed=9))
    paths, weights = ([str(shards), str(tmp_path)], [0.7, 0.3]) if mix else ([f"hf:{shards}"], None)
    total = 260  # more than two passes
    order = take(stream(paths, tokenizer, weights), total)
    for stop in (*range(1, 9), 57, 113, 114, 115, 200, 259):
        started = stream(paths, tokenizer, weights)
        seen = take(started, stop)
        saved = started.state_dict()
        assert isinstance(saved["position"], str) and isinstance(saved["leftover"], torch.Tensor)
        resumed = stream(paths, tokenizer, weights)
        resumed.load_state_dict(saved)
        rest = take(resumed, total - stop)
        assert torch.equal(torch.stack(seen + rest), torch.stack(order)), stop


def test_ranks_share_the_batches_of_one_process(shards, tokenizer) -> None:
    dataset = open_stream([str(shards)], None, Reading(), seed=0)
    alone = StreamLoader(dataset, tokenizer, 0, 16, 4, text_key="text", block_batches=3, length=99)
    ranks = [take(stream([str(shards)], tokenizer, rank=r, world_size=2), 9) for r in (0, 1)]
    together = [torch.cat(pair) for pair in zip(*ranks, strict=True)]
    assert torch.equal(torch.stack(together), torch.stack(take(alone, 9)))


def test_head_is_held_out(shards) -> None:
    dataset = open_stream([str(shards)], None, Reading(), seed=0)
    val, sample, records = take_head(dataset, "text", 1000, 2000)
    assert records == len(val) and sum(len(v) for v in val) >= 1000 > sum(len(v) for v in val[:-1])
    assert next(iter(dataset.skip(records)))["text"] == sample[0]
    with pytest.raises(UserError, match="ends within the first"):
        take_head(dataset, "text", 10**9, 1)
