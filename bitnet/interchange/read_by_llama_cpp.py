"""Run as a program: log-probabilities of a GGUF file in llama.cpp (the xllamacpp package), which knows nothing of ours.

    python read_by_llama_cpp.py FILE REQUEST.json OUT.npz

REQUEST holds ``ids`` (the tokens of each text), ``vocab_size``, ``plain`` (an id whose text is ASCII), ``texts`` to
tokenize and ``threads``. OUT holds ``logprobs`` float32 (T, V), NaN where the program names no value, ``tokens``: JSON
text of the ids of every text, and ``version``.
"""

import importlib.metadata
import json
import sys
import urllib.request
from typing import Any

import numpy as np


def ask(server: Any, path: str, content: dict[str, Any]) -> Any:
    """POST to the server that runs in this process, on a loopback port."""
    request = urllib.request.Request(
        f"{server.listening_address}{path}", json.dumps(content).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request) as answer:
        return json.load(answer)


def main(file: str, request_file: str, out: str) -> None:
    with open(request_file, encoding="utf-8") as handle:
        request = json.load(handle)
    ids, vocab_size = request["ids"], request["vocab_size"]
    import xllamacpp as llama

    params = llama.CommonParams()
    params.model.path = file
    params.n_ctx = max(map(len, ids)) + 8
    params.n_parallel = 1
    params.n_gpu_layers = 0
    params.warmup = False
    # Float32 keys and values, and attention spelled out: what is compared is the model, not the cache.
    params.cache_type_k = params.cache_type_v = llama.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = request["threads"]
    server = llama.Server(params)
    prompts = [text[: end + 1] for text in ids for end in range(len(text))]
    logprobs = np.full((len(prompts), vocab_size), np.nan, np.float32)
    for position, prompt in enumerate(prompts):
        answer = ask(
            server,
            "/completion",
            {
                "prompt": prompt,
                "n_predict": 1,
                "n_probs": vocab_size,
                "cache_prompt": True,
                # The probabilities are those before this bias; a sampled half of a character would be left out.
                "logit_bias": [[request["plain"], 1e4]],
            },
        )
        for entry in answer["completion_probabilities"][0]["top_logprobs"]:
            logprobs[position, entry["id"]] = entry["logprob"]
    tokens = [ask(server, "/tokenize", {"content": text, "parse_special": True})["tokens"] for text in request["texts"]]
    version = importlib.metadata.version("xllamacpp")
    np.savez(out, logprobs=logprobs, tokens=np.array(json.dumps(tokens)), version=np.array(version))


if __name__ == "__main__":
    main(*sys.argv[1:])
