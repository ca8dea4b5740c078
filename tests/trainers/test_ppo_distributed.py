"""Two processes (gloo, on the CPU) learn what one learns from the same completions."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file


ROOT = Path(__file__).resolve().parents[2]


def run(processes: int, model: str, folder: Path, critic: str, lora: str) -> list[tuple[dict[str, Any], Any]]:
    """The weights and the record of each process."""
    folder.mkdir()
    worker = [str(ROOT / "tests/trainers/ppo_worker.py"), model, str(folder), critic, lora]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *launch, *worker], env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [
        (load_file(folder / f"rank-{rank}.safetensors"), json.loads((folder / f"rank-{rank}.json").read_text()))
        for rank in range(processes)
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("critic", "lora"), [("separate", "full"), ("head", "full"), ("head", "lora")])
def test_two_processes_learn_what_one_learns(critic: str, lora: str, tiny_model_path: str, tmp_path: Path) -> None:
    (alone, record) = run(1, tiny_model_path, tmp_path / "one", critic, lora)[0]
    both = run(2, tiny_model_path, tmp_path / "two", critic, lora)
    for name, weight in both[0][0].items():
        assert torch.equal(weight, both[1][0][name]), f"{name} differs between the processes"
        torch.testing.assert_close(weight, alone[name], rtol=1e-3, atol=2e-4)
    advantages = {**both[0][1]["advantages"], **both[1][1]["advantages"]}
    assert advantages == pytest.approx(record["advantages"], rel=1e-3, abs=1e-3)
    for key in ("objective/score", "objective/kl", "value/loss", "grad_norm", "value/grad_norm", "loss"):
        ours = [line[key] for line in both[0][1]["log"] if key in line]
        assert ours == pytest.approx([line[key] for line in record["log"] if key in line], rel=5e-3, abs=1e-4), key
