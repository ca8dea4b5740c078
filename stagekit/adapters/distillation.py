"""Distillation: on the labels' tokens (a trainer of our own), on the teacher's texts, or on the student's own samples
(TRL's DistillationTrainer)."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from stagekit.adapters.base import Method, Setting, setting
from stagekit.errors import Interrupted, Problem, StageError
from stagekit.groups import Generation, Model
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
_ONLY = {
    **dict.fromkeys(("alpha", "hidden_states", *_OF_HIDDEN_STATES, "teacher_cache"), ("logits",)),
    **dict.fromkeys(("temperature", "divergence", "mixture"), ("logits", "on_policy")),
}
"""Options that not every mode has -> the modes that have them."""

_TEXTS = (("messages",), ("prompt", "completion"), ("text",), ("conversations",), ("input_ids",))
_SFT_METRICS = {"loss": "eval_loss", "accuracy": "eval_mean_token_accuracy", "custom": ""}


class _ByMode:
    """A fact of the stage type that depends on its mode; of the class itself, that of the default mode."""

    def __init__(self, *, logits: Any, sequence: Any, on_policy: Any) -> None:
        self._of = {"logits": logits, "sequence": sequence, "on_policy": on_policy}

    def __get__(self, method: Any, owner: type) -> Any:
        return self._of["logits" if method is None else method.mode]


class TeacherCache(Options):
    """Keep on disk what the teacher says of the data: it is asked once, for all epochs and for later runs."""

    top_k: Positive = 64
    """How many tokens of its distribution are kept, and the mass of all others; 64 take at most 452 bytes a token."""

    folder: str | None = None
    """Where. None = the cache folder (`$STAGEKIT_CACHE`, `$XDG_CACHE_HOME/stagekit` or `~/.cache/stagekit`)."""


class InitStudent(Options):
    """Make the student of the teacher's own blocks, embeddings and head."""

    layers: Positive
    """How many blocks, spread evenly over the teacher's, the first and the last among them."""


