"""Stages that sample and learn from rewards, split over processes: the same rollouts, rewards, advantages, losses and
weights as in one. What a process draws depends on the prompt here; what else is drawn is in the tests at the end."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from stagekit import TrainingPipeline
from tests.conftest import QUESTIONS_AND_ANSWERS
from tests.launched import Launched, torchrun
from tests.running import account, losses, pipeline, stage, weights


pytestmark = pytest.mark.slow
Write = Callable[..., Path]

CLOSE = 1e-5
"""Largest difference of a loss, or of a weight, that the order of a sum in float32 explains here, with an epsilon of
Adam that does not take a gradient of nothing for one; measured 5e-7 and 3e-6."""

SHORT = {"max_new_tokens": 6}
LETTERS = "tests.sampled:letters"
STAGES: dict[str, dict[str, Any]] = {
    "rm": {"method": "reward", "max_steps": 3},
    "ppo": {
        "method": {"type": "ppo", "reward": LETTERS, "entropy_coefficient": 0.0, "epochs_per_batch": 2,
                   "rollout_samples": 8},
    },
    "head": {
        "method": {"type": "ppo", "reward": ["stage:rm", {"source": LETTERS, "weight": 2.0}],
                   "entropy_coefficient": 0.0, "epochs_per_batch": 2, "rollout_samples": 8},
        "lora": {"rank": 4}, "gradient_accumulation_steps": 2, "reference": {"update_every": 3},
    },
    "grpo": {
        "method": {"type": "grpo", "reward": LETTERS, "kl_penalty_coefficient": 0.05, "epochs_per_batch": 2,
                   "group_size": 8},
    },
    "grpo-lora": {
        "method": {"type": "grpo", "reward": "stage:rm", "loss": "dr_grpo", "relative_rewards": False,
                   "group_size": 2},
        "lora": {"rank": 4}, "gradient_accumulation_steps": 2,
    },
    "rloo": {
        "method": {"type": "rloo", "reward": "tests.sampled:noted", "whiten_advantages": True, "epochs_per_batch": 2,
                   "group_size": 4},
        "reference": {"update_every": 3},
    },
    "online": {
        "method": {"type": "online_dpo", "reward": LETTERS, "preference_scale": 0.5},
        "validation_data": "prompts", "evaluation_steps": 3,
    },
}  # fmt: skip
"""In `grpo` a group of eight lies on both processes."""
SAMPLING = [name for name in STAGES if name != "rm"]


@dataclass(frozen=True)
class Sampled(Launched):
    """They note what they sample."""

    def notes(self, name: str, of: str) -> list[Any]:
        """What the processes of a launch noted, each call of all of them as one."""
        files = sorted(self.folder.glob(f"{name}-?.jsonl"))
        told = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
        calls = zip(*([one[of] for one in process if of in one] for process in told), strict=True)
        return [[item for share in call for item in share] for call in calls]


def declared(model: str, folder: Path, batch: int, rows: dict[str, str], **more: Any) -> TrainingPipeline:
    stages = []
    for name, options in STAGES.items():
        given = {
            "model": model, "max_steps": 6, "adam_epsilon": 1e-5, "checkpoint_save_steps": 0,
            "checkpoint_save_epochs": 0, **options, **more,
        }  # fmt: skip
        if name in SAMPLING:
            given |= {"generation": SHORT, "data_preprocessor": "tests.sampled:by_prompt"}
            given["trl"] = {"log_completions": True}
        if "validation_data" in given:
            given["validation_data"] = rows["prompts"]
        given["batch_size"] = batch // given.get("gradient_accumulation_steps", 1)
        stages.append(stage(name, rows["pairs" if name == "rm" else "prompts"], **given))
    return pipeline(model, folder, *stages)


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory, tiny_model_path: str) -> Sampled:
    folder = tmp_path_factory.mktemp("launched")
    rows = written(folder)
    split = declared(tiny_model_path, folder / "together", 4, rows, distributed_strategy="ddp")
    torchrun(folder, split, NOTES=str(folder / "split"))
    torchrun(folder, declared(tiny_model_path, folder / "alone", 8, rows), processes=1, NOTES=str(folder / "whole"))
    return Sampled(folder)


def written(folder: Path) -> dict[str, str]:
    """Files of prompts and of pairs."""
    data: dict[str, list[Any]] = {"prompts": [], "pairs": []}
    for question, better, worse in QUESTIONS_AND_ANSWERS:
        data["prompts"].append({"prompt": question})
        data["pairs"].append({"prompt": question, "chosen": better, "rejected": worse})
    files = {}
    for name, rows in data.items():
        files[name] = str(folder / f"{name}.jsonl")
        Path(files[name]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return files


def completions(folder: Path) -> list[dict[str, Any]]:
    """Every completion of a stage with its rewards and its advantage, in the order of the rollouts."""
    import pandas

    files = sorted((folder / "checkpoints/completions").glob("*.parquet"))
    found: list[dict[str, Any]] = pandas.concat([pandas.read_parquet(file) for file in files]).to_dict("records")
    return found


@pytest.mark.parametrize("name", [name for name in SAMPLING if name != "rloo"])
def test_two_processes_sample_and_score_what_one_does(name: str, launched: Sampled) -> None:
    together, alone = (completions(folder) for folder in launched.both(name))
    assert len(together) == len(alone) > 0
    for ours, theirs in zip(together, alone, strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            assert value == (pytest.approx(theirs[key], abs=1e-4) if isinstance(value, float) else theirs[key]), key
    assert len({one["advantage"] for one in together}) > 2


@pytest.mark.parametrize("of", ["prompts", "completions", "rewards", "advantages"])
def test_two_processes_sample_and_score_what_one_does_in_rloo(of: str, launched: Sampled) -> None:
    together, alone = launched.notes("split", of), launched.notes("whole", of)
    assert len(together) == 3
    for ours, theirs in zip(together, alone, strict=True):
        assert ours == (theirs if isinstance(ours[0], str) else pytest.approx(theirs, abs=1e-4))


def test_a_reward_function_is_called_with_the_share_of_each_process(launched: Sampled) -> None:
    for rank in (0, 1):
        told = [json.loads(line) for line in (launched.folder / f"split-{rank}.jsonl").read_text().splitlines()]
        assert [len(one["rewards"]) for one in told if "rewards" in one] == [4, 4, 4]


@pytest.mark.parametrize("name", SAMPLING)
def test_two_processes_have_the_losses_of_one(name: str, launched: Sampled) -> None:
    together, alone = launched.both(name)
    assert losses(together) == pytest.approx(losses(alone), abs=CLOSE)
    assert len(losses(together)) == account(together)["steps"] == account(alone)["steps"] == 6


@pytest.mark.parametrize("name", SAMPLING)
def test_two_processes_end_with_the_weights_of_one(name: str, launched: Sampled) -> None:
    together, alone = (weights(folder / "policy") for folder in launched.both(name))
    assert together.keys() == alone.keys()
    for key, tensor in alone.items():
        torch.testing.assert_close(together[key], tensor, atol=CLOSE, rtol=0)


def test_an_evaluation_is_of_the_rows_of_all_processes(launched: Sampled) -> None:
    together, alone = (account(folder)["metrics"] for folder in launched.both("online"))
    assert together["eval_reward"] == pytest.approx(alone["eval_reward"], abs=CLOSE)
    assert together["eval_loss"] == pytest.approx(alone["eval_loss"], abs=CLOSE)
