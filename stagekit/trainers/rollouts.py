"""What TRL's trainers that sample (GRPO, RLOO, and PPO here) lack: checkpoints that go on with the same bits, a
reference that is the policy, positions that padding does not move, generation in parts."""

import inspect
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel
from trl import GRPOTrainer, RLOOTrainer
from trl.trainer.callbacks import SyncRefModelCallback

from stagekit.errors import ConfigError, StageError


ROLLOUT_STATE = "rollout.json"
"""How far a checkpoint's rollout is used up, and what of the trainer changes with it."""
_ADAPTIVE = ("entropy_coef", "_last_world_entropy")


class Rollouts:
    """Mixin for `GRPOTrainer`, `RLOOTrainer` and `PPOTrainer`.

    * A checkpoint in the middle of a rollout holds the rollout, and a resumed run takes it up; TRL samples a new one.
    * A resumed run sees the prompts of its epoch; TRL begins with the order of the first one again.
    * The reference of a policy that is handed over as an object has the policy's weights; TRL reloads what the object
      was made from.
    * Models with learned positions count them from the first real token; TRL leaves them to the padded row.
    * Data with fewer prompts than a rollout needs are an error; TRL trains no step.

    Args:
        chunk_size: Completions that are generated at once, per process. None: the whole rollout, as in TRL.
        order_seed: Of the order of the prompts. None: `args.seed`.
        arguments: Everything else that the trainer takes.
    """

    def __init__(
        self, model: Any, *, chunk_size: int | None = None, order_seed: int | None = None, **arguments: Any
    ) -> None:
        self._chunk_size, self._order_seed = chunk_size, order_seed
        self._epochs_before = 0
        super().__init__(model=model, **arguments)  # type: ignore[call-arg]
        trainer: Any = self
        for one in (trainer.model, trainer.ref_model):
            if one is not None:
                count_positions_from_the_first_token(one)
        if isinstance(model, PreTrainedModel) and trainer.ref_model is not None:
            SyncRefModelCallback.sync_target_model(trainer.model, trainer.ref_model, 1.0)

    def get_train_dataloader(self) -> Any:
        """As in TRL.

        Raises:
            ConfigError: there are fewer prompts than a rollout needs.
        """
        trainer: Any = self
        data, args = trainer.train_dataset, trainer.args
        needed = args.generation_batch_size // trainer.num_generations
        if hasattr(data, "__len__") and len(data) < needed:
            raise ConfigError(
                f"a rollout of {args.generation_batch_size} completions, {trainer.num_generations} of each prompt, "
                f"needs {needed} prompts, but the data have {len(data)}, so not one step would be trained; make the "
                "rollout smaller, or give more prompts"
            )
        return super().get_train_dataloader()  # type: ignore[misc]

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        sampler = super()._get_train_sampler(dataset)  # type: ignore[misc]
        if sampler.shuffle:
            if self._order_seed is not None:
                sampler.generator.manual_seed(self._order_seed)
            for _ in range(self._epochs_before):
                torch.randperm(sampler.num_samples, generator=sampler.generator)
        return sampler

    def _generate_single_turn(self, prompt_ids: list[Any], images: Any, *rest: Any, **options: Any) -> Any:
        trainer: Any = self
        generate = super()._generate_single_turn  # type: ignore[misc]
        size = self._chunk_size
        whole = trainer.use_vllm or trainer.use_transformers_continuous_batching or images is not None
        if size is None or whole or len(prompt_ids) <= size:
            return generate(prompt_ids, images, *rest, **options)
        completions = []
        for start in range(0, len(prompt_ids), size):
            completions += generate(prompt_ids[start : start + size], images, *rest, **options)[0]
        return completions, None

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        super()._save_checkpoint(*args, **kwargs)  # type: ignore[misc]
        trainer: Any = self
        folder = Path(trainer.args.output_dir, f"checkpoint-{trainer.state.global_step}")
        rank, state = trainer.accelerator.process_index, self._rollout_state()
        if state["used"] and trainer._buffered_inputs is not None:
            save_file(_flat(trainer._buffered_inputs), folder / f"rollout-{rank}.safetensors")
        if trainer.is_world_process_zero():
            (folder / ROLLOUT_STATE).write_text(json.dumps(state) + "\n", encoding="utf-8")
        trainer.accelerator.wait_for_everyone()

    def _rollout_state(self) -> dict[str, Any]:
        """`used`: micro-batches of the rollout that were trained on; and what adapts itself."""
        trainer: Any = self
        every = trainer.args.steps_per_generation * trainer.num_iterations
        adaptive = {name: getattr(trainer, name) for name in _ADAPTIVE if hasattr(trainer, name)}
        return {"used": trainer._step % every, **adaptive}

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)  # type: ignore[misc]
        folder = Path(resume_from_checkpoint)
        if not (folder / ROLLOUT_STATE).is_file():
            raise StageError(
                f"{folder} has no {ROLLOUT_STATE}, so the rollout that it stopped in is not known; start again, or "
                "resume from a checkpoint that this trainer wrote"
            )
        self._take_up(json.loads((folder / ROLLOUT_STATE).read_text(encoding="utf-8")), folder)

    def _take_up(self, state: Mapping[str, Any], folder: Path) -> None:
        """Go on with the rollout and the order of prompts of a checkpoint."""
        trainer: Any = self
        progress = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        self._epochs_before = math.floor((progress["epoch"] or 0.0) + 1e-9)
        for name in _ADAPTIVE:
            if name in state:
                setattr(trainer, name, state[name])
        trainer._step, trainer._buffered_inputs = state["used"], None
        if state["used"]:
            tensors = load_file(folder / f"rollout-{trainer.accelerator.process_index}.safetensors")
            tensors = {name: tensor.to(trainer.accelerator.device) for name, tensor in tensors.items()}
            trainer._buffered_inputs = _batches(tensors)


