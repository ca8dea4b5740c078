"""What becomes of every option: used, refused where it was set, or told as not built."""

from collections.abc import Mapping
from typing import Any

import pytest

from stagekit import ConfigError, TrainingStage
from stagekit.adapters import BUILT, METHODS
from stagekit.flat import FLAT, default_of
from stagekit.ledger import ledger
from stagekit.pending import PENDING, PENDING_VALUES
from stagekit.stage_options import FAMILIES, StageOptions


OF_TYPE: Mapping[str, Mapping[str, Any]] = {
    "sft": {"method": "sft", "training_data": "rows.jsonl"},
    "dpo": {"method": "dpo", "training_data": "rows.jsonl"},
    **{
        kind: {"method": kind, "training_data": "rows.jsonl"}
        for kind in ("kto", "orpo", "cpo", "simpo", "reward", "process_reward")
    },
    **{
        kind: {"method": {"type": kind, "reward": "pkg.mod:f"}, "training_data": "rows.jsonl"}
        for kind in ("ppo", "grpo", "rloo", "online_dpo")
    },
    "self_play": {"method": "self_play", "training_data": "rows.jsonl"},
    "self_rewarding": {"method": "self_rewarding", "training_data": "rows.jsonl"},
    "ai_feedback": {"method": "ai_feedback", "training_data": "rows.jsonl"},
    "constitutional": {"method": "constitutional", "training_data": "rows.jsonl"},
    "rejection_sampling": {
        "method": {"type": "rejection_sampling", "reward": "pkg.mod:f"},
        "training_data": "rows.jsonl",
    },
    "evaluation": {"method": "evaluation", "validation_data": "rows.jsonl"},
    "custom": {"method": {"type": "custom", "function": "pkg.mod:f"}},
    "distillation": {"method": {"type": "distillation", "teacher": "a/teacher"}, "training_data": "rows.jsonl"},
    "synthetic_data": {"method": "synthetic_data", "training_data": "rows.jsonl"},
}
"""The least that a stage of each built type needs."""


def problems(**given: Any) -> list[tuple[str, str]]:
    """The problems of a stage, none where it can be built."""
    try:
        TrainingStage(**{"name": "a", **given})
    except ConfigError as error:
        return [(problem.path, problem.message) for problem in error.problems]
    return []


def sft(**given: Any) -> list[tuple[str, str]]:
    return problems(**{**OF_TYPE["sft"], **given})


def test_the_table_above_is_of_the_built_types() -> None:
    assert set(OF_TYPE) == set(BUILT)
    for given in OF_TYPE.values():
        assert problems(**given) == []


SET: Mapping[str, Any] = {
    "distributed_strategy": "fsdp",
    "contrastive_margin": 0.5,
    "preference_label_smoothing": 0.1,
    "reference_model_update_interval": 5,
    "reward_model": "some/model",
    "gae_lambda": 0.5,
}
"""Values where True, False, or one more than the default will not do."""


def other_than_default(name: str) -> Any:
    default = default_of(name)
    if name in SET:
        return SET[name]
    return (not default) if isinstance(default, bool) else default + 0.1 if isinstance(default, float) else default + 1


@pytest.mark.parametrize("name", sorted(PENDING))
def test_an_option_that_is_not_built_is_refused_when_it_is_set(name: str) -> None:
    kind = (FLAT[name].types or ("dpo",))[0]
    given: dict[str, Any] = {"method": kind, "training_data": "rows.jsonl", name: other_than_default(name)}
    if name == "reference_model_update_interval":
        given["update_reference_model"] = True
    if name == "contrastive_margin":
        given["preference_loss_type"], given["stage_type"] = "hinge", "preference_optimization"
        del given["method"]
    told = problems(**given)
    assert any("not built yet" in message for _, message in told), told
    if kind in BUILT:
        ((path, _),) = [one for one in told if "not built yet" in one[1]]
        assert path == name


