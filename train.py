"""Pre-train a 1-bit or 1.58-bit transformer.

    python train.py                                              the first run: offline, on the CPU, a few minutes
    python train.py --data.path my_texts/                        the same on your text: without --config it is tiny
    python train.py fit --config configs/ternary_125m.yaml --config configs/overlays/fsdp.yaml
    python train.py fit --config configs/tiny.yaml --ckpt_path last
    python train.py --help

Every key of the YAML files is an option; ``fit`` may be left out. See README.md.
"""

import sys

from bitnet.__main__ import train

if __name__ == "__main__":
    sys.exit(train(sys.argv[1:]))
