"""What a preference trainer's reference model can do beside standing still: be remembered on disk, or follow.

Ref-logps are the reference model's log-probabilities of the completions of a pair. `CachedReference` keeps them from
one run to the next; `ReferenceAdapterUpdate` and `ReferenceModelCheckpoint` are for a reference that is updated from
the policy every N steps.
"""

import copy
import hashlib
import json
import os
import re
import warnings
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset, Value
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import DPOConfig, DPOTrainer

from stagekit.errors import ConfigError, StageError


REFERENCE_UPDATE: Mapping[str, Any] = {
    "sync_ref_model": True,
    "ref_model_mixup_alpha": 1.0,
    "precompute_ref_log_probs": False,
}
"""Config arguments for a reference that becomes the policy every `ref_model_sync_steps` steps, in full fine-tuning.
TRL's own mixture (0.6) would leave 40 % of the old reference, its default interval is 512 steps. It refuses this with
an adapter: use `ReferenceAdapterUpdate` there. Add `ReferenceModelCheckpoint`, or a resumed run starts with the first
reference again."""

REFERENCE_FILE = "reference_model.safetensors"
"""Where a checkpoint keeps the weights of a reference model that is updated."""

_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")
_ADAPTER = re.compile(r"\.default(?=\.|$)")


def precompute_cached(
    dataset: Dataset, compute: Callable[[Dataset], Dataset], *, cache_dir: str | Path, settings: Mapping[str, Any]
) -> Dataset:
    """The data set with its ref-logps, from `cache_dir` if they were computed there before with the same settings.

    The numbers are the bits that `compute` gave. The token ids are part of the key: another data set, chat template or
    tokenizer is another file. beta and the loss are not. A file that is damaged or was made with other settings is
    never used. Only the first process reads and writes.

    Args:
        dataset: Rows with prompt_ids, chosen_ids and rejected_ids.
        compute: Adds the two columns.
        cache_dir: Where the files are; made if missing.
        settings: What else the numbers depend on, as JSON can hold it.
    """
    state = PartialState()
    key = {"tokens": tokens_digest(dataset), "rows": len(dataset), **settings}
    text = json.dumps(key, sort_keys=True)
    path = Path(cache_dir, f"ref-logps-{hashlib.sha256(text.encode()).hexdigest()[:32]}.safetensors")
    found = [_read(path, text, len(dataset)) if state.is_main_process else None]
    broadcast_object_list(found, from_process=0)
    if found[0] is not None:
        for name in _COLUMNS:
            values, kind = found[0][name]
            dataset = dataset.add_column(name, values, feature=Value(kind))
        return dataset
    dataset = compute(dataset)
    if state.is_main_process:
        _write(path, text, dataset)
    return dataset


def tokens_digest(dataset: Dataset) -> str:
    """A sha256 over the token ids of all pairs, which says what data, template and tokenizer made them."""
    names = ["prompt_ids", "chosen_ids", "rejected_ids"]
    digest = hashlib.sha256()
    for table in dataset.select_columns(names).with_format("arrow").iter(batch_size=1000):
        for name in names:
            lists = table.column(name).combine_chunks()
            digest.update(lists.value_lengths().to_numpy(zero_copy_only=False).astype("<i8").tobytes())
            digest.update(lists.flatten().to_numpy(zero_copy_only=False).astype("<i8").tobytes())
    return digest.hexdigest()


def _read(path: Path, key: str, rows: int) -> dict[str, tuple[list[float], str]] | None:
    """Values and dtype of each column; None when there is no file that can be used."""
    if not path.exists():
        return None
    why = "was made with other settings"
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            if about.get("key") == key:
                tensors = {name: file.get_tensor(name) for name in _COLUMNS}
                if about["sha256"] == _digest(tensors) and all(len(tensor) == rows for tensor in tensors.values()):
                    return {name: (tensor.tolist(), about[name]) for name, tensor in tensors.items()}
                why = "is damaged: its checksum is wrong"
    except (SafetensorError, OSError, KeyError) as error:
        why = f"cannot be read ({error})"
    warnings.warn(f"{path} {why}; the reference's log-probs are computed again and replace it", stacklevel=2)
    return None


