"""A GRPO or RLOO stage beside the bare trainer, in lockstep: two processes that take turns, a few steps each.

    python -m benchmarks.lockstep stage|bare grpo|rloo STEPS BLOCK MODEL      # a child of `benchmarks.ppo`

Both train the same model on the same prompts with the same seeds, so that they do the same work, and each asks the
same reward function once a step. That function takes the turns: every BLOCK steps it says what the CPU seconds and the
rewards of the block were, and waits for a line. So a pair is two blocks of the same steps right after one another, and
what a process spends before its first step and after its last is told apart from the cost of the steps.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar


ROOT = Path(__file__).parent.parent
GROUP, COMPLETIONS, LENGTH = 4, 32, 24
"""Completions of a prompt, of a step, and tokens of a completion."""


class Turns:
    """The reward, and the turns."""

    step = 0
    block = 1
    mark = 0.0
    seen: ClassVar[list[list[float]]] = []

    @classmethod
    def take(cls, rewards: list[float]) -> None:
        """At the end of a block, say what it cost and wait for the next."""
        cls.seen.append(rewards)
        cls.step += 1
        if cls.step % cls.block == 0:
            spent = time.process_time() - cls.mark
            print("TURN " + json.dumps({"seconds": spent, "rewards": cls.seen}), flush=True)
            cls.seen.clear()
            sys.stdin.readline()
            cls.mark = time.process_time()


def share_of_e(prompts: Any, completions: Sequence[str], **columns: Any) -> list[float]:
    """The share of the letter e; takes the turns."""
    rewards = [text.count("e") / max(len(text), 1) for text in completions]
    Turns.take(rewards)
    return rewards


def prompts(steps: int) -> list[dict[str, str]]:
    """As many prompts as all steps need."""
    return [{"prompt": f"Say {row % 97} times {row % 89}:"} for row in range(steps * COMPLETIONS // GROUP)]


def stage(kind: str, steps: int, model: str, folder: Path) -> None:
    """The stage, in this process."""
    from stagekit import GRPO, RLOO, Generation, TrainingPipeline, TrainingStage

    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in prompts(steps)))
    method = (GRPO if kind == "grpo" else RLOO)(reward=share_of_e, group_size=GROUP, kl_penalty_coefficient=0.05)
    one = TrainingStage(
        name="s", method=method, training_data=str(rows), max_steps=steps, batch_size=COMPLETIONS, learning_rate=1e-4,
        generation=Generation(max_new_tokens=LENGTH),
    )  # fmt: skip
    TrainingPipeline(model=model, output_dir=str(folder / "run"), stages=(one,)).run(quiet=True)


def bare(kind: str, steps: int, model: str, folder: Path) -> None:
    """The bare call with the arguments that the stage comes to."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

    config: Any = GRPOConfig if kind == "grpo" else RLOOConfig
    args = config(
        output_dir=str(folder / "run"), max_steps=steps, per_device_train_batch_size=COMPLETIONS, learning_rate=1e-4,
        num_generations=GROUP, num_generations_eval=1, max_completion_length=LENGTH, beta=0.05, bf16=False,
        use_cpu=True, activation_checkpointing=False, weight_decay=0.01, warmup_steps=0.1, disable_dropout=True,
        lr_scheduler_type="cosine", save_total_limit=3, report_to="none", disable_tqdm=True,
        dataloader_pin_memory=False, **({"scale_rewards": "group"} if kind == "grpo" else {}),
    )  # fmt: skip
    trainer: Any = GRPOTrainer if kind == "grpo" else RLOOTrainer
    made = trainer(model, reward_funcs=share_of_e, args=args, train_dataset=Dataset.from_list(prompts(steps)))
    made.train()
    made.save_model(str(folder / "final"))


@dataclass(frozen=True)
class Comparison:
    """What a lockstep run measured.

    Attributes:
        ours: CPU seconds of each block of the stage, without the first.
        theirs: Of the bare trainer, the same blocks.
        same: Whether every reward of every step was the same number on both sides.
        rewards: How many were compared.
        fixed: CPU seconds of both processes outside of the blocks, with Python and all imports.
    """

    ours: list[float]
    theirs: list[float]
    same: bool
    rewards: int
    fixed: tuple[float, float]


def compare(kind: str, pairs: int, block: int, model: Path) -> Comparison:
    """Let the stage and the bare trainer take turns; who goes first alternates. The first block warms up.

    Raises:
        RuntimeError: a side failed.
    """
    steps = (pairs + 1) * block + 1  # the last step ends a block that is not measured
    sides = [_start(side, kind, steps, block, model) for side in ("stage", "bare")]
    blocks: list[list[dict[str, Any]]] = [[], []]
    for number in range(pairs + 1):
        for side in (0, 1) if number % 2 else (1, 0):
            if number:
                _go(sides[side])
            blocks[side].append(_next(sides[side]))
    totals = [_end(side) for side in sides]
    seconds = [[one["seconds"] for one in side] for side in blocks]
    given = [[reward for one in side for step in one["rewards"] for reward in step] for side in blocks]
    fixed = [total - sum(spent[1:]) for total, spent in zip(totals, seconds, strict=True)]
    return Comparison(seconds[0][1:], seconds[1][1:], given[0] == given[1], len(given[0]), (fixed[0], fixed[1]))


def _start(side: str, kind: str, steps: int, block: int, model: Path) -> Any:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-m", "benchmarks.lockstep", side, kind, str(steps), str(block), str(model)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(command, text=True, env=environment, cwd=ROOT, **pipes)


def _next(process: Any) -> Any:
    for line in process.stdout:
        if line.startswith("TURN "):
            return json.loads(line.removeprefix("TURN "))
    raise RuntimeError(f"{' '.join(process.args[1:5])} ended early; run it by hand to see why")


def _go(process: Any) -> None:
    process.stdin.write("\n")
    process.stdin.flush()


def _end(process: Any) -> float:
    process.stdin.close()
    process.stdout.read()
    _, code, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(code)
    if process.returncode:
        raise RuntimeError(f"{' '.join(process.args[1:5])} failed; run it by hand to see why")
    return float(used.ru_utime + used.ru_stime)


def main() -> None:
    """Train one side."""
    import torch

    torch.set_num_threads(1)
    side, kind, steps, Turns.block, model = (
        sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        (stage if side == "stage" else bare)(kind, steps, model, Path(folder))


if __name__ == "__main__":
    from benchmarks import lockstep  # not the copy of this module that runs: the turns are in the other

    lockstep.main()
