"""Self-rewarding's data: a model judges its own answers, and the best of each prompt makes a pair with the worst.

A judge either writes a score for each answer, several times, whose mean counts; or it compares the answers to a prompt
two by two, in both orders, and an answer's score is the mean probability that it beats another one.

Source: https://huggingface.co/papers/2401.10020, section 2.2.
"""

import dataclasses
import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from stagekit.choices import Chooser
from stagekit.counters import digest_of
from stagekit.errors import StageError
from stagekit.journal import Journal
from stagekit.requests import Generator, Message
from stagekit.selection import Candidate, Group, Ranked, select
from stagekit.templates import SCORING, as_text, filled
from stagekit.trainers.comparisons import Asking, Pair, compare
from stagekit.trainers.feedback import key_of, responses_from
from stagekit.writer import Ask, Progress, Writer


_SCORE = re.compile(r"\bscore\b\W{0,6}?(-?\d+(?:\.\d+)?)", re.IGNORECASE)
_NUMBER = re.compile(r"\s*(-?\d+(?:\.\d+)?)\s*(?:/\s*\d+)?[.\s]*")


@dataclass(frozen=True)
class Scoring:
    """How scores are asked for: `template` with the fields of `templates.SCORING_FIELDS`, `judgements` times for each
    answer, from 0 to `max_score`, in at most `max_new_tokens`."""

    template: str = SCORING
    max_score: int = 5
    judgements: int = 3
    max_new_tokens: int = 256

    @property
    def digest(self) -> str:
        """Names all that decides what a judge is asked."""
        return digest_of(self.template, self.max_score, self.judgements, self.max_new_tokens)


def parse_score(text: str, max_score: float) -> float | None:
    """The last "Score: x" of a judgement, or the number that is all of it; None where there is none from 0 to
    `max_score`."""
    found = _SCORE.findall(text)
    alone = _NUMBER.fullmatch(text)
    if not found and alone is None:
        return None
    score = float(found[-1]) if found else float(alone.group(1)) if alone is not None else -1.0
    return score if 0 <= score <= max_score else None


def held_out_groups(rows: Iterable[Mapping[str, Any]], where: str) -> list[Group]:
    """Pairs of which it is known what is better, each as a prompt with two answers: the first is the better one.

    Raises:
        ConfigError: with every row that has no prompt, no chosen or no rejected answer.
    """
    return [
        Group(one.messages, (Candidate(f"{place}-chosen", one.first), Candidate(f"{place}-rejected", one.second)))
        for place, one in enumerate(responses_from(rows, ("chosen", "rejected"), None, where))
    ]


def rate_digest(
    groups: Sequence[Group],
    *,
    judge: Generator,
    scoring: Scoring,
    seed: int,
    batch_tokens: int,
) -> str:
    """The digest to open the journal of `rate` under."""
    asked = sorted({digest_of(list(messages), text) for messages, text in _answers(groups)})
    return digest_of("scores", asked, judge.fingerprint, scoring.digest, seed, batch_tokens)