@pytest.mark.parametrize("name", sorted(set(PENDING) & set(StageOptions.model_fields)))
def test_an_option_that_is_not_built_may_be_said_as_it_is_anyway(name: str) -> None:
    assert sft(**{name: StageOptions.model_fields[name].default}) == []


def test_pending_names_are_names_of_the_specification() -> None:
    assert set(PENDING) <= set(FLAT)


@pytest.mark.parametrize(("path", "value"), sorted(PENDING_VALUES))
def test_a_value_that_is_not_built_is_refused_with_what_is_missing(path: str, value: str) -> None:
    group, _, key = path.partition(".")
    given: dict[str, Any] = {
        "scheduler_type": {"scheduler_type": value},
        "optimizer_override": {"optimizer_override": value},
        "mixed_precision_dtype": {"mixed_precision_dtype": value, "use_mixed_precision": True},
        "best_checkpoint_metric": {
            "best_checkpoint_metric": value, "save_only_best": True, "validation_data": "rows.jsonl"
        },
        "distributed_strategy": {"distributed_strategy": value},
        "method.loss": {"method": {"type": "dpo", "loss": value}},
        "reference.mode": {"method": "dpo", "reference": {"mode": value}},
    }[path]  # fmt: skip
    assert (path, f"{value!r} is not built yet: {PENDING_VALUES[path, value]}") in sft(**given)
    assert key in {"", "loss", "mode"} and group in TrainingStage.model_fields


UNTOUCHED = "every row is read, in the order of the data"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, []),
        ({"training_data": {"a": "x.jsonl"}},
         [("data_mixing_ratios", "missing; training_data names several sets, say the share of each")]),
        ({"data_mixing_ratios": {"a": 1}}, [("data_mixing_ratios", "needs training_data as a mapping name -> data")]),
        ({"training_data": "x.jsonl", "max_training_samples": 4, "shuffle_data": False}, []),
        ({"training_data": "x.jsonl", "max_training_samples": 4, "data_shuffle_seed": 1}, []),
        ({"max_training_samples": 4}, [("max_training_samples", "has no effect without training_data")]),
        ({"training_data": "x.jsonl", "shuffle_data": False},
         [("shuffle_data", f"has no effect without max_training_samples: {UNTOUCHED}")]),
        ({"training_data": "x.jsonl", "data_shuffle_seed": 1},
         [("data_shuffle_seed", f"has no effect without max_training_samples or a mix: {UNTOUCHED}")]),
    ],
)  # fmt: skip
def test_a_custom_stage_has_its_rows_mixed_and_drawn_and_nothing_else(
    given: dict[str, Any], expected: list[tuple[str, str]]
) -> None:
    assert problems(method={"type": "custom", "function": "json:loads"}, **given) == expected


@pytest.mark.parametrize("kind", [kind for kind in METHODS if METHODS[kind].missing is not None])
def test_a_type_that_is_not_built_says_what_it_waits_for(kind: str) -> None:
    assert problems(method=kind) == [("method.type", f"{kind!r} is not built yet: {METHODS[kind].missing}")]


def test_a_constitutional_stage_does_not_only_measure() -> None:
    given = {**OF_TYPE["constitutional"], "is_evaluation_only": True, "training_data": None, "validation_data": "v"}
    told = ("is_evaluation_only", "constitutional writes texts to learn them; use method: evaluation")
    assert told in problems(**given)


NO_TRAINING = "an evaluation stage does not train; put it on the stage that does"
OWN = "a custom stage does only what its function does; pass the value to the function through metadata"
SAMPLES = (
    "ppo, grpo, rloo, online_dpo, constitutional, ai_feedback, rejection_sampling, self_play, self_rewarding, "
    "distillation, synthetic_data"
)
NO_USE = "stage type {!r} has no use for it; it belongs to "
AS_IT_IS = "an evaluation stage measures every row of validation_data as it is"
STILL = "is_evaluation_only: true does not train"


