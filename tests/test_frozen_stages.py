"""Freezing as options of a stage: what a run trains and what it leaves, by type, with and without an adapter."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from stagekit import ConfigError, Generation, LoRA, StageError, TrainingStage
from stagekit import training as training_module
from stagekit.adapters import RejectionSampling, SelfPlay, SelfRewarding
from tests.answers import by_length, likes_longer
from tests.running import crash_at, run, same, stage, weights


Write = Callable[..., Path]

ADAPTER = LoRA(rank=2, alpha=4, dropout=0)


@pytest.fixture
def data(write_rows: Write, sft_rows: list[Any], preference_rows: list[Any]) -> dict[str, str]:
    prompts = [{"prompt": row["prompt"]} for row in sft_rows[:4]]
    return {
        "sft": str(write_rows(sft_rows, "sft.jsonl")),
        "dpo": str(write_rows(preference_rows, "dpo.jsonl")),
        "prompts": str(write_rows(prompts, "prompts.jsonl")),
    }


def frozen(folder: Path) -> Any:
    return json.loads((folder / "frozen.json").read_text())


def moved(base: str, policy: str | None) -> set[str]:
    """The names of the weights that a stage changed; one that is tied is saved once."""
    before, after = weights(base), weights(str(policy))
    return {name for name in before if name in after and not torch.equal(before[name], after[name])}


def answer(messages: Any) -> str:
    return f"It is {len(messages)}."


def longer(messages: Any, said: list[int] = [0]) -> str:  # noqa: B006 (counts the calls)
    said[0] += 1
    return "It is so." + " Yes." * (said[0] % 4)


TYPES: dict[str, dict[str, Any]] = {
    "sft": {"data": "sft"},
    "constitutional": {"data": "prompts", "generation": Generation(max_new_tokens=8, backend=answer)},
    "rejection_sampling": {
        "data": "prompts",
        "generation": Generation(max_new_tokens=8, backend=answer),
        "method": RejectionSampling(n=1, reward=by_length),
    },
    "self_play": {
        "data": "sft",
        "generation": Generation(max_new_tokens=8, backend=answer),
        "method": SelfPlay(iterations=1, responses_per_prompt=1),
    },
    "self_rewarding": {
        "data": "prompts",
        "generation": Generation(max_new_tokens=8, backend=longer),
        "method": SelfRewarding(iterations=1, n=4, judge=likes_longer, judge_by="comparison"),
    },
    "dpo": {"data": "dpo"},
    "kto": {"data": "dpo"},
    "orpo": {"data": "dpo"},
    "cpo": {"data": "dpo"},
    "simpo": {"data": "dpo"},
    "reward": {"data": "dpo"},
}


@pytest.mark.parametrize("kind", sorted(TYPES))
def test_every_training_type_trains_the_last_block_only(
    kind: str, data: dict[str, str], tiny_model_path: str, tmp_path: Path
) -> None:
    given = dict(TYPES[kind])
    method = given.pop("method", kind)
    one = stage(
        "s", data[given.pop("data")], method, max_steps=2, unfreeze_top_n_layers=1, learning_rate=1e-2, **given
    )
    result = run(tiny_model_path, tmp_path, one)["s"]
    place = result.artifacts.get("policy") or result.artifacts["reward_model"]
    changed = moved(tiny_model_path, str(tmp_path / place))
    assert changed
    assert all(name.startswith(("model.layers.1.", "model.norm")) for name in changed)
    assert frozen(tmp_path / "01-s")["trained_blocks"] == [1]
    assert frozen(tmp_path / "01-s")["blocks"] == 2


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"frozen_layers": ["layers.0", "embedding", "lm_head"]}, {"model.layers.1", "model.norm"}),
        ({"frozen_layers": ["layers.*"]}, {"model.embed_tokens", "model.norm"}),
        ({"freeze_base_model": True, "trainable_layers": ["layers.0"]}, {"model.layers.0"}),
        ({"unfreeze_top_n_layers": 2}, {"model.layers.0", "model.layers.1", "model.norm"}),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_a_stage_trains_what_its_patterns_leave(
    options: dict[str, Any], expected: set[str], data: dict[str, str], tiny_model_path: str, tmp_path: Path
) -> None:
    result = run(tiny_model_path, tmp_path, stage("s", data["sft"], max_steps=2, learning_rate=1e-2, **options))
    changed = moved(tiny_model_path, result.policy)
    assert {next(one for one in ("model.layers.0", "model.layers.1", "model.norm", "model.embed_tokens")
                 if name.startswith(one)) for name in changed} == expected  # fmt: skip


def test_a_stage_that_freezes_nothing_is_left_alone(
    data: dict[str, str], tiny_model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    original = training_module.build

    def build(job: Any, *args: Any) -> Any:
        trainer, callbacks = original(job, *args)
        seen.append((trainer.hooks, all(one.requires_grad for one in trainer.model.parameters())))
        return trainer, callbacks

    monkeypatch.setattr(training_module, "build", build)
    run(tiny_model_path, tmp_path, stage("s", data["sft"], max_steps=1))
    ((hooks, whole),) = seen
    assert whole
    assert hooks.before_optimizer is hooks.loss is hooks.sees_loss is hooks.loss_scale is None
    assert not (tmp_path / "01-s/frozen.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frozen_layers": ["layers.7"]}, r"stages\.s\.frozen_layers: 'layers\.7': the model has the blocks 0-1"),
        ({"frozen_layers": ["embedding"]}, r"stages\.s\.frozen_layers: 'embedding' means model\.embed_tokens"),
        ({"unfreeze_top_n_layers": 3}, r"stages\.s\.unfreeze_top_n_layers: 3 is more than the 2 blocks"),
        ({"frozen_layers": ["*"]}, r"stages\.s\.frozen_layers: leaves no weight to train"),
        (
            {"use_gradual_unfreezing": True, "freeze_base_model": True, "trainable_layers": ["layers.1"]},
            r"stages\.s\.use_gradual_unfreezing: only one group",
        ),
        ({"lora": ADAPTER, "trainable_layers": ["layers.9"]}, r"stages\.s\.trainable_layers: 'layers\.9': the model"),
    ],
    ids=str,
)
def test_what_does_not_fit_the_model_is_told_by_its_path_before_training(
    options: dict[str, Any], message: str, data: dict[str, str], tiny_model_path: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        run(tiny_model_path, tmp_path, stage("s", data["sft"], max_steps=1, **options))
    assert not (tmp_path / "01-s/policy").exists()


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_t32_adapters_in_frozen_blocks_are_not_trained(
    kind: str, data: dict[str, str], tiny_model_path: str, tmp_path: Path
) -> None:
    """Trap T32. The B matrix of an adapter starts at zero."""
    options = {"max_steps": 3, "learning_rate": 1e-2, "frozen_layers": ["layers.0"], "lora": ADAPTER}
    result = run(tiny_model_path, tmp_path, stage("s", data[kind], kind, **options))
    found = weights(str(result.policy))
    assert {bool(found[name].any()) for name in found if "layers.0." in name and "lora_B" in name} == {False}
    assert {bool(found[name].any()) for name in found if "layers.1." in name and "lora_B" in name} == {True}


@pytest.mark.parametrize("target", [("q_proj", "v_proj"), "all-linear"], ids=str)
def test_a_new_adapter_stands_in_the_last_blocks_only_and_is_gone_on_with(
    target: Any, data: dict[str, str], tiny_model_path: str, tmp_path: Path
) -> None:
    lora = LoRA(rank=2, alpha=4, dropout=0, target_modules=target)
    options = {"max_steps": 2, "unfreeze_top_n_layers": 1, "lora": lora, "learning_rate": 1e-2}
    first, second = (stage(name, data["sft"], **options) for name in ("a", "b"))
    third = stage("c", data["sft"], max_steps=1, lora=lora)
    result = run(tiny_model_path, tmp_path, first, second, third)
    names = [set(weights(str(result[name].policy))) for name in ("a", "b", "c")]
    assert names[0] == names[1]
    assert all(".layers.1." in name for name in names[0])
    assert not (tmp_path / "02-b/base").exists(), "the same shape: the adapter is trained on"
    assert (tmp_path / "03-c/base").exists(), "another shape: it is merged, and a new one made"
    assert any(".layers.0." in name for name in names[2])
    assert not same(str(result["a"].policy), str(result["b"].policy))


def test_trainable_layers_are_trained_whole_beside_an_adapter_merged_and_gone_on_with(
    data: dict[str, str], tiny_model_path: str, tmp_path: Path
) -> None:
    lora = ADAPTER.model_copy(update={"merge": True})
    options = {"max_steps": 2, "learning_rate": 1e-2, "trainable_layers": ["layers.1.mlp.up_proj"]}
    first = stage("a", data["sft"], lora=ADAPTER, **options)
    second = stage("b", data["sft"], lora=lora, **options)
    result = run(tiny_model_path, tmp_path, first, second)
    assert any("layers.1.mlp.up_proj" in name for name in weights(str(result["a"].policy)))
    assert not (tmp_path / "02-b/base").exists()
    changed = moved(tiny_model_path, result["b"].policy)
    assert "model.layers.1.mlp.up_proj.weight" in changed
    assert "model.layers.0.mlp.up_proj.weight" not in changed


def test_t31_layers_are_unfrozen_from_the_top_epoch_by_epoch(
    data: dict[str, str], tiny_model_path: str, tmp_path: Path
) -> None:
    """Trap T31: a layer that a callback unfreezes has to be in the optimiser from the start."""
    options = {"max_steps": 0, "epochs": 3, "checkpoint_save_steps": 0, "learning_rate": 1e-2, "weight_decay": 0.5}
    run(tiny_model_path, tmp_path, stage("s", data["sft"], use_gradual_unfreezing=True, **options))
    found = []
    for step in (4, 8, 12):
        changed = moved(tiny_model_path, str(tmp_path / f"01-s/checkpoints/checkpoint-{step}"))
        found.append(sorted({next(one for one in ("layers.0", "layers.1", "norm", "embed") if one in name)
                             for name in changed if "layernorm" not in name}))  # fmt: skip
    assert found == [["layers.1", "norm"], ["layers.0", "layers.1", "norm"], ["embed", "layers.0", "layers.1", "norm"]]
    assert frozen(tmp_path / "01-s")["groups"] == 3


@pytest.mark.parametrize("lora", [None, ADAPTER], ids=["full", "lora"])
@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_a_killed_run_that_unfreezes_ends_with_the_same_bits(
    kind: str,
    lora: Any,
    data: dict[str, str],
    tiny_model_path: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options: dict[str, Any] = {"max_steps": 0, "epochs": 2, "use_gradual_unfreezing": True}
    if lora is None:
        options["frozen_layers"] = ["embedding", "lm_head"]
    only = stage("s", data[kind], kind, lora=lora, **options)
    whole = run(tiny_model_path, tmp_path / "whole", only)
    with monkeypatch.context() as patch:
        crash_at(patch, 5)
        with pytest.raises(StageError):
            run(tiny_model_path, tmp_path / "killed", only)
    resumed = run(tiny_model_path, tmp_path / "killed", only)
    assert same(str(whole.policy), str(resumed.policy))


def test_a_stage_forgets_what_an_8_bit_optimiser_registered(
    data: dict[str, str], tiny_model_path: str, tmp_path: Path
) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    manager = bitsandbytes.optim.GlobalOptimManager.get_instance()
    manager.initialize()
    manager.pid2config["left"] = {"optim_bits": 32}
    run(tiny_model_path, tmp_path, stage("s", data["sft"], max_steps=1))
    assert manager.pid2config == {}


def test_the_options_say_what_has_no_effect() -> None:
    def told(**options: Any) -> dict[str, str]:
        with pytest.raises(ConfigError) as caught:
            TrainingStage(name="s", training_data="rows.jsonl", **options)
        return {problem.path: problem.message for problem in caught.value.problems}

    assert told(gradual_unfreezing_interval=2) == {
        "gradual_unfreezing_interval": "has no effect without use_gradual_unfreezing: true"
    }
    assert list(told(trainable_layers=["lm_head"])) == ["trainable_layers"]
    assert list(told(freeze_base_model=True)) == ["freeze_base_model"]
    assert list(told(unfreeze_top_n_layers=1, frozen_layers=["layers.0"])) == ["unfreeze_top_n_layers"]