def rate(
    groups: Sequence[Group],
    *,
    judge: Generator | None,
    scoring: Scoring,
    seed: int,
    journal: Journal,
    batch_tokens: int,
    iteration: int = 1,
    stage: str = "self_rewarding",
    on_batch: Callable[[Progress], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> list[Group]:
    """The groups with the mean score of each answer as its reward; None where no judgement had a score. A text that
    stands several times in a group is judged as if it stood once.

    Args:
        judge: writes the judgements; None: only what the journal holds.
        journal: opened under `rate_digest` of the same arguments. Judgements that it holds are not written again.

    Raises:
        StageError: the journal is another plan's.
        Interrupted: `should_stop` said so.
    """
    asks: dict[tuple[str, str], list[Ask]] = {}
    for messages, text in _answers(groups):
        name = (digest_of(list(messages)), text)
        if name not in asks:
            asks[name] = _asks(messages, text, scoring, iteration)
    writer = Writer(journal, stage, seed, batch_tokens, on_batch, should_stop)
    everything = [ask for ones in asks.values() for ask in ones]
    records = writer.write(everything, "judgement", iteration, judge, scoring.max_new_tokens)
    scores: dict[tuple[str, str], float | None] = {}
    for name, ones in asks.items():
        texts = [records[ask.key]["text"] for ask in ones if ask.key in records]
        found = [score for text in texts if (score := parse_score(text, scoring.max_score)) is not None]
        scores[name] = fmean(found) if found else None
    return [_rewarded(group, lambda text, name: scores.get((name, text))) for group in groups]


def compared_pairs(groups: Sequence[Group]) -> list[Pair]:
    """Every two different answers to a prompt."""
    by_prompt: dict[int, list[str]] = defaultdict(list)
    for place, group in enumerate(groups):
        by_prompt[place] = list(dict.fromkeys(one.text for one in group.candidates if _is_answer(one)))
    return [
        Pair(groups[place].messages, first, second)
        for place, texts in by_prompt.items()
        for first, second in itertools.combinations(texts, 2)
    ]


def rate_by_comparison(
    groups: Sequence[Group], *, judge: Chooser | None, asking: Asking, stage: str = "self_rewarding", **how: Any
) -> list[Group]:
    """The groups with the mean probability that an answer beats another one to its prompt; None where there is no
    other one, or none that could be decided.

    Args:
        judge: None: only what the journal holds.
        how: the other arguments of `compare`; its journal is opened under `verdicts_digest` of `compared_pairs`.
    """
    two_by_two = compared_pairs(groups)
    verdicts = compare(two_by_two, judge=judge, asking=asking, stage=stage, **how)
    decided = {key_of(pair): (pair, verdict) for pair, verdict in zip(two_by_two, verdicts, strict=True)}
    won: dict[tuple[str, str], list[float]] = defaultdict(list)
    for pair, verdict in decided.values():
        p = verdict.probability if verdict is not None else None
        if p is not None:
            name = digest_of(list(pair.messages))
            won[name, pair.first].append(p)
            won[name, pair.second].append(1 - p)
    means = {name: fmean(ones) for name, ones in won.items()}
    return [_rewarded(group, lambda text, name: means.get((name, text))) for group in groups]


def pairs(groups: Sequence[Group], tie_margin: float = 0.0) -> list[dict[str, Any]]:
    """Pairs of the best and the worst answer to a prompt: `prompt`, `chosen`, `rejected`, `chosen_score`,
    `rejected_score`, `key`; where their scores differ by more than `tie_margin`.

    Raises:
        StageError: no pair is left; the message has the reasons.
    """
    rows = []
    for group in groups:
        ends = _ends(group, tie_margin)
        if isinstance(ends, str):
            continue
        best, worst = ends
        rows.append(
            {
                "prompt": list(group.messages),
                "chosen": _turn(best.candidate.text),
                "rejected": _turn(worst.candidate.text),
                "chosen_score": best.reward,
                "rejected_score": worst.reward,
                "key": best.candidate.key,
            }
        )
    if not rows:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in drops(groups, tie_margin).items())
        raise StageError(
            f"no prompt has an answer that the judge finds better than another ({reasons or 'no prompts'}). Raise "
            "max_new_tokens if answers are truncated; sample more of them, or hotter, if they are duplicates; and if "
            "they have no_reward, the judge's replies have no score: raise max_judgement_tokens, or ask it otherwise"
        )
    return rows


def drops(groups: Sequence[Group], tie_margin: float = 0.0) -> dict[str, int]:
    """Why prompts make no pair: `prompts.too_long`, `prompts.too_few` (valid answers), `prompts.tied`; prompts = pairs
    + the sum of these. And answers that could not be in one: `answers.error`, `.empty`, `.truncated`, `.duplicate`,
    `.no_reward` (the judge gave no score)."""
    counts: Counter[str] = Counter()
    for group in groups:
        ends = _ends(group, tie_margin)
        counts.update([f"prompts.{ends}"] if isinstance(ends, str) else [])
        lost = select(group.candidates, min_reward=None).drops
        counts.update({f"answers.{reason}": count for reason, count in lost.items() if reason != "outranked"})
    return dict(counts)


def metrics(groups: Sequence[Group], tie_margin: float = 0.0) -> dict[str, float]:
    """The mean `score/mean` of the answers, `score/chosen` and `score/rejected` of the pairs, and `length_ratio`, the
    characters of the chosen answers by those of the rejected ones: above 1 the judge likes long answers."""
    scores = [one.reward for group in groups for one in select(group.candidates, min_reward=None).valid]
    ends = [both for group in groups if not isinstance(both := _ends(group, tie_margin), str)]
    found: dict[str, float] = {"score/mean": fmean(scores)} if scores else {}
    if ends:
        found["score/chosen"] = fmean(best.reward for best, _ in ends)
        found["score/rejected"] = fmean(worst.reward for _, worst in ends)
        rejected = sum(len(worst.candidate.text) for _, worst in ends)
        found["length_ratio"] = sum(len(best.candidate.text) for best, _ in ends) / max(rejected, 1)
    return found


def accuracy(groups: Sequence[Group]) -> dict[str, float]:
    """What the judge is worth on pairs of which the first answer is the better one: `judge/accuracy`, 1/2 for equal
    scores, over those with two scores, and `judge/decided`, the share of these."""
    rewards = [tuple(one.reward for one in group.candidates) for group in groups]
    known = [(first, second) for first, second in rewards if first is not None and second is not None]
    found = {"judge/decided": len(known) / len(groups)} if groups else {}
    if known:
        found["judge/accuracy"] = fmean(0.5 if first == second else float(first > second) for first, second in known)
    return found


def _ends(group: Group, tie_margin: float) -> tuple[Ranked, Ranked] | str:
    """The best and the worst answer, or why there are none."""
    if group.drop is not None:
        return group.drop
    valid = select(group.candidates, min_reward=None).valid
    if len(valid) < 2:
        return "too_few"
    best, worst = valid[0], valid[-1]
    return "tied" if best.reward - worst.reward <= tie_margin else (best, worst)


def _asks(messages: Sequence[Message], text: str, scoring: Scoring, iteration: int) -> list[Ask]:
    """The judgements of one answer. Their keys stand together, so they share a batch."""
    asked = filled(scoring.template, conversation=as_text(messages), response=text, max_score=scoring.max_score)
    turns = (_user(asked),)
    prompt_id, name = digest_of(list(messages)), digest_of("judgement", list(turns))[:32]
    return [
        Ask(
            f"{name}-{number:04d}",
            turns,
            {"role": "judgement", "round": iteration, "prompt_id": prompt_id, "sample": number, "request": asked},
        )
        for number in range(scoring.judgements)
    ]


def _answers(groups: Sequence[Group]) -> Iterable[tuple[tuple[Message, ...], str]]:
    return ((group.messages, one.text) for group in groups for one in group.candidates if _is_answer(one))


def _is_answer(candidate: Candidate) -> bool:
    return candidate.finish_reason == "stop" and bool(candidate.text.strip())


def _rewarded(group: Group, score: Callable[[str, str], float | None]) -> Group:
    name = digest_of(list(group.messages))
    scored = tuple(
        dataclasses.replace(one, reward=score(one.text, name) if _is_answer(one) else None) for one in group.candidates
    )
    return dataclasses.replace(group, candidates=scored)


def _turn(text: str) -> list[Message]:
    return [{"role": "assistant", "content": text}]


def _user(text: str) -> Message:
    return {"role": "user", "content": text}