def _write(path: Path, key: str, dataset: Dataset) -> None:
    tensors = {name: torch.tensor(dataset[name][:], dtype=torch.float64) for name in _COLUMNS}
    kinds = {name: str(dataset.features[name].dtype) for name in _COLUMNS}
    path.parent.mkdir(parents=True, exist_ok=True)
    _save_whole(path, tensors, {"key": key, "sha256": _digest(tensors), **kinds})


def _digest(tensors: Mapping[str, torch.Tensor]) -> str:
    return hashlib.sha256(b"".join(tensors[name].numpy().tobytes() for name in _COLUMNS)).hexdigest()


def _save_whole(path: Path, tensors: dict[str, torch.Tensor], about: dict[str, str] | None = None) -> None:
    """Write a file that is whole or not there."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(tensors, temporary, metadata=about)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


class CachedReference:
    """Mixin for `DPOTrainer`: keeps the ref-logps that TRL computes ahead of training in a folder of the user's.

    TRL has a cache too, but its key changes with nearly every argument, and for a data set that was not loaded from a
    file it ends with the process.

    Args:
        cache_dir: The folder. None: nothing is kept.
        cache_key: Says which model the reference is (see `model_fingerprint`). None: TRL's hash of all
            weights, which for a new adapter depends on the seed although its reference, the base, does not.
        arguments: Everything else that `DPOTrainer` takes.

    Raises:
        ConfigError: a cache where nothing is computed ahead, or for streamed data.
    """

    def __init__(
        self,
        model: Any,
        *,
        args: DPOConfig,
        cache_dir: str | Path | None = None,
        cache_key: str | None = None,
        **arguments: Any,
    ) -> None:
        if cache_dir is not None and not args.precompute_ref_log_probs:
            raise ConfigError("cache_dir: nothing is computed ahead of training; set precompute_ref_log_probs=True")
        self._cache_dir, self._cache_key = cache_dir, cache_key
        super().__init__(model=model, args=args, **arguments)  # type: ignore[call-arg]

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        if not isinstance(dataset, Dataset):
            raise ConfigError(
                f"the {name} data is a {type(dataset).__name__}: log-probs of the reference cannot be computed ahead "
                "for streamed data; load it as a Dataset, or set precompute_ref_log_probs=False"
            )
        compute = super()._precompute_ref_logps  # type: ignore[misc]
        if self._cache_dir is None:
            return compute(dataset, name, batch_size)
        return precompute_cached(
            dataset,
            lambda rows: compute(rows, name, batch_size),
            cache_dir=self._cache_dir,
            settings=self._settings(batch_size),
        )

    def _settings(self, batch_size: int) -> dict[str, Any]:
        """What the numbers depend on beside the tokens. Padding and batch size change the last bits."""
        trainer: Any = self
        args, model = trainer.args, trainer.ref_model or trainer.model
        return {
            "model": self._cache_key or trainer._precompute_model_hash,
            "max_length": args.max_length,
            "truncation_mode": args.truncation_mode,
            "ld_alpha": args.ld_alpha,
            "batch_size": batch_size,
            "pad_to_multiple_of": args.pad_to_multiple_of,
            "mixed_precision": trainer.accelerator.mixed_precision,
            "dtype": str(model.dtype),
            "attention": model.config._attn_implementation,
            "device": trainer.accelerator.device.type,
            "processes": trainer.accelerator.num_processes,
            "versions": {name: version(name) for name in ("torch", "transformers", "trl")},
        }


class CachedReferenceDPOTrainer(CachedReference, DPOTrainer):  # type: ignore[misc]
    """`DPOTrainer` that keeps the reference's log-probs in `cache_dir`, for the next run on the same model and data.

    Args:
        cache_dir: The folder.
        cache_key: Says which model the reference is; None: a hash of its weights.
        arguments: Everything else that `DPOTrainer` takes; `args.precompute_ref_log_probs` must be set.
    """


class ReferenceAdapterUpdate(TrainerCallback):  # type: ignore[misc]
    """Makes the policy's adapter the reference every N optimiser steps; for adapters, where TRL refuses to.

    The copy is the adapter `ref`, which TRL's DPO and KTO trainers use as the reference whenever it is there. For a
    new adapter it is added at the first update; before, the reference is the base model, as ever. It is frozen, has
    no dropout and is not in the optimiser.

    A checkpoint keeps it in its folder `ref/`, as peft saves every adapter, and resuming loads it from there: the
    reference of the last update, without an argument. When training ends it is removed, so that what is saved is the
    policy's adapter alone; an evaluation after that is against the base model.

    Args:
        every_steps: N.
    """

    def __init__(self, every_steps: int) -> None:
        if every_steps < 1:
            raise ConfigError(f"every_steps: {every_steps} is no interval; give at least 1")
        self.every_steps = every_steps

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """See that there is an adapter, and that a reference that is already there stands still.

        Raises:
            ConfigError: there is none, or the reference's log-probs were computed ahead and would not follow.
        """
        model = kwargs["model"]
        if not hasattr(model, "peft_config") or "default" not in model.peft_config:
            raise ConfigError("ReferenceAdapterUpdate: the model has no adapter; use the config's sync_ref_model")
        if getattr(args, "precompute_ref_log_probs", False):
            raise ConfigError("ReferenceAdapterUpdate: set precompute_ref_log_probs=False; the reference changes")
        if "ref" in model.peft_config:
            _freeze(model)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Copy the policy's adapter at every Nth step."""
        if state.global_step % self.every_steps == 0:
            copy_adapter_to_reference(kwargs["model"])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the policy's adapter alone in the model."""
        if "ref" in kwargs["model"].peft_config:
            kwargs["model"].delete_adapter("ref")


