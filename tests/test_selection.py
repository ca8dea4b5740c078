"""Which answers are kept: the hand-made rows, a brute-force reference, the recorded candidates, the closed form."""

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagekit.errors import ConfigError, StageError
from stagekit.selection import (
    Candidate,
    Group,
    Selection,
    drops,
    expected_best,
    metrics,
    preference_rows,
    quantiles,
    scored_rows,
    select,
    sft_rows,
)


RECORDED = Path(__file__).resolve().parents[2] / "shared/data/gsm8k_scored_candidates.jsonl"


def answers(*given: tuple[str, float | None] | tuple[str, float | None, str]) -> list[Candidate]:
    """Candidates from (text, reward) or (text, reward, finish reason), with their place as key."""
    return [Candidate(str(place), one[0], *one[2:], reward=one[1]) for place, one in enumerate(given)]  # type: ignore[arg-type,misc]


def kept(selection: Selection) -> list[tuple[str, int]]:
    return [(one.candidate.text, one.index) for one in selection.kept]


HAND_MADE: dict[str, tuple[list[Candidate], dict[str, Any], list[tuple[str, int]], dict[str, int]]] = {
    "none right": (answers(("a", 0.0), ("b", 0.0)), {}, [], {"below_min_reward": 2}),
    "all right": (answers(("a", 1.0), ("b", 1.0), ("c", 1.0)), {}, [("a", 0)], {"outranked": 2}),
    "one right": (answers(("a", 0.0), ("b", 1.0)), {}, [("b", 1)], {"below_min_reward": 1}),
    "ties below the best": (
        answers(("a", 0.5), ("b", 0.9), ("c", 0.5), ("d", 0.5)), {"top_k": 3},
        [("b", 1), ("a", 0), ("c", 2)], {"outranked": 1},
    ),
    "exactly at the threshold": (answers(("a", 0.5), ("b", 0.75)), {"min_reward": 0.5, "top_k": 2}, [("b", 1)],
                                 {"below_min_reward": 1}),
    "no threshold": (answers(("a", -3.0), ("b", -2.0)), {"min_reward": None}, [("b", 1)], {"outranked": 1}),
    "duplicates": (
        answers(("a", 0.2), ("b", 0.9), ("b", 0.9), ("b", 0.9)), {"top_k": 3}, [("b", 1), ("a", 0)],
        {"duplicate": 2},
    ),
    "fewer survivors than top_k": (
        answers(("a", 1.0), ("", None), ("c", None)), {"top_k": 3}, [("a", 0)], {"empty": 1, "no_reward": 1},
    ),
    "cut and failed ones": (
        answers(("best", 9.0, "length"), ("", None, "error"), ("a", 0.1)), {}, [("a", 2)],
        {"truncated": 1, "error": 1},
    ),
    "an answer that quotes the prompt": (
        answers(("You asked 'What is 2 + 2?': What is 2 + 2? is 4.", 1.0), ("4", 0.5)), {},
        [("You asked 'What is 2 + 2?': What is 2 + 2? is 4.", 0)], {"outranked": 1},
    ),
    "only white space": (answers((" \n", 5.0), ("\t", 5.0)), {}, [], {"empty": 2}),
}  # fmt: skip


@pytest.mark.parametrize("name", HAND_MADE)
def test_a_hand_made_row_keeps_exactly_this(name: str) -> None:
    candidates, settings, expected, dropped = HAND_MADE[name]
    selection = select(candidates, **settings)
    assert kept(selection) == expected
    assert selection.drops == dropped
    assert len(candidates) == len(selection.kept) + selection.drops.total()


@pytest.mark.parametrize("reward", [math.nan, math.inf, -math.inf])
def test_the_twelfth_row_whose_reward_is_no_number_stops_with_the_answer(reward: float) -> None:
    with pytest.raises(StageError, match=rf"answer 1 is {reward}.*the answer is 'forty'"):
        select(answers(("four", 1.0), ("forty", reward)))


def test_an_over_long_prompt_first_does_not_shift_the_other_rows() -> None:
    groups = [
        Group(({"role": "user", "content": "long " * 99},), (), "too_long"),
        Group(({"role": "user", "content": "A?"},), tuple(answers(("a", 1.0)))),
        Group(({"role": "user", "content": "B?"},), tuple(answers(("x", 0.0), ("b", 1.0)))),
    ]
    selections = [select(group.candidates) for group in groups]
    rows = sft_rows(groups, selections)
    assert [(row["prompt"][0]["content"], row["completion"][0]["content"]) for row in rows] == [
        ("A?", "a"),
        ("B?", "b"),
    ]
    assert drops(groups, selections) == {"prompts.too_long": 1, "answers.below_min_reward": 1}
    assert [row["candidates"] for row in scored_rows(groups)] == [["a"], ["x", "b"]]


