"""The self-play stage through a pipeline on the tiny model."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stagekit import TrainingPipeline
from stagekit.adapters import SelfPlay
from stagekit.errors import ConfigError, StageError
from stagekit.groups import Generation, LoRA
from stagekit.pipeline import to_plain
from stagekit.plan import plan
from stagekit.stage import TrainingStage
from tests.running import CrashError, crash_at, lines, pipeline, run, same, stage


Write = Callable[..., Path]
GENERATION = Generation(max_new_tokens=24, batch_tokens=300)


@pytest.fixture
def data(write_rows: Write, sft_rows: list[Any]) -> str:
    return str(write_rows(sft_rows[:4], "rows.jsonl"))


def played(name: str, data: Any, **options: Any) -> TrainingStage:
    method = {"iterations": 2, "responses_per_prompt": 3, "temperature": 1.0, **options.pop("method", {})}
    given = {"max_steps": 2, "generation": GENERATION, "learning_rate": 1e-4, **options}
    return stage(name, data, SelfPlay(**method), **given)


def records(folder: Path) -> list[dict[str, Any]]:
    entries = [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]
    return [entry["record"] for entry in entries if entry["type"] == "record"]


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_iteration_starts_at_ln_2_against_the_model_of_the_one_before(
    data: str, sft_rows: list[Any], tiny_model_path: str, tmp_path: Path
) -> None:
    result = run(tiny_model_path, tmp_path, played("spin", data, learning_rate=1e-3))["spin"]
    folders = [tmp_path / "01-spin/iteration-1", tmp_path / "01-spin"]
    for number, folder in enumerate(folders, start=1):
        assert lines(folder)[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert {(record["round"], record["stage"]) for record in records(folder)} == {(number, "spin")}
        pairs = rows(folder / "data/pairs.jsonl")
        assert {row["iteration"] for row in pairs} == {number}
        real = {row["prompt"][0]["content"]: row["completion"][0]["content"] for row in sft_rows}
        assert all(row["chosen"][0]["content"] == real[row["prompt"][0]["content"]] for row in pairs)
    models = [{record["model"] for record in records(folder)} for folder in folders]
    assert models[0] != models[1] and len(models[0] | models[1]) == 2
    assert not same(folders[0] / "policy", str(result.policy))
    assert result.steps == 4
    assert rows(result.dataset("pairs")) == rows(folders[1] / "data/pairs.jsonl")
    assert {"margin", "real_logps_change", "iteration_1/margin"} <= result.metrics.keys()


def test_validation_data_are_answered_and_paired_and_change_nothing_of_the_training(
    data: str, write_rows: Write, sft_rows: list[Any], tiny_model_path: str, tmp_path: Path
) -> None:
    held_out = str(write_rows(sft_rows[4:7], "held-out.jsonl"))
    given = {"validation_data": held_out, "evaluation_steps": 1, "early_stopping": None}
    measured = run(tiny_model_path, tmp_path / "measured", played("s", data, **given))["s"]
    plain = run(tiny_model_path, tmp_path / "plain", played("s", data))["s"]
    assert {"eval_loss", "iteration_1/eval_loss"} <= measured.metrics.keys()
    assert len((tmp_path / "measured/01-s/validation.jsonl").read_text().splitlines()) > 3
    assert same(str(measured.policy), str(plain.policy))


def test_the_pairs_of_the_iteration_before_are_learnt_too_unless_told(
    data: str, tiny_model_path: str, tmp_path: Path
) -> None:
    both = run(tiny_model_path, tmp_path / "both", played("s", data))["s"]
    alone = run(tiny_model_path, tmp_path / "alone", played("s", data, method={"mix_previous": False}))["s"]
    counts = [len(rows(tmp_path / f"alone/01-s/{place}data/pairs.jsonl")) for place in ("iteration-1/", "")]
    assert alone.samples_trained == sum(counts)
    first, second = (len(rows(tmp_path / f"both/01-s/{place}data/pairs.jsonl")) for place in ("iteration-1/", ""))
    assert both.samples_trained == first + (second + first)


def test_an_adapter_plays_against_itself(data: str, tiny_model_path: str, tmp_path: Path) -> None:
    result = run(tiny_model_path, tmp_path, played("s", data, lora=LoRA(rank=2, dropout=0.0), learning_rate=1e-2))["s"]
    for folder in (tmp_path / "01-s/iteration-1", tmp_path / "01-s"):
        assert lines(folder)[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    config = json.loads(Path(str(result.policy), "adapter_config.json").read_text())
    assert Path(config["base_model_name_or_path"]).resolve() == Path(tiny_model_path).resolve()


@pytest.mark.slow
@pytest.mark.parametrize("where", ["iteration 1", "iteration 2"])
def test_a_training_that_dies_in_an_iteration_ends_as_one_that_does_not(
    where: str, data: str, tiny_model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = played("s", data, max_steps=4, checkpoint_save_steps=2)
    whole = run(tiny_model_path, tmp_path / "whole", one)
    with monkeypatch.context() as patch:
        if where == "iteration 1":
            crash_at(patch, 3)
        else:
            from stagekit import iterations

            keep = iterations._keep

            def then_crash(*arguments: Any) -> None:
                keep(*arguments)
                crash_at(patch, 3)

            patch.setattr(iterations, "_keep", then_crash)
        with pytest.raises(StageError, match=CrashError.__name__):
            run(tiny_model_path, tmp_path / "died", one)
    again = run(tiny_model_path, tmp_path / "died", one)
    assert same(str(whole.policy), str(again.policy))
    for place in ("01-s/iteration-1", "01-s"):
        texts = [sorted(map(json.dumps, records(tmp_path / name / place))) for name in ("whole", "died")]
        assert texts[0] == texts[1]


def test_an_iteration_ends_at_its_margin(data: str, tiny_model_path: str, tmp_path: Path) -> None:
    method = {"iterations": 1, "beta": 1.0, "stop_at_margin": 0.5}
    result = run(tiny_model_path, tmp_path, played("s", data, method=method, max_steps=60, learning_rate=5e-3))["s"]
    assert result.status == "completed"
    assert 0 < result.steps < 60
    assert result.metrics["margin"] >= 0.5


def test_many_cut_answers_and_many_steps_are_told(
    data: str, tiny_model_path: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    short = Generation(max_new_tokens=8)
    method = {"iterations": 1, "responses_per_prompt": 12}
    one = played("s", data, method=method, generation=short, max_steps=3, learning_rate=5e-3)
    run(tiny_model_path, tmp_path, one)
    assert "of the opponent's answers were cut" in caplog.text
    assert "lies beyond the data (it multiplies log(p / p_data) by -9)" in caplog.text


def test_a_model_that_answers_as_the_data_has_nothing_to_learn(
    data: str, sft_rows: list[Any], tiny_model_path: str, tmp_path: Path
) -> None:
    real = {row["prompt"][0]["content"]: row["completion"][0]["content"] for row in sft_rows}
    generation = Generation(backend=lambda messages: real[messages[0]["content"]])
    with pytest.raises(StageError, match=r"stage 's'.*answers\.equal: 12"):
        run(tiny_model_path, tmp_path, played("s", data, generation=generation))


WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"method": {"type": "self_play", "temperature": 0}}, "method.temperature", "0 gives the same answer 4 times"),
    ({"generation": {"temperature": 0.7}}, "generation.temperature", "belongs to method.temperature"),
    ({"trl": {"loss_type": ["ipo"]}}, "trl.loss_type", "DPO's sigmoid"),
    ({"reference": {"update_every": 5}}, "reference", "has no use for it"),
    ({"logging_steps": 0, "method": {"type": "self_play", "stop_at_margin": 2}}, "method.stop_at_margin",
     "set logging_steps above 0"),
    ({"is_evaluation_only": True, "training_data": None, "validation_data": "x.jsonl"}, "is_evaluation_only",
     "only trains"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "path", "message"), WRONG)
def test_what_cannot_work_is_told_by_its_path(given: dict[str, Any], path: str, message: str) -> None:
    least = {"name": "s", "training_data": "x.jsonl", "method": "self_play"}
    with pytest.raises(ConfigError) as caught:
        TrainingStage(**{key: value for key, value in {**least, **given}.items() if value is not None})
    assert [(one.path, message in one.message) for one in caught.value.problems] == [(path, True)]


def test_a_declaration_survives_its_file_and_is_planned(data: str, tiny_model_path: str, tmp_path: Path) -> None:
    declared = pipeline(tiny_model_path, tmp_path, played("s", data))
    assert TrainingPipeline(**to_plain(declared)) == declared
    [entry] = plan(declared)
    assert entry["rows"] == {"read": 4, "trained": 24, "made": {"pairs": 12}}
    assert entry["steps"] == 4
    assert entry["notes"][0] == "3 answers to every row in each of 2 iterations"
    assert "by -9; keep learning_rate times steps small" in entry["notes"][1]
