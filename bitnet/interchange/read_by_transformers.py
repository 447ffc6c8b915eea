"""Run as a program: logits of a Hugging Face folder in transformers (with an adapter, in peft), which knows nothing of
ours.

    TORCHDYNAMO_DISABLE=1 python read_by_transformers.py FOLDER REQUEST.json OUT.npz

REQUEST holds ``ids`` (the tokens of each text), ``texts`` to tokenize and ``threads``. OUT holds ``logits`` float32
(T, V) of all tokens, ``tokens``: JSON text of the ids of every text, and ``version``.
"""

import json
import os
import sys
from typing import Any

import numpy as np
import torch


def main(folder: str, request_file: str, out: str) -> None:
    import transformers

    with open(request_file, encoding="utf-8") as handle:
        request = json.load(handle)
    torch.set_num_threads(request["threads"])
    has_adapter = os.path.exists(os.path.join(folder, "adapter_config.json"))
    base = os.path.join(folder, "base") if has_adapter else folder
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(base, attn_implementation="sdpa")
    if has_adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, folder)
    model.eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    with torch.inference_mode():
        logits = torch.cat([model(torch.tensor([ids]), use_cache=False).logits[0].float() for ids in request["ids"]])
    tokens = [tokenizer(text)["input_ids"] for text in request["texts"]]
    np.savez(
        out,
        logits=logits.numpy(),
        tokens=np.array(json.dumps(tokens)),
        version=np.array(transformers.__version__),
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
