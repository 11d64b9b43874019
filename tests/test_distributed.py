"""Two processes on one machine (gloo) train what one process trains."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest


TESTS = Path(__file__).resolve().parent


def run(folder, scope, num_processes):
    file = folder / f"{num_processes}.json"
    launch = []
    if num_processes > 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        launch = ["-m", "torch.distributed.run", "--nproc_per_node", str(num_processes), "--master_port", str(port)]
    command = [sys.executable, *launch, str(TESTS / "run_training.py"), scope, str(4 // num_processes), str(file)]
    done = subprocess.run(
        command, cwd=TESTS, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(file.read_text())


@pytest.mark.parametrize("scope", ["candidate", "sequence"])
def test_two_processes_give_the_loss_curve_of_one(tmp_path, scope):
    """Steps hold the same trajectories, with different numbers of points in each half."""
    one, two = run(tmp_path, scope, 1), run(tmp_path, scope, 2)
    assert (one["world_size"], two["world_size"]) == (1, 2)
    assert len(one["loss"]) == 6 and one["loss"][0] != one["loss"][-1]
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
    for name in ("eval_loss", "eval_agree_at_1", "eval_spearman", "eval_hit_at_2"):
        assert two["eval"][name] == pytest.approx(one["eval"][name], rel=1e-4), name
