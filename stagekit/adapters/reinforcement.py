"""What the stage types that learn from rewards share: what scores, how a rollout is sampled, which model the reference
is."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from stagekit.adapters.base import Method, Setting, setting
from stagekit.adapters.references import reference_built, reference_callbacks, reference_of
from stagekit.errors import Problem
from stagekit.groups import Generation, Rewards, RewardSource, is_function
from stagekit.options import NonNegativeFloat, Positive, PositiveFloat
from stagekit.reward_options import reward_problems


if TYPE_CHECKING:
    from stagekit.job import Job
    from stagekit.stage import TrainingStage


_SAMPLING = {
    "max_new_tokens": "max_completion_length",
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
}
_OWNED = {
    "epsilon": "method.clip_range",
    "num_iterations": "method.epochs_per_batch",
    "generation_batch_size": "method.rollout_samples",
    "steps_per_generation": "method.rollout_samples",
    "reward_weights": "method.reward",
    "shuffle_dataset": "shuffle_data",
    "sync_ref_model": "reference.update_every",
    "ref_model_sync_steps": "reference.update_every",
    "ref_model_mixup_alpha": "reference.update_every",
}
"""Arguments that stagekit must know, and the option that says each."""


class Scored(Method):
    """A stage whose model samples, is scored, and learns from the scores."""

    reward: Rewards = None
    """What scores completions: `stage:NAME` (a reward or process_reward stage), a reward model, a function
    `package.module:function` as TRL calls it, a verifier (`exact`, `numeric`, `maths`, `regex`, `json_schema`,
    `format`, `python_tests`), a reward of TRL (`accuracy_reward`, `think_format_reward`, ...), or a list of them, each
    `{source: ..., weight: ..., options: {...}}`."""

    epochs_per_batch: Positive = 4
    """Passes over the completions of one rollout. TRL: `num_iterations`."""

    rollout_samples: Positive = 2048
    """Completions of a rollout, over all processes. TRL: `generation_batch_size`."""

    default_learning_rate: ClassVar = 1e-6
    slots: ClassVar = frozenset({"model", "lora", "reference", "generation", "trl"})
    columns: ClassVar = (("prompt",),)
    batches_of: ClassVar = "completions"
    metric_keys: ClassVar = {"loss": "eval_loss", "reward_score": "eval_reward", "custom": ""}
    tie: ClassVar[str] = "kl_penalty_coefficient"
    """The option that is TRL's `beta`."""
    always: ClassVar[frozenset[str]] = frozenset()
    """Options whose default reaches the trainer too; the others do when they are set."""

    def settings(self, stage: TrainingStage) -> Iterable[Setting]:
        """The rollout, sampling, the reference, the order of prompts."""
        if self._counts("epochs_per_batch"):
            yield setting(stage, "epochs_per_batch", "num_iterations", self.epochs_per_batch)
        if "rollout_samples" in self.model_fields_set:
            yield setting(stage, "rollout_samples", "generation_batch_size", self.rollout_samples)
        yield from self._reference_settings(stage)
        weights = [reward.weight for reward in self.reward or ()]
        if any(weight != 1.0 for weight in weights):
            yield setting(stage, "reward", "reward_weights", weights)
        given = stage.generation.model_fields_set if stage.generation is not None else frozenset()
        for option, target in _SAMPLING.items():
            if option in given:
                yield Setting(target, getattr(stage.generation, option), f"{stage.path}.generation.{option}")
        source = f"{stage.path}.shuffle_data" if "shuffle_data" in stage.model_fields_set else "default"
        yield Setting("shuffle_dataset", stage.shuffle_data, source)
        yield Setting("num_generations_eval", 1, "stagekit (one completion per prompt measures the reward)")
        yield Setting("disable_dropout", not _drops_out(stage), _why_dropout(stage))

    def _counts(self, option: str) -> bool:
        """Whether an option reaches the trainer."""
        return option in self.always or option in self.model_fields_set

    def _reference_settings(self, stage: TrainingStage) -> Iterable[Setting]:
        reference = reference_of(stage)
        if reference.update_every is not None and stage.lora is None:
            source = f"{stage.path}.reference.update_every"
            yield Setting("sync_ref_model", True, source)
            yield Setting("ref_model_sync_steps", reference.update_every, source)
            yield Setting("ref_model_mixup_alpha", 1.0, source)

    def problems(self, stage: TrainingStage) -> Iterable[Problem]:
        """A missing reward, sizes that do not divide, a reference that cannot be."""
        from stagekit.distributed import splits

        if self.reward is None:
            yield Problem("method.reward", "missing; say what scores completions: stage:NAME, a model or a function")
        yield from reward_problems(self.reward or ())
        for key, owner in {**_OWNED, "beta": f"method.{self.tie}"}.items():
            if key in stage.trl:
                yield Problem(f"trl.{key}", f"belongs to {owner}")
        yield from self._sampling_problems(stage)
        yield from self._reference_problems(stage)
        if not splits(stage):
            yield from self.problems_of_sizes(stage, 1)

    def _sampling_problems(self, stage: TrainingStage) -> Iterable[Problem]:
        generation = stage.generation if stage.generation is not None else Generation()
        if generation.temperature == 0:
            yield Problem("generation.temperature", "0 is greedy, which explores nothing; give a value above 0")
        for option in ("batch_tokens", "backend"):
            if option in generation.model_fields_set:
                yield Problem(
                    f"generation.{option}", f"{stage.method.type} samples with TRL; see trl.use_vllm and the like"
                )

    def problems_of_sizes(self, stage: TrainingStage, processes: int) -> Iterable[Problem]:
        """A rollout that is no whole minibatches."""
        minibatch, what = minibatch_of(stage, processes)
        if "rollout_samples" in self.model_fields_set and self.rollout_samples % minibatch:
            yield Problem(
                "method.rollout_samples",
                f"{self.rollout_samples} completions are no whole minibatches of {minibatch} ({what}); make it a "
                "multiple",
            )

    def _reference_problems(self, stage: TrainingStage) -> Iterable[Problem]:
        reference = reference_of(stage)
        mode = reference.mode
        if mode == "precompute":
            yield Problem("reference.mode", "'precompute' cannot be: what is scored is sampled anew; use auto")
        if mode == "copy" and stage.lora is not None:
            yield Problem(
                "reference.mode",
                "'copy' would hold a second model beside an adapter whose base is already the reference; use auto",
            )
        if mode == "copy" and stage.lora is None:
            yield Problem("reference.mode", "'copy' is what full fine-tuning has anyway; leave it out")
        if mode in {"base", "adapter"} and stage.lora is None:
            yield Problem("reference.mode", f"{mode!r} needs lora; without it use auto or copy")
        if mode not in {"none", "auto"} and not self._ties():
            yield Problem("reference.mode", "has no effect without method.kl_penalty_coefficient above 0")
        if reference.update_every is not None and (mode in {"none", "base"} or not self._ties()):
            yield Problem("reference.update_every", "has no effect without a reference that can follow")

    def _ties(self) -> bool:
        """Whether the policy is tied to a reference."""
        return True

    def notes(self, stage: TrainingStage) -> Iterable[str]:
        """What is decided here: the reference in full fine-tuning, dropout."""
        reference = reference_of(stage)
        if self._ties() and stage.lora is None and reference.mode == "auto":
            yield "full fine-tuning has nothing to share with a reference: a frozen copy of the incoming model is held"
        if stage.lora is not None and not _drops_out(stage) and stage.lora.dropout > 0:
            yield "lora.dropout is off, so that the policy that learns is the one that sampled; set it to have it"

    def rollout(self, minibatch: int, rows: int) -> int:
        """Completions of a rollout, with so many in a minibatch, of `rows` prompts; all over all processes."""
        return self.rollout_samples if "rollout_samples" in self.model_fields_set else minibatch

    def group(self) -> int:
        """Completions of a prompt in a rollout."""
        return 1

    def steps(self, given: Mapping[str, Any], rows: int, processes: int) -> int:
        """Optimiser steps of all epochs, in whole rollouts; prompts that fill none are left out."""
        minibatch = given["per_device_train_batch_size"] * given["gradient_accumulation_steps"] * processes
        rollout = self.rollout(minibatch, rows)
        passes = self.epochs_per_batch if self._counts("epochs_per_batch") else 1
        steps: float = rows * self.group() // rollout * passes * (rollout // minibatch) * given["num_train_epochs"]
        return math.ceil(steps)

    def trainer_arguments(self, job: Job) -> dict[str, Any]:
        """The rewards, and the seed of the order of prompts."""
        return {"reward_funcs": self.rewards(job), "order_seed": job.stage.data_shuffle_seed}

    def rewards(self, job: Job) -> list[Any]:
        """The reward functions, watched; models loaded.

        Raises:
            StageError: a reward cannot be found.
        """
        from stagekit.rewards import reward_of

        return [reward_of(reward, self._place(job, reward)) for reward in self.reward or ()]

    def _place(self, job: Job, reward: RewardSource) -> Any:
        """A reward's function, or the folder of its model."""
        from stagekit.custom import resolve
        from stagekit.errors import StageError

        source = reward.source
        if is_function(source):
            return resolve(source)
        if not isinstance(source, str):
            return source
        if source.startswith("stage:"):
            name = source.removeprefix("stage:")
            folder = job.results[name].reward_model if name in job.results else None
            if folder is None:
                raise StageError(f"stage {job.stage.name!r}: stage {name!r} left no reward model to score with")
            return folder
        from stagekit.models import local_model

        return local_model(source, where=f"{job.stage.path}.method.reward")

    def callbacks(self, job: Job) -> dict[str, Any]:
        """Those that update the reference."""
        return reference_callbacks(job)

    def built(self, job: Job, trainer: Any) -> None:
        """The reference as declared; how large a rollout is, and how many prompts an epoch leaves out."""
        reference_built(job, trainer)
        args = trainer.args
        updates = trainer.num_iterations * args.steps_per_generation / args.gradient_accumulation_steps
        job.show.line(f"  a rollout is {args.generation_batch_size} completions, used for {updates:g} steps")
        rows, prompts = len(trainer.train_dataset), args.generation_batch_size // self.group()
        if rows % prompts and not job.stage.is_evaluation_only:
            job.show.line(
                f"  an epoch leaves out {rows % prompts} of {rows} prompts: a rollout takes {prompts}, whole"
            )


