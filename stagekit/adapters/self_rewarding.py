"""Self-rewarding: iterations in which the model judges its own answers and learns to prefer the best to the worst."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from stagekit.adapters.judged import comparison_problems, judge_problems
from stagekit.adapters.own_pairs import OwnPairs
from stagekit.errors import Problem
from stagekit.groups import Generation, Judge, is_function
from stagekit.options import NonNegativeFloat, Positive, PositiveFloat
from stagekit.templates import SCORING_FIELDS, wrong_with


if TYPE_CHECKING:
    from stagekit.job import Job, Outcome
    from stagekit.stage import TrainingStage


_OF_SCORES = ("judgements", "max_score", "scoring", "max_judgement_tokens")
_OF_COMPARISONS = ("principles", "comparison", "choices")


class SelfRewarding(OwnPairs):
    """Self-rewarding language models: in each iteration the model as it stands answers every prompt several times,
    judges its answers itself, and learns by DPO to prefer the best to the worst, with itself at the start of the
    iteration as the reference. Leaves `preferences` (the pairs of the last iteration, with scores) and `scored` (every
    answer). `validation_data` with `chosen` and `rejected` measure the judge before each iteration (`judge/accuracy`),
    and the policy while it trains. `epochs` and `max_steps` are of one iteration."""

    type: Literal["self_rewarding"] = "self_rewarding"
    """The stage type."""

    iterations: Positive = 2
    """Times of answering, judging and preferring, each with the model of the one before."""

    n: Positive = 4
    """Answers to every prompt, at least 2."""

    judge_by: Literal["score", "comparison"] = "score"
    """score: the judge writes a score for each answer, `judgements` times. comparison: it compares each two answers to
    a prompt in both orders, and an answer's score is the mean probability that it beats another one."""

    judgements: Positive = 3
    """Times that an answer is scored; the mean counts. With `judge_by: score`; sampled as `generation` says."""

    max_score: Positive = 5
    """The highest score; the lowest is 0. With `judge_by: score`."""

    scoring: str | None = None
    """What the judge is asked: a text with the fields {conversation}, {response} and, where wanted, {max_score}. The
    last "Score: x" of its reply counts, or the number that is all of it. None = stagekit's own
    (`stagekit/templates.py`). With `judge_by: score`."""

    max_judgement_tokens: Positive = 256
    """Tokens of a judgement at most. With `judge_by: score`."""

    principles: tuple[str, ...] | None = None
    """Questions that decide between two answers; one is drawn for each pair. None = stagekit's own four. With
    `judge_by: comparison`."""

    comparison: str | None = None
    """What the judge is asked: a text with the fields {conversation}, {principle}, {first} and {second}. None =
    stagekit's own. With `judge_by: comparison`."""

    choices: tuple[str, str] = ("A", "B")
    """What the judge says for the first and for the second answer. With `judge_by: comparison`."""

    judge: Judge = None
    """Who judges instead of the model: a model, a server, or (with `judge_by: comparison`) a function
    `f(prompts, first, second) -> list[float]`; the same in every iteration. None = the model itself, the method."""

    tie_margin: NonNegativeFloat | None = None
    """A prompt makes a pair where the scores of its best and its worst answer differ by more than this. None = 0 for
    scores, 0.02 for comparisons."""

    beta: PositiveFloat = 0.1
    """Strength of the tie to the model at the start of the iteration. TRL: `beta`."""

    stop_at_margin: PositiveFloat | None = None
    """End an iteration when the logged `rewards/margins` reaches this: a guard against learning the judge's mistakes
    by heart. None = off."""

    summary: ClassVar = "the model judges its own answers and learns to prefer the best to the worst, in iterations"
    paper: ClassVar = "huggingface.co/papers/2401.10020"
    default_learning_rate: ClassVar = 1e-6
    columns: ClassVar = (("prompt",),)
    validation_columns: ClassVar = (("prompt", "chosen", "rejected"),)
    makes: ClassVar = ("preferences", "scored")

    @property
    def margin(self) -> float:
        """The tie margin that counts."""
        if self.tie_margin is not None:
            return self.tie_margin
        return 0.0 if self.judge_by == "score" else 0.02

    def problems(self, stage: "TrainingStage") -> Iterable[Problem]:
        """Answers that cannot be told apart, judges that cannot be asked so, and options of the other way to judge."""
        yield from super().problems(stage)
        if self.n < 2:
            yield Problem("method.n", "1 answer has no worse one; sample at least 2")
        generation = stage.generation or Generation()
        if generation.temperature == 0 and not is_function(generation.backend):
            yield Problem("generation.temperature", f"0 gives the same answer {self.n} times; sample above 0")
        unused = _OF_COMPARISONS if self.judge_by == "score" else _OF_SCORES
        other = "comparison" if self.judge_by == "score" else "score"
        for option in unused:
            if option in self.model_fields_set:
                yield Problem(f"method.{option}", f"has no effect without judge_by: {other}")
        if self.judge_by == "comparison":
            yield from comparison_problems(self.comparison, self.principles, self.choices)
            if self.margin >= 1:
                yield Problem("method.tie_margin", f"{self.margin:g} drops every pair of probabilities; below 1")
            return
        yield from judge_problems(self.judge, writes=True)
        if self.scoring is not None and (wrong := wrong_with(self.scoring, SCORING_FIELDS, ("response",))):
            yield Problem("method.scoring", wrong)
        if self.margin >= self.max_score:
            yield Problem("method.tie_margin", f"{self.margin:g} drops every pair; it is below max_score")

    def notes(self, stage: "TrainingStage") -> Iterable[str]:
        """How much is written and judged."""
        pairs = self.n * (self.n - 1) // 2
        judged = f"judged {self.judgements} times" if self.judge_by == "score" else f"compared in {pairs} pairs"
        yield f"{self.n} answers to every prompt, {judged}, in each of {self.iterations} iterations"

    def rows_made(self, read: int, mixed: Mapping[str, int]) -> tuple[int, Mapping[str, int]]:
        """At most a pair for every prompt."""
        return read, {"preferences": read, "scored": read}

    def run(self, job: "Job") -> "Outcome":
        """Answer, judge and prefer, iteration by iteration."""
        from stagekit.self_rewarding import run

        return run(job, self)
