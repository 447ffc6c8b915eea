"""``bitnet export`` and ``bitnet import``."""

from __future__ import annotations

import argparse
from pathlib import Path

from bitnet.commands.parser import MODEL_HELP, AddCommand
from bitnet.errors import UserError
from bitnet.option_checks import new_path, whole_number


def export(args: argparse.Namespace) -> None:
    """Write a model for another program, and prove it by asking that program."""
    from bitnet.interchange.exporting import export_gguf, export_hf, export_peft
    from bitnet.interchange.opened import open_model

    out = new_path("--out", args.out)
    for option, format in (("type", "gguf"), ("form", "hf"), ("dtype", "hf"), ("push", "hf")):
        if getattr(args, option) is not None and args.format != format:
            raise UserError(f"--{option} is for --format {format}.")
    if args.private and not args.push:
        raise UserError("--private is for --push.")
    if args.format == "gguf":
        if out.suffix != ".gguf":
            raise UserError(f"--out {out}: the name must end in .gguf.")
        export_gguf(open_model(args.path), out, kind=args.type or "tq2_0", check_tokens=args.check_tokens)
        return
    if args.format == "peft":
        export_peft(open_model(args.path), out, check_tokens=args.check_tokens)
        return
    export_hf(
        open_model(args.path),
        out,
        name=args.push or out.name,
        source=Path(args.path),
        form=args.form or "bitlinear",
        dtype=args.dtype or "float32",
        check_tokens=args.check_tokens,
    )
    if args.push:
        from bitnet.interchange.push import push

        print(f"uploaded to {push(out, args.push, private=args.private)}")


def import_(args: argparse.Namespace) -> None:
    """Make a run folder of another program's model: a Hugging Face folder or a GGUF file."""
    from bitnet.interchange.importing import import_model

    out = new_path("--out", args.out)
    import_model(Path(args.path), out, trainable=args.trainable, check_tokens=args.check_tokens)


def add(command: AddCommand) -> None:
    p = command("export", export)
    p.add_argument("path", help=MODEL_HELP)
    p.add_argument("--format", required=True, choices=("hf", "gguf", "peft"))
    p.add_argument("--out", required=True, help="folder (hf, peft) or file NAME.gguf to write")
    p.add_argument("--type", choices=("tq2_0", "tq1_0", "q2_0", "i2_s", "f32", "f16"), help="gguf: default tq2_0")
    p.add_argument(
        "--form",
        choices=("bitlinear", "autobitlinear", "online", "dense", "compressed-tensors"),
        help="hf: bitlinear (packed, equal bit for bit; the default), autobitlinear (packed, decodes faster there), "
        "online (latent weights), dense (no quantization), compressed-tensors (of post-training recipes)",
    )
    p.add_argument("--dtype", choices=("float32", "bfloat16"), help="hf: dtype of all floats (default float32)")
    p.add_argument("--push", metavar="USER/NAME", help="hf: upload the folder when it has passed its check")
    p.add_argument("--private", action="store_true", help="with --push: make a private repository")
    p.add_argument(
        "--check_tokens", type=whole_number, default=128, help="tokens to compare in the other program; 0: no check"
    )

    p = command("import", import_)
    p.add_argument("path", help="Hugging Face folder or GGUF file")
    p.add_argument("--out", required=True, help="run folder to make")
    p.add_argument("--trainable", action="store_true", help="of packed weights, also write latent ones to train on")
    p.add_argument(
        "--check_tokens", type=whole_number, default=128, help="tokens to compare in the other program; 0: no check"
    )