def minibatch_of(stage: TrainingStage, processes: int) -> tuple[int, str]:
    """Completions of an optimiser step, over all processes, and the options that make them."""
    size = stage.batch_size * stage.gradient_accumulation_steps * processes
    return size, "batch_size * gradient_accumulation_steps" + (f" * {processes} processes" if processes > 1 else "")


def _drops_out(stage: TrainingStage) -> bool:
    """Whether the adapter's dropout stays on: only where it was asked for."""
    return stage.lora is not None and "dropout" in stage.lora.model_fields_set and stage.lora.dropout > 0


def _why_dropout(stage: TrainingStage) -> str:
    return (
        f"{stage.path}.lora.dropout"
        if _drops_out(stage)
        else "stagekit (the policy that learns is the one that sampled)"
    )


class Reinforcement(Scored):
    """A stage that moves its model by the ratio of probabilities, clipped, and pays for a divergence."""

    kl_penalty_coefficient: NonNegativeFloat = 0.01
    """Weight of the divergence from the reference. TRL: `beta`."""

    clip_range: PositiveFloat = 0.2
    """How far one rollout may move the probability ratio from 1. TRL: `epsilon`."""

    def settings(self, stage: TrainingStage) -> Iterable[Setting]:
        """The clip range and the divergence, and what every such stage has."""
        yield setting(stage, "clip_range", "epsilon", self.clip_range)
        if reference_of(stage).mode == "none":
            yield Setting("beta", 0.0, f"{stage.path}.reference.mode")
        elif self._counts("kl_penalty_coefficient"):
            yield setting(stage, "kl_penalty_coefficient", "beta", self.kl_penalty_coefficient)
        yield from super().settings(stage)

    def problems(self, stage: TrainingStage) -> Iterable[Problem]:
        """A penalty without a reference."""
        yield from super().problems(stage)
        given = "kl_penalty_coefficient" in self.model_fields_set and self.kl_penalty_coefficient > 0
        if reference_of(stage).mode == "none" and given:
            yield Problem("method.kl_penalty_coefficient", "has no effect with reference.mode: none")

    def _ties(self) -> bool:
        return self._counts("kl_penalty_coefficient") and self.kl_penalty_coefficient > 0