@pytest.mark.parametrize(
    ("kind", "given", "path", "reason"),
    [
        ("evaluation", {"epochs": 1}, "epochs", NO_TRAINING),
        ("evaluation", {"evaluation_steps": 5}, "evaluation_steps", NO_TRAINING),
        ("evaluation", {"is_evaluation_only": True}, "is_evaluation_only", NO_TRAINING),
        ("evaluation", {"training_data": "x"}, "training_data",
         "an evaluation stage measures validation_data; put the data there"),
        ("evaluation", {"shuffle_data": False}, "shuffle_data", AS_IT_IS),
        ("evaluation", {"max_training_samples": 5}, "max_training_samples", AS_IT_IS),
        ("evaluation", {"learning_rate": 1e-5}, "learning_rate", NO_TRAINING),
        ("evaluation", {"warmup_steps": 5}, "warmup_steps", NO_TRAINING),
        ("evaluation", {"logging_steps": 5}, "logging_steps", NO_TRAINING),
        ("evaluation", {"save_only_best": True}, "save_only_best", NO_TRAINING),
        ("evaluation", {"early_stopping": {}}, "early_stopping", NO_TRAINING),
        ("evaluation", {"lora": {}}, "lora", NO_TRAINING),
        ("evaluation", {"use_lora": True}, "use_lora", NO_TRAINING),
        ("evaluation", {"reference": {}}, "reference", NO_TRAINING),
        ("custom", {"epochs": 1}, "epochs", OWN),
        ("custom", {"use_deterministic_algorithms": True}, "use_deterministic_algorithms", OWN),
        *(("sft", {"is_evaluation_only": True, "validation_data": "v", "training_data": None, option: value}, option,
           "is_evaluation_only: true measures every row of validation_data as it is")
          for option, value in {"shuffle_data": False, "data_shuffle_seed": 1, "max_training_samples": 5,
                                "data_mixing_ratios": {"a": 1}}.items()),
        ("custom", {"max_duration": "1h"}, "max_duration", OWN),
        ("custom", {"learning_rate": 1e-5}, "learning_rate", OWN),
        ("custom", {"use_mixed_precision": True}, "use_mixed_precision", OWN),
        ("custom", {"trl": {"max_length": 5}}, "trl", OWN),
        ("custom", {"metrics_to_track": ["loss"]}, "metrics_to_track", OWN),
        ("sft", {"reference": {"mode": "copy"}}, "reference", NO_USE + "dpo, kto, ppo, grpo, rloo, online_dpo"),
        ("sft", {"generation": {}}, "generation", NO_USE + SAMPLES),
        ("dpo", {"generation": {"temperature": 0}}, "generation", NO_USE + SAMPLES),
        ("constitutional", {"reference": {}}, "reference", NO_USE + "dpo, kto, ppo, grpo, rloo, online_dpo"),
        *(
            (kind, {"is_evaluation_only": True, "validation_data": "v", "training_data": None, option: value},
             option, STILL)
            for kind in ("sft", "dpo", "reward")
            for option, value in {"learning_rate": 1e-5, "epochs": 1, "warmup_steps": 3, "save_only_best": True,
                                  "optimizer_override": "sgd", "max_steps": 5}.items()
        ),
    ],
)  # fmt: skip
def test_an_option_that_the_stage_cannot_use_is_refused_with_the_reason(
    kind: str, given: dict[str, Any], path: str, reason: str
) -> None:
    told = problems(**{**OF_TYPE[kind], **given})
    assert (path, f"has no effect here: {reason.format(kind)}") in told


