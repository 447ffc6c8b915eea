"""What ``perf/`` says: tokens of those who see rows of their own, time with the wait for batches, memory in use."""

import resource
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy, SingleDeviceStrategy
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bitnet.config import ModelConfig
from bitnet.data.loader import TrainLoader
from bitnet.estimate import flops_per_token
from bitnet.training import speed
from bitnet.training.speed import Speed
from bitnet.training.strategies import data_parallel_size


def figures_of(run: Path) -> dict[str, list[float]]:
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [e.value for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_figures_of_a_run_on_a_cpu(finished_run) -> None:
    figures = figures_of(finished_run)
    assert figures["perf/tokens_per_s_per_device"] == figures["perf/tokens_per_s"]
    assert all(0.0 <= share <= 1.0 for share in figures["perf/loader_share"])
    now = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    assert all(0.05 < value <= now * 1.001 for value in figures["perf/memory_gb"])
    assert "perf/mfu" not in figures, "nobody knows the peak of this CPU"


def test_the_wait_for_batches_is_part_of_the_time(stories, tmp_path, run_fit, monkeypatch) -> None:
    """Batches that take 200 ms to read: no step is faster, and on a busy machine too they are most of the time."""
    original = TrainLoader._read
    monkeypatch.setattr(TrainLoader, "_read", lambda self, *a: time.sleep(0.05) or original(self, *a))
    run_fit(stories, tmp_path / "run", "--trainer.val_check_interval=12")
    figures = figures_of(tmp_path / "run")
    assert figures["perf/loader_share"][1] > 0.5
    assert max(figures["perf/tokens_per_s"]) < 4 * 32 / 0.2


def test_waiting_is_counted_once(monkeypatch) -> None:
    """Ten steps of 1 s with 3 s of waiting in all, then five with 5 s: 130 and 100 tokens per second."""
    now = [0.0]
    monkeypatch.setattr(speed.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(speed, "peak_flops", lambda device: 1e6)
    feed = SimpleNamespace(waited=0.0)
    config = ModelConfig(vocab_size=97, dim=32, n_layers=2, n_heads=4, ffn_dim=48, max_seq_len=16)
    strategy = SingleDeviceStrategy()
    loader = SimpleNamespace(feed=feed)
    trainer = SimpleNamespace(train_dataloader=loader, strategy=strategy, world_size=1, distributed_sampler_kwargs=None)
    module = SimpleNamespace(config=config, data=SimpleNamespace(seq_len=16), device=torch.device("cpu"))
    clock = Speed()
    for steps, waited, tokens, speed_expected in ((10, 3.0, 169, 130.0), (5, 5.0, 200, 100.0)):
        for _ in range(steps):
            feed.waited += waited / steps
            now[0] += waited / steps
            clock.start()
            now[0] += 1.0
            clock.stop(tokens)
        now[0] += 100.0  # validation
        found = clock.figures(trainer, module)
        assert found["perf/tokens_per_s"] == pytest.approx(speed_expected)
        assert found["perf/loader_share"] == pytest.approx(waited / (steps + waited))
        assert found["perf/mfu"] == pytest.approx(speed_expected * flops_per_token(config, 16) / 1e6)


def test_processes_that_share_a_row_count_it_once() -> None:
    """Eight processes, four of which share each row."""
    mesh = {"data_parallel": SimpleNamespace(size=lambda: 2, get_local_rank=lambda: 1)}
    sharing = ModelParallelStrategy.__new__(ModelParallelStrategy)
    sharing._device_mesh = mesh
    assert data_parallel_size(SimpleNamespace(distributed_sampler_kwargs=sharing.distributed_sampler_kwargs)) == 2
    assert data_parallel_size(SimpleNamespace(distributed_sampler_kwargs=None)) == 1


@pytest.mark.parametrize(
    "name, peak", [("NVIDIA H200", 989e12), ("NVIDIA H100 80GB HBM3", 989.5e12), ("Unheard-of 9", None)]
)
def test_the_peak_of_a_gpu_or_no_word_about_it(name: str, peak: float | None, monkeypatch) -> None:
    """Of the data sheet; a warning would fail this test."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
    found = speed.peak_flops(torch.device("cuda:0"))
    assert found == peak if peak is None else found == pytest.approx(peak, rel=1e-3)
