"""Functions for pipeline files whose stages sample in several processes: rewards that can be learned, one that fails,
and a sampler whose draws depend on the prompt and not on the process that draws."""

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

import torch

from stagekit.ranks import rank


def letters(prompts: Any, completions: Any, **columns: Any) -> list[float]:
    """How many of the letter e an answer has, a quarter each."""
    return [_text(one).count("e") / 4 for one in completions]


def noted(prompts: Any, completions: Any, **columns: Any) -> list[float]:
    """`letters` that notes what each process was asked."""
    found = letters(prompts, completions)
    _note({"prompts": list(prompts), "completions": list(completions), "rewards": found})
    return found


def asked(messages: Any) -> str:
    """A scripted model that keeps a log of what it was asked, and takes its time."""
    with Path(f"{os.environ['ASKED']}-{rank()}").open("a") as file:
        file.write(json.dumps([message["content"] for message in messages]) + "\n")
    time.sleep(0.05)
    return f"Reply {len(messages)} to {messages[0]['content']}"


def pause(step: int, loss: float) -> None:
    """A step that takes its time, so that a test can hit a process in its middle."""
    time.sleep(0.3)


def fails_on_the_second(prompts: Any, completions: Any, **columns: Any) -> list[float]:
    if rank() == 1:
        raise ValueError("nothing to say on the second process")
    return letters(prompts, completions, **columns)


def few_at_once(dataset: Any, split: str) -> Any:
    """The rows as they are. From here on so few answers are scored at once that the rewards are of several batches."""
    from stagekit.trainers import sampling

    sampling.SCORED_AT_ONCE = 4
    return dataset


def by_prompt(dataset: Any, split: str) -> Any:
    """The rows as they are. From here on a process draws what every process would draw for the prompt: the policy is
    sampled from with numbers that depend on the step, the prompt, the place in its group and the place in the
    completion."""
    from trl import GRPOTrainer, RLOOTrainer

    if not hasattr(RLOOTrainer._generate_single_turn, "drawn_by_prompt"):
        for trainer in (GRPOTrainer, RLOOTrainer):
            trainer._generate_single_turn = _drawn_by_prompt(trainer._generate_single_turn)
        RLOOTrainer._generate_and_score_completions = _noting(RLOOTrainer._generate_and_score_completions)
    return dataset


def _drawn_by_prompt(generate: Any) -> Any:
    def drawn(trainer: Any, prompt_ids: list[list[int]], *rest: Any, **options: Any) -> Any:
        groups = trainer.num_generations if trainer.model.training else trainer.num_generations_eval
        start = trainer.accelerator.process_index * len(prompt_ids)
        step = trainer.state.global_step if trainer.model.training else -1
        keys = [f"{step} {ids} {(start + row) % groups}" for row, ids in enumerate(prompt_ids)]
        place = iter(range(10**6))

        def multinomial(probabilities: torch.Tensor, num_samples: int, **more: Any) -> torch.Tensor:
            at = next(place)
            thresholds = torch.tensor([_uniform(f"{key} {at}") for key in keys], dtype=torch.float64)
            return (probabilities.double().cumsum(dim=-1) < thresholds[:, None]).sum(dim=-1, keepdim=True)

        before, torch.multinomial = torch.multinomial, multinomial
        try:
            return generate(trainer, prompt_ids, *rest, **options)
        finally:
            torch.multinomial = before

    drawn.drawn_by_prompt = True
    return drawn


def _noting(generate_and_score: Any) -> Any:
    """Note the advantages too: GRPO and PPO write them to a table, RLOO does not."""

    def noting(trainer: Any, inputs: Any) -> Any:
        found = generate_and_score(trainer, inputs)
        _note({"advantages": found["advantages"].tolist()})
        return found

    return noting


def _note(told: dict[str, Any]) -> None:
    with Path(f"{os.environ['NOTES']}-{rank()}.jsonl").open("a") as file:
        file.write(json.dumps(told) + "\n")


def _uniform(key: str) -> float:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big") / 2**56


def _text(turns: Any) -> str:
    return turns if isinstance(turns, str) else "".join(turn["content"] for turn in turns)
