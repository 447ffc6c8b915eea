"""``bitnet replay``."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from bitnet.commands.parser import AddCommand
from bitnet.errors import UserError

if TYPE_CHECKING:
    from bitnet.training.replay import Replay


def replay(args: argparse.Namespace) -> None:
    """Loss, gradients by layer and the worst text of a step that a run has kept under incidents/."""
    if args.top < 1:
        raise UserError(f"--top {args.top}: must be at least 1.")
    from bitnet.training.replay import read_incident
    from bitnet.training.replay import replay as run

    incident = read_incident(args.file)
    _show(incident, run(args.file, args.checkpoint), args.top)


def _show(incident: dict[str, Any], found: Replay, top: int) -> None:
    behind = incident["step"] - 1 - found.checkpoint_step
    age = (
        "the very weights of that step" if behind == 0 else f"{abs(behind)} steps {'older' if behind > 0 else 'newer'}"
    )
    print(f"incident      step {incident['step']} of {incident['total_steps']}: {incident['why']}")
    print(f"weights       {found.checkpoint}, step {found.checkpoint_step}: {age}")
    print(f"loss          {found.loss:.6f} (in the run {incident['loss']:.6f})")
    print(f"gradient norm {found.grad_norm:.6f} (in the run {incident['grad_norm']:.6f})")
    if found.first_broken:
        print(f"not finite    first in the output of {found.first_broken}")
    width = max(len(name) for name, _, _ in found.gradients[:top])
    print(f"\n{'parameter':<{width}}  {'gradient':>12}  {'weights':>12}")
    for name, gradient, weight in found.gradients[:top]:
        print(f"{name:<{width}}  {gradient:>12.6g}  {weight:>12.6g}")
    print("\nrows with the highest loss:")
    for row in found.rows[: min(top, 3)]:
        text = " ".join(row.text.split())
        print(f"  {row.loss:.4f}  micro-batch {row.micro_batch}, row {row.row}: {text[:300]}")


def add(command: AddCommand) -> None:
    p = command("replay", replay)
    p.add_argument("file", metavar="RUN/incidents/step_N.pt")
    p.add_argument("--checkpoint", metavar="PATH", help="weights to use instead of the run's newest")
    p.add_argument("--top", type=int, default=12, help="parameters in the table")
