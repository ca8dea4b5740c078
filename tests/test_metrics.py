"""Text metrics: by hand, and against the libraries behind them on ten pairs."""

import sys
from collections.abc import Sequence

import pytest

from stagekit.errors import ConfigError
from stagekit.metrics import bleu, rouge, token_f1, win_rate


PAIRS = (
    ("The cat sat on the mat.", "The cat is on the mat."),
    ("There are seven days in a week.", "A week has seven days."),
    ("It is blue.", "The sky is blue on a clear day."),
    ("2 + 3 = 5", "2 + 3 = 5."),
    ("An apple", "apple"),
    ("Water boils at 100 degrees.", "Light travels faster than sound."),
    ("He was running fast, and she ran faster.", "He runs fast and she is running faster."),
    ("", "Something."),
    ("Call print with the text: print('hi').", "Use print('hi') to print the text."),
    ("Grüße aus Köln", "Viele Grüße aus Köln"),
)
PREDICTIONS = [prediction for prediction, _ in PAIRS]
REFERENCES = [reference for _, reference in PAIRS]


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        # Without articles: cat sat on mat / cat is on mat share 3 of 4 and 4: 2 * 3 / 8.
        (*PAIRS[0], 0.75),
        # there are seven days in week / week has seven days share 3 of 6 and 4.
        (*PAIRS[1], 0.6),
        # it is blue / sky is blue on clear day share 2 of 3 and 6.
        (*PAIRS[2], 4 / 9),
        # "+" and "=" are punctuation: 2 3 5 on both sides.
        (*PAIRS[3], 1.0),
        (*PAIRS[4], 1.0),
        (*PAIRS[5], 0.0),
        # he was running fast and she ran faster / he runs fast and she is running faster share 6 of 8 and 8.
        (*PAIRS[6], 0.75),
        (*PAIRS[7], 0.0),
        # call print with text printhi / use printhi to print text share 3 of 5 and 5.
        (*PAIRS[8], 0.6),
        (*PAIRS[9], 6 / 7),
        ("the", "", 1.0),
        ("yes yes yes", "yes", 0.5),
    ],
)
def test_token_f1_is_that_worked_out_by_hand(prediction: str, reference: str, expected: float) -> None:
    assert token_f1([prediction], [reference]) == pytest.approx(expected)


def test_token_f1_is_the_mean_over_predictions_and_the_best_over_references() -> None:
    by_hand = (0.75 + 0.6 + 4 / 9 + 1 + 1 + 0 + 0.75 + 0 + 0.6 + 6 / 7) / 10
    assert token_f1(PREDICTIONS, REFERENCES) == pytest.approx(by_hand)
    assert token_f1(["yes", "no"], [["no", "yes"], ["yes"]]) == 0.5


def test_bleu_is_that_of_sacrebleu() -> None:
    sacrebleu = pytest.importorskip("sacrebleu", reason='needs the extra: pip install "trl-stagekit[metrics]"')
    assert bleu(PREDICTIONS, REFERENCES) == sacrebleu.corpus_bleu(PREDICTIONS, [REFERENCES]).score
    assert bleu(PREDICTIONS, REFERENCES) == pytest.approx(27.21027, abs=1e-4)  # sacrebleu 2.6.0
    assert bleu(REFERENCES, REFERENCES) == pytest.approx(100)
    for prediction, reference in PAIRS:
        assert bleu([prediction], [reference]) == sacrebleu.corpus_bleu([prediction], [[reference]]).score
    several = [[reference, prediction] for prediction, reference in PAIRS[:5]] + [[one] for one in REFERENCES[5:]]
    streams = [REFERENCES, [*PREDICTIONS[:5], *[None] * 5]]
    assert bleu(PREDICTIONS, several) == sacrebleu.corpus_bleu(PREDICTIONS, streams).score


