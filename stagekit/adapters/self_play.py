"""Self-play (SPIN): iterations of sampling the model's own answers and preferring the data's to them."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from stagekit.adapters.own_pairs import OwnPairs
from stagekit.errors import Problem
from stagekit.options import NonNegativeFloat, Positive, PositiveFloat


if TYPE_CHECKING:
    from stagekit.job import Job, Outcome
    from stagekit.stage import TrainingStage


class SelfPlay(OwnPairs):
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
    default_learning_rate: ClassVar = 5e-7
    columns: ClassVar = (("prompt", "completion"),)
    makes: ClassVar = ("pairs",)
    whose: ClassVar = "the opponent"

    def problems(self, stage: "TrainingStage") -> Iterable[Problem]:
        """Answers that are all the same one, and what the method itself says."""
        yield from super().problems(stage)
        if self.temperature == 0 and self.responses_per_prompt > 1:
            yield Problem(
                "method.temperature", f"0 gives the same answer {self.responses_per_prompt} times; sample above 0"
            )
        if stage.generation is not None and "temperature" in stage.generation.model_fields_set:
            yield Problem("generation.temperature", "belongs to method.temperature")

    def notes(self, stage: "TrainingStage") -> Iterable[str]:
        """How much is written, and where the closed form says that care is due."""
        yield f"{self.responses_per_prompt} answers to every row in each of {self.iterations} iterations"
        if self.beta < 0.5:
            yield (
                f"beta {self.beta:g} is below 1/2: trained to its optimum an iteration multiplies log(p / p_data) by "
                f"{1 - 1 / self.beta:g}; keep learning_rate times steps small"
            )

    def rows_made(self, read: int, mixed: Mapping[str, int]) -> tuple[int, Mapping[str, int]]:
        """A pair per sampled answer, and those of the iteration before."""
        pairs = read * self.responses_per_prompt
        return pairs * (2 if self.mix_previous and self.iterations > 1 else 1), {"pairs": pairs}

    def run(self, job: "Job") -> "Outcome":
        """Sample and prefer, iteration by iteration."""
        from stagekit.spin import run

        return run(job, self)
