"""Self-play (SPIN): iterations of sampling the model's own answers and preferring the data's to them."""

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from stagekit.adapters.base import Method, Setting, setting
from stagekit.adapters.references import OWNED, cache_arguments, precomputes, reference_settings
from stagekit.adapters.reinforcement import ONE_PROCESS
from stagekit.errors import Problem
from stagekit.groups import is_server
from stagekit.options import NonNegativeFloat, Positive, PositiveFloat


if TYPE_CHECKING:
    from stagekit.job import Job, Outcome
    from stagekit.stage import TrainingStage


class SelfPlay(Method):
    """SPIN: the model learns to prefer the data's answers to its own. In each iteration the model as it stands is the
    opponent: it answers every prompt, and DPO's sigmoid loss prefers the data's answer, with the opponent as the
    reference. Leaves `pairs`, those of the last iteration. `epochs` and `max_steps` are of one iteration."""

    type: Literal["self_play"] = "self_play"
    """The stage type."""

    iterations: Positive = 3
    """Times of sampling and preferring, each against the model of the one before."""

    temperature: NonNegativeFloat = 0.7
    """Of the opponent's sampling. At T the fixed point is the model whose samples at T match the data (the paper: 1);
    the reference is always at 1."""

    responses_per_prompt: Positive = 4
    """The opponent's answers to each row of data (the paper: 1); each makes a pair."""

    beta: PositiveFloat = 0.1
    """Strength of the tie to the opponent; the paper's lambda (0.1, and 5 in its last iteration). Trained to its
    optimum an iteration multiplies log(p / p_data) by 1 - 1/beta: 1 reaches the data in one iteration, below 1/2 it
    overshoots; 0.1 is stable because few steps at a small rate stay far from the optimum. TRL: `beta`."""

    mix_previous: bool = True
    """From the second iteration on learn the pairs of the iteration before as well, as the paper does."""

    stop_at_margin: PositiveFloat | None = None
    """End an iteration when the logged `rewards/margins` reaches this: a guard against leaving the data behind. None =
    off."""

    summary: ClassVar = "SPIN: prefer the data's answers to the model's own"
    paper: ClassVar = "huggingface.co/papers/2401.01335"
    trainer_class: ClassVar = "trl:DPOTrainer"
    config_class: ClassVar = "trl:DPOConfig"
    default_learning_rate: ClassVar = 5e-7
    slots: ClassVar = frozenset({"model", "lora", "generation", "trl"})
    refused: ClassVar = {"distributed_strategy": ONE_PROCESS}
    columns: ClassVar = (("prompt", "completion"),)
    makes: ClassVar = ("pairs",)
    metric_keys: ClassVar = {"loss": "eval_loss", "accuracy": "eval_rewards/accuracies", "custom": ""}

    def settings(self, stage: "TrainingStage") -> Iterable[Setting]:
        """DPO's sigmoid loss, against the model at the start of the iteration."""
        yield Setting("loss_type", ["sigmoid"], "self_play")
        yield setting(stage, "beta", "beta", self.beta)
        yield from reference_settings(stage)

    def problems(self, stage: "TrainingStage") -> Iterable[Problem]:
        """Answers that are all the same one, and what the method itself says."""
        for key in OWNED:
            if key in stage.trl:
                yield Problem(f"trl.{key}", "self_play's loss is DPO's sigmoid, and its reference is the opponent")
        if self.temperature == 0 and self.responses_per_prompt > 1:
            yield Problem(
                "method.temperature", f"0 gives the same answer {self.responses_per_prompt} times; sample above 0"
            )
        if stage.generation is not None and "temperature" in stage.generation.model_fields_set:
            yield Problem("generation.temperature", "belongs to method.temperature")
        if self.iterations > 1 and stage.generation is not None and is_server(stage.generation.backend):
            yield Problem(
                "generation.backend", "a server goes on serving the first iteration's model; use transformers"
            )
        if self.stop_at_margin is not None and stage.logging_steps == 0:
            yield Problem("method.stop_at_margin", "reads what is logged; set logging_steps above 0")
        if stage.is_evaluation_only:
            yield Problem(
                "is_evaluation_only", "self_play only trains; measure with a stage of type evaluation or dpo"
            )

    def notes(self, stage: "TrainingStage") -> Iterable[str]:
        """How much is written, and where the closed form says that care is due."""
        yield f"{self.responses_per_prompt} answers to every row in each of {self.iterations} iterations"
        if self.beta < 0.5:
            yield (
                f"beta {self.beta:g} is below 1/2: trained to its optimum an iteration multiplies log(p / p_data) by "
                f"{1 - 1 / self.beta:g}; keep learning_rate times steps small"
            )

    def trainings(self) -> int:
        """Once per iteration."""
        return self.iterations

    def rows_made(self, read: int, mixed: Mapping[str, int]) -> tuple[int, Mapping[str, int]]:
        """A pair per sampled answer, and those of the iteration before."""
        pairs = read * self.responses_per_prompt
        return pairs * (2 if self.mix_previous and self.iterations > 1 else 1), {"pairs": pairs}

    def trainer_for(self, stage: "TrainingStage") -> str:
        """TRL's trainer; with full weights the one that reads the reference once and remembers it."""
        return "stagekit.trainers.reference:CachedReferenceDPOTrainer" if precomputes(stage) else "trl:DPOTrainer"

    def trainer_arguments(self, job: "Job") -> dict[str, Any]:
        """Where precomputed log-probabilities are kept."""
        return cache_arguments(job)

    def callbacks(self, job: "Job") -> dict[str, Any]:
        """The guard."""
        if self.stop_at_margin is None:
            return {}
        from stagekit.trainers.self_play_trainer import StopAtMargin

        return {"margin": StopAtMargin(self.stop_at_margin)}

    def step0_loss(self, stage: "TrainingStage") -> float:
        """The player is the opponent: ln 2, in every iteration."""
        return math.log(2)

    def run(self, job: "Job") -> "Outcome":
        """Sample and prefer, iteration by iteration."""
        from stagekit.spin import run

        return run(job, self)