class Grouped(Reinforcement):
    """A stage type that compares several completions of one prompt."""

    group_size: Positive = 4
    """Completions per prompt, at least 2. TRL: `num_generations`."""

    generate_at_once: Positive | None = None
    """Completions that a process samples at a time; bounds the memory. None = the whole rollout, as in TRL."""

    def settings(self, stage: TrainingStage) -> Iterable[Setting]:
        """What every such stage has, and the group."""
        yield from super().settings(stage)
        yield setting(stage, "group_size", "num_generations", self.group_size)

    def problems(self, stage: TrainingStage) -> Iterable[Problem]:
        """Groups of one, and rollouts that hold parts of groups."""
        yield from super().problems(stage)
        if self.group_size < 2:
            yield Problem(
                "method.group_size", "1 compares a completion with itself, which teaches nothing; at least 2"
            )

    def problems_of_sizes(self, stage: TrainingStage, processes: int) -> Iterable[Problem]:
        """Rollouts that hold parts of groups. A group may lie on several processes."""
        yield from super().problems_of_sizes(stage, processes)
        minibatch, what = minibatch_of(stage, processes)
        rollout = self.rollout(minibatch, 0)
        if rollout % self.group_size:
            size = "rollout_samples" if "rollout_samples" in self.model_fields_set else what
            yield Problem(
                "method.group_size",
                f"a rollout of {rollout} completions ({size}) holds no whole groups of "
                f"{self.group_size}; make it a multiple",
            )

    def group(self) -> int:
        """Completions of a prompt in a rollout."""
        return self.group_size

    def trainer_arguments(self, job: Job) -> dict[str, Any]:
        """The rewards, the order of prompts, and how much is sampled at a time."""
        return {**super().trainer_arguments(job), "chunk_size": self.generate_at_once}
