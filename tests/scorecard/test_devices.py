"""I: a device, a dtype, a compiler or memory that is not there is one clear line, or a fallback that is documented."""

import subprocess
import sys

import pytest

from ..conftest import tiny_options
from ..runs import environment

PROGRAM = """
import sys
{before}
from bitnet.__main__ import main
sys.exit(main(sys.argv[1:]))
"""
NO_TRITON = "sys.modules['triton'] = None"


def command(*arguments: str, before: str = "", **more: str) -> subprocess.CompletedProcess[str]:
    """``bitnet ARGUMENTS`` in a process of its own; ``before`` is Python that runs there first."""
    return subprocess.run(
        [sys.executable, "-c", PROGRAM.format(before=before), *arguments],
        env=environment(CUDA_VISIBLE_DEVICES="", **more),
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.check(
    "I4", "no CUDA, no Triton, no compiler, bad precision, bad threads, no memory: a clear line or a fallback", 9
)
def test_device_faults(stories, finished_run, tmp_path, tally) -> None:
    fit = tiny_options(stories, tmp_path / "run")
    refused = {
        "no CUDA, training": ([*fit, "--trainer.accelerator=cuda"], "the accelerator is not available"),
        "no CUDA, serving": (["bench", "decode", str(finished_run), "--device", "cuda"], "--device cuda: must be cpu"),
        "bad precision": ([*fit, "--trainer.precision=17"], "trainer.precision"),
        "bad dtype": (["pack", str(finished_run), "--out", str(tmp_path / "p"), "--head", "float17"], "float17"),
        "bad threads": (["bench", "decode", str(finished_run), "--threads", "0"], "'0' is not a list of positive"),
        "no memory": ([*fit, "--model.config.dim=4000000"], "out of memory ("),
    }
    for name, (arguments, says) in refused.items():
        done = command(*arguments)
        lines = done.stderr.strip().splitlines()
        good = done.returncode == 2 and len(lines) == 1 and lines[0].startswith("error: ") and says in lines[0]
        tally(good, f"{name}: {done.returncode}, {done.stderr[-500:]}")
    generate = ["generate", str(finished_run), "--prompt", "The", "--max_new_tokens", "8"]
    whole = command(*generate)
    assert whole.returncode == 0, whole.stderr
    without = {
        "no Triton": {"before": NO_TRITON},
        "no compiler": {"PATH": "", "CC": "", "BITNET_CACHE": str(tmp_path / "empty")},
    }
    for name, less in without.items():
        done = command(*generate, **less)
        tally(done.returncode == 0 and done.stdout == whole.stdout, f"{name}: {done.stdout} {done.stderr[-500:]}")
    done = command(*fit, before=NO_TRITON)
    tally(done.returncode == 0, f"training without Triton: {done.stderr[-500:]}")
