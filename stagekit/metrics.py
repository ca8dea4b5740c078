"""Metrics of texts: token F1, BLEU, ROUGE-L, and how often one model's answers are preferred to another's."""

import importlib
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from stagekit.errors import ConfigError


References = Sequence[str] | Sequence[Sequence[str]]
"""One reference for each prediction, or a list of them."""

Judge = Callable[[Sequence[Any], Sequence[str], Sequence[str]], Sequence[float]]
"""`judge(prompts, first, second)` says of each prompt (a text, or a conversation) how far the first answer is
preferred: 1 wins, 0.5 is a tie, 0 loses."""


class WinRate(NamedTuple):
    """How often the answers of one model are preferred to those of another."""

    win_rate: float
    """Share of wins, a tie counting half; 0.5 between equals."""
    agreement: float
    """Share of prompts on which the judge said the same in both orders. Low: it judges the position."""
    prompts: int
    """How many prompts were judged."""


def token_f1(predictions: Sequence[str], references: References) -> float:
    """Mean F1 (0 to 1) of the words that prediction and reference share; the best reference of several counts.

    Words are lower-cased, without ASCII punctuation and the articles a, an, the. Two texts without words agree; one
    without shares nothing. Texts that put no spaces between words (Chinese, Japanese) need another metric.

    Source: huggingface.co/papers/1606.05250, section 6.1.
    """
    several = _lists(predictions, references)
    scores = [max(_f1(text, one) for one in many) for text, many in zip(predictions, several, strict=True)]
    return sum(scores) / len(scores)


def bleu(predictions: Sequence[str], references: References) -> float:
    """BLEU of the whole set with sacrebleu's defaults (13a tokens, exponential smoothing), 0 to 100.

    Raises:
        ConfigError: sacrebleu is not installed, or the texts do not pair up.

    Source: huggingface.co/papers/1804.08771.
    """
    several = _lists(predictions, references)
    sacrebleu = _library("sacrebleu", "sacrebleu")
    width = max(len(many) for many in several)
    streams = [[many[place] if place < len(many) else None for many in several] for place in range(width)]
    return float(sacrebleu.corpus_bleu(list(predictions), streams).score)


def rouge(predictions: Sequence[str], references: References, stemmer: bool = False) -> float:
    """Mean ROUGE-L F-measure (0 to 1) with rouge-score; the best reference of several counts.

    Its words are ASCII letters and digits only, so for other scripts it is 0.

    Args:
        predictions: The texts.
        references: What they are held against.
        stemmer: Whether words are cut to their stems (English); summarisation papers differ.

    Raises:
        ConfigError: rouge-score is not installed, or the texts do not pair up.

    Source: aclanthology.org/W04-1013.
    """
    several = _lists(predictions, references)
    scorer = _library("rouge_score.rouge_scorer", "rouge-score").RougeScorer(["rougeL"], use_stemmer=stemmer)
    scores = [
        max(float(scorer.score(one, text)["rougeL"].fmeasure) for one in many)
        for text, many in zip(predictions, several, strict=True)
    ]
    return sum(scores) / len(scores)


def win_rate(judge: Judge, prompts: Sequence[Any], candidates: Sequence[str], baselines: Sequence[str]) -> WinRate:
    """How often `candidates` are preferred to `baselines`, each pair judged in both orders.

    Judges prefer a position; a judge that always takes the first answer gives 0.5 and an agreement of 0.

    Raises:
        ConfigError: the texts do not pair up, or a verdict is no number from 0 to 1.
    """
    if not prompts or not len(prompts) == len(candidates) == len(baselines):
        raise ConfigError(
            f"{len(prompts)} prompts, {len(candidates)} candidates and {len(baselines)} baselines; "
            "each prompt needs one of both"
        )
    ahead = _verdicts(judge, prompts, candidates, baselines)
    behind = [1.0 - verdict for verdict in _verdicts(judge, prompts, baselines, candidates)]
    both = list(zip(ahead, behind, strict=True))
    agreement = sum(_side(one) == _side(other) for one, other in both) / len(both)
    return WinRate(sum(one + other for one, other in both) / (2 * len(both)), agreement, len(both))


def _verdicts(judge: Judge, prompts: Sequence[Any], first: Sequence[str], second: Sequence[str]) -> list[float]:
    verdicts = list(judge(prompts, first, second))
    if len(verdicts) != len(prompts):
        raise ConfigError(f"the judge gave {len(verdicts)} verdicts on {len(prompts)} prompts")
    for verdict in verdicts:
        if isinstance(verdict, str) or verdict is None or not 0 <= verdict <= 1:
            raise ConfigError(
                f"the judge said {verdict!r}; a verdict is 1 (the first wins), 0.5 (a tie), 0, or between"
            )
    return [float(verdict) for verdict in verdicts]


def _side(verdict: float) -> int:
    return (verdict > 0.5) - (verdict < 0.5)


def _lists(predictions: Sequence[str], references: References) -> list[list[str]]:
    """A list of references for each prediction."""
    if not predictions or len(predictions) != len(references):
        raise ConfigError(f"{len(predictions)} predictions and {len(references)} references; each needs its own")
    several = [[one] if isinstance(one, str) else list(one) for one in references]
    if not all(several):
        raise ConfigError(f"prediction {several.index([])} has no reference")
    return several


def _library(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f'{package} is not installed ({error.name} is missing); run pip install "trl-stagekit[metrics]"'
        ) from error


def _f1(prediction: str, reference: str) -> float:
    has, wanted = _words(prediction), _words(reference)
    if not has or not wanted:
        return float(has == wanted)
    shared = (Counter(has) & Counter(wanted)).total()
    return 2 * shared / (len(has) + len(wanted))


_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _words(text: str) -> list[str]:
    return re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_PUNCTUATION)).split()
