"""Reward models that are trained: loaded, merged, asked for scores, and checked after they were saved.

An outcome reward model is a sequence classifier with one label (TRL's RewardTrainer), a process reward model a token
classifier with two (`stagekit.trainers.process_reward`). B batch, T tokens.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification
from transformers.utils import logging as transformers_logging

from stagekit.errors import ConfigError, StageError
from stagekit.files import whole_folder
from stagekit.merging import ROUNDING_TOLERANCE, fixed_logits
from stagekit.models import adapter_base, load_tokenizer
from stagekit.reading import context_length, padded_logits, reading, token_batches
from stagekit.rows import json_object


SAME_SCORE = 1e-4
"""Largest difference between a reward model's scores before and after it was saved in float32, relative to the largest
score (at least 1)."""

BESIDE_ADAPTER = "process_reward.json"
"""File beside the adapter of a process reward model: `id2label` and `step_separator`, as in a full model's config."""

Task = Literal["SEQ_CLS", "TOKEN_CLS"]
Text = str | Sequence[Mapping[str, Any]]
"""A text, or a conversation of messages with `role` and `content`."""

_CLASSES: Mapping[Task, tuple[Any, int]] = {
    "SEQ_CLS": (AutoModelForSequenceClassification, 1),
    "TOKEN_CLS": (AutoModelForTokenClassification, 2),
}
_HEADS = ("score", "classifier")


class RewardModel(NamedTuple):
    """A reward model and the tokenizer, with the chat template, that it was trained with."""

    model: Any
    tokenizer: Any


class HeldOut(NamedTuple):
    """How well a reward model orders pairs that it has not seen."""

    accuracy: float
    """Share of pairs whose chosen answer scores higher; a tie is none."""
    pairs: int
    """How many pairs were compared."""
    too_long: int
    """How many were left out because an answer exceeds the context."""
    mean_margin: float
    """Mean difference of the two scores."""


def load_reward_model(path: str, *, dtype: torch.dtype = torch.float32, device_map: Any = None) -> RewardModel:
    """An outcome reward model in evaluation mode: the full one in a folder or on the hub, or an adapter, merged.

    Args:
        path: Model folder, adapter folder or hub id.
        dtype: Dtype of the weights. In bfloat16 a score depends on the batch that it is computed in.
        device_map: As in transformers; None leaves the model on the CPU.

    Raises:
        StageError: it cannot be loaded, has no trained head, or more than one label.
    """
    return _load(path, "SEQ_CLS", dtype, device_map)


def load_process_reward_model(path: str, *, dtype: torch.dtype = torch.float32, device_map: Any = None) -> RewardModel:
    """A process reward model in evaluation mode, in the same way; `score_steps` asks it.

    Raises:
        StageError: it cannot be loaded, has no trained head, or not two labels.
    """
    return _load(path, "TOKEN_CLS", dtype, device_map)


def reward_ids(tokenizer: Any, prompt: Text | None, completion: Text) -> list[int]:
    """The tokens of a prompt with its answer, as RewardTrainer lays them out.

    Conversations go through the chat template. Texts are joined and end with EOS; one BOS stands in front where the
    tokenizer puts it there. Where one of the two is a conversation, a text is a turn of it: of the user the prompt,
    of the assistant the answer.
    """
    if isinstance(completion, str) and (prompt is None or isinstance(prompt, str)):
        text = (prompt or "") + completion
        if tokenizer.eos_token is not None and not text.endswith(tokenizer.eos_token):
            text += tokenizer.eos_token
        ids = list(tokenizer(text)["input_ids"])
    else:
        if not tokenizer.chat_template:
            raise ConfigError("the reward model's tokenizer has no chat template; give it texts, or set a template")
        turns = [*_turns(prompt, "user"), *_turns(completion, "assistant")]
        ids = list(tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True)["input_ids"])
    bos = tokenizer.bos_token_id
    return ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids


