"""``bitnet pack`` and ``bitnet generate``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from bitnet.commands.parser import FORMAT_NAMES, HEAD_NAMES, MODEL_HELP, AddCommand
from bitnet.errors import UserError
from bitnet.option_checks import check_device, check_folder, set_threads

if TYPE_CHECKING:
    from bitnet.generation import Sampling
    from bitnet.interchange.opened import Opened

SAMPLING_OPTIONS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")


def pack(args: argparse.Namespace) -> None:
    """Pack a trained model to 2 bits a weight or fewer, into one file."""
    from bitnet.inference.files import save_packed
    from bitnet.inference.header import read_header, verify
    from bitnet.inference.packed_model import PackedTransformer
    from bitnet.inference.packing import pack as pack_model
    from bitnet.inspection import print_packed
    from bitnet.interchange.opened import open_model

    out = Path(args.out)
    if out.suffix != ".safetensors":
        raise UserError(f"--out {out}: the name must end in .safetensors.")
    check_folder("--out", args.out)
    opened = open_model(args.path)
    packed = opened.model
    if not isinstance(packed, PackedTransformer):
        packed = pack_model(packed, head=args.head or "float32")
    elif args.head not in (None, packed.head_dtype):
        raise UserError(f"--head {args.head}: this model is packed already, with its head in {packed.head_dtype}.")
    save_packed(packed, opened.tokenizer, out, format=args.format, recipe=opened.recipe, extras=opened.extras())
    verify(read_header(out))  # every digest is checked once before the file is announced
    print_packed(out)


def generate(args: argparse.Namespace) -> None:
    """Continue one prompt or several, or chat."""
    import torch

    from bitnet.generation import Sampling, stream_batch
    from bitnet.interchange.opened import open_model

    if args.max_new_tokens < 1:
        raise UserError(f"--max_new_tokens {args.max_new_tokens}: must be at least 1.")
    if args.chat and args.prompt:
        raise UserError("--chat asks for what you say; leave out --prompt.")
    if not args.chat and not args.prompt:
        raise UserError("give a --prompt, or --chat.")
    if args.stream and len(args.prompt) > 1:
        raise UserError("--stream shows one text as it grows: give one --prompt.")
    for prompt in args.prompt:
        check_utf8("--prompt", prompt)
    sampling = Sampling(**{name: getattr(args, name) for name in SAMPLING_OPTIONS})
    set_threads(args.threads)
    check_device(args.device)
    with torch.inference_mode():
        opened = open_model(args.path, args.device)
        if args.chat:
            chat(opened, sampling, args.max_new_tokens, args.stop)
            return
        steps = stream_batch(
            opened.model,
            opened.tokenizer,
            args.prompt,
            max_new_tokens=args.max_new_tokens,
            sampling=sampling,
            stop=args.stop,
            stop_id=opened.eos_id,
        )
        if args.stream:
            print(args.prompt[0], end="", flush=True)
            for (text,) in steps:
                print(text, end="", flush=True)
            print()
            return
        for prompt, parts in zip(args.prompt, zip(*steps, strict=True), strict=True):
            print(prompt + "".join(parts))


def check_utf8(name: str, text: str) -> str:
    """``text``. Raises ``UserError`` for surrogates, which is how Python keeps bytes that are not UTF-8."""
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise UserError(f"{name}: has bytes that are not UTF-8.")
    return text


def chat(opened: Opened, sampling: Sampling, max_new_tokens: int, stop: list[str]) -> None:
    """Read lines, answer each; ends at an empty line or the end of input."""
    from bitnet.chat import Conversation

    talk = Conversation(opened.model, opened.tokenizer, opened.chat_template, opened.eos_id)
    if sys.stdin.isatty():
        print("Say something; an empty line ends.")
    while True:
        try:
            said = check_utf8("--chat", input("> " if sys.stdin.isatty() else ""))
        except EOFError:
            return
        except UnicodeDecodeError as error:
            raise UserError("--chat: what was said has bytes that are not UTF-8.") from error
        if not said.strip():
            return
        try:
            for text in talk.answer(said, max_new_tokens=max_new_tokens, sampling=sampling, stop=stop):
                print(text, end="", flush=True)
        except UserError as error:  # too much was said; what was said before is kept
            if not sys.stdin.isatty():
                raise
            print(f"error: {error}", file=sys.stderr)
        print()


def add(command: AddCommand) -> None:
    p = command("pack", pack)
    p.add_argument("path", help=MODEL_HELP)
    p.add_argument("--out", required=True, help="file to write, NAME.safetensors")
    p.add_argument("--format", choices=FORMAT_NAMES, help="default: ternary2 or binary1, as the weights are")
    p.add_argument("--head", choices=HEAD_NAMES, help="storage of embedding and head (default: float32)")

    p = command("generate", generate)
    p.add_argument("path", help=MODEL_HELP)
    p.add_argument("--prompt", action="append", default=[], help="text to continue; may be given several times")
    p.add_argument("--chat", action="store_true", help="talk, with the chat template of the model")
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
