"""The prompts and principles that stagekit ships are complete, distinct and balanced."""

import json
from collections import Counter
from importlib.resources import files
from typing import Any

import pytest


DATA = files("stagekit") / "recipes/data"
PROMPT_FILES = ("red_team.jsonl", "harmless.jsonl")


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


def questions(name: str) -> list[str]:
    return [row["prompt"][0]["content"] for row in rows(name)]


def principles() -> dict[str, Any]:
    return json.loads((files("stagekit") / "principles.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", PROMPT_FILES)
def test_each_row_is_one_user_message_and_a_category(name: str) -> None:
    assert len(rows(name)) >= 64
    for row in rows(name):
        assert set(row) == {"prompt", "category"}
        (message,) = row["prompt"]
        assert set(message) == {"role", "content"}
        assert message["role"] == "user"
        assert row["category"]


@pytest.mark.parametrize("name", PROMPT_FILES)
def test_prompts_are_one_clean_line_of_40_to_220_characters(name: str) -> None:
    for question in questions(name):
        assert 40 <= len(question) <= 220, question
        assert question == question.strip()
        assert question.isascii() and question.isprintable(), question


def test_all_prompts_are_distinct_up_to_case_and_white_space() -> None:
    folded = Counter(" ".join(question.lower().split()) for name in PROMPT_FILES for question in questions(name))
    assert [question for question, count in folded.items() if count > 1] == []


@pytest.mark.parametrize("name", PROMPT_FILES)
def test_the_first_32_rows_are_balanced_over_all_categories(name: str) -> None:
    categories = {row["category"] for row in rows(name)}
    first = Counter(row["category"] for row in rows(name)[:32])
    assert len(categories) >= 8
    assert set(first) == categories
    assert max(first.values()) - min(first.values()) <= 1


def test_the_categories_of_the_two_files_cannot_be_confused() -> None:
    assert all(row["category"].startswith("benign") for row in rows("harmless.jsonl"))
    assert not any(row["category"].startswith("benign") for row in rows("red_team.jsonl"))


def test_at_least_twelve_harmless_prompts_only_look_alarming() -> None:
    alarming = [row for row in rows("harmless.jsonl") if row["category"].startswith("benign_alarming")]
    assert len(alarming) >= 12


def test_principles_are_critique_and_revision_requests_with_distinct_names() -> None:
    entries = principles()["principles"]
    assert len(entries) >= 8
    assert len({entry["name"] for entry in entries}) == len(entries)
    for entry in entries:
        assert set(entry) == {"name", "critique_request", "revision_request"}
        assert all(value.strip() == value and value for value in entry.values())


def test_comparison_principles_are_distinct_questions_and_the_licence_is_named() -> None:
    document = principles()
    assert set(document) == {"licence", "principles", "comparison_principles"}
    assert document["licence"]
    questions = document["comparison_principles"]
    assert len(set(questions)) == len(questions) >= 4
    assert all(question.endswith("?") or question.endswith(".") for question in questions)
