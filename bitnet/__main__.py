"""The ``bitnet`` command: fit, generate, evaluate, inspect, prepare.

Each subcommand is one function; heavy libraries are imported inside it. Bad input is one line and exit code 2.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from bitnet.errors import UserError, did_you_mean


class OneLineArgumentParser(argparse.ArgumentParser):
    """Bad options are one line with the nearest valid one, as everywhere in this command."""

    def error(self, message: str) -> NoReturn:
        near = ""
        if message.startswith("unrecognized arguments: "):
            word = message.removeprefix("unrecognized arguments: ").split()[0].split("=")[0]
            near = did_you_mean(word, self._option_string_actions)
        raise UserError(f"{self.prog}: {message}.{near}")


def generate(args: argparse.Namespace) -> None:
    """Continue a prompt."""
    from bitnet.checkpoint import load_checkpoint
    from bitnet.data.tokenizer import find_eos
    from bitnet.generate import Sampling, generate_tokens

    if args.max_new_tokens < 1:
        raise UserError(f"--max_new_tokens {args.max_new_tokens}: must be at least 1.")
    sampling = Sampling(temperature=args.temperature, top_k=args.top_k, seed=args.seed)
    model, tokenizer = load_checkpoint(args.path)
    prompt = tokenizer.encode(args.prompt, add_special_tokens=False).ids
    ids = list(prompt)
    shown = tokenizer.decode(ids)
    print(shown, end="", flush=True)
    for token in generate_tokens(model, prompt, args.max_new_tokens, sampling, find_eos(tokenizer)):
        ids.append(token)
        text = tokenizer.decode(ids)
        if not text.endswith("\ufffd"):  # the rest of a character may be in the next token
            print(text[len(shown) :], end="", flush=True)
            shown = text
    print()


def evaluate(args: argparse.Namespace) -> None:
    """Loss, perplexity and bits per byte on held-out text."""
    import json

    from rich.console import Console
    from rich.progress import Progress

    from bitnet.checkpoint import load_checkpoint
    from bitnet.data.corpora import Reading
    from bitnet.evaluation.perplexity import evaluate_text

    model, tokenizer = load_checkpoint(args.path)
    reading = Reading(text_key=args.text_key, separator=args.separator)
    with Progress(transient=True, console=Console(stderr=True)) as bar:
        task = bar.add_task("evaluating", total=None)
        result = evaluate_text(
            model,
            tokenizer,
            args.data_path,
            reading,
            seq_len=args.seq_len,
            batch_size=args.batch_size,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    score = result.score
    if args.json:
        print(
            json.dumps(
                {
                    "loss": score.loss,
                    "perplexity": score.perplexity,
                    "bits_per_byte": score.bits_per_byte,
                    "tokens": score.tokens,
                    "documents": result.documents,
                    "text_bytes": result.text_bytes,
                }
            )
        )
        return
    print(
        f"text           {args.data_path}: {result.documents} documents, {result.text_bytes:,} bytes, "
        f"{score.tokens:,} tokens"
    )
    print(f"loss           {score.loss:.4f} nats per token")
    print(f"perplexity     {score.perplexity:.3f} per token")
    print(f"bits per byte  {score.bits_per_byte:.4f}")


def inspect(args: argparse.Namespace) -> None:
    """Parameters, sizes, memory and FLOPs of a config, or the weights of a run."""
    from bitnet.inspection import inspect_config, inspect_run

    target = Path(args.target)
    if target.is_dir() or target.suffix == ".ckpt":
        if args.overrides:
            raise UserError(f"{args.overrides[0]}: options change a config, not a run that is finished.")
        inspect_run(target)
    else:
        inspect_config(args.target, args.overrides)


def prepare(args: argparse.Namespace) -> None:
    """Tokenize text once, into a folder that data.path takes."""
    import shutil

    from bitnet.data.datamodule import TokenDataModule
    from bitnet.training.progress import PreparationProgress

    out = Path(args.out)
    if out.exists():
        raise UserError(f"--out {out}: exists already.")
    data = TokenDataModule(
        args.data_path,
        val_path=args.val_path,
        vocab_size=args.vocab_size,
        tokenizer=args.tokenizer,
        text_key=args.text_key,
        separator=args.separator,
        val_fraction=args.val_fraction,
        seq_len=1,
        batch_size=1,
    )
    data.progress = PreparationProgress()
    store = data.prepare_tokens()
    shutil.copytree(store.folder, out)
    tokens = sum(store.totals(f"train-{i}").tokens for i in range(store.sources))
    print(
        f"{out}: {tokens:,} training tokens, {store.totals('val').tokens:,} to validate on, "
        f"vocabulary {store.vocab_size}"
    )


def fit(args: list[str]) -> int:
    """Train (see ``bitnet fit --help``)."""
    from bitnet.training.cli import main as fit_main

    return fit_main(["fit", *args] if args else [])


def _text_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data.text_key", dest="text_key", default="text", help="key of the text in .jsonl and .parquet"
    )
    parser.add_argument("--data.separator", dest="separator", default="<|endoftext|>", help="text between documents")


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineArgumentParser(
        prog="bitnet", description="Pre-train 1-bit and 1.58-bit transformers, and serve exactly what was trained."
    )
    commands = parser.add_subparsers(
        dest="command", metavar="COMMAND", required=True, parser_class=OneLineArgumentParser
    )

    def command(name: str, run: Callable[[argparse.Namespace], None]) -> argparse.ArgumentParser:
        sub: argparse.ArgumentParser = commands.add_parser(name, help=run.__doc__, description=run.__doc__)
        sub.set_defaults(run=run)
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        return sub

    commands.add_parser("fit", help=fit.__doc__, add_help=False)
    p = command("generate", generate)
    p.add_argument("path", help="run folder or checkpoint")
    p.add_argument("--prompt", required=True)
    p.add_argument("--max_new_tokens", type=int, default=100)
    p.add_argument("--temperature", type=float, default=0.8, help="0 takes the most likely token")
    p.add_argument("--top_k", type=int, default=50, help="keep the k most likely tokens; 0 keeps all")
    p.add_argument("--seed", type=int, default=0)

    p = command("evaluate", evaluate)
    p.add_argument("path", help="run folder or checkpoint")
    p.add_argument("--data.path", dest="data_path", required=True, metavar="PATH", help="file, folder, glob or hf:NAME")
    p.add_argument("--seq_len", type=int, default=None, help="tokens of context (default: the model's)")
    p.add_argument("--batch_size", type=int, default=8)
    p.add_argument("--json", action="store_true", help="print one JSON object")
    _text_options(p)

    p = command("inspect", inspect)
    p.add_argument("target", help="config file, name of a shipped config, run folder or checkpoint")
    p.set_defaults(overrides=[])

    p = command("prepare", prepare)
    p.add_argument("--data.path", dest="data_path", required=True, action="append", metavar="PATH")
    p.add_argument("--data.val_path", dest="val_path", metavar="PATH")
    p.add_argument("--data.vocab_size", dest="vocab_size", type=int, default=32_000)
    p.add_argument("--data.tokenizer", dest="tokenizer", help="a tokenizer.json instead of training one")
    p.add_argument("--data.val_fraction", dest="val_fraction", type=float, default=0.05)
    p.add_argument("--out", required=True, help="folder to make")
    _text_options(p)
    return parser


def parse(args: list[str]) -> argparse.Namespace:
    """Parse; ``inspect`` passes options that it does not know on to the config."""
    parser = build_parser()
    known, rest = parser.parse_known_args(args)
    if rest and known.command == "inspect":
        known.overrides = rest
    elif rest:
        options = {k for a in parser._actions if a.dest == "command" for k in _options(a, known.command)}
        raise UserError(f"bitnet {known.command}: unknown option {rest[0]}.{did_you_mean(rest[0], options)}")
    return known


def _options(subparsers: Any, command: str) -> list[str]:
    return list(subparsers.choices[command]._option_string_actions)


def main(args: list[str] | None = None) -> int:
    args = list(sys.argv[1:] if args is None else args)
    if args[:1] == ["fit"]:
        return fit(args[1:])
    try:
        known = parse(args)
        known.run(known)
    except UserError as error:
        if "--debug" in args:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
