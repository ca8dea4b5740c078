"""Knowledge distillation into a student on fixed data: soft targets, hidden states, hard labels.

alpha * (T^2 * soft + w * hidden) + (1 - alpha) * hard, where hard is TRL's SFT loss; all three are sums over the
tokens that predict a label, divided by their number in everything that one update accumulates.

Legend: N tokens of a batch that predict a label, V vocabulary, H hidden width.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from stagekit.distillation_losses import (
    bucketed,
    divergence,
    hidden_state_loss,
    layer_pairs,
    soften,
)
from stagekit.errors import ConfigError, StageError
from stagekit.fingerprints import model_fingerprint, weights_fingerprint
from stagekit.trainers.distillation_cache import COLUMN, KeptTargets, Targets, WithRows, by_row, top_k
from stagekit.trainers.distillation_checks import check_config, check_rows, shared_vocabulary
from stagekit.trainers.distillation_head import (
    Lesson,
    Soft,
    add_distilling_head,
    at_places,
    base_of,
    check_head,
    head_of,
    predicting,
)


PROJECTIONS = "projections.safetensors"
"""Where a checkpoint keeps what makes hidden states of the student as wide as the teacher's."""

_INPUTS = (
    "input_ids", "attention_mask", "position_ids",
    "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx",
)  # fmt: skip
"""What of a batch the teacher is given: all but the labels, so that packed rows are told apart as for the student."""


@dataclass
class DistillationConfig(SFTConfig):  # type: ignore[misc]
    """`SFTConfig`, and what is learnt from the teacher."""

    _VALID_DICT_FIELDS: ClassVar = [*SFTConfig._VALID_DICT_FIELDS, "teacher_model_init_kwargs", "layer_map"]

    alpha: float = field(default=0.5, metadata={"help": "Weight of the teacher, 0..1; the labels have the rest."})
    temperature: float = field(default=2.0, metadata={"help": "T: divides both models' logits; at most 100."})
    divergence: str = field(
        default="forward_kl", metadata={"help": "Of the distributions: forward_kl, reverse_kl, jsd, skewed_kl."}
    )
    mixture: float | None = field(
        default=None, metadata={"help": "Share of the teacher in the mixture of jsd (None: 0.5), skewed_kl (0.1)."}
    )
    match_hidden_states: bool = field(default=False, metadata={"help": "Whether to match hidden states too."})
    hidden_loss: str = field(default="rms_mse", metadata={"help": "Of hidden states: rms_mse, mse or cosine."})
    hidden_weight: float = field(default=1.0, metadata={"help": "w: weight of the hidden states beside T^2 * soft."})
    layer_map: dict[int, int] | str | None = field(
        default=None, metadata={"help": "Teacher block -> student block, from 0. None or empty: spread evenly."}
    )
    chunk_tokens: int = field(default=256, metadata={"help": "Tokens whose logits are in memory at a time."})
    teacher_model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "For from_pretrained, where the teacher is a name. dtype is auto unless set."}
    )
    teacher_cache: str | None = field(
        default=None, metadata={"help": "Folder to keep in what the teacher says of the data. None: ask it each time."}
    )
    cache_top_k: int = field(
        default=64, metadata={"help": "Tokens of its distribution that are kept, and the mass of the others."}
    )


