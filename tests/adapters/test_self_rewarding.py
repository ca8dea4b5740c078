"""The self-rewarding stage through a pipeline on the tiny model."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stagekit import TrainingPipeline
from stagekit.adapters import SelfRewarding
from stagekit.audit import samples
from stagekit.cli import run as main
from stagekit.errors import ConfigError, Interrupted, StageError
from stagekit.groups import Generation, LoRA
from stagekit.pipeline import to_plain
from stagekit.plan import plan
from stagekit.stage import TrainingStage
from tests.answers import likes_longer
from tests.running import lines, pipeline, run, same, stage


Write = Callable[..., Path]
PROMPTS = [{"prompt": "Name a fruit."}, {"prompt": "Is the earth round?"}, {"prompt": "What is ice made of?"}]
GENERATION = Generation(max_new_tokens=32, batch_tokens=600)


@pytest.fixture
def prompts(write_rows: Write) -> str:
    return str(write_rows(PROMPTS, "prompts.jsonl"))


@pytest.fixture
def pairs(write_rows: Write, preference_rows: list[Any]) -> str:
    return str(write_rows(preference_rows[:4], "pairs.jsonl"))


def rewarded(name: str, data: Any, **options: Any) -> TrainingStage:
    method = {"judge_by": "comparison", "tie_margin": 0.0, "n": 6, **options.pop("method", {})}
    given = {"max_steps": 2, "generation": GENERATION, "learning_rate": 1e-3, **options}
    return stage(name, data, SelfRewarding(**method), **given)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def records(folder: Path, name: str = "journal.jsonl") -> list[dict[str, Any]]:
    return [entry["record"] for entry in rows(folder / name) if entry["type"] == "record"]


def test_every_iteration_answers_and_judges_with_the_model_of_the_one_before(
    prompts: str, pairs: str, tiny_model_path: str, tmp_path: Path
) -> None:
    held_out = {"validation_data": pairs, "evaluation_steps": 1, "early_stopping": None}
    result = run(tiny_model_path, tmp_path, rewarded("sr", prompts, **held_out))["sr"]
    folders = [tmp_path / "01-sr/iteration-1", tmp_path / "01-sr"]
    for number, folder in enumerate(folders, start=1):
        assert lines(folder)[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert {record["round"] for record in records(folder)} == {number}
        [writer] = {record["model"] for record in records(folder)}
        for name in ("judgements.jsonl", "validation.jsonl"):
            assert {record["model"] for record in records(folder, name)} == {f"choices {writer}"}
        assert len(records(folder, "validation.jsonl")) == 2 * 4
        for row in rows(folder / "data/preferences.jsonl"):
            [scored] = [one for one in rows(folder / "data/scored.jsonl") if one["prompt"] == row["prompt"]]
            known = [one for one in scored["rewards"] if one is not None]
            assert (row["chosen_score"], row["rejected_score"]) == (max(known), min(known))
    assert records(folders[0])[0]["model"] != records(folders[1])[0]["model"]
    assert not same(folders[0] / "policy", str(result.policy))
    assert result.steps == 4
    assert {"judge/accuracy", "iteration_1/judge/accuracy", "iteration_2/judge/accuracy", "margin",
            "chosen_logps_change", "eval_loss", "length_ratio"} <= result.metrics.keys()  # fmt: skip


def scores_by_length(messages: Any, said: list[int] = [0]) -> str:  # noqa: B006 (counts the calls)
    """A scripted model: answers of different lengths, and a score for the words of a response."""
    text = messages[-1]["content"]
    if "Rate the response" in text:
        words = text.partition("this response to it:")[2].partition("Rate")[0].split()
        return f"It has {len(words)} words. Score: {min(len(words), 5)}"
    said[0] += 1
    return " ".join(["word"] * (1 + said[0] % 3))


def test_scores_are_written_read_and_averaged(prompts: str, pairs: str, tiny_model_path: str, tmp_path: Path) -> None:
    one = rewarded(
        "sr", prompts, method={"judge_by": "score", "iterations": 1, "judgements": 2}, validation_data=pairs,
        generation=Generation(backend=scores_by_length), evaluation_steps=0, early_stopping=None,
    )  # fmt: skip
    result = run(tiny_model_path, tmp_path, one)["sr"]
    for row in rows(result.dataset("preferences")):
        assert (row["chosen"][0]["content"], row["chosen_score"]) == ("word word word", 3.0)
        assert (row["rejected"][0]["content"], row["rejected_score"]) == ("word", 1.0)
    assert len(records(tmp_path / "01-sr", "judgements.jsonl")) == 3 * 3 * 2
    assert result.metrics["length_ratio"] == pytest.approx(14 / 4)
    assert result.metrics["judge/decided"] == 1.0


def test_a_model_that_writes_no_score_leaves_nothing_to_learn(
    prompts: str, tiny_model_path: str, tmp_path: Path
) -> None:
    with pytest.raises(StageError, match=r"stage 'sr'.*answers\.no_reward.*ask it otherwise"):
        run(
            tiny_model_path, tmp_path, rewarded("sr", prompts, method={"judge_by": "score", "max_judgement_tokens": 4})
        )


def test_an_adapter_is_trained_on_and_judges(prompts: str, tiny_model_path: str, tmp_path: Path) -> None:
    one = rewarded("sr", prompts, lora=LoRA(rank=2, dropout=0.0), learning_rate=1e-2)
    result = run(tiny_model_path, tmp_path, one)["sr"]
    for folder in (tmp_path / "01-sr/iteration-1", tmp_path / "01-sr"):
        assert lines(folder)[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    config = json.loads(Path(str(result.policy), "adapter_config.json").read_text())
    assert Path(config["base_model_name_or_path"]).resolve() == Path(tiny_model_path).resolve()


def test_another_judge_decides_in_every_iteration(prompts: str, tiny_model_path: str, tmp_path: Path) -> None:
    result = run(tiny_model_path, tmp_path, rewarded("sr", prompts, method={"judge": likes_longer}))["sr"]
    for folder in (tmp_path / "01-sr/iteration-1", tmp_path / "01-sr"):
        for row in rows(folder / "data/preferences.jsonl"):
            assert len(row["chosen"][0]["content"]) > len(row["rejected"][0]["content"])
    assert result.metrics["length_ratio"] > 1


@pytest.mark.slow
@pytest.mark.parametrize("where", [("generate", 1), ("choose", 0), ("choose", 1), ("choose", 3)])
def test_a_stage_that_dies_anywhere_ends_as_one_that_does_not(
    where: tuple[str, int], prompts: str, tiny_model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stagekit.choosing import ModelChooser
    from stagekit.generation import TransformersGenerator

    one = rewarded("sr", prompts)
    whole = run(tiny_model_path, tmp_path / "whole", one)["sr"]
    owner: Any = TransformersGenerator if where[0] == "generate" else ModelChooser
    does, calls = getattr(owner, where[0]), list[Any]()

    def dying(self: Any, *arguments: Any) -> Any:
        if len(calls) == where[1]:
            raise Interrupted("dies")
        calls.append(arguments)
        return does(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(owner, where[0], dying)
        with pytest.raises(Interrupted):
            run(tiny_model_path, tmp_path / "died", one)
    again = run(tiny_model_path, tmp_path / "died", one)["sr"]
    assert same(str(whole.policy), str(again.policy))
    for place in ("01-sr/iteration-1", "01-sr"):
        for name in ("journal.jsonl", "judgements.jsonl"):
            texts = [sorted(map(json.dumps, records(tmp_path / run_ / place, name))) for run_ in ("whole", "died")]
            assert texts[0] == texts[1]


def test_the_samples_have_scores_and_what_the_judge_was_asked(
    prompts: str, tiny_model_path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tiny_model_path, tmp_path, rewarded("sr", prompts, method={"judge": "tests.answers:likes_longer"}))
    shown = samples(tmp_path / "01-sr", 3)
    scored = {one["key"]: one["reward"] for one in shown if one["role"] == "answer"}
    known = rows(tmp_path / "01-sr/data/scored.jsonl")
    assert scored == {key: reward for row in known for key, reward in zip(row["keys"], row["rewards"], strict=True)}
    assert any(one["role"] == "judgement" and one["probability"] == 1.0 for one in shown)
    assert main(["status", str(tmp_path), "--samples", "3"]) == 0
    told = capsys.readouterr().out
    assert "answer 2" in told and "judgement 2" in told and "reward" in told


WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"method": {"n": 1}}, "method.n", "1 answer has no worse one"),
    ({"generation": {"temperature": 0}}, "generation.temperature", "0 gives the same answer 4 times"),
    ({"method": {"principles": ["a"]}}, "method.principles", "has no effect without judge_by: comparison"),
    ({"method": {"judge_by": "comparison", "judgements": 2}}, "method.judgements", "without judge_by: score"),
    ({"method": {"judge": "pkg.mod:f"}}, "method.judge", "a function compares"),
    ({"method": {"scoring": "Rate it: {answer} {response}"}}, "method.scoring", "a field {answer}"),
    ({"method": {"scoring": "Rate it"}}, "method.scoring", "lacks {response}"),
    ({"method": {"tie_margin": 5.0}}, "method.tie_margin", "drops every pair"),
    ({"method": {"judge_by": "comparison", "tie_margin": 1.0}}, "method.tie_margin", "drops every pair"),
    ({"generation": {"backend": "http://host:8000/v1"}}, "generation.backend", "goes on serving the first"),
    ({"method": {"stop_at_margin": 1.0}, "logging_steps": 0}, "method.stop_at_margin", "reads what is logged"),
    ({"trl": {"loss_type": ["ipo"]}}, "trl.loss_type", "self_rewarding's loss is DPO's sigmoid"),
    ({"is_evaluation_only": True, "training_data": None, "validation_data": "x.jsonl"}, "is_evaluation_only",
     "self_rewarding only trains"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "path", "message"), WRONG)
def test_what_cannot_work_is_told_by_its_path(given: dict[str, Any], path: str, message: str) -> None:
    method = {"type": "self_rewarding", **given.get("method", {})}
    plain = {"name": "s", "training_data": "x.jsonl", **given, "method": method}
    with pytest.raises(ConfigError) as caught:
        TrainingStage(**{key: value for key, value in plain.items() if value is not None})
    assert [(one.path, message in one.message) for one in caught.value.problems] == [(path, True)]


def test_held_out_data_without_a_better_answer_are_refused(prompts: str, tiny_model_path: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"validation_data.*chosen"):
        pipeline(tiny_model_path, tmp_path, rewarded("sr", prompts, validation_data=prompts)).run(quiet=True)


def test_a_declaration_survives_its_file_and_is_planned(prompts: str, tiny_model_path: str, tmp_path: Path) -> None:
    declared = pipeline(tiny_model_path, tmp_path, rewarded("sr", prompts, method={"iterations": 3}))
    assert TrainingPipeline(**to_plain(declared)) == declared
    [entry] = plan(declared)
    assert entry["rows"] == {"read": 3, "trained": 3, "made": {"preferences": 3, "scored": 3}}
    assert entry["steps"] == 6
    assert entry["notes"] == ["6 answers to every prompt, compared in 15 pairs, in each of 3 iterations"]
    by_score = pipeline(tiny_model_path, tmp_path, stage("s", prompts, SelfRewarding()))
    assert plan(by_score)[0]["notes"] == ["4 answers to every prompt, judged 3 times, in each of 2 iterations"]
