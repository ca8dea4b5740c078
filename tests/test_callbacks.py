"""The callbacks, each at the trainer's events, without a trainer."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import TrainerControl, TrainerState

from stagekit.callbacks import MARK, Marker, Metrics, SaveByEpoch, StopAndSave, StopEarly, last_checkpoint
from stagekit.errors import Interrupted, StageError
from stagekit.groups import EarlyStopping
from stagekit.hooks import Tracked
from stagekit.stopping import Stop


ARGS: Any = SimpleNamespace(output_dir="")


def evaluations(callback: StopEarly, values: list[float], key: str = "eval_loss") -> int | None:
    """After which of the evaluations training stops."""
    for number, value in enumerate(values, 1):
        control = TrainerControl()
        callback.on_evaluate(ARGS, TrainerState(), control, {key: value})
        if control.should_training_stop:
            return number
    return None


def test_t51_steady_small_gains_do_not_stop_training() -> None:
    """Trap T51: transformers' callback compares with a delta to the best checkpoint and stops at the fourth."""
    series = [1.0 - 0.05 * step for step in range(15)]
    assert evaluations(StopEarly(EarlyStopping(patience=3, min_delta=0.04), "eval_loss"), series) is None


def test_gains_below_min_delta_do_not_count() -> None:
    series = [1.0, 0.97, 0.94, 0.91]  # against 1.0, then against 0.94
    assert evaluations(StopEarly(EarlyStopping(patience=2, min_delta=0.05), "eval_loss"), series) is None
    assert evaluations(StopEarly(EarlyStopping(patience=2, min_delta=0.1), "eval_loss"), series) == 3


@pytest.mark.parametrize(("maximize", "expected"), [(True, None), (False, 3)])
def test_the_direction_is_the_users(maximize: bool, expected: int | None) -> None:
    options = EarlyStopping(patience=2, metric="accuracy", maximize=maximize)
    assert evaluations(StopEarly(options, "eval_acc"), [0.1, 0.2, 0.3, 0.4], "eval_acc") == expected


def test_a_loss_that_is_no_number_stops_at_once() -> None:
    assert evaluations(StopEarly(EarlyStopping(patience=9), "eval_loss"), [1.0, math.nan]) == 2


def test_t49_a_metric_that_was_not_measured_is_told_with_those_that_were() -> None:
    callback = StopEarly(EarlyStopping(metric="f1"), "eval_f1")
    with pytest.raises(
        StageError, match=r"early_stopping\.metric: no metric 'eval_f1' was measured; there are: eval_a"
    ):
        callback.on_evaluate(ARGS, TrainerState(), TrainerControl(), {"eval_a": 1.0})


def test_the_count_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    before = StopEarly(EarlyStopping(patience=3), "eval_loss")
    assert evaluations(before, [1.0, 2.0, 2.0]) is None
    states = {"stateful_callbacks": {"StopEarly": before.state()}}
    (tmp_path / "trainer_state.json").write_text(json.dumps(states))
    assert evaluations(StopEarly(EarlyStopping(patience=3), "eval_loss", tmp_path), [2.0]) == 1


@pytest.mark.parametrize(
    ("epoch", "saves"), [(1.0, False), (2.0, True), (2.0000000001, True), (1.6, False), (4, True)]
)
def test_checkpoints_by_epoch_come_at_the_ends_of_every_nth_epoch(epoch: float, saves: bool, tmp_path: Path) -> None:
    control = TrainerControl()
    args: Any = SimpleNamespace(output_dir=str(tmp_path))
    SaveByEpoch(2).on_epoch_end(args, TrainerState(global_step=7, epoch=epoch), control)
    assert control.should_save is saves


def test_t52_no_second_checkpoint_at_a_step_that_has_one(tmp_path: Path) -> None:
    """Trap T52."""
    (tmp_path / "checkpoint-7").mkdir()
    (tmp_path / "checkpoint-7" / MARK).write_text("{}")
    control = TrainerControl()
    args: Any = SimpleNamespace(output_dir=str(tmp_path))
    SaveByEpoch(1).on_epoch_end(args, TrainerState(global_step=7, epoch=1.0), control)
    assert not control.should_save


def test_t54_time_that_is_up_stops_at_a_checkpoint_but_not_after_the_last_step() -> None:
    callback = StopAndSave(Stop(), started=-1e9, limit_seconds=1.0)
    control = TrainerControl()
    callback.on_step_end(ARGS, TrainerState(global_step=4, max_steps=4), control)
    assert (callback.reason, control.should_save) == ("", False)
    callback.on_step_end(ARGS, TrainerState(global_step=3, max_steps=4), control)
    assert (callback.reason, control.should_save, control.should_training_stop) == ("max_duration", True, True)


def test_a_user_who_asks_comes_before_the_clock() -> None:
    stop = Stop()
    stop.ask()
    callback = StopAndSave(stop, started=-1e9, limit_seconds=1.0)
    callback.on_step_end(ARGS, TrainerState(global_step=3, max_steps=4), TrainerControl())
    assert callback.reason == "interrupted"
    assert callback.leaves()


def test_a_mark_holds_the_sizes_and_a_changed_file_makes_the_checkpoint_worthless(tmp_path: Path) -> None:
    for step in (9, 10):
        folder = tmp_path / f"checkpoint-{step}"
        (folder / "sub").mkdir(parents=True)
        (folder / "sub/weights").write_text("12345")
        args: Any = SimpleNamespace(output_dir=str(tmp_path))
        Marker().on_save(args, TrainerState(global_step=step), TrainerControl())
    assert json.loads((tmp_path / "checkpoint-9/complete").read_text()) == {"sub/weights": 5}
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    (tmp_path / "checkpoint-10/sub/weights").write_text("123")
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-9"
    assert not (tmp_path / "checkpoint-10").exists()


def test_who_asked_to_stop_is_let_go_once_the_checkpoint_is_whole(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-3").mkdir()
    args: Any = SimpleNamespace(output_dir=str(tmp_path))
    with pytest.raises(Interrupted, match="step 3"):
        Marker(lambda: True).on_save(args, TrainerState(global_step=3), TrainerControl())
    assert last_checkpoint(tmp_path) is not None


def test_metrics_of_steps_that_are_done_again_are_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    records = [{"step": 1}, {"step": 2}, {"step": 2, "train_runtime": 1.0}, {"step": 3}]
    torn = '{"step": 3, "lo'
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + torn)
    Metrics(path, 2, False, Tracked())
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"step": 1}, {"step": 2}]
    Metrics(path, 0, False, Tracked())
    assert path.read_text() == ""


def test_metrics_leave_out_what_is_not_tracked(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tracked = Tracked({"eval_loss": "loss", "eval_acc": "accuracy"}, frozenset({"loss"}))
    callback = Metrics(path, 0, False, tracked)
    state = TrainerState(global_step=5, is_world_process_zero=True)
    callback.on_log(ARGS, state, TrainerControl(), {"eval_loss": 1.0, "eval_acc": 0.5, "eval_margin": 2.0})
    record = json.loads(path.read_text())
    assert record.pop("time") > 0
    assert record == {"step": 5, "eval_loss": 1.0, "eval_margin": 2.0}
