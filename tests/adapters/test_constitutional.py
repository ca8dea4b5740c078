"""The constitutional stage through a pipeline on the tiny model."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stagekit.adapters import DPO, Constitutional
from stagekit.errors import Interrupted, StageError
from stagekit.groups import Generation, LoRA
from stagekit.stage import TrainingStage
from stagekit.stopping import Stop
from tests.running import lines, run, same, stage


Write = Callable[..., Path]
PROMPTS = [{"prompt": "Name a fruit."}, {"prompt": "Is the earth round?"}, {"prompt": "What is ice made of?"}]


def reply(messages: Any) -> str:
    """A scripted model: the longer the conversation, the other the text."""
    return f"Answer {len(messages)} to {messages[0]['content']}"


def counted(name: str, prompts: str, method: Constitutional, **options: Any) -> TrainingStage:
    generation = options.pop("generation", Generation(max_new_tokens=12, batch_tokens=400))
    return stage(name, prompts, method, max_steps=2, generation=generation, **options)


def journal(folder: Path) -> list[dict[str, Any]]:
    entries = [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]
    return [entry["record"] for entry in entries if entry["type"] == "record"]


@pytest.fixture
def prompts(write_rows: Write) -> str:
    return str(write_rows(PROMPTS, "prompts.jsonl"))


def test_a_scripted_constitution_gives_revisions_preferences_and_a_policy(
    prompts: str, tiny_model_path: str, tmp_path: Path
) -> None:
    generation = Generation(backend=f"{__name__}:reply") if "." in __name__ else Generation(backend=reply)
    first = counted("sl", prompts, Constitutional(rounds=2), generation=generation)
    second = stage("rl", "stage:sl/preferences", DPO(), max_steps=2)
    result = run(tiny_model_path, tmp_path, first, second)

    assert result["sl"].status == "completed"
    assert {record["role"] for record in journal(tmp_path / "01-sl")} == {"initial", "critique", "revision"}
    assert len(journal(tmp_path / "01-sl")) == 3 * (1 + 2 * 2)
    revisions = result["sl"].dataset("revisions").read_text().splitlines()
    pairs = [json.loads(line) for line in result["sl"].dataset("preferences").read_text().splitlines()]
    assert len(revisions) == result["sl"].samples_trained == 6
    assert len(pairs) == result["rl"].samples_trained == 3
    assert pairs[0]["chosen"] != pairs[0]["rejected"]
    assert lines(tmp_path / "02-rl")[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert not same(str(result["sl"].policy), str(result["rl"].policy))
    assert result["sl"].metrics.keys() >= {"train_loss"}


def test_a_backend_that_is_named_by_its_function_is_found(prompts: str, tiny_model_path: str, tmp_path: Path) -> None:
    generation = Generation(backend="tests.answers:short")
    result = run(tiny_model_path, tmp_path, counted("sl", prompts, Constitutional(rounds=1), generation=generation))
    assert {record["text"].split()[0] for record in journal(tmp_path / "01-sl")} == {"Reply"}
    assert result["sl"].samples_trained == 3


def test_the_critic_writes_the_critiques_and_the_policy_the_rest(
    prompts: str, write_rows: Write, sft_rows: list[Any], tiny_model_path: str, tmp_path: Path
) -> None:
    """With an adapter as the policy and a full model as the critic."""
    first = stage("sft", str(write_rows(sft_rows)), max_steps=2, learning_rate=1e-2, lora=LoRA(rank=2))
    method = Constitutional(rounds=1, critique_model=tiny_model_path, max_critique_tokens=5)
    generation = Generation(max_new_tokens=48, batch_tokens=400)
    run(tiny_model_path, tmp_path, first, counted("sl", prompts, method, lora=LoRA(rank=2), generation=generation))
    by_role = {role: set() for role in ("initial", "critique", "revision")}
    for record in journal(tmp_path / "02-sl"):
        by_role[record["role"]].add(record["model"])
        assert record["n_new"] <= (5 if record["role"] == "critique" else 48)
    assert len(by_role["initial"]) == 1
    assert by_role["initial"] == by_role["revision"]
    assert not by_role["initial"] & by_role["critique"]


def test_an_earlier_stage_can_be_the_critic(
    prompts: str, write_rows: Write, sft_rows: list[Any], tiny_model_path: str, tmp_path: Path
) -> None:
    first = stage("critic", str(write_rows(sft_rows)), max_steps=2, learning_rate=1e-2, save_checkpoint_after=False)
    between = stage("sft", str(write_rows(sft_rows)), max_steps=1, model=tiny_model_path)
    method = Constitutional(rounds=1, critique_model="stage:critic")
    generation = Generation(max_new_tokens=48, batch_tokens=400)
    last = counted("sl", prompts, method, generation=generation)
    result = run(tiny_model_path, tmp_path, first, between, last)
    assert len({record["model"] for record in journal(tmp_path / "03-sl")}) == 2
    assert result["sl"].status == "completed"
    assert not (tmp_path / "01-critic/policy").exists()


def test_a_stop_while_texts_are_written_loses_none_of_them(
    prompts: str, tiny_model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stagekit import constitution

    only = counted("sl", prompts, Constitutional(rounds=1), generation=Generation(max_new_tokens=12, batch_tokens=80))
    whole = run(tiny_model_path, tmp_path / "whole", only)
    asked: list[Stop] = []
    original = constitution._progress

    def progress(job: Any, rounds: int) -> Any:
        show = original(job, rounds)

        def look(done: Any) -> None:
            show(done)
            if done.role == "round":
                job.stop.ask()
                asked.append(job.stop)

        return look

    with monkeypatch.context() as patch:
        patch.setattr(constitution, "_progress", progress)
        with pytest.raises(Interrupted):
            run(tiny_model_path, tmp_path / "stopped", only)
    before = journal(tmp_path / "stopped/01-sl")
    assert asked
    resumed = run(tiny_model_path, tmp_path / "stopped", only)
    after = journal(tmp_path / "stopped/01-sl")
    assert after[: len(before)] == before
    assert after == journal(tmp_path / "whole/01-sl")
    assert same(str(whole.policy), str(resumed.policy))


def test_a_constitution_that_leaves_nothing_to_learn_says_so(
    prompts: str, tiny_model_path: str, tmp_path: Path
) -> None:
    generation = Generation(backend=lambda messages: "")
    with pytest.raises(StageError, match="stage 'sl'"):
        run(tiny_model_path, tmp_path, counted("sl", prompts, Constitutional(rounds=1), generation=generation))
    status = json.loads((tmp_path / "01-sl/result.json").read_text())["status"]
    assert status == "failed"
