"""From a stage to TRL's arguments: what, from where, and what `trl` may and may not say."""

from typing import Any

import pytest

from stagekit import DPO, ConfigError, LoRA, TrainingPipeline, TrainingStage
from stagekit.adapters import BUILT, METHODS
from stagekit.arguments import RESERVED, settings_of
from stagekit.trl_fields import fields_of


def stage(**given: Any) -> TrainingStage:
    return TrainingStage(**{"name": "a", "training_data": "rows.jsonl", **given})


def values(**given: Any) -> dict[str, Any]:
    return {setting.target: setting.value for setting in settings_of(stage(**given))}


def sources(**given: Any) -> dict[str, str]:
    return {setting.target: setting.source for setting in settings_of(stage(**given))}


BARE_SFT = {
    "activation_checkpointing": False,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "bf16": False,
    "dataloader_pin_memory": False,
    "disable_tqdm": True,
    "eval_strategy": "no",
    "fp16": False,
    "full_determinism": False,
    "gradient_accumulation_steps": 1,
    "learning_rate": 2e-5,
    "logging_steps": 10,
    "logging_strategy": "steps",
    "lr_scheduler_type": "cosine",
    "max_grad_norm": 1.0,
    "max_steps": -1,
    "num_train_epochs": 3,
    "optim": "adamw_torch_fused",
    "per_device_eval_batch_size": 8,
    "per_device_train_batch_size": 8,
    "report_to": "none",
    "save_steps": 500,
    "save_strategy": "steps",
    "save_total_limit": 3,
    "seed": 42,
    "train_sampling_strategy": "random",
    "warmup_steps": 0.1,
    "weight_decay": 0.01,
}
"""A bare SFT stage: the specification's defaults in TRL's words."""


def test_a_bare_sft_stage_gives_the_specification_s_defaults_in_trl_s_words() -> None:
    assert values() == BARE_SFT


def test_a_bare_dpo_stage_adds_its_loss_and_its_reference() -> None:
    assert values(method="dpo") == {
        **BARE_SFT,
        "learning_rate": 1e-6,
        "loss_type": ["sigmoid"],
        "beta": 0.1,
        "precompute_ref_log_probs": True,
    }


def test_a_full_sft_stage_says_everything() -> None:
    assert values(
        epochs=2, max_steps=7, batch_size=4, gradient_accumulation_steps=2, use_gradient_checkpointing=True,
        random_seed=1, use_deterministic_algorithms=True, max_gradient_norm=0, optimizer_override="nesterov",
        learning_rate="3e-4", weight_decay=0, scheduler_type="polynomial", scheduler_power=2, min_learning_rate=1e-5,
        warmup_steps=3, use_mixed_precision=True, mixed_precision_dtype="bf16", shuffle_data=False,
        validation_data="v.jsonl", evaluation_steps=5, logging_steps=0, checkpoint_save_steps=0,
        max_checkpoints_to_keep=1, trl={"max_length": 64, "report_to": "wandb"},
    ) == {
        "activation_checkpointing": True,
        "bf16": True,
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
        "eval_steps": 5,
        "eval_strategy": "steps",
        "fp16": False,
        "full_determinism": True,
        "gradient_accumulation_steps": 2,
        "learning_rate": 3e-4,
        "logging_strategy": "no",
        "lr_scheduler_kwargs": {"power": 2.0, "lr_end": 1e-5},
        "lr_scheduler_type": "polynomial",
        "max_grad_norm": 0.0,
        "max_length": 64,
        "max_steps": 7,
        "num_train_epochs": 2,
        "optim": "sgd",
        "optim_args": "momentum=0.9,nesterov=true",
        "per_device_eval_batch_size": 4,
        "per_device_train_batch_size": 4,
        "report_to": "wandb",
        "save_strategy": "no",
        "save_total_limit": 1,
        "seed": 1,
        "train_sampling_strategy": "sequential",
        "warmup_steps": 3,
        "weight_decay": 0.0,
    }  # fmt: skip


