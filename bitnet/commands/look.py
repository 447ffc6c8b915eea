"""``bitnet inspect`` and ``bitnet prepare``."""

from __future__ import annotations

import argparse
from pathlib import Path

from bitnet.commands.parser import AddCommand, add_text_options
from bitnet.errors import UserError
from bitnet.option_checks import check_folder, numbers

SCALING_OPTIONS = ("strategy", "gather", "gpu", "utilisation", "int8")


def inspect(args: argparse.Namespace) -> None:
    """Parameters, sizes, memory and FLOPs of a config, or the weights of a run or a packed model."""
    from bitnet.inference.files import packed_file
    from bitnet.inference.header import read_header, verify
    from bitnet.inspection import inspect_config, inspect_run, inspect_scaling, print_packed

    target = Path(args.target)
    file = packed_file(target)
    if args.verify and file is None:
        raise UserError(f"--verify checks the digests of a packed model; leave it out for {args.target}.")
    given = [name for name in (*SCALING_OPTIONS, "json") if getattr(args, name) is not None]
    if given and args.devices is None:
        raise UserError(f"--{given[0]} goes with --devices; leave it out.")
    if file is None and not target.is_dir() and target.suffix != ".ckpt":
        if args.devices is None:
            inspect_config(args.target, args.overrides)
        else:
            check_folder("--json", args.json)
            how = {name: getattr(args, name) for name in given if name in SCALING_OPTIONS}
            inspect_scaling(args.target, args.overrides, args.devices, json_file=args.json, **how)
        return
    if args.devices is not None:
        raise UserError(f"--devices is about a config that is to be trained; {target} is a run or a packed model.")
    if args.overrides:
        raise UserError(f"{args.overrides[0]}: options change a config, not a run that is finished.")
    if file is None:
        inspect_run(target)
        return
    print_packed(file)
    if args.verify:
        packed = read_header(file)
        verify(packed)
        print(f"verified: {len(packed.tensors)} tensors, {packed.size:,} bytes, every digest is right")


def prepare(args: argparse.Namespace) -> None:
    """Tokenize text once, into a folder that data.path takes."""
    import shutil

    from bitnet.data.datamodule import TokenDataModule
    from bitnet.interchange.exporting import named_when_proven
    from bitnet.progress import PreparationProgress

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
    with named_when_proven(out) as partial:
        shutil.copytree(store.folder, partial)
    tokens = sum(store.totals(f"train-{i}").tokens for i in range(store.sources))
    print(
        f"{out}: {tokens:,} training tokens, {store.totals('val').tokens:,} to validate on, "
        f"vocabulary {store.vocab_size}"
    )


def add(command: AddCommand) -> None:
    p = command("inspect", inspect)
    p.add_argument("target", help="config, name of a shipped config, run folder, checkpoint or packed model")
    p.add_argument("--verify", action="store_true", help="read a packed model and check every digest")
    p.add_argument("--devices", type=numbers, metavar="N,N", help="cost of training on so many GPUs, on paper")
    p.add_argument("--strategy", choices=("ddp", "fsdp", "tp"), help="with --devices (default: fsdp)")
    p.add_argument("--gather", choices=("levels", "latent", "both"), help="fsdp: what is gathered (default: both)")
    p.add_argument("--gpu", choices=("h100", "a100", "rtx4090"), help="whose data sheet to use (default: h100)")
    p.add_argument("--utilisation", type=float, help="share of the matrix units' peak, with --devices (default: 0.45)")
    p.add_argument(
        "--int8", action="store_true", default=None, help="with --devices: all products of low-bit layers on int8 units"
    )
    p.add_argument("--json", metavar="FILE", help="write the figures of --devices")
    p.set_defaults(overrides=[])

    p = command("prepare", prepare)
    p.add_argument(
        "--data.path",
        dest="data_path",
        required=True,
        action="append",
        metavar="PATH",
        help="text; may be given again for more",
    )
    p.add_argument("--data.val_path", dest="val_path", action="append", metavar="PATH", help="held-out text; likewise")
    p.add_argument("--data.vocab_size", dest="vocab_size", type=int, default=32_000)
    p.add_argument("--data.tokenizer", dest="tokenizer", help="a tokenizer.json instead of training one")
    p.add_argument("--data.val_fraction", dest="val_fraction", type=float, default=0.05)
    p.add_argument("--out", required=True, help="folder to make")
    add_text_options(p)
