"""Looks at the loss and the gradient of every optimizer step: a run that breaks stops, and leaves what broke it.

The files are ``incidents/step_<n>.pt`` in the run folder, with ``_rank<r>`` where there are several processes: the
micro-batches of the step, the random state before each, what they were trained with. The weights are not among them:
``checkpoints/last.ckpt`` is from before, since a save looks at all steps that are done and refuses after a broken one.
``bitnet replay`` puts both together.

On a GPU nothing waits for the step that was just queued. Its figures are copied to the host behind it, and looked at
when the next step has been queued: by then they have arrived, or will before the GPU runs out of work. The delay is
always one step, never "when it is ready", so that all processes come to the same conclusion at the same step; what
they look at are the losses of all of them, gathered on the device.
"""

import dataclasses
import math
import statistics
from collections import deque
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from bitnet.checkpoint import recipe_options
from bitnet.errors import SaidByFirstProcess, UserError
from bitnet.training.atomic import write_atomically
from bitnet.training.interruption import Interruption
from bitnet.training.lit import not_finite
from bitnet.training.progress import say
from bitnet.training.random_state import random_state
from bitnet.training.report import command_prefix

FORMAT = 2
FIRST_STEPS = 50
"""Steps in which the loss may jump as it likes."""
LAG = {"cpu": 0, "cuda": 1}
"""Steps that may be queued on a device before one is looked at."""


@dataclasses.dataclass
class _Step:
    """One optimizer step, from its batches until it has been looked at."""

    number: int
    batches: list[dict[str, Tensor]]
    random_states: list[dict[str, Any]]
    figures: Tensor
    """Loss, gradient norm and received signal of every process (processes, 3), in the host's memory."""
    arrived: Any
    """The CUDA event behind which ``figures`` may be read, or None."""


