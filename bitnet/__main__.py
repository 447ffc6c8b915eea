"""The ``bitnet`` command: fit, pack, generate, evaluate, inspect, bench, prepare.

Each subcommand is one function; heavy libraries are imported inside it. Bad input is one line and exit code 2.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from bitnet.errors import UserError, did_you_mean
from bitnet.option_checks import check_device, check_folder, check_outputs, numbers, set_threads

FORMAT_NAMES = ("ternary2", "ternary_base3", "binary1")
HEAD_NAMES = ("float32", "float16", "bfloat16", "int8")


class OneLineArgumentParser(argparse.ArgumentParser):
    """Bad options are one line with the nearest valid one, as everywhere in this command."""

    def error(self, message: str) -> NoReturn:
        near = ""
        if message.startswith("unrecognized arguments: "):
            word = message.removeprefix("unrecognized arguments: ").split()[0].split("=")[0]
            near = did_you_mean(word, self._option_string_actions)
        raise UserError(f"{self.prog}: {message}.{near}")


def pack(args: argparse.Namespace) -> None:
    """Pack a trained model to 2 bits a weight or fewer, into one file."""
    from bitnet.checkpoint import load_checkpoint, read_checkpoint
    from bitnet.inference.files import is_packed, save_packed
    from bitnet.inference.header import read_header, verify
    from bitnet.inference.packing import pack as pack_model
    from bitnet.inspection import print_packed

    out = Path(args.out)
    if not is_packed(out):
        raise UserError(f"--out {out}: the name must end in .safetensors.")
    check_folder("--out", args.out)
    model, tokenizer = load_checkpoint(args.path)
    recipe = dict(read_checkpoint(args.path)["bitnet"]["recipe"])
    save_packed(pack_model(model, head=args.head), tokenizer, out, format=args.format, recipe=recipe)
    verify(read_header(out))  # every digest is checked once before the file is announced
    print_packed(out)


def generate(args: argparse.Namespace) -> None:
    """Continue one prompt or several."""
    import torch

    from bitnet.data.tokenizer import find_eos
    from bitnet.generate import Sampling, stream_batch
    from bitnet.inference.files import load_model

    if args.max_new_tokens < 1:
        raise UserError(f"--max_new_tokens {args.max_new_tokens}: must be at least 1.")
    if args.stream and len(args.prompt) > 1:
        raise UserError("--stream shows one text as it grows: give one --prompt.")
    sampling = Sampling(**{name: getattr(args, name) for name in SAMPLING_OPTIONS})
    set_threads(args.threads)
    check_device(args.device)
    with torch.inference_mode():
        model, tokenizer = load_model(args.path, args.device)
        steps = stream_batch(
            model,
            tokenizer,
            args.prompt,
            max_new_tokens=args.max_new_tokens,
            sampling=sampling,
            stop=args.stop,
            stop_id=find_eos(tokenizer),
        )
        if args.stream:
            print(args.prompt[0], end="", flush=True)
            for (text,) in steps:
                print(text, end="", flush=True)
            print()
            return
        for prompt, parts in zip(args.prompt, zip(*steps, strict=True), strict=True):
            print(prompt + "".join(parts))


def evaluate(args: argparse.Namespace) -> None:
    """Loss, perplexity and bits per byte on held-out text."""
    import json

    from rich.console import Console
    from rich.progress import Progress

    from bitnet.data.corpora import Reading
    from bitnet.evaluation.perplexity import evaluate_text
    from bitnet.inference.files import load_model

    model, tokenizer = load_model(args.path)
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
    """Parameters, sizes, memory and FLOPs of a config, or the weights of a run or a packed model."""
    from bitnet.inference.files import is_packed
    from bitnet.inference.header import read_header, verify
    from bitnet.inspection import inspect_config, inspect_run, print_packed

    target = Path(args.target)
    if target.is_dir() or target.suffix == ".ckpt" or is_packed(target):
        if args.overrides:
            raise UserError(f"{args.overrides[0]}: options change a config, not a run that is finished.")
        if not is_packed(target):
            if args.verify:
                raise UserError(f"--verify checks the digests of a packed model; {target} is a run.")
            inspect_run(target)
            return
        print_packed(target)
        if args.verify:
            packed = read_header(target)
            verify(packed)
            print(f"verified: {len(packed.tensors)} tensors, {packed.size:,} bytes, every digest is right")
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


def bench_kernels(args: argparse.Namespace) -> None:
    """Time packed products against torch's, and against what the memory and the matrix units of this machine can do."""
    from bitnet_kernels.bench import bench_kernels as run

    set_threads(args.threads)
    check_outputs(args)
    if args.device is not None:
        check_device(args.device)
    try:
        run(
            args.shapes,
            args.m,
            device=args.device,
            formats=args.formats,
            tune=args.tune,
            json_file=args.json,
            plot=args.plot,
        )
    except ValueError as error:
        raise UserError(str(error)) from error


