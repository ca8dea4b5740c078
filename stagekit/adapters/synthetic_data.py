"""Synthetic data: a teacher writes instructions from seeds or topics, and answers them; what is new is kept."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from stagekit.adapters.base import Method
from stagekit.errors import Problem
from stagekit.groups import Generation, Model, Rewards, is_function, is_server
from stagekit.options import Count, Positive
from stagekit.reward_options import reward_problems
from stagekit.stage_options import CallbackOptions, DataOptions, DistributedOptions, Identity, Loop


if TYPE_CHECKING:
    from stagekit.job import Job, Outcome
    from stagekit.stage import TrainingStage


NO_TRAINING = "a synthetic_data stage trains nothing; put it on the stage that learns stage:NAME/rows"


class SyntheticData(Method):
    """A teacher writes new instructions from seeds (`training_data`, rows with `prompt`) or from topics, and answers
    them (Self-Instruct). Copies and near copies are dropped, and what is cut, too short, too long or not worth enough,
    each with its count. Leaves two datasets: `rows` (`prompt`, `completion`, `seeds`), for an sft stage, and
    `instructions` (every request with what became of it). Nothing is trained; the model is passed on unchanged."""

    type: Literal["synthetic_data"] = "synthetic_data"
    """The stage type."""

    teacher: Model = None
    """Who writes: a path, a hub id, GGUF, `stage:NAME`, or a live model; in the dtype that it was saved in. None = the
    model that the stage starts from. A server is named as `generation.backend` instead."""

    instructions: Positive = 1000
    """Instructions asked for, one a request; what is kept of them is less."""

    examples: Count = 8
    """Seeds that a request shows, drawn anew for each; all where there are fewer. 0 = none (topics alone)."""

    topics: tuple[str, ...] = ()
    """Each request names one of these, in turn. Needed where there are no seeds."""

    request: str | None = None
    """What the teacher is asked, with `{examples}` (the seeds, in lines as `example_line` says) and `{topic}` where
    they go. None = to write one new instruction of the same kind, and nothing else."""

    example_line: str = "{number}. {example}"
    """How a seed is written where the request shows it, one below the other; `{number}` counts from 1."""

    max_instruction_tokens: Positive | None = None
    """Tokens of an instruction at most; one that is cut is dropped. None = `generation.max_new_tokens`."""

    similarity: Annotated[float, Field(gt=0.0, le=1.0)] | None = 0.7
    """Drop an instruction whose n-grams of words are those of a seed, or of one kept before it, to at least this share
    (Jaccard). None = drop exact copies only."""

    ngram: Positive = 5
    """Words in such an n-gram; an instruction with fewer is compared as a whole."""

    min_words: Count = 3
    """Words of an instruction at least, as white space separates them: set 1 for languages written without."""

    max_words: Positive | None = 150
    """Words of an instruction at most. None = any number."""

    min_answer_words: Count = 1
    """Words of an answer at least."""

    max_answer_words: Positive | None = None
    """Words of an answer at most. None = any number; `generation.max_new_tokens` bounds them anyway."""

    reward: Rewards = None
    """What scores the answers, as in rejection_sampling: a function, a verifier, a reward model, or a list with
    weights. None for an answer drops it. None = no reward."""

    min_reward: float | None = None
    """Keep only answers with a reward strictly above this. None = rewards are noted in `rows` and drop nothing."""

    summary: ClassVar = "a teacher writes instructions and answers; what is good and new becomes a dataset"
    paper: ClassVar = "huggingface.co/papers/2212.10560"
    families: ClassVar = frozenset({Identity, DataOptions, Loop, CallbackOptions, DistributedOptions})
    slots: ClassVar = frozenset({"model", "generation"})
    instead: ClassVar = NO_TRAINING
    refused: ClassVar = {
        **dict.fromkeys(
            ("epochs", "max_steps", "batch_size", "gradient_accumulation_steps", "use_gradient_checkpointing",
             "max_gradient_norm", "custom_loss_function", "max_duration", "is_evaluation_only",
             "use_deterministic_algorithms", "validation_data"),
            NO_TRAINING,
        ),
    }  # fmt: skip
    columns: ClassVar = (("prompt",),)
    makes: ClassVar = ("rows", "instructions")
    trains: ClassVar = False
    needs_data: ClassVar = False

    def problems(self, stage: "TrainingStage") -> Iterable[Problem]:
        """Nothing to write from, options that another one switches off, bounds that leave nothing."""
        yield from self._sources(stage)
        yield from reward_problems(self.reward or ())
        if self.reward is None and self.min_reward is not None:
            yield Problem("method.min_reward", "has no effect without method.reward")
        if self.similarity is None and "ngram" in self.model_fields_set:
            yield Problem("method.ngram", "has no effect with method.similarity: null")
        for least, most in (("min_words", "max_words"), ("min_answer_words", "max_answer_words")):
            top = getattr(self, most)
            if top is not None and getattr(self, least) > top:
                yield Problem(f"method.{most}", f"{top} is below {least}, {getattr(self, least)}: nothing is between")
        generation = stage.generation or Generation()
        if self.teacher is not None and (is_server(generation.backend) or is_function(generation.backend)):
            yield Problem("method.teacher", "has no effect: generation.backend writes; keep one of them")
        shows = stage.training_data is not None and self.examples > 0
        if generation.temperature == 0 and not shows and self.instructions > len(self.topics) > 0:
            same = f"0 writes the same instruction for a topic each time, and {len(self.topics)} topics are asked for"
            yield Problem("generation.temperature", f"{same} {self.instructions} instructions; sample above 0")

    def _sources(self, stage: "TrainingStage") -> Iterable[Problem]:
        seeded = stage.training_data is not None
        if not seeded and not self.topics:
            yield Problem("training_data", "missing; give seeds (rows with prompt), or method.topics to write about")
        if not seeded and "examples" in self.model_fields_set and self.examples > 0:
            yield Problem("method.examples", "has no effect without training_data, which has the seeds")
        if seeded and self.examples == 0 and not self.topics:
            yield Problem("method.examples", "0 shows no seed, so that every request is the same; give method.topics")
        shown = seeded and self.examples > 0
        if "{example}" not in self.example_line:
            yield Problem("method.example_line", "has no {example}, so no seed is shown")
        if not shown and "example_line" in self.model_fields_set:
            yield Problem("method.example_line", "has no effect where no seeds are shown")
        for part, used, option in (
            ("{examples}", shown, "method.examples"),
            ("{topic}", self.topics, "method.topics"),
        ):
            if self.request is not None and used and part not in self.request:
                yield Problem("method.request", f"has no {part}, so {option} has no effect; say where it goes")
            if self.request is not None and not used and part in self.request:
                yield Problem("method.request", f"has {part}, which nothing fills")

    def notes(self, stage: "TrainingStage") -> Iterable[str]:
        """How much is written, and by whom."""
        backend = (stage.generation or Generation()).backend
        who = "the model of the stage" if self.teacher is None else "the teacher"
        who = "generation.backend" if is_server(backend) or is_function(backend) else who
        yield f"{self.instructions} instructions are asked of {who}, and those that are new are answered"

    def rows_made(self, read: int, mixed: Mapping[str, int]) -> tuple[int, Mapping[str, int]]:
        """At most one row for every instruction asked for, however many seeds are read."""
        return read, {"rows": self.instructions, "instructions": self.instructions}

    def run(self, job: "Job") -> "Outcome":
        """Write, choose, answer, score."""
        from stagekit.synthesis import run

        return run(job, self)
