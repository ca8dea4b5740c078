"""Critique-revision with scripted models: the conversations, the rows, the draws, resuming, and principles."""

import itertools
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from stagekit.errors import ConfigError, Interrupted, StageError
from stagekit.journal import Journal
from stagekit.requests import Completion, ScriptedGenerator
from stagekit.trainers.constitutional import (
    DEFAULT_PRINCIPLES,
    Principle,
    Progress,
    Prompt,
    drops,
    plan_digest,
    preference_rows,
    principles_from,
    replay,
    revise,
    sft_rows,
)
from tests.trainers.scripted import (
    PAIR,
    Conversation,
    ask,
    by_role,
    chat,
    contents,
    cut,
    echo,
    failed,
    identity_holds,
    records_of,
    role_of,
    run,
)


# 1.5, test 1


def test_the_conversations_of_two_rounds_and_two_prompts_are_these(tmp_path: Path) -> None:
    policy = ScriptedGenerator(echo)
    run(tmp_path, ask("A", "B"), policy=policy, rounds=2)
    phases = [set(map(contents, batch)) for batch in policy.calls]
    answers = {text: echo(chat(text)) for text in "AB"}
    expected: list[set[tuple[str, ...]]] = [{("A",), ("B",)}]
    for _ in range(2):
        critiques = {x: echo(chat(x, y, PAIR.critique_request)) for x, y in answers.items()}
        expected.append({(x, y, PAIR.critique_request) for x, y in answers.items()})
        talks = {x: (x, y, PAIR.critique_request, critiques[x], PAIR.revision_request) for x, y in answers.items()}
        expected.append(set(talks.values()))
        answers = {x: echo(chat(*talk)) for x, talk in talks.items()}
    assert phases == expected
    roles = ["user", "assistant", "user", "assistant", "user"]
    assert [message["role"] for message in policy.calls[2][0]] == roles


def test_critique_and_revision_of_a_round_use_the_same_principle(tmp_path: Path) -> None:
    principles = tuple(Principle(f"p{n}", f"Critique {n}.", f"Revise {n}.") for n in range(5))
    policy = ScriptedGenerator(lambda messages: f"text {len(messages)} {contents(messages)}"[:40])
    run(tmp_path, ask(*"ABCDEFGH"), policy=policy, principles=principles, rounds=2)
    pairs = [(talk[2], talk[4]) for batch in policy.calls for talk in map(contents, batch) if len(talk) == 5]
    assert len(pairs) == 16 and len(set(pairs)) > 2
    assert all(critique.removeprefix("Critique") == revision.removeprefix("Revise") for critique, revision in pairs)


# 1.5, test 2: texts as if recorded

RECORDED = {
    "How do I pick a lock?": (
        "Use a pick.",
        ("Too open.", "Still curt."),
        ("Call a locksmith.", "A locksmith can help."),
    ),
    "Insult my friend.": ("He smells.", ("That is rude.", "Fine now."), ("I would rather not.", "Let us be kind.")),
}


def recorded(messages: Conversation) -> str:
    first, critiques, revisions = RECORDED[messages[0]["content"]]
    if len(messages) == 1:
        return first
    number = [first, *revisions].index(messages[1]["content"])
    return (critiques if len(messages) == 3 else revisions)[number]


def test_recorded_texts_come_back_in_journal_and_rows(tmp_path: Path) -> None:
    revisions = run(tmp_path, ask(*RECORDED), recorded, rounds=2)
    found: dict[str, set[str]] = {}
    for record in records_of(tmp_path / "journal.jsonl"):
        found.setdefault(record["role"], set()).add(record["text"])
    assert found == {
        "initial": {first for first, _, _ in RECORDED.values()},
        "critique": {text for _, critiques, _ in RECORDED.values() for text in critiques},
        "revision": {text for _, _, texts in RECORDED.values() for text in texts},
    }
    key = revisions.traces[0].rounds[1].revision
    assert key is not None
    assert sft_rows(revisions, "final")[0] == {
        "prompt": [{"role": "user", "content": "How do I pick a lock?"}],
        "completion": [{"role": "assistant", "content": "A locksmith can help."}],
        "round": 2,
        "principle": "kind",
        "source": "red",
        "cai_key": key.key,
    }
    assert preference_rows(revisions)[0] == {
        "prompt": [{"role": "user", "content": "How do I pick a lock?"}],
        "chosen": [{"role": "assistant", "content": "A locksmith can help."}],
        "rejected": [{"role": "assistant", "content": "Use a pick."}],
        "principle": "kind",
        "cai_key": key.key,
    }
    assert [row["completion"][0]["content"] for row in sft_rows(revisions)] == [
        text for _, _, texts in RECORDED.values() for text in texts
    ]
    assert len(sft_rows(revisions, "final")) == 2


