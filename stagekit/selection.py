"""Which of several scored answers are kept: best per prompt, with every answer that is not kept counted. All pure.

An answer is valid when it ended by itself, says something, has a reward, and is the first of its text among the
answers to its prompt. Texts stay as they were sampled, white space included, so that what is learnt is what was drawn.
Rewards are compared, never normalised.

Source: best-of-n as in https://huggingface.co/papers/2304.06767, algorithm 1, per prompt.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from stagekit.errors import ConfigError, StageError
from stagekit.requests import FinishReason, Message


@dataclass(frozen=True)
class Candidate:
    """One sampled answer. `reward` None: it was not scored (empty, cut), or the scorer could not read it whole."""

    key: str
    text: str
    finish_reason: FinishReason = "stop"
    reward: float | None = None


@dataclass(frozen=True)
class Ranked:
    """A valid answer: `index` among its prompt's samples, `copies` how many samples said just this."""

    candidate: Candidate
    reward: float
    index: int
    copies: int


@dataclass(frozen=True)
class Selection:
    """What became of one prompt's answers: samples = kept + the sum of `drops`.

    Attributes:
        kept: at most top_k, each above min_reward, best first.
        valid: all that are valid, best first; equal rewards in the order of sampling.
        drops: `error`, `empty`, `truncated`, `no_reward`, `duplicate`, `below_min_reward`, `outranked` -> samples.
    """

    kept: tuple[Ranked, ...]
    valid: tuple[Ranked, ...]
    drops: Counter[str]

    @property
    def tied(self) -> bool:
        """Whether several answers are valid and the reward tells none of them apart."""
        return len(self.valid) > 1 and self.valid[0].reward == self.valid[-1].reward


@dataclass(frozen=True)
class Group:
    """A prompt with its sampled answers. `drop` says why there are none: `too_long`."""

    messages: tuple[Message, ...]
    candidates: tuple[Candidate, ...]
    drop: str | None = None


def select(candidates: Sequence[Candidate], *, top_k: int = 1, min_reward: float | None = 0.0) -> Selection:
    """Keep the best answers to one prompt.

    Args:
        candidates: in the order of sampling.
        top_k: most answers kept.
        min_reward: a kept answer's reward is strictly above it; None: no threshold.

    Raises:
        ConfigError: top_k is below 1.
        StageError: a reward is no finite number; the message has the answer.
    """
    if top_k < 1:
        raise ConfigError(f"top_k is {top_k}; at least one answer must be kept")
    drops: Counter[str] = Counter()
    first: dict[str, tuple[int, Candidate, float]] = {}
    copies: Counter[str] = Counter()
    for index, candidate in enumerate(candidates):
        text, reward = candidate.text, _finite(candidate)
        reason = _invalid(candidate)
        if reason is not None or reward is None:
            drops[reason or "no_reward"] += 1
            continue
        copies[text] += 1
        if text in first:
            drops["duplicate"] += 1
        else:
            first[text] = (index, candidate, reward)
    ranked = [Ranked(candidate, reward, index, copies[text]) for text, (index, candidate, reward) in first.items()]
    valid = tuple(sorted(ranked, key=lambda one: (-one.reward, one.index)))
    above = [one for one in valid if min_reward is None or one.reward > min_reward]
    drops["below_min_reward"] += len(valid) - len(above)
    drops["outranked"] += len(above[top_k:])
    return Selection(tuple(above[:top_k]), valid, +drops)


def sft_rows(groups: Sequence[Group], selections: Sequence[Selection]) -> list[dict[str, Any]]:
    """`selected_rows`, of which there must be some.

    Raises:
        StageError: nothing was kept; the message has the reasons and the quantiles of the rewards.
    """
    rows = selected_rows(groups, selections)
    if not rows:
        raise _nothing_kept(groups, selections)
    return rows


def selected_rows(groups: Sequence[Group], selections: Sequence[Selection]) -> list[dict[str, Any]]:
    """Rows to fine-tune on, one per kept answer: `prompt`, `completion`, `reward`, `rank` (1 is the best), `n_valid`,
    `copies`, `key`."""
    return [
        {
            "prompt": list(group.messages),
            "completion": _answer(one),
            "reward": one.reward,
            "rank": rank,
            "n_valid": len(selection.valid),
            "copies": one.copies,
            "key": one.candidate.key,
        }
        for group, selection in zip(groups, selections, strict=True)
        for rank, one in enumerate(selection.kept, start=1)
    ]


def preference_rows(groups: Sequence[Group], selections: Sequence[Selection]) -> list[dict[str, Any]]:
    """Pairs of the best and the worst valid answer to a prompt, where the reward tells them apart: `prompt`,
    `chosen`, `rejected`, `chosen_reward`, `rejected_reward`, `key`. The threshold plays no part."""
    return [
        {
            "prompt": list(group.messages),
            "chosen": _answer(selection.valid[0]),
            "rejected": _answer(selection.valid[-1]),
            "chosen_reward": selection.valid[0].reward,
            "rejected_reward": selection.valid[-1].reward,
            "key": selection.valid[0].candidate.key,
        }
        for group, selection in zip(groups, selections, strict=True)
        if selection.valid and selection.valid[0].reward > selection.valid[-1].reward
    ]


