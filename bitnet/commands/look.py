"""``bitnet inspect`` and ``bitnet prepare``."""

from __future__ import annotations

import argparse
from pathlib import Path

from bitnet.commands.parser import AddCommand, add_text_options
from bitnet.errors import UserError
from bitnet.option_checks import check_folder, numbers


def inspect(args: argparse.Namespace) -> None:
    """Parameters, sizes, memory and FLOPs of a config, or the weights of a run or a packed model."""
    from bitnet.inference.files import packed_file
    from bitnet.inference.header import read_header, verify
    from bitnet.inspection import inspect_config, inspect_run, print_packed

    target = Path(args.target)
    file = packed_file(target)
    if file is None and not target.is_dir() and target.suffix != ".ckpt":
        if args.devices is not None:
            check_folder("--json", args.json)
            from bitnet.inspection import inspect_scaling

            options = (args.devices, args.strategy, args.gather, args.gpu, args.utilisation, args.int8)
            inspect_scaling(args.target, args.overrides, *options, args.json)
            return
        given = {"--json": args.json, "--int8": args.int8, "--verify": args.verify}
        for option in (option for option, value in given.items() if value):
            needs = "is about a packed model" if option == "--verify" else "goes with --devices"
            raise UserError(f"{option} {needs}; leave it out for {args.target}.")
        inspect_config(args.target, args.overrides)
        return
    if args.devices is not None:
        raise UserError(f"--devices is about a config that is to be trained; {target} is a run or a packed model.")
    if args.overrides:
        raise UserError(f"{args.overrides[0]}: options change a config, not a run that is finished.")
    if file is None:
        if args.verify:
            raise UserError(f"--verify checks the digests of a packed model; {target} is a run.")
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
    p.add_argument("--strategy", choices=("ddp", "fsdp", "tp"), default="fsdp", help="with --devices")
    p.add_argument("--gather", choices=("levels", "latent", "both"), default="both", help="fsdp: what is gathered")
    p.add_argument("--gpu", choices=("h100", "a100", "rtx4090"), default="h100", help="whose data sheet to use")
    p.add_argument("--utilisation", type=float, default=0.45, help="share of the matrix units' peak, with --devices")
    p.add_argument("--int8", action="store_true", help="with --devices: all products of low-bit layers on int8 units")
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
