"""Pairs put to a judge: what it sees, both orders averaged, exact symmetry, the draw of principles, resuming."""

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stagekit.choices import Choice, Chooser, Question, ScriptedChooser
from stagekit.choosing import ModelChooser
from stagekit.errors import ConfigError, Interrupted, StageError
from stagekit.generation import TransformersGenerator
from stagekit.journal import Journal
from stagekit.requests import Message, Sampling, ScriptedGenerator
from stagekit.templates import REASONED_COMPARISON, VERDICT
from stagekit.trainers.comparisons import Asking, Pair, Verdict, compare, verdicts_digest
from tests.trainers.scripted import chat, contents, records_of


PLAIN = "{conversation}\n(A) {first}\n(B) {second}\n{principle}"
ASKING = Asking(("Which is better?",), PLAIN)


class Judge:
    """Answers by a function of the question; dies after `life` batches."""

    fingerprint = "judge"

    def __init__(self, answer: Any, life: int | None = None, context: int | None = None) -> None:
        self.answer, self.life, self.context_length = answer, life, context
        self.batches: list[list[Question]] = []

    def prompt_length(self, messages: Any) -> int:
        return sum(1 + len(message["content"].split()) for message in messages)

    def choose(self, questions: Any) -> list[Choice]:
        if self.life is not None and len(self.batches) == self.life:
            raise KeyboardInterrupt
        self.batches.append(list(questions))
        return [Choice(self.answer(question), 0.9, self.prompt_length(question.messages)) for question in questions]


def pairs(*texts: tuple[str, str], asked: str = "Q?") -> list[Pair]:
    return [Pair(chat(asked), first, second) for first, second in texts]


def verdicts(tmp_path: Path, given: list[Pair], judge: Any, name: str = "j.jsonl", **settings: Any) -> Any:
    how = {"asking": ASKING, "seed": 7, "batch_tokens": 10_000, **settings}
    callbacks = {key: how.pop(key) for key in ("on_batch", "should_stop") if key in how}
    digest = verdicts_digest(given, judge=judge, **how)
    with Journal.open(tmp_path / name, digest) as journal:
        return compare(given, judge=judge, journal=journal, **how, **callbacks)


def test_the_judge_sees_both_orders_of_a_pair_and_nothing_else(tmp_path: Path) -> None:
    judge = Judge(lambda question: 0.75)
    [verdict] = verdicts(tmp_path, pairs(("yes", "no")), judge)
    assert isinstance(judge, Chooser)
    assert sorted(contents(question.messages) for batch in judge.batches for question in batch) == [
        ("Q?\n(A) no\n(B) yes\nWhich is better?",),
        ("Q?\n(A) yes\n(B) no\nWhich is better?",),
    ]
    assert verdict == Verdict("Which is better?", 0.75, 0.75, 0.9)
    assert verdict.probability == 0.5  # it goes by the place alone
    records = records_of(tmp_path / "j.jsonl")
    assert [(one["role"], one["text"], one["probability"], one["n_new"]) for one in records] == [
        ("judgement", "A", 0.75, 0)
    ] * 2


def test_a_conversation_of_several_turns_is_shown_with_its_roles(tmp_path: Path) -> None:
    judge = Judge(lambda question: 0.5)
    verdicts(tmp_path, [Pair(chat("Hi", "Hello", "Why?"), "a", "b")], judge)
    [text] = contents(judge.batches[0][0].messages)
    assert text.startswith("user: Hi\n\nassistant: Hello\n\nuser: Why?\n(A) ")


def test_braces_in_a_response_are_text(tmp_path: Path) -> None:
    judge = Judge(lambda question: 0.5)
    verdicts(tmp_path, pairs(("{principle}", "{0}")), judge)
    assert {contents(one.messages)[0] for one in judge.batches[0]} == {
        "Q?\n(A) {principle}\n(B) {0}\nWhich is better?",
        "Q?\n(A) {0}\n(B) {principle}\nWhich is better?",
    }


