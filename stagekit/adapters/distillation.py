"""Distillation: a trainer of our own, since TRL distils on the student's own samples only and has no hard labels."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from stagekit.adapters.base import Method, Setting, setting
from stagekit.errors import Interrupted, Problem, StageError
from stagekit.groups import Model
from stagekit.options import Fraction, NonNegativeFloat, Options, Positive


if TYPE_CHECKING:
    from stagekit.job import Job
    from stagekit.stage import TrainingStage


_TARGETS = {
    "alpha": "alpha",
    "temperature": "temperature",
    "divergence": "divergence",
    "mixture": "mixture",
    "hidden_states": "match_hidden_states",
    "hidden_loss": "hidden_loss",
    "hidden_weight": "hidden_weight",
    "layer_map": "layer_map",
}
"""Option of the method -> argument of the trainer's config."""

_OF_HIDDEN_STATES = ("hidden_loss", "hidden_weight", "layer_map")
_MIXED = ("jsd", "skewed_kl")


class TeacherCache(Options):
    """Keep on disk what the teacher says of the data: it is asked once, for all epochs and for later runs."""

    top_k: Positive = 64
    """How many tokens of its distribution are kept, and the mass of all others; 64 take at most 452 bytes a token."""

    folder: str | None = None
    """Where. None = the cache folder (`$STAGEKIT_CACHE`, `$XDG_CACHE_HOME/stagekit` or `~/.cache/stagekit`)."""


