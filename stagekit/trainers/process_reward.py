"""A trainer for process reward models: one of two labels at the end of every step of an answer.

B batch, T tokens, K kinds of a step (0 incorrect, 1 correct).
"""

import copy
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from datasets import Dataset, Features, List, Value
from transformers import (
    AutoModelForTokenClassification,
    AutoTokenizer,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from stagekit.errors import ConfigError, StageError
from stagekit.reading import context_length, padded_logits, reading, token_batches
from stagekit.reward_models import BESIDE_ADAPTER, silent_report


logger = logging.getLogger(__name__)

IGNORED = -100
LABELS = {0: "incorrect", 1: "correct"}
HEADS = ("score.", "classifier.")
"""Names under which transformers keeps the head of a classifier."""

_FEATURES = Features({"input_ids": List(Value("int64")), "labels": List(Value("int64")), "lost_steps": Value("int64")})


@dataclass
class ProcessRewardConfig(TrainingArguments):  # type: ignore[misc]
    """`TrainingArguments`, and how steps are laid out. Other defaults than there: `learning_rate`, `logging_steps`."""

    _VALID_DICT_FIELDS: ClassVar = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs"]

    learning_rate: float = field(default=1e-5, metadata={"help": "The initial learning rate of the optimizer."})
    logging_steps: float = field(default=10, metadata={"help": "Log every so many steps; below 1, a share of all."})
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "For from_pretrained, where the model is a name. dtype is float32 unless set."}
    )
    max_length: int | None = field(
        default=1024, metadata={"help": "Most tokens of prompt and steps; the end is cut off. None: no limit."}
    )
    step_separator: str = field(
        default="\n", metadata={"help": "Follows every step; its last token carries the step's label."}
    )
    train_on_last_step_only: bool = field(
        default=False, metadata={"help": "Learn the label of the last step only. Evaluation measures all steps."}
    )
    disable_dropout: bool = field(default=True, metadata={"help": "Whether to train without dropout."})
    dataset_num_proc: int | None = field(default=None, metadata={"help": "Processes that tokenize the data."})