@given(st.floats(0, 1), st.floats(0, 1))
def test_a_probability_and_that_of_the_swapped_pair_make_one_to_the_bit(forward: float, backward: float) -> None:
    as_given, swapped = Verdict("p", forward, backward).probability, Verdict("p", backward, forward).probability
    assert as_given is not None and swapped is not None
    assert swapped == 1 - as_given and as_given == 1 - swapped
    assert as_given == pytest.approx((forward + 1 - backward) / 2, abs=1e-11)


@pytest.fixture
def chooser(tiny_model: Any, tiny_tokenizer: Any) -> ModelChooser:
    return ModelChooser(TransformersGenerator(tiny_model, tiny_tokenizer, Sampling(), "tiny"))


GIVEN = pairs(("An apple.", "A hammer, if you ask me."), ("Seven days.", "Nine"), ("It is blue.", "Go away."))


def test_swapping_the_responses_of_a_real_model_gives_exactly_one_minus_p(chooser: Any, tmp_path: Path) -> None:
    several = Asking(("Which is kinder?", "Which is shorter?", "Which is right?"))
    swapped = [Pair(pair.messages, pair.second, pair.first) for pair in reversed(GIVEN)]
    for batch_tokens in (400, 10_000):
        how: dict[str, Any] = {"asking": several, "batch_tokens": batch_tokens}
        one = verdicts(tmp_path, GIVEN, chooser, f"a{batch_tokens}.jsonl", **how)
        other = verdicts(tmp_path, swapped, chooser, f"b{batch_tokens}.jsonl", **how)
        assert [v.principle for v in one] == [v.principle for v in reversed(other)]
        assert [v.probability for v in one] == [1 - v.probability for v in reversed(other)]
        assert len({v.probability for v in one}) == 3


def test_the_probability_is_that_of_the_next_token_alone(chooser: Any, tiny_model: Any, tiny_tokenizer: Any) -> None:
    questions = [
        Question(str(n), chat(text), 1, choices=("A", "B"), comparison=None)  # type: ignore[arg-type]
        for n, text in enumerate(("Short?", "A much longer question, is it not, with many more words in it?"))
    ]
    batched = chooser.choose(questions)
    first, second = (tiny_tokenizer(one, add_special_tokens=False)["input_ids"][0] for one in "AB")
    for question, choice in zip(questions, batched, strict=True):
        ids = tiny_tokenizer.apply_chat_template(list(question.messages), add_generation_prompt=True)["input_ids"]
        with torch.no_grad():
            shares = tiny_model.eval()(torch.tensor([ids])).logits[0, -1].softmax(-1)
        assert choice.probability == pytest.approx(float(shares[first] / (shares[first] + shares[second])), rel=1e-5)
        assert choice.mass == pytest.approx(float(shares[first] + shares[second]), rel=1e-4)
        assert choice.prompt_tokens == len(ids)


def test_what_both_choices_begin_with_is_read_as_said(chooser: Any, tiny_model: Any, tiny_tokenizer: Any) -> None:
    [choice] = chooser.choose([Question("k", chat("Which?"), 1, choices=("(A)", "(B)"), comparison=None)])  # type: ignore[arg-type]
    answers = [tiny_tokenizer(f"({letter})", add_special_tokens=False)["input_ids"] for letter in "AB"]
    same = next(place for place, (a, b) in enumerate(zip(*answers, strict=True)) if a != b)
    ids = tiny_tokenizer.apply_chat_template([{"role": "user", "content": "Which?"}], add_generation_prompt=True)
    with torch.no_grad():
        read = torch.tensor([[*ids["input_ids"], *answers[0][:same]]])
        shares = tiny_model.eval()(read).logits[0, -1].softmax(-1)
    a, b = float(shares[answers[0][same]]), float(shares[answers[1][same]])
    assert choice.probability == pytest.approx(a / (a + b), rel=1e-5)


