"""From verdicts to preferences: which pairs are left out and why, which response is chosen, what a judge is worth."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagekit.errors import ConfigError, StageError
from stagekit.selection import Candidate, Group
from stagekit.trainers.comparisons import Verdict
from stagekit.trainers.feedback import (
    Responses,
    by_principle,
    drops,
    key_of,
    label_rows,
    labels,
    metrics,
    preference_rows,
    responses_from,
    responses_of,
)
from tests.trainers.scripted import chat


def group(*answers: tuple[str, str], asked: str = "Q?") -> Group:
    candidates = tuple(Candidate(f"k{n}", text, why) for n, (text, why) in enumerate(answers))  # type: ignore[arg-type]
    return Group(chat(asked), candidates, None if candidates else "too_long")


def response(number: int, truth: float | None = None) -> Responses:
    return Responses(chat(f"Q{number}?"), f"first {number}", "second, and longer", None, truth)


def labelled(*probabilities: float | None, truth: float | None = None, **how: Any) -> Any:
    """Labels of pairs whose judge has the probabilities in the first order and the same preference in the other."""
    given = [response(number, truth) for number in range(len(probabilities))]
    said = {
        key_of(one.pair): Verdict(f"principle {place % 2}", p, None if p is None else 1 - p, 0.9)
        for place, (one, p) in enumerate(zip(given, probabilities, strict=True))
    }
    return labels(given, said, **how)


ANSWERS = st.tuples(st.sampled_from(["", " ", "a", "a ", "b"]), st.sampled_from(["stop", "length", "error"]))


@given(st.lists(st.lists(ANSWERS, min_size=2, max_size=2) | st.just([]), min_size=1, max_size=8), st.data())
def test_every_prompt_is_a_preference_or_is_counted_under_one_reason(answers: Any, data: Any) -> None:
    given = responses_of([group(*one, asked=f"Q{place}?") for place, one in enumerate(answers)])
    p = st.none() | st.sampled_from([0.0, 0.4, 0.49, 0.5, 0.51, 0.7, 1.0])
    said = {key_of(one.pair): Verdict("p", data.draw(p), data.draw(p)) for one in given if one.drop is None}
    made = labels(given, said, tie_margin=0.02)
    kept = [one for one in made if one.drop is None]
    assert len(kept) + sum(drops(made).values()) == len(answers)
    for one in kept:
        assert one.probability is not None and abs(one.probability - 0.5) >= 0.02
        assert one.responses.first.strip() and one.responses.first.strip() != one.responses.second.strip()
    if kept:
        assert all(row["chosen_prob"] > 0.5 for row in preference_rows(made))


def test_each_reason_of_a_pair_that_cannot_be_learnt() -> None:
    given = responses_of([
        group(), group(("a", "length"), ("b", "stop")), group(("a", "stop"), (" ", "stop")),
        group(("", "error"), ("b", "stop")), group(("a", "stop"), ("a\n", "stop")),
        group(("a", "stop"), ("b", "stop")),
    ])  # fmt: skip
    assert [one.drop for one in given] == ["too_long", "truncated", "empty", "error", "equal", None]
    assert [one.drop for one in labels(given, {})][-1] == "too_long"


def test_the_likelier_response_is_chosen_with_its_probability() -> None:
    rows = preference_rows(labelled(0.9, 0.2))
    assert [row["chosen"][0]["content"] for row in rows] == ["first 0", "second, and longer"]
    assert [row["rejected"][0]["content"] for row in rows] == ["second, and longer", "first 1"]
    assert [row["chosen_prob"] for row in rows] == [pytest.approx(0.9), pytest.approx(0.8)]
    assert [row["principle"] for row in rows] == ["principle 0", "principle 1"]


def test_pairs_nearer_to_a_half_than_the_margin_are_ties_and_so_is_a_half_itself() -> None:
    assert [one.drop for one in labelled(0.51, 0.49, 0.52, 0.47)] == ["tie", "tie", None, None]
    assert [one.drop for one in labelled(0.5, 0.5001, tie_margin=0.0)] == ["tie", None]


def test_a_clamp_bounds_what_is_learnt_and_keeps_the_ties() -> None:
    made = labelled(1.0, 0.0, 0.55, 0.505, clamp=(0.4, 0.6))
    assert [one.probability for one in made] == [0.6, 0.4, pytest.approx(0.55), pytest.approx(0.505)]
    assert [one.drop for one in made] == [None, None, None, "tie"]


def test_a_judge_without_a_choice_is_counted_and_an_empty_result_says_why() -> None:
    made = labelled(None, 0.5)
    assert drops(made) == {"no_choice": 1, "tie": 1}
    with pytest.raises(StageError, match=r"no pair was labelled \(no_choice: 1, tie: 1\).*lower tie_margin"):
        preference_rows(made)


def test_what_the_judge_is_like_in_numbers() -> None:
    found = metrics(labelled(0.9, 0.8, 0.3, truth=1.0))
    assert found["judge/accuracy"] == pytest.approx(2 / 3)
    assert found["judge/confidence"] == pytest.approx((0.8 + 0.6 + 0.4) / 3)
    assert found["judge/says_first"] == pytest.approx(0.5) and found["judge/orders_agree"] == 1
    assert found["judge/mass"] == pytest.approx(0.9)
    assert found["judge/prefers_longer"] == pytest.approx(1 / 3)
    one = response(0)
    biased = labels([one], {key_of(one.pair): Verdict("p", 0.9, 0.8)})
    assert metrics(biased)["judge/says_first"] == pytest.approx(0.85) and metrics(biased)["judge/orders_agree"] == 0
    assert metrics(labelled(None)) == {}


def test_each_principle_is_told_with_what_it_decided_and_how_often_it_was_right() -> None:
    made = labelled(0.9, 0.505, 0.2, 0.9, None, truth=1.0)
    assert by_principle(label_rows(made)) == {
        "principle 0": {"labels": 3, "decided": pytest.approx(2 / 3), "right": 0.5},
        "principle 1": {"labels": 2, "decided": 0.5, "right": 1.0},
    }
    assert "right" not in by_principle(label_rows(labelled(0.9)))["principle 0"]


def test_given_responses_are_read_from_their_columns_with_their_truth() -> None:
    rows = [
        {"prompt": "Q?", "a": "x", "b": [{"role": "assistant", "content": "y"}], "best": 1},
        {"prompt": chat("Q?", "A.", "Q2?"), "a": "x", "b": "y", "best": None},
        {"prompt": "Q?", "a": "x", "b": " x", "best": 0},
    ]
    found = responses_from(rows, ("a", "b"), "best")
    assert [(one.first, one.second, one.truth, one.drop) for one in found] == [
        ("x", "y", 0.0, None), ("x", "y", None, None), ("x", " x", 1.0, "equal"),
    ]  # fmt: skip
    known = responses_from([{"prompt": "Q?", "chosen": "x", "rejected": "y"}], ("chosen", "rejected"))
    assert known[0].truth == 1.0


def test_rows_without_a_response_or_with_another_truth_are_told_all_at_once() -> None:
    rows = [
        {"prompt": "Q?", "a": None, "b": "y", "best": 0},
        {"prompt": "Q?", "a": "x", "b": "y", "best": "A"},
        {"a": "x", "b": "y", "best": 0},
    ]
    with pytest.raises(ConfigError) as caught:
        responses_from(rows, ("a", "b"), "best", "data")
    assert [(one.path, one.message) for one in caught.value.problems][:2] == [
        ("data: row 0", "a must be a text, or one turn of the assistant"),
        ("data: row 1", "best is 'A'; it says which is better: 0, 1, or null"),
    ]
    assert [one.path for one in caught.value.problems][2:] == ["data: row 2"]
    with pytest.raises(ConfigError, match="has no rows"):
        responses_from([], ("a", "b"))
