"""The process reward stage through pipelines on the tiny model: learnt, named, merged, resumed, compared, counted."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForTokenClassification, AutoTokenizer

from stagekit import ConfigError, StageError, TrainingStage, training
from stagekit.adapters import ProcessReward
from stagekit.groups import LoRA
from stagekit.reward_models import load_process_reward_model
from stagekit.trainers.process_reward import ProcessRewardConfig, ProcessRewardTrainer, score_steps
from tests.running import crash_at, lines, run, same, stage, weights
from tests.test_trl_equivalence import COMMON, bare
from tests.trainers.test_process_reward import rule_rows


Write = Callable[..., Path]
ADAPTER = LoRA(rank=4, alpha=8, dropout=0.1)
ROW = {"prompt": "Tell of rice.\n", "steps": ["water rice train", "not river bread city", "map money"]}


@pytest.fixture
def steps(write_rows: Write) -> str:
    return str(write_rows(rule_rows(64, 0).to_list(), "steps.jsonl"))


def process(data: str, **options: Any) -> TrainingStage:
    method = options.pop("method", ProcessReward())
    return stage("prm", data, method, **{"max_steps": 3, **options})


def chances(path: Any) -> list[float]:
    return score_steps(*load_process_reward_model(str(path)), ROW["prompt"], list(ROW["steps"]))


def test_it_learns_a_rule_and_leaves_a_reward_model_that_loads_plainly(
    write_rows: Write, tiny_model_path: str, tmp_path: Path
) -> None:
    only = process(
        str(write_rows(rule_rows(320, 0).to_list(), "many.jsonl")),
        batch_size=16, max_steps=80, learning_rate=2e-3, random_seed=1, scheduler_type="constant", weight_decay=0.0,
        validation_data=str(write_rows(rule_rows(80, 1).to_list(), "held-out.jsonl")), evaluation_steps=40,
        early_stopping=None, metrics_to_track=("loss", "accuracy"),
    )  # fmt: skip
    result = run(tiny_model_path, tmp_path / "run", only)
    assert result["prm"].artifacts == {"reward_model": "01-prm/reward_model"}
    assert result.policy is None
    last = next(line for line in reversed(lines(tmp_path / "run/01-prm")) if "eval_accuracy" in line)
    assert last["eval_accuracy"] == result["prm"].metrics["eval_accuracy"]
    assert last["eval_accuracy"] > last["eval_majority_baseline"] + 0.15
    folder = str(result["prm"].reward_model)
    plain = AutoModelForTokenClassification.from_pretrained(folder)
    assert (plain.config.num_labels, plain.config.id2label[1], plain.config.step_separator) == (2, "correct", "\n")
    asked = score_steps(plain, AutoTokenizer.from_pretrained(folder), ROW["prompt"], list(ROW["steps"]))
    assert asked[1] < min(asked[0], asked[2])
    assert (Path(folder) / "README.md").is_file()


def test_t9_the_next_stage_starts_from_the_policy_before_it(
    steps: str, write_rows: Write, sft_rows: list[Any], tiny_model_path: str, tmp_path: Path
) -> None:
    """T9, for process reward."""
    data = str(write_rows(sft_rows, "sft.jsonl"))
    first, last = (stage(name, data, max_steps=2, lora=ADAPTER, learning_rate=1e-2) for name in ("one", "two"))
    result = run(tiny_model_path, tmp_path / "with", first, process(steps, lora=ADAPTER), last)
    assert (tmp_path / "with/02-prm/base/config.json").is_file()  # the incoming adapter, merged
    assert not same(tiny_model_path, tmp_path / "with/02-prm/base")
    assert same(str(result.policy), str(run(tiny_model_path, tmp_path / "without", first, last).policy))


@pytest.mark.parametrize("options", [{}, {"bits": 4}], ids=["float", "4-bit"])
def test_an_adapter_is_merged_with_its_head(
    options: dict[str, Any], steps: str, tiny_model_path: str, tmp_path: Path
) -> None:
    lora = LoRA(rank=4, alpha=8, dropout=0, merge=True, **options)
    result = run(
        tiny_model_path,
        tmp_path,
        process(steps, lora=lora, learning_rate=5e-3, method={"step_separator": " ;", "type": "process_reward"}),
    )
    assert result["prm"].artifacts == {"reward_model": "01-prm/reward_model", "adapter": "01-prm/adapter"}
    config = json.loads((tmp_path / "01-prm/adapter/adapter_config.json").read_text())
    assert config["task_type"] == "TOKEN_CLS"
    merged = tmp_path / "01-prm/reward_model"
    assert chances(merged) == pytest.approx(chances(tmp_path / "01-prm/adapter"), abs=1e-4)
    assert AutoModelForTokenClassification.from_pretrained(merged).config.step_separator == " ;"


@pytest.mark.parametrize("lora", [None, ADAPTER], ids=["full", "lora"])
def test_it_resumes_to_the_same_bits(
    lora: LoRA | None, steps: str, tiny_model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only = process(steps, max_steps=8, lora=lora if lora else ...)
    whole = run(tiny_model_path, tmp_path / "whole", only)
    with monkeypatch.context() as patch:
        crash_at(patch, 5)
        with pytest.raises(StageError, match="CrashError"):
            run(tiny_model_path, tmp_path / "killed", only)
    torch.manual_seed(1)
    resumed = run(tiny_model_path, tmp_path / "killed", only)
    assert same(str(whole["prm"].reward_model), str(resumed["prm"].reward_model))
    assert lines(tmp_path / "whole/01-prm") == lines(tmp_path / "killed/01-prm")


@pytest.mark.parametrize(
    ("lora", "accumulate"), [(None, 1), (None, 2), (ADAPTER, 1)], ids=["full", "accumulated", "lora"]
)
def test_it_trains_as_the_bare_trainer(
    lora: LoRA | None, accumulate: int, steps: str, tiny_model_path: str, tmp_path: Path
) -> None:
    only = process(
        steps, max_steps=20, use_deterministic_algorithms=..., lora=lora if lora else ...,
        gradient_accumulation_steps=accumulate, method=ProcessReward(train_on_last_step_only=True),
    )  # fmt: skip
    result = run(tiny_model_path, tmp_path / "run", only)
    losses = [line["loss"] for line in lines(tmp_path / "run/01-prm") if "loss" in line]
    peft = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules=["q_proj", "v_proj"], task_type="TOKEN_CLS")
    given = {**COMMON, "gradient_accumulation_steps": accumulate, "train_on_last_step_only": True}
    given["activation_checkpointing"] = given.pop("gradient_checkpointing")
    trainer = ProcessRewardTrainer(
        tiny_model_path,
        ProcessRewardConfig(str(tmp_path / "bare"), **given, disable_dropout=lora is None),
        rule_rows(64, 0),
        processing_class=AutoTokenizer.from_pretrained(tiny_model_path),
        peft_config=peft if lora else None,
    )
    if lora:
        for name, module in trainer.model.named_modules():
            if isinstance(module, torch.nn.Dropout) and ".lora_dropout." not in name:
                module.p = 0.0  # as a stage keeps dropout to the adapter
    assert losses == bare(trainer)
    assert len(losses) == 20
    saved = weights(str(result["prm"].reward_model))
    trained = {
        name.replace(".default.", ".").replace(".modules_to_save.", "."): tensor
        for name, tensor in trainer.model.named_parameters()
    }
    for name in saved:
        assert torch.equal(trained[name.replace("modules_to_save.", "")], saved[name]), name


def test_rows_that_lost_steps_are_told_apart_from_those_that_lost_all(
    write_rows: Write, tiny_model_path: str, tmp_path: Path
) -> None:
    short = rule_rows(8, 0).to_list()
    partly = {"prompt": "Tell.\n", "completions": ["water", "rice " * 200], "labels": [True, False]}
    wholly = {"prompt": "Tell " * 300, "completions": ["water"], "labels": [True]}
    rows = str(write_rows([*short, partly, partly, wholly]))
    result = run(tiny_model_path, tmp_path / "run", process(rows, trl={"max_length": 128}))
    assert result["prm"].samples_trained == 10
    assert result["prm"].samples_dropped == {"too_long": 1, "truncated": 2}
    whole = run(tiny_model_path, tmp_path / "whole", process(str(write_rows(short, "short.jsonl"))))
    assert whole["prm"].samples_dropped == {}


def test_a_saved_model_that_scores_otherwise_stops_the_stage(
    steps: str, tiny_model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = training._save

    def save(job: Any, trainer: Any) -> Any:
        found = original(job, trainer)
        file = job.folder / "reward_model/model.safetensors"
        tensors = load_file(file)
        save_file({**tensors, "score.bias": tensors["score.bias"] + torch.tensor([0.0, 1.0])}, file, {"format": "pt"})
        return found

    monkeypatch.setattr(training, "_save", save)
    with pytest.raises(StageError, match=r"'prm': .*scores answer 0 with 0\.\d+, and scored it with 0\.\d+ before"):
        run(tiny_model_path, tmp_path, process(steps))


def test_in_bf16_the_saved_model_scores_as_the_trained_one(steps: str, tiny_model_path: str, tmp_path: Path) -> None:
    bf16 = {"use_mixed_precision": True, "mixed_precision_dtype": "bf16"}
    result = run(tiny_model_path, tmp_path, process(steps, **bf16, validation_data=steps, evaluation_steps=3))
    assert result["prm"].status == "completed"
    assert all(0 < chance < 1 for chance in chances(result["prm"].reward_model))


def test_it_is_measured_by_a_stage_of_its_own_type(steps: str, tiny_model_path: str, tmp_path: Path) -> None:
    tracked = {"validation_data": steps, "metrics_to_track": ("loss", "accuracy"), "batch_size": 4}
    trained = process(steps, evaluation_steps=3, early_stopping=None, **tracked)
    measure = TrainingStage(
        name="again", method=ProcessReward(), model="stage:prm", is_evaluation_only=True, **tracked
    )
    result = run(tiny_model_path, tmp_path, trained, measure)
    assert result["again"].metrics["eval_loss"] == pytest.approx(result["prm"].metrics["eval_loss"], rel=1e-5)
    assert result["again"].metrics["eval_accuracy"] == result["prm"].metrics["eval_accuracy"]


@pytest.mark.parametrize(
    ("given", "path", "words"),
    [
        (
            {"method": {"type": "process_reward", "step_separator": ""}},
            "method.step_separator",
            "empty; a step's label",
        ),
        ({"training_data": None}, "training_data", "process_reward trains on data with prompt + completions + labels"),
        ({"reference": {}}, "reference", "stage type 'process_reward' has no use for it"),
    ],
)
def test_what_it_cannot_do_is_told_with_the_way_out(given: dict[str, Any], path: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        TrainingStage(**{"name": "prm", "method": "process_reward", "training_data": "p.jsonl", **given})
    assert [words in one.message for one in caught.value.problems if one.path == path] == [True]
