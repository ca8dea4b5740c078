"""The user's functions at a stage's events: which come, with what, and what happens where one of them fails."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from stagekit import Callbacks, ConfigError, Interrupted, StageError, TrainingStage, load
from stagekit.adapters import METHODS
from tests.running import crash_at, interrupt_at, lines, pipeline, run, stage


Write = Callable[..., Path]
TOLD: list[tuple[str, Any]] = []


def on_start(stage: Any) -> None:
    TOLD.append(("start", stage.name))


def on_epoch(epoch: int, loss: float) -> None:
    TOLD.append(("epoch", (epoch, loss)))


def on_batch(step: int, loss: float) -> None:
    TOLD.append(("batch", (step, loss)))


def on_complete(result: Any) -> None:
    TOLD.append(("complete", result))


def on_error(error: BaseException) -> None:
    TOLD.append(("error", error))


def fails(*arguments: Any) -> None:
    raise ValueError("out of tea")


EVENTS = {
    "on_stage_start": on_start,
    "on_epoch_complete": on_epoch,
    "on_batch_complete": on_batch,
    "on_stage_complete": on_complete,
    "on_stage_error": on_error,
}
ALL = Callbacks(**EVENTS)


@pytest.fixture(autouse=True)
def nothing_told() -> None:
    TOLD.clear()


@pytest.fixture
def data(write_rows: Write, sft_rows: list[Any], preference_rows: list[Any]) -> dict[str, str]:
    return {"sft": str(write_rows(sft_rows, "sft.jsonl")), "dpo": str(write_rows(preference_rows, "dpo.jsonl"))}


@pytest.mark.parametrize(("kind", "batches"), [("sft", 1), ("sft", 2), ("dpo", 2)])
def test_all_events_come_in_order_with_the_losses_of_the_log(
    kind: str, batches: int, data: dict[str, str], tiny_model_path: str, tmp_path: Path
) -> None:
    options = {"max_steps": 0, "epochs": 2, "batch_size": 2, "gradient_accumulation_steps": batches}
    result = run(tiny_model_path, tmp_path, stage("s", data[kind], kind, callbacks=ALL, **options))
    steps = 8 // batches
    assert [event for event, _ in TOLD] == ["start", *(["batch"] * steps + ["epoch"]) * 2, "complete"]
    logged = [(line["step"], line["loss"]) for line in lines(tmp_path / "01-s") if "loss" in line]
    batch = [what for event, what in TOLD if event == "batch"]
    assert [step for step, _ in batch] == [step for step, _ in logged]
    assert [loss for _, loss in batch] == pytest.approx([loss for _, loss in logged], abs=1e-4)
    epochs = [what for event, what in TOLD if event == "epoch"]
    means = [sum(loss for _, loss in batch[start : start + steps]) / steps for start in (0, steps)]
    assert epochs == [(1, pytest.approx(means[0])), (2, pytest.approx(means[1]))]
    assert TOLD[-1][1].metrics == result["s"].metrics


def test_an_epoch_that_is_not_whole_is_not_told(data: dict[str, str], tiny_model_path: str, tmp_path: Path) -> None:
    run(tiny_model_path, tmp_path, stage("s", data["sft"], max_steps=6, callbacks=ALL))
    assert [what[0] for event, what in TOLD if event == "epoch"] == [1]


@pytest.mark.parametrize("step", [3, 5])
def test_a_resumed_epoch_has_the_mean_of_all_its_steps(
    step: int, data: dict[str, str], tiny_model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only = stage("s", data["sft"], callbacks=ALL)
    run(tiny_model_path, tmp_path / "whole", only)
    whole = [what for event, what in TOLD if event == "epoch"]
    TOLD.clear()
    with monkeypatch.context() as patch:
        crash_at(patch, step + 1)
        with pytest.raises(StageError):
            run(tiny_model_path, tmp_path / "killed", only)
    run(tiny_model_path, tmp_path / "killed", only)
    assert [what for event, what in TOLD if event == "epoch"] == whole


@pytest.mark.parametrize("event", ["on_stage_start", "on_epoch_complete", "on_batch_complete", "on_stage_complete"])
def test_a_function_that_fails_fails_the_stage_by_its_name(
    event: str, data: dict[str, str], tiny_model_path: str, tmp_path: Path
) -> None:
    given = Callbacks(**{event: fails, "on_stage_error": on_error})
    expected = rf"stage 's': callbacks\.{event}: {__name__}:fails raised ValueError: out of tea"
    with pytest.raises(StageError, match=expected) as caught:
        run(tiny_model_path, tmp_path, stage("s", data["sft"], max_steps=4, callbacks=given))
    ((told, error),) = TOLD
    assert told == "error"
    assert error is caught.value
    result = json.loads((tmp_path / "01-s/result.json").read_text())
    assert (result["status"], result["reason"]) == ("failed", str(caught.value))


def test_a_failure_is_told_and_stays_the_failure_where_telling_fails(
    data: dict[str, str], tiny_model_path: str, tmp_path: Path
) -> None:
    def condition(result: Any) -> bool:
        raise KeyError("what")

    given = Callbacks(on_stage_start=on_start, on_stage_error=fails)
    with pytest.raises(StageError, match="KeyError"):
        run(tiny_model_path, tmp_path, stage("s", data["sft"], run_condition=condition, callbacks=given))
    reason = json.loads((tmp_path / "01-s/result.json").read_text())["reason"]
    assert "KeyError" in reason
    assert reason.endswith(f"; then callbacks.on_stage_error: {__name__}:fails raised ValueError: out of tea")
    assert TOLD == []


def test_a_stage_that_is_skipped_kept_or_interrupted_is_not_told(
    data: dict[str, str], tiny_model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only = stage("s", data["sft"], max_steps=2, callbacks=ALL)
    run(tiny_model_path, tmp_path / "a", only)
    TOLD.clear()
    run(tiny_model_path, tmp_path / "a", only)
    run(tiny_model_path, tmp_path / "b", stage("s", data["sft"], run_condition=lambda result: False, callbacks=ALL))
    assert TOLD == []
    with monkeypatch.context() as patch:
        interrupt_at(patch, 1)
        with pytest.raises(Interrupted):
            run(tiny_model_path, tmp_path / "c", only)
    assert {event for event, _ in TOLD} == {"start", "batch"}


def test_a_stage_that_does_not_train_has_the_events_of_the_stage_only(
    data: dict[str, str], tiny_model_path: str, tmp_path: Path
) -> None:
    two = Callbacks(on_stage_start=on_start, on_stage_complete=on_complete)
    only = TrainingStage(name="s", method="evaluation", validation_data=data["sft"], batch_size=4, callbacks=two)
    run(tiny_model_path, tmp_path, only)
    assert [event for event, _ in TOLD] == ["start", "complete"]
    for given in (
        {"method": "evaluation", "validation_data": "v"},
        {"method": {"type": "custom", "function": "a.b:c"}},
        {"is_evaluation_only": True, "validation_data": "v"},
    ):
        with pytest.raises(ConfigError) as caught:
            TrainingStage(name="s", callbacks=ALL, **given)
        told = [(problem.path, problem.message) for problem in caught.value.problems]
        never = "never happens: the stage does not train by itself"
        assert told == [("callbacks.on_epoch_complete", never), ("callbacks.on_batch_complete", never)]


def test_functions_are_named_in_yaml_and_looked_for(
    data: dict[str, str], tiny_model_path: str, tmp_path: Path
) -> None:
    named = {event: f"{__name__}:{function.__name__}" for event, function in EVENTS.items()}
    given = stage("s", data["sft"], max_steps=4, callbacks=named)
    raw = {"name": "t", "model": tiny_model_path, "output_dir": str(tmp_path / "run"), "stages": [given.only_set()]}
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(raw))
    load(file).run(quiet=True)
    assert [event for event, _ in TOLD] == ["start", *["batch"] * 4, "epoch", "complete"]
    raw["stages"][0]["callbacks"]["on_batch_complete"] = f"{__name__}:on_bach"
    file.write_text(yaml.safe_dump(raw))
    with pytest.raises(ConfigError, match=r"stages\.s\.callbacks\.on_batch_complete: .* did you mean 'on_batch'"):
        load(file)


def test_children_get_functions_by_name(data: dict[str, str], tiny_model_path: str, tmp_path: Path) -> None:
    live = pipeline(tiny_model_path, tmp_path, stage("s", data["sft"], callbacks=ALL))
    with pytest.raises(ConfigError, match=r"stages\.s\.callbacks\.on_stage_start: is a function itself"):
        live.run(isolate=True, quiet=True)


@pytest.mark.parametrize("kind", sorted(METHODS))
def test_every_type_has_the_option(kind: str) -> None:
    from stagekit.ledger import not_applicable

    base = TrainingStage(name="s", training_data="rows.jsonl")
    assert not_applicable(base.model_copy(update={"method": METHODS[kind].model_construct()}), "callbacks") is None
