"""A Hugging Face folder as a model of ours: BitNet, Llama with bit layers, and plain Llama-shaped float models.

Packed ternary weights become packed ternary weights, each with the scale that the file has. Latent weights (mode
``online``) become a BitNet run that can be trained on. Float weights become a float model in the dtype of the file.
Tensors are read one at a time, so that an import takes the memory of its result and of one matrix.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from bitnet.config import ModelConfig
from bitnet.data.tokenizer import begin_with, load_tokenizer
from bitnet.errors import UserError
from bitnet.inference.files import place
from bitnet.inference.packed_linear import HeadDtype, LayerForm, PackedLinear, StoredEmbedding, StoredHead
from bitnet.inference.packed_model import PackedTransformer
from bitnet.inference.packing import packed_skeleton
from bitnet.interchange.hf_export import TRITS, unpack_rows
from bitnet.interchange.names import HUGGING_FACE
from bitnet.interchange.opened import Opened, config_of
from bitnet.model import RMSNorm, Transformer, without_memory
from bitnet.recipes import BitNet
from bitnet.tensor_file import TensorFile, check_plain_name
from bitnet_kernels import FORMATS

DEFAULTS: dict[str, dict[str, Any]] = {
    "bitnet": {"rms_norm_eps": 1e-5, "rope_theta": 500_000.0, "hidden_act": "relu2", "max_position_embeddings": 2048},
    "llama": {"rms_norm_eps": 1e-6, "rope_theta": 10_000.0, "hidden_act": "silu", "max_position_embeddings": 2048},
}
"""What transformers assumes when config.json does not say."""
SIZES = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "intermediate_size", "max_position_embeddings",
)  # fmt: skip


class Folder:
    """The tensors of a folder, from one file or from shards, each read when it is asked for."""

    def __init__(self, folder: Path) -> None:
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            names = _json(index).get("weight_map")
            if not isinstance(names, dict):
                raise UserError(f"{index}: weight_map = {str(names)[:50]}: must name the file of each tensor.")
            for name in names.values():
                check_plain_name(index, name)
            files = {name: TensorFile(folder / name) for name in sorted(set(names.values()))}
            self._where = {tensor: files[file] for tensor, file in names.items()}
            for tensor, file in self._where.items():
                if tensor not in file.entries:
                    raise UserError(f"{index}: {tensor} is not in {file.path.name}.")
        else:
            whole = folder / "model.safetensors"
            if not whole.is_file():
                others = ", ".join(sorted(p.name for p in folder.glob("*.bin"))) or "none"
                raise UserError(f"{folder}: no model.safetensors (pickled weights are not read; found: {others}).")
            one = TensorFile(whole)
            self._where = dict.fromkeys(one.entries, one)

    def __iter__(self) -> Any:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    def dtype(self, name: str) -> torch.dtype:
        return self._where[name].entries[name].dtype

    def shape(self, name: str) -> tuple[int, ...]:
        return self._where[name].entries[name].shape

    def read(self, name: str) -> Tensor:
        return self._where[name].read(name)


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read as JSON ({error}).") from error
    if not isinstance(content, dict):
        raise UserError(f"{file}: holds no JSON object.")
    return content


def read_config(file: Path) -> tuple[ModelConfig, dict[str, Any] | None]:
    """``(config, quantization_config)``. Raises ``UserError`` for a graph that ``Transformer`` does not compute."""
    raw = _json(file)
    kind = raw.get("model_type")
    if kind not in DEFAULTS:
        raise UserError(f"{file}: model_type {kind!r}; this library has the graphs of {' and '.join(DEFAULTS)}.")
    content = {**DEFAULTS[kind], **{key: value for key, value in raw.items() if value is not None}}
    for name in SIZES:
        if name not in content and name == "num_key_value_heads" and kind == "llama":
            content[name] = content.get("num_attention_heads")  # as the first Llamas
        if name not in content:
            raise UserError(f"{file}: has no {name}.")
        if type(content[name]) is not int or content[name] < 1:
            raise UserError(f"{file}: {name} = {content[name]!r}: must be a whole number above 0.")
    for name in ("rope_scaling", "rope_parameters", "quantization_config"):
        if not isinstance(content.get(name) or {}, dict):
            raise UserError(f"{file}: {name} = {str(content[name])[:50]}: must be an object.")
    scaling = content.get("rope_scaling") or {}
    rope = content.get("rope_parameters") or scaling
    scaled = {part.get("rope_type", part.get("type", "default")) for part in (rope, scaling)} != {"default"}
    for name, wrong in (
        ("attention_bias", bool(content.get("attention_bias"))),
        ("mlp_bias", bool(content.get("mlp_bias"))),
        ("rope_scaling", scaled),
        ("pretraining_tp", content.get("pretraining_tp", 1) != 1),
    ):
        if wrong:
            value = scaling or rope if name == "rope_scaling" else content[name]
            raise UserError(f"{file}: {name} = {value}: not in this graph.")
    try:
        heads, dim = content["num_attention_heads"], content["hidden_size"]
        if content.get("head_dim", dim // heads) * heads != dim:
            raise UserError(f"{file}: head_dim = {content['head_dim']}: must be hidden_size / num_attention_heads.")
        config = config_of(
            file,
            vocab_size=content["vocab_size"],
            dim=dim,
            n_layers=content["num_hidden_layers"],
            n_heads=heads,
            n_kv_heads=content["num_key_value_heads"],
            ffn_dim=content["intermediate_size"],
            max_seq_len=content["max_position_embeddings"],
            activation=_activation(content["hidden_act"], file),
            sub_norm=kind == "bitnet",
            tie_embeddings=bool(content.get("tie_word_embeddings", False)),
            norm_eps=content["rms_norm_eps"],
            init_std=content.get("initializer_range", 0.02),
            rope_theta=float(rope.get("rope_theta", content["rope_theta"])),
        )
    except UserError:
        raise
    except (TypeError, ValueError) as error:
        raise UserError(f"{file}: a value is not a number ({str(error)[:100]}).") from error
    return config, content.get("quantization_config")


def _activation(name: Any, file: Path) -> Any:
    known = {"silu": "silu", "swish": "silu", "relu2": "relu2"}
    if not isinstance(name, str) or name not in known:
        raise UserError(f"{file}: hidden_act = {name}: must be silu or relu2.")
    return known[name]


def _check_claims(config: ModelConfig, quantization: dict[str, Any] | None, folder: Folder, file: Path) -> None:
    """Refuse a config.json that speaks of another model, before a tensor gets the blame."""
    layers = {int(match[1]) for name in folder if (match := re.match(r"model\.layers\.([0-9]{1,9})\.", name))}
    if not len(layers) == config.n_layers == 1 + max(layers, default=-1):
        raise UserError(f"{file}: num_hidden_layers = {config.n_layers}, but the tensors are of {len(layers)} layers.")
    scale = next((name for name in folder if name.endswith(".weight_scale")), None)
    if quantization is None and scale:
        raise UserError(f"{file}: has no quantization_config, but the tensors are packed (there is {scale}).")
    if quantization is not None and quantization.get("quant_method") == "bitnet":
        mode = quantization.get("quantization_mode", "offline")
        if mode not in ("online", "offline"):
            raise UserError(f"{file}: quantization_mode = {str(mode)[:50]}: must be online or offline.")
        if (mode == "offline") != (scale is not None):
            found = f"there is {scale}" if scale else "no tensor is a weight_scale"
            raise UserError(f"{file}: quantization_mode = {mode}, but {found}.")


def _low_bit(quantization: dict[str, Any], file: Path) -> tuple[bool, bool]:
    """``(online, inverted)``: latent weights; and whether weight_scale divides (bitlinear) rather than multiplies."""
    if quantization.get("quant_method") != "bitnet":
        raise UserError(f"{file}: quant_method {quantization.get('quant_method')!r}: only 'bitnet' is read.")
    if quantization.get("use_rms_norm"):
        raise UserError(f"{file}: use_rms_norm: norms inside the linears are not in this graph.")
    linear = quantization.get("linear_class", "bitlinear")
    if linear not in ("bitlinear", "autobitlinear"):
        raise UserError(f"{file}: linear_class {linear!r}: must be bitlinear or autobitlinear.")
    kept = quantization.get("modules_to_not_convert")
    if kept is not None and any(name != "lm_head" for name in kept):
        raise UserError(f"{file}: modules_to_not_convert = {kept}: all linears of the blocks must be low-bit.")
    return quantization.get("quantization_mode", "offline") == "online", linear == "bitlinear"


def _names(folder: Folder, path: Path) -> dict[str, str]:
    """Our tensor name -> the file's, for all of its tensors. Raises ``UserError`` for one that has no place here."""
    found = {}
    for theirs in folder:
        module, _, leaf = theirs.rpartition(".")
        ours = HUGGING_FACE.ours(module)
        if theirs.endswith("rotary_emb.inv_freq"):
            continue
        if ours is None or leaf not in ("weight", "weight_scale"):
            raise UserError(f"{path}: {theirs} has no place in this graph.")
        found[f"{ours}.{leaf}"] = theirs
    return found