class DistillationTrainer(SFTTrainer):  # type: ignore[misc]
    """`SFTTrainer` whose student also learns from a teacher's distribution and, if asked, from its hidden states.

        args = DistillationConfig("out", alpha=0.7, temperature=2.0, match_hidden_states=True)
        DistillationTrainer("student", args, teacher_model="teacher", train_dataset=data).train()

    With `alpha=0` it is `SFTTrainer`, bit for bit, and the teacher is not even loaded. The teacher runs without
    gradients in its own dtype, sees the tokens of the batch as the student does, and is neither in the optimiser nor
    saved. Where the vocabularies are padded to different sizes, both are cut to the tokenizer's.

    With `teacher_cache` the teacher is asked once about each data set; what it says (the softened probabilities of the
    K likeliest tokens and the mass of the others) is kept on disk and shared by epochs and runs of the same teacher,
    data and temperature. The divergence is then one of K+1 classes, at most the full one.

    Where the widths differ, each pair of blocks has a projection (student -> teacher, linear, orthogonal at first).
    The projections are in the optimiser and in checkpoints (`projections.safetensors`), never in the saved student,
    and are not part of the gradient's norm.

    Beside TRL's numbers, `soft_loss` (with T^2), `hidden_loss` and `hard_loss` are logged, means over the tokens.

    Args:
        model: The student, as for `SFTTrainer`.
        args: The config.
        teacher_model: A name or a live model.
        teacher_processing_class: The teacher's tokenizer; None: the one beside the teacher.
        teacher_quantization_config: For a teacher given by name.
        on_asked: Called with the rows done and their number while a `teacher_cache` is written.
        arguments: Everything else that `SFTTrainer` takes but `compute_loss_func`.

    Raises:
        ConfigError: an argument that cannot be, another tokenizer, or an architecture whose head is not a plain one.

    Source: huggingface.co/papers/1503.02531, huggingface.co/papers/1909.10351 (hidden states).
    """

    _tag_names: ClassVar = ["trl", "distillation"]

    def __init__(
        self,
        model: Any,
        args: DistillationConfig,
        *,
        teacher_model: Any,
        teacher_processing_class: Any = None,
        teacher_quantization_config: Any = None,
        on_asked: Callable[[int, int], None] | None = None,
        **arguments: Any,
    ) -> None:
        check_config(args, arguments.get("compute_loss_func"))
        self.teacher: Any = None
        self.layer_pairs: list[tuple[int, int]] = []
        self.projections = torch.nn.ModuleDict()
        if teacher_model is None and args.alpha > 0:
            raise ConfigError("teacher_model: missing; give a path, a hub id, or a live model")
        self._named = (teacher_model, teacher_processing_class)
        self._quantization = teacher_quantization_config
        self._on_asked = on_asked
        super().__init__(model=model, args=args, **arguments)
        if args.alpha == 0:
            return
        if self.aux_loss_enabled:
            raise ConfigError("router_aux_loss_coef: a student with experts is distilled without it; set it to 0.0")
        add_distilling_head(base_of(self.model))
        check_head(self.model, "student")
        self._vocabulary = shared_vocabulary(self.processing_class, *self._named)
        check_rows(self.model, "student", self._vocabulary)
        if args.teacher_cache is None:
            self._load_teacher()
        else:
            self._use_cache()

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mixture of the three losses."""
        if self.args.alpha == 0:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        rows = inputs.pop(COLUMN, None)
        lesson = self._lesson(inputs) if rows is None else self._kept_lesson(rows, inputs["labels"])
        student = _Taught(model, lesson)
        result = super().compute_loss(student, inputs, return_outputs, num_items_in_batch)
        out = student.output
        tokens = out.label_mask.sum()
        shared = tokens.clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            shared = shared / self.accelerator.num_processes  # gradients are averaged over the processes
        self._log_parts(tokens, self.args.temperature**2 * out.soft.sum(), out.hidden, -out.log_probs.sum())
        summed = out.objective
        if out.hidden is not None:
            summed = summed + self.args.alpha * self.args.hidden_weight * out.hidden.to(summed.device)
        loss = summed / shared
        return (loss, result[1]) if return_outputs else loss

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """That of the student, and in it the projections. The trainer zeroes the student's gradients only."""
        optimizer = super().create_optimizer(*args, **kwargs)
        if len(self.projections):
            parameters = list(self.projections.parameters())
            known = {id(one) for group in optimizer.param_groups for one in group["params"]}
            if id(parameters[0]) not in known:
                optimizer.add_param_group({"params": parameters, "weight_decay": self.args.weight_decay})
                optimizer.register_step_post_hook(lambda *_: self.projections.zero_grad())
        return optimizer

    def _log_parts(self, tokens: torch.Tensor, soft: Any, hidden: Any, hard: Any) -> None:
        metrics = self._metrics["train" if self.model.training else "eval"]
        count = self.accelerator.gather_for_metrics(tokens).sum().clamp(min=1)
        for name, value in (("soft_loss", soft), ("hidden_loss", hidden), ("hard_loss", hard)):
            if value is not None:
                metrics[name].append((self.accelerator.gather_for_metrics(value.detach()).sum() / count).item())

    def _lesson(self, inputs: Mapping[str, Any]) -> Lesson:
        """The teacher's part of a batch: its hidden states now, its logits chunk by chunk when they are needed."""
        if self.teacher is None:  # it had a cache of other data, and is asked about these now
            self._load_teacher()
        last, states = self._teacher_states(inputs)

        def ask(rows: slice) -> Soft:
            said = self._teacher_product(last[rows])
            return lambda logits, block: self._soft(logits, Targets(None, self._softened(said[block])))

        return self._lesson_of(ask, partial(self._hidden, states) if self.layer_pairs else None)

    def _lesson_of(self, ask: Callable[[slice], Soft], hidden: Callable[..., torch.Tensor] | None) -> Lesson:
        alpha, temperature = self.args.alpha, self.args.temperature
        layers = tuple(student for _, student in self.layer_pairs)
        return Lesson(ask, alpha * temperature**2, 1 - alpha, hidden, layers, self.args.chunk_tokens)

    def _kept_lesson(self, rows: torch.Tensor, labels: torch.Tensor) -> Lesson:
        """The teacher's part of a batch as it was kept."""
        targets = self._kept.read(rows.tolist())
        tokens = int((labels[:, 1:] != -100).sum())
        if len(targets.logps) != tokens:
            raise StageError(f"teacher_cache: holds {len(targets.logps)} tokens of a batch of {tokens}; delete it")

        def ask(rows: slice) -> Soft:
            said = targets.at(rows, labels.device)
            return lambda logits, block: self._soft(logits, said.at(block, logits.device))

        return self._lesson_of(ask, None)

    @torch.no_grad()
    def _teacher_states(self, inputs: Mapping[str, Any]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The teacher's last hidden states, and those of its mapped blocks, at the N tokens: (N, H) each."""
        places = predicting(inputs["labels"])
        given = {name: inputs[name] for name in _INPUTS if name in inputs}
        with _without_autocast(places.device):
            out = base_of(self.teacher).base_model(
                **given, use_cache=False, output_hidden_states=bool(self.layer_pairs)
            )
        states = [out.last_hidden_state, *(out.hidden_states[layer + 1] for layer, _ in self.layer_pairs)]
        last, *mapped = (at_places(state, places) for state in states)
        return last, mapped

    @torch.no_grad()
    def _teacher_product(self, last: torch.Tensor) -> torch.Tensor:
        """(n, V) product of the teacher's head with its last hidden states (n, H)."""
        with _without_autocast(last.device):
            return head_of(base_of(self.teacher)).product(last)

    @torch.no_grad()
    def _softened(self, product: torch.Tensor) -> torch.Tensor:
        """(n, V) log-probabilities of the teacher, softened."""
        logits = head_of(base_of(self.teacher)).finished(product)
        return soften(logits[:, : self._vocabulary], self.args.temperature)

    def _soft(self, logits: torch.Tensor, targets: Targets) -> torch.Tensor:
        """(n,) divergences of the student's logits (n, V) from what the teacher says."""
        student = soften(logits[:, : self._vocabulary], self.args.temperature)
        if targets.ids is not None:
            student = bucketed(student, targets.ids)
        theirs = targets.logps.to(student.device)
        return divergence(student, theirs, self.args.divergence, self.args.mixture)

    def _hidden(self, theirs: list[torch.Tensor], ours: list[torch.Tensor]) -> torch.Tensor:
        """The mean over the pairs of the distances, each summed over the tokens."""
        found = []
        for (teacher, student), target, state in zip(self.layer_pairs, theirs, ours, strict=True):
            key = f"{teacher}-{student}"
            if key in self.projections:
                state = self.projections[key](state.float())
            found.append(hidden_state_loss(state, target.to(state.device), self.args.hidden_loss).sum())
        return torch.stack(found).mean()

    def _load_teacher(self) -> None:
        """The teacher in memory, ready to be asked, and what its hidden states need."""
        teacher, _ = self._named
        if isinstance(teacher, str):
            kwargs = {"dtype": "auto", "trust_remote_code": False, "use_safetensors": True}
            if self._quantization is not None:
                kwargs["quantization_config"] = self._quantization
            if self.args.world_size == 1 and self.args.device.type == "cuda":
                kwargs["device_map"] = "auto"  # over all GPUs
            kwargs.update(self.args.teacher_model_init_kwargs or {})
            with torch.random.fork_rng():  # so that the student's dropout does not depend on how the teacher came
                load: Callable[..., Any] = AutoModelForCausalLM.from_pretrained
                teacher = load(teacher, **kwargs)
        if base_of(teacher) is base_of(self.model):
            raise ConfigError("teacher_model: is the student itself; give another model, or the student's name")
        if not hasattr(teacher, "hf_device_map") and not hasattr(teacher, "quantization_method"):
            teacher.to(self.accelerator.device)
        self.teacher = teacher.eval().requires_grad_(False)
        check_head(teacher, "teacher")
        check_rows(teacher, "teacher", self._vocabulary)
        if self.args.match_hidden_states:
            self._pair_layers()

    def _pair_layers(self) -> None:
        theirs, ours = (base_of(one).config.get_text_config() for one in (self.teacher, self.model))
        given = {int(key): int(value) for key, value in (self.args.layer_map or {}).items()}
        self.layer_pairs = layer_pairs(given, theirs.num_hidden_layers, ours.num_hidden_layers)
        if theirs.hidden_size == ours.hidden_size:
            return
        if self.accelerator.num_processes > 1:
            raise ConfigError(
                f"match_hidden_states: the student is {ours.hidden_size} wide and the teacher {theirs.hidden_size}; "
                "the projections between them are trained in one process only"
            )
        generator = torch.Generator().manual_seed(self.args.seed)
        for teacher, student in self.layer_pairs:
            layer = torch.nn.Linear(ours.hidden_size, theirs.hidden_size, bias=False, device="meta").to_empty(
                device="cpu"
            )
            torch.nn.init.orthogonal_(layer.weight, generator=generator)
            self.projections[f"{teacher}-{student}"] = layer.to(self.accelerator.device)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if len(self.projections) and self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}")
            save_file({name: one.detach().cpu() for name, one in self.projections.state_dict().items()},
                      folder / PROJECTIONS)  # fmt: skip

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if len(self.projections):
            file = Path(resume_from_checkpoint, PROJECTIONS)
            if not file.is_file():
                raise StageError(f"{file} is missing; start again, or resume from a checkpoint that has it")
            self.projections.load_state_dict(load_file(file))

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if COLUMN not in self._signature_columns:
            self._signature_columns.append(COLUMN)

    def _use_cache(self) -> None:
        """Read what the teacher says of the data from disk; ask it first where that was never done. Then it is not
        needed any more."""
        self._kept = KeptTargets(Path(self.args.teacher_cache), self._cache_settings(), self._ask, self._vocabulary)
        trainer: Any = self
        trainer.data_collator = WithRows(trainer.data_collator)
        with self.args.main_process_first(desc="asking the teacher"):
            trainer.train_dataset = self._kept.add(trainer.train_dataset, "train")
            if isinstance(trainer.eval_dataset, Mapping):
                trainer.eval_dataset = {name: self._kept.add(one, name) for name, one in trainer.eval_dataset.items()}
            elif trainer.eval_dataset is not None:
                trainer.eval_dataset = self._kept.add(trainer.eval_dataset, "eval")
        self.teacher = None

    def _cache_settings(self) -> dict[str, Any]:
        """What the teacher's answers depend on beside the data; the size of the batch changes their last bits only."""
        teacher = self._named[0]
        return {
            "teacher": model_fingerprint(teacher) if isinstance(teacher, str) else weights_fingerprint(teacher),
            "loaded": f"{self.args.teacher_model_init_kwargs} {self._quantization}",
            "temperature": self.args.temperature,
            "top_k": self.args.cache_top_k,
            "vocabulary": self._vocabulary,
            "versions": {name: version(name) for name in ("torch", "transformers")},
        }

    def _ask(self, dataset: Dataset) -> Iterator[Targets]:
        """What the teacher says of every row, in their order."""
        if self.teacher is None:
            self._load_teacher()
        size = self.args.per_device_train_batch_size
        for start in range(0, len(dataset), size):
            rows = [dataset[row] for row in range(start, min(start + size, len(dataset)))]
            inputs = self._prepare_inputs(self.data_collator(rows))
            last, _ = self._teacher_states(inputs)
            chunks = torch.split(last, self.args.chunk_tokens)
            said = (self._softened(self._teacher_product(chunk)) for chunk in chunks)
            kept = [top_k(one, self.args.cache_top_k) for one in said]
            ids = [one.ids for one in kept if one.ids is not None]
            found = Targets(torch.cat(ids) if ids else None, torch.cat([one.logps for one in kept]))
            yield from by_row(found, rows, inputs["labels"])
            if self._on_asked is not None:
                self._on_asked(start + len(rows), len(dataset))


class _Taught:
    """A model that is handed the lesson whenever TRL's loss runs its fused head; `output` is what it gave."""

    def __init__(self, model: Any, lesson: Lesson) -> None:
        self._model, self._lesson = model, lesson
        self.output: Any = None

    def __call__(self, **inputs: Any) -> Any:
        if not inputs.get("fused_lm_head"):
            return self._model(**inputs)
        self.output = self._model(**inputs, lesson=self._lesson)
        return self.output


def _without_autocast(device: torch.device) -> Any:
    return torch.autocast(device.type, enabled=False) if torch.is_autocast_enabled(device.type) else nullcontext()
