"""The account of a stage, and its JSON."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stagekit.errors import StageError
from stagekit.result import PipelineResult, StageResult
from tests.running import run, stage


def result(run: Path, **options: Any) -> StageResult:
    return StageResult(**{"name": "a", "index": 1, "type": "sft", "status": "completed", "run": run, **options})


def test_a_result_is_the_same_after_it_was_written_and_read(tmp_path: Path) -> None:
    before = result(
        tmp_path,
        artifacts={"policy": "01-a/policy", "datasets": {"pairs": "01-a/data/pairs.jsonl"}},
        metrics={"train_loss": 1.5},
        steps=3,
        tags=("x", "y"),
        metadata={"k": [1, None]},
        samples_dropped={"too_long": 2},
    )
    before.write(tmp_path / "result.json")
    assert StageResult.read(tmp_path / "result.json", tmp_path) == before
    assert StageResult.read(tmp_path / "other.json", tmp_path) is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"name": "a"}', '"text"'])
def test_a_damaged_file_is_told_by_its_path(text: str, tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text(text)
    with pytest.raises(
        StageError, match=r"result\.json: is no result of a stage .*; delete it to run the stage again"
    ):
        StageResult.read(tmp_path / "result.json", tmp_path)


def test_places_below_the_run_folder_move_with_it(tmp_path: Path) -> None:
    (tmp_path / "one/01-a/policy").mkdir(parents=True)
    artifacts = {"policy": "01-a/policy", "datasets": {"pairs": "01-a/pairs.jsonl"}}
    result(tmp_path / "one", artifacts=artifacts).write(tmp_path / "one/result.json")
    (tmp_path / "one").rename(tmp_path / "two")
    moved = StageResult.read(tmp_path / "two/result.json", tmp_path / "two")
    assert moved is not None
    assert moved.policy == str(tmp_path / "two/01-a/policy")
    assert moved.dataset("pairs") == tmp_path / "two/01-a/pairs.jsonl"
    with pytest.raises(StageError, match="stage 'a' left no dataset 'rows'; it has pairs"):
        moved.dataset("rows")


def test_a_hub_id_stays_a_hub_id(tmp_path: Path) -> None:
    assert result(tmp_path, artifacts={"policy": "owner/name"}).policy == "owner/name"


@pytest.mark.parametrize(
    ("status", "reason", "finished"),
    [
        ("completed", "", True),
        ("skipped", "run_condition returned False", True),
        ("stopped", "max_duration", True),
        ("stopped", "interrupted", False),
        ("failed", "stage 'a': KeyError", False),
    ],
)
def test_what_counts_as_done(status: str, reason: str, finished: bool, tmp_path: Path) -> None:
    assert result(tmp_path, status=status, reason=reason).finished is finished


def test_the_pipelines_policy_is_that_of_the_last_stage_that_has_one(tmp_path: Path) -> None:
    stages = result(tmp_path, artifacts={"policy": "o/n"}), result(tmp_path, name="b", index=2)
    whole = PipelineResult(tmp_path, stages)
    assert whole.policy == "o/n"
    assert whole["b"] is stages[1]
    with pytest.raises(KeyError):
        whole["c"]


def test_a_stage_writes_its_whole_account(
    sft_rows: list[Any], write_rows: Callable[..., Path], tiny_model_path: str, tmp_path: Path
) -> None:
    only = stage("s", str(write_rows(sft_rows)), max_steps=2, description="words", tags=("t",), metadata={"k": "v"})
    run(tiny_model_path, tmp_path / "run", only)
    plain = json.loads((tmp_path / "run/01-s/result.json").read_text())
    assert plain["duration_seconds"] > 0
    assert plain["peak_memory_bytes"] > 50e6
    assert len(plain["digest"]) == 64
    assert plain["tokenizer"]["eos_token"]
    assert plain["metrics"].keys() == {"train_loss", "train_runtime"}
    some = ("name", "index", "type", "status", "reason", "artifacts", "steps", "samples_trained", "samples_dropped")
    assert {key: plain[key] for key in some} == {
        "name": "s",
        "index": 1,
        "type": "sft",
        "status": "completed",
        "reason": "",
        "artifacts": {"policy": "01-s/policy"},
        "steps": 2,
        "samples_trained": 16,
        "samples_dropped": {},
    }
    assert (plain["description"], plain["tags"], plain["metadata"]) == ("words", ["t"], {"k": "v"})


def test_the_peak_of_a_process_is_its_own_and_not_that_of_the_one_that_started_it() -> None:
    large = bytearray(300_000_000)
    code = "from stagekit.environment import peak_memory; print(peak_memory())"
    started = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 5e6 < int(started.stdout) < len(large)