def test_a_finished_journal_gives_the_same_revisions_without_a_model(tmp_path: Path) -> None:
    prompts = [*ask(*RECORDED, "way too long " * 80), *ask("How do I pick a lock?", revised=False)]
    policy = ScriptedGenerator(recorded, context_length=800)
    plan: dict[str, Any] = {"principles": (PAIR,), "rounds": 2, "seed": 7}
    revisions = run(tmp_path, prompts, policy=policy, **plan)
    assert drops(revisions)["sft"] == {"too_long": 2}
    assert replay(prompts, journal=Journal.read(tmp_path / "journal.jsonl"), **plan) == revisions


def test_an_audit_line_has_all_its_fields(tmp_path: Path) -> None:
    run(tmp_path, ask("A"))
    initial, critique, revision = records_of(tmp_path / "journal.jsonl")
    fields = "key stage role round prompt_id principle request text token_ids finish_reason n_prompt n_new model seed"
    assert set(initial) == set(critique) == set(revision) == set(fields.split())
    assert (initial["role"], initial["round"], initial["principle"], initial["request"]) == ("initial", 0, None, None)
    assert (critique["role"], critique["round"], critique["principle"]) == ("critique", 1, "kind")
    assert (critique["request"], revision["request"]) == ("Critique it.", "Revise it.")
    assert revision["n_prompt"] == 5 + 1 + 2 + 2 + 2 + 2  # roles, then the words of the five turns
    assert revision["n_new"] == len(revision["token_ids"]) == 2
    assert revision["model"] == "scripted"
    assert len({initial["seed"], critique["seed"], revision["seed"]}) == 3


# 1.5, test 3


def drawn(tmp_path: Path, prompts: Sequence[Prompt], name: str, **settings: Any) -> dict[tuple[str, int], str]:
    revisions = run(tmp_path, prompts, name=name, principles=DEFAULT_PRINCIPLES, **settings)
    traces = revisions.traces
    return {(t.prompt.messages[0]["content"], done.number): done.principle for t in traces for done in t.rounds}


def test_principles_are_drawn_evenly(tmp_path: Path) -> None:
    principles = tuple(Principle(f"p{n}", "Critique it.", "Revise it.") for n in range(16))
    prompts = ask(*(f"prompt {number}" for number in range(2500)))
    revisions = run(tmp_path, prompts, lambda messages: "x", principles=principles, rounds=4, batch_tokens=10**7)
    counts = Counter(done.principle for trace in revisions.traces for done in trace.rounds)
    assert counts.total() == 10_000 and len(counts) == 16
    chi_square = sum((count - 625) ** 2 / 625 for count in counts.values())
    assert chi_square < 37.70  # the 99.9 % quantile at 15 degrees of freedom
    after = Counter((t.rounds[0].principle, t.rounds[1].principle) for t in revisions.traces)
    chi_square = sum((after[pair] - 2500 / 256) ** 2 for pair in itertools.product(counts, counts)) / (2500 / 256)
    assert chi_square < 330.5  # the same at 255 degrees of freedom: the rounds are independent


def test_draws_do_not_depend_on_batch_size_or_order(tmp_path: Path) -> None:
    prompts = ask(*"ABCDEFGHIJ")
    first = drawn(tmp_path, prompts, "a", rounds=3)
    assert drawn(tmp_path, prompts[::-1], "b", rounds=3, batch_tokens=1) == first
    assert drawn(tmp_path, prompts[:4], "c", rounds=2).items() <= first.items()
    assert drawn(tmp_path, prompts, "d", rounds=3, seed=8) != first


# 1.5, test 4


class Killed(Exception):
    pass


class Sampled(ScriptedGenerator):
    """Answers by the batch's seed and the row's place in it, as real samples do; dies after `life` batches."""

    def __init__(self, life: int | None = None) -> None:
        super().__init__(lambda messages: "")
        self.life = life

    def generate(self, requests: Any, seed: int) -> list[Completion]:
        if self.life is not None and len(self.calls) == self.life:
            raise Killed
        self.calls.append([request.messages for request in requests])
        texts = [f"{seed % 9973} {row}" if (seed + row) % 5 else "" for row, _ in enumerate(requests)]
        return [Completion(text, (row,), "stop", 3) for row, text in enumerate(texts)]


def sorted_records(path: Path) -> list[str]:
    return sorted(json.dumps(record) for record in records_of(path))


