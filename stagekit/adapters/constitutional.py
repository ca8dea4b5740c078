"""Constitutional AI, the supervised half: answer, critique, revise, then fine-tune on the revisions."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Tag

from stagekit.adapters.base import Method
from stagekit.errors import Problem
from stagekit.groups import Model
from stagekit.options import Options, Positive


if TYPE_CHECKING:
    from stagekit.job import Job
    from stagekit.stage import TrainingStage


class PrinciplePair(Options):
    """A principle as the two requests that apply it."""

    name: str
    """What the principle is called in the journal and the metrics."""

    critique_request: str
    """The user turn that asks for the critique."""

    revision_request: str
    """The user turn that asks for the revision."""


def _principle_kind(value: Any) -> str:
    return "text" if isinstance(value, str) else "pair"


Principle = Annotated[
    Annotated[str, Tag("text")] | Annotated[PrinciplePair, Tag("pair")], Discriminator(_principle_kind)
]
"""A principle as a sentence or as the two requests that apply it."""


class Constitutional(Method):
    """Constitutional AI: the model criticises and revises its own answers, and learns the revisions."""

    type: Literal["constitutional"] = "constitutional"
    """The stage type."""

    principles: tuple[Principle, ...] | None = None
    """What answers are held against: sentences, or pairs of requests. None = stagekit's own set for helpful, harmless
    and honest answers (`stagekit/principles.json`)."""

    critique_model: Model = None
    """Who writes the critiques: a model (path, hub id, package:, stage:). None = the model being trained. The answers
    and the revisions are always the trained model's."""

    rounds: Positive = 2
    """Critique and revision this many times; one principle is drawn for each."""

    target: Literal["all", "final"] = "all"
    """Train on the revisions of all rounds (the paper), or on the last one only."""

    max_critique_tokens: Positive | None = None
    """Tokens of a critique at most. None = `generation.max_new_tokens`."""

    unrevised: tuple[str, ...] = ()
    """Names of sets in `training_data` whose prompts are answered once and not revised: harmless requests, mixed in
    against over-refusal."""

    summary: ClassVar = "Constitutional AI: answer, critique, revise; fine-tune on the revisions"
    paper: ClassVar = "huggingface.co/papers/2212.08073"
    trainer_class: ClassVar = "trl:SFTTrainer"
    config_class: ClassVar = "trl:SFTConfig"
    default_learning_rate: ClassVar = 2e-5
    slots: ClassVar = frozenset({"model", "lora", "generation", "text_metrics", "trl"})
    columns: ClassVar = (("prompt",),)
    makes: ClassVar = ("revisions", "preferences")
    metric_keys: ClassVar = {
        "loss": "eval_loss",
        "accuracy": "eval_mean_token_accuracy",
        "perplexity": "eval_perplexity",
        "custom": "",
    }
    reports: ClassVar = frozenset({"entropy", "aux_loss"})
    perplexity: ClassVar = True
    takes_loss: ClassVar = True

    def problems(self, stage: "TrainingStage") -> Iterable[Problem]:
        """Names in `unrevised` must be sets of the mix; an empty constitution says nothing; texts that nobody learns
        are not written."""
        if stage.is_evaluation_only:
            yield Problem("is_evaluation_only", "constitutional writes texts to learn them; use method: evaluation")
        if self.principles is not None and not self.principles:
            yield Problem(
                "method.principles", "an empty list leaves nothing to criticise; leave it out for the default set"
            )
        names = set(stage.training_data) if isinstance(stage.training_data, Mapping) else set()
        for name in self.unrevised:
            if name not in names:
                have = ", ".join(sorted(names)) or "no names, training_data is one set"
                yield Problem("method.unrevised", f"{name!r} is no set of training_data (it has {have})")
        if names and names <= set(self.unrevised):
            yield Problem("method.unrevised", "names every set of training_data; nothing is left to revise")

    def rows_made(self, read: int, mixed: Mapping[str, int]) -> tuple[int, Mapping[str, int]]:
        """A row per round and revised prompt, and one per unrevised prompt."""
        unrevised = sum(mixed.get(name, 0) for name in self.unrevised)
        revised = read - unrevised
        most = revised * (self.rounds if self.target == "all" else 1) + unrevised
        return most, {"preferences": revised, "revisions": most}

    def prepare(self, job: "Job") -> "Job":
        """Write the dataset: answers, critiques, revisions, journalled text by text."""
        from stagekit.constitution import prepare

        return prepare(job, self)
