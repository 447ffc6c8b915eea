"""What each format calls the tensors of a model. One table per format serves export and import.

Names are those of modules, without the final ``.weight``; ``{}`` stands for the number of the block.
"""

import re
from dataclasses import dataclass, field


@dataclass(frozen=True)
class NameMap:
    """Our module names <-> another format's. ``block`` is what it writes before the parts of block ``{}``."""

    top: dict[str, str]
    block: str
    parts: dict[str, str]
    _back: dict[str, str] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._back.update({theirs: ours for ours, theirs in self.parts.items()})

    def theirs(self, ours: str) -> str:
        """``layers.3.attention.wq`` -> what the format calls it. Raises ``KeyError``."""
        if match := re.fullmatch(r"layers\.(\d+)\.(.+)", ours):
            return self.block.format(match[1]) + self.parts[match[2]]
        return self.top[ours]

    def ours(self, theirs: str) -> str | None:
        """The inverse of ``theirs``; ``None`` for a name that no module of ours has."""
        before, after = self.block.split("{}")
        if match := re.fullmatch(f"{re.escape(before)}(\\d+){re.escape(after)}(.+)", theirs):
            part = self._back.get(match[2])
            return f"layers.{match[1]}.{part}" if part else None
        return next((ours for ours, name in self.top.items() if name == theirs), None)


HUGGING_FACE = NameMap(
    top={"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "lm_head": "lm_head"},
    block="model.layers.{}.",
    parts={
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attention.wq": "self_attn.q_proj",
        "attention.wk": "self_attn.k_proj",
        "attention.wv": "self_attn.v_proj",
        "attention.wo": "self_attn.o_proj",
        "attention.attn_sub_norm": "self_attn.attn_sub_norm",
        "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w3": "mlp.up_proj",
        "feed_forward.w2": "mlp.down_proj",
        "feed_forward.ffn_sub_norm": "mlp.ffn_sub_norm",
    },
)

GGUF = NameMap(
    top={"tok_embeddings": "token_embd", "norm": "output_norm", "lm_head": "output"},
    block="blk.{}.",
    parts={
        "attention_norm": "attn_norm",
        "ffn_norm": "ffn_norm",
        "attention.wq": "attn_q",
        "attention.wk": "attn_k",
        "attention.wv": "attn_v",
        "attention.wo": "attn_output",
        "attention.attn_sub_norm": "attn_sub_norm",
        "feed_forward.w1": "ffn_gate",
        "feed_forward.w3": "ffn_up",
        "feed_forward.w2": "ffn_down",
        "feed_forward.ffn_sub_norm": "ffn_sub_norm",
    },
)
