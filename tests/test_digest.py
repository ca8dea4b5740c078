"""A stage's digest: it changes with what the result depends on, and with nothing else."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from stagekit import TrainingPipeline, TrainingStage
from stagekit.adapters import BUILT
from stagekit.digest import digests
from stagekit.flat import FLAT, default_of
from stagekit.pending import PENDING
from stagekit.stage_options import StageOptions


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder and two sets of data, small."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    (tmp_path / "model/model.safetensors").write_bytes(b"weights")
    for name in ("train", "held"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"prompt": "a", "completion": name}) + "\n")
    return tmp_path


def digest(folder: Path, *stages: dict[str, Any], at: int = -1, **given: Any) -> str | None:
    """The digest of one stage of a pipeline with these stages (one by default)."""
    filled = [
        TrainingStage(**{"name": f"s{index}", "training_data": str(folder / "train.jsonl"), **one})
        for index, one in enumerate(stages or ({},))
    ]
    pipeline = TrainingPipeline(**{"model": str(folder / "model"), "stages": tuple(filled), **given})
    return list(digests(pipeline).values())[at]


SAYS_NOTHING = {"description", "tags", "metadata", "enabled", "save_checkpoint_after", "max_duration", "callbacks"}
OTHER: dict[str, Any] = {
    "name": "other", "training_data": "held.jsonl", "validation_data": "held.jsonl", "learning_rate": 1e-4,
    "description": "x", "tags": ["x"], "metadata": {"a": 1}, "max_duration": "1h", "data_shuffle_seed": 1,
    "max_training_samples": 5, "run_condition": "json:loads", "data_preprocessor": "json:loads",
    "optimizer_override": "sgd", "scheduler_type": "constant", "mixed_precision_dtype": "bf16",
    "custom_evaluation_function": "json:loads", "early_stopping": {"patience": 1}, "metrics_to_track": ["loss"],
    "best_checkpoint_metric": "accuracy", "custom_metric_name": "f1", "use_lora": True, "lora_target_modules": ["x"],
    "qlora_bits": 8, "options": {"max_length": 5}, "critique_model": "some/model",
    "constitutional_principles": ["Be kind."], "custom_training_function": "json:loads",
    "preference_loss_type": "ipo", "use_reference_model": True, "warmup_ratio": 0.3,
    "min_learning_rate": 1e-9, "adam_beta1": 0.8, "adam_beta2": 0.8, "lora_dropout": 0.2,
    "frozen_layers": ["layers.0"], "trainable_layers": ["lm_head"], "callbacks": {"on_stage_start": "json:loads"},
    "reward_model": "json:dumps", "gae_lambda": 0.5, "rollout_samples": 64, "grpo_group_size": 2,
    "custom_loss_function": "json:loads", "contrastive_margin": 0.5, "preference_label_smoothing": 0.2,
    "distributed_strategy": "ddp",
    "distillation_alpha": 0.9, "distillation_layer_mapping": {1: 0}, "teacher_model": "other/teacher",
}  # fmt: skip
FP16 = {"use_mixed_precision": True, "mixed_precision_dtype": "fp16"}
BESIDE: dict[str, dict[str, Any]] = {
    "preference_label_smoothing": {"method": {"type": "dpo", "loss": "aot"}},
    "reference_model_update_interval": {"update_reference_model": True},
    "freeze_base_model": {"use_lora": True},
    "trainable_layers": {"use_lora": True},
    "gradual_unfreezing_interval": {"use_gradual_unfreezing": True},
    "initial_loss_scale": FP16,
    "mixed_precision_dtype": {"use_mixed_precision": True},
    "num_cycles": {"scheduler_type": "cosine_annealing_warm_restarts"},
    "scheduler_power": {"scheduler_type": "polynomial"},
    "share_reference_model": {"use_reference_model": True},
    "qlora_bits": {"use_qlora": True, "use_lora": True},
    "custom_metric_name": {
        "validation_data": "held.jsonl",
        "save_only_best": True,
        "best_checkpoint_metric": "custom",
        "custom_evaluation_function": "json:loads",
    },
    **{
        name: {"use_lora": True}
        for name in (
            "lora_rank",
            "lora_alpha",
            "lora_dropout",
            "lora_target_modules",
            "merge_lora_after_training",
            "use_qlora",
        )
    },
    **{
        name: {"validation_data": "held.jsonl"}
        for name in (
            "evaluation_steps",
            "early_stopping",
            "metrics_to_track",
            "custom_evaluation_function",
            "save_only_best",
        )
    },
    **{
        name: {"validation_data": "held.jsonl", "save_only_best": True}
        for name in ("best_checkpoint_metric", "best_checkpoint_metric_maximize")
    },
    **{
        name: {"reward_model": "json:loads"}
        for name in ("rejection_sampling_n", "rejection_sampling_top_k", "rejection_sampling_min_reward")
    },
    "is_evaluation_only": {"validation_data": "held.jsonl", "training_data": None},
    **{
        name: {"stage_type": "knowledge_distillation", "teacher_model": "a/teacher"}
        for name in (
            "distillation_alpha",
            "distillation_temperature",
            "use_intermediate_distillation",
            "teacher_model",
        )
    },
    "distillation_layer_mapping": {"stage_type": "feature_distillation", "teacher_model": "a/teacher"},
}
"""What must stand beside an option for it to have an effect."""

ALONE = {"stage_type", "fine_tuning_method", "data_mixing_ratios", "custom_training_function", "use_reference_model",
         "use_dynamic_loss_scaling"}  # fmt: skip
"""Options that other tests here change, and one that has one value only."""


@pytest.mark.parametrize("name", sorted(set(FLAT) - set(PENDING) - ALONE))
def test_the_digest_changes_with_every_option_that_changes_the_result(folder: Path, name: str) -> None:
    kinds = {"constitutional_principles": "constitutional", "critique_model": "constitutional",
             "critique_revision_rounds": "constitutional", "dpo_beta": "dpo", "preference_loss_type": "dpo",
             "contrastive_margin": "dpo",
             "update_reference_model": "dpo", "reference_model_update_interval": "dpo",
             "share_reference_model": "dpo", "reward_model": "ppo", "kl_penalty_coefficient": "ppo",
             "ppo_clip_range": "ppo", "value_function_coefficient": "ppo", "entropy_coefficient": "ppo",
             "gae_lambda": "ppo", "ppo_epochs_per_batch": "ppo", "rollout_samples": "ppo", "grpo_group_size": "grpo",
             "grpo_use_relative_rewards": "grpo",
             "self_play_iterations": "self_play", "self_play_responses_per_prompt": "self_play",
             "self_play_temperature": "self_play",
             "rejection_sampling_n": "rejection_sampling", "rejection_sampling_top_k": "rejection_sampling",
             "rejection_sampling_min_reward": "rejection_sampling"}  # fmt: skip
    default = default_of(name)
    other = OTHER[name] if name in OTHER else not default if isinstance(default, bool) else default + 1
    beside: dict[str, Any] = dict(BESIDE.get(name, {}))
    if name == "preference_loss_type":
        beside["fine_tuning_method"] = "dpo"
    elif name in kinds:
        beside["method"] = kinds[name]
    if kinds.get(name) in {"ppo", "grpo"} and name != "reward_model":
        beside["reward_model"] = "json:loads"
    before, after = dict(beside), {**beside, name: other}
    if name == "custom_metric_name":
        before[name] = "before"
    if name == "reward_model":
        before[name] = "json:loads"
    if name == "is_evaluation_only":
        del before["training_data"]

    def placed(given: dict[str, Any]) -> dict[str, Any]:
        return {key: str(folder / value) if value == "held.jsonl" else value for key, value in given.items()}

    changed = digest(folder, placed(before)) != digest(folder, placed(after))
    assert changed == (name not in SAYS_NOTHING)


def test_the_digest_changes_with_the_type_and_with_options_outside_the_108(folder: Path) -> None:
    constitutional = {"method": "constitutional"}
    told = [
        {}, {"method": "dpo"}, constitutional, {**constitutional, "generation": {"temperature": 0}},
        {"method": {"type": "constitutional", "target": "final"}}, {"method": "dpo", "reference": {"mode": "copy"}},
        {"model": str(folder / "model"), "name": "own"}, {"gate": {"metric": "loss", "at_most": 1}},
        {"lora": {"rank": 4}}, {"lora": {"rank": 4, "rslora": True}}, {"lora": {"rank": 4, "dora": True}},
    ]  # fmt: skip
    assert len({digest(folder, one) for one in told}) == len(told)


def test_the_digest_is_the_same_for_the_same_pipeline_and_either_spelling(folder: Path) -> None:
    assert digest(folder) == digest(folder) is not None
    assert digest(folder, {"lora": {"rank": 4}}) == digest(folder, {"use_lora": True, "lora_rank": 4})
    assert digest(folder, {"epochs": 3}) == digest(folder)


@pytest.mark.parametrize("edited", ["train.jsonl", "model/model.safetensors", "model/config.json"])
def test_the_digest_changes_with_the_content_of_data_and_model(folder: Path, edited: str) -> None:
    before = digest(folder)
    (folder / edited).write_bytes((folder / edited).read_bytes() + b" ")
    assert digest(folder) != before


def test_the_digest_does_not_change_with_where_the_data_lie(folder: Path) -> None:
    (folder / "moved.jsonl").write_bytes((folder / "train.jsonl").read_bytes())
    assert digest(folder, {"training_data": str(folder / "moved.jsonl")}) == digest(folder)


def test_the_digest_changes_with_columns_split_and_shares(folder: Path) -> None:
    source = str(folder / "train.jsonl")
    mixed = {"training_data": {"a": source, "b": source}, "data_mixing_ratios": {"a": 1, "b": 1}}
    told = [
        {}, {"training_data": {"source": source, "columns": {"prompt": "prompt"}}}, mixed,
        {**mixed, "data_mixing_ratios": {"a": 1, "b": 2}},
    ]  # fmt: skip
    assert len({digest(folder, one) for one in told}) == len(told)


def test_the_digest_of_a_later_stage_changes_with_an_earlier_one(folder: Path) -> None:
    plain = digest(folder, {}, {})
    assert digest(folder, {"epochs": 1}, {}) != plain
    assert digest(folder, {"description": "x"}, {}) == plain
    assert digest(folder, {"enabled": False}, {}) != plain
    assert digest(folder, {}, {"model": str(folder / "model")}) == digest(
        folder, {"epochs": 1}, {"model": str(folder / "model")}
    )


def test_a_stage_that_only_measures_changes_nothing_after_it(folder: Path) -> None:
    measured = {"method": "evaluation", "training_data": None, "validation_data": str(folder / "held.jsonl")}
    assert digest(folder, measured, {}) == digest(folder, {**measured, "batch_size": 1}, {})


def test_the_digest_changes_with_the_stage_that_its_data_and_its_critic_come_from(folder: Path) -> None:
    later = {"method": "dpo", "training_data": "stage:s0/preferences", "model": str(folder / "model")}
    first = {"method": "constitutional"}
    assert digest(folder, first, later) != digest(folder, {"method": {"type": "constitutional", "rounds": 3}}, later)
    critic = {"method": {"type": "constitutional", "critique_model": "stage:s0"}, "model": str(folder / "model")}
    assert digest(folder, {}, critic) != digest(folder, {"epochs": 1}, critic)


def test_the_digest_changes_with_the_chat_template_and_its_file(folder: Path) -> None:
    file = folder / "chat.jinja"
    file.write_text("{{ messages }}")
    before = digest(folder, chat_template=str(file))
    assert before != digest(folder)
    assert before == digest(folder, chat_template="{{ messages }}")
    file.write_text("{{ messages[0] }}")
    assert before != digest(folder, chat_template=str(file))


def test_the_digest_changes_with_the_file_of_a_function(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(folder))
    (folder / "own_functions_for_digest.py").write_text("def f(dataset, split): return dataset\n")
    given = {"data_preprocessor": "own_functions_for_digest:f"}
    before = digest(folder, given)
    assert before != digest(folder)
    (folder / "own_functions_for_digest.py").write_text("def f(dataset, split): return dataset.select([0])\n")
    assert digest(folder, given) != before


def test_metadata_counts_where_the_stage_s_function_reads_it(folder: Path) -> None:
    custom = {"method": {"type": "custom", "function": "json:loads"}}
    assert digest(folder, {**custom, "metadata": {"a": 1}}) != digest(folder, {**custom, "metadata": {"a": 2}})


def module_level(dataset: Any, split: str) -> Any:
    return dataset


class Preprocessor:
    """A function with a state."""

    def __call__(self, dataset: Any, split: str) -> Any:
        return dataset

    def method(self, dataset: Any, split: str) -> Any:
        return dataset


def closure() -> Callable[..., Any]:
    def inner(dataset: Any, split: str) -> Any:
        return dataset

    return inner


@pytest.mark.parametrize(
    ("function", "known"),
    [
        (json.loads, True),
        (lambda dataset, split: dataset, False),
        (closure(), False),
        (functools.partial(module_level, split="train"), False),
        (Preprocessor(), False),
        (Preprocessor().method, False),
    ],
)
def test_a_live_function_that_its_name_does_not_tell_makes_the_stage_run_always(
    folder: Path, function: Any, known: bool
) -> None:
    assert (digest(folder, {"data_preprocessor": function}) is not None) == known


def test_callbacks_observe_so_that_no_function_among_them_changes_the_digest(folder: Path) -> None:
    given = {"callbacks": {"on_batch_complete": lambda step, loss: None, "on_stage_start": "no_such_module:f"}}
    assert digest(folder, given) == digest(folder) is not None


def test_a_live_model_makes_its_stage_and_those_after_it_run_always(folder: Path) -> None:
    live = SimpleNamespace(config={})
    assert digest(folder, model=live) is None
    assert digest(folder, {"model": live}, {}) is None
    assert digest(folder, {"model": live}, {"model": str(folder / "model")}) is not None
    assert digest(folder, {"method": {"type": "constitutional", "critique_model": live}}) is None


def test_live_data_are_told_by_their_fingerprint(folder: Path) -> None:
    def data(fingerprint: str | None) -> Any:
        return SimpleNamespace(column_names=["text"], _fingerprint=fingerprint)

    assert digest(folder, {"training_data": data(None)}) is None
    assert digest(folder, {"training_data": data("a")}) != digest(folder, {"training_data": data("b")})


def test_the_tables_above_are_of_options_that_exist() -> None:
    assert set(OTHER) | set(BESIDE) | ALONE <= set(FLAT)
    assert set(StageOptions.model_fields) >= SAYS_NOTHING
    assert {"sft", "dpo", "kto", "orpo", "cpo", "simpo", "reward", "constitutional", "evaluation", "custom"} <= set(
        BUILT
    )