@torch.no_grad()
def copy_adapter_to_reference(model: Any) -> None:
    """Make the adapter `ref` of a peft model, added if missing, the same as `default`."""
    if "ref" not in model.peft_config:
        config = copy.deepcopy(model.peft_config["default"])
        config.inference_mode = True
        model.add_adapter("ref", config)
        _freeze(model)
    for name, policy in list(model.named_parameters()):
        if _ADAPTER.search(name):
            model.get_parameter(_ADAPTER.sub(".ref", name)).data = policy.detach().clone()


def _freeze(model: Any) -> None:
    """No gradient and no dropout in the adapter `ref`; a reference that drops out is another one at every step."""
    model.peft_config["ref"].lora_dropout = 0.0
    for name, parameter in model.named_parameters():
        if ".ref." in name or name.endswith(".ref"):
            parameter.requires_grad_(False)
    for module in model.modules():
        dropouts = getattr(module, "lora_dropout", None)
        if dropouts is not None and "ref" in dropouts:
            dropouts["ref"] = torch.nn.Identity()


class ReferenceModelCheckpoint(TrainerCallback):  # type: ignore[misc]
    """Keeps a reference model that is updated (`REFERENCE_UPDATE`) in each checkpoint, and restores it on resume.

    TRL loads the reference from the model's folder when the trainer is built, so a resumed run would start with the
    first reference instead of that of the last update. Set `trainer` after building it, before training.

    Args:
        resume: The checkpoint that training goes on from. None: `checkpoint-STEP` in the output folder.
    """

    def __init__(self, resume: str | Path | None = None) -> None:
        self.resume = resume
        self.trainer: Any = None

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the reference beside the policy."""
        if state.is_world_process_zero:
            folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
            weights = {name: tensor.detach().cpu().clone() for name, tensor in self._reference().state_dict().items()}
            _save_whole(folder / REFERENCE_FILE, weights)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the reference of the last update up again.

        Raises:
            StageError: the checkpoint holds none.
        """
        if state.global_step == 0:
            return
        folder = Path(self.resume or Path(args.output_dir, f"checkpoint-{state.global_step}"))
        if not (folder / REFERENCE_FILE).is_file():
            raise StageError(
                f"{folder} has no {REFERENCE_FILE}, so the reference of step {state.global_step} is not known; start "
                "again, or resume from a checkpoint that was written with ReferenceModelCheckpoint"
            )
        self._reference().load_state_dict(load_file(folder / REFERENCE_FILE))

    def _reference(self) -> Any:
        assert self.trainer is not None, "ReferenceModelCheckpoint.trainer is not set"
        if self.trainer.ref_model is None:
            raise ConfigError(
                "ReferenceModelCheckpoint: the trainer holds no reference model; it is for REFERENCE_UPDATE"
            )
        return self.trainer.accelerator.unwrap_model(self.trainer.ref_model)
