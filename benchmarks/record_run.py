"""Keep the figures of a finished run: its summary, config, commit and machine as one JSON file.

python benchmarks/record_run.py runs/tiny --command "python train.py" --out benchmarks/results/first_run_cpu_DATE.json
"""

import argparse
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import yaml


def record(run: Path, command: str) -> dict[str, Any]:
    summary = json.loads((run / "summary.json").read_text())
    del summary["data"]["folder"]
    for key in ("paths", "val_paths"):  # names of files, not of this machine's folders
        summary["data"][key] = [Path(p).name for p in summary["data"][key]]
    config = yaml.safe_load((run / "config.yaml").read_text())
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    return {
        "command": command,
        "commit": commit,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "summary": summary,
        "model": config["model"],
        "trainer": {k: v for k, v in config["trainer"].items() if v is not None and k != "default_root_dir"},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--command", required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.write_text(json.dumps(record(args.run, args.command), indent=1) + "\n")


if __name__ == "__main__":
    main()
