"""``bitnet quantize`` and ``bitnet synthesize``: from a float model to low-bit ones, and to text to train them on."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING, Any

from bitnet.commands.parser import MODEL_HELP, AddCommand, add_text_options
from bitnet.errors import UserError
from bitnet.option_checks import new_path, set_threads

if TYPE_CHECKING:
    from torch import Tensor

    from bitnet.interchange.opened import Opened
    from bitnet.recipes import PostTraining

RECIPE_NAMES = (
    "rtn", "gptq", "awq", "spqr", "llm_int8", "smoothquant", "zeroquant", "efficient_qat", "qat", "llm_qat", "peqa",
    "qlora", "loftq", "qa_lora",
)  # fmt: skip
ONLY_BY_TRAINING = ("qat", "llm_qat", "peqa", "qlora", "qa_lora")
"""Recipes that are nothing but rounding to nearest before ``fit`` has trained them."""


def _recipe_parser(name: str) -> Any:
    """A parser whose options are the fields of the recipe called ``name``."""
    import jsonargparse

    from bitnet.parse_errors import explain
    from bitnet.recipes import POST_TRAINING

    class Parser(jsonargparse.ArgumentParser):
        def error(self, message: str, ex: Exception | None = None) -> Any:
            known = {option.lstrip("-") for action in self._actions for option in action.option_strings}
            raise UserError(f"bitnet quantize --recipe {name}: {explain(message, known)}")

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = Parser(allow_abbrev=False, add_help=False)
    parser.add_class_arguments(POST_TRAINING[name], as_group=False)
    return parser


def recipe_of(name: str, options: list[str]) -> PostTraining:
    """The recipe called ``name`` with ``--field value`` options. Raises ``UserError`` for an unknown or wrong one."""
    from bitnet.recipes import POST_TRAINING

    kind: type[PostTraining] = POST_TRAINING[name]
    return kind(**_recipe_parser(name).parse_args(options).as_dict())


class ShowOptions(argparse.Action):
    """``--options RECIPE``: print the options of a recipe, and stop."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: str | None = None) -> None:
        print(_recipe_parser(values).format_help().partition("options:")[2].strip("\n") or "no options")
        parser.exit()


def _calibration(args: argparse.Namespace, opened: Opened, recipe: PostTraining) -> list[Tensor]:
    from bitnet.data.calibration import calibration_batches
    from bitnet.data.corpora import Reading

    if not recipe.needs_text:
        for option in ("calibration", "calibration_rows", "calibration_len", "batch_size"):
            if getattr(args, option) is not None:
                raise UserError(f"--{option}: {args.recipe} looks at weights only; leave it out.")
        return []
    if not args.calibration:
        raise UserError(f"--recipe {args.recipe} looks at activations: give it text with --calibration.")
    context = opened.model.config.max_seq_len
    return calibration_batches(
        opened.tokenizer,
        opened.eos_id,
        args.calibration,
        Reading(text_key=args.text_key, separator=args.separator),
        rows=128 if args.calibration_rows is None else args.calibration_rows,
        seq_len=context if args.calibration_len is None else min(args.calibration_len, context),
        batch_size=4 if args.batch_size is None else args.batch_size,
    )


