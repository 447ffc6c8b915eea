"""How long a fast device waits for batches of a stream: python benchmarks/loader.py TEXT TOKENIZER --json FILE

The step is a pause of fixed length, which leaves the CPU alone as a GPU's does. The first block is left out: nobody can
have it ready.
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

from bitnet.data.corpora import Reading
from bitnet.data.streaming import StreamLoader, open_streams
from bitnet.data.tokenizer import load_tokenizer

BLOCK, BLOCKS, ROWS, SEQ_LEN = 64, 5, 16, 256


def measure(text: str, tokenizer: Any, step_s: float, workers: int) -> dict[str, float]:
    """Share of the time spent in waiting, and tokens per second, over ``BLOCKS`` blocks."""
    loader = StreamLoader(
        open_streams([text], Reading())[0],
        tokenizer,
        0,
        SEQ_LEN,
        ROWS,
        text_key="text",
        block_batches=BLOCK,
        length=10**9,
        workers=workers,
    )
    began = waited = 0.0
    for number, _ in enumerate(loader):
        if number == BLOCK - 1:
            began, waited = time.monotonic(), loader.feed.waited
        if number == BLOCK - 1 + BLOCK * BLOCKS:
            break
        time.sleep(step_s)
    seconds, waited = time.monotonic() - began, loader.feed.waited - waited
    loader.feed.close()
    return {"waited": round(waited / seconds, 4), "tokens_per_s": round(BLOCK * BLOCKS * ROWS * SEQ_LEN / seconds)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text")
    parser.add_argument("tokenizer")
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    tokenizer = load_tokenizer(args.tokenizer)
    results = []
    for repetition in range(2):
        for step_ms in (20, 10):
            for workers in (0, 1, 2, 4):
                found = measure(args.text, tokenizer, step_ms / 1000, workers)
                results.append({"step_ms": step_ms, "workers": workers, "repetition": repetition, **found})
                print(results[-1], flush=True)
    setting = {
        "text": Path(args.text).name,
        "vocab_size": tokenizer.get_vocab_size(),
        "rows": ROWS,
        "seq_len": SEQ_LEN,
        "block_batches": BLOCK,
        "cores": os.cpu_count(),
        "load_before": os.getloadavg()[0],
    }
    args.json.write_text(json.dumps({"setting": setting, "results": results}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