def count_positions_from_the_first_token(model: Any) -> None:
    """Make a model with learned positions give a row that is padded on its left the positions of the row alone.

    Rotary positions are relative, so padding does not change them; such models are left as they are.
    """
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    backbone, config = inner.base_model, inner.config.get_text_config()
    rotary = any(getattr(config, name, None) is not None for name in ("rope_parameters", "rope_theta"))
    if not rotary and "position_ids" in inspect.signature(type(backbone).forward).parameters:
        backbone.register_forward_pre_hook(_with_positions, with_kwargs=True)


def positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """(B, T) positions that count from 0 at the first token that is attended to."""
    return (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)


def _with_positions(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
    mask, ids = kwargs.get("attention_mask"), kwargs.get("input_ids", args[0] if args else None)
    if kwargs.get("position_ids") is not None or mask is None or mask.dim() != 2 or ids is None:
        return None
    if mask.shape != ids.shape:  # a step of generation, which brings its own positions
        return None
    return args, {**kwargs, "position_ids": positions(mask)}


def _flat(batches: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {
        f"{number}.{name}": value.clone()
        for number, batch in enumerate(batches)
        for name, value in batch.items()
        if value is not None
    }


def _batches(tensors: Mapping[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    found: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        number, _, name = key.partition(".")
        found.setdefault(int(number), {})[name] = value
    return [found[number] for number in sorted(found)]


class ExactGRPOTrainer(Rollouts, GRPOTrainer):  # type: ignore[misc]
    """TRL's `GRPOTrainer` with what `Rollouts` adds.

    Args:
        chunk_size: See `Rollouts`.
        order_seed: See `Rollouts`.
        arguments: Everything else that `GRPOTrainer` takes.
    """


class ExactRLOOTrainer(Rollouts, RLOOTrainer):  # type: ignore[misc]
    """TRL's `RLOOTrainer` with what `Rollouts` adds.

    Args:
        chunk_size: See `Rollouts`.
        order_seed: See `Rollouts`.
        arguments: Everything else that `RLOOTrainer` takes.
    """
