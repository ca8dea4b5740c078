"""A TRL trainer for self-play (SPIN): samples the model's own answers, and learns to prefer the data's to them.

`SelfPlayTrainer` is one iteration; `self_play` repeats it, each iteration against the model of the one before.

The loss is DPO's sigmoid loss with the model at the start of the iteration as the reference: the opponent.

Source: https://huggingface.co/papers/2401.01335, algorithm 1 and equation 4.7.
"""

import copy
import gc
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import DPOConfig, DPOTrainer

from stagekit.errors import ConfigError, Problem
from stagekit.files import whole_folder
from stagekit.journal import Journal
from stagekit.requests import Generator, Sampling
from stagekit.rows import read_jsonl, write_jsonl
from stagekit.selection import Group
from stagekit.trainers.generators import (
    generator_of,
    journal_info,
    loaded,
    log_progress,
    refuse_new_template,
    tokenizer_of,
)
from stagekit.trainers.sampling import Prompt, prompts_from, sample, texts_digest
from stagekit.trainers.self_play import drops, metrics, pairs, real_answers


@dataclass
class SelfPlayConfig(DPOConfig):  # type: ignore[misc]
    """`DPOConfig`, and how the opponent answers. `seed` seeds both; `beta` is the paper's lambda."""

    learning_rate: float = field(default=5e-7, metadata={"help": "The initial learning rate; the paper's."})
    precompute_ref_log_probs: bool = field(
        default=True, metadata={"help": "The reference is the model at the start, read once before training."}
    )
    responses_per_prompt: int = field(default=4, metadata={"help": "The opponent's answers per row of data."})
    temperature: float = field(default=0.7, metadata={"help": "Of the opponent's sampling; the paper: 1."})
    max_new_tokens: int = field(default=256, metadata={"help": "Most tokens of an answer; a cut one makes no pair."})
    batch_tokens: int = field(default=16384, metadata={"help": "Padded size of a generation batch, in tokens."})
    iteration: int = field(
        default=1, metadata={"help": "Number of the iteration, from 1; stands in journal and rows."}
    )
    journal_path: str | None = field(
        default=None, metadata={"help": "Where the answers are kept. None: journal.jsonl in output_dir."}
    )


class SelfPlayTrainer(DPOTrainer):  # type: ignore[misc]
    """One iteration: answers by the model as it comes, then DPO with them as rejected and the data's as chosen.

    The answers are written while the trainer is built, before TRL touches the model, and are journalled: building it
    again after a crash goes on where it ended.

    Args:
        model: the player, a path or a live model; its weights now are the opponent and the reference.
        train_dataset: rows with `prompt` (ending with the user's turn) and `completion`, the data's answer.
        processing_class: the tokenizer; None: the one beside the model.
        opponent: writes the answers in the model's place: any `Generator`, for an engine that serves its weights.
        previous: pairs of the iteration before, learnt as well.
        dpo_arguments: everything else that `DPOTrainer` takes.

    Raises:
        ConfigError: an argument or a row that cannot work.
        StageError: no pair is left, or the journal is another run's.
    """

    groups: list[Group]
    pairs: list[dict[str, Any]]
    sampling_metrics: dict[str, float]

    def __init__(
        self,
        model: Any,
        args: SelfPlayConfig,
        train_dataset: Iterable[Mapping[str, Any]],
        processing_class: Any = None,
        peft_config: Any = None,
        opponent: Generator | None = None,
        previous: Iterable[Mapping[str, Any]] = (),
        **dpo_arguments: Any,
    ) -> None:
        """Sample the answers, then build the `DPOTrainer` on the pairs."""
        _check(args, peft_config)
        data = list(train_dataset)
        prompts, answers = prompts_from(data), real_answers(data)
        if processing_class is None:
            processing_class = tokenizer_of(model, args)
        self.groups = _sample(model, args, prompts, processing_class, opponent)
        self.pairs = pairs(self.groups, answers, args.iteration)
        self.sampling_metrics = {**metrics(self.groups, answers), **drops(self.groups, answers)}
        rows = [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in (*self.pairs, *previous)]
        super().__init__(
            model=model,
            args=args,
            train_dataset=Dataset.from_list(rows),
            processing_class=processing_class,
            peft_config=peft_config,
            **dpo_arguments,
        )


