"""What a stage wrote is shown text by text, from its journals."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stagekit.adapters import Constitutional, RejectionSampling
from stagekit.audit import principles, samples, texts
from stagekit.cli import run as main
from stagekit.groups import Generation
from stagekit.journal import Journal
from tests.answers import by_length
from tests.running import run, stage


Write = Callable[..., Path]
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