def test_keeping_only_the_best_saves_at_evaluations() -> None:
    given = {"validation_data": "v.jsonl", "save_only_best": True, "best_checkpoint_metric": "accuracy"}
    best = values(**given, best_checkpoint_metric_maximize=True)
    assert {name: best[name] for name in best if name not in BARE_SFT or best[name] != BARE_SFT[name]} == {
        "eval_strategy": "steps",
        "eval_steps": 100,
        "save_strategy": "best",
        "save_total_limit": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_mean_token_accuracy",
        "greater_is_better": True,
    }
    assert "save_steps" not in best


def test_a_custom_metric_is_read_under_its_own_name() -> None:
    given = {"best_checkpoint_metric": "custom", "custom_metric_name": "f1", "custom_evaluation_function": "a.b:c"}
    best = values(validation_data="v.jsonl", save_only_best=True, **given)
    assert (best["metric_for_best_model"], best["greater_is_better"]) == ("eval_f1", False)


NOT_TRAINED = {
    "activation_checkpointing": False, "bf16": False, "dataloader_pin_memory": False, "disable_tqdm": True,
    "fp16": False, "full_determinism": False, "per_device_eval_batch_size": 8, "per_device_train_batch_size": 8,
    "report_to": "none", "seed": 42,
}  # fmt: skip


def test_a_stage_that_only_measures_says_nothing_of_training() -> None:
    measured = {"training_data": None, "validation_data": "v.jsonl"}
    assert values(method="evaluation", **measured) == NOT_TRAINED
    assert values(is_evaluation_only=True, **measured) == NOT_TRAINED


def test_a_custom_stage_has_no_trl_arguments() -> None:
    assert settings_of(stage(method={"type": "custom", "function": "a.b:c"})) == ()


@pytest.mark.parametrize(
    ("given", "optim", "arguments"),
    [
        ("adamw", "adamw_torch_fused", None),
        ("sgd", "sgd", None),
        ("momentum", "sgd", "momentum=0.9"),
        ("nesterov", "sgd", "momentum=0.9,nesterov=true"),
        ("adagrad", "adagrad", None),
        ("rmsprop", "rmsprop", None),
        ("adafactor", "adafactor", None),
    ],
)
def test_each_optimiser_is_one_of_trl_s(given: str, optim: str, arguments: str | None) -> None:
    told = values(optimizer_override=given)
    assert (told["optim"], told.get("optim_args")) == (optim, arguments)
    assert ("adam_beta1" in told) == (given == "adamw")


@pytest.mark.parametrize(
    ("given", "name", "kwargs"),
    [
        ({"scheduler_type": "constant"}, "constant_with_warmup", None),
        ({"scheduler_type": "constant", "warmup_ratio": 0}, "constant", None),
        ({"scheduler_type": "cosine_annealing"}, "cosine", None),
        ({"scheduler_type": "cosine_annealing", "min_learning_rate": 1e-6}, "cosine_with_min_lr", {"min_lr": 1e-6}),
        ({"scheduler_type": "cosine_annealing_warm_restarts"}, "cosine_with_restarts", {"num_cycles": 1}),
        ({"scheduler_type": "cosine_annealing_warm_restarts", "num_cycles": 3}, "cosine_with_restarts",
         {"num_cycles": 3}),
        ({"scheduler_type": "polynomial"}, "polynomial", {"power": 1.0, "lr_end": 0.0}),
        ({"scheduler_type": "polynomial", "scheduler_power": 2, "min_learning_rate": 1e-6}, "polynomial",
         {"power": 2.0, "lr_end": 1e-6}),
        ({"scheduler_type": "linear_warmup"}, "linear", None),
        ({"scheduler_type": "linear_warmup", "min_learning_rate": 1e-6}, "polynomial",
         {"power": 1.0, "lr_end": 1e-6}),
    ],
)  # fmt: skip
def test_each_schedule_is_one_of_trl_s(given: dict[str, Any], name: str, kwargs: dict[str, Any] | None) -> None:
    told = values(**given)
    assert (told["lr_scheduler_type"], told.get("lr_scheduler_kwargs")) == (name, kwargs)


