"""The walk over the stages: what is done is kept, what changed is set aside, what is asked for again runs again."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM

from stagekit import runner
from stagekit.adapters import Constitutional, Custom, Evaluation
from stagekit.errors import ConfigError, StageError
from stagekit.files import lock
from stagekit.groups import Generation, LoRA
from stagekit.stage import TrainingStage
from tests.running import crash_at, pipeline, run, same, stage


Write = Callable[..., Path]


@pytest.fixture
def rows(write_rows: Write, sft_rows: list[Any]) -> str:
    return str(write_rows(sft_rows))


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the stages that were run, in order."""
    names: list[str] = []
    original = runner.run_stage

    def run_stage(task: Any, *args: Any) -> Any:
        names.append(task.stage.name)
        return original(task, *args)

    monkeypatch.setattr(runner, "run_stage", run_stage)
    return names


def short(name: str, data: Any, **options: Any) -> TrainingStage:
    return stage(name, data, max_steps=1, warmup_ratio=0, **options)


def status(folder: Path) -> tuple[str, str]:
    plain = json.loads((folder / "result.json").read_text())
    return plain["status"], plain["reason"]


def test_a_finished_stage_is_kept(rows: str, tiny_model_path: str, tmp_path: Path, ran: list[str]) -> None:
    stages = short("a", rows), short("b", rows)
    first = run(tiny_model_path, tmp_path, *stages)
    assert run(tiny_model_path, tmp_path, *stages) == first
    assert ran == ["a", "b"]


def test_words_about_a_stage_do_not_make_it_run_again(
    rows: str, tiny_model_path: str, tmp_path: Path, ran: list[str]
) -> None:
    run(tiny_model_path, tmp_path, short("a", rows))
    run(tiny_model_path, tmp_path, short("a", rows, description="new", tags=("x",), metadata={"y": 1}))
    assert ran == ["a"]


def test_a_changed_stage_and_those_after_it_run_again_and_the_old_folder_is_kept(
    rows: str, tiny_model_path: str, tmp_path: Path, ran: list[str]
) -> None:
    run(tiny_model_path, tmp_path, short("a", rows), short("b", rows), short("c", rows))
    shutil.copytree(tmp_path / "02-b/policy", tmp_path / "before")
    run(tiny_model_path, tmp_path, short("a", rows), short("b", rows, learning_rate=1e-2), short("c", rows))
    assert ran == ["a", "b", "c", "b", "c"]
    replaced = sorted((tmp_path / "replaced").iterdir())
    assert [path.name.rpartition("-")[0] for path in replaced] == ["02-b", "03-c"]
    assert same(replaced[0] / "policy", tmp_path / "before")
    assert not same(replaced[0] / "policy", tmp_path / "02-b/policy")


def test_changed_data_make_a_stage_run_again(rows: str, tiny_model_path: str, tmp_path: Path, ran: list[str]) -> None:
    run(tiny_model_path, tmp_path, short("a", rows))
    text = Path(rows).read_text()
    Path(rows).write_text(text.replace("spider", "beetle"))
    run(tiny_model_path, tmp_path, short("a", rows))
    assert ran == ["a", "a"]