def score(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Text | None],
    completions: Sequence[Text],
    *,
    batch_tokens: int = 16384,
    max_length: int | None = None,
) -> list[float | None]:
    """The reward of each answer, in the order given; None for one that is too long to be read whole.

    A float32 score does not depend on the order or the batch beyond rounding (1e-5). The model's mode stays.

    Args:
        model: A sequence classifier with one label, or a PeftModel of one.
        tokenizer: The reward model's own, not the policy's.
        prompts: What was asked; None where the completion is the whole conversation.
        completions: The answers.
        batch_tokens: Padded size of a batch.
        max_length: Most tokens of prompt and answer. None: the model's context.
    """
    if len(prompts) != len(completions):
        raise ConfigError(f"{len(prompts)} prompts and {len(completions)} completions; each completion needs its own")
    config = model.config.get_text_config()
    limit = min((size for size in (max_length, context_length(model)) if size is not None), default=None)
    pad = config.pad_token_id if config.pad_token_id is not None else tokenizer.pad_token_id
    if pad is None:
        raise ConfigError("neither the reward model nor its tokenizer has a padding token; set tokenizer.pad_token")
    config.pad_token_id = pad  # by which the model finds the last token of a row
    rows = [reward_ids(tokenizer, *pair) for pair in zip(prompts, completions, strict=True)]
    rewards: list[float | None] = [None] * len(rows)
    fitting = [index for index, row in enumerate(rows) if row and (limit is None or len(row) <= limit)]
    with reading(model):
        for batch in token_batches(fitting, rows, batch_tokens):
            for index, reward in zip(batch, _score_batch(model, [rows[index] for index in batch], pad), strict=True):
                if not math.isfinite(reward):
                    raise StageError(f"the reward model scores completion {index} with {reward}")
                rewards[index] = reward
    return rewards


def held_out_accuracy(
    model: Any,
    tokenizer: Any,
    pairs: Iterable[Mapping[str, Any]],
    *,
    batch_tokens: int = 16384,
    max_length: int | None = None,
) -> HeldOut:
    """How often the chosen answer of a pair scores higher than the rejected one.

    Args:
        model: As in `score`.
        tokenizer: As in `score`.
        pairs: Rows with `chosen`, `rejected` and, unless they hold the whole conversation, `prompt`.
        batch_tokens: As in `score`.
        max_length: As in `score`; a pair is left out if one of its answers is longer.

    Raises:
        StageError: no pair is left.
    """
    rows = list(pairs)
    prompts = [row.get("prompt") for row in rows]
    answers = [row["chosen"] for row in rows] + [row["rejected"] for row in rows]
    found = score(model, tokenizer, prompts * 2, answers, batch_tokens=batch_tokens, max_length=max_length)
    margins = [
        better - worse
        for better, worse in zip(found[: len(rows)], found[len(rows) :], strict=True)
        if better is not None and worse is not None
    ]
    if not margins:
        raise StageError(f"none of {len(rows)} pairs fits in the reward model's context; there is nothing to compare")
    accuracy = sum(margin > 0 for margin in margins) / len(margins)
    return HeldOut(accuracy, len(margins), len(rows) - len(margins), sum(margins) / len(margins))


def check_scores_again(
    path: str,
    prompts: Sequence[Text | None],
    completions: Sequence[Text],
    before: Sequence[float | None],
    *,
    tolerance: float = SAME_SCORE,
    dtype: torch.dtype = torch.float32,
    max_length: int | None = None,
) -> float:
    """Load a saved reward model and see that it scores as the one that was saved.

    Args:
        path: What was saved: a model folder, or an adapter folder.
        prompts: A few prompts, and
        completions: their answers, that
        before: were scored with `score` before saving.
        tolerance: Largest allowed difference, relative to the largest score (at least 1).
        dtype: Dtype that the model is loaded in; that of `before`.
        max_length: As it was for `before`.

    Returns:
        The largest relative difference.

    Raises:
        StageError: a score differs by more; the message has both.
    """
    model, tokenizer = load_reward_model(path, dtype=dtype)
    return same_scores(path, before, score(model, tokenizer, prompts, completions, max_length=max_length), tolerance)


