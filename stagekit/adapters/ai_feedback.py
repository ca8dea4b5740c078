"""AI feedback (RLAIF labels): a judge says which of two responses is better, and how sure it is."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from stagekit.adapters.base import Method
from stagekit.adapters.judged import comparison_problems, judge_problems
from stagekit.errors import Problem
from stagekit.groups import Judge, is_function
from stagekit.options import Fraction, Positive
from stagekit.stage_options import CallbackOptions, DataOptions, DistributedOptions, Identity, Loop, PrecisionOptions


if TYPE_CHECKING:
    from stagekit.job import Job, Outcome
    from stagekit.stage import TrainingStage


NO_TRAINING = "an ai_feedback stage does not train; put it on the stage that does"


class AIFeedback(Method):
    """RLAIF labels: a judge compares two responses to every prompt by a principle. The responses are sampled from the
    model, or stand in the data. The judge sees the conversation, the principle, and the responses as (A) and (B), and
    the probability that it says A or B next is the label, averaged over both orders. Leaves `preferences` (`prompt`,
    `chosen`, `rejected`, `chosen_prob`, `principle`), for `dpo` with `soft_labels: true`, or for `reward` and then
    `ppo` (RL-CAI; a reward stage learns the order alone), and `labels` (every pair with both orders, dropped ones
    too). The model is passed on unchanged. `validation_data` with `chosen` and `rejected` measure the judge."""

    type: Literal["ai_feedback"] = "ai_feedback"
    """The stage type."""

    judge: Judge = None
    """Who judges: a model (path, hub id, package:, stage:NAME), an OpenAI-compatible server as
    `http://HOST:PORT/v1#MODEL` that gives log-probabilities, or a function `f(prompts, first, second) -> list[float]`
    (how probably the first is better; gets `principles` too where it has such an argument). None = the model
    itself."""

    principles: tuple[str, ...] | None = None
    """Questions that decide between two responses; one is drawn for each pair. None = stagekit's own four for helpful,
    harmless and honest responses (`stagekit/principles.json`)."""

    comparison: str | None = None
    """What the judge is asked: a text with the fields {conversation}, {principle}, {first} and {second}. None =
    stagekit's own (`stagekit/templates.py`)."""

    choices: tuple[str, str] = ("A", "B")
    """What the judge says for the first and for the second response. What both begin with is read as said: of `(A)`
    and `(B)` the letters are compared."""

    responses: tuple[str, str] | None = None
    """Names of two columns of the data that hold the responses. None = two are sampled from the model."""

    truth: str | None = None
    """Name of a column that says which of the given responses is really better: 0 the first, 1 the second, null not
    known. It is measured, never learnt. Responses in columns `chosen` and `rejected` need none."""

    tie_margin: Fraction = 0.02
    """Pairs whose probability is nearer to 1/2 than this are dropped, below 0.5; those at 1/2 always."""

    chain_of_thought: bool = False
    """The judge writes its reasons before it is asked for a choice, as `generation` says. Its probabilities are then
    nearly 0 or 1, so they are clamped."""

    max_thought_tokens: Positive = 256
    """Tokens of the reasons at most; with `chain_of_thought`."""

    clamp: tuple[Fraction, Fraction] = (0.4, 0.6)
    """The least and the most that a probability becomes with `chain_of_thought` (the paper's)."""

    summary: ClassVar = (
        "RLAIF labels: a judge compares two responses to every prompt; leaves soft-labelled preferences"
    )
    paper: ClassVar = "huggingface.co/papers/2212.08073"
    families: ClassVar = frozenset(
        {Identity, DataOptions, Loop, PrecisionOptions, CallbackOptions, DistributedOptions}
    )
    slots: ClassVar = frozenset({"model", "generation"})
    instead: ClassVar = NO_TRAINING
    refused: ClassVar = {
        **dict.fromkeys(
            ("epochs", "max_steps", "batch_size", "gradient_accumulation_steps", "use_gradient_checkpointing",
             "max_gradient_norm", "custom_loss_function", "max_duration", "use_deterministic_algorithms"),
            NO_TRAINING,
        ),
        "is_evaluation_only": "an ai_feedback stage never trains; to measure a model use method: evaluation",
    }  # fmt: skip
    columns: ClassVar = (("prompt",),)
    validation_columns: ClassVar = (("prompt", "chosen", "rejected"),)
    makes: ClassVar = ("preferences", "labels")
    trains: ClassVar = False

    def wanted_columns(self) -> Sequence[Sequence[str]]:
        """The prompt, and the responses where they are given."""
        return (("prompt", *self.responses),) if self.responses is not None else self.columns

    def problems(self, stage: "TrainingStage") -> Iterable[Problem]:
        """Judges that cannot be asked so, and options without an effect."""
        yield from comparison_problems(self.comparison, self.principles, self.choices)
        yield from judge_problems(self.judge, self.chain_of_thought)
        if self.responses is not None and self.responses[0] == self.responses[1]:
            yield Problem("method.responses", f"names the column {self.responses[0]!r} twice")
        if self.responses is not None and isinstance(stage.training_data, Mapping):
            yield Problem("method.responses", "of a mix of sets only the prompts are read; give one set")
        if self.truth is not None and self.responses is None:
            yield Problem("method.truth", "has no effect without method.responses: of sampled ones nothing is known")
        if self.tie_margin >= 0.5:
            yield Problem("method.tie_margin", f"{self.tie_margin:g} drops every pair; it is below 0.5")
        low, high = self.clamp
        if not low < 0.5 < high:
            yield Problem("method.clamp", f"{low:g} and {high:g} must lie below and above 0.5")
        for option in ("max_thought_tokens", "clamp"):
            if option in self.model_fields_set and not self.chain_of_thought:
                yield Problem(f"method.{option}", "has no effect without chain_of_thought: true")
        yield from _precision(stage)
        yield from _generation(stage, self)

    def notes(self, stage: "TrainingStage") -> Iterable[str]:
        """What is written and asked."""
        written = "two responses to every prompt; " if self.responses is None else ""
        yield f"{written}every pair is judged twice, once in each order; nothing is trained"

    def rows_made(self, read: int, mixed: Mapping[str, int]) -> tuple[int, Mapping[str, int]]:
        """At most a preference for every prompt."""
        return 0, {"preferences": read, "labels": read}

    def run(self, job: "Job") -> "Outcome":
        """Sample, judge, write."""
        from stagekit.feedback import run

        return run(job, self)


def _precision(stage: "TrainingStage") -> Iterable[Problem]:
    """Texts are written in float32 or bfloat16."""
    if stage.use_mixed_precision and stage.mixed_precision_dtype not in {"bf16", "none"}:
        dtype = stage.mixed_precision_dtype
        yield Problem("mixed_precision_dtype", f"{dtype!r} has no effect on what is written and judged; use bf16")


def _generation(stage: "TrainingStage", method: AIFeedback) -> Iterable[Problem]:
    """How texts are sampled has no effect where none is; greedy responses are one and the same."""
    generation = stage.generation
    writes = method.responses is None or method.chain_of_thought
    if generation is None:
        return
    if method.responses is None and generation.temperature == 0 and not is_function(generation.backend):
        yield Problem("generation.temperature", "0 gives the same response twice; sample above 0")
    unused = generation.model_fields_set - {"batch_tokens", "backend"} if not writes else set()
    if method.responses is not None:
        unused |= generation.model_fields_set & {"max_new_tokens", *(("backend",) if method.judge is not None else ())}
    for option in sorted(unused):
        yield Problem(f"generation.{option}", "has no effect: the responses are given (method.responses)")
