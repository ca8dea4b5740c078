"""Every one of the 108 options has an effect that can be seen, or is refused: promise 1.

`docs/options.csv` says of each option what must differ between its two values; the cases here make it differ. A curve,
a weight, a row order, a file or a call of a real run; what is not built yet must be refused.
"""

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from stagekit import ConfigError, TrainingPipeline, TrainingStage
from stagekit.adapters import METHODS
from stagekit.pending import PENDING
from tests.every_option import (
    Case,
    adapter,
    card,
    checkpoints,
    curve,
    evaluated_steps,
    files,
    folder_name,
    kept,
    log_keys,
    logged_steps,
    model_of,
    paired,
    rates,
    result,
    texts,
    weight,
)


TABLE = list(csv.DictReader((Path(__file__).parent.parent / "docs" / "options.csv").open()))
NAMES = [row["flat_name"] for row in TABLE]

KIND = {"sft": "supervised_fine_tuning", "dpo": "preference_optimization"}
LORA = {"use_lora": True, "lora_rank": 4}
VALIDATED: dict[str, Any] = {"validation_data": "validation", "evaluation_steps": 1}
CALLS: list[str] = []


def first_half(dataset: Any, split: str) -> Any:
    return dataset.select(range(len(dataset) // 2))


def never(result: Any) -> bool:
    return False


def constant_metric(model: Any, dataset: Any) -> dict[str, float]:
    CALLS.append("evaluation")
    return {"mine": 1.0, "yours": 2.0}


def own_training_a(context: Any) -> dict[str, Any]:
    return {"metrics": {"which": 1.0}}


def own_training_b(context: Any) -> dict[str, Any]:
    return {"metrics": {"which": 2.0}}


ELSEWHERE = {"initial_loss_scale", "use_dynamic_loss_scaling"}
"""Options of fp16, which needs a GPU: `tests/test_precision.py` reads them back, and sees them refused elsewhere."""


def vowels(prompts: Any, completions: Any, **columns: Any) -> list[float]:
    SPIES["scored"] += len(completions)
    return [sum(letter in "aeiou" for letter in turns[0]["content"]) / 4 for turns in completions]


def letters_e(prompts: Any, completions: Any, **columns: Any) -> list[float]:
    return [turns[0]["content"].count("e") for turns in completions]


def heard(step: int, loss: float) -> None:
    SPIES["heard"] += 1


def doubled_loss(outputs: Any, labels: Any, num_items: Any) -> Any:
    import torch

    logits, wanted = outputs.logits[:, :-1], labels[:, 1:]
    total = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), wanted.flatten(), reduction="sum")
    return 2 * total / (num_items if num_items is not None else (wanted != -100).sum())