class ProcessRewardTrainer(Trainer):  # type: ignore[misc]
    """Token classification where only the last token of each step has a label.

    The loss is the mean cross-entropy over the steps of all batches that one update accumulates, on all processes.
    An evaluation gives `eval_loss`, `eval_accuracy` and `eval_majority_baseline`, the accuracy of always naming the
    commoner label of that data set; all three are over steps.

    Args:
        model: a name (any causal model, or a process reward model to go on with), a live
            `AutoModelForTokenClassification` with two labels, or a PeftModel of one.
        train_dataset: rows with `prompt` (a text, or a conversation that ends with the user's turn), `completions`
            (a list of steps) and `labels` (a bool for each step); or with `input_ids` and `labels`. The first step
            follows the prompt's text directly, so a text should end in what separates them.
        eval_dataset: the same, or a mapping of names to such.
        processing_class: the tokenizer; None: the one beside the model.
        quantization_config: for a model given by name.
        peft_config: a `LoraConfig` with task type TOKEN_CLS.

    Attributes:
        truncated: by data set (`train`, `eval` or its name), how many rows lost steps to `max_length`.
        dropped: by data set, how many rows were left out because no labelled step fits in `max_length`.

    Raises:
        ConfigError: a row, a model or an argument that cannot work.
        StageError: no row is left, or the weights do not fit.

    Source: huggingface.co/papers/2211.14275 and 2305.20050; tokens and loss are those of PRMTrainer, trl@v1.12.0
    trl/experimental/prm/prm_trainer.py, except that rows without a label are left out (there: a loss of NaN) and
    that accumulated batches are not summed.
    """

    loss_is_scaled_for_ga = True  # compute_loss divides by the steps of all accumulated batches
    truncated: dict[str, int]
    dropped: dict[str, int]

    def __init__(
        self,
        model: Any,
        args: ProcessRewardConfig,
        train_dataset: Dataset,
        eval_dataset: Dataset | Mapping[str, Dataset] | None = None,
        processing_class: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
    ) -> None:
        """Load what is given by name, lay out the rows, and build the `Trainer`."""
        if args.label_smoothing_factor:
            raise ConfigError("label_smoothing_factor has no effect on step labels; leave it out")
        if processing_class is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            processing_class = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        if processing_class.pad_token is None:
            processing_class.pad_token = processing_class.eos_token
        set_seed(args.seed)  # the head, and an adapter, start at random
        if isinstance(model, str):
            model = _classifier(model, args, quantization_config)
        _check_model(model)
        model = _prepared(model, args, peft_config)
        model.config.pad_token_id = processing_class.pad_token_id
        model.config.step_separator = args.step_separator
        self.truncated, self.dropped = {}, {}
        self._per_row: list[torch.Tensor] | None = None
        self._layout: dict[str, Any] = {
            "tokenizer": processing_class,
            "step_separator": args.step_separator,
            "max_length": args.max_length,
        }
        super().__init__(
            model=model,
            args=args,
            data_collator=RightPadding(processing_class.pad_token_id),
            train_dataset=self._rows(train_dataset, args, "train", args.train_on_last_step_only),
            eval_dataset=self._eval_rows(eval_dataset, args),
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        if args.n_gpu > 1:
            raise ConfigError(
                "several GPUs are visible to one process; start it with torchrun or accelerate launch, or set "
                "CUDA_VISIBLE_DEVICES to one of them"
            )
        self.model_accepts_loss_kwargs = True  # so that the Trainer counts the steps of all accumulated batches

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The mean cross-entropy over the steps of everything that one update accumulates."""
        labels = inputs["labels"]
        outputs = model(**{name: value for name, value in inputs.items() if name != "labels"})
        logits = outputs.logits.float()  # (B, T, K)
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
        ).view_as(labels)
        counted = labels != IGNORED
        if self._per_row is not None:
            right = (logits.argmax(-1) == labels) & counted
            each = (losses.double(), counted, right, labels == 1)
            sums = torch.stack([values.sum(1).double() for values in each], dim=1)
            self._per_row.append(self.accelerator.gather_for_metrics(sums).cpu())
        if num_items_in_batch is None:
            loss = losses.sum() / counted.sum().clamp(min=1)
        else:
            loss = losses.sum() / num_items_in_batch
            if self.args.average_tokens_across_devices and self.model.training:
                loss = loss * self.accelerator.num_processes  # gradients are averaged over the processes
        return (loss, outputs) if return_outputs else loss

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Loss, accuracy and the majority's accuracy over all steps: a mean of batches would weigh them unequally."""
        self._per_row = []
        try:
            output = super().evaluation_loop(*args, **kwargs)
            rows = torch.cat(self._per_row)
        finally:
            self._per_row = None
        loss, steps, right, correct = (float(value) for value in rows.sum(0))
        prefix = kwargs.get("metric_key_prefix", "eval")
        output.metrics[f"{prefix}_loss"] = loss / steps
        output.metrics[f"{prefix}_accuracy"] = right / steps
        output.metrics[f"{prefix}_majority_baseline"] = max(correct, steps - correct) / steps
        return output

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Measure rows of the kind that the trainer was built with."""
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = self._eval_rows(eval_dataset, self.args)
        return cast(dict[str, float], super().evaluate(eval_dataset, *args, **kwargs))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model and the tokenizer; beside an adapter, also what its base's config does not say."""
        super().save_model(output_dir, _internal_call)
        if hasattr(self.model, "peft_config") and self.args.should_save:
            # No config.json: with one there, transformers takes the folder for a full model.
            beside = {"id2label": LABELS, "step_separator": self.args.step_separator}
            path = Path(output_dir or self.args.output_dir, BESIDE_ADAPTER)
            path.write_text(json.dumps(beside) + "\n", encoding="utf-8")

    def _eval_rows(self, dataset: Any, args: ProcessRewardConfig) -> Any:
        if isinstance(dataset, Mapping):
            return {name: self._rows(rows, args, name) for name, rows in dataset.items()}
        return None if dataset is None else self._rows(dataset, args, "eval")

    def _rows(self, dataset: Any, args: ProcessRewardConfig, name: str, last_step_only: bool = False) -> Dataset:
        """Rows with `input_ids` and `labels`; what `max_length` took is counted."""
        if not isinstance(dataset, Dataset):
            raise ConfigError(
                f"the {name} data is a {type(dataset).__name__}; process reward needs a datasets.Dataset"
            )
        if {"input_ids", "labels"} <= set(dataset.column_names):
            return dataset
        missing = [column for column in ("prompt", "completions", "labels") if column not in dataset.column_names]
        if missing:
            raise ConfigError(
                f"process reward needs the columns prompt, completions, labels; the {name} data has "
                f"{', '.join(dataset.column_names) or 'none'}"
            )
        with args.main_process_first(desc=f"tokenizing {name}"):
            laid_out = dataset.map(
                _laid_out,
                with_indices=True,
                fn_kwargs={**self._layout, "last_step_only": last_step_only},
                remove_columns=dataset.column_names,
                num_proc=args.dataset_num_proc,
                features=_FEATURES,  # otherwise the labels would be made bools again
                desc=f"Tokenizing {name} dataset",
            )
            kept = laid_out.filter(_has_label, num_proc=args.dataset_num_proc, desc=f"Filtering {name} dataset")
        self.truncated[name] = sum(lost > 0 for lost in laid_out["lost_steps"])
        self.dropped[name] = len(laid_out) - len(kept)
        if not len(kept):
            raise StageError(
                f"no labelled step of {len(laid_out)} {name} rows fits in max_length ({args.max_length}); raise it"
            )
        if self.truncated[name]:
            logger.info(
                "%s: %d of %d rows lost steps to max_length %s, %d of them all labelled steps",
                name, self.truncated[name], len(laid_out), args.max_length, self.dropped[name],
            )  # fmt: skip
        return kept.remove_columns("lost_steps")


@dataclass(frozen=True)
class RightPadding:
    """Collates rows of `input_ids` and `labels` of different lengths into (B, T), padded at the end."""

    pad_token_id: int

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Pad ids with the padding token, labels with -100, the mask with 0."""
        ids = [torch.as_tensor(row["input_ids"]) for row in rows]
        labels = [torch.as_tensor(row["labels"]) for row in rows]
        pad = torch.nn.utils.rnn.pad_sequence
        return {
            "input_ids": pad(ids, batch_first=True, padding_value=self.pad_token_id),
            "attention_mask": pad([torch.ones_like(row) for row in ids], batch_first=True, padding_value=0),
            "labels": pad(labels, batch_first=True, padding_value=IGNORED),
        }


def step_ids(
    tokenizer: Any, prompt: str | Sequence[Mapping[str, Any]], steps: Sequence[str], step_separator: str = "\n"
) -> tuple[list[int], list[int]]:
    """The tokens of a prompt and its steps, and the position of each step's last token.

    A prompt that is a conversation goes through the chat template with a generation prompt. There is one BOS token
    at the start if the tokenizer has any.
    """
    separator = tokenizer.encode(step_separator, add_special_tokens=False)
    if not separator:
        raise ConfigError(f"step_separator is {step_separator!r}, which gives no token to put a step's label on")
    if isinstance(prompt, str):
        ids = list(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    else:
        laid_out = tokenizer.apply_chat_template(
            list(prompt), tokenize=True, add_generation_prompt=True, return_dict=True
        )
        ids = list(laid_out["input_ids"])
    bos = tokenizer.bos_token_id
    if bos is not None and ids[:1] != [bos]:
        ids.insert(0, bos)
    ends = []
    for step in steps:
        ids += [*tokenizer(step, add_special_tokens=False)["input_ids"], *separator]
        ends.append(len(ids) - 1)
    return ids, ends


def score_steps(
    model: Any,
    tokenizer: Any,
    prompt: str | Sequence[Mapping[str, Any]],
    steps: Sequence[str],
    step_separator: str | None = None,
) -> list[float]:
    """How likely each step is correct, given the prompt and the steps before it.

    Args:
        model: a process reward model; its mode is left as it was.
        tokenizer: the one it was trained with.
        prompt: a text or a conversation, as in training.
        steps: the answer, step by step, without separators.
        step_separator: None: the one that the model was trained with (`config.step_separator`), or a newline.

    Raises:
        StageError: the steps are longer than the model's context.
    """
    separator = step_separator if step_separator is not None else getattr(model.config, "step_separator", "\n")
    [chances] = chances_of_steps(model, tokenizer, [prompt], [steps], separator)
    if chances is None:
        tokens = len(step_ids(tokenizer, prompt, steps, separator)[0])
        raise StageError(
            f"prompt and steps have {tokens} tokens, more than the model's context of {context_length(model)}"
        )
    return chances


def chances_of_steps(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str | Sequence[Mapping[str, Any]]],
    answers: Sequence[Sequence[str]],
    step_separator: str,
    batch_tokens: int = 16384,
) -> list[list[float] | None]:
    """`score_steps` of many answers, in length-sorted batches of so many padded tokens; None for one that is longer
    than the model's context.

    Raises:
        StageError: the model gives something that is no finite number.
    """
    laid_out = [step_ids(tokenizer, *pair, step_separator) for pair in zip(prompts, answers, strict=True)]
    rows, context = [ids for ids, _ in laid_out], context_length(model)
    fitting = [index for index, row in enumerate(rows) if context is None or len(row) <= context]
    found: list[list[float] | None] = [None] * len(rows)
    pad = tokenizer.pad_token_id or 0  # masked, and on the right, where no step looks
    with reading(model):
        for batch in token_batches(fitting, rows, batch_tokens):
            logits = padded_logits(model, [rows[index] for index in batch], pad)  # (B, T, 2)
            for row, index in enumerate(batch):
                chances = logits[row, laid_out[index][1]].float().softmax(-1)[:, 1].tolist()
                if not all(map(math.isfinite, chances)):
                    raise StageError(f"the reward model scores the steps of answer {index} with {chances}")
                found[index] = chances
    return found


def _laid_out(
    row: Mapping[str, Any], index: int, tokenizer: Any, step_separator: str, max_length: int | None,
    last_step_only: bool,
) -> dict[str, Any]:  # fmt: skip
    """One row as `input_ids`, `labels` and the number of labelled steps that were cut off."""
    steps, kinds = row["completions"], row["labels"]
    if not steps or len(steps) != len(kinds):
        raise ConfigError(
            f"row {index} has {len(steps)} completions and {len(kinds)} labels; every step needs one label"
        )
    strange = [kind for kind in kinds if kind not in (0, 1)]
    if strange:
        raise ConfigError(f"row {index} has the label {strange[0]!r}; a step is true (correct) or false")
    ids, ends = step_ids(tokenizer, row["prompt"], steps, step_separator)
    labels = [IGNORED] * len(ids)
    labelled = list(zip(ends, kinds, strict=True))[-1 if last_step_only else 0 :]
    for end, kind in labelled:
        labels[end] = int(kind)
    cut = len(ids) if max_length is None else max_length
    lost = sum(end >= cut for end, _ in labelled)
    return {"input_ids": ids[:cut], "labels": labels[:cut], "lost_steps": lost}


def _has_label(row: Mapping[str, Any]) -> bool:
    return any(label != IGNORED for label in row["labels"])


def _classifier(name: str, args: ProcessRewardConfig, quantization_config: Any) -> Any:
    """The model with a head of two labels, which starts at random where the model has none yet."""
    kwargs = {"dtype": "float32", **cast(dict[str, Any], args.model_init_kwargs or {})}
    if quantization_config is not None:
        kwargs["quantization_config"] = _sparing_head(quantization_config)
    if args.world_size == 1 and args.device.type == "cuda":
        kwargs.setdefault("device_map", "auto")
    load: Callable[..., Any] = AutoModelForTokenClassification.from_pretrained
    with silent_report():
        model, info = load(
            name,
            num_labels=len(LABELS),
            id2label=LABELS,
            label2id={label: kind for kind, label in LABELS.items()},
            output_loading_info=True,
            **kwargs,
        )
    missing = [key for key in info["missing_keys"] if not key.startswith(HEADS)]
    if missing:
        raise StageError(f"{name} lacks {len(missing)} weights of {type(model).__name__}, among them {missing[0]}")
    return model


def _sparing_head(quantization_config: Any) -> Any:
    """bitsandbytes would quantise the head of a token classifier, which is new and trained."""
    if not hasattr(quantization_config, "llm_int8_skip_modules"):
        return quantization_config
    sparing = copy.copy(quantization_config)
    skipped = quantization_config.llm_int8_skip_modules or []
    sparing.llm_int8_skip_modules = [*skipped, *(head.rstrip(".") for head in HEADS)]
    return sparing


def _check_model(model: Any) -> None:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    kind = type(base).__name__
    if "ForTokenClassification" not in kind or base.config.num_labels != len(LABELS):
        raise ConfigError(
            f"the model is a {kind} with {base.config.num_labels} labels; a process reward model is an "
            "AutoModelForTokenClassification with num_labels=2. Give the model's name to have it made of a causal one"
        )


def _prepared(model: Any, args: ProcessRewardConfig, peft_config: Any) -> Any:
    """The model with its adapter, if any, and without dropout."""
    if peft_config is not None:
        from peft import get_peft_model

        if hasattr(model, "peft_config"):
            raise ConfigError("the model has an adapter and peft_config would add one; merge it, or drop peft_config")
        if peft_config.task_type != "TOKEN_CLS":
            raise ConfigError(
                f"peft_config has task_type {peft_config.task_type!r}, which leaves the head untrained; use TOKEN_CLS"
            )
        model = get_peft_model(model, peft_config)
    if hasattr(model, "peft_config") and args.activation_checkpointing:
        model.enable_input_require_grads()  # huggingface/transformers#42489
    if args.disable_dropout:
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    return model