@pytest.mark.parametrize(
    ("given", "warmup"),
    [({}, 0.1), ({"warmup_ratio": 0.25}, 0.25), ({"warmup_steps": 5}, 5), ({"warmup_steps": 0}, 0.1),
     ({"warmup_steps": 5, "warmup_ratio": 0}, 5), ({"warmup_ratio": 0}, 0)],
)  # fmt: skip
def test_t25_warm_up_is_a_share_below_1_or_a_number_of_steps(given: dict[str, Any], warmup: float) -> None:
    assert values(**given)["warmup_steps"] == warmup


@pytest.mark.parametrize(
    ("given", "precompute", "dropouts"),
    [
        ({}, True, None),
        ({"reference": {"mode": "copy"}}, False, None),
        ({"reference": {"mode": "precompute"}}, True, None),
        ({"lora": LoRA()}, False, False),
        ({"lora": LoRA(dropout=0)}, False, True),
        ({"lora": LoRA(), "reference": {"mode": "precompute"}}, True, False),
    ],
)
def test_the_reference_of_dpo_is_precomputed_without_lora(
    given: dict[str, Any], precompute: bool, dropouts: bool | None
) -> None:
    told = values(method="dpo", **given)
    assert (told["precompute_ref_log_probs"], told.get("disable_dropout")) == (precompute, dropouts)


def test_every_argument_says_where_it_came_from() -> None:
    told = sources(
        method=DPO(beta=0.2), epochs=1, use_mixed_precision=True, mixed_precision_dtype="bf16", lora={},
        trl={"max_length": 9},
    )  # fmt: skip
    assert {name: told[name] for name in (
        "num_train_epochs", "max_grad_norm", "bf16", "beta", "loss_type", "learning_rate", "max_length", "report_to",
        "eval_strategy", "precompute_ref_log_probs",
    )} == {
        "num_train_epochs": "stages.a.epochs",
        "max_grad_norm": "default",
        "bf16": "stages.a.mixed_precision_dtype",
        "beta": "stages.a.method.beta",
        "loss_type": "default of dpo",
        "learning_rate": "default of dpo, times 10 with lora",
        "max_length": "stages.a.trl.max_length",
        "report_to": "stagekit (metrics.jsonl)",
        "eval_strategy": "stagekit (no validation_data)",
        "precompute_ref_log_probs": "default (reference.mode: auto)",
    }  # fmt: skip
    assert sources(learning_rate=1e-5)["learning_rate"] == "stages.a.learning_rate"


@pytest.mark.parametrize(
    ("given", "target", "value"),
    [
        ({"trl": {"learning_rate": 1e-3}}, "learning_rate", 1e-3),
        ({"trl": {"learning_rate": 1e-3}, "learning_rate": 1e-5}, "learning_rate", 1e-5),
        ({"trl": {"num_train_epochs": 9}}, "num_train_epochs", 9),
        ({"trl": {"num_train_epochs": 9}, "epochs": 3}, "num_train_epochs", 3),
        ({"trl": {"beta": 0.5}, "method": "dpo"}, "beta", 0.5),
        ({"trl": {"beta": 0.5}, "method": {"type": "dpo", "beta": 0.1}}, "beta", 0.1),
        ({"trl": {"bf16": True}}, "bf16", True),
        ({"trl": {"bf16": True}, "use_mixed_precision": True}, "bf16", False),
        ({"trl": {"bf16": True}, "use_mixed_precision": False}, "bf16", False),
        ({"trl": {"disable_tqdm": False}}, "disable_tqdm", False),
    ],
)
def test_an_argument_in_trl_counts_only_where_its_option_is_not_set(
    given: dict[str, Any], target: str, value: object
) -> None:
    assert values(**given)[target] == value