CASES: dict[str, Case] = {
    "adam_beta1": Case({"adam_beta1": 0.9}, {"adam_beta1": 0.5}, weight),
    "adam_beta2": Case({"adam_beta2": 0.999}, {"adam_beta2": 0.9}, weight),
    "adam_epsilon": Case({"adam_epsilon": 1e-8}, {"adam_epsilon": 0.1}, weight),
    "batch_size": Case({"batch_size": 4}, {"batch_size": 2}, curve),
    "callbacks": Case({}, {"callbacks": {"on_batch_complete": heard}}, lambda folder: SPIES["heard"]),
    "best_checkpoint_metric": Case(
        {"best_checkpoint_metric": "loss"},
        {"best_checkpoint_metric": "custom", "custom_metric_name": "mine"},
        lambda folder: best_metric(folder),
        {**VALIDATED, "save_only_best": True, "custom_evaluation_function": constant_metric},
    ),
    "best_checkpoint_metric_maximize": Case(
        {"best_checkpoint_metric_maximize": False},
        {"best_checkpoint_metric_maximize": True},
        checkpoints,
        {**VALIDATED, "save_only_best": True, "max_steps": 4, "learning_rate": 5e-3},
    ),
    "checkpoint_save_epochs": Case(
        {"checkpoint_save_epochs": 1}, {"checkpoint_save_epochs": 2}, checkpoints,
        {"max_steps": 0, "epochs": 2, "checkpoint_save_steps": 0},
    ),
    "checkpoint_save_steps": Case({"checkpoint_save_steps": 1}, {"checkpoint_save_steps": 2}, checkpoints),
    "constitutional_principles": Case(
        {"constitutional_principles": ["Be kind."]}, {"constitutional_principles": ["Be brief."]}, texts,
        kind="constitutional",
    ),
    "contrastive_margin": Case({"contrastive_margin": 0.1}, {"contrastive_margin": 1.0}, curve, kind="dpo"),
    "critique_model": Case({}, {"critique_model": "other"}, texts, kind="constitutional"),
    "critique_revision_rounds": Case(
        {"critique_revision_rounds": 1}, {"critique_revision_rounds": 2}, texts, kind="constitutional"
    ),
    "custom_evaluation_function": Case({}, {"custom_evaluation_function": constant_metric}, log_keys, VALIDATED),
    "custom_loss_function": Case({}, {"custom_loss_function": doubled_loss}, curve),
    "custom_metric_name": Case(
        {"custom_metric_name": "mine"}, {"custom_metric_name": "yours"}, lambda folder: best_metric(folder),
        {**VALIDATED, "save_only_best": True, "best_checkpoint_metric": "custom",
         "custom_evaluation_function": constant_metric},
    ),
    "custom_training_function": Case(
        {"custom_training_function": own_training_a}, {"custom_training_function": own_training_b}, result("metrics"),
        kind="custom",
    ),
    "data_mixing_ratios": Case(
        {"data_mixing_ratios": {"a": 1, "b": 1}}, {"data_mixing_ratios": {"a": 1, "b": 3}}, result("samples_trained"),
        {"training_data": "mix"},
    ),
    "data_preprocessor": Case({}, {"data_preprocessor": first_half}, result("samples_trained")),
    "data_shuffle_seed": Case({"data_shuffle_seed": 1}, {"data_shuffle_seed": 2}, curve),
    "description": Case({"description": "a"}, {"description": "b"}, result("description")),
    "distillation_alpha": Case({"distillation_alpha": 0.5}, {"distillation_alpha": 0.9}, curve, kind="distillation"),
    "distillation_layer_mapping": Case(
        {"distillation_layer_mapping": {}}, {"distillation_layer_mapping": {1: 0}}, curve,
        {"use_intermediate_distillation": True}, kind="distillation",
    ),
    "distillation_temperature": Case(
        {"distillation_temperature": 2.0}, {"distillation_temperature": 4.0}, curve, kind="distillation"
    ),
    "distributed_strategy": Case(
        {"distributed_strategy": "none"}, {"distributed_strategy": "ddp"}, result("processes")
    ),
    "dpo_beta": Case({"dpo_beta": 0.1}, {"dpo_beta": 0.9}, curve, kind="dpo"),
    "early_stopping": Case(
        {"early_stopping": {"patience": 1, "min_delta": 100.0}}, {"early_stopping": None}, result("steps"), VALIDATED
    ),
    "enabled": Case({"enabled": True}, {"enabled": False}, result("status")),
    "epochs": Case({"epochs": 1}, {"epochs": 2}, result("steps"), {"max_steps": 0}),
    "entropy_coefficient": Case({"entropy_coefficient": 0.01}, {"entropy_coefficient": 0.1}, curve, kind="ppo"),
    "gae_lambda": Case({"gae_lambda": 0.95}, {"gae_lambda": 0.5}, curve, kind="ppo"),
    "grpo_group_size": Case({"grpo_group_size": 4}, {"grpo_group_size": 2}, curve, kind="grpo"),
    "grpo_use_relative_rewards": Case(
        {"grpo_use_relative_rewards": True}, {"grpo_use_relative_rewards": False}, weight, kind="grpo"
    ),
    "kl_penalty_coefficient": Case(
        {"kl_penalty_coefficient": 0.01}, {"kl_penalty_coefficient": 0.5}, curve,
        {"ppo_epochs_per_batch": 1, "max_steps": 4}, "ppo",
    ),
    "ppo_clip_range": Case({"ppo_clip_range": 0.2}, {"ppo_clip_range": 0.01}, curve, kind="ppo"),
    "ppo_epochs_per_batch": Case(
        {"ppo_epochs_per_batch": 1}, {"ppo_epochs_per_batch": 2}, curve, {"max_steps": 4}, "ppo"
    ),
    "reward_model": Case({"reward_model": vowels}, {"reward_model": letters_e}, curve, kind="ppo"),
    "rollout_samples": Case(
        {"rollout_samples": 8}, {"rollout_samples": 16}, lambda folder: SPIES["scored"], kind="ppo"
    ),
    "value_function_coefficient": Case(
        {"value_function_coefficient": 0.5}, {"value_function_coefficient": 0.0}, curve, kind="ppo"
    ),
    "evaluation_steps": Case(
        {"evaluation_steps": 1}, {"evaluation_steps": 2}, evaluated_steps, {"validation_data": "validation"}
    ),
    "fine_tuning_method": Case({"fine_tuning_method": "dpo"}, {"fine_tuning_method": "ipo"}, curve, kind="dpo"),
    "freeze_base_model": Case(
        {"freeze_base_model": False}, {"freeze_base_model": True, "trainable_layers": ["layers.1"]}, weight
    ),
    "frozen_layers": Case({"frozen_layers": []}, {"frozen_layers": ["layers.0"]}, weight),
    "gradual_unfreezing_interval": Case(
        {"gradual_unfreezing_interval": 1}, {"gradual_unfreezing_interval": 2}, weight,
        {"use_gradual_unfreezing": True, "max_steps": 0, "epochs": 2},
    ),
    "gradient_accumulation_steps": Case(
        {"gradient_accumulation_steps": 1}, {"gradient_accumulation_steps": 2}, curve
    ),
    "is_evaluation_only": Case(
        {"training_data": "rows"}, {"is_evaluation_only": True, "training_data": None}, result("steps"), VALIDATED
    ),
    "learning_rate": Case({"learning_rate": 1e-4}, {"learning_rate": 1e-2}, weight),
    "log_gradient_norms": Case({"log_gradient_norms": False}, {"log_gradient_norms": True}, log_keys),
    "log_learning_rate": Case({"log_learning_rate": True}, {"log_learning_rate": False}, log_keys),
    "logging_steps": Case({"logging_steps": 1}, {"logging_steps": 2}, logged_steps),
    "lora_alpha": Case({"lora_alpha": 1.0}, {"lora_alpha": 64.0}, weight, LORA),
    "lora_dropout": Case({"lora_dropout": 0.0}, {"lora_dropout": 0.5}, weight, {**LORA, "learning_rate": 1e-2}),
    "lora_rank": Case({"lora_rank": 2}, {"lora_rank": 4}, adapter, {"use_lora": True}),
    "lora_target_modules": Case(
        {"lora_target_modules": ["q_proj"]}, {"lora_target_modules": ["v_proj"]}, adapter, LORA
    ),
    "max_checkpoints_to_keep": Case(
        {"max_checkpoints_to_keep": 1}, {"max_checkpoints_to_keep": 3}, checkpoints, {"checkpoint_save_steps": 1}
    ),
    "max_duration": Case({"max_duration": "1h"}, {"max_duration": "0.001s"}, result("status", "reason")),
    "max_gradient_norm": Case({"max_gradient_norm": 1.0}, {"max_gradient_norm": 1e-6}, weight),
    "max_steps": Case({"max_steps": 1}, {"max_steps": 2}, result("steps")),
    "max_training_samples": Case(
        {"max_training_samples": 4}, {"max_training_samples": 8}, result("samples_trained")
    ),
    "merge_lora_after_training": Case(
        {"merge_lora_after_training": False}, {"merge_lora_after_training": True}, files, LORA
    ),
    "metadata": Case({"metadata": {"a": 1}}, {"metadata": {"a": 2}}, result("metadata")),
    "metrics_to_track": Case(
        {"metrics_to_track": ["loss"]}, {"metrics_to_track": ["loss", "perplexity"]},
        lambda folder: sorted(result("metrics")(folder)[0]), VALIDATED,
    ),
    "min_learning_rate": Case({"min_learning_rate": 0.0}, {"min_learning_rate": 5e-4}, rates),
    "mixed_precision_dtype": Case(
        {"use_mixed_precision": True, "mixed_precision_dtype": "bf16"}, {}, curve
    ),
    "name": Case({"name": "one"}, {"name": "other"}, folder_name),
    "num_cycles": Case(
        {"num_cycles": 1}, {"num_cycles": 3}, rates,
        {"scheduler_type": "cosine_annealing_warm_restarts", "max_steps": 4},
    ),
    "optimizer_override": Case({"optimizer_override": "adamw"}, {"optimizer_override": "sgd"}, weight),
    "options": Case({"options": {"max_length": 64}}, {"options": {"max_length": 24}}, curve),
    "preference_label_smoothing": Case(
        {"preference_label_smoothing": 0.1}, {"preference_label_smoothing": 0.4}, curve,
        {"preference_loss_type": "conservative"}, kind="dpo",
    ),
    "preference_loss_type": Case(
        {"preference_loss_type": "sigmoid"}, {"preference_loss_type": "ipo"}, curve, kind="dpo"
    ),
    "qlora_bits": Case(
        {"qlora_bits": 4}, {"qlora_bits": 8}, curve,
        {"use_qlora": True, "use_mixed_precision": True, "mixed_precision_dtype": "bf16"},
    ),
    "random_seed": Case({"random_seed": 1}, {"random_seed": 2}, curve),
    "reference_model_update_interval": Case(
        {"reference_model_update_interval": 1}, {"reference_model_update_interval": 100}, curve,
        {"update_reference_model": True, "learning_rate": 5e-3, "warmup_ratio": 0.0}, kind="dpo",
    ),
    "run_condition": Case({}, {"run_condition": never}, result("status", "reason")),
    "rejection_sampling_min_reward": Case(
        {"rejection_sampling_min_reward": 0.0}, {"rejection_sampling_min_reward": 25.0}, kept,
        {"rejection_sampling_top_k": 4}, kind="rejection_sampling",
    ),
    "rejection_sampling_n": Case(
        {"rejection_sampling_n": 6}, {"rejection_sampling_n": 3}, kept, kind="rejection_sampling"
    ),
    "rejection_sampling_top_k": Case(
        {"rejection_sampling_top_k": 1}, {"rejection_sampling_top_k": 2}, kept, kind="rejection_sampling"
    ),
    "save_checkpoint_after": Case(
        {"save_checkpoint_after": True}, {"save_checkpoint_after": False},
        lambda folder: model_of(folder).exists(), {"then": True},
    ),
    "save_only_best": Case(
        {"save_only_best": False},
        {"save_only_best": True, "best_checkpoint_metric": "custom", "custom_metric_name": "mine"},
        checkpoints,
        {**VALIDATED, "custom_evaluation_function": constant_metric},  # never gets better: the first state is the best
    ),
    "scheduler_power": Case(
        {"scheduler_power": 1.0}, {"scheduler_power": 3.0}, rates, {"scheduler_type": "polynomial"}
    ),
    "scheduler_type": Case({"scheduler_type": "constant"}, {"scheduler_type": "linear_warmup"}, rates),
    "self_play_iterations": Case(
        {"self_play_iterations": 1}, {"self_play_iterations": 2}, paired, kind="self_play"
    ),
    "self_play_responses_per_prompt": Case(
        {"self_play_responses_per_prompt": 3}, {"self_play_responses_per_prompt": 2}, paired, kind="self_play"
    ),
    "self_play_temperature": Case(
        {"self_play_temperature": 0.7}, {"self_play_temperature": 1.5}, paired, kind="self_play"
    ),
    "share_reference_model": Case(
        {"share_reference_model": True}, {"share_reference_model": False}, lambda folder: loads(folder), kind="dpo"
    ),
    "shuffle_data": Case({"shuffle_data": True}, {"shuffle_data": False}, curve),
    "stage_type": Case(
        {"stage_type": "supervised_fine_tuning", "training_data": "rows"},
        {"stage_type": "preference_optimization", "training_data": "pairs"}, result("type"), kind="",
    ),
    "tags": Case({"tags": ["mine"]}, {"tags": ["yours"]}, card),
    "teacher_model": Case({"teacher_model": "other"}, {"teacher_model": "same"}, curve, kind="distillation"),
    "trainable_layers": Case(
        {"trainable_layers": ["layers.0"]}, {"trainable_layers": ["layers.1"]}, weight, {"freeze_base_model": True}
    ),
    "training_data": Case({"training_data": "rows"}, {"training_data": "validation"}, curve),
    "unfreeze_top_n_layers": Case({"unfreeze_top_n_layers": 0}, {"unfreeze_top_n_layers": 1}, weight),
    "update_reference_model": Case(
        {}, {"update_reference_model": True, "reference_model_update_interval": 1}, curve,
        {"learning_rate": 5e-3, "warmup_ratio": 0.0}, kind="dpo",
    ),
    "use_deterministic_algorithms": Case(
        {"use_deterministic_algorithms": False}, {"use_deterministic_algorithms": True}, lambda folder: spied(folder)
    ),
    "use_gradient_checkpointing": Case(
        {"use_gradient_checkpointing": False}, {"use_gradient_checkpointing": True}, lambda folder: spied(folder)
    ),
    "use_gradual_unfreezing": Case({"use_gradual_unfreezing": False}, {"use_gradual_unfreezing": True}, weight),
    "use_intermediate_distillation": Case(
        {"use_intermediate_distillation": False}, {"use_intermediate_distillation": True}, curve, kind="distillation"
    ),
    "use_lora": Case({"use_lora": False}, {"use_lora": True}, files),
    "use_mixed_precision": Case(
        {"use_mixed_precision": False}, {"use_mixed_precision": True, "mixed_precision_dtype": "bf16"}, curve
    ),
    "use_qlora": Case(
        {"use_lora": True}, {"use_qlora": True}, curve, {"use_mixed_precision": True, "mixed_precision_dtype": "bf16"}
    ),
    "use_reference_model": Case({"use_reference_model": True}, {"use_reference_model": False}, curve, kind="dpo"),
    "validation_data": Case({}, {"validation_data": "validation", "evaluation_steps": 1}, log_keys),
    "warmup_ratio": Case({"warmup_ratio": 0.0}, {"warmup_ratio": 0.9}, rates),
    "warmup_steps": Case({"warmup_steps": 1}, {"warmup_steps": 2}, rates),
    "weight_decay": Case({"weight_decay": 0.0}, {"weight_decay": 0.9}, weight, {"learning_rate": 1e-2}),
}  # fmt: skip

