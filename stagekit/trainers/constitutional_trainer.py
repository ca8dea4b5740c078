"""A TRL trainer for Constitutional AI: writes its training set by critique and revision, then fine-tunes on it."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from stagekit.counters import digest_of
from stagekit.errors import ConfigError
from stagekit.generation import TransformersGenerator, tokenizer_fingerprint, weights_fingerprint
from stagekit.journal import Journal
from stagekit.principles import DEFAULT_PRINCIPLES, principles_from
from stagekit.requests import Generator, Sampling
from stagekit.trainers.constitutional import Progress, Prompt, Revisions, plan_digest, prompts_from, revise
from stagekit.trainers.constitutional_rows import Target, preference_rows, sft_rows


logger = logging.getLogger(__name__)


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
            processing_class = _tokenizer_of(model, args)
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
    for name in ("chat_template_path", "eos_token"):
        if getattr(args, name) is not None:
            raise ConfigError(
                f"{name} would change the template after the texts are written with the old one. Set it on the "
                "tokenizer and pass that as processing_class."
            )


def _write(
    model: Any, args: ConstitutionalConfig, prompts: list[Prompt], critique_model: Any, processing_class: Any
) -> Revisions:
    """The generation phase; a model given by path is loaded for it and freed after it."""
    policy = _generator(_loaded(model, args), processing_class, args)
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
        "model": policy.fingerprint,
        "critic": critic.fingerprint if critic is not None else None,
        "tokenizer": tokenizer_fingerprint(policy.tokenizer),
        "versions": {"torch": torch.__version__},
    }
    with (
        args.main_process_first(local=False, desc="critique-revision"),
        Journal.open(path, plan_digest(prompts, **plan), meta) as journal,
    ):
        return revise(prompts, **plan, journal=journal, on_batch=_log)


def _loaded(model: Any, args: ConstitutionalConfig) -> Any:
    """The model on the device of training; by path as TRL loads it, float32 unless model_init_kwargs says else."""
    if isinstance(model, str):
        kwargs = {"dtype": "float32", **cast(dict[str, Any], args.model_init_kwargs or {})}
        model = AutoModelForCausalLM.from_pretrained(model, trust_remote_code=args.trust_remote_code, **kwargs)
    return model if getattr(model, "hf_device_map", None) else model.to(args.device)


def _tokenizer_of(model: Any, args: ConstitutionalConfig) -> Any:
    name = model if isinstance(model, str) else model.config._name_or_path
    return AutoTokenizer.from_pretrained(name, trust_remote_code=args.trust_remote_code)


def _generator(model: Any, processing_class: Any, args: ConstitutionalConfig) -> TransformersGenerator:
    tokenizer = getattr(processing_class, "tokenizer", processing_class)  # of a processor
    is_float32 = next(model.parameters()).dtype == torch.float32
    autocast = torch.bfloat16 if args.bf16 and is_float32 else None
    fingerprint = digest_of(
        weights_fingerprint(model), tokenizer_fingerprint(tokenizer), float(args.temperature), str(autocast)
    )
    return TransformersGenerator(model, tokenizer, Sampling(args.temperature), fingerprint, autocast)


def _critic(critique_model: Any, args: ConstitutionalConfig) -> Generator | None:
    if critique_model is None or isinstance(critique_model, Generator):
        return critique_model
    return _generator(_loaded(critique_model, args), _tokenizer_of(critique_model, args), args)


def _log(progress: Progress) -> None:
    logger.info(
        "round %d, %s: batch %d of %d, %d texts, %d tokens in %.1f s",
        progress.round,
        progress.role,
        progress.batch,
        progress.batches,
        progress.texts,
        progress.new_tokens,
        progress.duration_seconds,
    )
