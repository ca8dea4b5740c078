"""AI feedback's data: from pairs of responses and what a judge says of them to preferences. All pure.

A pair is left out where one of its responses is empty, was cut, or failed, where both say the same, where the judge
could not decide, and where it hardly prefers one: |p - 1/2| below the margin. Every pair that is left out is counted.

Source: https://huggingface.co/papers/2212.08073, section 4.1: the probabilities are the labels, and those behind a
chain of thought are clamped.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from stagekit.counters import digest_of
from stagekit.errors import ConfigError, Problem, StageError
from stagekit.requests import Message
from stagekit.selection import Candidate, Group
from stagekit.trainers.comparisons import Pair, Verdict
from stagekit.trainers.conversations import NO_ANSWER, answer_in, turns_in, unanswerable


KNOWN_BY_NAME = ("chosen", "rejected")
"""Columns whose names say which response is the better one."""


@dataclass(frozen=True)
class Responses:
    """A conversation with two responses. `drop`: why they are not judged. `truth`: how far the first is known to be
    the better one (1, 0), None where it is not known. `keys` find them in the journal."""

    messages: tuple[Message, ...]
    first: str
    second: str
    drop: str | None = None
    truth: float | None = None
    keys: tuple[str, ...] = ()

    @property
    def pair(self) -> Pair:
        """What is judged."""
        return Pair(self.messages, self.first, self.second)


@dataclass(frozen=True)
class Label:
    """Two responses with what the judge said. `probability`: that the first is the better one, as it is learnt."""

    responses: Responses
    verdict: Verdict | None = None
    probability: float | None = None
    drop: str | None = None


def responses_of(groups: Sequence[Group]) -> list[Responses]:
    """The two sampled answers to every prompt."""
    found = []
    for group in groups:
        if group.drop is not None or len(group.candidates) < 2:
            found.append(Responses(group.messages, "", "", group.drop or "too_long"))
            continue
        one, other = group.candidates[:2]
        drop = _unusable(one) or _unusable(other) or _equal(one.text, other.text)
        found.append(Responses(group.messages, one.text, other.text, drop, keys=(one.key, other.key)))
    return found


def responses_from(
    rows: Iterable[Mapping[str, Any]],
    columns: Sequence[str],
    truth: str | None = None,
    where: str = "train_dataset",
) -> list[Responses]:
    """The two responses that stand in the data.

    Args:
        columns: names of the two columns; each holds a text, or a conversation of one assistant turn.
        truth: name of the column that says which is better: 0 the first, 1 the second, None not known. Where the
            columns are `chosen` and `rejected` it is known.

    Raises:
        ConfigError: with every row that has no prompt, no response, or no or another truth.
    """
    found: list[Responses] = []
    problems: list[Problem] = []
    for place, row in enumerate(rows):
        one, wrong = _response_of(row, columns, truth)
        problems += [Problem(f"{where}: row {place}", what) for what in wrong]
        found += [one] if not wrong else []
    if not found and not problems:
        problems.append(Problem(where, "has no rows"))
    if problems:
        raise ConfigError(problems)
    return found


def _response_of(row: Mapping[str, Any], columns: Sequence[str], truth: str | None) -> tuple[Responses, list[str]]:
    """The two responses of a row, and what is wrong with them."""
    kept = turns_in(row.get("prompt"))
    texts = [answer_in(row.get(column)) for column in columns]
    if truth is not None and truth not in row:
        return Responses(kept, "", ""), [f"has no column {truth!r}, which is to say which response is better"]
    better = row[truth] if truth is not None else 0 if tuple(columns) == KNOWN_BY_NAME else None
    asked = unanswerable(kept)
    wrong = [asked] if asked else []
    for column, text in zip(columns, texts, strict=True):
        wrong += [f"{column} {NO_ANSWER}"] if text is None else []
    if better not in (0, 1, None):
        return Responses(kept, "", ""), [*wrong, f"{truth} is {better!r}; it says which is better: 0, 1, or null"]
    first, second = (text or "" for text in texts)
    drop = "empty" if not first.strip() or not second.strip() else _equal(first, second)
    return Responses(kept, first, second, drop, None if better is None else 1.0 - better), wrong


def labels(
    responses: Sequence[Responses],
    verdicts: Mapping[str, Verdict | None],
    *,
    tie_margin: float = 0.02,
    clamp: tuple[float, float] | None = None,
) -> list[Label]:
    """The labels, one for each pair of responses, in their order.

    Args:
        verdicts: by the id of the pair, of its order here; those of what is dropped are not needed.
        tie_margin: a pair with |p - 1/2| below it is dropped; so is one with p = 1/2.
        clamp: the least and the most that a probability becomes.
    """
    made = []
    for one in responses:
        verdict = verdicts.get(key_of(one.pair)) if one.drop is None else None
        p = verdict.probability if verdict is not None else None
        drop = one.drop
        if drop is None and verdict is None:
            drop = "too_long"
        elif drop is None and p is None:
            drop = "no_choice"
        elif p is not None and (abs(p - 0.5) < tie_margin or p == 0.5):
            drop = "tie"
        kept = p if p is None or clamp is None else min(max(p, clamp[0]), clamp[1])
        made.append(Label(one, verdict, kept, drop))
    return made


def key_of(pair: Pair) -> str:
    """Names a pair in its order."""
    return digest_of(pair.id, pair.first)


def preference_rows(made: Sequence[Label]) -> list[dict[str, Any]]:
    """Rows for dpo and reward: `prompt`, `chosen`, `rejected`, `chosen_prob` (above 1/2; dpo with `soft_labels` reads
    it), `principle`, `key`.

    Raises:
        StageError: no pair is left; the message has the reasons.
    """
    rows = []
    for label in made:
        if label.drop is not None:
            continue
        assert label.verdict is not None and label.probability is not None
        texts = (label.responses.first, label.responses.second)
        chosen, rejected = texts if label.probability > 0.5 else texts[::-1]
        rows.append(
            {
                "prompt": list(label.responses.messages),
                "chosen": _answer(chosen),
                "rejected": _answer(rejected),
                "chosen_prob": max(label.probability, 1 - label.probability),
                "principle": label.verdict.principle,
                "key": label.responses.pair.id,
            }
        )
    if not rows:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in drops(made).items()) or "no prompts"
        raise StageError(
            f"no pair was labelled ({reasons}). Raise max_new_tokens if most are truncated; shorten the prompts if "
            "they are too_long; lower tie_margin, or take a better judge, if they are ties; and if the judge makes "
            "no_choice, ask it so that it answers with one of the two"
        )
    return rows


def label_rows(made: Sequence[Label]) -> list[dict[str, Any]]:
    """Every pair with what became of it: `prompt`, `first`, `second`, `probability` (None: not judged), `forward` and
    `backward` (the two orders), `principle`, `truth`, `drop` (None: it is a preference), `keys`."""
    return [
        {
            "prompt": list(label.responses.messages),
            "first": label.responses.first,
            "second": label.responses.second,
            "probability": label.probability,
            "forward": label.verdict.forward if label.verdict is not None else None,
            "backward": label.verdict.backward if label.verdict is not None else None,
            "principle": label.verdict.principle if label.verdict is not None else None,
            "truth": label.responses.truth,
            "drop": label.drop,
            "keys": list(label.responses.keys),
        }
        for label in made
    ]


def drops(made: Sequence[Label]) -> dict[str, int]:
    """Pairs that are no preference, by reason: `too_long`, `error`, `empty`, `truncated`, `equal`, `no_choice`, `tie`.
    Pairs = preferences + the sum of these."""
    return dict(Counter(label.drop for label in made if label.drop is not None))


def metrics(made: Sequence[Label]) -> dict[str, float]:
    """What the judge is like, over the pairs that it decided on.

    `judge/confidence` is the mean of |2p - 1|; `judge/says_first` the mean probability of the first choice over both
    orders, 1/2 without position bias; `judge/orders_agree` the share with the same winner in both orders; `judge/mass`
    the probability of either choice; `judge/accuracy` the share that is right where that is known (1/2 for p = 1/2);
    `judge/prefers_longer` is of the preferences.
    """
    judged = [(one, one.verdict) for one in made if one.verdict is not None and one.verdict.probability is not None]
    if not judged:
        return {}
    orders = [(float(v.forward or 0.0), float(v.backward or 0.0)) for _, v in judged]
    found = {
        "judge/confidence": fmean(abs(2 * float(v.probability or 0.0) - 1) for _, v in judged),
        "judge/says_first": fmean((forward + backward) / 2 for forward, backward in orders),
        "judge/orders_agree": fmean((forward > 0.5) == (backward < 0.5) for forward, backward in orders),
    }
    masses = [v.mass for _, v in judged if v.mass is not None]
    if masses:
        found["judge/mass"] = fmean(masses)
    right = [hit for one, v in judged if (hit := is_right(one.responses.truth, v.probability)) is not None]
    if right:
        found["judge/accuracy"] = fmean(right)
    longer = [
        (len(one.responses.first) > len(one.responses.second)) == (one.probability > 0.5)
        for one in made
        if one.drop is None and one.probability is not None and len(one.responses.first) != len(one.responses.second)
    ]
    if longer:
        found["judge/prefers_longer"] = fmean(longer)
    return found


def is_right(truth: float | None, p: float | None) -> float | None:
    """1 where a judge prefers the response that is known to be better, 1/2 for none of them; None: not known.

    Args:
        truth: 1 where the first response is the better one, else 0.
        p: the judge's probability of it.
    """
    if truth is None or p is None:
        return None
    return 0.5 if p == 0.5 else float((p > 0.5) == (truth > 0.5))


def by_principle(rows: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """What each principle decided, from `label_rows`: `labels` asked for by it, the share `decided` of them that are
    preferences, and `right`, the share of those whose truth is known."""
    found: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        if row["principle"] is not None:
            found[row["principle"]].append(row)
    table: dict[str, dict[str, float]] = {}
    for name, ones in sorted(found.items()):
        table[name] = {"labels": len(ones), "decided": fmean(one["drop"] is None for one in ones)}
        right = [hit for one in ones if (hit := is_right(one["truth"], one["probability"])) is not None]
        if right:
            table[name]["right"] = fmean(right)
    return table


def _unusable(candidate: Candidate) -> str | None:
    if candidate.finish_reason == "error":
        return "error"
    if not candidate.text.strip():
        return "empty"
    return "truncated" if candidate.finish_reason == "length" else None


def _equal(one: str, other: str) -> str | None:
    return "equal" if one.strip() == other.strip() else None


def _answer(text: str) -> list[Message]:
    return [{"role": "assistant", "content": text}]
