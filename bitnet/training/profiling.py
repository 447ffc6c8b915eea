"""A trace of a few training steps: what ran when, on the CPU and the GPU, and how much of that was communication."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.profilers import PyTorchProfiler

from bitnet.errors import UserError
from bitnet.training.progress import say

Span = tuple[float, float]


def total_length(spans: Iterable[Span]) -> float:
    """Time that is covered by at least one of the spans: collectives may overlap."""
    total, end = 0.0, float("-inf")
    for first, last in sorted(spans):
        total += max(0.0, last - max(first, end))
        end = max(end, last)
    return total


def communication_share(events: Iterable[Any]) -> float:
    """Share of the traced time in which a collective was under way; on a GPU also when it ran beside computation.

    Counted are NCCL's kernels where there are any, else what the process groups record in the host's threads.
    """
    spans: dict[str, list[Span]] = {"step": [], "kernel": [], "host": []}
    for event in events:
        name = event.name.lower()
        span = (event.time_range.start, event.time_range.end)
        if name.startswith("profilerstep"):
            spans["step"].append(span)
        elif event.device_type.name == "CUDA":
            if name.startswith("nccl") and "kernel" in name:
                spans["kernel"].append(span)
        elif name.startswith(("nccl", "gloo", "c10d")):
            spans["host"].append(span)
    if not spans["step"]:
        return 0.0
    begin, end = min(first for first, _ in spans["step"]), max(last for _, last in spans["step"])
    inside = [(max(first, begin), min(last, end)) for first, last in spans["kernel"] or spans["host"]]
    return total_length(span for span in inside if span[0] < span[1]) / (end - begin)


class StepProfiler(PyTorchProfiler):
    """Lightning's profiler, for a few steps of training only, which writes into the run folder.

    Args:
        skip: Batches to leave out at the beginning.
        warmup: Batches to trace and throw away, since starting costs time.
        active: Batches to keep.
    """

    STEP_FUNCTIONS = {"training_step"}  # noqa: RUF012 - as in Lightning, which would trace validation as well

    def __init__(self, skip: int = 20, warmup: int = 2, active: int = 3) -> None:
        for name, value, least in (("skip", skip, 0), ("warmup", warmup, 1), ("active", active, 1)):
            if value < least:
                raise UserError(f"profiler.{name} = {value}: must be at least {least}.")
        super().__init__(
            filename="operators",
            row_limit=100,
            schedule=torch.profiler.schedule(wait=skip, warmup=warmup, active=active, repeat=1),
            on_trace_ready=self._save,
        )
        self.batches = skip + warmup + active
        self.trace: Path | None = None

    def setup(self, stage: str, local_rank: int | None = None, log_dir: str | None = None) -> None:
        super().setup(stage, local_rank, log_dir)
        self.dirpath = Path(log_dir or ".") / "profile"

    def __del__(self) -> None:
        if hasattr(self, "profiler"):  # not where the settings were refused
            super().__del__()

    def start(self, action_name: str) -> None:
        # Lightning names the modules that it finds at its first call, which is before the model is built.
        self._record_module_names = getattr(self._lightning_module, "model", None) is not None
        super().start(action_name)

    def _create_profilers(self) -> None:
        super()._create_profilers()
        # Lightning's call at every step warns while nothing is traced.
        vars(self.profiler)["add_metadata"] = lambda key, value: None

    def _save(self, profiler: torch.profiler.profile) -> None:
        assert self._lightning_module is not None and self.dirpath is not None
        trainer = self._lightning_module.trainer
        folder = Path(self.dirpath)
        folder.mkdir(parents=True, exist_ok=True)
        # The name by which TensorBoard's plugin knows a trace.
        self.trace = folder / f"rank{trainer.global_rank}.pt.trace.json"
        profiler.export_chrome_trace(str(self.trace))
        said = f"profile: {self.trace}"
        if trainer.world_size > 1:
            share = communication_share(profiler.events())
            said += f"; collectives in {share:.1%} of the time"
            if trainer.logger is not None:
                trainer.logger.log_metrics({"perf/communication_share": share}, step=trainer.global_step)
        say(trainer, said)

    def _cache_functions_events(self) -> None:
        if self.trace is not None:  # a run that ended before has none, and Lightning would fail for it
            super()._cache_functions_events()

    def describe(self) -> None:
        super().describe()
        if self.trace is None and self._lightning_module is not None:
            say(self._lightning_module.trainer, f"profile: nothing, the run had fewer than {self.batches} batches")