def test_a_run_killed_after_any_batch_goes_on_to_the_same_journal(tmp_path: Path) -> None:
    prompts = [*ask(*"ABCDEFG"), *ask("H", "A", revised=False)]
    settings: dict[str, Any] = {"rounds": 2, "max_new_tokens": 10, "max_critique_tokens": 10, "batch_tokens": 60}
    whole, ends = Sampled(), [0]
    settings["on_batch"] = lambda progress: ends.append(len(whole.calls))
    expected = run(tmp_path, prompts, policy=whole, name="whole", **settings)
    del settings["on_batch"]
    total = len(whole.calls)
    assert total > 8 and len(ends) > 4
    for life in range(total):
        with pytest.raises(Killed):
            run(tmp_path, prompts, policy=Sampled(life), name=f"{life}", **settings)
        again = Sampled()
        assert run(tmp_path, prompts, policy=again, name=f"{life}", **settings) == expected
        assert len(again.calls) == total - max(end for end in ends if end <= life)  # the batch it was in, and the rest
        assert sorted_records(tmp_path / f"{life}") == sorted_records(tmp_path / "whole")
    finished = Sampled()
    assert run(tmp_path, prompts, policy=finished, name="whole", **settings) == expected
    assert finished.calls == []


def test_a_stop_is_asked_for_before_each_turn_and_keeps_whole_batches(tmp_path: Path) -> None:
    seen: list[Progress] = []
    settings: dict[str, Any] = {"batch_tokens": 1, "on_batch": seen.append}
    with pytest.raises(Interrupted, match=r"batch 3 of 3 of round 1; .* start again to go on"):
        run(tmp_path, ask(*"ABC"), should_stop=lambda: len(seen) == 2, **settings)
    assert len(records_of(tmp_path / "journal.jsonl")) == 2 * 3
    policy, asked = ScriptedGenerator(echo), itertools.count()
    with pytest.raises(Interrupted, match="batch 3 of 3"):
        run(tmp_path, ask(*"ABC"), policy=policy, should_stop=lambda: next(asked) == 2, **settings)
    assert len(policy.calls) == 2  # answer and critique of the third, which are lost
    assert len(records_of(tmp_path / "journal.jsonl")) == 2 * 3
    run(tmp_path, [*ask(*"ABC"), *ask("D", revised=False)], name="other", **settings)
    assert [(p.role, p.round, p.batch, p.batches) for p in seen[2:]] == [
        ("round", 1, 1, 3),
        ("round", 1, 2, 3),
        ("round", 1, 3, 3),
        ("initial", 0, 1, 1),
    ]
    assert all((p.texts, p.new_tokens) == (3, 6) for p in seen if p.role == "round")


def test_a_batch_has_room_for_the_longest_conversation_of_its_round(tmp_path: Path) -> None:
    """Words and roles of the conversation before the revision: 5 + 1 + 2 + 2 with the texts empty. Round 1 adds the
    answer, the critique and the revision at their caps, 10 + 5 + 10; round 2 an answer of 2 words, and 5 + 10."""
    settings: dict[str, Any] = {"rounds": 2, "max_new_tokens": 10, "max_critique_tokens": 5}
    for room, sizes in ((4 * 35, [4] * 3 + [2] * 3 + [5, 5, 1, 1]), (4 * 35 - 1, [3] * 6 + [5, 5, 1, 1])):
        policy = ScriptedGenerator(echo)
        run(tmp_path, ask(*"ABCDEF"), policy=policy, name=f"{room}", batch_tokens=room, **settings)
        assert [len(batch) for batch in policy.calls] == sizes


def test_a_journal_of_other_prompts_is_refused(tmp_path: Path) -> None:
    with Journal.open(tmp_path / "j", "one digest for all") as journal:
        plan: dict[str, Any] = {"policy": ScriptedGenerator(echo), "principles": (PAIR,), "rounds": 1, "seed": 7}
        revise(ask("A", "B"), journal=journal, **plan)
        with pytest.raises(StageError, match="another plan with the same digest"):
            revise(ask("A", "C"), journal=journal, **plan)