ADAMLESS = "has no effect on optimizer_override 'sgd'; use adamw"
VALIDATED = {"validation_data": "v.jsonl"}
BEST = {**VALIDATED, "save_only_best": True}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"warmup_steps": 5, "warmup_ratio": 0.1}, {"warmup_ratio": "warmup_steps is set as well; keep one of them"}),
        ({"warmup_ratio": 1}, {"warmup_ratio": "1.0 leaves no step to train at the full rate; it must be below 1"}),
        ({"num_cycles": 2},
         {"num_cycles": "has no effect on 'cosine_annealing'; use scheduler_type: cosine_annealing_warm_restarts"}),
        ({"scheduler_power": 2},
         {"scheduler_power": "has no effect on 'cosine_annealing'; use scheduler_type: polynomial"}),
        ({"scheduler_type": "constant", "min_learning_rate": 1e-6},
         {"min_learning_rate": "has no effect on 'constant', which does not decay"}),
        ({"scheduler_type": "one_cycle", "warmup_steps": 5},
         {"warmup_steps": "has no effect on 'one_cycle', which climbs by itself; use its pct_start"}),
        ({"scheduler_type": "step", "scheduler_kwargs": {"gama": 0.5}},
         {"scheduler_kwargs.gama": "unknown argument; did you mean 'gamma'?"}),
        ({"scheduler_type": "reduce_on_plateau"},
         {"scheduler_type": "'reduce_on_plateau' follows the evaluations; give validation_data"}),
        ({"min_learning_rate": 1e-3}, {"min_learning_rate": "0.001 is not below the learning rate (2e-05)"}),
        ({"optimizer_override": "sgd", "adam_beta1": 0.8, "adam_beta2": 0.9, "adam_epsilon": 1e-6},
         {"adam_beta1": ADAMLESS, "adam_beta2": ADAMLESS, "adam_epsilon": ADAMLESS}),
        ({"mixed_precision_dtype": "bf16"},
         {"mixed_precision_dtype": "has no effect without use_mixed_precision: true"}),
        ({"mixed_precision_dtype": "none", "use_mixed_precision": True},
         {"mixed_precision_dtype": "'none' contradicts use_mixed_precision: true"}),
        ({"training_data": None},
         {"training_data": "missing; sft trains on data with messages or prompt + completion or text or conversations"
                           " or input_ids"}),
        ({"is_evaluation_only": True},
         {"validation_data": "missing; an evaluation needs data to measure on",
          "training_data": "has no effect with is_evaluation_only: true; put the data in validation_data"}),
        ({"training_data": {"a": "x"}},
         {"data_mixing_ratios": "missing; training_data names several sets, say the share of each"}),
        ({"data_mixing_ratios": {"a": 1}}, {"data_mixing_ratios": "needs training_data as a mapping name -> data"}),
        ({"training_data": {"a": "x"}, "data_mixing_ratios": {"b": 1}},
         {"data_mixing_ratios": "its names must be those of training_data; only one has ['a', 'b']"}),
        ({"shuffle_data": False, "data_shuffle_seed": 5},
         {"data_shuffle_seed": "has no effect with shuffle_data: false"}),
        ({"evaluation_steps": 5}, {"evaluation_steps": "has no effect without validation_data"}),
        ({"early_stopping": {"patience": 1}}, {"early_stopping": "has no effect without validation_data"}),
        ({"metrics_to_track": ["loss"]}, {"metrics_to_track": "has no effect without validation_data"}),
        ({"custom_evaluation_function": "a.b:c"},
         {"custom_evaluation_function": "has no effect without validation_data"}),
        ({"save_only_best": True}, {"save_only_best": "needs validation_data to know what is best"}),
        ({**BEST, "evaluation_steps": 0},
         {"save_only_best": "needs evaluation_steps above 0 to know what is best"}),
        ({**VALIDATED, "metrics_to_track": ["blue"]},
         {"metrics_to_track": "'blue' is no metric of 'sft'; did you mean 'bleu'? "
                              "(others come from custom_evaluation_function)"}),
        ({**VALIDATED, "method": "reward", "metrics_to_track": ["bleu"]},
         {"metrics_to_track": "'bleu' is no metric of 'reward'; it has accuracy, loss, perplexity "
                              "(others come from custom_evaluation_function)"}),
        ({**VALIDATED, "early_stopping": {"metric": "eval_acuracy"}},
         {"early_stopping.metric": "'acuracy' is no metric of 'sft'; did you mean 'accuracy'? "
                                   "(others come from custom_evaluation_function)"}),
        ({**VALIDATED, "method": "dpo", "metrics_to_track": ["perplexity"]},
         {"metrics_to_track": "'perplexity' means nothing for 'dpo', whose loss is no likelihood"}),
        ({"best_checkpoint_metric": "accuracy", "custom_metric_name": "x", "best_checkpoint_metric_maximize": True},
         dict.fromkeys(("best_checkpoint_metric", "custom_metric_name", "best_checkpoint_metric_maximize"),
                       "has no effect without save_only_best: true")),
        ({**BEST, "checkpoint_save_steps": 5, "checkpoint_save_epochs": 1, "max_checkpoints_to_keep": 2},
         dict.fromkeys(("checkpoint_save_steps", "checkpoint_save_epochs", "max_checkpoints_to_keep"),
                       "has no effect with save_only_best: true, which saves at evaluations")),
        ({**BEST, "method": "dpo", "best_checkpoint_metric": "perplexity"},
         {"best_checkpoint_metric": "'dpo' does not report 'perplexity'; it has accuracy, bleu, custom, f1_score, "
                                    "loss, reward_score, rouge, win_rate"}),
        ({**BEST, "method": "reward", "best_checkpoint_metric": "bleu"},
         {"best_checkpoint_metric": "'reward' does not report 'bleu'; it has accuracy, custom, loss"}),
        ({**BEST, "best_checkpoint_metric": "custom"},
         {"custom_metric_name": "best_checkpoint_metric: custom needs it, and a custom_evaluation_function"}),
        ({**BEST, "custom_metric_name": "x", "custom_evaluation_function": "a.b:c"},
         {"custom_metric_name": "has no effect without best_checkpoint_metric: custom"}),
        ({"method": {"type": "dpo", "loss": "ipo", "margin": 0.5}},
         {"method.margin": "has no effect on the loss 'ipo'; use hinge or sigmoid"}),
        ({"method": {"type": "dpo", "label_smoothing": 0.1}},
         {"method.label_smoothing": "0.1 has no effect on the loss 'sigmoid'; use conservative (cDPO) or robust"}),
        ({"method": "dpo", "lora": {}, "reference": {"mode": "copy"}},
         {"reference.mode": "'copy' would hold a second model beside an adapter whose base is already the reference; "
                            "use auto, or drop lora"}),
        ({"method": "dpo", "trl": {"loss_type": ["ipo"], "precompute_ref_log_probs": True}},
         {"trl.loss_type": "belongs to method.loss", "trl.precompute_ref_log_probs": "belongs to reference.mode"}),
        ({"method": {"type": "constitutional", "principles": []}},
         {"method.principles": "an empty list leaves nothing to criticise; leave it out for the default set"}),
        ({"method": {"type": "constitutional", "unrevised": ["b"]}},
         {"method.unrevised": "'b' is no set of training_data (it has no names, training_data is one set)"}),
        ({"method": {"type": "constitutional", "unrevised": ["a"]}, "training_data": {"a": "x"},
          "data_mixing_ratios": {"a": 1}},
         {"method.unrevised": "names every set of training_data; nothing is left to revise"}),
    ],
)  # fmt: skip
def test_an_option_that_another_makes_void_is_refused_with_the_way_out(
    given: dict[str, Any], expected: dict[str, str]
) -> None:
    told = sft(**given)
    assert {path: message for path, message in told if "not built yet: the" not in message} == expected


