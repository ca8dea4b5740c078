"""What a stage type answers for itself: its options, its TRL arguments, the data it needs, how it runs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from stagekit.errors import Problem
from stagekit.options import Options, Tagged
from stagekit.stage_options import FAMILIES


if TYPE_CHECKING:
    from stagekit.job import Job, Outcome
    from stagekit.stage import TrainingStage


class Setting(NamedTuple):
    """One argument of a TRL config: its name there, its value, and where the value came from."""

    target: str
    value: Any
    source: str


SLOTS = ("model", "lora", "reference", "generation", "text_metrics", "trl")
"""Options of a stage that belong to no family: each stage type says which of them it uses."""


class Method(Tagged):
    """Base of the stage types. A subclass is one file in this folder; nothing else branches on the type."""

    summary: ClassVar[str] = ""
    """One line: what the stage type does."""
    paper: ClassVar[str] = ""
    """Where the method is from."""
    missing: ClassVar[str | None] = None
    """For a type that is declared but not built: what it waits for."""
    trainer_class: ClassVar[str | None] = None
    """`module:Class` of the trainer; None where the type trains nothing by itself."""
    config_class: ClassVar[str | None] = None
    """`module:Class` of that trainer's config."""
    default_learning_rate: ClassVar[float] = 2e-5
    """The vetted full-parameter rate; ten times that with LoRA."""
    families: ClassVar[frozenset[type[Options]]] = frozenset(FAMILIES)
    """Families of stage options that the type uses."""
    slots: ClassVar[frozenset[str]] = frozenset({"model", "lora", "trl"})
    """Slots that the type uses."""
    refused: ClassVar[Mapping[str, str]] = {}
    """Single stage options that the type cannot use: name -> reason and way out."""
    instead: ClassVar[str] = ""
    """The way out for options of families and slots that the type does not use."""
    columns: ClassVar[Sequence[Sequence[str]]] = ()
    """The columns that training data must have: alternatives, each a set."""
    makes: ClassVar[tuple[str, ...]] = ()
    """Names of the datasets that the stage leaves behind for later ones."""
    metric_keys: ClassVar[Mapping[str, str]] = {"loss": "eval_loss", "custom": ""}
    """`best_checkpoint_metric` -> the key under which the trainer reports it."""
    reports: ClassVar[frozenset[str]] = frozenset()
    """What else the trainer tells of an evaluation, without `eval_`; early stopping can watch it."""
    perplexity: ClassVar[bool] = False
    """Whether the evaluation loss is a mean negative log-likelihood, so that its exponential means something."""
    takes_loss: ClassVar[bool] = False
    """Whether `custom_loss_function` can take the place of the type's own loss."""
    trains: ClassVar[bool] = True
    """False for types whose policy is the one that came in."""
    reads: ClassVar[frozenset[str]] = frozenset()
    """Options that change the type's result although they change no other's (`metadata`)."""
    batches_of: ClassVar[str] = "rows"
    """What `batch_size` counts."""
    needs_data: ClassVar[bool] = True
    """Whether a stage of this type cannot do without `training_data`."""
    task: ClassVar[Literal["CAUSAL_LM", "SEQ_CLS", "TOKEN_CLS"]] = "CAUSAL_LM"
    """What an adapter of this type is for, in peft's words."""
    artifact: ClassVar[Literal["policy", "reward_model"]] = "policy"
    """What training ends with, and the folder it is in. Only a policy is what later stages start from."""
    optional_columns: ClassVar[tuple[str, ...]] = ()
    """Columns of the training data that are read where they are there."""
    validation_columns: ClassVar[Sequence[Sequence[str]] | None] = None
    """The columns of validation data, where they are others than those of training data."""

    def wanted_columns(self) -> Sequence[Sequence[str]]:
        """`columns`, where the type's options name others."""
        return self.columns

    def settings(self, stage: TrainingStage) -> Iterable[Setting]:
        """Arguments of the trainer's config that come from the method's own options. Pure."""
        return ()

    def problems(self, stage: TrainingStage) -> Iterable[Problem]:
        """What cannot work, from the declaration alone; paths relative to the stage."""
        return ()

    def problems_of_sizes(self, stage: TrainingStage, processes: int) -> Iterable[Problem]:
        """Sizes that do not divide over so many processes; paths relative to the stage. Asked once their number is
        known: before a run, and by `check` and `plan`."""
        return ()

    def notes(self, stage: TrainingStage) -> Iterable[str]:
        """Decisions that `plan` should tell the user."""
        return ()

    def steps(self, given: Mapping[str, Any], rows: int, processes: int) -> int:
        """Optimiser steps of all epochs over so many rows, at most.

        Args:
            given: The arguments of the trainer's config.
            rows: As many are trained on.
            processes: As many share them.
        """
        batches = math.ceil(math.ceil(rows / given["per_device_train_batch_size"]) / processes)
        steps: float = math.ceil(batches / given["gradient_accumulation_steps"]) * given["num_train_epochs"]
        return math.ceil(steps)

    def trainings(self) -> int:
        """How many times the stage trains, each from the model of the time before."""
        return 1

    def rows_made(self, read: int, mixed: Mapping[str, int]) -> tuple[int, Mapping[str, int]]:
        """Of `read` rows (`mixed`: by the sets of a mix), at most how many each training learns, and how many the
        datasets that the stage leaves have."""
        return read, {}

    def step0_loss(self, stage: TrainingStage) -> float | None:
        """The loss that policy == reference must give before the first step; None where that is not so."""
        return None

    def trainer_for(self, stage: TrainingStage) -> str | None:
        """`module:Class` of the trainer, where the type's options decide which."""
        return self.trainer_class

    def trainer_arguments(self, job: Job) -> dict[str, Any]:
        """Arguments of the trainer's constructor beside those that every trainer gets."""
        return {}

    def rows(self, job: Job, dataset: Any) -> Any:
        """The dataset in the form that the trainer wants; `dataset` may be None."""
        return dataset

    def callbacks(self, job: Job) -> dict[str, Any]:
        """Callbacks of the type's own, by name."""
        return {}

    def built(self, job: Job, trainer: Any) -> None:
        """Called with the trainer, before anything is trained."""

    def cut(self, trainer: Any) -> dict[str, int]:
        """Rows that the trainer shortened: reason -> count."""
        return {}

    def probe(self, job: Job, trainer: Any) -> Any:
        """Numbers of the trained model that the saved one must give again; None where there are none."""
        return None

    def check_saved(self, job: Job, folder: Path, before: Any) -> None:
        """Load what was saved in `folder` and compare it with what `probe` gave."""

    def prepare(self, job: Job) -> Job:
        """Make the stage's dataset where the type writes its own; otherwise the job as it is."""
        return job

    def run(self, job: Job) -> Outcome:
        """Do the work of the stage."""
        from stagekit.training import train

        return train(job)


def in_effect(stage: TrainingStage, option: str, target: str) -> Any:
    """The number that the trainer gets for the method option `option`: `trl` counts where the option is not set."""
    value, other = getattr(stage.method, option), stage.trl.get(target)
    return value if option in stage.method.model_fields_set or not isinstance(other, int | float) else other


def setting(stage: TrainingStage, option: str, target: str, value: Any) -> Setting:
    """A Setting from the method option `option`, with its source told apart: set by the user or the default."""
    method = stage.method
    given = option in method.model_fields_set
    return Setting(target, value, f"{stage.path}.method.{option}" if given else f"default of {method.type}")