@pytest.mark.parametrize("stemmer", [False, True])
def test_rouge_is_that_of_rouge_score(stemmer: bool) -> None:
    scoring = pytest.importorskip(
        "rouge_score.rouge_scorer", reason='needs the extra: pip install "trl-stagekit[metrics]"'
    )
    scorer = scoring.RougeScorer(["rougeL"], use_stemmer=stemmer)
    each = [scorer.score(reference, prediction)["rougeL"].fmeasure for prediction, reference in PAIRS]
    for (prediction, reference), expected in zip(PAIRS, each, strict=True):
        assert rouge([prediction], [reference], stemmer) == expected
    assert rouge(PREDICTIONS, REFERENCES, stemmer) == pytest.approx(sum(each) / 10)
    assert stemmer or sum(each) / 10 == pytest.approx(0.51596, abs=1e-5)  # rouge-score 0.1.2
    assert rouge(["a b c"], [["d", "a c"]], stemmer) == pytest.approx(0.8)  # 2 of 3 and 2 of 2 words


def prefers_long(prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> list[float]:
    return [0.5 + 0.5 * ((len(a) > len(b)) - (len(a) < len(b))) for a, b in zip(first, second, strict=True)]


def test_the_win_rate_counts_wins_and_half_of_the_ties() -> None:
    prompts, ours, theirs = ["p"] * 4, ["aaa", "aa", "a", "aa"], ["a", "aa", "aa", "a"]
    assert win_rate(prefers_long, prompts, ours, theirs) == (0.625, 1.0, 4)  # two wins, a tie, a loss
    assert win_rate(prefers_long, prompts, theirs, ours) == (0.375, 1.0, 4)


def test_a_judge_that_takes_the_first_answer_finds_nobody_better() -> None:
    def first(prompts: Sequence[str], one: Sequence[str], other: Sequence[str]) -> list[float]:
        return [1.0] * len(prompts)

    assert win_rate(first, ["p", "q"], ["a", "b"], ["c", "d"]) == (0.5, 0.0, 2)


def test_every_pair_is_judged_in_both_orders() -> None:
    asked: list[tuple[str, str]] = []

    def judge(prompts: Sequence[str], one: Sequence[str], other: Sequence[str]) -> list[float]:
        asked.extend(zip(one, other, strict=True))
        return [0.9, 0.5]

    found = win_rate(judge, ["p", "q"], ["a", "b"], ["c", "d"])
    assert asked == [("a", "c"), ("b", "d"), ("c", "a"), ("d", "b")]
    assert found.win_rate == pytest.approx(0.5) and found.agreement == 0.5


@pytest.mark.parametrize("verdict", [-1, 2, None, "first", float("nan")])
def test_a_verdict_that_is_none_is_refused(verdict: object) -> None:
    with pytest.raises(ConfigError, match="the judge said"):
        win_rate(lambda prompts, one, other: [verdict], ["p"], ["a"], ["b"])  # type: ignore[list-item]


def test_texts_that_do_not_pair_up_are_refused() -> None:
    for metric in (token_f1, bleu, rouge):
        with pytest.raises(ConfigError, match="1 predictions and 2 references"):
            metric(["a"], ["a", "b"])
        with pytest.raises(ConfigError, match="0 predictions"):
            metric([], [])
    with pytest.raises(ConfigError, match="prediction 1 has no reference"):
        token_f1(["a", "b"], [["a"], []])
    with pytest.raises(ConfigError, match="1 prompts, 2 candidates and 1 baselines"):
        win_rate(prefers_long, ["p"], ["a", "b"], ["c"])
    with pytest.raises(ConfigError, match="1 verdicts on 2 prompts"):
        win_rate(lambda prompts, one, other: [1.0], ["p", "q"], ["a", "b"], ["c", "d"])


def test_a_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("sacrebleu", "rouge_score", "rouge_score.rouge_scorer"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=r'sacrebleu is not installed .*pip install "trl-stagekit\[metrics\]"'):
        bleu(["a"], ["a"])
    with pytest.raises(ConfigError, match=r'rouge-score is not installed .*pip install "trl-stagekit\[metrics\]"'):
        rouge(["a"], ["a"])
