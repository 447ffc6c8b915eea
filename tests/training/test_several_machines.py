"""The launchers of docs/scaling.md, with processes for machines: torchrun and SLURM train what one process would."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ..conftest import ROOT
from ..runs import environment
from .test_resume_spread import SAME, options
from .test_spread import free_port


def launch(commands: list[list[str]], environments: list[dict[str, str]]) -> None:
    running = [
        subprocess.Popen(c, cwd=ROOT, env=environment(**e), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for c, e in zip(commands, environments, strict=True)
    ]
    said = [process.communicate(timeout=300)[0] for process in running]
    assert all(process.returncode == 0 for process in running), "\n".join(said)[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "slurm"])
def test_two_machines_train_what_one_process_would(stories, tmp_path: Path, run_fit, launcher) -> None:
    run_fit(stories, tmp_path / "one", *SAME, "--data.batch_size=8", "--trainer.devices=1")
    port = free_port()
    given = [*options(stories, tmp_path / "two", 2, False), "--trainer.devices=1", "--trainer.num_nodes=2"]
    where = ["--nnodes=2", "--nproc_per_node=1", "--master_addr=127.0.0.1", f"--master_port={port}"]
    commands, environments = [], []
    for machine in range(2):
        if launcher == "torchrun":
            run = [sys.executable, "-m", "torch.distributed.run", *where, f"--node_rank={machine}"]
            environments.append({})
        else:
            run = [sys.executable]
            job = {"NTASKS": 2, "JOB_NAME": "train", "JOB_ID": 17, "PROCID": machine, "LOCALID": 0, "NODEID": machine}
            job |= {"NNODES": 2, "NTASKS_PER_NODE": 1, "NODELIST": "127.0.0.1"}
            address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            environments.append({f"SLURM_{key}": str(value) for key, value in job.items()} | address)
        commands.append([*run, "train.py", *given])
    launch(commands, environments)
    one, two = (json.loads((tmp_path / n / "summary.json").read_text())["figures"] for n in ("one", "two"))
    assert two["val/loss"] == pytest.approx(one["val/loss"], abs=2e-3)
