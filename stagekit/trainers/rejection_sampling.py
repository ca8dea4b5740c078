"""A TRL trainer for rejection sampling: samples n answers per prompt, keeps the best by reward, fine-tunes on them.

`RejectionSamplingTrainer` is one round; `raft` repeats it, each round sampling from the model that the one before it
trained.

Source: https://huggingface.co/papers/2304.06767, algorithm 1.
"""

import copy
import gc
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from stagekit.errors import ConfigError, Problem
from stagekit.files import whole_folder, write_text
from stagekit.journal import Journal
from stagekit.requests import Sampling
from stagekit.scorers import Scorer, free, scorer_from
from stagekit.selection import Group, Selection, drops, metrics, preference_rows, scored_rows, select, sft_rows
from stagekit.trainers.generators import (
    generator_of,
    journal_info,
    loaded,
    log_progress,
    refuse_new_template,
    tokenizer_of,
)
from stagekit.trainers.sampling import Prompt, prompts_from, sample, score, scores_digest, texts_digest


@dataclass
class RejectionSamplingConfig(SFTConfig):  # type: ignore[misc]
    """`SFTConfig`, and how answers are sampled and chosen. `seed` seeds both."""

    n: int = field(default=10, metadata={"help": "Answers per prompt."})
    top_k: int = field(default=1, metadata={"help": "Answers kept per prompt, at most."})
    min_reward: float | None = field(
        default=0.0, metadata={"help": "A kept answer's reward is strictly above it. None: no threshold."}
    )
    max_new_tokens: int = field(
        default=256, metadata={"help": "Most tokens of an answer; one that is cut is dropped."}
    )
    temperature: float = field(default=1.0, metadata={"help": "Of the sampling; above 0."})
    top_p: float = field(default=1.0, metadata={"help": "Nucleus sampling; 1 is off."})
    batch_tokens: int = field(default=16384, metadata={"help": "Padded size of a generation batch, in tokens."})
    sampling_folder: str | None = field(
        default=None, metadata={"help": "Where texts and rewards are kept. None: output_dir."}
    )


class RejectionSamplingTrainer(SFTTrainer):  # type: ignore[misc]
    """n answers per prompt by the model as it comes, then supervised fine-tuning on the best of each.

    The answers are written while the trainer is built, before TRL touches the model, into `journal.jsonl`, their
    rewards into `scores.jsonl`: building it again after a crash goes on where it ended. The training that follows is
    that of `SFTTrainer` on the same rows. With several processes the first one samples and the others wait, so their
    time limit (`ddp_timeout`) must cover the sampling.

    Args:
        model: the policy, a path or a live model.
        train_dataset: rows with `prompt`, a text or a conversation that ends with the user's turn; the reward sees
            the other columns.
        reward: a function `f(prompts, completions, **columns) -> list[float | None]`, its name as
            `package.module:function`, a reward model's path, a `Scorer`, or a list of those, with weights as pairs.
        processing_class: the tokenizer; None: the one beside the model.
        sft_arguments: everything else that `SFTTrainer` takes.

    Raises:
        ConfigError: an argument or a prompt that cannot work.
        StageError: no answer was kept, a reward is no number, or the journal is another run's.
    """

    groups: list[Group]
    selections: list[Selection]

    def __init__(
        self,
        model: Any,
        args: RejectionSamplingConfig,
        train_dataset: Iterable[Mapping[str, Any]],
        reward: Any,
        processing_class: Any = None,
        peft_config: Any = None,
        **sft_arguments: Any,
    ) -> None:
        """Sample and choose the answers, then build the `SFTTrainer` on them."""
        _check(args)
        prompts = prompts_from(train_dataset)
        scorer = scorer_from(reward)
        if processing_class is None:
            processing_class = tokenizer_of(model, args)
        self.groups = _sample(model, args, prompts, scorer, processing_class)
        self.selections = [
            select(group.candidates, top_k=args.top_k, min_reward=args.min_reward) for group in self.groups
        ]
        rows = sft_rows(self.groups, self.selections)
        super().__init__(
            model=model,
            args=args,
            train_dataset=Dataset.from_list([{key: row[key] for key in ("prompt", "completion")} for row in rows]),
            processing_class=processing_class,
            peft_config=peft_config,
            **sft_arguments,
        )

    @property
    def selected(self) -> list[dict[str, Any]]:
        """The rows trained on, with `reward`, `rank`, `n_valid`, `copies`, `key`."""
        return sft_rows(self.groups, self.selections)

    @property
    def preferences(self) -> list[dict[str, Any]]:
        """Pairs of the best and the worst answer to a prompt; may be empty."""
        return preference_rows(self.groups, self.selections)

    @property
    def scored(self) -> list[dict[str, Any]]:
        """Every prompt with all its answers and rewards."""
        return scored_rows(self.groups)

    @property
    def sampling_metrics(self) -> dict[str, float]:
        """Mean rewards and shares of what was kept; `answers.*` and `prompts.*` count what was not."""
        return {**metrics(self.selections), **drops(self.groups, self.selections)}