@pytest.mark.parametrize("kind", ["sft", "dpo", "constitutional", "evaluation"])
@pytest.mark.parametrize("key", sorted(RESERVED))
def test_an_argument_that_stagekit_must_own_is_refused_in_trl(kind: str, key: str) -> None:
    data = "validation_data" if kind == "evaluation" else "training_data"
    with pytest.raises(ConfigError) as caught:
        TrainingPipeline(model="m", stages=(TrainingStage(name="a", method=kind, trl={key: 1}, **{data: "x.jsonl"}),))
    assert [tuple(one) for one in caught.value.problems] == [(f"stages.a.trl.{key}", f"belongs to {RESERVED[key]}")]


def test_an_argument_that_trl_does_not_have_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError) as caught:
        TrainingPipeline(model="m", stages=(stage(trl={"max_lenght": 5, "zzz": 1}),))
    assert [tuple(one) for one in caught.value.problems] == [
        ("stages.a.trl.max_lenght", "SFTConfig has no such argument; did you mean 'max_length'?"),
        ("stages.a.trl.zzz", "SFTConfig has no such argument"),
    ]


@pytest.mark.parametrize(
    ("given", "path", "message"),
    [
        ({"optimizer_override": "adam", "trl": {"optim_args": "eps=1"}}, "trl.optim_args",
         "has no effect on optimizer_override 'adam'; drop it"),
        ({"scheduler_type": "step", "trl": {"lr_scheduler_kwargs": {"gamma": 1}}}, "trl.lr_scheduler_kwargs",
         "has no effect on 'step'; use scheduler_kwargs"),
    ],
)  # fmt: skip
def test_an_argument_that_nothing_reads_is_refused_in_trl(given: dict[str, Any], path: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        TrainingPipeline(model="m", stages=(stage(**given),))
    assert [tuple(one) for one in caught.value.problems] == [(f"stages.a.{path}", message)]
    TrainingPipeline(model="m", stages=(stage(trl=given["trl"]),))


VARIED: tuple[dict[str, Any], ...] = (
    {}, {"validation_data": "v"}, {"lora": {}}, {"warmup_steps": 3, "scheduler_type": "polynomial"},
    {"optimizer_override": "momentum"}, {"validation_data": "v", "save_only_best": True},
    {"is_evaluation_only": True, "training_data": None, "validation_data": "v"},
    {"data_shuffle_seed": 3, "use_mixed_precision": True},
)  # fmt: skip


@pytest.mark.parametrize("kind", [kind for kind in BUILT if METHODS[kind].trainer_class])
@pytest.mark.parametrize("given", VARIED)
def test_every_argument_is_one_field_of_the_installed_config(kind: str, given: dict[str, Any]) -> None:
    if kind == "evaluation" or (
        kind in {"constitutional", "self_play", "self_rewarding"} and "is_evaluation_only" in given
    ):
        kind, given = "evaluation", {"training_data": None, "validation_data": "v"}
    own: dict[str, Any] = {"teacher": "t"} if kind == "distillation" else {}
    own |= {"reward": "pkg.mod:f"} if "reward" in METHODS[kind].model_fields else {}
    targets = [
        setting.target for setting in settings_of(stage(method={"type": kind, **own}, **{"model": "m", **given}))
    ]
    assert len(targets) == len(set(targets))
    config = METHODS[kind].config_class
    assert config is not None
    assert set(targets) <= fields_of(config)


@pytest.mark.parametrize("name", ["SFTConfig", "DPOConfig", "GRPOConfig", "RLOOConfig"])
def test_the_fields_read_from_the_source_are_those_of_the_class(name: str) -> None:
    import dataclasses

    import trl

    assert fields_of(f"trl:{name}") == {field.name for field in dataclasses.fields(getattr(trl, name))}
    assert set(RESERVED) - fields_of(f"trl:{name}") <= {"trust_remote_code", "local_rank", "resume_from_checkpoint"}


def test_the_fields_of_ppo_are_those_of_its_class() -> None:
    import dataclasses

    from stagekit.trainers.ppo import PPOConfig

    assert fields_of("stagekit.trainers.ppo:PPOConfig") == {field.name for field in dataclasses.fields(PPOConfig)}
