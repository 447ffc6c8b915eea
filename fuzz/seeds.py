"""Write the seeds of the targets: one small model in every form that the importers know."""

import json
import struct
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models

from bitnet.config import ModelConfig
from bitnet.inference.files import save_packed
from bitnet.inference.packing import pack
from bitnet.interchange.gguf_export import write_gguf
from bitnet.interchange.gguf_file import GgufFile
from bitnet.interchange.gguf_tokenizer import SPLITS
from bitnet.interchange.hf_export import write_hf
from bitnet.model import Transformer
from bitnet.recipes import BitNet

CORPUS = Path(__file__).parent / "corpus"


def model(dim: int, weight: str, **sizes: object) -> Transformer:
    torch.manual_seed(0)
    fields = {"vocab_size": 4, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "ffn_dim": dim, "max_seq_len": 8}
    made = Transformer(ModelConfig(dim=dim, **{**fields, **sizes}))
    BitNet(weight=weight, act_bits="none" if weight == "none" else 8).prepare(made)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.fill_(1.0)  # as the targets fill tensors: digests are then right
        for name, linear in made.named_modules():
            if isinstance(linear, torch.nn.Linear) and name != "lm_head":
                linear.weight.fill_(-1.0)  # level -1, whose code is 0 in every format
    return made.eval()


def tokenizer() -> Tokenizer:
    made = Tokenizer(models.BPE({"a": 0, "b": 1, "<|endoftext|>": 2}, []))
    made.pre_tokenizer, made.decoder = SPLITS["gpt-2"], decoders.ByteLevel()
    return made


def save(name: str, seed: str, content: bytes) -> None:
    (CORPUS / name).mkdir(parents=True, exist_ok=True)
    (CORPUS / name / seed).write_bytes(content)


def header_of(file: Path) -> dict[str, object]:
    content = file.read_bytes()
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # Widths at which no row has padding, which is not zero.
        packed = (("ternary", None, 256), ("ternary", "ternary_base3", 40), ("binary", None, 256))
        for weight, format, dim in packed:
            file, head = folder / "m.safetensors", "float32" if format is None else "float16"
            save_packed(pack(model(dim, weight), head), tokenizer(), file, format=format, recipe={"name": "BitNet"})
            header = header_of(file)
            description = header.pop("__metadata__")["bitnet"]
            seed = f"seed_{weight}_{dim}"
            save("packed", seed, description.encode() + b"\0" + json.dumps(header).encode())
        for form, weight in (("bitlinear", "ternary"), ("online", "ternary"), ("dense", "none")):
            (out := folder / form).mkdir()
            write_hf(out, model(8, weight), tokenizer(), form=form, dtype="float32", eos_id=2, chat_template="x")
            header = header_of(out / "model.safetensors")
            index = {"weight_map": {key: "model.safetensors" for key in header if key != "__metadata__"}}
            parts = [(out / "config.json").read_bytes(), json.dumps(header).encode()]
            save("hf", f"seed_{form}", b"\0".join([*parts, b'{"bos_token": "a", "add_bos_token": true}']))
            if form == "dense":
                save("hf", "seed_index", b"\0".join([*parts, b"{}", json.dumps(index).encode()]))
        for kind, dim in (("f32", 8), ("f16", 8), ("tq2_0", 256)):
            file = folder / "m.gguf"
            made = model(dim, "ternary" if dim == 256 else "none", sub_norm=kind == "f32")
            write_gguf(file, made, tokenizer(), kind=kind, name="t", eos_id=2, chat_template="x")
            start = min(tensor.start for tensor in GgufFile(file).tensors.values())
            save("gguf", f"seed_{kind}", file.read_bytes()[:start])
    save("gguf", "seed_list", b"GGUF" + struct.pack("<IQQQ1sIIQ3H", 3, 0, 1, 1, b"k", 9, 2, 3, 1, 2, 3))


if __name__ == "__main__":
    main()