class StopAtMargin(TrainerCallback):  # type: ignore[misc]
    """Ends the iteration when the logged margin of the rewards reaches `margin`: more would leave the data behind."""

    def __init__(self, margin: float) -> None:
        self._margin = margin

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Read the margin from what was logged."""
        found = (logs or {}).get("rewards/margins")
        if found is not None and float(found) >= self._margin:
            control.should_training_stop = True


def self_play(
    model: str,
    args: SelfPlayConfig,
    train_dataset: Iterable[Mapping[str, Any]],
    *,
    iterations: int = 3,
    mix_previous: bool = True,
    **arguments: Any,
) -> str:
    """SPIN: `iterations` of sampling and preferring, each against the model of the one before; the last one's folder.

    Iteration t is in `output_dir/iteration-t`: its pairs in `pairs.jsonl`, its model in `policy`. One that is done is
    not done again; one that was killed while it sampled goes on, one killed while it trained trains from its start.

    Args:
        model: a path; the iterations pass models on by path.
        mix_previous: learn the pairs of the iteration before as well, as the paper does.
        arguments: everything else that `SelfPlayTrainer` takes, but for an adapter.

    Raises:
        ConfigError: no iterations, a live model, or an adapter.
    """
    if iterations < 1:
        raise ConfigError(f"iterations is {iterations}; at least one is needed")
    if not isinstance(model, str):
        raise ConfigError("self_play passes models on by path: save the model and give its folder")
    if arguments.get("peft_config") is not None:
        raise ConfigError("self_play trains full weights; for adapters declare a self_play stage with lora")
    rows, player, previous = list(train_dataset), model, list[Any]()
    for number in range(1, iterations + 1):
        folder = Path(args.output_dir or ".") / f"iteration-{number}"
        if not (folder / "policy" / "config.json").is_file():
            own = copy.copy(args)
            own.output_dir, own.journal_path, own.iteration = str(folder), None, number
            trainer = SelfPlayTrainer(player, own, rows, previous=previous, **arguments)
            write_jsonl(trainer.pairs, folder / "pairs.jsonl")
            trainer.train()
            with whole_folder(folder / "policy") as target:
                trainer.save_model(str(target))
            del trainer
            gc.collect()
        player = str(folder / "policy")
        previous = read_jsonl(folder / "pairs.jsonl") if mix_previous else []
    return player


def _check(args: SelfPlayConfig, peft_config: Any) -> None:
    problems = []
    if args.responses_per_prompt < 1:
        problems.append(Problem("responses_per_prompt", f"{args.responses_per_prompt} gives no pair; at least 1"))
    if args.temperature <= 0 and args.responses_per_prompt > 1:
        same = f"at {args.temperature} all {args.responses_per_prompt} answers are the same one"
        problems.append(Problem("temperature", same))
    if peft_config is None and not args.precompute_ref_log_probs:
        problems.append(
            Problem(
                "precompute_ref_log_probs", "False takes the reference from the disk; the opponent is the model now"
            )
        )
    if args.sync_ref_model:
        problems.append(Problem("sync_ref_model", "the reference is the opponent; it stays for the iteration"))
    if problems:
        raise ConfigError(problems)
    refuse_new_template(args)


def _sample(
    model: Any, args: SelfPlayConfig, prompts: list[Prompt], processing_class: Any, opponent: Generator | None
) -> list[Group]:
    """The generation phase; a model given by path is loaded for it and freed after it."""
    info: dict[str, Any] = {}
    if opponent is None:
        policy = generator_of(loaded(model, args), processing_class, Sampling(args.temperature), args)
        info, opponent = journal_info(policy), policy
    plan: dict[str, Any] = {
        "policy": opponent,
        "n": args.responses_per_prompt,
        "seed": args.seed,
        "max_new_tokens": args.max_new_tokens,
        "batch_tokens": args.batch_tokens,
        "iteration": args.iteration,
    }
    path = Path(args.journal_path or Path(args.output_dir or ".") / "journal.jsonl")
    with (
        args.main_process_first(local=False, desc="self-play"),
        Journal.open(path, texts_digest(prompts, **plan), info) as journal,
    ):
        return sample(prompts, **plan, journal=journal, stage="self_play", on_batch=log_progress)
