"""Run as a program: logits of a GGUF file in ik_llama.cpp (the ik-llama-cpp-python package), which has the relu2 graph.

    python read_by_ik_llama_cpp.py FILE REQUEST.json OUT.npz

REQUEST holds ``ids`` (the tokens of each text), ``texts`` to tokenize, ``threads`` and ``requantize``: the type that
FILE is turned into first, since ik_llama.cpp reads I2_S but computes with its own IQ2_BN. OUT holds ``logits`` float32
(T, V) of all tokens, ``tokens``: JSON text of the ids of every text, and ``version``.
"""

import importlib.metadata
import json
import sys
from pathlib import Path

import numpy as np


def main(file: str, request_file: str, out: str) -> None:
    import subprocess

    import ik_llama_cpp
    from ik_llama_cpp import _ctypes_api as api
    from ik_llama_cpp._internals import make_batch_single

    with open(request_file, encoding="utf-8") as handle:
        request = json.load(handle)
    if request["requantize"]:
        new = str(Path(out).with_suffix(".gguf"))
        tool = [str(ik_llama_cpp.find_quantize_bin()), "--allow-requantize", "--token-embedding-type", "f16"]
        subprocess.run([*tool, file, new, request["requantize"]], check=True, capture_output=True)
        file = new
    context = max(map(len, request["ids"])) + 8
    llama = ik_llama_cpp.IkLlama(
        file, n_ctx=context, n_threads=request["threads"], flash_attn=False, use_mmap=False, verbose=False
    )
    vocab_size = request["vocab_size"]
    rows = []
    for ids in request["ids"]:
        llama._context.kv_cache_clear()
        for position, token in enumerate(ids):
            batch = make_batch_single(token, position)
            if llama._context.decode(batch):
                raise RuntimeError("error: llama_decode failed")
            api.llama_batch_free(batch)
            rows.append(np.ctypeslib.as_array(api.llama_get_logits_ith(llama.ctx, -1), shape=(vocab_size,)).copy())
    tokens = [llama.tokenize(text, add_bos=False, special=True) for text in request["texts"]]
    version = importlib.metadata.version("ik-llama-cpp-python")
    np.savez(out, logits=np.stack(rows), tokens=np.array(json.dumps(tokens)), version=np.array(version))


if __name__ == "__main__":
    main(*sys.argv[1:])
