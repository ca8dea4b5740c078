"""The two sides of `benchmarks.ppo`, each in processes of its own: our PPO, and that of TRL 1.12.

    echo '{"seed": 1}' | python -m benchmarks.ppo_sides ours|theirs

Both train the same random Llama on the same prompts and count one word in its completions. A process reads a task from
each line of its input, and answers each with a line that is DONE and a JSON object. The side of TRL 1.12 imports
nothing of stagekit.
"""

import json
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from benchmarks.toys import llama, tokenizer


WANTED = 7
"""The word that is rewarded, a quarter point each; no prompt has it."""


@dataclass(frozen=True)
class Task:
    """What both sides train on, and for how long.

    Attributes:
        words: Vocabulary.
        samples: Completions of a rollout (R), which is one minibatch.
        length: Most tokens of a completion (T).
        updates: Rollouts.
        epochs: Passes over a rollout.
        micro_batch: Completions of one backward pass.
        at_once: Completions that are generated and scored at once.
        options: Further arguments of our `PPOConfig`.
    """

    seed: int
    words: int = 48
    width: int = 64
    samples: int = 64
    length: int = 12
    updates: int = 15
    epochs: int = 4
    micro_batch: int = 16
    at_once: int = 64
    options: dict[str, Any] | None = None


def common(task: Task, folder: str) -> dict[str, Any]:
    """Arguments that both configs have, with the same meaning."""
    return {
        "output_dir": folder,
        "seed": task.seed,
        "per_device_train_batch_size": task.micro_batch,
        "gradient_accumulation_steps": task.samples // task.micro_batch,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "adam_epsilon": 1e-5,
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "temperature": 1.0,
        "gamma": 1.0,
        "vf_coef": 0.5,
        "whiten_rewards": False,
        "kl_estimator": "k1",
    }


def prompts(task: Task) -> list[str]:
    """Prompts of 4 to 8 words; so many that no pass over the data ends within the run (defect 2 of TRL 1.12)."""
    draws = random.Random(task.seed)
    usable = [number for number in range(1, task.words - 2) if number != WANTED]
    rows = task.samples * (task.updates + 1)
    return [" ".join(f"w{draws.choice(usable)}" for _ in range(draws.randint(4, 8))) for _ in range(rows)]


def counted(completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float]:
    """The reward as our side takes it."""
    return [list(ids).count(WANTED) / 4 for ids in completion_ids]


def our_trainer(task: Task, policy: str, folder: str) -> Any:
    """The trainer under test, with the objective of TRL 1.12: no clipping of gradients and no entropy bonus."""
    from stagekit.trainers.ppo import PPOConfig, PPOTrainer

    args = PPOConfig(
        **common(task, folder), generation_batch_size=task.samples, max_completion_length=task.length,
        num_iterations=task.epochs, max_steps=task.updates * task.epochs, logging_steps=task.epochs, beta=0.01,
        gae_lambda=0.95, epsilon=0.2, value_clip_range=0.2, entropy_coef=0.0, max_grad_norm=0.0,
        critic="separate", rollout_chunk_size=task.at_once, **(task.options or {}),
    )  # fmt: skip
    data = Dataset.from_dict({"prompt": prompts(task)})
    return PPOTrainer(policy, counted, args, data, processing_class=tokenizer(task.words))


class Counter(torch.nn.Module):
    """A "reward model" as TRL 1.12 asks for it: a backbone whose last hidden state is the count so far, and a score
    that passes it on."""

    base_model_prefix = "backbone"

    def __init__(self) -> None:
        super().__init__()
        self.score = torch.nn.Identity()
        self.backbone = _Counts()


class _Counts(torch.nn.Module):
    def forward(self, input_ids: torch.Tensor, **ignored: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutput

        counts = (input_ids == WANTED).cumsum(dim=1)[..., None] / 4
        return BaseModelOutput(hidden_states=(counts,))


def their_trainer(task: Task, policy: str, folder: str) -> Any:
    """TRL 1.12's, with the value model that ours starts from: the policy's backbone and a head of the same draw."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    args = PPOConfig(
        **common(task, folder), response_length=task.length, num_ppo_epochs=task.epochs, num_mini_batches=1,
        total_episodes=task.updates * task.samples, logging_steps=1, kl_coef=0.01, lam=0.95, cliprange=0.2,
        cliprange_value=0.2, stop_token="eos", num_sample_generations=0,
        local_rollout_forward_batch_size=task.at_once,
    )  # fmt: skip
    words = tokenizer(task.words)
    words.padding_side = "left"
    critic = AutoModelForSequenceClassification.from_pretrained(policy, num_labels=1)
    width = critic.config.hidden_size
    draws = torch.Generator().manual_seed(task.seed)
    with torch.no_grad():
        critic.score.weight.normal_(std=(width + 1) ** -0.5, generator=draws)
    data = Dataset.from_dict({"input_ids": [words(prompt)["input_ids"] for prompt in prompts(task)]})
    model = AutoModelForCausalLM.from_pretrained(policy)
    return PPOTrainer(args, words, model, None, Counter(), data, critic)


def status_of(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def forget_peak() -> None:
    """Let VmHWM start from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def measured(trainer: Any) -> dict[str, Any]:
    """Train, and say what it took: CPU seconds, and by how much the peak of the resident memory grew."""
    forget_peak()
    before, started = status_of("VmRSS"), time.process_time()
    trainer.train()
    seconds = time.process_time() - started
    return {"cpu_seconds": seconds, "growth": status_of("VmHWM") - before}


def done(side: str, task: Task) -> dict[str, Any]:
    """What came of a task; `growth` is that of a fresh process in the first one only."""
    with tempfile.TemporaryDirectory() as folder:
        policy = str(Path(folder, "policy"))
        llama(task.words, task.width, 2, task.seed).save_pretrained(policy)
        trainer = (our_trainer if side == "ours" else their_trainer)(task, policy, folder)
        found = measured(trainer)
    key = "objective/score" if side == "ours" else "objective/scores"
    return {**found, "scores": [line[key] for line in trainer.state.log_history if key in line]}


def main() -> None:
    """Do the tasks of the input, one by one."""
    torch.set_num_threads(1)
    for line in sys.stdin:
        print("DONE " + json.dumps(done(sys.argv[1], Task(**json.loads(line)))), flush=True)


if __name__ == "__main__":
    main()