def test_choices_that_are_the_same_tokens_are_refused(chooser: Any) -> None:
    with pytest.raises(ConfigError, match="begin with the same tokens"):
        chooser.choose([Question("k", chat("Which?"), 1, choices=("A", "A"), comparison=None)])  # type: ignore[arg-type]


def test_judging_leaves_the_model_in_training_as_it_was(chooser: Any, tiny_model: Any) -> None:
    tiny_model.train()
    before = {name: weight.clone() for name, weight in tiny_model.state_dict().items()}
    chooser.choose([Question("k", chat("Which?"), 1, choices=("A", "B"), comparison=None)])  # type: ignore[arg-type]
    assert tiny_model.training
    assert all(torch.equal(weight, before[name]) for name, weight in tiny_model.state_dict().items())


def test_principles_are_drawn_evenly_and_depend_on_the_pair_alone(tmp_path: Path) -> None:
    asking = Asking(tuple(f"principle {n}" for n in range(16)), PLAIN)
    given = [Pair(chat(f"question {n}"), "a", "b") for n in range(2000)]
    drawn = [v.principle for v in verdicts(tmp_path, given, Judge(lambda question: 0.5), asking=asking)]
    counts = Counter(drawn)
    expected = len(given) / 16
    assert sum((counts[name] - expected) ** 2 / expected for name in asking.principles) < 37.7  # chi2(15), 99.9 %
    other = verdicts(
        tmp_path, given[::-2], Judge(lambda question: 0.5), "other.jsonl", asking=asking, batch_tokens=200
    )
    assert [v.principle for v in other] == drawn[::-2]
    again = verdicts(tmp_path, given, Judge(lambda question: 0.5), "seed.jsonl", asking=asking, seed=8)
    assert [v.principle for v in again] != drawn


def test_a_pair_that_stands_twice_is_judged_once_in_whichever_order(tmp_path: Path) -> None:
    judge = Judge(lambda question: 0.9 if question.comparison.first == "a" else 0.2)
    one, two, three = verdicts(tmp_path, pairs(("a", "b"), ("a", "b"), ("b", "a")), judge)
    assert one == two and one.probability == pytest.approx(0.85) and three.probability == 1 - one.probability
    assert sum(map(len, judge.batches)) == 2


def test_a_question_that_is_too_long_for_the_judge_leaves_the_others(tmp_path: Path) -> None:
    found = verdicts(tmp_path, pairs(("a " * 50, "b"), ("a", "b")), Judge(lambda question: 0.9, context=40))
    assert found[0] is None and found[1].probability == 0.5


def test_a_judge_that_makes_no_choice_gives_no_probability(tmp_path: Path) -> None:
    [verdict] = verdicts(tmp_path, pairs(("a", "b")), ScriptedChooser(ScriptedGenerator(lambda messages: "Neither.")))
    assert verdict.probability is None
    assert [one["finish_reason"] for one in records_of(tmp_path / "j.jsonl")] == ["error", "error"]


def likes_long(messages: tuple[Message, ...]) -> str:
    """A scripted judge that writes its reasons where it is asked for them."""
    if "step by step" in messages[-1]["content"]:
        return f"Reasons {len(messages[0]['content'])}."
    text = messages[0]["content"]
    first, second = text.partition("(A) ")[2].split("\n\n")[0], text.partition("(B) ")[2].split("\n\n")[0]
    return "A" if len(first) > len(second) else "B"


def test_the_reasons_stand_between_the_question_and_the_verdict(tmp_path: Path) -> None:
    writes = ScriptedGenerator(likes_long)
    asking = Asking(("Which is better?",), REASONED_COMPARISON, reasons=True)
    how: dict[str, Any] = {"asking": asking, "thinker": writes}
    [verdict] = verdicts(tmp_path, pairs(("a long one", "b")), ScriptedChooser(writes), **how)
    assert (verdict.forward, verdict.backward, verdict.probability) == (1.0, 0.0, 1.0)
    last = [messages for batch in writes.calls for messages in batch if len(messages) == 3]
    assert len(last) == 2
    for messages in last:
        asked, said, verdict_request = contents(messages)
        assert said == f"Reasons {len(asked)}." and verdict_request == VERDICT
    assert Counter(one["role"] for one in records_of(tmp_path / "j.jsonl")) == {"thought": 2, "judgement": 2}


