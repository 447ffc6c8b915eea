"""What all subcommands share: one-line errors with the nearest valid option, and options that several of them take."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, NoReturn, Protocol

from bitnet.errors import UserError, did_you_mean

FORMAT_NAMES = ("ternary2", "ternary_base3", "binary1")
HEAD_NAMES = ("float32", "float16", "bfloat16", "int8")
MODEL_HELP = "run folder, checkpoint, packed model, Hugging Face folder or GGUF file"


class OneLineArgumentParser(argparse.ArgumentParser):
    """Bad options are one line with the nearest valid one, as everywhere in this command; none may be abbreviated."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str) -> NoReturn:
        near = ""
        if message.startswith("unrecognized arguments: "):
            word = message.removeprefix("unrecognized arguments: ").split()[0].split("=")[0]
            near = did_you_mean(word, self._option_string_actions)
        raise UserError(f"{self.prog}: {message}.{near}")


Run = Callable[[argparse.Namespace], int | None]
"""A subcommand; what it returns is the exit code, and None is 0."""


class AddCommand(Protocol):
    """Makes the parser of a subcommand whose help is the docstring of ``run``."""

    def __call__(self, name: str, run: Run) -> argparse.ArgumentParser: ...


def adder(commands: Any) -> AddCommand:
    """``AddCommand`` for what ``add_subparsers`` returned."""

    def command(name: str, run: Run) -> argparse.ArgumentParser:
        sub: argparse.ArgumentParser = commands.add_parser(name, help=run.__doc__, description=run.__doc__)
        sub.set_defaults(run=run)
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        return sub

    return command


def add_text_options(parser: argparse.ArgumentParser) -> None:
    """How documents are taken out of files."""
    parser.add_argument(
        "--data.text_key", dest="text_key", default="text", help="key of the text in .jsonl and .parquet"
    )
    parser.add_argument("--data.separator", dest="separator", default="<|endoftext|>", help="text between documents")
