"""How fast a run is, what it uses of the machine, and where the time goes that it does not use."""

import time
import warnings
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.throughput import get_available_flops

from bitnet.estimate import flops_per_token
from bitnet.memory import peak_bytes
from bitnet.scaling import GPUS
from bitnet.training.strategies import data_parallel_size


def peak_flops(device: torch.device) -> float | None:
    """FLOPs per second of the device's bf16 matrix units; None where nobody knows them."""
    if device.type != "cuda":
        return None
    if "H200" in torch.cuda.get_device_name(device):  # the processor of an H100, which Lightning does not know
        return GPUS["h100"].bf16
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="FLOPs not found")  # the figure is left out, then
        return get_available_flops(device, torch.bfloat16)


def memory_gb(device: torch.device) -> float:
    """Most memory in use, in 10^9 bytes: allocated on the GPU since the last call, or resident in this process ever."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak / 1e9
    return peak_bytes() / 1e9


def seconds_waited(trainer: L.Trainer) -> float:
    """How long the run has waited for batches so far; 0 with a loader that does not say."""
    return float(getattr(getattr(trainer.train_dataloader, "feed", None), "waited", 0.0))


class Speed:
    """Time and tokens between two log steps.

    The time of a step is that of waiting for its batch and of computing; validation and saving lie between steps.
    """

    def __init__(self) -> None:
        self._computing = 0.0
        self._waited_before = 0.0
        self._tokens = 0
        self._started = 0.0

    def start(self) -> None:
        """Its batch is there: a step begins."""
        self._started = time.monotonic()

    def stop(self, tokens: int) -> None:
        """A step of ``tokens`` in this process has ended."""
        self._computing += time.monotonic() - self._started
        self._tokens += tokens

    def figures(self, trainer: L.Trainer, pl_module: Any) -> dict[str, float]:
        """What ``perf/`` holds, since the last call."""
        waited = seconds_waited(trainer) - self._waited_before
        seconds = max(self._computing + waited, 1e-9)
        tokens_per_s = self._tokens * data_parallel_size(trainer) / seconds
        flops = tokens_per_s * flops_per_token(pl_module.config, pl_module.data.seq_len)
        found = {
            "perf/tokens_per_s": tokens_per_s,
            "perf/tokens_per_s_per_device": tokens_per_s / trainer.world_size,
            "perf/flops_per_s": flops,
            "perf/loader_share": waited / seconds,
            "perf/memory_gb": memory_gb(pl_module.device),
        }
        if peak := peak_flops(pl_module.device):
            found["perf/mfu"] = flops / (peak * trainer.world_size)
        self._computing, self._tokens, self._waited_before = 0.0, 0, self._waited_before + waited
        return found