def same_scores(
    path: str, before: Sequence[float | None], after: Sequence[float | None], tolerance: float = SAME_SCORE
) -> float:
    """See that the scores of the reward model in `path` are those of before it was saved.

    Returns:
        The largest difference, relative to the largest score (at least 1).

    Raises:
        StageError: a score differs by more than the tolerance; the message has both.
    """
    if len(after) != len(before):
        raise ConfigError(f"{len(before)} scores from before and {len(after)} now; give the same answers")
    scale = max([1.0, *(abs(value) for value in before if value is not None)])
    largest = 0.0
    for index, (was, now) in enumerate(zip(before, after, strict=True)):
        if was is None and now is None:
            continue
        difference = math.inf if was is None or now is None else abs(now - was) / scale
        if not difference <= tolerance:  # also for NaN
            raise StageError(
                f"the reward model in {path} scores answer {index} with {_shown(now)}, and scored it with "
                f"{_shown(was)} before it was saved (difference {difference:.3g}, allowed {tolerance:.3g}); what was "
                "saved is not what was trained"
            )
        largest = max(largest, difference)
    return largest


def merge_reward_adapter(
    adapter_path: str | Path, out_dir: str | Path, dtype: torch.dtype = torch.float32, tolerance: float = SAME_SCORE
) -> dict[str, Any]:
    """Merge the adapter of a reward model, outcome or process, into its unquantised base and save the full model.

    TRL's GRPO does not take a live PeftModel as its reward model (trap T45), and an adapter needs its base beside it.
    The merge is done in float32 and rounded once; the folder appears whole or not at all.

    Returns:
        `base`, `task`, `dtype`, and the relative differences of logits `merge_difference` and `saved_difference`.

    Raises:
        ConfigError: there is no adapter of a reward model.
        StageError: the logits differ by more than the tolerance (with rounding to `dtype`), or the disk is full.
    """
    source = str(adapter_path)
    base, task = adapter_base(source), _adapter_task(source)
    with_adapter, config = _with_adapter(source, task, torch.float32, None)
    before = _probe(with_adapter)
    merged = with_adapter.merge_and_unload(safe_merge=True)
    reference = _probe(merged)
    by_merge = _differ(before, reference, tolerance, f"{source}: after the merge")
    tokenizer = _tokenizer(source)
    _take_config(merged, config, tokenizer)
    with whole_folder(Path(out_dir)) as temporary:
        merged.to(dtype).save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        saved = _probe(_load(str(temporary), task, dtype, None).model)
        allowed = ROUNDING_TOLERANCE.get(dtype, tolerance)
        by_saving = _differ(reference, saved, allowed, f"{source}: after saving the merged model in {dtype}")
    name = str(dtype).removeprefix("torch.")
    return {"base": base, "task": task, "dtype": name, "merge_difference": by_merge, "saved_difference": by_saving}


def _load(path: str, task: Task, dtype: torch.dtype, device_map: Any) -> RewardModel:
    tokenizer = _tokenizer(path)
    if adapter_base(path) is not None:
        has = _adapter_task(path)
        if has != task:
            raise StageError(f"the adapter in {path} is of task type {has}, not {task}; this is another reward model")
        model, config = _with_adapter(path, task, dtype, device_map)
        model = model.merge_and_unload(safe_merge=True)
        _take_config(model, config, tokenizer)
    else:
        model = _full(path, task, dtype, device_map, head_needed=True)
        _take_config(model, {}, tokenizer)
    return RewardModel(model.eval().requires_grad_(False), tokenizer)


def _full(path: str, task: Task, dtype: torch.dtype, device_map: Any, head_needed: bool) -> Any:
    """The classifier in a folder; a head that is missing starts at random, if the caller has the trained one."""
    auto_class, labels = _CLASSES[task]
    load: Callable[..., Any] = auto_class.from_pretrained
    options: dict[str, Any] = {} if head_needed else {"num_labels": labels}
    try:
        with silent_report():
            model, info = load(
                path,
                dtype=dtype,
                device_map=device_map,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                **options,
            )
    except (OSError, ValueError) as error:
        raise StageError(f"{path} could not be loaded as a reward model: {error}") from error
    missing = [key for key in info["missing_keys"] if head_needed or not key.startswith(_HEADS)]
    if missing:
        raise StageError(
            f"{path} lacks {', '.join(sorted(missing)[:3])}, so its scores would be random; it is no reward model. "
            "Train one with a reward or process_reward stage"
        )
    if model.config.num_labels != labels:
        raise StageError(f"{path} has {model.config.num_labels} labels; a reward model of this kind has {labels}")
    return model


