"""A TRL trainer for Constitutional AI: writes its training set by critique and revision, then fine-tunes on it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from stagekit.errors import ConfigError
from stagekit.journal import Journal
from stagekit.principles import DEFAULT_PRINCIPLES, principles_from
from stagekit.requests import Generator, Sampling
from stagekit.trainers.constitutional import Prompt, Revisions, plan_digest, prompts_from, revise
from stagekit.trainers.constitutional_rows import Target, preference_rows, sft_rows
from stagekit.trainers.generators import (
    generator_of,
    journal_info,
    loaded,
    log_progress,
    refuse_new_template,
    tokenizer_of,
)


@dataclass
class ConstitutionalConfig(SFTConfig):  # type: ignore[misc]
    """`SFTConfig`, and how the training set is written. `seed` seeds both."""

    principles: list[Any] | None = field(
        default=None,
        metadata={"help": "Sentences, or mappings of name, critique_request, revision_request. None: stagekit's own."},
    )
    rounds: int = field(default=2, metadata={"help": "Rounds of critique and revision."})
    target: str = field(
        default="all",
        metadata={
            "help": "Train on the revisions of all rounds, or on the last of each.",
            "choices": ["all", "final"],
        },
    )
    max_new_tokens: int = field(default=256, metadata={"help": "Most tokens of an answer and of a revision."})
    max_critique_tokens: int = field(default=128, metadata={"help": "Most tokens of a critique."})
    temperature: float = field(default=1.0, metadata={"help": "Of all sampling; 0 is greedy. The paper: 1."})
    batch_tokens: int = field(default=16384, metadata={"help": "Padded size of a generation batch, in tokens."})
    journal_path: str | None = field(
        default=None, metadata={"help": "Where the texts are kept. None: journal.jsonl in output_dir."}
    )


class ConstitutionalTrainer(SFTTrainer):  # type: ignore[misc]
    """Critique-revision by the model as it comes, then supervised fine-tuning on the revisions.

    The texts are written while the trainer is built, before TRL touches the model, and are journalled: building it
    again after a crash goes on where it ended. The training that follows is that of `SFTTrainer` on the same rows.
    With several processes the first one writes and the others wait, so their time limit
    (`ddp_timeout`) must cover the writing.

    Args:
        model: the policy, a path or a live model; it writes the answers and the revisions.
        train_dataset: rows with `prompt`, a text or a conversation that ends with the user's turn.
        critique_model: writes the critiques: a path, a live model, or any `Generator`. None: the policy.
        unrevised_dataset: prompts that are answered but not revised, and trained on as answered (the paper mixes
            harmless ones in, so that helpfulness stays).
        processing_class: the tokenizer; None: the one beside the model.
        sft_arguments: everything else that `SFTTrainer` takes.

    Raises:
        ConfigError: an argument or a prompt that cannot work.
        StageError: no revision is left to train on, or the journal is another run's.
    """

    revisions: Revisions

    def __init__(
        self,
        model: Any,
        args: ConstitutionalConfig,
        train_dataset: Iterable[Mapping[str, Any]],
        critique_model: Any = None,
        unrevised_dataset: Iterable[Mapping[str, Any]] | None = None,
        processing_class: Any = None,
        peft_config: Any = None,
        **sft_arguments: Any,
    ) -> None:
        """Write the revisions, then build the `SFTTrainer` on them."""
        _check(args)
        prompts = prompts_from(train_dataset, "train_dataset")
        prompts += prompts_from(unrevised_dataset or (), "unrevised_dataset", revise=False)
        if processing_class is None:
            processing_class = tokenizer_of(model, args)
        self.revisions = _write(model, args, prompts, critique_model, processing_class)
        rows = sft_rows(self.revisions, cast(Target, args.target))
        super().__init__(
            model=model,
            args=args,
            train_dataset=Dataset.from_list([{key: row[key] for key in ("prompt", "completion")} for row in rows]),
            processing_class=processing_class,
            peft_config=peft_config,
            **sft_arguments,
        )

    @property
    def preferences(self) -> Dataset:
        """Pairs for a preference stage: the last valid revision chosen, the first answer rejected.

        Raises:
            StageError: there is none; the message names the reasons.
        """
        return Dataset.from_list(preference_rows(self.revisions))


def _check(args: ConstitutionalConfig) -> None:
    if args.target not in ("all", "final"):
        raise ConfigError(f"target is {args.target!r}; it must be 'all' or 'final'")
    refuse_new_template(args)


def _write(
    model: Any, args: ConstitutionalConfig, prompts: list[Prompt], critique_model: Any, processing_class: Any
) -> Revisions:
    """The generation phase; a model given by path is loaded for it and freed after it."""
    sampling = Sampling(args.temperature)
    policy = generator_of(loaded(model, args), processing_class, sampling, args)
    critic = _critic(critique_model, args)
    principles = principles_from(args.principles) if args.principles is not None else DEFAULT_PRINCIPLES
    plan: dict[str, Any] = {
        "policy": policy,
        "critic": critic,
        "principles": principles,
        "rounds": args.rounds,
        "seed": args.seed,
        "max_new_tokens": args.max_new_tokens,
        "max_critique_tokens": args.max_critique_tokens,
        "batch_tokens": args.batch_tokens,
    }
    path = Path(args.journal_path or Path(args.output_dir or ".") / "journal.jsonl")
    meta = {
        **journal_info(policy),
        "critic": critic.fingerprint if critic is not None else None,
    }
    with (
        args.main_process_first(local=False, desc="critique-revision"),
        Journal.open(path, plan_digest(prompts, **plan), meta) as journal,
    ):
        return revise(prompts, **plan, journal=journal, on_batch=log_progress)


def _critic(critique_model: Any, args: ConstitutionalConfig) -> Generator | None:
    if critique_model is None or isinstance(critique_model, Generator):
        return critique_model
    sampling = Sampling(args.temperature)
    return generator_of(loaded(critique_model, args), tokenizer_of(critique_model, args), sampling, args)