@pytest.mark.parametrize("given", [
    {"warmup_steps": 5}, {"warmup_steps": 0, "warmup_ratio": 0.5}, {"warmup_steps": 5, "warmup_ratio": 0},
    {"scheduler_type": "polynomial", "scheduler_power": 2, "min_learning_rate": 1e-6},
    {"scheduler_type": "cosine_annealing_warm_restarts", "num_cycles": 3}, {"min_learning_rate": 1e-6},
    {"use_mixed_precision": True, "mixed_precision_dtype": "bf16"}, {"mixed_precision_dtype": "none"},
    {"evaluation_steps": 0}, {"early_stopping": None}, {"is_evaluation_only": False}, {**BEST},
    {**BEST, "best_checkpoint_metric": "custom", "custom_metric_name": "f1", "custom_evaluation_function": "a.b:c"},
    {**BEST, "best_checkpoint_metric": "accuracy", "best_checkpoint_metric_maximize": True},
    {**VALIDATED, "metrics_to_track": ["f1"], "custom_evaluation_function": "a.b:c"},
    {**VALIDATED, "early_stopping": {"metric": "f1"}, "custom_evaluation_function": "a.b:c"},
    {**VALIDATED, "method": "dpo", "early_stopping": {"metric": "rewards/margins", "maximize": True}},
    {"is_evaluation_only": True, "training_data": None, **VALIDATED},
    {"frozen_layers": ["layers.0"]}, {"freeze_base_model": True, "trainable_layers": ["lm_head"]},
    {"use_gradual_unfreezing": True, "gradual_unfreezing_interval": 2}, {"unfreeze_top_n_layers": 2, "lora": {}},
    {"custom_loss_function": "a.b:c"}, {"callbacks": {"on_batch_complete": "a.b:c"}},
    {"training_data": {"a": "x", "b": "y"}, "data_mixing_ratios": {"a": 1, "b": 3}, "shuffle_data": False,
     "data_shuffle_seed": 5},
])  # fmt: skip
def test_what_fits_together_is_accepted(given: dict[str, Any]) -> None:
    assert sft(**given) == []


