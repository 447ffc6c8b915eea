"""``bitnet compare``."""

from __future__ import annotations

import argparse

from bitnet.commands.parser import MODEL_HELP, AddCommand, add_text_options
from bitnet.errors import UserError
from bitnet.option_checks import new_path, set_threads

SHOWN = (0, 1, 2, 4, 6, 7, 8, 10)
"""Columns that fit a terminal."""


def compare(args: argparse.Namespace) -> None:
    """Models side by side: bits, quality with confidence intervals, speed, memory and cost, as a report."""
    from rich.table import Table

    from bitnet.comparison.compare import compare as run
    from bitnet.comparison.report import COLUMNS, cells, write_report
    from bitnet.data.corpora import Reading
    from bitnet.interchange.exporting import named_when_proven
    from bitnet.progress import PreparationProgress, TableConsole

    out = new_path("--out", args.out)
    for option in ("limit", "seq_len", "batch_size", "tokens", "prompt_tokens", "rounds"):
        value = getattr(args, option)
        if value is not None and value < 1:
            raise UserError(f"--{option} {value}: must be at least 1.")
    set_threads(args.threads)
    found = run(
        args.paths,
        args.data_path,
        Reading(text_key=args.text_key, separator=args.separator),
        limit=args.limit,
        seq_len=args.seq_len,
        batch_size=args.batch_size,
        threads=args.threads,
        tokens=args.tokens,
        prompt_tokens=args.prompt_tokens,
        rounds=args.rounds,
        progress=PreparationProgress(),
    )
    with named_when_proven(out) as folder:
        folder.mkdir()
        write_report(found, folder)
    table = Table(box=None, padding=(0, 2, 0, 0))
    for number in SHOWN:
        table.add_column(COLUMNS[number], justify="left" if number < 2 else "right")
    for row in found.rows:
        text = cells(row)
        table.add_row(*(text[number] for number in SHOWN))
    TableConsole(width=150).print(table)
    print(f"{out}/report.html and report.md have all of it, with plots")


def add(command: AddCommand) -> None:
    p = command("compare", compare)
    p.add_argument(
        "paths", nargs="+", metavar="MODEL", help=f"{MODEL_HELP}; the first is what others are compared with"
    )
    p.add_argument("--data.path", dest="data_path", required=True, metavar="TEXT", help="held-out text")
    p.add_argument("--out", required=True, help="folder to make")
    p.add_argument("--limit", type=int, help="documents that are read (default: all)")
    p.add_argument("--seq_len", type=int, help="tokens read at a time (default: the context)")
    p.add_argument("--batch_size", type=int, default=8)
    p.add_argument("--threads", type=int, help="CPU threads")
    p.add_argument("--tokens", type=int, default=64, help="tokens to decode when timing")
    p.add_argument("--prompt_tokens", type=int, default=128, help="tokens of a prompt when timing")
    p.add_argument("--rounds", type=int, default=3, help="times that every model is timed")
    add_text_options(p)
