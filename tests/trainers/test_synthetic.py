"""Instructions and answers of a teacher, by scripted ones: what is asked, what is kept, and why the rest is not."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagekit.errors import ConfigError, Interrupted
from stagekit.journal import Journal
from stagekit.requests import Completion, Message, ScriptedGenerator
from stagekit.selection import Candidate, Group
from stagekit.trainers.sampling import sample, texts_digest
from stagekit.trainers.synthetic import (
    Answered,
    Bounds,
    Instruction,
    Seed,
    Wanted,
    choose,
    drops,
    instruction_in,
    instruction_rows,
    instructions_digest,
    metrics,
    nothing_kept,
    request_text,
    rows,
    seeds_from,
    worth,
    write_instructions,
    wrong_answer,
)


SIX = Wanted(6, 2)
SEEDS = seeds_from([{"prompt": f"Name a thing of kind number {number}."} for number in range(5)])


def written(
    tmp_path: Path,
    reply: Any,
    wanted: Wanted = SIX,
    seeds: Sequence[Seed] = SEEDS,
    name: str = "instructions.jsonl",
    **given: Any,
) -> list[Instruction]:
    teacher = given.pop("teacher", None) or ScriptedGenerator(reply, context_length=given.pop("context", None))
    plan = {"teacher": teacher, "seed": 7, "max_new_tokens": 10, "batch_tokens": given.pop("batch_tokens", 100)}
    digest = instructions_digest(seeds, wanted, **plan)
    with Journal.open(tmp_path / name, digest) as journal:
        return write_instructions(seeds, wanted, **plan, journal=journal, **given)


def by_seed(messages: tuple[Message, ...]) -> str:
    """A reply that differs as its request does."""
    shown = [line for line in messages[0]["content"].splitlines() if line[:2] in {"1.", "2."}]
    return "Write about " + " and ".join(line.split()[-1].rstrip(".") for line in shown) + " in one line."


def turns(messages: Sequence[Message]) -> str:
    return messages[-1]["content"]


def test_a_request_shows_seeds_and_asks_for_a_new_one_of_their_kind() -> None:
    assert request_text(["Add 2 and 3.", "Add 1 and 4."]) == (
        "Here are examples of instructions:\n\n1. Add 2 and 3.\n2. Add 1 and 4.\n\n"
        "Write one new instruction of the same kind that differs from all of them. Reply with the instruction only."
    )
    assert request_text([], "tea") == (
        "Write one instruction about tea that a person could give to an assistant. Reply with the instruction only."
    )
    assert "of the same kind about tea that differs" in request_text(["Add."], "tea")
    assert request_text(["a", "{number}"], request="New:\n{examples}", line="- {example}") == "New:\n- a\n- {number}"
    assert request_text(["a {topic} b"], "{examples}", "{examples} / {topic}") == "1. a {topic} b / {examples}"


def test_each_request_draws_its_own_seeds_uniformly_and_by_its_number_alone(tmp_path: Path) -> None:
    few = written(tmp_path, by_seed, Wanted(50, 2), name="few")
    many = written(tmp_path, by_seed, Wanted(2000, 2), name="many", batch_tokens=4000)
    assert [one.seeds for one in few] == [one.seeds for one in many[:50]]
    assert all(len(set(one.seeds)) == 2 for one in many)
    counts = Counter(many_seeds for one in many for many_seeds in one.seeds)
    expected = 2000 * 2 / 5
    chi = sum((count - expected) ** 2 / expected for count in counts.values())
    assert len(counts) == 5 and chi < 18.5  # the 99.9 % quantile with 4 degrees of freedom
    pairs = Counter(one.seeds for one in many)
    assert len(pairs) == 20 and sum((count - 100) ** 2 / 100 for count in pairs.values()) < 43.9  # 19 degrees


def test_all_seeds_are_shown_where_there_are_fewer_than_examples(tmp_path: Path) -> None:
    for one in written(tmp_path, by_seed, Wanted(3, 8)):
        assert sorted(one.seeds) == sorted(seed.id for seed in SEEDS)


def test_topics_take_turns(tmp_path: Path) -> None:
    found = written(tmp_path, turns, Wanted(5, 0, ("tea", "rain")), [])
    assert [one.topic for one in found] == ["tea", "rain", "tea", "rain", "tea"]
    assert all(f"about {one.topic} " in one.asked[0]["content"] for one in found)


@pytest.mark.parametrize(
    ("reply", "instruction"),
    [
        ("Name a fruit.", "Name a fruit."),
        ("  9. Name a fruit.\n", "Name a fruit."),
        ("Instruction: Name a fruit.", "Name a fruit."),
        ("**New instruction:** Name a fruit.", "Name a fruit."),
        ("Here is a new instruction: Name a fruit.", "Name a fruit."),
        ("Task 9: Name a fruit.", "Name a fruit."),
        ('"Name a fruit."', "Name a fruit."),
        ('"Yes" or "no": which is shorter?', '"Yes" or "no": which is shorter?'),
        ("12 + 3 =", "12 + 3 ="),
        ("3.5 times 2 is what?", "3.5 times 2 is what?"),
        ("Task lists are useful; write one.", "Task lists are useful; write one."),
        ("Question 4 of the test was hard. Why?", "Question 4 of the test was hard. Why?"),
        ("1. ", ""),
    ],
)
def test_what_stands_around_an_instruction_is_taken_off(reply: str, instruction: str) -> None:
    assert instruction_in(reply) == instruction


def one(text: str, drop: str | None = None) -> Instruction:
    return Instruction(f"k {text}", ({"role": "user", "content": "ask"},), text, ("s",), drop=drop)


def test_an_instruction_that_is_none_or_says_nothing_new_is_dropped_with_its_reason() -> None:
    texts = [
        "Name a thing that is blue.",  # 0: kept
        "name a  thing that is BLUE.",  # 1: the same as 0
        "Name a thing that is blue. Please.",  # 2: 3 of 5 n-grams are 0's
        "Name a thing of kind number 3.",  # 3: a seed
        "Now name a thing of kind number 3.",  # 4: 4 of 5 n-grams are the seed's
        "Say hello.",  # 5: two words
        "word " * 9,  # 6: nine words
        "Name a thing that is green and small.",  # 7: kept
        "Was cut off in",  # 8: dropped before
        "Was cut off in",  # 9: kept, since 8 is not
    ]
    found = choose(
        [one(text, "truncated" if place == 8 else None) for place, text in enumerate(texts)],
        SEEDS, bounds=Bounds(3, 8), similarity=0.6,
    )  # fmt: skip
    assert [each.drop for each in found] == [
        None, "duplicate", "similar", "copies_seed", "similar_to_seed", "too_few_words", "too_many_words", None,
        "truncated", None,
    ]  # fmt: skip
    assert [each.like for each in found if each.like] == [texts[0], texts[0], SEEDS[3].text, SEEDS[3].text]


def test_texts_that_are_no_instruction_are_dropped_by_how_they_ended(tmp_path: Path) -> None:
    replies = iter(["Name a fruit.", Completion("Name a", (1, 2), "length", 3), Completion("", (), "error", 3), " \n"])
    found = written(tmp_path, lambda messages: next(replies), Wanted(4, 1))
    assert Counter(each.drop for each in found) == {None: 1, "truncated": 1, "error": 1, "empty": 1}


def test_a_request_that_does_not_fit_is_too_long_and_the_others_do_not_shift(tmp_path: Path) -> None:
    long = Seed("word " * 100, "long")
    found = written(tmp_path, by_seed, Wanted(20, 1), [long, *SEEDS], context=60)
    assert {each.drop for each in found if each.seeds == ("long",)} == {"too_long"}
    for each in found:
        if each.drop is None:
            (seed,) = [seed for seed in SEEDS if seed.id in each.seeds]
            assert each.text == f"Write about {seed.text.split()[-1].rstrip('.')} in one line."


@pytest.mark.parametrize(
    ("text", "reason", "expected"),
    [
        ("It is red.", "stop", None),
        ("It is", "length", "truncated"),
        ("", "error", "error"),
        (" ", "stop", "empty"),
        ("ask  ME.", "stop", "repeats_instruction"),
        ("Red.", "stop", "too_few_words"),
        ("It is red and blue.", "stop", "too_many_words"),
    ],
)
def test_an_answer_that_cannot_be_learnt_is_dropped_with_its_reason(text: str, reason: Any, expected: Any) -> None:
    assert wrong_answer(one("Ask me.").prompt, Candidate("k", text, reason), Bounds(2, 4)) == expected


def test_an_answer_that_was_not_written_was_too_long() -> None:
    assert wrong_answer(one("Ask me.").prompt, None) == "too_long"


def test_a_threshold_is_strict_and_without_one_a_reward_drops_nothing() -> None:
    half = Candidate("k", "text", reward=0.5)
    assert [worth(half, least) for least in (None, 0.4, 0.5)] == [None, None, "below_min_reward"]
    assert worth(Candidate("k", "text"), None) == "no_reward"


def answered(text: str, drop: str | None, reward: float | None = None) -> Answered:
    asked = one(text)
    return Answered(asked, Group(asked.prompt.messages, (Candidate("c", "It is.", reward=reward),)), drop)


def test_rows_have_the_seeds_of_their_request_and_every_instruction_is_accounted_for() -> None:
    instructions = [one("a b c"), one("a b c", "duplicate"), one("d e f"), one("g h i")]
    replies = [
        answered("a b c", None, 2.0),
        answered("d e f", "truncated"),
        answered("g h i", "below_min_reward", 0.5),
    ]
    (row,) = rows(replies)
    assert row == {
        "prompt": [{"role": "user", "content": "a b c"}],
        "completion": [{"role": "assistant", "content": "It is."}],
        "seeds": ["s"], "reward": 2.0, "key": "c",
    }  # fmt: skip
    counted = drops(instructions, replies)
    assert counted == {"instructions.duplicate": 1, "answers.truncated": 1, "answers.below_min_reward": 1}
    assert len(instructions) == 1 + sum(counted.values())
    found = metrics(instructions, replies)
    assert found == {"valid_unique_rate": 0.75, "kept_share": 0.25, "reward/mean": 1.25, "reward/kept": 2.0}
    said = instruction_rows(instructions)
    assert [line["drop"] for line in said] == ["", "duplicate", "", ""]
    assert "below_min_reward: 1; rewards of the answers: min 0.5" in str(nothing_kept(instructions, replies[1:]))


@given(st.lists(st.sampled_from(["a b c", "a b c d", "Name a thing of kind number 1.", "x", "", "p q r s t u v"])))
def test_choosing_is_pure_and_keeps_what_it_kept(texts: list[str]) -> None:
    given = [one(text, None if text else "empty") for text in texts]
    once = choose(given, SEEDS)
    assert choose(once, SEEDS) == once
    kept = [each.text for each in once if each.drop is None]
    assert len(set(kept)) == len(kept) and not set(kept) & {seed.text for seed in SEEDS}


def test_a_writing_that_is_stopped_before_any_batch_goes_on_to_the_same_texts(tmp_path: Path) -> None:
    whole = written(tmp_path, by_seed, name="whole")
    batches = json.dumps([line for line in (tmp_path / "whole").read_text().splitlines() if '"batch"' in line])
    assert batches.count('type\\": \\"batch') > 2
    for stop in range(3):
        calls: list[int] = []

        def should_stop(at: int = stop, calls: list[int] = calls) -> bool:
            calls.append(1)
            return len(calls) > at

        with pytest.raises(Interrupted):
            written(tmp_path, by_seed, name=f"stopped{stop}", should_stop=should_stop)
        teacher = ScriptedGenerator(by_seed)
        assert written(tmp_path, by_seed, name=f"stopped{stop}", teacher=teacher) == whole
        assert len(teacher.calls) == batches.count('type\\": \\"batch') - stop
        assert _records(tmp_path / f"stopped{stop}") == _records(tmp_path / "whole")


def _records(path: Path) -> list[str]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return sorted(json.dumps(line["record"], sort_keys=True) for line in lines if line["type"] == "record")


def test_instructions_go_through_sampling_as_prompts(tmp_path: Path) -> None:
    prompts = [each.prompt for each in choose(written(tmp_path, by_seed), SEEDS, similarity=None) if not each.drop]
    teacher = ScriptedGenerator(lambda messages: f"About {messages[-1]['content']}")
    plan: dict[str, Any] = {"policy": teacher, "n": 1, "seed": 7, "max_new_tokens": 10, "batch_tokens": 100}
    with Journal.open(tmp_path / "journal.jsonl", texts_digest(prompts, **plan)) as journal:
        groups = sample(prompts, **plan, journal=journal)
    texts = [group.candidates[0].text for group in groups]
    assert texts == [f"About {prompt.messages[-1]['content']}" for prompt in prompts]


@pytest.mark.parametrize(
    "prompt",
    ["", None, [{"role": "assistant", "content": "Hi."}],
     [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]],
)  # fmt: skip
def test_a_seed_that_is_no_single_instruction_is_told_by_its_row(prompt: Any) -> None:
    with pytest.raises(ConfigError, match=r"training_data: row 1: a seed is one instruction"):
        seeds_from([{"prompt": "Name a fruit."}, {"prompt": prompt}])


def test_a_seed_may_have_a_system_turn_and_no_seeds_are_told() -> None:
    (seed,) = seeds_from([{"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "Go on."}]}])
    assert seed.text == "Go on."
    with pytest.raises(ConfigError, match="training_data: has no rows"):
        seeds_from([])
