"""The AI feedback stage through a pipeline on the tiny model."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stagekit import TrainingPipeline
from stagekit.adapters import DPO, PPO, AIFeedback, Reward
from stagekit.audit import principles, samples
from stagekit.cli import run as main
from stagekit.errors import ConfigError, Interrupted, StageError
from stagekit.groups import Generation
from stagekit.pipeline import to_plain
from stagekit.plan import plan
from stagekit.stage import TrainingStage
from tests.answers import likes_longer
from tests.running import pipeline, run, same, stage


ROOT = Path(__file__).resolve().parent.parent.parent
Write = Callable[..., Path]
PROMPTS = [
    {"prompt": f"{text}?"} for text in ("Name a fruit", "Is the earth round", "What is ice", "Why", "Who are you")
]
GENERATION = Generation(max_new_tokens=40, batch_tokens=400)


@pytest.fixture
def prompts(write_rows: Write) -> str:
    return str(write_rows(PROMPTS, "prompts.jsonl"))


@pytest.fixture
def pairs(write_rows: Write, preference_rows: list[Any]) -> str:
    return str(write_rows(preference_rows[:6], "pairs.jsonl"))


def labelled(name: str, data: Any, **options: Any) -> TrainingStage:
    method = {"tie_margin": 0.0, **options.pop("method", {})}
    given = {"generation": GENERATION, **options}
    return TrainingStage(name=name, method=AIFeedback(**method), training_data=data, **given)


def given_pairs(name: str, data: Any, **options: Any) -> TrainingStage:
    method = {"responses": ("chosen", "rejected"), **options.pop("method", {})}
    return labelled(name, data, method=method, **{"generation": None, **options})


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def records(folder: Path, name: str) -> list[dict[str, Any]]:
    return [entry["record"] for entry in rows(folder / name) if entry["type"] == "record"]


def test_two_responses_are_judged_and_learnt_as_soft_labels_by_dpo(
    prompts: str, tiny_model_path: str, tmp_path: Path
) -> None:
    dpo = stage("dpo", "stage:fb/preferences", DPO(soft_labels=True), max_steps=1)
    result = run(tiny_model_path, tmp_path, labelled("fb", prompts), dpo)
    one, folder = result["fb"], tmp_path / "01-fb"
    kept, everything = rows(one.dataset("preferences")), rows(one.dataset("labels"))
    assert one.policy is None and one.steps == one.samples_trained == 0
    assert len(everything) == 5 == len(kept) + sum(one.samples_dropped.values())
    assert len(records(folder, "journal.jsonl")) == 10
    judged = [row for row in everything if row["probability"] is not None]
    assert len(records(folder, "judgements.jsonl")) == 2 * len(judged) > 0
    for row in judged:
        assert row["probability"] == pytest.approx((row["forward"] + 1 - row["backward"]) / 2)
    for row in kept:
        [label] = [other for other in judged if other["prompt"] == row["prompt"]]
        likelier = label["first"] if label["probability"] > 0.5 else label["second"]
        assert row["chosen"] == [{"role": "assistant", "content": likelier}]
        assert row["chosen_prob"] == max(label["probability"], 1 - label["probability"]) > 0.5
    assert result["dpo"].samples_trained == len(kept)
    assert {"judge/confidence", "judge/says_first", "judge/mass"} <= one.metrics.keys()


def test_a_dpo_stage_after_it_starts_from_the_model_that_came_in(
    prompts: str, tiny_model_path: str, tmp_path: Path
) -> None:
    dpo = stage("dpo", "stage:fb/preferences", DPO(soft_labels=True), max_steps=1, learning_rate=1e-30)
    result = run(tiny_model_path, tmp_path, labelled("fb", prompts, method={"judge": likes_longer}), dpo)
    assert same(str(result["dpo"].policy), tiny_model_path)


@pytest.mark.slow
def test_its_preferences_serve_a_reward_model_and_ppo(prompts: str, tiny_model_path: str, tmp_path: Path) -> None:
    reward = stage("rm", "stage:fb/preferences", Reward(), max_steps=1)
    ppo = stage(
        "ppo", prompts, PPO(reward="stage:rm", rollout_samples=4), max_steps=1, checkpoint_save_steps=0,
        generation=Generation(max_new_tokens=4),
    )  # fmt: skip
    result = run(tiny_model_path, tmp_path, labelled("fb", prompts, method={"judge": likes_longer}), reward, ppo)
    assert [one.status for one in result.stages] == ["completed"] * 3


def test_a_function_decides_and_its_hits_are_told_where_the_truth_is_known(
    pairs: str, preference_rows: list[Any], tiny_model_path: str, tmp_path: Path
) -> None:
    two = {"judge": likes_longer, "principles": ("Which is longer?", "Which has more letters?")}
    result = run(tiny_model_path, tmp_path, given_pairs("fb", pairs, method=two))["fb"]
    lengths = [(len(row["chosen"][0]["content"]), len(row["rejected"][0]["content"])) for row in preference_rows[:6]]
    hits = [(longer > other) + 0.5 * (longer == other) for longer, other in lengths]
    assert result.metrics["judge/accuracy"] == pytest.approx(sum(hits) / 6)
    assert result.metrics["judge/prefers_longer"] == 1.0 and result.metrics["judge/confidence"] > 0
    assert not (tmp_path / "01-fb/journal.jsonl").exists()
    told = principles(tmp_path / "01-fb")
    assert sum(one["labels"] for one in told.values()) == 6
    assert sum(one["labels"] * one["right"] for one in told.values()) == pytest.approx(sum(hits))


def test_another_column_says_which_is_better(write_rows: Write, tiny_model_path: str, tmp_path: Path) -> None:
    data = [{"prompt": f"Q{n}?", "a": "longer", "b": "short", "best": best} for n, best in enumerate((0, 1, None))]
    method = {"judge": likes_longer, "responses": ("a", "b"), "truth": "best"}
    result = run(tiny_model_path, tmp_path, given_pairs("fb", str(write_rows(data)), method=method))["fb"]
    assert result.metrics["judge/accuracy"] == 0.5


def test_held_out_pairs_measure_the_judge_and_a_gate_can_stop_at_a_bad_one(
    prompts: str, pairs: str, tiny_model_path: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gate = {"metric": "held_out/judge/accuracy", "at_least": 0.9, "otherwise": "stop"}
    how: dict[str, Any] = {"method": {"judge": "tests.answers:likes_longer"}, "validation_data": pairs}
    result = run(tiny_model_path, tmp_path / "open", labelled("fb", prompts, **how))["fb"]
    assert 0.5 < result.metrics["held_out/judge/accuracy"] < 1
    wrong: dict[str, Any] = {"method": {"judge": "tests.adapters.test_ai_feedback:likes_shorter"}, "gate": gate}
    with pytest.raises(StageError, match=r"gate: held_out/judge/accuracy is .*, and must be at least 0.9"):
        run(tiny_model_path, tmp_path / "gated", labelled("fb", prompts, validation_data=pairs, **wrong))
    assert "no more than a coin would be" in caplog.text


def likes_shorter(prompts: Any, first: Any, second: Any) -> list[float]:
    return [1 - p for p in likes_longer(prompts, first, second)]


def test_a_model_or_an_earlier_stage_can_judge(prompts: str, pairs: str, tiny_model_path: str, tmp_path: Path) -> None:
    trained = stage("sft", pairs_as_answers(pairs, tmp_path), "sft", max_steps=4, learning_rate=1e-2)
    by_stage = given_pairs("a", pairs, model=tiny_model_path, method={"judge": "stage:sft"})
    by_path = given_pairs("b", pairs, model=tiny_model_path, method={"judge": tiny_model_path})
    by_itself = given_pairs("c", pairs, model=tiny_model_path)
    result = run(tiny_model_path, tmp_path, trained, by_stage, by_path, by_itself)
    labels = {name: result[name].dataset("labels").read_text() for name in "abc"}
    assert labels["a"] != labels["b"] == labels["c"]
    models = {name: {one["model"] for one in records(tmp_path / f"0{n}-{name}", "judgements.jsonl")}
              for n, name in ((2, "a"), (3, "b"))}  # fmt: skip
    assert models["a"] != models["b"]


def pairs_as_answers(pairs: str, folder: Path) -> str:
    path = folder / "answers.jsonl"
    made = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows(Path(pairs))]
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return str(path)


def test_a_scripted_model_answers_judges_and_thinks(prompts: str, tiny_model_path: str, tmp_path: Path) -> None:
    said = {"answers": 0}

    def scripted(messages: Any) -> str:
        if len(messages) == 3:
            return "A" if "(A) Yes" in messages[0]["content"] else "B"
        if "step by step" in messages[0]["content"]:
            return "Yes is an answer."
        said["answers"] += 1
        return "Yes" if said["answers"] % 2 else "No"

    generation = Generation(backend=scripted)
    two = {"chain_of_thought": True, "principles": ("Which answers?",)}
    result = run(tiny_model_path, tmp_path, labelled("fb", prompts, method=two, generation=generation))["fb"]
    assert {(row["chosen"][0]["content"], row["chosen_prob"]) for row in rows(result.dataset("preferences"))} <= {
        ("Yes", 0.6), ("No", 0.6)
    }  # fmt: skip
    roles = [one["role"] for one in records(tmp_path / "01-fb", "judgements.jsonl")]
    assert roles.count("thought") == roles.count("judgement") == 10


def test_words_of_the_users_own_are_asked_as_they_stand(pairs: str, tiny_model_path: str, tmp_path: Path) -> None:
    own = {"comparison": "{conversation}\n1: {first}\n2: {second}\n{principle}", "choices": ("1", "2"),
           "principles": ("Which response is better?",)}  # fmt: skip
    run(tiny_model_path, tmp_path, given_pairs("fb", pairs, method=own))
    asked = {one["request"] for one in records(tmp_path / "01-fb", "judgements.jsonl")}
    assert "What is 2 + 3?\n1: 2 + 3 = 5.\n2: It is 7.\nWhich response is better?" in asked
    assert "What is 2 + 3?\n1: It is 7.\n2: 2 + 3 = 5.\nWhich response is better?" in asked
    assert {one["text"] for one in records(tmp_path / "01-fb", "judgements.jsonl")} <= {"1", "2"}


@pytest.mark.slow
@pytest.mark.parametrize("where", [("answers", 0), ("answers", 1), *(("judgements", life) for life in range(2))])
def test_a_stage_that_dies_at_any_batch_ends_as_one_that_does_not(
    where: tuple[str, int], prompts: str, tiny_model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stagekit.choosing import ModelChooser
    from stagekit.generation import TransformersGenerator

    one = labelled("fb", prompts)
    whole = run(tiny_model_path, tmp_path / "whole", one)["fb"]
    owner, name = (TransformersGenerator, "generate") if where[0] == "answers" else (ModelChooser, "choose")
    does, calls = getattr(owner, name), list[Any]()

    def dying(self: Any, *arguments: Any) -> Any:
        if len(calls) == where[1]:
            raise Interrupted("dies")
        calls.append(arguments)
        return does(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, dying)
        with pytest.raises(Interrupted):
            run(tiny_model_path, tmp_path / "died", one)
    again = run(tiny_model_path, tmp_path / "died", one)["fb"]
    assert again.dataset("labels").read_text() == whole.dataset("labels").read_text()
    for journal in ("journal.jsonl", "judgements.jsonl"):
        texts = [sorted(map(json.dumps, records(tmp_path / place / "01-fb", journal))) for place in ("whole", "died")]
        assert texts[0] == texts[1]


def test_another_judge_or_principle_reuses_the_responses_of_the_run_before(
    prompts: str, tiny_model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tiny_model_path, tmp_path, labelled("fb", prompts, method={"judge": "tests.answers:likes_longer"}))
    from stagekit.generation import TransformersGenerator

    def never(self: Any, requests: Any, seed: int) -> Any:
        raise AssertionError("texts are written anew")

    monkeypatch.setattr(TransformersGenerator, "generate", never)
    run(tiny_model_path, tmp_path, labelled("fb", prompts, method={"principles": ("Which is kinder?",)}))
    assert list((tmp_path / "01-fb").glob("judgements-*.jsonl"))


def test_another_margin_asks_the_judge_nothing(
    pairs: str, tiny_model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tiny_model_path, tmp_path, given_pairs("fb", pairs))
    from stagekit.choosing import ModelChooser

    def never(self: Any, questions: Any) -> Any:
        raise AssertionError("the judge is asked again")

    monkeypatch.setattr(ModelChooser, "choose", never)
    run(tiny_model_path, tmp_path, given_pairs("fb", pairs, method={"tie_margin": 0.0}))


def test_status_shows_what_was_asked_said_and_decided(
    pairs: str, tiny_model_path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = {"principles": ("Which is kinder?", "Which is right?")}
    run(tiny_model_path, tmp_path, given_pairs("fb", pairs, method=own))
    shown = samples(tmp_path / "01-fb", 2)
    assert len(shown) == 4 and {one["role"] for one in shown} == {"judgement"}
    assert all(one["probability"] is not None and "(A)" in one["request"] for one in shown)
    assert main(["status", str(tmp_path), "--samples", "1"]) == 0
    told = capsys.readouterr().out
    assert "judgement 1" in told and "probability" in told and "asked" in told
    assert "what each principle did" in told and "decided" in told and "right" in told


def test_a_server_judges_by_its_probabilities(
    served: tuple[str, Path], pairs: str, tiny_model_path: str, tmp_path: Path
) -> None:
    """The server of the tests says A with 0.7 of 0.9 whatever it is asked, so it goes by the place: all are ties."""
    with pytest.raises(StageError, match=r"no pair was labelled \(tie: 6\)"):
        run(tiny_model_path, tmp_path, given_pairs("fb", pairs, method={"judge": served[0]}))
    said = records(tmp_path / "01-fb", "judgements.jsonl")
    assert [(one["text"], round(one["probability"], 6)) for one in said] == [("A", round(7 / 9, 6))] * 12
    assert {one["model"].split()[0] for one in said} == {"logprobs"}


WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"method": {"principles": []}}, "method.principles", "an empty list decides nothing"),
    ({"method": {"principles": ["a", " "]}}, "method.principles.1", "is empty"),
    ({"method": {"principles": ["a", "a"]}}, "method.principles", "names one twice"),
    ({"method": {"comparison": "{first} {second}"}}, "method.comparison", "lacks {principle}"),
    ({"method": {"comparison": "{first} {principle} {secnd}"}}, "method.comparison", "a field {secnd} that nothing"),
    ({"method": {"comparison": "{first} {second"}}, "method.comparison", "cannot be filled"),
    ({"method": {"comparison": "{first} {second}", "principles": ["a"]}}, "method.principles", "has no effect"),
    ({"method": {"choices": ["A", "A or B"]}}, "method.choices", "cannot be told apart"),
    ({"method": {"judge": "pkg.mod:f", "chain_of_thought": True}}, "method.judge", "a function compares"),
    ({"method": {"judge": 3}}, "method.judge", "a folder, a hub id or a function"),
    ({"method": {"tie_margin": 0.5}}, "method.tie_margin", "drops every pair"),
    ({"method": {"clamp": [0.4, 0.6]}}, "method.clamp", "has no effect without chain_of_thought"),
    ({"method": {"clamp": [0.6, 0.7], "chain_of_thought": True}}, "method.clamp", "must lie below and above 0.5"),
    ({"method": {"max_thought_tokens": 5}}, "method.max_thought_tokens", "has no effect without chain_of_thought"),
    ({"method": {"responses": ["a", "a"]}}, "method.responses", "twice"),
    ({"method": {"truth": "best"}}, "method.truth", "has no effect without method.responses"),
    ({"method": {"responses": ["a", "b"]}, "generation": {"temperature": 0.5}}, "generation.temperature",
     "the responses are given"),
    ({"method": {"responses": ["a", "b"]}, "training_data": {"x": "x.jsonl", "y": "y.jsonl"},
      "data_mixing_ratios": {"x": 1, "y": 1}}, "method.responses", "give one set"),
    ({"generation": {"temperature": 0}}, "generation.temperature", "0 gives the same response twice"),
    ({"use_mixed_precision": True}, "mixed_precision_dtype", "'fp16' has no effect"),
    ({"epochs": 2}, "epochs", "does not train"),
    ({"lora": {"rank": 2}}, "lora", "does not train"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "path", "message"), WRONG)
def test_what_cannot_work_is_told_by_its_path(given: dict[str, Any], path: str, message: str) -> None:
    method = {"type": "ai_feedback", **given.pop("method", {})}
    with pytest.raises(ConfigError) as caught:
        TrainingStage(**{"name": "s", "training_data": "x.jsonl", **given, "method": method})
    assert [(one.path, message in one.message) for one in caught.value.problems] == [(path, True)]


def test_columns_that_are_missing_are_told_before_anything_is_loaded(
    prompts: str, pairs: str, tiny_model_path: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"training_data: needs columns|training_data.*chosen"):
        pipeline(tiny_model_path, tmp_path, given_pairs("fb", prompts)).run(quiet=True)
    with pytest.raises(ConfigError, match=r"validation_data.*chosen"):
        pipeline(tiny_model_path, tmp_path, labelled("fb", prompts, validation_data=prompts)).run(quiet=True)


def test_a_declaration_survives_its_file_and_is_planned(prompts: str, tiny_model_path: str, tmp_path: Path) -> None:
    method = {"judge": "http://host:8000/v1#m", "principles": ("a", "b"), "chain_of_thought": True}
    dpo = stage("dpo", "stage:fb/preferences", DPO(soft_labels=True))
    declared = pipeline(tiny_model_path, tmp_path, labelled("fb", prompts, method=method), dpo)
    assert TrainingPipeline(**to_plain(declared)) == declared
    [entry, after] = plan(declared)
    assert entry["rows"] == {"read": 5, "trained": 0, "made": {"preferences": 5, "labels": 5}}
    assert entry["steps"] == 0 and after["rows"]["read"] == 5
    assert after["model"] == tiny_model_path
    assert entry["notes"] == [
        "two responses to every prompt; every pair is judged twice, once in each order; nothing is trained"
    ]
