"""Answers that are scored or compared by a judge, and the pairs made of them."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagekit.choices import FunctionChooser
from stagekit.errors import ConfigError, StageError
from stagekit.journal import Journal
from stagekit.requests import Completion, ScriptedGenerator
from stagekit.selection import Candidate, Group
from stagekit.trainers.comparisons import Asking, verdicts_digest
from stagekit.trainers.self_rewarding import (
    Scoring,
    accuracy,
    compared_pairs,
    drops,
    held_out_groups,
    metrics,
    pairs,
    parse_score,
    rate,
    rate_by_comparison,
    rate_digest,
)
from tests.answers import likes_longer
from tests.trainers.scripted import chat, records_of


@pytest.mark.parametrize(
    ("text", "score"),
    [("It is good. Score: 4", 4), ("Score: 1 at first, but no. Score: **3.5**/5", 3.5), ("score is 2 out of 5", None),
     ("SCORE - 2", 2), ("4", 4), (" 3/5. ", 3), ("Score: 6", None), ("Score: -1", None), ("I cannot say", None),
     ("", None),
     ("Score:\n0", 0), ("Underscore: 3", None), ("4 apples", None)],
)  # fmt: skip
def test_the_last_score_of_a_judgement_counts(text: str, score: float | None) -> None:
    assert parse_score(text, 5) == score


def group(*texts: str, asked: str = "Q?", rewards: Any = None, why: str = "stop") -> Group:
    given = rewards or [None] * len(texts)
    return Group(
        chat(asked),
        tuple(
            Candidate(f"{asked}{n}", text, why, reward)
            for n, (text, reward) in enumerate(zip(texts, given, strict=True))
        ),  # type: ignore[arg-type]
    )


class Scores(ScriptedGenerator):
    """Gives a response the scores in it, one for each time that it is asked; dies after `life` batches."""

    def __init__(self, life: int | None = None) -> None:
        super().__init__(lambda messages: "", "scores")
        self.life = life

    def generate(self, requests: Any, seed: int) -> list[Completion]:
        if self.life is not None and len(self.calls) == self.life:
            raise KeyboardInterrupt
        self.calls.append([request.messages for request in requests])
        return [self._one(request) for request in requests]

    def _one(self, request: Any) -> Completion:
        scores = request.messages[0]["content"].split("|")[1].split()
        told = scores[int(request.key[-4:]) % len(scores)]
        return Completion(f"Because. Score: {told}", (1,), "stop", 9)


SCORING = Scoring("{conversation}|{response}|{max_score}", 5, 3)


def rated(tmp_path: Path, groups: list[Group], judge: Any = None, name: str = "j.jsonl", **more: Any) -> list[Group]:
    how: dict[str, Any] = {"judge": judge or Scores(), "scoring": SCORING, "seed": 1, "batch_tokens": 900, **more}
    with Journal.open(tmp_path / name, rate_digest(groups, **how)) as journal:
        return rate(groups, journal=journal, **how)


def rewards(groups: list[Group]) -> list[list[float | None]]:
    return [[one.reward for one in group.candidates] for group in groups]


def test_the_mean_of_the_scores_that_can_be_read_counts(tmp_path: Path) -> None:
    judge = Scores()
    found = rated(tmp_path, [group("1 2 3", "5 x 4", "no no no"), group("1 2 3", "0 0 1", asked="R?")], judge)
    assert rewards(found) == [[2.0, 4.5, None], [2.0, pytest.approx(1 / 3)]]
    asked = [messages for batch in judge.calls for messages in batch]
    assert len(asked) == 5 * 3 and asked[0][0]["content"].endswith("|5")
    assert {one["role"] for one in records_of(tmp_path / "j.jsonl")} == {"judgement"}


def test_a_text_that_stands_twice_is_judged_once_and_a_cut_or_empty_one_never(tmp_path: Path) -> None:
    judge = Scores()
    found = rated(tmp_path, [group("1 1 1", "1 1 1", " "), group("5 5 5", asked="R?", why="length")], judge)
    assert rewards(found) == [[1.0, 1.0, None], [None]]
    assert sum(map(len, judge.calls)) == 3


MANY = [group(f"{n % 6} {n % 5} 1", f"{n % 4} 2 {n % 3}", asked=f"Q{n}?") for n in range(5)]


@pytest.mark.parametrize("life", range(4))
def test_judgements_that_die_at_any_batch_go_on_to_the_same_journal(life: int, tmp_path: Path) -> None:
    short = Scoring(SCORING.template, 5, 3, 8)
    whole = Scores()
    expected = rated(tmp_path, MANY, whole, "whole.jsonl", scoring=short, batch_tokens=100)
    assert len(whole.calls) > 3
    with pytest.raises(KeyboardInterrupt):
        rated(tmp_path, MANY, Scores(life), "died.jsonl", scoring=short, batch_tokens=100)
    assert rated(tmp_path, MANY, Scores(), "died.jsonl", scoring=short, batch_tokens=100) == expected
    journals = [sorted(map(str, records_of(tmp_path / name))) for name in ("whole.jsonl", "died.jsonl")]
    assert journals[0] == journals[1]


def test_an_answer_s_score_by_comparison_is_how_often_it_beats_another(tmp_path: Path) -> None:
    groups = [group("a", "bbb", "cc", "bbb"), group("alone", asked="R?"), group("xx", "yy", asked="S?")]
    judge, asking = FunctionChooser(likes_longer), Asking(("Which?",))
    how: dict[str, Any] = {"judge": judge, "asking": asking, "seed": 1, "batch_tokens": 900}
    assert len(compared_pairs(groups)) == 3 + 0 + 1
    with Journal.open(tmp_path / "j.jsonl", verdicts_digest(compared_pairs(groups), **how)) as journal:
        found = rate_by_comparison(groups, journal=journal, **how)
    assert rewards(found) == [[0.0, 1.0, 0.5, 1.0], [None], [0.5, 0.5]]
    journal = Journal.read(tmp_path / "j.jsonl")
    assert rate_by_comparison(groups, **{**how, "judge": None}, journal=journal) == found


def test_the_best_answer_makes_a_pair_with_the_worst() -> None:
    [row] = pairs([group("mid", "worst", "best", "mid", rewards=[2.0, 1.0, 3.0, 2.0])])
    assert (row["chosen"][0]["content"], row["rejected"][0]["content"]) == ("best", "worst")
    assert (row["chosen_score"], row["rejected_score"], row["key"]) == (3.0, 1.0, "Q?2")


def test_ties_and_lonely_answers_make_none_and_an_empty_result_says_why() -> None:
    groups = [
        group("a", "b", rewards=[2.0, 2.0]), group("a", "a", asked="R?", rewards=[1.0, 1.0]),
        Group(chat("S?"), (), "too_long"),
    ]  # fmt: skip
    assert drops(groups) == {
        "prompts.tied": 1, "prompts.too_few": 1, "answers.duplicate": 1, "prompts.too_long": 1,
    }  # fmt: skip
    with pytest.raises(StageError, match=r"prompts\.tied: 1"):
        pairs(groups)
    near = [group("a", "b", rewards=[0.51, 0.49])]
    assert len(pairs(near, 0.01)) == 1 and drops(near, 0.03) == {"prompts.tied": 1}


ANSWER = st.tuples(st.sampled_from(["a", "b", "c", " "]), st.sampled_from(["stop", "length", "error"]))


@given(st.lists(st.lists(ANSWER, max_size=4), min_size=1, max_size=6), st.sampled_from([0.0, 0.5]), st.data())
def test_every_prompt_is_a_pair_or_is_counted_under_one_reason(answers: Any, margin: float, data: Any) -> None:
    groups = []
    for place, ones in enumerate(answers):
        score = {text: data.draw(st.none() | st.sampled_from([0.0, 0.5, 1.0])) for text, _ in ones}
        made = tuple(
            Candidate(f"{place}-{n}", text, why, score[text] if why == "stop" and text.strip() else None)
            for n, (text, why) in enumerate(ones)
        )
        groups.append(Group(chat(f"Q{place}?"), made, None if made else "too_long"))
    lost = sum(count for why, count in drops(groups, margin).items() if why.startswith("prompts."))
    if lost < len(groups):
        rows = pairs(groups, margin)
        assert len(rows) + lost == len(groups)
        assert all(row["chosen_score"] - row["rejected_score"] > margin for row in rows)
        found = metrics(groups, margin)
        assert found["score/chosen"] > found["score/rejected"]


def test_a_judge_is_measured_on_pairs_of_which_the_better_one_is_known() -> None:
    rows = [{"prompt": f"Q{n}?", "chosen": "good", "rejected": "bad"} for n in range(4)]
    groups = held_out_groups(rows, "data")
    assert [[one.text for one in group.candidates] for group in groups] == [["good", "bad"]] * 4
    scored = [group("good", "bad", rewards=pair) for pair in ([2.0, 1.0], [1.0, 1.0], [0.0, 1.0], [None, 1.0])]
    assert accuracy(scored) == {"judge/decided": 0.75, "judge/accuracy": 0.5}
    with pytest.raises(ConfigError, match="chosen must be a text"):
        held_out_groups([{"prompt": "Q?", "rejected": "bad"}], "data")