class Distillation(Method):
    """Distillation: learn a teacher's distribution, and its hidden states if asked, beside the labels of the data:
    alpha * (T^2 * soft + w * hidden) + (1 - alpha) * hard. Alpha 0 is sft, bit for bit."""

    type: Literal["distillation"] = "distillation"
    """The stage type."""

    teacher: Model = None
    """Who is learnt from: a path, a hub id, GGUF, `stage:NAME`, or a live model. It must have the student's tokenizer;
    in mode sequence any will do."""

    mode: Literal["logits", "sequence", "on_policy"] = "logits"
    """logits: the teacher's distribution at every token of the data. sequence: the teacher answers the prompts, the
    student learns its answers; any tokenizer. on_policy: the student answers the prompts, the teacher's distribution
    at its tokens is learnt (TRL's DistillationTrainer, without labels)."""

    temperature: Annotated[float, Field(gt=0.0, le=100.0)] = 2.0
    """Divides the logits of both, so that unlikely tokens count more; 1 to 4 is usual. The soft term is multiplied by
    its square, so that alpha keeps its meaning. In mode on_policy it is the sampling's too, without the square, and 1
    unless it is set. TRL: `temperature`."""

    alpha: Fraction = 0.5
    """Weight of what the teacher says (soft targets and hidden states); the labels of the data have the rest."""

    divergence: Literal["forward_kl", "reverse_kl", "jsd", "skewed_kl"] | None = None
    """How distributions are compared: forward_kl covers all that the teacher does, reverse_kl keeps to what it does
    most; jsd and skewed_kl measure against a mixture of both. None = forward_kl; in mode on_policy reverse_kl, and
    skewed_kl is not there."""

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

    init_student: InitStudent | None = None
    """Start from some of the teacher's blocks instead of the model that came in. None = from that model."""

    summary: ClassVar = "learn a teacher's distribution, its hidden states or its texts, beside the labels"
    paper: ClassVar = "huggingface.co/papers/1503.02531"
    trainer_class: ClassVar = _ByMode(
        logits="stagekit.trainers.distillation:DistillationTrainer",
        sequence="trl:SFTTrainer",
        on_policy="stagekit.trainers.distillation_samples:OnPolicyDistillationTrainer",
    )
    config_class: ClassVar = _ByMode(
        logits="stagekit.trainers.distillation:DistillationConfig",
        sequence="trl:SFTConfig",
        on_policy="trl:DistillationConfig",
    )
    default_learning_rate: ClassVar = _ByMode(logits=2e-5, sequence=2e-5, on_policy=1e-6)
    slots: ClassVar = frozenset({"model", "lora", "generation", "trl"})
    columns: ClassVar = _ByMode(logits=_TEXTS, sequence=(("prompt",),), on_policy=(("prompt",),))
    makes: ClassVar = _ByMode(logits=(), sequence=("answers",), on_policy=())
    metric_keys: ClassVar = _ByMode(
        logits=_SFT_METRICS,
        sequence={**_SFT_METRICS, "perplexity": "eval_perplexity"},
        on_policy={"loss": "eval_loss", "custom": ""},
    )
    perplexity: ClassVar = _ByMode(logits=False, sequence=True, on_policy=False)

    def settings(self, stage: "TrainingStage") -> Iterable[Setting]:
        """The parts of the loss, as the mode's trainer names them."""
        return {"logits": self._of_logits, "sequence": lambda _: (), "on_policy": self._of_samples}[self.mode](stage)

    def _of_logits(self, stage: "TrainingStage") -> Iterable[Setting]:
        for option, target in _TARGETS.items():
            value = "forward_kl" if (option, self.divergence) == ("divergence", None) else getattr(self, option)
            yield setting(stage, option, target, dict(value) if isinstance(value, Mapping) else value)
        if self.teacher_cache is not None:
            yield setting(stage, "teacher_cache", "teacher_cache", _cache_folder(self.teacher_cache))
            yield setting(stage, "teacher_cache", "cache_top_k", self.teacher_cache.top_k)

    def _of_samples(self, stage: "TrainingStage") -> Iterable[Setting]:
        """TRL's beta is the share of the teacher in the mixture: 0 is forward KL, 1 is reverse KL."""
        beta = {"forward_kl": 0.0, "jsd": 0.5 if self.mixture is None else self.mixture}
        yield setting(stage, "divergence", "beta", beta.get(self.divergence or "", 1.0))
        given = "temperature" in self.model_fields_set
        yield setting(stage, "temperature", "temperature", self.temperature if given else 1.0)
        yield Setting("shuffle_dataset", stage.shuffle_data, f"{stage.path}.shuffle_data")
        generation = stage.generation or Generation()
        for option, target in (("max_new_tokens", "max_completion_length"), ("top_p", "top_p"), ("top_k", "top_k")):
            yield Setting(target, getattr(generation, option), f"{stage.path}.generation.{option}")

    def problems(self, stage: "TrainingStage") -> Iterable[Problem]:
        """A teacher that is missing; options that the mode, or another option, switches off."""
        if self.teacher is None:
            yield Problem("method.teacher", "missing; say which model to learn from: a path, a hub id, stage:NAME")
        for option, modes in _ONLY.items():
            if option in self.model_fields_set and self.mode not in modes:
                yield Problem(
                    f"method.{option}", f"has no effect in mode {self.mode!r}; it is of {' and '.join(modes)}"
                )
        yield from {
            "logits": self._problems_of_logits,
            "sequence": self._problems_of_texts,
            "on_policy": self._problems_of_samples,
        }[self.mode](stage)
        if self.mixture is not None and self.divergence not in _MIXED:
            yield Problem("method.mixture", f"has no effect on this divergence; it is of {' and '.join(_MIXED)}")
        if self.init_student is not None and stage.model is not None:
            yield Problem("model", "has no effect with method.init_student, which makes the student of the teacher")
        if self.init_student is not None and stage.is_evaluation_only:
            yield Problem("method.init_student", "makes a student, but is_evaluation_only: true trains none")

    def _problems_of_logits(self, stage: "TrainingStage") -> Iterable[Problem]:
        if stage.generation is not None:
            yield Problem(
                "generation", "has no effect in mode 'logits', which writes no text; use sequence or on_policy"
            )
        for option, target in _TARGETS.items():
            if target in stage.trl:
                yield Problem(f"trl.{target}", f"belongs to method.{option}")
        for option in _OF_HIDDEN_STATES:
            if not self.hidden_states and option in self.model_fields_set and getattr(self, option) != {}:
                yield Problem(f"method.{option}", "has no effect without method.hidden_states: true")
        if self.teacher_cache is not None and self.hidden_states:
            yield Problem("method.teacher_cache", "keeps no hidden states; leave it out, or hidden_states")
        if stage.trl.get("loss_type", "nll") != "nll" and self.alpha > 0:
            yield Problem("trl.loss_type", f"{stage.trl['loss_type']!r} is no likelihood of the labels; leave it out")

    def _problems_of_texts(self, stage: "TrainingStage") -> Iterable[Problem]:
        if stage.is_evaluation_only:
            yield Problem("method.mode", "'sequence' writes texts to train on; evaluate with mode: logits")

    def _problems_of_samples(self, stage: "TrainingStage") -> Iterable[Problem]:
        given = stage.generation.model_fields_set if stage.generation is not None else set()
        reasons = {
            "temperature": "has no effect: method.temperature is that of the sampling",
            "batch_tokens": "has no effect in mode 'on_policy', which samples batch_size prompts at a time",
            "backend": "has no effect in mode 'on_policy', where the student writes itself",
        }
        for option in sorted(given & reasons.keys()):
            yield Problem(f"generation.{option}", reasons[option])
        if self.divergence == "skewed_kl":
            yield Problem("method.divergence", "'skewed_kl' is not in mode 'on_policy'; use jsd with a mixture")
        if stage.data_shuffle_seed is not None:
            yield Problem("data_shuffle_seed", "has no effect in mode 'on_policy'; random_seed decides the order")
        for target in ("beta", "temperature", "top_p", "top_k", "max_completion_length", "shuffle_dataset"):
            if target in stage.trl:
                yield Problem(f"trl.{target}", "belongs to method.divergence, method.temperature or generation")

    def notes(self, stage: "TrainingStage") -> Iterable[str]:
        """A weight at which the teacher, or the data, says nothing."""
        if self.mode == "logits" and self.alpha == 0:
            yield "alpha 0 is sft: the teacher is never loaded"
        if self.mode == "logits" and self.alpha == 1:
            yield "alpha 1: the labels only say which tokens count; what they are has no effect"
        if self.init_student is not None:
            yield f"the student starts as {self.init_student.layers} of the teacher's blocks, not as the model before"

    def prepare(self, job: "Job") -> "Job":
        """Make the student, and the teacher's texts, where these are asked for."""
        if self.init_student is not None:
            job = self._with_student(job, self.init_student.layers)
        if self.mode != "sequence":
            return job
        from stagekit.distillation_texts import prepare

        return prepare(job, self._teacher(job), self._quantization(job))

    def _with_student(self, job: "Job", layers: int) -> "Job":
        import dataclasses

        from stagekit import ranks
        from stagekit.job import ModelInput
        from stagekit.models import load_tokenizer
        from stagekit.trainers.distillation_student import save_student

        folder = job.folder / "student"
        teacher = self._teacher(job)
        ranks.once(lambda: save_student(teacher, layers, folder))
        path = str(folder.resolve())
        return dataclasses.replace(job, model=ModelInput(path), tokenizer=load_tokenizer(path, job.chat_template))

    def trainer_arguments(self, job: "Job") -> dict[str, Any]:
        """The teacher: by name, or in memory for TRL's trainer, which quantises none."""
        if self.mode == "sequence":
            return {}
        teacher, quantization = self._teacher(job), self._quantization(job)
        if self.mode == "logits":
            return {
                "teacher_model": teacher,
                "teacher_quantization_config": quantization,
                "on_asked": _progress(job),
            }
        from stagekit.models import device_map, load_policy
        from stagekit.trainers.distillation_checks import shared_vocabulary

        shared_vocabulary(job.tokenizer, teacher, None)
        if isinstance(teacher, str):
            teacher = load_policy(teacher, dtype="auto", quantization=quantization, device_map=device_map())
        return {"teacher_model": teacher}

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