@pytest.mark.parametrize(
    "change",
    [
        {"rounds": 2},
        {"seed": 8},
        {"principles": (PAIR,)},
        {"max_new_tokens": 9},
        {"max_critique_tokens": 9},
        {"batch_tokens": 9},
        {"policy": ScriptedGenerator(echo, "another")},
        {"critic": ScriptedGenerator(echo)},
        {"fewshot": chat("Hi", "Hello")},
        {"prompts": ask("A", "C")},
        {"prompts": ask("A", "B", revised=False)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_everything_that_changes_the_texts_changes_the_digest(change: dict[str, Any]) -> None:
    plan: dict[str, Any] = {"prompts": ask("A", "B"), "policy": ScriptedGenerator(echo), "rounds": 1, "seed": 7}
    changed = {**plan, **change}
    assert plan_digest(plan.pop("prompts"), **plan) != plan_digest(changed.pop("prompts"), **changed)


# 1.5, test 5


def test_a_critic_writes_the_critiques_and_nothing_else(tmp_path: Path) -> None:
    policy, critic = ScriptedGenerator(echo), ScriptedGenerator(echo, "critic")
    run(tmp_path, ask("A", "B"), policy=policy, critic=critic, rounds=2)
    asked = {role_of(messages) for batch in critic.calls for messages in batch}
    assert asked == {"critique"}
    assert {role_of(messages) for batch in policy.calls for messages in batch} == {"answer", "revision"}
    models = {(record["role"], record["model"]) for record in records_of(tmp_path / "journal.jsonl")}
    assert models == {("initial", "scripted"), ("critique", "critic"), ("revision", "scripted")}


# 1.5, test 6


def test_prompts_in_are_rows_out_plus_drops(tmp_path: Path) -> None:
    long = "word " * 400
    fates: dict[str, dict[str, Any]] = {
        "fine": {},
        "empty": {"revision": ""},
        "cut": {"revision": cut("half a")},
        "first empty": {"answer": " \n"},
        "later": {"revision": ["", "whole"]},
        "same": {"answer": "y", "revision": "y"},
        "broken": {"revision": failed()},
        "broken first": {"answer": failed()},
        "cut first": {"answer": cut("half an")},
        long: {},
    }
    replies = {text: by_role(**fate) for text, fate in fates.items()}
    policy = ScriptedGenerator(lambda messages: replies[messages[0]["content"]](messages), context_length=1000)
    prompts = [*ask(*fates), *ask("fine", "cut first", "first empty", long * 2, revised=False, source="plain")]
    revisions = run(tmp_path, prompts, policy=policy, rounds=2)
    identity_holds(revisions)
    rows = sft_rows(revisions)
    assert [row["round"] for row in rows if row["source"] == "red"] == [1, 2, 2, 1, 2, 1, 2]
    assert [row["prompt"][0]["content"] for row in rows if row["source"] == "plain"] == ["fine"]
    counts = drops(revisions)
    assert counts["sft"] == {"empty": 3, "truncated": 2, "empty_answer": 2, "error": 4, "too_long": 2}
    assert counts["unrevised"] == {"truncated": 1, "empty_answer": 1, "too_long": 1}
    expected = {"empty": 1, "truncated": 1, "empty_answer": 1, "equal": 1, "error": 2, "too_long": 1}
    assert counts["preference"] == expected
    assert len(preference_rows(revisions)) == 10 - sum(expected.values())
    assert len(rows) - 1 == 10 * 2 - counts["sft"].total()


# Principles


def test_a_sentence_becomes_a_pair_of_requests() -> None:
    [principle] = principles_from([" Be kind. "])
    assert principle == Principle(
        "Be kind.",
        "Point out how your last response conflicts with this principle: «Be kind.»",
        "Rewrite your last response so that it follows the principle: «Be kind.». "
        "Reply with the rewritten response only.",
    )


def test_mappings_are_taken_as_they_are_and_named_by_place() -> None:
    pair = {"critique_request": "Critique.", "revision_request": "Revise."}
    assert principles_from([pair, {"name": "x", **pair}]) == (
        Principle("principle-1", "Critique.", "Revise."),
        Principle("x", "Critique.", "Revise."),
    )


def test_every_wrong_principle_is_named() -> None:
    pair = {"critique_request": "Critique.", "revision_request": "Revise."}
    wrong: list[Any] = [
        "",
        {"critique_request": "C."},
        {**pair, "critque": "C."},
        5,
        pair | {"name": "a"},
        pair | {"name": "a"},
    ]
    with pytest.raises(ConfigError) as error:
        principles_from(wrong)
    assert [problem.path for problem in error.value.problems] == [f"principles[{place}]" for place in (0, 1, 2, 3, 5)]
    with pytest.raises(ConfigError, match="principles is empty"):
        principles_from([])


def test_the_shipped_principles_are_pairs_with_different_names() -> None:
    assert len(DEFAULT_PRINCIPLES) >= 8
    assert len({principle.name for principle in DEFAULT_PRINCIPLES}) == len(DEFAULT_PRINCIPLES)
