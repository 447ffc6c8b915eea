"""A profiled run leaves a trace of a few training steps that other programs read, and says what communication took."""

import json
import re
from types import SimpleNamespace

import pytest
import yaml
from torch.autograd import DeviceType

from bitnet.errors import UserError
from bitnet.training.cli import main as fit
from bitnet.training.profiling import StepProfiler, communication_share, total_length
from bitnet.training.shipped import find_config

from ..conftest import tiny_options
from .test_overlays import command

OVERLAY = ["--config", "overlays/profile"]
SHORT = ["--trainer.profiler.skip=3", "--trainer.profiler.warmup=1", "--trainer.profiler.active=2"]


def trace_of(run, rank: int = 0) -> list[dict]:
    trace = json.loads((run / "profile" / f"rank{rank}.pt.trace.json").read_text())
    return trace["traceEvents"]


def test_a_profiled_run_leaves_a_trace(stories, tmp_path, capsys) -> None:
    run = tmp_path / "run"
    assert fit([*tiny_options(stories, run), *OVERLAY, *SHORT, "--trainer.val_check_interval=8"]) == 0
    assert f"profile: {run}/profile/rank0.pt.trace.json" in "".join(capsys.readouterr().out.split("\n"))
    events = trace_of(run)
    spans = [e for e in events if e.get("ph") == "X"]
    steps = [e for e in spans if e["name"].startswith("ProfilerStep")]
    assert len(steps) == 2 and all(e["dur"] > 0 for e in steps)
    names = [e["name"] for e in spans]
    assert 2 in (names.count("aten::_fused_adamw_"), names.count("Optimizer.step#AdamW.step"))
    assert any("layers.1.attention.wq" in n for n in names) and not any("validation_step" in n for n in names)
    assert (run / "profile" / "fit-operators.txt").read_text().count("aten::") > 5
    figures = json.loads((run / "summary.json").read_text())["figures"]
    assert "perf/communication_share" not in figures, "there is nobody to talk to"


def test_a_profile_changes_no_weight(stories, tmp_path) -> None:
    from bitnet.checkpoint import read_checkpoint, weights_digest

    digests = []
    for name, options in (("plain", []), ("profiled", [*OVERLAY, *SHORT])):
        assert fit([*tiny_options(stories, tmp_path / name), *options]) == 0
        digests.append(weights_digest(read_checkpoint(tmp_path / name)["state_dict"]))
    assert digests[0] == digests[1]


def test_a_run_that_is_too_short_says_so(stories, tmp_path, capsys) -> None:
    assert fit([*tiny_options(stories, tmp_path / "run"), *OVERLAY]) == 0
    assert "profile: nothing, the run had fewer than 25 batches" in capsys.readouterr().out


def test_bad_numbers_are_refused() -> None:
    with pytest.raises(UserError, match="active = 0"):
        StepProfiler(active=0)


def test_the_overlay_keeps_few_steps() -> None:
    settings = yaml.safe_load(find_config("overlays/profile").read_text())["trainer"]["profiler"]["init_args"]
    assert settings["skip"] >= 10 and 1 <= settings["active"] <= 5


def event(name: str, start: float, end: float, device=DeviceType.CPU) -> SimpleNamespace:
    return SimpleNamespace(name=name, time_range=SimpleNamespace(start=start, end=end), device_type=device)


def test_share_by_hand() -> None:
    """Two steps of 100; collectives that overlap count once, and only what lies within the steps."""
    assert total_length([(0, 10), (5, 20), (6, 7), (30, 40)]) == 30
    steps = [event("ProfilerStep#4", 100, 200), event("ProfilerStep#5", 200, 300)]
    host = [event("gloo:all_reduce", 90, 120), event("c10d::allreduce_", 110, 130), event("aten::mm", 130, 290)]
    assert communication_share([*steps, *host]) == pytest.approx(30 / 200)
    kernel = event("ncclDevKernel_AllReduce_Sum_f32_RING_LL", 150, 200, DeviceType.CUDA)
    other = event("ampere_sgemm", 150, 300, DeviceType.CUDA)
    assert communication_share([*steps, *host, kernel, other]) == pytest.approx(50 / 200)
    assert communication_share(steps) == 0.0 == communication_share([])


@pytest.mark.slow
def test_two_processes_say_what_communication_took(stories, tmp_path) -> None:
    run = tmp_path / "run"
    options = ["--config", "overlays/ddp", "--trainer.devices=2", *OVERLAY, *SHORT]
    out = command([*tiny_options(stories, run), *options])
    share = json.loads((run / "summary.json").read_text())["figures"]["perf/communication_share"]
    assert 0.0 < share < 1.0
    assert re.search(rf"collectives  {share:.1%} of the time of the profiled steps", out)
    for rank in (0, 1):
        assert any(e["name"] == "gloo:all_reduce" for e in trace_of(run, rank) if e.get("ph") == "X")
