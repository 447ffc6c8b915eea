"""Whole-model decoding on a CPU beside other engines: llama.cpp TQ2_0, ik_llama.cpp IQ2_BN, xllamacpp, transformers.

    python benchmarks/cpu_peers.py --llama_bench PATH [--ik_bench PATH --ik_quantize PATH] [--out FILE.json]

All run the shape of decode_154m.yaml with random weights, the same threads, and the head stored alike (8 bits, or 16).
The engines take turns, three rounds; medians. ``llama-bench`` must be built natively (-DGGML_NATIVE=ON); a peer
that is absent is left out and said so. Needs the packages gguf and numpy; transformers and xllamacpp where they are
installed.
"""

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

SHAPE = Path(__file__).with_name("decode_154m.yaml")
DIM, LAYERS, HEADS, FFN, VOCAB, CONTEXT = 1024, 12, 16, 2816, 8192, 1024
Speeds = dict[str, float]
"""Tokens per second of ``decode`` and ``prefill``."""


def write_gguf(path: Path, weights: str, head: str) -> None:
    """A model of the shape above in Llama's graph; ``weights`` and ``head`` are names of GGUF types."""
    import gguf

    generator = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(DIM)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(DIM // HEADS)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([f"t{i}" for i in range(VOCAB)])
    writer.add_token_types([1] * VOCAB)
    writer.add_token_merges(["t 0"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)

    def add(name: str, shape: tuple[int, int], kind: str, values: np.ndarray) -> None:
        type_ = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(name, gguf.quants.quantize(values.astype(np.float32), type_), raw_dtype=type_)

    for name in ("token_embd", "output"):
        add(f"{name}.weight", (VOCAB, DIM), head, generator.standard_normal((VOCAB, DIM)) * 0.02)
    writer.add_tensor("output_norm.weight", np.ones(DIM, np.float32))
    matrices = {
        **dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), (DIM, DIM)),
        **{"ffn_gate": (FFN, DIM), "ffn_up": (FFN, DIM), "ffn_down": (DIM, FFN)},
    }
    for i in range(LAYERS):
        for name, shape in matrices.items():
            add(f"blk.{i}.{name}.weight", shape, weights, generator.integers(-1, 2, shape) * 0.03)
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{i}.{norm}.weight", np.ones(DIM, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def by_llama_bench(program: str, model: Path, threads: int) -> Speeds:
    command = [program, "-m", str(model), "-t", str(threads), "-p", "256", "-n", "128", "-r", "2", "-o", "json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = json.loads(done.stdout[done.stdout.index("[") :])
    return {"prefill" if row["n_prompt"] else "decode": float(row["avg_ts"]) for row in rows}


def by_bitnet(head: str, threads: int) -> Speeds:
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [sys.executable, "-m", "bitnet", "bench", "decode", str(SHAPE), "--head", head]
        subprocess.run([*command, "--threads", str(threads), "--json", file.name], check=True, capture_output=True)
        figures = json.loads(Path(file.name).read_text())["threads"][str(threads)]
    return {"decode": figures["decode_tokens_per_s"], "prefill": figures["prefill_tokens_per_s"], **figures}


TRANSFORMERS = """
import json, sys, time, torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations.bitnet import BitLinear, replace_with_bitnet_linear

dim, layers, heads, ffn, vocab, threads = map(int, sys.argv[1:])
torch.set_num_threads(threads)
config = LlamaConfig(hidden_size=dim, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=ffn,
                     vocab_size=vocab, max_position_embeddings=1024)
model = replace_with_bitnet_linear(LlamaForCausalLM(config), modules_to_not_convert=["lm_head"]).eval()
for m in model.modules():
    if isinstance(m, BitLinear):
        m.weight.random_(0, 170)
with torch.inference_mode():
    ids = torch.randint(vocab, (1, 256))
    start = time.perf_counter(); model(ids, logits_to_keep=1); prefill = 256 / (time.perf_counter() - start)
    out = model(ids[:, :1], use_cache=True); tokens = 8
    start = time.perf_counter()
    for _ in range(tokens):
        out = model(ids[:, :1], past_key_values=out.past_key_values, use_cache=True)
    print(json.dumps({"decode": tokens / (time.perf_counter() - start), "prefill": prefill}))
"""

XLLAMACPP = """
import json, sys, xllamacpp as xlc
path, threads = sys.argv[1], int(sys.argv[2])
params = xlc.CommonParams()
params.model.path = path
params.n_ctx, params.cpuparams.n_threads, params.cpuparams_batch.n_threads = 512, threads, threads
params.n_gpu_layers, params.warmup = 0, True
server = xlc.Server(params)
def ask(prompt, n):
    return json.loads(json.dumps(server.handle_completions({"prompt": prompt, "n_predict": n, "cache_prompt": False,
        "ignore_eos": True, "temperature": 0})))["timings"]
ask([1] * 8, 4)
print(json.dumps({"prefill": ask([3] * 256, 1)["prompt_per_second"], "decode": ask([5], 128)["predicted_per_second"]}))
"""


def by_script(script: str, *arguments: object) -> Speeds:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "no message")
    speeds: Speeds = json.loads(done.stdout.strip().splitlines()[-1])
    return speeds


def engines(args: argparse.Namespace, folder: Path) -> dict[str, Callable[[int], Speeds]]:
    """What can be run here, by name; each takes the number of threads."""
    found: dict[str, Callable[[int], Speeds]] = {}
    for head, type_ in (("int8", "Q8_0"), ("float16", "F16")):
        found[f"bitnet, {head} head"] = lambda t, head=head: by_bitnet(head, t)  # type: ignore[misc]
        model = folder / f"tq2_{head}.gguf"
        write_gguf(model, "TQ2_0", type_)
        if args.llama_bench:
            found[f"llama.cpp TQ2_0, {type_} head"] = lambda t, m=model: by_llama_bench(args.llama_bench, m, t)  # type: ignore[misc]
    if args.ik_bench and args.ik_quantize:
        full = folder / "f32.gguf"
        write_gguf(full, "F32", "F16")
        for kind in ("IQ2_BN", "IQ2_BN_R4"):
            packed = folder / f"{kind}.gguf"
            options = ["--token-embedding-type", "f16", "--output-tensor-type", "f16"]
            subprocess.run([args.ik_quantize, *options, full, packed, kind], check=True, capture_output=True)
            found[f"ik_llama.cpp {kind}, F16 head"] = lambda t, m=packed: by_llama_bench(args.ik_bench, m, t)  # type: ignore[misc]
    if importlib.util.find_spec("xllamacpp"):
        found["xllamacpp TQ2_0, Q8_0 head"] = lambda t: by_script(XLLAMACPP, folder / "tq2_int8.gguf", t)
    if importlib.util.find_spec("transformers"):
        found["transformers BitLinear, float32 head"] = lambda t: by_script(
            TRANSFORMERS, DIM, LAYERS, HEADS, FFN, VOCAB, t
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama_bench", help="llama-bench of llama.cpp")
    parser.add_argument("--ik_bench", help="llama-bench of ik_llama.cpp")
    parser.add_argument("--ik_quantize", help="llama-quantize of ik_llama.cpp")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    threads = [int(t) for t in args.threads.split(",")]
    results: dict[str, dict[str, list[Speeds]]] = {}
    with tempfile.TemporaryDirectory() as name:
        running = engines(args, Path(name))
        for round_ in range(args.rounds):
            for engine, run in running.items():
                for t in threads:
                    try:
                        results.setdefault(engine, {}).setdefault(str(t), []).append(run(t))
                    except (RuntimeError, subprocess.CalledProcessError, OSError) as error:
                        print(f"{engine}, {t} threads: left out ({error})", flush=True)
            print(f"round {round_ + 1} of {args.rounds} done at {time.strftime('%H:%M:%S')}", flush=True)
    medians = {
        engine: {t: {key: statistics.median(r[key] for r in rounds) for key in rounds[0]} for t, rounds in by.items()}
        for engine, by in results.items()
    }
    print(f"{'tokens per second':42}" + "".join(f"decode {t}t  prefill {t}t  " for t in threads))
    for engine, by in medians.items():
        print(
            f"{engine:42}"
            + "".join(f"{by[t]['decode']:9.1f}  {by[t]['prefill']:10.1f}  " for t in map(str, threads) if t in by)
        )
    if args.out:
        content: dict[str, Any] = {
            "command": "python " + " ".join(["benchmarks/cpu_peers.py", *(Path(a).name for a in sys.argv[1:])]),
            "machine": platform.processor() or platform.machine(),
            "date": datetime.date.today().isoformat(),
            "versions": {p: _version(p) for p in ("torch", "gguf", "transformers", "xllamacpp")},
            "shape": {"dim": DIM, "layers": LAYERS, "ffn": FFN, "vocabulary": VOCAB, "prompt": 256, "tokens": 128},
            "medians": medians,
            "rounds": results,
        }
        args.out.write_text(json.dumps(content, indent=1) + "\n")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
