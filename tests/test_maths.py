"""Mathematical answers: what is equal, what is not, and what is given up."""

import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from stagekit import ConfigError
from stagekit import maths as mathematics
from stagekit.maths import Comparer, Comparison, end_all, equal
from stagekit.verifiers import maths


pytest.importorskip("math_verify")


@pytest.fixture(scope="module", autouse=True)
def ended() -> Iterator[None]:
    yield
    end_all()


RIGHT = [
    ("1/2", r"so it is \boxed{\frac{2}{4}}"), (r"\frac{1}{2}", "The answer is $0.5$."), (r"\dfrac12", r"\boxed{1/2}"),
    ("0.5", "50%"), ("50%", r"\boxed{\frac{1}{2}}"), ("50\\%", r"\boxed{50\%}"), (7, "7"), (0.25, r"\boxed{1/4}"),
    ("5", r"\boxed{5\text{ cm}}"), ("5 cm", r"\boxed{5\,\mathrm{cm}}"), ("$5", "I paid $5"), ("5", r"\boxed{\$5}"),
    (r"\{1,2,3\}", r"\boxed{\{3,2,1\}}"), ("1, 2", r"\boxed{2, 1}"), ("(0,1]", r"\boxed{(0, 1]}"),
    (r"(-\infty,2) \cup (3,\infty)", r"\boxed{(3,\infty)\cup(-\infty,2)}"), ("x^2+2x+1", r"\boxed{(x+1)^2}"),
    ("x = 3", r"\boxed{3}"), ("3", r"\boxed{x=3}"), (r"2\sqrt{3}", r"\boxed{\sqrt{12}}"), ("1,234", "= 1234"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\boxed{\begin{pmatrix}1\\2\end{pmatrix}}"), ("72", "so #### 72"),
    (r"Thus we get $a=1$ and so \boxed{4}.", r"\boxed{4}"), (r"\(3\)", r"\[3\]"), ("3", r"first \boxed{3}, a 9"),
]  # fmt: skip
WRONG = [
    ("1/2", r"\boxed{\frac{1}{3}}"), ("(0,1]", r"\boxed{[0, 1]}"), ("(1,2)", r"\boxed{(2,1)}"),
    (r"\{1,2\}", r"\boxed{\{1,2,3\}}"), ("x^2", r"\boxed{y^2}"), ("3", r"\boxed{1} \boxed{3}"),
    ("3", r"\boxed{2 \text{ or } 3}"), ("3", "no idea"), ("3", ""), ("3", r"\boxed{"), ("3", r"\frac{"),
    ("3", "$" * 999), (r"\pi", r"\boxed{3.14}"),
    ("3", r"the \boxed{4}, not 3"), ("1e3", r"\boxed{10}"),
]  # fmt: skip


@pytest.mark.parametrize(("gold", "said"), RIGHT)
def test_equal_answers_are_right_however_they_are_written(gold: Any, said: str) -> None:
    assert maths([said], answer=[gold]) == [1.0]


@pytest.mark.parametrize(("gold", "said"), WRONG)
def test_other_answers_and_broken_ones_are_wrong(gold: str, said: str) -> None:
    assert maths([said], answer=[gold]) == [0.0]


def test_answers_come_from_a_column_and_out_of_conversations() -> None:
    completion = [{"role": "assistant", "content": r"\boxed{2}"}]
    assert maths([completion, completion], solution=["2", "3"], column="solution") == [1, 0]


def test_what_an_expression_extracts_is_the_whole_answer() -> None:
    texts = [r"<answer>\frac{1}{2}</answer> or 7", "<answer>(0,1]</answer>", "7", "<answer></answer>"]
    assert maths(texts, answer=["1/2", "(0,1]", "7", "7"], extract=r"<answer>(.*?)</answer>") == [1, 1, 0, 0]


def test_a_box_can_be_asked_for() -> None:
    texts = ["It is 5.", "It is $5$.", r"It is \boxed{5}."]
    assert maths(texts, answer=["5"] * 3) == [1, 1, 1]
    assert maths(texts, answer=["5"] * 3, boxed=True) == [0, 0, 1]


@pytest.mark.parametrize("gold", ["", "...", "()"])
def test_a_right_answer_that_is_none_is_an_error(gold: str) -> None:
    with pytest.raises(ConfigError, match=r"reward maths: an answer in column 'answer' is none: .* no mathematics"):
        maths([r"\boxed{5}"], answer=[gold])


@pytest.mark.parametrize(
    "said",
    [r"\boxed{9^{9^{9^{9}}}}", "9^9^9^9", r"\boxed{(10^{10^{8}})!}", r"\boxed{" + "(" * 3000 + "3" + ")" * 3000 + "}"],
    ids=["tower", "plain tower", "factorial", "parentheses"],
)
def test_what_takes_for_ever_is_given_up_and_the_next_is_compared(said: str) -> None:
    assert maths([said, r"\boxed{3}"], answer=["3", "3"], cpu_seconds=1) == [0, 1]


def test_a_right_answer_that_takes_for_ever_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"takes more than 1 seconds to read|is read as no mathematics"):
        maths([r"\boxed{3}"], answer=["(" * 3000 + "3" + ")" * 3000], cpu_seconds=1)


def test_very_long_texts_are_read_or_given_up() -> None:
    assert maths(["1 2 " * 20_000, r"\boxed{3}" * 2000], answer=["3", "3"], cpu_seconds=2)[0] == 0


def test_it_works_outside_of_the_main_thread_where_no_alarm_reaches() -> None:
    found: list[float] = []
    thread = threading.Thread(target=lambda: found.extend(maths(["9^9^9^9", "3"], answer=["3", "3"], cpu_seconds=1)))
    thread.start()
    thread.join()
    assert found == [0, 1]


def test_many_comparisons_come_back_in_their_order() -> None:
    count = 3 * mathematics._FOR_A_PROCESS
    pairs = [Comparison(str(n), rf"\boxed{{{n + n % 2}}}") for n in range(count)]
    assert equal(pairs) == [n % 2 == 0 for n in range(count)]


def test_a_process_that_somebody_ended_is_started_again() -> None:
    comparer = Comparer()
    try:
        assert comparer.equal(Comparison("1", "1"))
        assert comparer._process is not None
        os.kill(comparer._process.pid, signal.SIGKILL)
        comparer._process.wait()
        assert comparer.equal(Comparison("2", "2"))
    finally:
        comparer.end()
