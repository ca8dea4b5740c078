"""What a stage wrote is shown text by text, from its journals."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stagekit.adapters import Constitutional, RejectionSampling, SelfPlay, SyntheticData
from stagekit.audit import principles, samples, texts
from stagekit.cli import run as main
from stagekit.errors import StageError
from stagekit.groups import Generation
from stagekit.journal import Journal
from tests.answers import by_length
from tests.running import run, stage


Write = Callable[..., Path]
NOT_TRAINED = dict.fromkeys(
    ("batch_size", "max_steps", "logging_steps", "checkpoint_save_steps", "learning_rate",
     "use_deterministic_algorithms"), ...,
)  # fmt: skip
PROMPTS = [{"prompt": "Name a fruit."}, {"prompt": "Is the earth round?"}, {"prompt": "What is ice made of?"}]


def record(role: str, number: int, text: str, principle: str | None = None) -> dict[str, Any]:
    return {
        "key": f"{role}{number}{text}", "role": role, "round": number, "prompt_id": "p", "principle": principle,
        "text": text, "finish_reason": "stop", "n_new": 1,
    }  # fmt: skip


def test_a_principle_is_told_with_how_often_it_changed_the_answer(tmp_path: Path) -> None:
    with Journal.open(tmp_path / "journal.jsonl", "d") as journal:
        journal.append_batch("a", [record("initial", 0, "one"), record("critique", 1, "bad", "kind")])
        journal.append_batch("b", [record("revision", 1, " one\n", "kind"), record("revision", 2, "two", "kind")])
        journal.append_batch("c", [record("revision", 3, "three", "short")])
    assert principles(tmp_path) == {
        "kind": {"revisions": 2, "changed": 0.5},
        "short": {"revisions": 1, "changed": 1.0},
    }


def test_each_revision_says_whether_it_changed_the_answer_that_stood(tmp_path: Path) -> None:
    with Journal.open(tmp_path / "journal.jsonl", "d") as journal:
        journal.append_batch("a", [record("initial", 0, "one"), record("critique", 1, "bad", "kind")])
        journal.append_batch("b", [record("revision", 1, "", "kind"), record("revision", 2, "one", "short")])
        journal.append_batch("c", [record("revision", 3, "two", "short")])
    changed = {text["key"]: text["changed"] for text in texts(tmp_path)}
    assert changed == {
        "initial0one": None, "critique1bad": None, "revision1": False,  # an empty one changes nothing
        "revision2one": False, "revision3two": True,
    }  # fmt: skip
    assert principles(tmp_path)["short"] == {"revisions": 2, "changed": 0.5}


def test_a_stage_that_failed_shows_its_texts_with_their_prompts(
    write_rows: Write, tiny_model_path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = str(write_rows(PROMPTS, "prompts.jsonl"))
    method = RejectionSampling(reward="tests.answers:by_length", n=2, rounds=2, min_reward=1e9)
    generation = Generation(backend="tests.answers:short")
    with pytest.raises(StageError, match="no answer was kept"):
        run(tiny_model_path, tmp_path, stage("rs", data, method, max_steps=1, generation=generation))
    found = samples(tmp_path / "01-rs", 3)
    assert {text["iteration"] for text in found} == {"iteration-1"}
    assert {text["prompt"] for text in found} == {row["prompt"] for row in PROMPTS}
    assert main(["status", str(tmp_path), "--samples", "1"]) == 0
    assert "Reply 1 to" in capsys.readouterr().out


def test_instructions_are_told_with_their_request_and_why_they_were_dropped(
    write_rows: Write, tiny_model_path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = str(write_rows(PROMPTS, "seeds.jsonl"))
    method = SyntheticData(instructions=6, examples=1, topics=("tea",), reward="tests.answers:by_length")
    one = stage("synth", data, method, generation=Generation(backend="tests.answers:first_example"), **NOT_TRAINED)
    run(tiny_model_path, tmp_path, one)
    found = list(texts(tmp_path / "01-synth"))
    asked = [text for text in found if text["role"] == "instruction"]
    answers = [text for text in found if text["role"] == "answer"]
    assert len(asked) == 6 and 1 <= len(answers) <= 3
    assert {text["topic"] for text in asked} == {"tea"}
    assert all("Here are examples" in text["prompt"] for text in asked)
    assert sum(text["drop"] == "duplicate" for text in asked) == 6 - len(answers)
    assert {text["prompt"] for text in answers} == {
        text["text"].removeprefix("1. ") for text in asked if not text["drop"]
    }
    assert [text["reward"] for text in answers] == [float(len(text["text"])) for text in answers]
    assert {text["journal"] for text in samples(tmp_path / "01-synth", 1)} == {"instructions", "journal"}
    assert main(["status", str(tmp_path), "--samples", "6"]) == 0
    told = capsys.readouterr().out
    assert "instruction 1" in told and "dropped: duplicate" in told and "answer 1" in told and "tea" in told


def test_the_answers_to_validation_data_are_told_too(write_rows: Write, tiny_model_path: str, tmp_path: Path) -> None:
    data = str(write_rows([{**row, "completion": "It is."} for row in PROMPTS], "rows.jsonl"))
    generation = Generation(backend="tests.answers:short")
    method = SelfPlay(iterations=1, responses_per_prompt=2)
    held_out = str(write_rows([{"prompt": f"{n} + 2?", "completion": "It is."} for n in range(3)], "held.jsonl"))
    one = stage("sp", data, method, max_steps=1, generation=generation, validation_data=held_out)
    run(tiny_model_path, tmp_path, one)
    found = samples(tmp_path / "01-sp", 2)
    assert [text["journal"] for text in found] == ["journal"] * 4 + ["validation"] * 4
    assert all(text["text"] == f"Reply 1 to {text['prompt']}" for text in found)


def test_every_answer_is_told_with_its_prompt_and_its_reward(
    write_rows: Write, tiny_model_path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = str(write_rows(PROMPTS, "prompts.jsonl"))
    method = RejectionSampling(reward=by_length, n=4, rounds=2)
    run(tiny_model_path, tmp_path, stage("rs", data, method, max_steps=1, generation=Generation(max_new_tokens=24)))
    folder = tmp_path / "01-rs"
    found = list(texts(folder))
    assert len(found) == 2 * 3 * 4
    assert [text["iteration"] for text in found] == ["iteration-1"] * 12 + [""] * 12
    assert {text["prompt"] for text in found} == {row["prompt"] for row in PROMPTS}
    for text in found:
        scored = text["finish_reason"] == "stop" and text["text"].strip()
        assert text["reward"] == (len(text["text"]) if scored else None)
    shown = samples(folder, 2)
    assert len(shown) == 8 and len({text["prompt"] for text in shown}) == 2
    assert len(samples(folder, 99)) == 12
    assert main(["status", str(tmp_path), "--samples", "1"]) == 0
    told = capsys.readouterr().out
    assert "rs: " in told and "answer 2" in told and "reward" in told
    assert main(["status", str(tmp_path), "--samples", "1", "--json"]) == 0
    [entry] = json.loads(capsys.readouterr().out)["stages"]
    assert len(entry["samples"]) == 4


def test_a_constitution_is_told_in_the_order_of_its_rounds(
    write_rows: Write, tiny_model_path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = str(write_rows(PROMPTS, "prompts.jsonl"))
    generation = Generation(backend="tests.answers:short")
    method = Constitutional(rounds=2, principles=("Be kind.",))
    run(tiny_model_path, tmp_path, stage("sl", data, method, max_steps=1, generation=generation))
    [*shown] = samples(tmp_path / "01-sl", 1)
    assert [(text["role"], text["round"]) for text in shown] == [
        ("initial", 0), ("critique", 1), ("revision", 1), ("critique", 2), ("revision", 2),
    ]  # fmt: skip
    assert {text["principle"] for text in shown} == {None, "Be kind."}
    assert main(["status", str(tmp_path), "--samples", "1"]) == 0
    told = capsys.readouterr().out
    assert "what each principle did" in told and "Be kind." in told and "critique 2" in told
    assert main(["status", str(tmp_path)]) == 0
    assert "principle" not in capsys.readouterr().out