def raft(
    model: str,
    args: RejectionSamplingConfig,
    train_dataset: Iterable[Mapping[str, Any]],
    reward: Any,
    *,
    rounds: int,
    **arguments: Any,
) -> str:
    """RAFT: `rounds` of sampling and fine-tuning, each from the model of the one before; the last model's folder.

    Round r is in `output_dir/round-r`, its model in `policy` there. A round that is done is not done again; one that
    was killed while it sampled goes on, one that was killed while it trained trains from its start.

    Args:
        model: a path; the rounds pass models on by path.
        arguments: everything else that `RejectionSamplingTrainer` takes, but for an adapter.

    Raises:
        ConfigError: no rounds, a live model, or an adapter.
    """
    if rounds < 1:
        raise ConfigError(f"rounds is {rounds}; at least one is needed")
    if not isinstance(model, str):
        raise ConfigError("raft passes models on by path: save the model and give its folder")
    if arguments.get("peft_config") is not None:
        raise ConfigError("raft trains full weights; for adapters declare a rejection_sampling stage with lora")
    rows, policy = list(train_dataset), model
    for number in range(1, rounds + 1):
        folder = Path(args.output_dir or ".") / f"round-{number}"
        if not (folder / "sampling.json").is_file():
            own = copy.copy(args)
            own.output_dir, own.sampling_folder = str(folder), None
            trainer = RejectionSamplingTrainer(policy, own, rows, reward, **arguments)
            trainer.train()
            with whole_folder(folder / "policy") as target:
                trainer.save_model(str(target))
            write_text(folder / "sampling.json", json.dumps(trainer.sampling_metrics, indent=2) + "\n")
            del trainer
            gc.collect()
        policy = str(folder / "policy")
    return policy


def _check(args: RejectionSamplingConfig) -> None:
    problems = []
    if args.n < 1:
        problems.append(Problem("n", f"{args.n} gives no answer; set at least 1"))
    if not 1 <= args.top_k <= max(args.n, 1):
        problems.append(Problem("top_k", f"{args.top_k} answers cannot be kept of {args.n}"))
    if args.temperature <= 0 and args.n > 1:
        problems.append(Problem("temperature", f"at {args.temperature} all {args.n} answers are the same one"))
    if problems:
        raise ConfigError(problems)
    refuse_new_template(args)


def _sample(
    model: Any, args: RejectionSamplingConfig, prompts: list[Prompt], scorer: Scorer, processing_class: Any
) -> list[Group]:
    """The generation phase; a model given by path is loaded for it and freed before its answers are scored."""
    sampling = Sampling(args.temperature, args.top_p)
    policy = generator_of(loaded(model, args), processing_class, sampling, args)
    plan: dict[str, Any] = {
        "policy": policy,
        "n": args.n,
        "seed": args.seed,
        "max_new_tokens": args.max_new_tokens,
        "batch_tokens": args.batch_tokens,
    }
    folder = Path(args.sampling_folder or args.output_dir or ".")
    digest = texts_digest(prompts, **plan)
    with args.main_process_first(local=False, desc="rejection sampling"):
        with Journal.open(folder / "journal.jsonl", digest, journal_info(policy)) as texts:
            groups = sample(prompts, **plan, journal=texts, on_batch=log_progress)
        plan.clear()
        del policy
        gc.collect()
        with Journal.open(folder / "scores.jsonl", scores_digest(prompts, digest, scorer)) as scores:
            groups = score(groups, prompts, scorer=scorer, journal=scores, on_batch=log_progress)
        free(scorer)
    return groups