@pytest.mark.parametrize("kind", sorted(BUILT))
def test_the_ledger_has_one_entry_for_every_option_of_the_stage_and_its_method(kind: str) -> None:
    stage = TrainingStage(name="a", **OF_TYPE[kind])
    entries = ledger(stage)
    names = [entry.option for entry in entries]
    assert names == [*TrainingStage.model_fields, *(f"method.{key}" for key in METHODS[kind].model_fields)]
    for entry in entries:
        assert entry.disposition in {"applied", "not applicable", "not built"}
        assert (entry.reason == "") == (entry.disposition == "applied")
    method = OF_TYPE[kind].get("method", {})
    of_method = {"method.type", *(f"method.{key}" for key in method if not isinstance(method, str))}
    assert {entry.option for entry in entries if entry.set} == {"name", *OF_TYPE[kind], *of_method}


@pytest.mark.parametrize("kind", sorted(BUILT))
def test_the_ledger_and_the_refusals_agree(kind: str) -> None:
    """Options that the ledger calls not applicable are exactly those that are refused when set to something else."""
    stage = TrainingStage(name="a", **OF_TYPE[kind])
    void = {entry.option for entry in ledger(stage) if entry.disposition == "not applicable"}
    for option in sorted(void & set(StageOptions.model_fields)):
        value = getattr(stage, option)
        if value is None or value in ((), {}, ""):
            continue
        assert any(
            path == option and message.startswith("has no effect here: ")
            for path, message in problems(**{**OF_TYPE[kind], option: value})
        ), option


@pytest.mark.parametrize("kind", sorted(METHODS))
def test_a_type_refuses_options_that_exist_and_uses_families_that_exist(kind: str) -> None:
    cls = METHODS[kind]
    assert set(cls.refused) <= set(StageOptions.model_fields)
    assert cls.families <= set(FAMILIES)
    assert cls.slots <= set(TrainingStage.model_fields)
    refused_families = {option for option in cls.refused if not any(option in f.__annotations__ for f in cls.families)}
    assert refused_families == set(), "refused options of families that the type does not use anyway"
    assert cls.reads <= set(StageOptions.model_fields)