def scored_rows(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Every prompt that was answered, with all its answers in the order of sampling: `prompt`, `candidates`,
    `rewards`, `finish_reasons`, `keys`."""
    return [
        {
            "prompt": list(group.messages),
            "candidates": [one.text for one in group.candidates],
            "rewards": [one.reward for one in group.candidates],
            "finish_reasons": [one.finish_reason for one in group.candidates],
            "keys": [one.key for one in group.candidates],
        }
        for group in groups
        if group.drop is None
    ]


def drops(groups: Sequence[Group], selections: Sequence[Selection]) -> dict[str, int]:
    """What gave no row, by reason. Sampled answers = kept + the sum of `answers.*`; prompts = prompts with a row + the
    sum of `prompts.*`."""
    counts: Counter[str] = Counter()
    for group, selection in zip(groups, selections, strict=True):
        counts.update({f"answers.{reason}": count for reason, count in selection.drops.items()})
        if not selection.kept:
            counts[f"prompts.{group.drop or 'nothing_kept'}"] += 1
    return dict(counts)


def metrics(selections: Sequence[Selection]) -> dict[str, float]:
    """Mean rewards of the samples, of the best of k, and of what was kept; shares of ties and of what was kept.

    The means are over prompts with a valid answer. `reward/best_of_k` is the expectation over draws of k of the
    prompt's valid answers, copies counted, without replacement; prompts with fewer than k take no part in it.
    """
    found: dict[str, float] = {}
    samples = [_with_copies(selection) for selection in selections if selection.valid]
    if not samples:
        return found
    found["reward/mean"] = fmean(fmean(rewards) for rewards in samples)
    k, most = 1, max(map(len, samples))
    while k <= most:
        enough = [rewards for rewards in samples if len(rewards) >= k]
        found[f"reward/best_of_{k}"] = fmean(expected_best(rewards, k) for rewards in enough)
        k = most if k < most < 2 * k else 2 * k
    kept = [one.reward for selection in selections for one in selection.kept]
    if kept:
        found["reward/kept"] = fmean(kept)
    valid = sum(len(selection.valid) for selection in selections)
    found["kept_share"] = len(kept) / valid
    found["tied"] = fmean(selection.tied for selection in selections)
    return found


def expected_best(rewards: Sequence[float], k: int) -> float:
    """The expected maximum of k of the n `rewards`, drawn without replacement: an unbiased estimate of best-of-k.

    With r_1 <= ... <= r_n it is sum_i C(i - 1, k - 1) / C(n, k) r_i.

    Source: the estimator of pass@k in https://huggingface.co/papers/2107.03374, equation 1, for rewards.
    """
    n = len(rewards)
    if not 1 <= k <= n:
        raise ConfigError(f"the best of {k} of {n} rewards is not defined")
    ways = math.comb(n, k)
    return math.fsum(math.comb(place, k - 1) / ways * reward for place, reward in enumerate(sorted(rewards)))


def quantiles(rewards: Sequence[float]) -> dict[str, float]:
    """Smallest, quartiles and largest, as they stand in the message when nothing is kept."""
    ordered = sorted(rewards)
    places = {"min": 0.0, "25 %": 0.25, "median": 0.5, "75 %": 0.75, "max": 1.0}
    return {name: ordered[round(place * (len(ordered) - 1))] for name, place in places.items()} if ordered else {}


def _with_copies(selection: Selection) -> list[float]:
    """The rewards of the valid samples, repeated texts as often as they were sampled."""
    return [one.reward for one in selection.valid for _ in range(one.copies)]


def _finite(candidate: Candidate) -> float | None:
    reward = candidate.reward
    if reward is not None and not math.isfinite(reward):
        raise StageError(
            f"the reward of answer {candidate.key} is {reward}, no finite number; the answer is {candidate.text!r}. "
            "A reward that does not apply to an answer is None"
        )
    return reward


def _invalid(candidate: Candidate) -> str | None:
    """Why an answer could not be learnt from, whatever its reward. A cut one would be learnt with an EOS."""
    if candidate.finish_reason == "error":
        return "error"
    if not candidate.text.strip():
        return "empty"
    return "truncated" if candidate.finish_reason == "length" else None


def _answer(one: Ranked) -> list[Message]:
    return [{"role": "assistant", "content": one.candidate.text}]


def _nothing_kept(groups: Sequence[Group], selections: Sequence[Selection]) -> StageError:
    counts: Mapping[str, int] = drops(groups, selections)
    reasons = ", ".join(f"{reason}: {count}" for reason, count in counts.items()) or "no prompts"
    rewards = [one.reward for selection in selections for one in selection.valid]
    spread = ", ".join(f"{name} {value:.4g}" for name, value in quantiles(rewards).items()) or "there are none"
    return StageError(
        f"no answer was kept ({reasons}); rewards of the valid answers: {spread}. Lower min_reward (null keeps the "
        "best whatever it is worth: the zero of a preference model's reward means nothing) if they are below it; "
        "raise max_new_tokens if they are truncated; shorten the prompts if they are too_long"
    )