class Distillation(Method):
    """Distillation: learn a teacher's distribution, and its hidden states if asked, beside the labels of the data:
    alpha * (T^2 * soft + w * hidden) + (1 - alpha) * hard. Alpha 0 is sft, bit for bit."""

    type: Literal["distillation"] = "distillation"
    """The stage type."""

    teacher: Model = None
    """Who is learnt from: a path, a hub id, GGUF, `stage:NAME`, or a live model. It needs the student's tokenizer."""

    temperature: Annotated[float, Field(gt=0.0, le=100.0)] = 2.0
    """Divides the logits of both, so that unlikely tokens count more; 1 to 4 is usual. The soft term is multiplied by
    its square, so that alpha keeps its meaning."""

    alpha: Fraction = 0.5
    """Weight of what the teacher says (soft targets and hidden states); the labels of the data have the rest."""

    divergence: Literal["forward_kl", "reverse_kl", "jsd", "skewed_kl"] = "forward_kl"
    """How distributions are compared: forward_kl covers all that the teacher does, reverse_kl keeps to what it does
    most; jsd and skewed_kl measure against a mixture of both."""

    mixture: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Share of the teacher in the mixture. None = 0.5 for jsd, 0.1 for skewed_kl."""

    hidden_states: bool = False
    """Also pull hidden states of the student towards the teacher's. Where the widths differ, a projection per pair of
    blocks is trained and thrown away."""

    hidden_loss: Literal["rms_mse", "mse", "cosine"] = "rms_mse"
    """The distance of hidden states: rms_mse divides each by its root mean square first; mse is dominated by the few
    tokens with the largest norms."""

    hidden_weight: NonNegativeFloat = 1.0
    """Weight of the hidden states beside the soft targets, inside alpha."""

    layer_map: Mapping[int, int] = {}
    """Teacher block -> student block, from 0; negative ones count from the last. Empty = spread evenly, last to
    last."""

    teacher_bits: Literal[4, 8] | None = None
    """Load the teacher in 4 (nf4) or 8 bits; needs bitsandbytes. None = in the dtype it was saved in."""

    teacher_cache: TeacherCache | None = None
    """Keep what the teacher says on disk, softened by `temperature`, for runs of the same teacher, data and
    temperature. None = ask it at every step. `{}` = as it is by default. Not with `hidden_states`."""

    summary: ClassVar = "learn a teacher's distribution, and its hidden states, beside the labels"
    paper: ClassVar = "huggingface.co/papers/1503.02531"
    trainer_class: ClassVar = "stagekit.trainers.distillation:DistillationTrainer"
    config_class: ClassVar = "stagekit.trainers.distillation:DistillationConfig"
    default_learning_rate: ClassVar = 2e-5
    columns: ClassVar = (("messages",), ("prompt", "completion"), ("text",), ("conversations",), ("input_ids",))
    metric_keys: ClassVar = {"loss": "eval_loss", "accuracy": "eval_mean_token_accuracy", "custom": ""}

    def settings(self, stage: "TrainingStage") -> Iterable[Setting]:
        """The parts of the loss."""
        for option, target in _TARGETS.items():
            value = getattr(self, option)
            yield setting(stage, option, target, dict(value) if isinstance(value, Mapping) else value)
        if self.teacher_cache is not None:
            yield setting(stage, "teacher_cache", "teacher_cache", _cache_folder(self.teacher_cache))
            yield setting(stage, "teacher_cache", "cache_top_k", self.teacher_cache.top_k)

    def problems(self, stage: "TrainingStage") -> Iterable[Problem]:
        """A teacher that is missing; options that the others switch off."""
        if self.teacher is None:
            yield Problem("method.teacher", "missing; say which model to learn from: a path, a hub id, stage:NAME")
        for option, target in _TARGETS.items():
            if target in stage.trl:
                yield Problem(f"trl.{target}", f"belongs to method.{option}")
        if self.mixture is not None and self.divergence not in _MIXED:
            yield Problem("method.mixture", f"has no effect on {self.divergence!r}; it is of {' and '.join(_MIXED)}")
        for option in _OF_HIDDEN_STATES:
            if not self.hidden_states and option in self.model_fields_set and getattr(self, option) != {}:
                yield Problem(f"method.{option}", "has no effect without method.hidden_states: true")
        if self.teacher_cache is not None and self.hidden_states:
            yield Problem("method.teacher_cache", "keeps no hidden states; leave it out, or hidden_states")
        coefficient = stage.trl.get("loss_type", "nll")
        if coefficient != "nll" and self.alpha > 0:
            yield Problem("trl.loss_type", f"{coefficient!r} is no likelihood of the labels; distillation needs 'nll'")

    def notes(self, stage: "TrainingStage") -> Iterable[str]:
        """A weight at which the teacher, or the data, says nothing."""
        if self.alpha == 0:
            yield "alpha 0 is sft: the teacher is never loaded"
        if self.alpha == 1:
            yield "alpha 1: the labels only say which tokens count; what they are has no effect"

    def trainer_arguments(self, job: "Job") -> dict[str, Any]:
        """The teacher, by name; in few bits where that was asked."""
        return {
            "teacher_model": self._teacher(job),
            "teacher_quantization_config": self._quantization(job),
            "on_asked": _progress(job),
        }

    def _teacher(self, job: "Job") -> Any:
        """The teacher's folder or hub id, or the live model.

        Raises:
            StageError: an earlier stage left none.
        """
        name = self.teacher
        if not isinstance(name, str):
            return name
        if name.startswith("stage:"):
            policy = job.results[name.removeprefix("stage:")].policy
            if policy is None:
                raise StageError(f"stage {job.stage.name!r}: method.teacher {name!r} left no model")
            return policy
        from stagekit.models import local_model

        return local_model(name, where=f"{job.stage.path}.method.teacher")

    def _quantization(self, job: "Job") -> Any:
        if self.teacher_bits is None:
            return None
        import torch

        from stagekit.models import bnb_config

        return bnb_config(self.teacher_bits, torch.bfloat16 if job.setting("bf16") else torch.float32)


def _cache_folder(cache: TeacherCache) -> str:
    if cache.folder is not None:
        return str(Path(cache.folder).expanduser())
    from stagekit.convert import cache_folder

    return str(cache_folder() / "teacher")


def _progress(job: "Job") -> Callable[[int, int], None]:
    """Shows how far the teacher has been asked, where it has to be; lets the user stop in between."""
    bars: dict[int, Any] = {}

    def asked(done: int, rows: int) -> None:
        if job.stop():
            raise Interrupted(f"stage {job.stage.name!r} stopped while the teacher was asked")
        if rows not in bars:
            bars[rows] = job.show.progress("teacher", rows, "row", "rows")
        bars[rows].update(done)

    return asked
