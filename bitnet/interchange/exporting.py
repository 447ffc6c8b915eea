"""``bitnet export``: write under a temporary name, let the other program read it, and only then give it its name."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bitnet.errors import UserError
from bitnet.interchange.card import write_card
from bitnet.interchange.check import (
    SAME_WEIGHTS,
    Report,
    bound_of_gguf,
    bound_of_hf,
    check_gguf,
    check_gguf_in_ik,
    check_hf,
)
from bitnet.interchange.gguf_export import architecture, check_type, write_gguf
from bitnet.interchange.hf_export import Form, check_form, write_hf
from bitnet.interchange.opened import Opened
from bitnet.interchange.peft_export import adapters, write_peft
from bitnet.layers import quantized_layers


@contextmanager
def named_when_proven(out: Path) -> Iterator[Path]:
    """A path beside ``out`` to write to, which becomes ``out`` when the body succeeds and vanishes when it fails."""
    # The suffix stays at the end: programs look at it.
    partial = out.with_name(f".{os.getpid()}.partial.{out.name}")
    try:
        yield partial
        os.replace(partial, out)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}).") from error
    finally:
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)


def announce(report: Report, out: Path) -> None:
    """Print what the other program found. Raises ``UserError`` when it computes something else."""
    print("\n".join(report.lines()))
    if report.problems:
        raise UserError(
            f"{out}: not written, since {report.program} computes another model: {'; '.join(report.problems)}."
        )


def _size(path: Path) -> str:
    files = [path] if path.is_file() else list(path.iterdir())
    return f"{sum(file.stat().st_size for file in files) / 1e6:,.2f} MB"


def export_hf(opened: Opened, out: Path, *, name: str, source: Path, form: Form, dtype: str, check_tokens: int) -> None:
    """Write a Hugging Face folder. Raises ``UserError`` when the model does not fit the form or fails its check."""
    form = check_form(opened.model, form, dtype)
    with named_when_proven(out) as folder:
        folder.mkdir()
        write_hf(
            folder,
            opened.model,
            opened.tokenizer,
            form=form,
            dtype=dtype,
            eos_id=opened.eos_id,
            chat_template=opened.chat_template,
        )
        integers = any(layer.act is not None for layer in quantized_layers(opened.model).values())
        needs = ("compressed_tensors",) if form == "compressed-tensors" else ()
        report = check_hf(opened, folder, bound_of_hf(form, dtype, integers), check_tokens, needs)
        write_card(folder, opened, name=name, source=source, form=form, dtype=dtype, report=report)
        print(f"{out}: {_size(folder)}, form {form}, {dtype}")
        announce(report, out)


def export_peft(opened: Opened, out: Path, *, check_tokens: int) -> None:
    """Write adapters and their base. Raises ``UserError`` for a model without adapters, or one that fails its check."""
    adapters(opened.model)
    with named_when_proven(out) as folder:
        folder.mkdir()
        write_peft(folder, opened, base_name=f"{out.name}/base")
        report = check_hf(opened, folder, SAME_WEIGHTS, check_tokens, ("peft",))
        print(f"{out}: adapters of {len(adapters(opened.model))} linears; their base is in {out}/base")
        announce(report, out)


def export_gguf(opened: Opened, out: Path, *, kind: str, check_tokens: int) -> None:
    """Write a GGUF file. Raises ``UserError`` when the model does not fit the type or fails its check."""
    check_type(opened.model, kind)
    arch = architecture(opened.model.config, kind)
    with named_when_proven(out) as file:
        write_gguf(
            file,
            opened.model,
            opened.tokenizer,
            kind=kind,
            name=out.stem,
            eos_id=opened.eos_id,
            chat_template=opened.chat_template,
        )
        if arch == "bitnet-b1.58" or kind == "i2_s":
            report = check_gguf_in_ik(opened, file, kind, check_tokens)
        else:
            report = check_gguf(opened, file, bound_of_gguf(kind), check_tokens)
        print(f"{out}: {_size(file)}, architecture {arch}, type {kind}")
        announce(report, out)
