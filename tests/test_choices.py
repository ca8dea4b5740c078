"""Judges that are no model in this process: a server by its log-probabilities, a function, a script."""

from pathlib import Path
from typing import Any

import pytest

from stagekit.backends import ServerGenerator
from stagekit.choices import (
    Choice,
    Chooser,
    Comparison,
    FunctionChooser,
    Question,
    ScriptedChooser,
    ServerChooser,
    choice_of,
    facts_of,
)
from stagekit.errors import StageError
from stagekit.requests import Sampling, ScriptedGenerator
from tests.answers import likes_longer
from tests.trainers.scripted import chat


def ask(text: str, first: str = "yes", second: str = "no", choices: tuple[str, str] = ("A", "B")) -> Question:
    return Question(text, chat(text), 1, choices=choices, comparison=Comparison(chat("Q?"), first, second, "Which?"))


def test_a_server_s_tokens_are_summed_for_the_choice_that_they_begin(served: tuple[str, Path]) -> None:
    judge = ServerChooser(ServerGenerator(served[0], Sampling(), pause_seconds=0.01))
    assert isinstance(judge, Chooser)
    [choice] = judge.choose([ask("which?")])
    assert choice == Choice(pytest.approx(0.7 / 0.9), pytest.approx(0.9), 11)
    assert judge.choose([ask(f"which {n}?") for n in range(40)]) == [choice] * 40


def test_a_server_that_says_neither_or_one_alone(served: tuple[str, Path]) -> None:
    judge = ServerChooser(ServerGenerator(served[0], Sampling(), pause_seconds=0.01))
    neither, one, too_long = judge.choose([ask("neither"), ask("onlyA"), ask("toolong")])
    assert neither == Choice(None, 0.0, 11)
    assert one == Choice(pytest.approx(0.7 / 0.8), pytest.approx(0.7), 11)  # B at most as likely as the last token
    assert (too_long.probability, too_long.mass) == (None, None)


def test_a_server_without_probabilities_is_no_judge(served: tuple[str, Path]) -> None:
    judge = ServerChooser(ServerGenerator(served[0], Sampling(), pause_seconds=0.01))
    with pytest.raises(StageError, match="gives no log-probabilities"):
        judge.choose([ask("silent")])


@pytest.mark.parametrize(
    ("token", "choices", "expected"),
    [("A", ("A", "B"), 0), (" B", ("A", "B"), 1), ("(", ("(A)", "(B)"), None), ("(B", ("(A)", "(B)"), 1),
     ("", ("A", "B"), None), ("Apple", ("A", "B"), None), ("Y", ("Yes", "No"), 0)],
)  # fmt: skip
def test_a_token_counts_for_the_one_choice_that_begins_with_it(token: str, choices: Any, expected: int | None) -> None:
    assert choice_of(token, choices) == expected


def test_a_function_gets_the_responses_in_the_order_of_the_question() -> None:
    judge = FunctionChooser(likes_longer)
    found = judge.choose([ask("a", "long one", "short"), ask("b", "short", "long one"), ask("c", "ab", "cd")])
    assert [one.probability for one in found] == [1.0, 0.0, 0.5]


def test_a_function_that_names_principles_gets_them() -> None:
    seen: list[Any] = []

    def judge(prompts: Any, first: Any, second: Any, principles: Any) -> list[float]:
        seen.extend(zip(prompts, principles, strict=True))
        return [0.5] * len(prompts)

    FunctionChooser(judge).choose([ask("a")])
    assert seen == [([{"role": "user", "content": "Q?"}], "Which?")]


@pytest.mark.parametrize(
    ("given", "told"), [([2.0], "gave 2.0"), ([float("nan")], "gave nan"), (["A"], "gave 'A'"), ([], "for 1 pairs"),
                        (0.5, "for 1 pairs")]
)  # fmt: skip
def test_what_is_no_probability_stops_with_what_it_was(given: Any, told: str) -> None:
    with pytest.raises(StageError, match=told):
        FunctionChooser(lambda prompts, first, second: given).choose([ask("a")])


def test_a_function_that_raises_is_told_with_the_pair() -> None:
    with pytest.raises(StageError, match=r"raised ZeroDivisionError.*'yes' and 'no'"):
        FunctionChooser(lambda prompts, first, second: [1 / 0]).choose([ask("a")])


def test_a_script_s_reply_is_certain_or_none() -> None:
    judge = ScriptedChooser(ScriptedGenerator(lambda messages: messages[0]["content"]))
    assert [one.probability for one in judge.choose([ask("B."), ask(" A"), ask("Neither")])] == [0.0, 1.0, None]
    assert facts_of(ask("x"), Choice(0.3, None, 4))["text"] == "B"
    assert facts_of(ask("x"), Choice(None, 0.0, 4)) == {
        "text": "", "finish_reason": "error", "probability": None, "mass": 0.0, "n_prompt": 4, "n_new": 0,
    }  # fmt: skip
