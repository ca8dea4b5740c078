"""The reward stage through pipelines on the tiny model: a named artifact that learns, loads, resumes, is compared."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import RewardConfig, RewardTrainer

from stagekit import ConfigError, StageError, TrainingPipeline, TrainingStage, training
from stagekit.adapters import DPO, Reward
from stagekit.groups import LoRA
from stagekit.plan import plan
from stagekit.report import show_end
from stagekit.reward_models import held_out_accuracy, load_reward_model, score
from tests.running import crash_at, lines, pipeline, run, same, stage, weights
from tests.test_reward_models import columns, pairs
from tests.test_trl_equivalence import COMMON, bare


Write = Callable[..., Path]
ADAPTER = LoRA(rank=4, alpha=8, dropout=0.1)


@pytest.fixture
def data(write_rows: Write, sft_rows: list[Any], preference_rows: list[Any]) -> dict[str, str]:
    return {
        "sft": str(write_rows(sft_rows, "sft.jsonl")),
        "dpo": str(write_rows(preference_rows, "dpo.jsonl")),
        "pairs": str(write_rows(pairs(64, 0), "pairs.jsonl")),
        "held out": str(write_rows(pairs(40, 2), "held-out.jsonl")),
    }


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, torch.Tensor]]:
    """The weights of every trainer that is built, before it trains."""
    found: list[dict[str, torch.Tensor]] = []
    original = training.build

    def build(job: Any, *args: Any) -> Any:
        trainer, callbacks = original(job, *args)
        found.append({name: tensor.detach().clone() for name, tensor in trainer.model.state_dict().items()})
        return trainer, callbacks

    monkeypatch.setattr(training, "build", build)
    return found


def reward(data: dict[str, str], name: str = "rm", **options: Any) -> TrainingStage:
    method = options.pop("method", Reward())
    return stage(name, data["pairs"], method, **{"max_steps": 3, **options})


def test_it_learns_a_rule_and_leaves_a_reward_model_beside_no_policy(
    data: dict[str, str], write_rows: Write, tiny_model_path: str, tmp_path: Path
) -> None:
    only = stage(
        "rm", str(write_rows(pairs(256, 0), "many.jsonl")), Reward(center_rewards=0.01),
        batch_size=16, max_steps=60, validation_data=data["held out"], evaluation_steps=30, early_stopping=None,
        metrics_to_track=("loss", "accuracy"),
    )  # fmt: skip
    result = run(tiny_model_path, tmp_path / "run", only)
    assert result["rm"].artifacts == {"reward_model": "01-rm/reward_model"}
    assert (result["rm"].policy, result.policy) == (None, None)
    assert result["rm"].reward_model == str(tmp_path / "run/01-rm/reward_model")
    assert result["rm"].metrics["eval_accuracy"] > 0.9  # 0.5 for a model that knows nothing

    plain, info = AutoModelForSequenceClassification.from_pretrained(
        str(result["rm"].reward_model), output_loading_info=True
    )
    assert (plain.config.num_labels, list(info["missing_keys"])) == (1, [])
    found = held_out_accuracy(plain, AutoTokenizer.from_pretrained(str(result["rm"].reward_model)), pairs(40, 2))
    assert (found.pairs, found.accuracy > 0.9) == (40, True)
    last = next(line for line in reversed(lines(tmp_path / "run/01-rm")) if "eval_accuracy" in line)
    assert last["eval_accuracy"] == result["rm"].metrics["eval_accuracy"]


def test_t9_the_next_stage_starts_from_the_policy_before_the_reward_stage(
    data: dict[str, str], tiny_model_path: str, tmp_path: Path, starts: list[dict[str, torch.Tensor]]
) -> None:
    """T9: a reward model never becomes the model of the next stage."""
    sft = stage("sft", data["sft"], max_steps=3, learning_rate=1e-2)
    dpo = stage("dpo", data["dpo"], DPO(beta=0.1), max_steps=3)
    result = run(tiny_model_path, tmp_path / "with", sft, reward(data), dpo)
    trained = weights(str(result["sft"].policy))
    assert not same(tiny_model_path, str(result["sft"].policy))
    for built in (starts[1], starts[2]):  # both of them start from the policy, bit by bit
        shared = [name for name in trained if name in built]
        assert len(shared) >= len(trained) - 1  # all but the output head
        assert all(torch.equal(built[name], trained[name]) for name in shared)
    assert set(trained) <= set(starts[2])
    without = run(tiny_model_path, tmp_path / "without", sft, dpo)
    assert same(str(result.policy), str(without.policy))
    assert [one.policy is None for one in result.stages] == [False, True, False]


@pytest.mark.parametrize("merge", [False, True])
def test_an_incoming_adapter_is_merged_and_a_new_one_is_trained_with_its_head(
    merge: bool, data: dict[str, str], tiny_model_path: str, tmp_path: Path
) -> None:
    sft = stage("sft", data["sft"], lora=ADAPTER, max_steps=3, learning_rate=1e-2)
    second = reward(data, lora=ADAPTER.model_copy(update={"merge": merge}), max_steps=6, learning_rate=5e-3)
    result = run(tiny_model_path, tmp_path, sft, second)
    base, adapter = tmp_path / "02-rm/base", tmp_path / "02-rm" / ("adapter" if merge else "reward_model")
    assert result["rm"].artifacts == {
        "reward_model": "02-rm/reward_model", "adapter": f"02-rm/{adapter.name}"
    }  # fmt: skip
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["task_type"]) == (str(base), "SEQ_CLS")
    assert any(".score." in name for name in weights(adapter))
    assert not same(tiny_model_path, base)
    scores = score(*load_reward_model(str(adapter)), *columns(pairs(6, 1)))
    assert len({round(value or 0.0, 4) for value in scores}) > 1
    if merge:
        plain = AutoModelForSequenceClassification.from_pretrained(str(result["rm"].reward_model))
        again = score(plain, AutoTokenizer.from_pretrained(str(adapter)), *columns(pairs(6, 1)))
        assert again == pytest.approx(scores, abs=1e-4)


@pytest.mark.parametrize("lora", [None, ADAPTER], ids=["full", "lora"])
def test_it_resumes_to_the_same_bits(
    lora: LoRA | None, data: dict[str, str], tiny_model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only = reward(data, max_steps=8, lora=lora if lora else ...)
    whole = run(tiny_model_path, tmp_path / "whole", only)
    with monkeypatch.context() as patch:
        crash_at(patch, 5)
        with pytest.raises(StageError, match="CrashError"):
            run(tiny_model_path, tmp_path / "killed", only)
    torch.manual_seed(1)
    resumed = run(tiny_model_path, tmp_path / "killed", only)
    assert same(str(whole["rm"].reward_model), str(resumed["rm"].reward_model))
    assert lines(tmp_path / "whole/01-rm") == lines(tmp_path / "killed/01-rm")


@pytest.mark.parametrize("lora", [None, ADAPTER], ids=["full", "lora"])
def test_it_trains_as_bare_reward_trainer(
    lora: LoRA | None, data: dict[str, str], tiny_model_path: str, tmp_path: Path
) -> None:
    options = {"max_steps": 20, "use_deterministic_algorithms": ..., "lora": lora if lora else ...}
    result = run(tiny_model_path, tmp_path / "run", reward(data, method=Reward(center_rewards=0.1), **options))
    losses = [line["loss"] for line in lines(tmp_path / "run/01-rm") if "loss" in line]
    peft = None
    if lora:
        peft = LoraConfig(
            r=4, lora_alpha=8, lora_dropout=0.1, target_modules=["q_proj", "v_proj"], task_type="SEQ_CLS"
        )
    trainer = RewardTrainer(
        model=tiny_model_path,
        args=RewardConfig(
            output_dir=str(tmp_path / "trl"), **COMMON, center_rewards_coefficient=0.1, disable_dropout=lora is None
        ),
        train_dataset=Dataset.from_list(pairs(64, 0)),
        processing_class=AutoTokenizer.from_pretrained(tiny_model_path),
        peft_config=peft,
    )
    assert losses == bare(trainer)
    assert len(losses) == 20
    saved = weights(str(result["rm"].reward_model))
    trained = {
        name.replace(".default.", ".").replace(".modules_to_save.", "."): tensor
        for name, tensor in trainer.model.named_parameters()
    }
    for name in saved:
        assert torch.equal(trained[name.replace("modules_to_save.", "")], saved[name]), name


def test_a_margin_is_read_where_it_is_there_also_from_a_mix(
    write_rows: Write, tiny_model_path: str, tmp_path: Path
) -> None:
    for number in (1, 2):
        write_rows([{**row, "margin": 3.0} for row in pairs(16, number)], f"{number}.jsonl")
    sets = {"a": str(tmp_path / "1.jsonl"), "b": str(tmp_path / "2.jsonl")}
    mixed = stage("mixed", sets, Reward(), data_mixing_ratios={"a": 1, "b": 1}, max_steps=1)
    run(tiny_model_path, tmp_path / "run", stage("one", sets["a"], Reward(), max_steps=1), mixed)
    for folder in ("01-one", "02-mixed"):
        assert lines(tmp_path / "run" / folder)[0]["loss"] > 2  # -log sigmoid(-3) = 3.05


def test_t24_rows_that_are_too_long_are_counted_and_none_left_is_an_error(
    write_rows: Write, tiny_model_path: str, tmp_path: Path
) -> None:
    long = {**pairs(1, 9)[0], "rejected": [{"role": "assistant", "content": "never " * 300}]}
    rows = str(write_rows([*pairs(15, 0), long]))
    options: dict[str, Any] = {"max_steps": 2, "trl": {"max_length": 100}}
    result = run(tiny_model_path, tmp_path / "run", stage("rm", rows, Reward(), **options))
    assert (result["rm"].samples_trained, result["rm"].samples_dropped) == (15, {"too_long": 1})
    with pytest.raises(StageError, match="none of 1 rows is left"):
        run(tiny_model_path, tmp_path / "none", stage("rm", str(write_rows([long], "l.jsonl")), Reward(), **options))


def test_a_saved_model_that_scores_otherwise_stops_the_stage_with_both_numbers(
    data: dict[str, str], tiny_model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = training._save

    def save(job: Any, trainer: Any) -> Any:
        found = original(job, trainer)
        file = job.folder / "reward_model/model.safetensors"
        tensors = load_file(file)
        save_file({**tensors, "score.weight": tensors["score.weight"] + 0.1}, file, {"format": "pt"})
        return found

    monkeypatch.setattr(training, "_save", save)
    with pytest.raises(StageError, match=r"'rm': .*reward_model scores answer \d with -?[\d.]+, and scored it with"):
        run(tiny_model_path, tmp_path, reward(data))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lora": LoRA(rank=4, alpha=8)},
        {"lora": LoRA(rank=4, alpha=8, bits=4)},
        {"lora": LoRA(rank=4, alpha=8, bits=8, merge=True)},
        {"trl": {"model_init_kwargs": {"dtype": "bfloat16"}}},
    ],
    ids=["full", "lora", "4-bit", "8-bit-merged", "weights-in-bf16"],
)
def test_in_bf16_the_saved_model_scores_as_the_trained_one(
    options: dict[str, Any], data: dict[str, str], tiny_model_path: str, tmp_path: Path
) -> None:
    bf16 = {"use_mixed_precision": True, "mixed_precision_dtype": "bf16"}
    only = reward(data, **bf16, validation_data=data["held out"], evaluation_steps=2, **options)
    result = run(tiny_model_path, tmp_path, only)
    assert result["rm"].status == "completed"
    model, tokenizer = load_reward_model(str(result["rm"].reward_model))
    assert all(value is not None for value in score(model, tokenizer, *columns(pairs(4, 1))))


def test_a_reward_model_is_measured_by_a_stage_of_its_own_type(
    data: dict[str, str], tiny_model_path: str, tmp_path: Path
) -> None:
    tracked = {"validation_data": data["held out"], "metrics_to_track": ("loss", "accuracy"), "batch_size": 4}
    trained = reward(data, max_steps=8, evaluation_steps=8, early_stopping=None, lora=ADAPTER, **tracked)
    measure = TrainingStage(name="again", method=Reward(), model="stage:rm", is_evaluation_only=True, **tracked)
    on = reward(data, "on", model="stage:rm", learning_rate=1e-6, max_steps=1)
    result = run(tiny_model_path, tmp_path / "run", trained, measure, on)
    for name in ("eval_loss", "eval_accuracy"):
        assert result["again"].metrics[name] == pytest.approx(result["rm"].metrics[name], rel=1e-4)
    assert dict(result["again"].artifacts) == {}
    before = score(*load_reward_model(str(result["rm"].reward_model)), *columns(pairs(4, 1)))
    after = score(*load_reward_model(str(result["on"].reward_model)), *columns(pairs(4, 1)))
    assert after == pytest.approx(before, abs=1e-2)
    policy = measure.model_copy(update={"model": tiny_model_path})
    with pytest.raises(StageError, match="is a LlamaForCausalLM, not a LlamaForSequenceClassification, so its scores"):
        run(tiny_model_path, tmp_path / "other", policy)


def test_the_walk_keeps_it_the_report_names_it_and_it_can_be_thrown_away(
    data: dict[str, str], tiny_model_path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = reward(data), stage("sft", data["sft"], max_steps=1)
    result = run(tiny_model_path, tmp_path / "run", *stages)
    assert run(tiny_model_path, tmp_path / "run", *stages).stages == result.stages  # nothing runs again
    show_end(result)
    assert "01-rm/reward_model: the reward model (AutoModelForSequenceClassification)" in capsys.readouterr().out
    kept_by = reward(data, "on", model="stage:rm", max_steps=1)
    passing = reward(data, save_checkpoint_after=False)
    run(tiny_model_path, tmp_path / "passing", passing, stages[1], kept_by)
    assert not (tmp_path / "passing/01-rm/reward_model").exists()
    assert (tmp_path / "passing/03-on/reward_model").exists()


def test_a_plan_says_that_it_trains_and_what_the_next_stage_starts_from(
    data: dict[str, str], tiny_model_path: str, tmp_path: Path
) -> None:
    said = plan(pipeline(tiny_model_path, tmp_path, reward(data), stage("sft", data["sft"])))
    assert [entry["model"] for entry in said] == [tiny_model_path, tiny_model_path]
    assert (said[0]["steps"], said[0]["trainer"]) == (3, "trl:RewardTrainer")
    assert said[0]["memory"]["trained_parameters"] > 0
    assert said[0]["notes"] == [
        "leaves a reward model; the next stage starts from the policy that this one started from"
    ]
    arguments = {one["argument"]: (one["value"], one["source"]) for one in said[0]["arguments"]}
    assert arguments["center_rewards_coefficient"] == (None, "default of reward")


BITS = LoRA(bits=4)


@pytest.mark.parametrize(
    ("given", "path", "words"),
    [
        ({"lora": BITS}, "lora.bits", "a reward head over a quantised base is bfloat16; set use_mixed_precision"),
        ({"lora": BITS, "use_mixed_precision": True, "mixed_precision_dtype": "fp16"}, "lora.bits", "is bfloat16"),
        ({"reference": {}}, "reference", "stage type 'reward' has no use for it"),
        ({"generation": {}}, "generation", "stage type 'reward' has no use for it"),
        ({"is_evaluation_only": True, "training_data": None, "validation_data": "v.jsonl"}, "model",
         "missing; say which reward model to measure"),
        ({"method": {"type": "reward", "center_rewards": -1}}, "method.center_rewards", ""),
        ({"validation_data": "v.jsonl", "metrics_to_track": ["perplexity"]}, "metrics_to_track",
         "'perplexity' means nothing for 'reward'"),
    ],
)  # fmt: skip
def test_what_it_cannot_do_is_told_with_the_way_out(given: dict[str, Any], path: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        TrainingStage(**{"name": "rm", "method": "reward", "training_data": "p.jsonl", **given})
    assert [words in one.message for one in caught.value.problems if one.path == path] == [True]


def test_its_result_is_no_model_to_start_from() -> None:
    first = TrainingStage(name="rm", method=Reward(), training_data="p.jsonl")
    next_one = TrainingStage(name="dpo", method=DPO(), training_data="p.jsonl", model="stage:rm")
    with pytest.raises(
        ConfigError, match=r"stage 'rm' leaves no model \(reward leaves a reward_model, and the policy"
    ):
        TrainingPipeline(name="a", model="m/m", stages=(first, next_one))
    step_scores = {"method": "process_reward", "training_data": "p.jsonl", "model": "stage:rm"}
    with pytest.raises(ConfigError, match="stage 'rm' leaves no model"):
        TrainingPipeline(name="a", model="m/m", stages=(first, TrainingStage(name="prm", **step_scores)))