def test_rows_say_what_was_chosen_from_what() -> None:
    messages = ({"role": "user", "content": "Q"},)
    groups = [Group(messages, tuple(answers(("good", 0.9), ("bad", 0.1), ("good", 0.9), ("fair", 0.5))))]
    selections = [select(groups[0].candidates, top_k=2)]
    assert sft_rows(groups, selections) == [
        {
            "prompt": [{"role": "user", "content": "Q"}],
            "completion": [{"role": "assistant", "content": "good"}],
            "reward": 0.9, "rank": 1, "n_valid": 3, "copies": 2, "key": "0",
        },
        {
            "prompt": [{"role": "user", "content": "Q"}],
            "completion": [{"role": "assistant", "content": "fair"}],
            "reward": 0.5, "rank": 2, "n_valid": 3, "copies": 1, "key": "3",
        },
    ]  # fmt: skip
    assert preference_rows(groups, selections) == [
        {
            "prompt": [{"role": "user", "content": "Q"}],
            "chosen": [{"role": "assistant", "content": "good"}],
            "rejected": [{"role": "assistant", "content": "bad"}],
            "chosen_reward": 0.9, "rejected_reward": 0.1, "key": "0",
        }
    ]  # fmt: skip


def test_a_tied_row_gives_its_first_answer_and_never_a_pair() -> None:
    groups = [Group(({"role": "user", "content": "Q"},), tuple(answers(("a", 0.5), ("b", 0.5), ("c", 0.5))))]
    selections = [select(groups[0].candidates)]
    assert selections[0].tied
    assert [row["completion"][0]["content"] for row in sft_rows(groups, selections)] == ["a"]
    assert preference_rows(groups, selections) == []
    assert metrics(selections)["tied"] == 1.0


def test_pairs_do_not_ask_for_a_reward_above_the_threshold() -> None:
    groups = [Group(({"role": "user", "content": "Q"},), tuple(answers(("a", -2.0), ("b", -1.0))))]
    [pair] = preference_rows(groups, [select(groups[0].candidates)])
    assert (pair["chosen_reward"], pair["rejected_reward"]) == (-1.0, -2.0)


def test_nothing_kept_is_an_error_with_reasons_quantiles_and_the_way_out() -> None:
    groups = [
        Group(({"role": "user", "content": "Q"},), tuple(answers(("a", -1.0), ("b", -5.0), ("", None)))),
        Group(({"role": "user", "content": "R"},), (), "too_long"),
    ]
    selections = [select(group.candidates) for group in groups]
    with pytest.raises(StageError) as caught:
        sft_rows(groups, selections)
    text = str(caught.value)
    for part in ("answers.below_min_reward: 2", "answers.empty: 1", "prompts.too_long: 1", "min -5", "max -1"):
        assert part in text
    assert "Lower min_reward" in text


def test_keeping_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="top_k is 0"):
        select([], top_k=0)


# 2.2, test 2

REWARDS = st.one_of(st.none(), st.sampled_from([-1.0, 0.0, 0.5, 1.0]), st.floats(-3, 3))
CANDIDATES = st.lists(
    st.tuples(st.sampled_from(["", "a", "b", " b", "c", "d", "e", "f"]), REWARDS, st.sampled_from(["stop", "length"])),
    max_size=12,
)


def brute_force(given: Sequence[Any], top_k: int, min_reward: float | None) -> list[int]:
    """Indices of the kept, by trying every index in turn as the next best."""
    alive = []
    for index, (text, reward, finish) in enumerate(given):
        earlier = [one for one in alive if given[one][0] == text]
        if finish == "stop" and text.strip() and reward is not None and not earlier:
            alive.append(index)
    alive = [index for index in alive if min_reward is None or given[index][1] > min_reward]
    chosen: list[int] = []
    while alive and len(chosen) < top_k:
        best = max(given[index][1] for index in alive)
        chosen.append(next(index for index in alive if given[index][1] == best))
        alive.remove(chosen[-1])
    return chosen


@given(CANDIDATES, st.integers(1, 12), st.one_of(st.none(), st.sampled_from([-1.0, 0.0, 0.5])))
def test_what_is_kept_is_what_brute_force_keeps(given: Any, top_k: int, min_reward: float | None) -> None:
    selection = select(answers(*given), top_k=top_k, min_reward=min_reward)
    assert [one.index for one in selection.kept] == brute_force(given, top_k, min_reward)
    assert len(given) == len(selection.kept) + selection.drops.total()
    assert sum(one.copies for one in selection.valid) == len(selection.valid) + selection.drops["duplicate"]


