"""Streams: the same rows as the text, shuffled in blocks, resumed exactly at every batch."""

import itertools
import json
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bitnet.data.corpora import Reading
from bitnet.data.datamodule import TokenDataModule
from bitnet.data.streaming import StreamLoader, interleave, open_streams, take_head
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


def stream(paths: list[str], tokenizer, weights=None, rows=2, **options) -> StreamLoader:
    dataset = interleave(open_streams(paths, Reading()), weights, seed=0)
    settings = {"text_key": "text", "block_batches": 3, "length": 10**9, **options}
    return StreamLoader(dataset, tokenizer, 0, 16, rows, **settings)


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
    (dataset,) = open_streams([str(shards)], Reading())
    alone = StreamLoader(dataset, tokenizer, 0, 16, 4, text_key="text", block_batches=3, length=99)
    ranks = [take(stream([str(shards)], tokenizer, rank=r, world_size=2), 9) for r in (0, 1)]
    together = [torch.cat(pair) for pair in zip(*ranks, strict=True)]
    assert torch.equal(torch.stack(together), torch.stack(take(alone, 9)))


def test_head_is_held_out(shards) -> None:
    (dataset,) = open_streams([str(shards)], Reading())
    val, sample, records = take_head(dataset, "shards", "text", 1000, 2000)
    assert records == len(val) and sum(len(v) for v in val) >= 1000 > sum(len(v) for v in val[:-1])
    assert next(iter(dataset.skip(records)))["text"] == sample[0]
    with pytest.raises(UserError, match="shards: the stream ends with the documents of its first 1000000000 bytes"):
        take_head(dataset, "shards", "text", 10**9, 1)


@pytest.mark.parametrize("weights", [None, [0.5, 0.5]])
def test_what_is_held_out_of_several_streams_is_never_trained_on(tmp_path, weights) -> None:
    """Each has lines of its own; the small one begins again four times within a pass of the large one."""
    for name, lines in (("large", 160), ("small", 40)):
        documents = [json.dumps({"text": f"{name} document {i} of the stream, held out or not."}) for i in range(lines)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(documents))
    paths = [str(tmp_path / "large.jsonl"), str(tmp_path / "small.jsonl")]
    data = TokenDataModule(
        paths, weights=weights, streaming=True, stream_val_bytes=1000, stream_block=2, seq_len=32, batch_size=2,
        vocab_size=300, cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip
    data.trainer = SimpleNamespace(max_steps=9, accumulate_grad_batches=1, distributed_sampler_kwargs=None)
    store = data.prepare_tokens()
    decode = store.tokenizer.decode
    held = decode(store.ids("val").tolist(), skip_special_tokens=False).split("<|endoftext|>")
    assert sum("large" in d for d in held) > 5 and sum("small" in d for d in held) > 5
    loader, trained = data.train_dataloader(), []
    for ids, passes, _ in loader._encoded(loader._place):
        if passes > 1:
            break
        trained += decode(ids.tolist(), skip_special_tokens=False).split("<|endoftext|>")
    assert len(set(trained)) > 150 and not set(filter(None, held)) & set(trained)


@pytest.mark.parametrize("chunk", [1, 600, 1 << 18])
def test_resume_is_exact_with_any_workers_before_and_after(shards, tokenizer, tmp_path, monkeypatch, chunk) -> None:
    """Stops at every kind of place; what a worker has made ready and nobody has read is made again."""
    monkeypatch.setattr("bitnet.data.streaming.CHUNK", chunk)
    (tmp_path / "other.txt").write_text(story_text(5, seed=9))
    paths, weights = [str(shards), str(tmp_path)], [0.7, 0.3]
    total = 150
    order = torch.stack(take(stream(paths, tokenizer, weights), total))
    for (before, after), stop in zip(
        itertools.product((0, 1, 4), repeat=2), (1, 3, 4, 56, 57, 58, 113, 120, 149), strict=True
    ):
        started = stream(paths, tokenizer, weights, workers=before)
        seen = take(started, stop)
        resumed = stream(paths, tokenizer, weights, workers=after)
        resumed.load_state_dict(started.state_dict())
        rest = take(resumed, total - stop)
        assert torch.equal(torch.stack(seen + rest), order), (before, after, stop)
        started.feed.close()
        resumed.feed.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("bitnet")]


def together(paths, tokenizer, state, batches: int, ranks: int, rows: int, **options) -> tuple[torch.Tensor, dict]:
    """Rows of ``batches`` batches of all ranks in their order, and the state that rank 0 would save."""
    loaders = [stream(paths, tokenizer, rows=rows, rank=r, world_size=ranks, **options) for r in range(ranks)]
    for loader in loaders if state else ():
        loader.load_state_dict(state)
    batches_of = [take(loader, batches) for loader in loaders]
    states = [loader.state_dict() for loader in loaders]
    assert all(str(s) == str(states[0]) for s in states)
    return torch.cat([part for parts in zip(*batches_of, strict=True) for part in parts]), states[0]


@pytest.mark.parametrize("per_step", [(8, 8, 8), (8, 4, 12), (2, 8, 5)])
def test_another_number_of_ranks_or_rows_goes_on_with_the_next_row(shards, tokenizer, per_step) -> None:
    """2 ranks, then 1, then 4 (or 1): the rows of one process that was never stopped, also within a block of 24."""
    paths = [str(shards)]
    parts, state = [], None
    for rows_per_step, ranks, batches in zip(per_step, (2, 1, 1 if per_step[2] % 4 else 4), (5, 10, 11), strict=True):
        options = {"block_batches": 24 // per_step[0]}
        part, state = together(paths, tokenizer, state, batches, ranks, rows_per_step // ranks, **options)
        parts.append(part)
    rows = torch.cat(parts)
    alone = torch.cat(take(stream(paths, tokenizer, rows=1, block_batches=24), len(rows)))
    assert torch.equal(rows, alone)


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_an_error_in_the_text_arrives_where_its_rows_would(shards, tokenizer, tmp_path, workers) -> None:
    (tmp_path / "a.jsonl").write_text((shards / "part-0.jsonl").read_text())
    (tmp_path / "b.jsonl").write_text("{broken")
    loader = stream([str(tmp_path)], tokenizer, workers=workers)
    seen: list[torch.Tensor] = []
    with pytest.raises(UserError, match=r"b\.jsonl: line 1 is not JSON"):
        for batch in loader:
            seen.append(batch["inputs"])
    whole = take(stream([str(shards)], tokenizer), len(seen))
    assert len(seen) >= 30 and torch.equal(torch.stack(seen), torch.stack(whole)[..., :-1])


def test_a_stream_without_text_says_so(tokenizer, tmp_path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": " "}')
    for workers in (0, 2):
        with pytest.raises(UserError, match="no text in it"):
            take(stream([str(tmp_path)], tokenizer, workers=workers), 1)


def test_state_of_an_older_version_is_taken_up(shards, tokenizer) -> None:
    order = take(stream([str(shards)], tokenizer), 9)
    loader = stream([str(shards)], tokenizer)
    take(loader, 5)
    state = loader.state_dict()
    old = {
        "block": 1,
        "batches_done": 2,
        "passes": 0,
        "leftover": state["leftover"].long(),
        "position": state["position"],
    }
    resumed = stream([str(shards)], tokenizer)
    resumed.load_state_dict(old)
    assert torch.equal(torch.stack(take(resumed, 4)), torch.stack(order[5:]))