Shapes = dict[str, tuple[int, ...]]


def _check(wanted: Shapes, found: dict[str, str], folder: Folder, path: Path, tied: bool) -> None:
    """Refuse a file that lacks a tensor, has one too many, or one of another shape, before memory is taken for any.

    A tied head may be written out.
    """
    surplus = sorted(set(found) - set(wanted) - ({"lm_head.weight"} if tied else set()))
    if surplus:
        raise UserError(f"{path}: {found[surplus[0]]} has no place in this graph.")
    if lacking := sorted(set(wanted) - set(found)):
        module, _, leaf = lacking[0].rpartition(".")
        raise UserError(f"{path}: has no {HUGGING_FACE.theirs(module)}.{leaf} ({len(lacking)} missing).")
    for ours, shape in wanted.items():
        if (there := folder.shape(found[ours])) != shape:
            raise UserError(f"{path}: {found[ours]} is {there}, and its config says {shape}.")


def _skeleton(config: ModelConfig) -> tuple[Transformer, Shapes]:
    """The float model without memory, and the shapes of its weights, each once."""
    with without_memory():
        model = Transformer(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_embeddings:
        del shapes["lm_head.weight"]
    return model, shapes


def _float_model(config: ModelConfig, folder: Folder, path: Path, recipe: BitNet) -> Transformer:
    model, shapes = _skeleton(config)
    recipe.prepare(model)
    names = _names(folder, path)
    _check(shapes, names, folder, path, config.tie_embeddings)
    model.load_state_dict({ours: folder.read(names[ours]) for ours in shapes}, strict=False, assign=True)
    if config.tie_embeddings:
        model.lm_head.weight = model.tok_embeddings.weight
    return model.requires_grad_(False).eval()


def _trits(stored: Tensor, name: str, path: Path) -> Tensor:
    """int8 levels (N, K) of packed or of float trits."""
    if stored.dtype == torch.uint8:
        try:
            return unpack_rows(stored)
        except ValueError as error:
            raise UserError(f"{path}: {name}: {error}.") from error
    levels = stored.to(torch.int8)
    if not torch.equal(levels.to(stored.dtype), stored) or int(levels.abs().max()) > 1:
        raise UserError(f"{path}: {name} is neither packed nor of -1, 0 and 1; is its mode 'online'?")
    return levels


HEAD_OF: dict[torch.dtype, HeadDtype] = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}


