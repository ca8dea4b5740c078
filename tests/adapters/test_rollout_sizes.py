"""How large a rollout is over several processes: what divides, what is refused and where, how many steps it makes."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from stagekit import ConfigError, TrainingPipeline, TrainingStage
from stagekit.cli import run as command_line
from stagekit.distributed import count_processes
from stagekit.plan import as_text, plan
from tests.running import pipeline, stage


def declared(model: str, folder: Path, method: dict[str, Any], **options: Any) -> TrainingPipeline:
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"say {row}"}) + "\n" for row in range(20)))
    given = {"batch_size": 2, "max_steps": ..., "epochs": 3, "distributed_strategy": "ddp", **options}
    return pipeline(
        model, folder / "run", stage("s", str(rows), {"reward": "tests.sampled:letters", **method}, **given)
    )


def test_a_group_may_lie_on_several_processes(tiny_model_path: str, tmp_path: Path) -> None:
    for kind in ("grpo", "rloo"):
        one = declared(tiny_model_path, tmp_path, {"type": kind, "group_size": 8})
        assert count_processes(one, 4, isolate=True) == 4
        with pytest.raises(ConfigError) as told:
            count_processes(one, 2, isolate=True)
        assert str(told.value) == (
            "stages.s.method.group_size: a rollout of 4 completions (batch_size * gradient_accumulation_steps * 2 "
            "processes) holds no whole groups of 8; make it a multiple"
        )


@pytest.mark.parametrize("kind", ["ppo", "grpo", "rloo", "online_dpo"])
def test_a_rollout_is_whole_minibatches_of_all_processes(kind: str, tiny_model_path: str, tmp_path: Path) -> None:
    groups = {"group_size": 2} if kind in ("grpo", "rloo") else {}
    one = declared(
        tiny_model_path, tmp_path, {"type": kind, "rollout_samples": 24, **groups}, gradient_accumulation_steps=3
    )
    assert [count_processes(one, count, isolate=True) for count in (2, 4)] == [2, 4]
    with pytest.raises(ConfigError, match=r"stages\.s\.method\.rollout_samples: 24 completions are no whole .* of 18"):
        count_processes(one, 3, isolate=True)


def test_in_one_process_the_declaration_alone_says_it() -> None:
    method = {"type": "grpo", "reward": "a.b:c", "group_size": 8}
    with pytest.raises(ConfigError, match=r"a rollout of 2 completions .* holds no whole groups of 8"):
        TrainingStage(name="s", training_data="x.jsonl", method=method, batch_size=2)


@pytest.mark.parametrize("command", ["check", "plan", "run"])
def test_every_command_tells_it(
    command: str, tiny_model_path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from stagekit.pipeline import to_plain

    file = tmp_path / "p.yaml"
    file.write_text(yaml.safe_dump(to_plain(declared(tiny_model_path, tmp_path, {"type": "grpo", "group_size": 8}))))
    assert command_line([command, str(file), "--num-processes", "2"]) == 2
    assert "stages.s.method.group_size: a rollout of 4 completions" in capsys.readouterr().err
    if command != "run":
        assert command_line([command, str(file), "--num-processes", "4"]) == 0


@pytest.mark.parametrize(
    ("method", "processes", "steps"),
    [
        ({"type": "ppo", "rollout_samples": 8}, 2, 2 * 2 * 4 * 3),  # rollouts * minibatches * passes * epochs
        ({"type": "ppo"}, 2, 1 * 5 * 4 * 3),  # one rollout of all 20 prompts
        ({"type": "ppo"}, 3, 1 * 3 * 4 * 3),  # 18 of the 20
        ({"type": "grpo", "group_size": 2}, 2, 10 * 3),
        ({"type": "rloo", "group_size": 4, "rollout_samples": 16, "epochs_per_batch": 2}, 4, 5 * 2 * 2 * 3),
        ({"type": "online_dpo"}, 5, 4 * 3),
    ],
)
def test_the_plan_counts_the_steps_of_whole_rollouts(
    method: dict[str, Any], processes: int, steps: int, tiny_model_path: str, tmp_path: Path
) -> None:
    (entry,) = plans = plan(declared(tiny_model_path, tmp_path, method), processes=processes)
    assert entry["steps"] == steps
    assert f"an optimiser step takes {2 * processes} completions" in as_text(plans)