@given(st.lists(st.tuples(st.uuids().map(str), st.floats(0, 1)), max_size=12, unique_by=lambda one: one[1]),
       st.integers(1, 12), st.randoms(use_true_random=False))  # fmt: skip
def test_without_ties_the_order_of_the_samples_changes_nothing(given: Any, top_k: int, chance: random.Random) -> None:
    shuffled = list(given)
    chance.shuffle(shuffled)
    first, second = (select(answers(*rows), top_k=top_k, min_reward=None) for rows in (given, shuffled))
    assert [one.candidate.text for one in first.kept] == [one.candidate.text for one in second.kept]


# 2.2, test 1


@pytest.mark.skipif(not RECORDED.is_file(), reason="the recorded candidates are not on this machine")
def test_recorded_candidates_with_recorded_rewards_keep_the_right_ones() -> None:
    rows = [json.loads(line) for line in RECORDED.read_text(encoding="utf-8").splitlines()]
    groups = [
        Group(tuple(row["prompt"]), tuple(answers(*zip(row["candidates"], row["rewards"], strict=True))))
        for row in rows
    ]
    assert len(groups) == 998
    kept = sft_rows(groups, [select(group.candidates) for group in groups])
    assert len(kept) == 670 and {row["reward"] for row in kept} == {1.0}
    twice = [select(group.candidates, top_k=2) for group in groups]
    right = [{text for text, reward in zip(row["candidates"], row["rewards"], strict=True) if reward == 1.0}
             for row in rows]  # fmt: skip
    assert [len(selection.kept) for selection in twice] == [min(2, len(texts)) for texts in right]
    with pytest.raises(StageError, match="below_min_reward"):
        sft_rows(groups, [select(group.candidates, min_reward=1.0) for group in groups])


# 2.2, tests 3 and 4


def test_the_expected_best_of_k_is_that_of_all_draws() -> None:
    from itertools import combinations

    rewards = [0.3, -1.0, 2.0, 2.0, 0.0, 5.5]
    for k in range(1, 7):
        draws = [max(draw) for draw in combinations(rewards, k)]
        assert expected_best(rewards, k) == pytest.approx(sum(draws) / len(draws))
    assert expected_best(rewards, 1) == pytest.approx(sum(rewards) / 6)
    assert expected_best(rewards, 6) == 5.5
    with pytest.raises(ConfigError):
        expected_best(rewards, 7)


def test_the_kept_of_n_samples_are_distributed_as_f_to_the_n() -> None:
    """Best-of-N of a distribution p over ordered values has q(y) = F(y)^N - F(<y)^N, and its mean reward."""
    chance, n, rounds = random.Random(0), 4, 4000
    values, p = [0.0, 1.0, 2.0, 3.0], [0.4, 0.3, 0.2, 0.1]
    counts = dict.fromkeys(values, 0)
    for _ in range(rounds):
        drawn = chance.choices(values, p, k=n)
        [best] = select(answers(*((str(value), value) for value in drawn)), min_reward=None).kept
        counts[best.reward] += 1
    below = 0.0
    for value, share in zip(values, p, strict=True):
        q = (below + share) ** n - below**n
        below += share
        assert counts[value] / rounds == pytest.approx(q, abs=4 * math.sqrt(q * (1 - q) / rounds))
    mean = sum(value * count for value, count in counts.items()) / rounds
    assert 1.98 < mean < 2.14  # sum of q(y) y = 2.0584, 4 standard errors


def test_metrics_are_means_over_prompts() -> None:
    groups = [answers(("a", 0.0), ("b", 1.0), ("b", 1.0), ("c", 3.0)), answers(("a", 2.0)), answers(("", None))]
    found = metrics([select(group) for group in groups])
    assert found["reward/mean"] == pytest.approx((5 / 4 + 2) / 2)
    assert found["reward/best_of_1"] == found["reward/mean"]
    assert found["reward/best_of_2"] == pytest.approx(expected_best([0, 1, 1, 3], 2))
    assert found["reward/best_of_4"] == 3.0
    assert found["reward/kept"] == 2.5
    assert found["kept_share"] == pytest.approx(2 / 4)
    assert metrics([]) == {}


def test_quantiles_are_rewards_that_were_given() -> None:
    assert quantiles([3.0, 1.0, 2.0]) == {"min": 1.0, "25 %": 1.0, "median": 2.0, "75 %": 3.0, "max": 3.0}
    assert quantiles([]) == {}
