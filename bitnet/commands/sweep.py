"""``bitnet sweep``."""

from __future__ import annotations

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

from bitnet.commands.parser import AddCommand
from bitnet.errors import UserError

SET_BY_THE_SWEEP = {
    "trainer.default_root_dir": "--out names the folder of all runs",
    "seed_everything": "--seeds says how many seeds",
    "data.seed": "--seeds says how many seeds",
    "ckpt_path": "an unfinished run goes on by itself",
    "overwrite": "give another --out for new runs",
}


def sweep(args: argparse.Namespace) -> int:
    """Train every point of a grid with several seeds, and compare. Options that are not listed here go to every fit."""
    if find_spec("optuna") is None:
        raise UserError("sweep needs optuna (pip install 'bitnet-lightning[sweep]').")
    from bitnet.training.sweep import Runner, Sweep, check, parse_grid
    from bitnet.training.sweep_report import write_report

    if args.seeds < 1:
        raise UserError(f"--seeds {args.seeds}: must be at least 1.")
    axes = parse_grid(args.grid)
    given = [("", option.partition("=")[0].removeprefix("--")) for option in args.overrides]
    for start, key in [*given, *(("--grid ", key) for axis in axes for key in axis.keys)]:
        if key in SET_BY_THE_SWEEP:
            raise UserError(f"{start or '--'}{key}: {SET_BY_THE_SWEEP[key]}; leave it out.")
    out = Path(args.out or f"runs/sweeps/{Path(args.config).stem}")
    wanted = Sweep(config=args.config, axes=axes, seeds=args.seeds, out=out, options=tuple(args.overrides))
    check(wanted)
    runner = Runner(wanted)
    if args.dry_run:
        runner.show_commands()
        return 0
    if not args.report:
        try:
            runner.run()
        except KeyboardInterrupt:
            done, total = runner.finished(), len(wanted.runs)
            print(f"stopped: {done} of {total} runs are finished; the same command goes on", file=sys.stderr)
            return 130
    elif not out.is_dir():
        raise UserError(f"--out {out}: there is no sweep yet; leave --report out to run it.")
    else:
        runner.check_is_same()
    write_report(wanted, runner.errors())
    for name in runner.under_way():
        print(f"{name}: under way in another process; --report shows the table again")
    return 1 if runner.failed else 0


def add(command: AddCommand) -> None:
    p = command("sweep", sweep)
    p.add_argument("config", metavar="CONFIG", help="config file or name of a shipped config; comes first")
    p.add_argument(
        "--grid",
        action="append",
        required=True,
        metavar="KEY=V,V",
        help="values of a key of the config; give it several times for all combinations; "
        "KEY+KEY=V+V,V+V varies keys together",
    )
    p.add_argument(
        "--seeds",
        type=int,
        default=1,
        help="runs of each point, with seed_everything and data.seed 0, 1, ... (default: 1)",
    )
    p.add_argument("--out", help="folder of all runs (default: runs/sweeps/CONFIG); one that holds this sweep goes on")
    p.add_argument("--dry_run", action="store_true", help="show the commands, run nothing")
    p.add_argument("--report", action="store_true", help="show the table of what is finished, run nothing")
