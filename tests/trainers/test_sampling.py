"""Sampling with scripted models: resuming at any batch, rewards kept apart from texts, rows that do not shift."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from stagekit.errors import ConfigError, Interrupted, StageError
from stagekit.journal import Journal
from stagekit.requests import Completion, Request, ScriptedGenerator
from stagekit.scorers import FunctionScorer
from stagekit.selection import Group, select
from stagekit.trainers.sampling import (
    Prompt,
    prompts_from,
    sample,
    score,
    scores_digest,
    texts_digest,
)
from tests.trainers.scripted import records_of


class Killed(Exception):
    pass


class Sampled(ScriptedGenerator):
    """Answers by the batch's seed and the row's place in it, as real samples do; dies after `life` batches."""

    def __init__(self, life: int | None = None, fingerprint: str = "sampled", context: int | None = None) -> None:
        super().__init__(lambda messages: "", fingerprint, context)
        self.life = life

    def generate(self, requests: Any, seed: int) -> list[Completion]:
        if self.life is not None and len(self.calls) == self.life:
            raise Killed
        self.calls.append([request.messages for request in requests])
        return [self._one(request, seed, row) for row, request in enumerate(requests)]

    def _one(self, request: Request, seed: int, row: int) -> Completion:
        kind = (seed + row) % 7
        reason: Any = "length" if kind == 1 else "stop"
        asked = request.messages[-1]["content"][:20]
        text = "" if kind == 0 else f"{asked}: {(seed // 7 + row) % 5}"
        return Completion(text, (row, kind), reason, self.prompt_length(request.messages))


def number(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
    """The number at the end of an answer."""
    return [float(text[-1] if isinstance(text, str) else text[0]["content"][-1]) for text in completions]


ROWS = [{"prompt": text, "answer": text.lower()} for text in ("A", "B", "C is longer", "D", "B")]
SETTINGS: dict[str, Any] = {"n": 4, "seed": 7, "max_new_tokens": 10, "batch_tokens": 36}


def write(folder: Path, policy: Any = None, rows: Any = ROWS, scorer: Any = None, **changes: Any) -> list[Group]:
    """Sample, and score by the last digit."""
    prompts = prompts_from(rows)
    plan = {"policy": policy or Sampled(), **SETTINGS, **changes}
    digest = texts_digest(prompts, **plan)
    with Journal.open(folder / "journal.jsonl", digest) as texts:
        groups = sample(prompts, **plan, journal=texts)
    scorer = scorer or FunctionScorer(number)
    with Journal.open(folder / "scores.jsonl", scores_digest(prompts, digest, scorer)) as scores:
        return score(groups, prompts, scorer=scorer, journal=scores)


def key_sorted(path: Path) -> list[str]:
    return sorted(json.dumps(record) for record in records_of(path))


def test_every_prompt_gets_n_answers_in_the_order_of_the_prompts(tmp_path: Path) -> None:
    groups = write(tmp_path)
    assert [group.messages[0]["content"] for group in groups] == [row["prompt"] for row in ROWS]
    assert [len(group.candidates) for group in groups] == [4] * 5
    for group in groups:
        assert all(one.text.startswith(group.messages[0]["content"]) for one in group.candidates if one.text)
    keys = [one.key for group in groups for one in group.candidates]
    assert len(set(keys)) == 20  # the second B has samples of its own


def test_a_row_of_the_journal_is_an_audit(tmp_path: Path) -> None:
    write(tmp_path)
    records = records_of(tmp_path / "journal.jsonl")
    fields = "key stage role round prompt_id sample text token_ids finish_reason n_prompt n_new model seed"
    assert all(set(record) == set(fields.split()) for record in records)
    assert {record["sample"] for record in records} == {0, 1, 2, 3}
    assert {(record["role"], record["round"], record["stage"]) for record in records} == {
        ("answer", 1, "rejection_sampling")
    }


def test_the_samples_of_a_prompt_stand_together_in_the_batches(tmp_path: Path) -> None:
    policy = Sampled()
    write(tmp_path, policy, batch_tokens=48)
    asked = [messages[0]["content"] for batch in policy.calls for messages in batch]
    assert len(asked) == 20
    assert len([prompt for prompt, _ in itertools.groupby(asked)]) <= len(ROWS)


def test_a_run_killed_at_any_batch_goes_on_to_the_same_journal(tmp_path: Path) -> None:
    whole = Sampled()
    expected = write(tmp_path / "whole", whole)
    total = len(whole.calls)
    assert total > 5
    for life in range(total):
        with pytest.raises(Killed):
            write(tmp_path / str(life), Sampled(life))
        again = Sampled()
        assert write(tmp_path / str(life), again) == expected
        assert len(again.calls) == total - life
        for name in ("journal.jsonl", "scores.jsonl"):
            assert key_sorted(tmp_path / str(life) / name) == key_sorted(tmp_path / "whole" / name)


def test_a_torn_batch_is_dropped_whole(tmp_path: Path) -> None:
    expected = write(tmp_path)
    journal = tmp_path / "journal.jsonl"
    content = journal.read_bytes()
    cut = content.rindex(b'"type": "batch"') - 30
    journal.write_bytes(content[:cut])
    policy = Sampled()
    assert write(tmp_path, policy) == expected
    assert len(policy.calls) == 1


def test_scoring_that_was_killed_asks_only_for_what_is_missing(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("stagekit.trainers.sampling.SCORED_AT_ONCE", 3)
    expected = write(tmp_path / "whole")
    asked: list[int] = []

    def dying(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
        if len(asked) == 2:
            raise Killed
        asked.append(len(completions))
        return number(prompts, completions)

    class Same(FunctionScorer):
        fingerprint = FunctionScorer(number).fingerprint  # type: ignore[assignment]

    with pytest.raises(StageError, match="raised Killed"):
        write(tmp_path / "killed", scorer=Same(dying))
    rest: list[int] = []

    def counting(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
        rest.append(len(completions))
        return number(prompts, completions)

    assert write(tmp_path / "killed", scorer=Same(counting)) == expected
    total = len(records_of(tmp_path / "whole" / "scores.jsonl"))
    assert sum(asked) + sum(rest) == total


def test_another_reward_does_not_write_the_texts_anew(tmp_path: Path) -> None:
    first = write(tmp_path)
    (tmp_path / "scores.jsonl").unlink()
    policy = Sampled()
    second = write(
        tmp_path, policy, scorer=FunctionScorer(lambda prompts, completions, **columns: [0.5] * len(completions))
    )
    assert policy.calls == []
    assert [[one.text for one in group.candidates] for group in second] == [
        [one.text for one in group.candidates] for group in first
    ]
    assert {one.reward for group in second for one in group.candidates} == {0.5, None}


def test_a_text_that_stands_several_times_is_scored_once_and_counts_every_time(tmp_path: Path) -> None:
    asked: list[str] = []

    def look(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
        asked.extend(completions)
        return [1.0] * len(completions)

    policy = ScriptedGenerator(lambda messages: " always this\n")
    [group] = write(tmp_path, policy, [{"prompt": "A"}], FunctionScorer(look))
    assert asked == [" always this\n"]
    assert [one.reward for one in group.candidates] == [1.0] * 4
    assert select(group.candidates).kept[0].copies == 4


def test_what_is_empty_or_cut_is_not_scored(tmp_path: Path) -> None:
    groups = write(tmp_path)
    reasons = {(bool(one.text), one.finish_reason): one.reward for group in groups for one in group.candidates}
    assert reasons[False, "stop"] is None and reasons[True, "length"] is None
    assert reasons[True, "stop"] is not None


def test_the_reward_sees_the_columns_of_its_own_prompt_though_a_long_prompt_comes_first(tmp_path: Path) -> None:
    seen: list[tuple[Any, Any, Any]] = []

    def look(prompts: list[Any], completions: list[Any], answer: list[str]) -> list[float]:
        seen.extend(zip(prompts, completions, answer, strict=True))
        return [1.0] * len(completions)

    rows = [{"prompt": "long " * 60, "answer": "none"}, *ROWS]
    groups = write(tmp_path, Sampled(context=40), rows, FunctionScorer(look))
    assert (groups[0].drop, groups[0].candidates) == ("too_long", ())
    assert seen and all(text.startswith(prompt) and prompt.lower() == answer for prompt, text, answer in seen)


def test_a_prompt_with_a_colon_survives_whole(tmp_path: Path) -> None:
    policy = ScriptedGenerator(lambda messages: messages[-1]["content"] + " 1")
    [group] = write(tmp_path, policy, [{"prompt": "Say: this: and that"}])
    assert group.candidates[0].text == "Say: this: and that 1"


def test_a_finished_journal_gives_the_answers_without_a_model(tmp_path: Path) -> None:
    expected = write(tmp_path)
    journal = Journal.read(tmp_path / "journal.jsonl")
    groups = sample(prompts_from(ROWS), **{**SETTINGS, "policy": None}, journal=journal)
    assert [[one.text for one in g.candidates] for g in groups] == [
        [one.text for one in g.candidates] for g in expected
    ]


@pytest.mark.parametrize(
    "change",
    [{"n": 5}, {"seed": 8}, {"max_new_tokens": 9}, {"batch_tokens": 9}, {"policy": Sampled(fingerprint="other")},
     {"iteration": 2}, {"prompts": prompts_from(ROWS[:2])}],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_everything_that_changes_the_texts_changes_the_digest(change: dict[str, Any]) -> None:
    plan: dict[str, Any] = {"prompts": prompts_from(ROWS), "policy": Sampled(), **SETTINGS}
    changed = {**plan, **change}
    assert texts_digest(plan.pop("prompts"), **plan) != texts_digest(changed.pop("prompts"), **changed)


def test_four_answers_are_as_many_as_four_times_one(tmp_path: Path) -> None:
    together = write(tmp_path / "four")
    apart = [write(tmp_path / str(seed), n=1, seed=seed) for seed in range(4)]
    assert sum(len(group.candidates) for group in together) == sum(len(g.candidates) for part in apart for g in part)


def test_a_stop_is_asked_for_between_batches(tmp_path: Path) -> None:
    prompts, done = prompts_from(ROWS), []
    with Journal.open(tmp_path / "j", "d") as journal:
        plan = {"policy": Sampled(), **SETTINGS, "on_batch": done.append, "should_stop": lambda: len(done) == 2}
        with pytest.raises(Interrupted, match="of the answer phase"):
            sample(prompts, **plan, journal=journal)
        assert len(done) == 2
        groups = sample(prompts, **{**plan, "should_stop": None}, journal=journal)
    with Journal.open(tmp_path / "s", "d") as journal, pytest.raises(Interrupted, match="while scoring"):
        score(groups, prompts, scorer=FunctionScorer(number), journal=journal, should_stop=lambda: True)


def test_a_row_without_a_prompt_is_told_with_its_place() -> None:
    rows = [{"prompt": "A"}, {"prompt": ""}, {"prompt": [{"role": "assistant", "content": "Hi"}]}]
    with pytest.raises(ConfigError) as caught:
        prompts_from(rows, "prompts")
    assert [problem.path for problem in caught.value.problems] == ["prompts: row 1", "prompts: row 2"]
    with pytest.raises(ConfigError, match="has no rows"):
        prompts_from([])
    assert prompts_from([{"prompt": "A"}])[0] == Prompt(({"role": "user", "content": "A"},), {"prompt": "A"})