def bench_decode(args: argparse.Namespace) -> None:
    """Tokens per second and peak memory of a packed model, or of random weights in the shape of a config."""
    from bitnet.inference.bench import bench_decode as run
    from bitnet.inference.files import is_packed

    check_outputs(args)
    check_device(args.device)
    shape = None
    if not is_packed(args.model):
        from bitnet.training.cli import parse_config

        if Path(args.model).is_dir() or args.model.endswith(".ckpt"):
            raise UserError(f"{args.model}: pack it first (bitnet pack {args.model} --out NAME.safetensors).")
        parsed = parse_config(["--config", args.model])
        shape = parsed.model, str(getattr(parsed.recipe, "weight", "none"))
    run(
        args.model,
        shape,
        threads=args.threads,
        tokens=args.tokens,
        prompt_tokens=args.prompt_tokens,
        depth=args.depth,
        head=args.head,
        device=args.device,
        json_file=args.json,
        plot=args.plot,
    )


def fit(args: list[str]) -> int:
    """Train (see ``bitnet fit --help``)."""
    from bitnet.training.cli import main as fit_main

    return fit_main(["fit", *args] if args else [])


SAMPLING_OPTIONS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")


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
    p = command("pack", pack)
    p.add_argument("path", help="run folder or checkpoint")
    p.add_argument("--out", required=True, help="file to write, NAME.safetensors")
    p.add_argument("--format", choices=FORMAT_NAMES, help="default: ternary2 or binary1, as the weights are")
    p.add_argument("--head", choices=HEAD_NAMES, default="float32", help="storage of embedding and head")

    p = command("generate", generate)
    p.add_argument("path", help="run folder, checkpoint or packed model")
    p.add_argument("--prompt", required=True, action="append", help="text to continue; may be given several times")
    p.add_argument("--max_new_tokens", type=int, default=100)
    p.add_argument("--stream", action="store_true", help="show the text while it grows")
    p.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeatable")
    p.add_argument("--temperature", type=float, default=0.8, help="0 takes the most likely token")
    p.add_argument("--top_k", type=int, default=50, help="keep the k most likely tokens; 0 keeps all")
    p.add_argument("--top_p", type=float, default=1.0, help="keep the likeliest tokens that make up this probability")
    p.add_argument("--min_p", type=float, default=0.0, help="keep tokens this fraction as likely as the likeliest")
    p.add_argument("--repetition_penalty", type=float, default=1.0, help="above 1: avoid tokens that have occurred")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--threads", type=int, help="CPU threads")
    p.add_argument("--device", default="cpu", help="cpu or cuda")

    p = command("evaluate", evaluate)
    p.add_argument("path", help="run folder, checkpoint or packed model")
    p.add_argument("--data.path", dest="data_path", required=True, metavar="PATH", help="file, folder, glob or hf:NAME")
    p.add_argument("--seq_len", type=int, default=None, help="tokens of context (default: the model's)")
    p.add_argument("--batch_size", type=int, default=8)
    p.add_argument("--json", action="store_true", help="print one JSON object")
    _text_options(p)

    p = command("inspect", inspect)
    p.add_argument("target", help="config, name of a shipped config, run folder, checkpoint or packed model")
    p.add_argument("--verify", action="store_true", help="read a packed model and check every digest")
    p.set_defaults(overrides=[])

    bench = commands.add_parser("bench", help="Measure kernels, or a whole model.", description="Measure.")
    benches = bench.add_subparsers(dest="what", metavar="WHAT", required=True, parser_class=OneLineArgumentParser)
    p = benches.add_parser("kernels", help=bench_kernels.__doc__, description=bench_kernels.__doc__)
    p.set_defaults(run=bench_kernels)
    p.add_argument("--shapes", default="bitnet-2b", help="a name (bitnet-2b, llama-8b, small) or NxK,NxK,...")
    p.add_argument("--m", type=numbers, default=[1, 4, 16, 64, 512, 2048], metavar="M,M", help="numbers of tokens")
    p.add_argument("--formats", default="ternary2,binary1", help="packed formats to time")
    p.add_argument("--device", default=None, help="cuda or cpu (default: cuda if there is one)")
    p.add_argument("--tune", action="store_true", help="first look for faster tiles on this GPU, and remember them")
    p.add_argument("--threads", type=int, help="CPU threads")
    p.add_argument("--json", metavar="FILE", help="write the figures")
    p.add_argument("--plot", metavar="FILE", help="draw them under the roofline of this machine (.png or .svg)")
    p.add_argument("--debug", action="store_true", help="show the traceback of an error")
    p = benches.add_parser("decode", help=bench_decode.__doc__, description=bench_decode.__doc__)
    p.set_defaults(run=bench_decode)
    p.add_argument("model", help="packed model, config file or name of a shipped config")
    p.add_argument("--threads", type=numbers, default=None, metavar="T,T", help="CPU threads, one run each")
    p.add_argument("--tokens", type=int, help="tokens to decode (default: 128, or what the context holds)")
    p.add_argument("--prompt_tokens", type=int, help="tokens to prefill (default: 256, likewise)")
    p.add_argument("--depth", type=int, default=0, help="tokens that are in the cache when decoding begins")
    p.add_argument("--head", choices=HEAD_NAMES, default="int8", help="embedding and head of a config's model")
    p.add_argument("--device", default="cpu", help="cpu or cuda")
    p.add_argument("--json", metavar="FILE", help="write the figures")
    p.add_argument("--plot", metavar="FILE", help="draw them (.png or .svg)")
    p.add_argument("--debug", action="store_true", help="show the traceback of an error")

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
        known.run(known)
    except UserError as error:
        if "--debug" in args:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