def test_a_half_done_stage_of_other_settings_is_set_aside(
    rows: str, tiny_model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        crash_at(patch, 5)
        with pytest.raises(StageError):
            run(tiny_model_path, tmp_path / "run", stage("a", rows))
    changed = stage("a", rows, learning_rate=2e-3)
    result = run(tiny_model_path, tmp_path / "run", changed)
    clean = run(tiny_model_path, tmp_path / "clean", changed)
    assert same(str(result.policy), str(clean.policy))
    (replaced,) = (tmp_path / "run/replaced").iterdir()
    assert (replaced / "checkpoints/checkpoint-4/complete").is_file()


def test_fresh_starts_over_and_leaves_foreign_files_alone(
    rows: str, tiny_model_path: str, tmp_path: Path, ran: list[str]
) -> None:
    folder = tmp_path / "run"
    run(tiny_model_path, folder, short("a", rows))
    (folder / "mine").mkdir()
    (folder / "mine/notes.txt").write_text("keep")
    run(tiny_model_path, folder, short("a", rows), fresh=True)
    assert ran == ["a", "a"]
    assert (folder / "mine/notes.txt").read_text() == "keep"
    assert not (folder / "replaced").exists()


def test_from_stage_runs_that_one_and_those_after_it_again(
    rows: str, tiny_model_path: str, tmp_path: Path, ran: list[str]
) -> None:
    stages = short("a", rows), short("b", rows), short("c", rows)
    first = run(tiny_model_path, tmp_path, *stages)
    shutil.copytree(tmp_path / "03-c/policy", tmp_path / "before")
    assert run(tiny_model_path, tmp_path, *stages, from_stage="b").policy == first.policy
    assert ran == ["a", "b", "c", "b", "c"]
    assert same(tmp_path / "before", str(first.policy))
    assert not (tmp_path / "replaced").exists()


def test_from_stage_starts_a_half_done_stage_anew(
    rows: str, tiny_model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = short("a", rows, lora=LoRA(rank=2)), stage("b", rows)
    with monkeypatch.context() as patch:
        crash_at(patch, 5)
        with pytest.raises(StageError):
            run(tiny_model_path, tmp_path, *stages)
    marker = tmp_path / "02-b/base/old"
    marker.write_text("merged before")
    run(tiny_model_path, tmp_path, *stages, from_stage="a")
    assert not marker.exists()


def test_until_stage_ends_there(rows: str, tiny_model_path: str, tmp_path: Path, ran: list[str]) -> None:
    stages = short("a", rows), short("b", rows)
    assert len(run(tiny_model_path, tmp_path, *stages, until_stage="a").stages) == 1
    assert len(run(tiny_model_path, tmp_path, *stages).stages) == 2
    assert ran == ["a", "b"]


def test_an_unknown_stage_to_start_from_is_told_with_those_there_are(rows: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--from-stage: no stage 'x'; there are a, b"):
        run("unused-model/name", tmp_path, short("a", rows), short("b", rows), from_stage="x")


def test_a_disabled_stage_passes_the_model_on(rows: str, tiny_model_path: str, tmp_path: Path, ran: list[str]) -> None:
    result = run(tiny_model_path, tmp_path, short("a", rows), short("b", rows, enabled=False), short("c", rows))
    assert ran == ["a", "c"]
    assert status(tmp_path / "02-b") == ("skipped", "enabled: false")
    assert result["b"].policy is None
    alone = run(tiny_model_path, tmp_path / "other", short("a", rows), short("c", rows))
    assert same(str(result.policy), str(alone.policy))


def test_a_stage_that_is_switched_off_for_one_run_keeps_its_result_and_comes_back(
    rows: str, tiny_model_path: str, tmp_path: Path, ran: list[str]
) -> None:
    on = short("a", rows), short("b", rows)
    off = short("a", rows), short("b", rows, enabled=False)
    first = run(tiny_model_path, tmp_path, *on)
    assert run(tiny_model_path, tmp_path, *off).policy == first["a"].policy
    assert run(tiny_model_path, tmp_path, *on) == first
    assert ran == ["a", "b"]


def test_a_stage_that_is_switched_on_later_runs(
    rows: str, tiny_model_path: str, tmp_path: Path, ran: list[str]
) -> None:
    run(tiny_model_path, tmp_path, short("a", rows), short("b", rows, enabled=False))
    run(tiny_model_path, tmp_path, short("a", rows), short("b", rows))
    assert ran == ["a", "b"]


def test_a_stage_whose_condition_is_false_is_skipped_and_passes_the_model_on(
    rows: str, tiny_model_path: str, tmp_path: Path
) -> None:
    seen: list[Any] = []

    def condition(previous: Any) -> bool:
        seen.append(previous)
        return False

    stages = short("a", rows), short("b", rows, run_condition=condition), short("c", rows)
    result = run(tiny_model_path, tmp_path, *stages)
    assert seen == [result["a"]]
    assert status(tmp_path / "02-b") == ("skipped", "run_condition returned False")
    alone = run(tiny_model_path, tmp_path / "other", short("a", rows), short("c", rows))
    assert same(str(result.policy), str(alone.policy))


def test_a_skipped_stage_does_not_cost_the_next_one_its_model(rows: str, tiny_model_path: str, tmp_path: Path) -> None:
    """With save_checkpoint_after: false the model goes when nothing reads it any more, not before."""
    stages = (
        short("a", rows, save_checkpoint_after=False),
        short("b", rows, run_condition=lambda previous: False),
        short("c", rows),
    )
    result = run(tiny_model_path, tmp_path, *stages)
    assert result["c"].status == "completed"
    assert not (tmp_path / "01-a/policy").exists()


def test_a_condition_is_asked_again_where_the_result_that_it_reads_is_new(
    rows: str, tiny_model_path: str, tmp_path: Path
) -> None:
    def passed(previous: Any) -> bool:
        return bool(previous.metrics["score"] > 0.5)

    def stages(score: float) -> tuple[TrainingStage, ...]:
        def measure(context: Any) -> dict[str, Any]:
            return {"metrics": {"score": score}}

        metadata = Custom(function=measure)
        return (
            TrainingStage(name="measure", method=metadata, random_seed=round(10 * score)),
            short("a", rows, run_condition=passed),
        )

    assert run(tiny_model_path, tmp_path, *stages(0.1))["a"].status == "skipped"
    assert run(tiny_model_path, tmp_path, *stages(0.9))["a"].status == "completed"


def test_a_deleted_model_is_made_again_when_a_later_stage_needs_it(
    rows: str, tiny_model_path: str, tmp_path: Path, ran: list[str]
) -> None:
    first = short("a", rows, save_checkpoint_after=False)
    run(tiny_model_path, tmp_path, first, short("b", rows))
    assert not (tmp_path / "01-a/policy").exists()
    assert (tmp_path / "01-a/result.json").is_file()
    run(tiny_model_path, tmp_path, first, short("b", rows))
    assert ran == ["a", "b"]
    run(tiny_model_path, tmp_path, first, short("b", rows, learning_rate=1e-2))
    assert ran == ["a", "b", "a", "b"]
    assert not (tmp_path / "01-a/policy").exists()


def test_an_evaluation_does_not_change_what_is_trained_after_it(
    rows: str, tiny_model_path: str, tmp_path: Path
) -> None:
    measure = TrainingStage(name="m", method=Evaluation(), validation_data=rows)
    result = run(tiny_model_path, tmp_path / "with", short("a", rows), measure, stage("b", rows))
    alone = run(tiny_model_path, tmp_path / "without", short("a", rows), stage("b", rows))
    assert same(str(result.policy), str(alone.policy))


def test_a_failure_in_the_second_stage_names_it_and_leaves_the_first(
    rows: str, tiny_model_path: str, tmp_path: Path, ran: list[str]
) -> None:
    def fails(context: Any) -> None:
        raise ValueError("no such thing")

    stages = short("a", rows), TrainingStage(name="b", method=Custom(function=fails))
    with pytest.raises(StageError, match="stage 'b': ValueError: no such thing") as caught:
        run(tiny_model_path, tmp_path, *stages)
    assert isinstance(caught.value.__cause__, ValueError)
    assert status(tmp_path / "01-a") == ("completed", "")
    assert status(tmp_path / "02-b") == ("failed", "stage 'b': ValueError: no such thing")
    assert "in fails" in (tmp_path / "02-b/error.txt").read_text()

    works = TrainingStage(name="b", method=Custom(function=lambda context: None))
    run(tiny_model_path, tmp_path, short("a", rows), works)
    assert ran == ["a", "b", "b"]


def test_an_error_report_goes_when_the_stage_succeeds(
    rows: str, tiny_model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        crash_at(patch, 5)
        with pytest.raises(StageError):
            run(tiny_model_path, tmp_path, stage("a", rows))
    assert (tmp_path / "01-a/error.txt").is_file()
    run(tiny_model_path, tmp_path, stage("a", rows))
    assert not (tmp_path / "01-a/error.txt").exists()


def test_a_live_dataset_is_known_again_and_a_live_model_is_not(
    sft_rows: list[Any], tiny_model_path: str, tmp_path: Path, ran: list[str]
) -> None:
    run(tiny_model_path, tmp_path / "data", short("a", Dataset.from_list(sft_rows)))
    run(tiny_model_path, tmp_path / "data", short("a", Dataset.from_list(sft_rows)))
    assert ran == ["a"]
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    live = run(model, tmp_path / "model", short("b", Dataset.from_list(sft_rows)))
    run(model, tmp_path / "model", short("b", Dataset.from_list(sft_rows)))
    assert ran == ["a", "b", "b"]
    assert same(str(live.policy), tmp_path / "data/01-a/policy")
    assert all((before[name] == tensor).all() for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("what", ["model", "data", "function"])
def test_live_objects_cannot_go_to_children(
    what: str, rows: str, sft_rows: list[Any], tiny_model_path: str, tmp_path: Path
) -> None:
    live = AutoModelForCausalLM.from_pretrained(tiny_model_path) if what == "model" else tiny_model_path
    data = Dataset.from_list(sft_rows) if what == "data" else rows
    options = {"run_condition": lambda previous: True} if what == "function" else {}
    path = {"model": "model", "data": "stages.a.training_data", "function": "stages.a.run_condition"}[what]
    with pytest.raises(ConfigError, match=rf"{path}: is a .*; stages in children need files and names"):
        run(live, tmp_path, short("a", data, **options), isolate=True)


def test_a_second_run_in_the_same_folder_is_refused(rows: str, tiny_model_path: str, tmp_path: Path) -> None:
    from stagekit.errors import RunLocked

    folder = tmp_path / "run"
    folder.mkdir()
    with lock(folder), pytest.raises(RunLocked, match=r"process \d+ is working in this run folder"):
        run(tiny_model_path, folder, short("a", rows))
    assert list(folder.iterdir()) == [folder / ".lock"]


def test_texts_are_used_again_when_only_the_training_changed(
    tiny_model_path: str, write_rows: Write, tmp_path: Path
) -> None:
    calls: list[int] = []

    def reply(messages: Any) -> str:
        calls.append(1)
        return f"Text {len(messages)} for {messages[0]['content']}"

    prompts = str(write_rows([{"prompt": "Name a fruit."}, {"prompt": "Is ice cold?"}]))

    def cai(**options: Any) -> TrainingStage:
        generation = Generation(backend=reply, max_new_tokens=16)
        return short("c", prompts, method=Constitutional(rounds=1), generation=generation, **options)

    run(tiny_model_path, tmp_path, cai())
    assert len(calls) == 6
    run(tiny_model_path, tmp_path, cai(learning_rate=1e-2))
    assert len(calls) == 6
    run(tiny_model_path, tmp_path, cai(random_seed=7))
    assert len(calls) == 12
    assert list((tmp_path / "01-c").glob("journal-*.jsonl"))


def test_the_folder_of_a_run_holds_what_was_asked_for(rows: str, tiny_model_path: str, tmp_path: Path) -> None:
    run(tiny_model_path, tmp_path, short("a", rows))
    held = json.loads((tmp_path / "lock.json").read_text())
    assert held["seeds"] == {"a": 42}
    assert {"python", "torch", "trl"} <= held["packages"].keys()
    assert held["data"]["stages.a.training_data"]["source"] == rows
    assert pipeline(tiny_model_path, tmp_path, short("a", rows)).folder == tmp_path
    import yaml

    plain = yaml.safe_load((tmp_path / "pipeline.yaml").read_text())
    assert plain["model"] == tiny_model_path
    assert plain["stages"][0]["name"] == "a"
