"""The ``bitnet`` command and its subcommands (``bitnet --help`` lists them).

Bad input is one line and exit code 2; ``--debug`` shows the traceback.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

from bitnet.commands import compare, exchange, look, measure, quantize, replay, serve, sweep
from bitnet.commands.parser import OneLineArgumentParser, adder
from bitnet.errors import UserError, did_you_mean, of_the_machine


def fit(args: list[str]) -> int:
    """Train (see ``bitnet fit --help``)."""
    return train(["fit", *args] if args else [])


def train(args: list[str]) -> int:
    """What train.py does with its arguments."""
    try:
        from bitnet.training.cli import main as train_main  # seconds, in which somebody may press Ctrl-C
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    return train_main(args)


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineArgumentParser(
        prog="bitnet", description="Pre-train 1-bit and 1.58-bit transformers, and serve exactly what was trained."
    )
    commands = parser.add_subparsers(
        dest="command", metavar="COMMAND", required=True, parser_class=OneLineArgumentParser
    )
    commands.add_parser("fit", help=fit.__doc__, add_help=False)
    command = adder(commands)
    quantize.add(command)
    compare.add(command)
    serve.add(command)
    exchange.add(command)
    measure.add(command, commands)
    look.add(command)
    replay.add(command)
    sweep.add(command)
    return parser


def parse(args: list[str]) -> argparse.Namespace:
    """Parse; ``inspect`` and ``sweep`` pass options that they do not know to the config, ``quantize`` to the recipe."""
    parser = build_parser()
    known, rest = parser.parse_known_args(args)
    if known.command == "quantize":
        known.recipe_options = rest
    elif known.command in ("inspect", "sweep"):
        known.overrides = rest
    elif rest:
        path = [known.command, known.what] if known.command == "bench" else [known.command]
        options = _options(parser, path)
        raise UserError(f"bitnet {' '.join(path)}: unknown option {rest[0]}.{did_you_mean(rest[0], options)}")
    return known


def _options(parser: argparse.ArgumentParser, path: list[str]) -> list[str]:
    """The options of the subcommand at ``path``."""
    for name in path:
        choices: Any = next(a.choices for a in parser._actions if isinstance(a, argparse._SubParsersAction))
        parser = choices[name]
    return list(parser._option_string_actions)


@contextlib.contextmanager
def _sigterm_cleans_up() -> Iterator[None]:
    """SIGTERM ends a command as an exception does, so that half-written files are removed on the way out."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main(args: list[str] | None = None) -> int:
    args = list(sys.argv[1:] if args is None else args)
    if args[:1] == ["fit"]:
        return fit(args[1:])
    try:
        with _sigterm_cleans_up():
            try:
                known = parse(args)
                return int(known.run(known) or 0)
            finally:
                sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read stdout has gone, as ``head`` does. What is still in the buffer goes nowhere, or Python complains.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (UserError, OSError, RuntimeError, MemoryError) as error:
        said = error if isinstance(error, UserError) else of_the_machine(error)
        if "--debug" in args or said is None:
            raise
        print(f"error: {said}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if "--debug" in args:
            raise
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