def _with_adapter(path: str, task: Task, dtype: torch.dtype, device_map: Any) -> tuple[Any, dict[str, Any]]:
    """The adapter on its base, and what the file beside the adapter adds to the base's config."""
    from peft import PeftModel
    from safetensors import safe_open

    weights = Path(path, "adapter_model.safetensors")
    if not weights.is_file():
        raise StageError(f"{path} has no adapter_model.safetensors; save the adapter again with save_pretrained")
    with safe_open(weights, "pt") as file:
        trained = any(f".{head}." in key for key in file.keys() for head in _HEADS)  # noqa: SIM118
    if not trained:
        raise StageError(f"the adapter in {path} has no head, so its scores would be random; train it as {task}")
    base = adapter_base(path) or ""
    model = _full(base, task, dtype, device_map, head_needed=False)
    if getattr(model.config, "quantization_config", None) is not None:
        raise StageError(f"{base} is quantised as saved, and a merge would round the adapter away; name the plain one")
    try:
        adapted = PeftModel.from_pretrained(model, path)
    except (ValueError, RuntimeError) as error:
        raise StageError(f"the adapter in {path} does not fit its base {base}: {error}") from error
    beside = Path(path, BESIDE_ADAPTER)
    return adapted.eval(), json_object(beside) if beside.is_file() else {}


def _adapter_task(path: str) -> Task:
    task = json_object(Path(path, "adapter_config.json")).get("task_type") if adapter_base(path) else None
    for known in _CLASSES:
        if task == known:
            return known
    raise ConfigError(
        f"{path} holds no adapter of a reward model (task_type {task!r}); train it as SEQ_CLS (outcome) or TOKEN_CLS "
        "(process), or its head stays random"
    )


def _take_config(model: Any, beside: Mapping[str, Any], tokenizer: Any) -> None:
    if model.config.get_text_config().pad_token_id is None:
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    if "step_separator" in beside:
        model.config.step_separator = beside["step_separator"]
    if isinstance(beside.get("id2label"), Mapping):
        model.config.id2label = {int(kind): label for kind, label in beside["id2label"].items()}
        model.config.label2id = {label: kind for kind, label in model.config.id2label.items()}


def _tokenizer(path: str) -> Any:
    base = adapter_base(path)
    return load_tokenizer(path if base is None or Path(path, "tokenizer_config.json").is_file() else base)


def _turns(text: Text | None, role: str) -> list[Mapping[str, Any]]:
    if text is None:
        return []
    return [{"role": role, "content": text}] if isinstance(text, str) else list(text)


def _score_batch(model: Any, rows: Sequence[Sequence[int]], pad: int) -> list[float]:
    logits = padded_logits(model, rows, pad)
    if logits.shape != (len(rows), 1):
        raise ConfigError(f"the model gives {tuple(logits.shape)} logits for {len(rows)} rows; a reward is one number")
    return [float(value) for value in logits[:, 0].float().tolist()]


@contextmanager
def without_autocast(model: Any) -> Iterator[None]:
    """Run a model that accelerate prepared in the precision of its weights, as it runs when it is loaded again."""
    hooked = hasattr(model, "_hf_hook")  # moves inputs between devices
    forward = None if hooked else model.__dict__.pop("forward", None)
    try:
        yield
    finally:
        if forward is not None:
            model.forward = forward


@contextmanager
def silent_report() -> Iterator[None]:
    """Load a model without transformers' report of heads that are new or left out; check the loading info instead."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)


def _probe(model: Any) -> torch.Tensor:
    """A classifier without a padding token takes one row at a time."""
    return fixed_logits(model, rows=1 if model.config.get_text_config().pad_token_id is None else 2)


def _differ(before: torch.Tensor, after: torch.Tensor, allowed: float, what: str) -> float:
    relative = float((after - before).abs().max()) / max(float(before.abs().max()), 1.0)
    if not relative <= allowed:  # also for NaN
        raise StageError(f"{what} the logits differ by {relative:.3g} of the largest, allowed {allowed:.3g}")
    return relative


def _shown(value: float | None) -> str:
    return "None (too long)" if value is None else f"{value:.6g}"
