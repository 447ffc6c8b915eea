"""The ``bitnet`` command and its subcommands (``bitnet --help`` lists them).

Bad input is one line and exit code 2; ``--debug`` shows the traceback.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from bitnet.commands import compare, exchange, look, measure, quantize, replay, serve, sweep
from bitnet.commands.parser import OneLineArgumentParser, adder
from bitnet.errors import UserError, did_you_mean


def fit(args: list[str]) -> int:
    """Train (see ``bitnet fit --help``)."""
    from bitnet.training.cli import main as fit_main

    return fit_main(["fit", *args] if args else [])


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


def main(args: list[str] | None = None) -> int:
    args = list(sys.argv[1:] if args is None else args)
    if args[:1] == ["fit"]:
        return fit(args[1:])
    try:
        known = parse(args)
        return int(known.run(known) or 0)
    except UserError as error:
        if "--debug" in args:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