def _slots(model: PackedTransformer) -> dict[str, PackedLinear | Tensor]:
    """Where each weight of a file goes, by our module names."""
    slots: dict[str, PackedLinear | Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear):
            slots[name] = module
        elif isinstance(module, StoredEmbedding | StoredHead):
            slots[name] = module.table.weight
        elif isinstance(module, nn.Linear | nn.Embedding | RMSNorm):
            slots[name] = module.weight.data
    if model.config.tie_embeddings:
        del slots["lm_head"]
    return slots


def _packed_model(config: ModelConfig, folder: Folder, path: Path, inverted: bool) -> PackedTransformer:
    plain, shapes = _skeleton(config)
    names = _names(folder, path)
    linears = [name for name, m in plain.named_modules() if type(m) is nn.Linear and name != "lm_head"]
    for name in linears:
        n, k = shapes[f"{name}.weight"]
        is_packed = f"{name}.weight" in names and folder.dtype(names[f"{name}.weight"]) == torch.uint8
        shapes |= {f"{name}.weight": (n // TRITS if is_packed else n, k), f"{name}.weight_scale": (1,)}
    _check(shapes, names, folder, path, config.tie_embeddings)
    forms = dict.fromkeys(linears, LayerForm("ternary2"))
    model = packed_skeleton(config, forms, HEAD_OF.get(folder.dtype(names["tok_embeddings.weight"]), "float32"))
    place(model)
    for name, slot in _slots(model).items():
        stored = folder.read(names[f"{name}.weight"])
        if isinstance(slot, Tensor):
            slot.copy_(stored)
            continue
        slot.packed.copy_(FORMATS[slot.format].pack(_trits(stored, names[f"{name}.weight"], path)))
        scale = folder.read(names[f"{name}.weight_scale"]).float()
        if not 0.0 < scale.item() < math.inf:
            raise UserError(f"{path}: {names[f'{name}.weight_scale']} = {scale.item()}: must be a number above 0.")
        assert slot.inv_scale is not None
        slot.inv_scale.copy_(scale if inverted else scale.reciprocal())
    return model.join_blocks()


def read_tokenizer(folder: Path) -> tuple[Tokenizer, str | None, str | None]:
    """``(tokenizer, chat template, eos token)`` of a folder with a tokenizer.json."""
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"{folder}: no tokenizer.json; save the tokenizer in its fast form first (AutoTokenizer does).")
    tokenizer = load_tokenizer(folder)
    file = folder / "tokenizer_config.json"
    content = _json(file) if file.is_file() else {}
    template = content.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = next((entry.get("template") for entry in template if entry.get("name") == "default"), None)
    if (folder / "chat_template.jinja").is_file():
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")

    def token(name: str) -> str | None:
        value = content.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        return value if isinstance(value, str) and tokenizer.token_to_id(value) is not None else None

    bos = token("bos_token")
    if content.get("add_bos_token") and bos and tokenizer.post_processor is None:
        # Some folders leave this to transformers: say it in the tokenizer itself.
        begin_with(tokenizer, bos)
    return tokenizer, template if isinstance(template, str) else None, token("eos_token")


def read_hf(folder: Path) -> Opened:
    """The model of a Hugging Face folder. Raises ``UserError`` for what this library cannot compute or read."""
    try:
        return _read(folder)
    except UserError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        # A value of another type than usual, in any of four JSON files.
        raise UserError(f"{folder}: damaged ({type(error).__name__}: {str(error).splitlines()[0][:100]}).") from error


def _read(folder: Path) -> Opened:
    config, quantization = read_config(folder / "config.json")
    tokenizer, template, eos = read_tokenizer(folder)
    tensors = Folder(folder)
    _check_claims(config, quantization, tensors, folder / "config.json")
    if quantization is None:
        recipe = BitNet(weight="none", act_bits="none")
        model: Transformer = _float_model(config, tensors, folder, recipe)
    else:
        online, inverted = _low_bit(quantization, folder / "config.json")
        recipe = BitNet()
        model = (
            _float_model(config, tensors, folder, recipe)
            if online
            else _packed_model(config, tensors, folder, inverted)
        )
    return Opened(
        model=model,
        tokenizer=tokenizer,
        recipe={"name": "BitNet", **{k: getattr(recipe, k) for k in ("weight", "act_bits")}},
        chat_template=template,
        eos_token=eos,
        origin={"folder": folder.resolve().name, "kind": "Hugging Face"},
    )