MANY = [Pair(chat(f"question {n}?"), f"one {n}", f"another {n * n}") for n in range(6)]


@pytest.mark.parametrize("life", range(4))
def test_a_judge_that_dies_at_any_batch_goes_on_to_the_same_journal(life: int, tmp_path: Path) -> None:
    def answer(question: Question) -> float:
        return len(question.comparison.first) / 20

    whole = Judge(answer)
    expected = verdicts(tmp_path, MANY, whole, "whole.jsonl", batch_tokens=45)
    assert len(whole.batches) == 4
    with pytest.raises(KeyboardInterrupt):
        verdicts(tmp_path, MANY, Judge(answer, life), "died.jsonl", batch_tokens=45)
    again = Judge(answer)
    assert verdicts(tmp_path, MANY, again, "died.jsonl", batch_tokens=45) == expected
    assert len(again.batches) == 4 - life
    journals = [
        sorted(records_of(tmp_path / name), key=lambda one: one["key"]) for name in ("whole.jsonl", "died.jsonl")
    ]
    assert journals[0] == journals[1]


@pytest.mark.parametrize("life", range(3))
def test_a_real_model_that_dies_at_any_batch_goes_on_to_the_same_journal(
    life: int, chooser: ModelChooser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = verdicts(tmp_path, GIVEN, chooser, "whole.jsonl", batch_tokens=120)
    choose, calls = ModelChooser.choose, []

    def dying(self: Any, questions: Any) -> Any:
        if len(calls) == life:
            raise KeyboardInterrupt
        calls.append(questions)
        return choose(self, questions)

    with monkeypatch.context() as patch:
        patch.setattr(ModelChooser, "choose", dying)
        with pytest.raises(KeyboardInterrupt):
            verdicts(tmp_path, GIVEN, chooser, "died.jsonl", batch_tokens=120)
    assert verdicts(tmp_path, GIVEN, chooser, "died.jsonl", batch_tokens=120) == expected
    journals = [sorted(map(str, records_of(tmp_path / name))) for name in ("whole.jsonl", "died.jsonl")]
    assert journals[0] == journals[1] and len(journals[0]) == 6


def test_a_user_who_stops_keeps_all_batches_so_far(tmp_path: Path) -> None:
    judge = Judge(lambda question: 0.6)
    with pytest.raises(Interrupted, match="stopped before batch 3 of 4 of the judgements"):
        verdicts(tmp_path, MANY, judge, batch_tokens=45, should_stop=lambda: len(judge.batches) == 2)
    assert len(records_of(tmp_path / "j.jsonl")) == sum(map(len, judge.batches)) > 2


def test_the_verdicts_can_be_had_from_the_journal_without_a_judge(tmp_path: Path) -> None:
    expected = verdicts(tmp_path, MANY, Judge(lambda question: len(question.comparison.first) / 20))
    journal = Journal.read(tmp_path / "j.jsonl")
    assert compare(MANY, judge=None, asking=ASKING, seed=7, journal=journal, batch_tokens=1) == expected


def test_another_judge_seed_or_question_is_another_journal(tmp_path: Path) -> None:
    judge = Judge(lambda question: 0.5)
    verdicts(tmp_path, MANY, judge)
    other = Judge(lambda question: 0.5)
    other.fingerprint = "other"
    for changed in ({"seed": 8}, {"asking": Asking(("Which is worse?",), PLAIN)}, {"batch_tokens": 99}):
        with pytest.raises(StageError, match="was made under digest"):
            verdicts(tmp_path, MANY, judge, **changed)
    with pytest.raises(StageError, match="was made under digest"):
        verdicts(tmp_path, MANY, other)
    assert math.isclose(verdicts(tmp_path, MANY[::-1], judge)[0].probability, 0.5)
