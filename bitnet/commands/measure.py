"""``bitnet evaluate`` and ``bitnet bench``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from bitnet.commands.parser import HEAD_NAMES, MODEL_HELP, AddCommand, OneLineArgumentParser, add_text_options, adder
from bitnet.errors import UserError
from bitnet.option_checks import check_device, check_outputs, numbers, set_threads, whole_number

if TYPE_CHECKING:
    from bitnet.interchange.opened import Opened


def evaluate(args: argparse.Namespace) -> None:
    """Loss, perplexity and bits per byte on held-out text, or scores on tasks of lm-eval."""
    import json
    import os

    os.environ.setdefault("TQDM_DISABLE", "1")  # read on import: one bar, ours, is enough
    from rich.console import Console
    from rich.progress import Progress

    from bitnet.interchange.opened import open_model

    if bool(args.data_path) == bool(args.tasks):
        raise UserError("give either --data.path (a text) or --tasks.")
    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit {args.limit}: must be at least 1.")
    of_the_other = ("few_shot", "tasks_data") if args.data_path else ("seq_len", "stride", "batch_size")
    for option in of_the_other:
        if getattr(args, option) is not None:
            raise UserError(f"--{option} is for {'--tasks' if args.data_path else '--data.path'}; leave it out.")
    set_threads(args.threads)
    opened = open_model(args.path)
    console = Console(stderr=True)
    with Progress(transient=True, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("evaluating", total=None)

        def progress(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        result = _evaluate_tasks(args, opened, progress) if args.tasks else _evaluate_text(args, opened, progress)
    if args.json:
        print(json.dumps(result.as_json))
    else:
        result.show()


class _Result(NamedTuple):
    """What was found, for programs and for people."""

    as_json: dict[str, Any]
    show: Callable[[], None]


def _evaluate_text(args: argparse.Namespace, opened: Opened, progress: Callable[[int, int], None]) -> _Result:
    from bitnet.data.corpora import Reading
    from bitnet.evaluation.perplexity import evaluate_text

    found = evaluate_text(
        opened.model,
        opened.tokenizer,
        args.data_path,
        Reading(text_key=args.text_key, separator=args.separator),
        seq_len=args.seq_len,
        stride=args.stride,
        limit=args.limit,
        batch_size=8 if args.batch_size is None else args.batch_size,
        eos_id=opened.eos_id,
        progress=progress,
    )
    score = found.score

    def show() -> None:
        part = "" if args.limit is None else f" (the first {args.limit} windows)"
        print(
            f"text           {args.data_path}: {found.documents} documents, {found.text_bytes:,} bytes, "
            f"{score.tokens:,} tokens{part}"
        )
        print(f"loss           {score.loss:.4f} nats per token")
        print(f"perplexity     {score.perplexity:.3f} per token")
        print(f"bits per byte  {score.bits_per_byte:.4f}")

    return _Result(
        {
            "loss": score.loss,
            "perplexity": score.perplexity,
            "bits_per_byte": score.bits_per_byte,
            "tokens": score.tokens,
            "documents": found.documents,
            "text_bytes": found.text_bytes,
        },
        show,
    )


def _evaluate_tasks(args: argparse.Namespace, opened: Opened, progress: Callable[[int, int], None]) -> _Result:
    from dataclasses import asdict
    from importlib.util import find_spec

    from bitnet.estimate import count_parameters
    from bitnet.progress import TableConsole

    if find_spec("lm_eval") is None:
        raise UserError("--tasks needs lm-eval (pip install 'bitnet-lightning[eval]').")
    from bitnet.evaluation.lm import BitNetLM
    from bitnet.evaluation.tasks import run_tasks, table_of

    lm = BitNetLM(opened.model, opened.tokenizer, eos_id=opened.eos_id, progress=progress)
    data = None if args.tasks_data is None else Path(args.tasks_data)
    scores = run_tasks(lm, args.tasks.split(","), data=data, limit=args.limit, few_shot=args.few_shot)
    parameters = count_parameters(opened.model.config).total

    def show() -> None:
        table, others = table_of(scores, parameters)
        console = TableConsole(width=120)
        console.print(table)
        for source in dict.fromkeys(other.source for other in others):
            names = ", ".join(other.name for other in others if other.source == source)
            console.print(f"{names}: {source}; prompts may differ a little")
        if not others:
            console.print(f"no published figures for {parameters / 1e6:,.1f} M parameters on these tasks")

    return _Result({"parameters": parameters, "tasks": [asdict(score) for score in scores]}, show)


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
    from bitnet.inference.files import packed_file

    check_outputs(args)
    check_device(args.device)
    shape = None
    packed = packed_file(args.model)
    if packed is None:
        from bitnet.training.cli import parse_config

        if Path(args.model).is_dir() or args.model.endswith(".ckpt"):
            raise UserError(f"{args.model}: pack it first (bitnet pack {args.model} --out NAME.safetensors).")
        parsed = parse_config(["--config", args.model])
        shape = parsed.model, str(getattr(parsed.recipe, "weight", "none"))
    elif args.head:
        raise UserError(f"--head {args.head}: {packed} has a head of its own; leave it out.")
    run(
        args.model if packed is None else str(packed),
        shape,
        threads=args.threads,
        tokens=args.tokens,
        prompt_tokens=args.prompt_tokens,
        depth=args.depth,
        head=args.head or "int8",
        device=args.device,
        json_file=args.json,
        plot=args.plot,
    )


def bench_train(args: argparse.Namespace) -> None:
    """Time of a training step of several recipes, side by side, at the shapes of a config."""
    from bitnet.training.bench import bench_train as run
    from bitnet.training.cli import parse_config

    check_outputs(args)
    check_device(args.device)
    parsed = parse_config(["--config", args.config])
    import torch

    for option in ("steps", "rows", "seq_len", "layers"):
        if getattr(args, option) == 0:
            raise UserError(f"--{option} 0: must be at least 1.")
    run(
        parsed.model,
        parsed.optim,
        args.compare.split(","),
        label=args.config,
        rows=args.rows or parsed.data["batch_size"],
        seq_len=args.seq_len or parsed.data["seq_len"],
        layers=args.layers,
        threads=args.threads or [torch.get_num_threads()],
        steps=args.steps,
        device=args.device,
        bf16=args.precision == "bf16",
        compiled=args.compile,
        json_file=args.json,
        plot=args.plot,
    )


def add(command: AddCommand, commands: Any) -> None:
    p = command("evaluate", evaluate)
    p.add_argument("path", help=MODEL_HELP)
    p.add_argument("--data.path", dest="data_path", metavar="PATH", help="text: file, folder, glob or hf:NAME")
    p.add_argument("--tasks", metavar="T,T", help="names of lm-eval, .yaml files of it, or .jsonl files of items")
    p.add_argument("--tasks_data", metavar="DIR", help="folder with NAME.jsonl for each name of --tasks: no download")
    p.add_argument(
        "--few_shot", type=whole_number, default=None, help="examples before each item (default: the task's)"
    )
    p.add_argument("--limit", type=int, default=None, help="only the first items of a task, or windows of a text")
    p.add_argument(
        "--stride",
        type=int,
        default=None,
        help="text: windows begin this many tokens apart, and only what is new in each is scored (default: seq_len)",
    )
    p.add_argument("--threads", type=int, help="CPU threads")
    p.add_argument("--seq_len", type=int, default=None, help="tokens of context (default: the model's)")
    p.add_argument("--batch_size", type=int, help="text: windows at a time (default: 8)")
    p.add_argument("--json", action="store_true", help="print one JSON object")
    add_text_options(p)

    bench = commands.add_parser("bench", help="Measure kernels, or a whole model.", description="Measure.")
    benches = bench.add_subparsers(dest="what", metavar="WHAT", required=True, parser_class=OneLineArgumentParser)
    bench_command = adder(benches)
    p = bench_command("kernels", bench_kernels)
    p.add_argument("--shapes", default="bitnet-2b", help="a name (bitnet-2b, llama-8b, small) or NxK,NxK,...")
    p.add_argument("--m", type=numbers, default=[1, 4, 16, 64, 512, 2048], metavar="M,M", help="numbers of tokens")
    p.add_argument("--formats", default="ternary2,binary1", help="packed formats to time")
    p.add_argument("--device", default=None, help="cuda or cpu (default: cuda if there is one)")
    p.add_argument("--tune", action="store_true", help="first look for faster tiles on this GPU, and remember them")
    p.add_argument("--threads", type=int, help="CPU threads")
    p.add_argument("--json", metavar="FILE", help="write the figures")
    p.add_argument("--plot", metavar="FILE", help="draw them under the roofline of this machine (.png or .svg)")
    p = bench_command("train", bench_train)
    p.add_argument("--config", default="tiny", help="config file or name of a shipped config")
    p.add_argument("--compare", default="float,ternary,ternary_int8", metavar="R,R", help="recipes; the first is 1.00")
    p.add_argument("--rows", type=whole_number, help="rows of a batch (default: the config's)")
    p.add_argument("--seq_len", type=whole_number, help="tokens of a row (default: the config's)")
    p.add_argument("--layers", type=whole_number, help="blocks (default: the config's)")
    p.add_argument("--steps", type=whole_number, default=9, help="measured steps of each")
    p.add_argument("--threads", type=numbers, default=None, metavar="T,T", help="CPU threads, one table each")
    p.add_argument("--device", default="cpu", help="cpu or cuda")
    p.add_argument("--precision", choices=("float32", "bf16"), default="float32", help="bf16: under autocast")
    p.add_argument("--compile", action="store_true", help="torch.compile for every block")
    p.add_argument("--json", metavar="FILE", help="write the figures")
    p.add_argument("--plot", metavar="FILE", help="draw them (.png or .svg)")
    p = bench_command("decode", bench_decode)
    p.add_argument("model", help="packed model, config file or name of a shipped config")
    p.add_argument("--threads", type=numbers, default=None, metavar="T,T", help="CPU threads, one run each")
    p.add_argument("--tokens", type=int, help="tokens to decode (default: 128, or what the context holds)")
    p.add_argument("--prompt_tokens", type=int, help="tokens to prefill (default: 256, likewise)")
    p.add_argument("--depth", type=int, default=0, help="tokens that are in the cache when decoding begins")
    p.add_argument("--head", choices=HEAD_NAMES, help="embedding and head of a config's model (default: int8)")
    p.add_argument("--device", default="cpu", help="cpu or cuda")
    p.add_argument("--json", metavar="FILE", help="write the figures")
    p.add_argument("--plot", metavar="FILE", help="draw them (.png or .svg)")
