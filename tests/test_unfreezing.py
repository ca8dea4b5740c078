"""Layers that are unfrozen while training goes on."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import (
    TrainerCallback,
)
from trl import DPOTrainer, SFTTrainer

from stagekit.errors import ConfigError, StageError
from stagekit.freezing import (
    freeze,
    groups_of,
    layout_of,
)
from stagekit.unfreezing import GradualUnfreezing
from tests.freezing import copies, gpt2, holding, llama, lora, moved, trainer_of


class Watch(TrainerCallback):  # type: ignore[misc]
    """Which blocks moved in each step."""

    def __init__(self) -> None:
        self.steps: dict[int, set[int]] = {}
        self._before: dict[str, torch.Tensor] = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._before = copies(model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        layout = layout_of(model)
        names = {name.removeprefix("base_model.model.") for name in moved(model, self._before)}
        blocks = {layout.block_of(name) for name in names}
        outside = {name for name in names if layout.block_of(name) is None}
        embedding = any("embed" in name for name in outside)
        norm = any("norm" in name for name in outside)
        self.steps[state.global_step] = {
            *(block for block in blocks if block is not None),
            *([-1] if embedding else []),
            *([99] if norm else []),
        }


def gradual(
    model: Any,
    rows: list[dict[str, Any]],
    folder: Path,
    tiny: str,
    interval: int = 1,
    frozen: tuple[str, ...] = (),
    cls: Any = SFTTrainer,
    **options: Any,
) -> tuple[Any, Watch]:
    """A trainer that unfreezes, wired as `training.build` does it, and what it moved in each step."""
    trainer = trainer_of(model, rows, folder, tiny, holding(cls, lambda: before()), **options)
    kept = freeze(trainer.model, frozen=frozen) if frozen else None
    unfreezing, watch = GradualUnfreezing(trainer.model, interval), Watch()

    def before() -> None:
        if kept is not None:
            kept.hold()
        unfreezing.before_optimizer()

    trainer.add_callback(unfreezing)
    trainer.add_callback(watch)
    return trainer, watch


def test_groups_go_from_the_top_to_the_embedding() -> None:
    for model, head in ((llama(tied=False), {"lm_head.weight"}), (llama(tied=True), set())):
        names = {id(one): name for name, one in model.named_parameters()}
        groups = [{names[id(one)] for one in group} for group in groups_of(model)]
        assert len(groups) == 13
        assert {name for name in groups[0] if "layers" not in name} == {"model.norm.weight"} | head
        assert all(f"model.layers.{11 - depth}.mlp.up_proj.weight" in groups[depth] for depth in range(12))
        assert groups[-1] == {"model.embed_tokens.weight"}
    assert [len(group) for group in groups_of(gpt2())] == [14, 12, 12, 2]


def test_groups_hold_what_is_trained_only() -> None:
    model = llama()
    freeze(model, unfreeze_top_n=4)
    assert len(groups_of(model)) == 4
    model = lora(llama())
    freeze(model, frozen=["layers.0-5"])
    assert len(groups_of(model)) == 6
    freeze(model, frozen=["layers.0-10"])
    with pytest.raises(ConfigError, match=r"s\.use_gradual_unfreezing: only one group of layers is trained"):
        GradualUnfreezing(model, where="s")


def test_t31_a_layer_moves_from_its_epoch_on_and_not_before(
    sft_rows: list[dict[str, Any]], tmp_path: Path, tiny_model_path: str
) -> None:
    """Two steps an epoch; with a weight decay of 0.5 at 1e-2, decay alone would move a frozen weight."""
    trainer, watch = gradual(llama(layers=3), sft_rows, tmp_path, tiny_model_path)
    trainer.train()
    epochs = [{2, 99}, {1, 2, 99}, {0, 1, 2, 99}, {-1, 0, 1, 2, 99}]
    assert watch.steps == {step: epochs[(step - 1) // 2] for step in range(1, 9)}


def test_an_interval_of_two_epochs_and_accumulated_steps(
    sft_rows: list[dict[str, Any]], tmp_path: Path, tiny_model_path: str
) -> None:
    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3, "activation_checkpointing": True}
    trainer, watch = gradual(llama(layers=3), sft_rows, tmp_path, tiny_model_path, interval=2, **options)
    trainer.train()
    assert watch.steps == {step: {2, 99} if step <= 4 else {1, 2, 99} for step in range(1, 9)}


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adafactor", "adamw_8bit", "lion_32bit"])
def test_a_run_resumed_in_the_middle_of_an_epoch_ends_with_the_same_bits(
    optim: str, sft_rows: list[dict[str, Any]], tmp_path: Path, tiny_model_path: str
) -> None:
    options = {"optim": optim, "save_strategy": "steps", "save_steps": 1, "save_total_limit": None}
    whole, _ = gradual(llama(layers=3), sft_rows, tmp_path / "whole", tiny_model_path, **options)
    whole.train()
    for step in (3, 4):  # in the middle of the second epoch, and right at its end
        resumed, watch = gradual(llama(layers=3), sft_rows, tmp_path / f"from{step}", tiny_model_path, **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"whole/checkpoint-{step}"))
        epochs = [{2, 99}, {1, 2, 99}, {0, 1, 2, 99}, {-1, 0, 1, 2, 99}]
        assert watch.steps == {one: epochs[(one - 1) // 2] for one in range(step + 1, 9)}
        assert moved(resumed.model, copies(whole.model)) == set()


def test_adapters_are_unfrozen_from_the_top_also_where_a_reference_switches_them_off(
    preference_rows: list[dict[str, Any]], tmp_path: Path, tiny_model_path: str
) -> None:
    trainer, watch = gradual(
        llama(layers=4),
        preference_rows,
        tmp_path,
        tiny_model_path,
        cls=DPOTrainer,
        frozen=("layers.1",),
        peft_config=LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    )
    with trainer.model.disable_adapter():  # as a check of the first loss does before training
        pass
    trainer.train()
    epochs = [{3}, {2, 3}, {0, 2, 3}, {0, 2, 3}]
    assert watch.steps == {step: epochs[(step - 1) // 2] for step in range(1, 9)}


def test_an_optimiser_that_lacks_layers_is_told(
    sft_rows: list[dict[str, Any]], tmp_path: Path, tiny_model_path: str
) -> None:
    trainer = trainer_of(llama(layers=3), sft_rows, tmp_path, tiny_model_path)
    trainer.add_callback(GradualUnfreezing(trainer.model))
    trainer.model.model.layers[0].requires_grad_(False)
    with pytest.raises(StageError, match="the optimiser lacks 9 tensors that are unfrozen later"):
        trainer.train()