class Watch(Callback):
    """Ends a run whose loss or gradient is not finite; keeps the batches of loss spikes.

    Args:
        spike_sigmas: A spike is a loss that many robust standard deviations above the median of the last steps.
        window: How many last steps that are.
        keep: Newest files to keep.
    """

    def __init__(self, spike_sigmas: float = 6.0, window: int = 100, keep: int = 5) -> None:
        for name, value, least in (("window", window, 2), ("keep", keep, 1), ("spike_sigmas", spike_sigmas, 0)):
            if value < least:
                raise UserError(f"Watch.{name} = {value}: must be at least {least}.")
        self.spike_sigmas, self.window, self.keep = spike_sigmas, window, keep
        self.losses: deque[float] = deque(maxlen=window)
        self.spikes = 0
        self._trainer: L.Trainer | None = None
        self._interruption = Interruption()
        self._batches: list[dict[str, Tensor]] = []
        self._random_states: list[dict[str, Any]] = []
        self._micro_losses: list[Tensor] = []
        self._pending: deque[_Step] = deque()

    # ---- what a checkpoint knows

    def state_dict(self) -> dict[str, Any]:
        self._look(lag=0)  # what is broken is not saved
        return {"losses": list(self.losses), "spikes": self.spikes}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.losses.extend(state_dict["losses"])
        self.spikes = state_dict["spikes"]

    # ---- gathering, without waiting for anything

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._trainer = trainer
        found: list[Interruption] = [c for c in trainer.callbacks if isinstance(c, Interruption)]  # type: ignore[attr-defined]
        self._interruption = found[0] if found else Interruption()

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._batches.append(batch)
        self._random_states.append(random_state())

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._micro_losses.append(outputs["loss"].detach() * trainer.accumulate_grad_batches)
        if not pl_module.steps_now:
            return
        loss, received = torch.stack(self._micro_losses).mean().float(), float(self._interruption.received)
        figures = torch.stack([loss, pl_module.grad_norm.float(), torch.full_like(loss, received)])
        if trainer.world_size > 1:
            everyone = [torch.empty_like(figures) for _ in range(trainer.world_size)]
            torch.distributed.all_gather(everyone, figures)
            figures = torch.cat(everyone)
        arrived = None
        if figures.is_cuda:
            host = torch.empty(figures.shape, dtype=figures.dtype, pin_memory=True)
            figures = host.copy_(figures, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        step = _Step(trainer.global_step, self._batches, self._random_states, figures.view(-1, 3), arrived)
        self._pending.append(step)
        self._batches, self._random_states, self._micro_losses = [], [], []
        self._look(lag=LAG.get(pl_module.device.type, 0))

    def on_validation_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._look(lag=0)  # broken weights have nothing to show, and no text to sample

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._look(lag=0)

    # ---- looking

    def _look(self, lag: int) -> None:
        """Judge all steps but the last ``lag``."""
        while len(self._pending) > lag:
            step = self._pending.popleft()
            if step.arrived is not None:
                step.arrived.synchronize()
            assert self._trainer is not None
            self._judge(self._trainer, step)

    def _judge(self, trainer: L.Trainer, step: _Step) -> None:
        losses, norms, received = step.figures.T.tolist()
        self._interruption.agreed = int(max(received))
        scales = getattr(trainer.precision_plugin, "scaler", None) is not None  # float16 skips steps that overflow
        if why := broken(losses, [] if scales else norms):
            self._pending.clear()  # they began with broken weights
            self._stop(trainer, step, why)
        loss = statistics.fmean(losses)
        if step.number > FIRST_STEPS and len(self.losses) >= min(self.window, FIRST_STEPS):
            median, deviation = robust(self.losses)
            if loss > median + self.spike_sigmas * deviation:
                self._keep_spike(trainer, step, loss, median, deviation)
        self.losses.append(loss)

    def _stop(self, trainer: L.Trainer, step: _Step, why: str) -> None:
        try:
            file = self._save(trainer, step, why)
            saved = f"the batch is in {file}; '{command_prefix()} replay {file}' shows where it goes wrong"
        except UserError as error:
            saved = f"the batch could not be saved ({error})"
        trainer.strategy.barrier(
            "incident"
        )  # nobody leaves before all have saved: the first to go takes the rest along
        last = Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt"
        left = f"{last} is from before" if last.is_file() else "no checkpoint had been saved yet"
        kind = UserError if trainer.is_global_zero else SaidByFirstProcess
        raise kind(f"step {step.number}: {why}{_where(trainer.lightning_module)}; {saved}; {left}.")

    def _keep_spike(self, trainer: L.Trainer, step: _Step, loss: float, median: float, deviation: float) -> None:
        self.spikes += 1
        sigmas = (loss - median) / deviation
        why = f"loss {loss:.4f} is {sigmas:.1f} deviations above the median {median:.4f} of {len(self.losses)} steps"
        try:
            saved = f"batch saved in {self._save(trainer, step, why)}"
        except UserError as error:  # a full disk ends no run that is healthy
            saved = str(error)
        if trainer.logger is not None:
            trainer.logger.log_metrics({"watch/spikes": float(self.spikes)}, step=step.number)
        say(trainer, f"step {step.number}: {why}; {saved}")

    # ---- files

    def _save(self, trainer: L.Trainer, step: _Step, why: str) -> Path:
        module: Any = trainer.lightning_module
        several = trainer.world_size > 1
        # Only the first process knows the number that the folder of a second run got.
        folder = Path(trainer.strategy.broadcast(str(trainer.default_root_dir))) / "incidents"
        suffix = f"_rank{trainer.global_rank}.pt" if several else ".pt"
        file = folder / f"step_{step.number}{suffix}"
        loss, norm, _ = step.figures[trainer.global_rank if several else 0].tolist()
        content = {
            "incident_format": FORMAT,
            "step": step.number,
            "total_steps": module.total_steps,
            "why": why,
            "loss": loss,
            "grad_norm": norm,
            "batches": [{name: tensor.cpu() for name, tensor in batch.items()} for batch in step.batches],
            "random_states": step.random_states,
            "config": dataclasses.asdict(module.config),
            "recipe": recipe_options(module.recipe),
            "init_from": module.init_from,
            "precision": str(trainer.precision),
            "matmul_precision": module.matmul_precision,
            "arithmetic": dataclasses.asdict(module.arithmetic),
        }
        write_atomically(content, file)
        own = [other for other in folder.glob(f"step_*{suffix}") if several or "_rank" not in other.name]
        # By time: a run that went on from an older checkpoint has seen higher numbers before.
        for old in sorted(own, key=lambda other: other.stat().st_mtime_ns)[: -self.keep]:
            old.unlink(missing_ok=True)
        return file


def broken(losses: list[float], norms: list[float]) -> str:
    """What is not finite, by process; an empty string when all is well."""
    for name, values in (("loss", losses), ("gradient norm", norms)):
        bad = [rank for rank, value in enumerate(values) if not math.isfinite(value)]
        if bad:
            where = f" (process {', '.join(map(str, bad))})" if 0 < len(bad) < len(values) else ""
            return f"the {name} is {values[bad[0]]}{where}"
    return ""


def _where(module: Any) -> str:
    """The tensors in which a step that was not taken broke; nothing where its update has spread them already."""
    if not module.broken_gradients:
        return ""
    weights = not_finite(dict(module.transformer.named_parameters()))
    names, kind = (weights, "weight") if weights else (module.broken_gradients, "gradient")
    others = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f", not finite: {kind} of {names[0]}{others}"


def robust(losses: "deque[float]") -> tuple[float, float]:
    """``(median, deviation)``: 1.4826 times the median distance from the median, which is the standard deviation of
    normal values and takes no notice of outliers. It is never below 0.1 % of the median: losses that are all but equal
    are no reason for alarm at the next digit.
    """
    median = statistics.median(losses)
    distance = statistics.median(abs(loss - median) for loss in losses)
    return median, max(1.4826 * distance, 1e-3 * abs(median), 1e-12)