def quantize(args: argparse.Namespace) -> None:
    """Put a float model on an integer grid, with or without calibration text; options of a recipe are its fields."""
    from bitnet.checkpoint import describe, is_float, recipe_options, weights_digest, write_run
    from bitnet.interchange.exporting import named_when_proven
    from bitnet.interchange.opened import open_model
    from bitnet.memory import peak_bytes
    from bitnet.progress import PreparationProgress

    out = new_path("--out", args.out)
    set_threads(args.threads)
    if args.recipe in ONLY_BY_TRAINING:
        raise UserError(
            f"--recipe {args.recipe}: it is trained; use 'bitnet fit --config posttrain/{args.recipe} "
            f"--model.init_from {args.path}'."
        )
    recipe = recipe_of(args.recipe, args.recipe_options)
    opened = open_model(args.path)
    if not is_float({"recipe": opened.recipe}):
        raise UserError(f"{args.path}: a low-bit model already; {args.recipe} starts from a float one.")
    parent = weights_digest(opened.model.state_dict())
    batches = _calibration(args, opened, recipe)
    started = time.monotonic()
    recipe.prepare(opened.model, batches, PreparationProgress())
    seconds = time.monotonic() - started
    origin: dict[str, Any] = {
        "parent": str(args.path),
        "parent_sha256": parent,
        "seconds": round(seconds, 1),
        "peak_memory_mb": round(peak_bytes() / 2**20),
        **({"calibration": args.calibration, "calibration_tokens": sum(b.numel() for b in batches)} if batches else {}),
        **recipe.found,
    }
    extras = opened.extras() | {"origin": origin}
    with named_when_proven(out) as folder:
        folder.mkdir()
        description = describe(opened.model.config, recipe, opened.tokenizer.to_str(), extras)
        write_run(folder, description, opened.model.state_dict(), origin)
    settings = ", ".join(f"{key} {value}" for key, value in recipe_options(recipe).items() if key != "name")
    print(f"{out}: {type(recipe).__name__} ({settings})")
    print(f"  {seconds:.1f} s, peak memory {origin['peak_memory_mb']:,} MB")
    if "alpha" in recipe.found:
        print(f"  alpha {recipe.found['alpha']}")
    for number, (before, after) in enumerate(recipe.found.get("block_errors", [])):
        print(f"  block {number}: held-out error {before:.3g} -> {after:.3g}")
    print(f"Next: bitnet evaluate {out} --data.path TEXT, or bitnet pack {out} --out {out.name}.safetensors")


def synthesize(args: argparse.Namespace) -> None:
    """Let a model write text to train a low-bit copy of it on, without data (LLM-QAT)."""
    import torch

    from bitnet.data.token_folder import write_token_folder
    from bitnet.interchange.opened import open_model
    from bitnet.progress import PreparationProgress
    from bitnet.synthesis import synthesize as write_text

    out = new_path("--out", args.out)
    set_threads(args.threads)
    progress = PreparationProgress()
    with torch.inference_mode():
        opened = open_model(args.path)
        texts = write_text(
            opened.model,
            sequences=args.sequences,
            length=opened.model.config.max_seq_len if args.length is None else args.length,
            seed=args.seed,
            batch_size=args.batch_size,
            stop_id=opened.eos_id,
            progress=lambda done, total: progress("writing", done, total),
        )
        totals = write_token_folder(out, texts, opened.tokenizer, opened.eos_id, source=f"synthesized by {args.path}")
    print(f"{out}: {args.sequences} texts, {totals['train']:,} tokens to train on and {totals['val']:,} held out")
    print(f"Next: bitnet fit --config posttrain/llm_qat --model.init_from {args.path} --data.path {out}")


def add(command: AddCommand) -> None:
    p = command("quantize", quantize)
    p.add_argument("path", help=f"float model: {MODEL_HELP}")
    p.add_argument("--recipe", required=True, choices=RECIPE_NAMES)
    p.add_argument(
        "--options", action=ShowOptions, choices=RECIPE_NAMES, help="print the options of a recipe, and stop"
    )
    p.add_argument("--out", required=True, help="run folder to make")
    p.add_argument("--calibration", metavar="TEXT", help="text for recipes that look at activations")
    p.add_argument("--calibration_rows", type=int, help="pieces of it that are used (default: 128)")
    p.add_argument("--calibration_len", type=int, help="tokens of a piece (default: the context)")
    p.add_argument("--batch_size", type=int, help="pieces at a time (default: 4)")
    p.add_argument("--threads", type=int, help="CPU threads")
    add_text_options(p)

    p = command("synthesize", synthesize)
    p.add_argument("path", help=MODEL_HELP)
    p.add_argument("--out", required=True, help="token folder to make")
    p.add_argument("--sequences", type=int, default=1024, help="texts to write")
    p.add_argument("--length", type=int, help="most tokens of a text (default: the context)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--batch_size", type=int, default=64, help="texts written side by side")
    p.add_argument("--threads", type=int, help="CPU threads")