SPIES: dict[str, Any] = {}


def best_metric(folder: Path) -> Any:
    """The metric that the trainer's state calls the best."""
    newest = max((folder / "checkpoints").glob("checkpoint-*"), key=lambda path: path.stat().st_mtime)
    plan = json.loads((folder / "plan.json").read_text())
    names = [one["value"] for one in plan["settings"] if one["target"] == "metric_for_best_model"]
    return names, json.loads((newest / "trainer_state.json").read_text())["best_metric"]


def loads(folder: Path) -> Any:
    return SPIES["models loaded"]


def spied(folder: Path) -> Any:
    return SPIES["deterministic"], SPIES["checkpointing"]


@pytest.fixture(autouse=True)
def spies(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Calls that leave no other trace: switches of torch, checkpointing, models that TRL loads."""
    import torch
    import transformers.modeling_utils

    SPIES.update({"deterministic": 0, "checkpointing": 0, "models loaded": 0, "heard": 0, "scored": 0})

    def counting(name: str, original: Callable[..., Any], counts: Callable[..., bool]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            SPIES[name] += counts(*args, **kwargs)
            return original(*args, **kwargs)

        return call

    deterministic = torch.use_deterministic_algorithms
    monkeypatch.setattr(
        torch,
        "use_deterministic_algorithms",
        counting("deterministic", deterministic, lambda on, **kwargs: bool(on)),
    )
    checkpointing = transformers.modeling_utils.checkpoint
    monkeypatch.setattr(
        transformers.modeling_utils, "checkpoint", counting("checkpointing", checkpointing, lambda *a, **k: True)
    )
    from trl.trainer import dpo_trainer, kto_trainer

    for module in (dpo_trainer, kto_trainer):
        load = module.create_model_from_path
        monkeypatch.setattr(module, "create_model_from_path", counting("models loaded", load, lambda *a, **k: True))
    yield


DEFAULTS: dict[str, dict[str, Any]] = {
    "sft": {"stage_type": KIND["sft"], "training_data": "rows"},
    "dpo": {"stage_type": KIND["dpo"], "training_data": "pairs"},
    "constitutional": {
        "stage_type": "constitutional",
        "training_data": "prompts",
        "generation": {"max_new_tokens": 24},
    },
    "ppo": {
        "stage_type": "proximal_policy_optimization",
        "training_data": "questions",
        "reward_model": vowels,
        "rollout_samples": 8,
        "generation": {"max_new_tokens": 6},
    },
    "grpo": {
        "stage_type": "group_relative_policy_optimization",
        "training_data": "questions",
        "reward_model": vowels,
        "rollout_samples": 8,
        "generation": {"max_new_tokens": 6},
    },
    "rejection_sampling": {
        "stage_type": "rejection_sampling",
        "training_data": "prompts",
        "reward_model": "tests.answers:by_length",
        "rejection_sampling_n": 6,
        "generation": {"max_new_tokens": 24},
    },
    "self_play": {
        "stage_type": "self_play",
        "training_data": "rows",
        "max_training_samples": 4,
        "self_play_iterations": 1,
        "generation": {"max_new_tokens": 24},
        "learning_rate": 1e-4,
    },
    "custom": {"stage_type": "custom"},
    "distillation": {
        "stage_type": "knowledge_distillation",
        "training_data": "rows",
        "teacher_model": "other",
    },
    "": {},
}
"""What the stages of each kind have."""


class World:
    """Data and models that the cases name by short words."""

    def __init__(self, tmp_path: Path, model: str, sft: list[Any], pairs: list[Any]) -> None:
        self.tmp_path, self.model = tmp_path, model
        self.files = {
            "rows": self._write("rows", sft),
            "validation": self._write("validation", sft[::-1][:6]),
            "pairs": self._write("pairs", pairs),
            "prompts": self._write("prompts", [{"prompt": row["prompt"]} for row in sft[:4]]),
            "questions": self._write("questions", [{"prompt": row["prompt"]} for row in sft]),
        }

    def _write(self, name: str, rows: list[Any]) -> str:
        path = self.tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    def options(self, case: Case, given: Mapping[str, Any]) -> dict[str, Any]:
        trains = {"max_steps": 3, "batch_size": 4, "logging_steps": 1, "learning_rate": 1e-3}
        base = {**({} if case.kind == "custom" else trains), **DEFAULTS[case.kind]}
        options = {"name": "stage", **base, **case.shared, **given}
        if options.get("is_evaluation_only"):
            options = {
                key: value
                for key, value in options.items()
                if key not in {"max_steps", "logging_steps", "learning_rate"}
            }
        if options.get("data_shuffle_seed") is None and "max_steps" in options and options["max_steps"] == 0:
            del options["max_steps"]
        for key in ("training_data", "validation_data"):
            word = options.get(key)
            if word == "mix":
                options[key] = {"a": self.files["rows"], "b": self.files["validation"]}
            elif word is not None:
                options[key] = self.files[word]
        models = {"other": self.other, "same": lambda: self.model}
        for key in ("critique_model", "teacher_model"):
            if key in options:
                options[key] = models[options[key]]()
        return {key: value for key, value in options.items() if value is not None or key == "early_stopping"}

    def other(self) -> str:
        """A second model of other weights."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        path = self.tmp_path / "other"
        if not path.exists():
            model = AutoModelForCausalLM.from_pretrained(self.model)
            for parameter in model.parameters():
                parameter.data.mul_(1.1)
            model.save_pretrained(path)
            AutoTokenizer.from_pretrained(self.model).save_pretrained(path)
        return str(path)

    def run(self, case: Case, given: Mapping[str, Any], label: str) -> Any:
        options = self.options(case, given)
        then = options.pop("then", False)
        stages = [TrainingStage(**options)]
        if then:
            stages += [TrainingStage(**{**options, "name": name, "save_checkpoint_after": True}) for name in ("next",)]
        folder = self.tmp_path / label
        SPIES.update(dict.fromkeys(SPIES, 0))
        pipeline = TrainingPipeline(name="t", model=self.model, output_dir=folder, stages=tuple(stages))
        pipeline.run(quiet=True, isolate="ddp" in options.values())  # several processes have to be started
        return case.observe(next(path for path in sorted(folder.glob("01-*"))))


@pytest.fixture
def world(tmp_path: Path, tiny_model_path: str, sft_rows: list[Any], preference_rows: list[Any]) -> World:
    return World(tmp_path, tiny_model_path, sft_rows, preference_rows)


BUILT = [name for name in NAMES if name not in PENDING and name not in ELSEWHERE]


@pytest.mark.parametrize("name", BUILT)
def test_the_two_values_of_an_option_make_a_difference_that_can_be_seen(name: str, world: World) -> None:
    case = CASES[name]
    first, second = world.run(case, case.a, "a"), world.run(case, case.b, "b")
    assert first != second, f"{name}: {dict(case.a)} and {dict(case.b)} both gave {str(first)[:200]}"


@pytest.mark.parametrize("name", ["learning_rate", "dpo_beta", "shuffle_data", "lora_dropout", "critique_model"])
def test_the_same_value_twice_makes_no_difference(name: str, world: World) -> None:
    """One of each observable: what differs above is the option, not the run."""
    case = CASES[name]
    assert world.run(case, case.a, "a") == world.run(case, case.a, "b")


@pytest.mark.parametrize("name", [name for name in NAMES if name in PENDING])
def test_an_option_that_is_not_built_is_refused_when_it_is_set(name: str) -> None:
    row = next(row for row in TABLE if row["flat_name"] == name)
    kind = next((one for one in row["stage_types"].split() if one in METHODS), "sft")
    value = yaml.safe_load(row["value_b"])
    with pytest.raises(ConfigError, match="not built yet"):
        TrainingStage(name="s", method={"type": kind}, training_data="x.jsonl", **{name: value})


def test_the_table_has_every_name_once_and_says_how_many_are_effective(capsys: pytest.CaptureFixture[str]) -> None:
    from stagekit.flat import FLAT

    assert sorted(NAMES) == sorted(FLAT)
    assert set(BUILT) == set(CASES)
    with capsys.disabled():
        print(f"\neffective {len(BUILT) + len(ELSEWHERE)}/{len(NAMES)}, {len(ELSEWHERE)} of them seen on a GPU only")


@pytest.mark.parametrize(("name", "value"), [("initial_loss_scale", 2.0), ("use_dynamic_loss_scaling", False)])
def test_loss_scaling_is_refused_where_there_is_none(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=name):
        TrainingStage(name="s", method="sft", training_data="x.jsonl", **{name: value})


@pytest.mark.gpu
@pytest.mark.parametrize("scale", [2.0, 1024.0])
def test_the_initial_loss_scale_is_that_of_the_trainers_scaler(scale: float, world: World) -> None:
    given = {"use_mixed_precision": True, "mixed_precision_dtype": "fp16", "initial_loss_scale": scale}
    case = Case(given, given, curve)
    assert world.run(case, given, "a")
