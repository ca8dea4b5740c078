"""The recipe of RL from AI feedback: file and code are one thing, and the smoke file runs."""

import json
from pathlib import Path

import pytest

from stagekit import load
from stagekit.recipes import rlaif
from stagekit.recipes.launch import launch
from stagekit.result import StageResult
from tests.test_recipes import RECIPES, needs_smollm2


FOLDER = RECIPES / "rlaif"


def test_the_file_of_the_demo_is_the_recipes_default() -> None:
    needs_smollm2()
    assert load(FOLDER / "smollm2-135m.yaml") == rlaif.pipeline()


def test_the_smoke_file_is_the_same_pipeline_made_small() -> None:
    smoke, demo = load(FOLDER / "smoke.yaml"), rlaif.pipeline(model="m", judge=None)
    for small, real in zip(smoke.stages, demo.stages, strict=True):
        assert (small.name, small.method.type) == (real.name, real.method.type)
        assert (small.training_data, small.validation_data) == (real.training_data, real.validation_data)


def test_a_small_model_s_file_says_that_it_cannot_judge() -> None:
    for name in ("smollm2-135m.yaml", "rl-cai.yaml"):
        assert "135M model cannot judge" in " ".join((FOLDER / name).read_text().replace("#", " ").split())


def test_the_smoke_file_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAGEKIT_CACHE", str(tmp_path / "cache"))
    arguments = ["--config", str(FOLDER / "smoke.yaml"), "--output-dir", str(tmp_path / "run")]
    assert launch(rlaif.pipeline, "rlaif", "", arguments) == 0
    results = {
        name: StageResult.read(tmp_path / "run" / name / "result.json", tmp_path / "run")
        for name in ("01-sft", "02-feedback", "03-prefer")
    }
    assert all(result is not None and result.status == "completed" for result in results.values())
    feedback, prefer = results["02-feedback"], results["03-prefer"]
    assert feedback is not None and prefer is not None
    assert 0 <= feedback.metrics["held_out/judge/accuracy"] <= 1
    rows = [
        json.loads(line) for line in (tmp_path / "run/02-feedback/data/preferences.jsonl").read_text().splitlines()
    ]
    assert prefer.samples_trained == len(rows) > 0
    assert {row["principle"] for row in rows} <= set(rlaif.PRINCIPLES)
