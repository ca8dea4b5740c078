"""The recipes that learn from rewards: files and code are one thing, and the smoke files run."""

import json
import math
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from stagekit import load
from stagekit.errors import ConfigError
from stagekit.plan import plan
from stagekit.recipes import held_out, rlhf, rlvr
from stagekit.recipes.launch import launch
from stagekit.recipes.shipped import LIST
from stagekit.result import StageResult
from tests.test_recipes import RECIPES, needs_smollm2


DATA = files("stagekit") / "recipes/data"
KINDS: dict[str, Any] = {"rlvr": rlvr, "rlhf": rlhf}


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("kind", KINDS)
def test_the_file_of_the_demo_is_the_recipes_default(kind: str) -> None:
    needs_smollm2()
    assert load(RECIPES / kind / "smollm2-135m.yaml") == KINDS[kind].pipeline()


@pytest.mark.parametrize("kind", KINDS)
def test_the_smoke_file_is_the_same_pipeline_made_small(kind: str) -> None:
    smoke, demo = load(RECIPES / kind / "smoke.yaml"), KINDS[kind].pipeline(model="m")
    for small, real in zip(smoke.stages, demo.stages, strict=True):
        assert (small.name, small.method.type) == (real.name, real.method.type)
        assert (small.training_data, small.validation_data) == (real.training_data, real.validation_data)
        assert getattr(small.method, "reward", None) == getattr(real.method, "reward", None)


@pytest.mark.parametrize("kind", KINDS)
def test_the_cloud_file_is_the_shape_of_the_recipe_on_eight_gpus_and_says_that_it_was_not_run(kind: str) -> None:
    file = RECIPES / kind / "llama-3.1-8b.yaml"
    cloud, demo = load(file), KINDS[kind].pipeline(model="m")
    assert "it has not been run on GPUs" in file.read_text()
    assert cloud.stages[-1].method.type == demo.stages[-1].method.type
    entries = plan(cloud, 8)
    assert [entry["stage"] for entry in entries] == [stage.name for stage in cloud.stages]
    assert all(stage.distributed_strategy == "ddp" and stage.lora is not None for stage in cloud.stages)
    found = {one["argument"]: one["value"] for one in entries[-1]["arguments"]}
    assert (found["use_vllm"], found["vllm_mode"], found["bf16"]) == (True, "colocate", True)
    step = 8 * found["per_device_train_batch_size"] * found["gradient_accumulation_steps"]
    assert step % found.get("num_generations", 1) == 0
    assert found.get("generation_batch_size", step) % step == 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_smoke_file_runs(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAGEKIT_CACHE", str(tmp_path / "cache"))
    arguments = ["--config", str(RECIPES / kind / "smoke.yaml"), "--output-dir", str(tmp_path / "run")]
    assert launch(KINDS[kind].pipeline, kind, "", arguments, after=held_out.show) == 0
    folders = sorted(path for path in (tmp_path / "run").iterdir() if path.name[:2].isdigit())
    for folder in folders:
        result = StageResult.read(folder / "result.json", tmp_path / "run")
        assert result is not None
        assert result.status == "completed"
    shown = capsys.readouterr().out
    assert "64 held-out prompts" in shown
    assert re.search(r"  reward: \S+ \(\S+ to \S+\) -> \S+ \(\S+ to \S+\)\n", shown)
    if kind == "rlhf":
        found = {one.name: one for one in held_out.measured(folders[-1])}
        assert found["reward"] != found["rewards/form/mean"]  # the form is measured, and rewards nothing


def test_the_rule_is_met_by_what_the_pairs_prefer_and_not_by_the_others() -> None:
    for row in rows("lists_pairs.jsonl"):
        assert re.fullmatch(LIST, row["chosen"][0]["content"])
        assert not re.fullmatch(LIST, row["rejected"][0]["content"])


def test_the_demonstrations_are_of_both_kinds() -> None:
    right = [bool(re.fullmatch(LIST, row["completion"][0]["content"])) for row in rows("lists_sft.jsonl")]
    assert 0.25 < sum(right) / len(right) < 0.75


def test_no_held_out_prompt_is_trained_on() -> None:
    def asked(name: str) -> set[str]:
        return {row["prompt"][0]["content"] for row in rows(name)}

    held = asked("lists_held_out.jsonl")
    assert len(held) == len(rows("lists_held_out.jsonl")) == 64
    things = {prompt.rpartition("three ")[2] for prompt in held}
    for name in ("lists_sft.jsonl", "lists_pairs.jsonl", "lists_prompts.jsonl"):
        assert not things & {prompt.rpartition("three ")[2] for prompt in asked(name)}


def test_the_interval_of_a_share() -> None:
    low, high = held_out.interval(0.5, 64)
    assert (low, high) == (pytest.approx(0.3808, abs=1e-3), pytest.approx(0.6192, abs=1e-3))
    assert held_out.interval(0.0, 64)[0] == 0
    assert math.isclose(held_out.interval(1.0, 64)[1], 1.0)


def test_the_interval_of_a_mean_is_that_of_its_standard_error() -> None:
    assert held_out.mean_interval(2.0, 4.0, 64) == (pytest.approx(1.02, abs=1e-3), pytest.approx(2.98, abs=1e-3))


def evaluated(folder: Path, **shown: float) -> Path:
    lines = [{"step": step, "eval_reward": step * 0.5, "eval_reward_std": 0.4, **shown} for step in range(2)]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return folder


def test_which_rewards_are_shares_is_known_from_what_the_stage_declared(tmp_path: Path) -> None:
    folder = evaluated(tmp_path, **{"eval_rewards/form/mean": 0.5, "eval_rewards/rm/mean": 0.5})
    assert [one.is_share for one in held_out.measured(folder)] == [False] * 3
    form = "{source: stagekit.verifiers:regex, name: form, weight: 0.0}"
    (folder / "stage.yaml").write_text(f"method: {{reward: [{{source: 'stage:rm'}}, {form}]}}")
    found = {one.name: one.is_share for one in held_out.measured(folder)}
    assert found == {"reward": False, "rewards/form/mean": True, "rewards/rm/mean": False}
    (folder / "stage.yaml").write_text("method: {reward: [{source: stagekit.verifiers:regex}]}")
    assert [one.name for one in held_out.measured(folder) if one.is_share] == ["reward"]
    assert held_out.told(folder)[0] == "reward: 0.000 (0.000 to 0.057) -> 0.500 (0.381 to 0.619)"


def test_a_stage_that_did_not_evaluate_says_so_at_the_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held_out.show(tmp_path)
    assert "has no metrics.jsonl" in capsys.readouterr().out


def test_a_folder_without_evaluations_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no metrics\.jsonl"):
        held_out.measured(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "eval_reward": 0.5}\n')
    with pytest.raises(ConfigError, match="has 1 evaluations with rewards"):
        held_out.measured(tmp_path)
