"""Self-play's data: pairs of the data's answer, preferred, and the model's own. All pure.

Each sampled answer y' to a prompt x with the data's answer y makes one pair. Repeated y' make repeated pairs: they
carry the opponent's probabilities.

Source: https://huggingface.co/papers/2401.01335, algorithm 1.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from stagekit.errors import ConfigError, Problem, StageError
from stagekit.requests import Message
from stagekit.selection import Candidate, Group
from stagekit.trainers.conversations import NO_ANSWER, answer_in


MANY_TRUNCATED = 0.3
"""Share of cut answers above which the opponent is not the model any more, but its short answers."""

OVERTRAINED = 1e-2
"""Learning rate * steps (ten times that for an adapter) above which beta < 1/2 is near the optimum that it overshoots.
The paper's iterations have about 1e-3."""


def real_answers(rows: Iterable[Mapping[str, Any]], where: str = "train_dataset") -> list[str]:
    """The data's answers: `completion`, a text or a conversation of one assistant turn.

    Raises:
        ConfigError: with every row that has none.
    """
    answers, problems = [], []
    for position, row in enumerate(rows):
        answer = answer_in(row.get("completion"))
        if answer is None or not answer.strip():
            problems.append(Problem(f"{where}: row {position}", f"completion {NO_ANSWER}"))
            continue
        answers.append(answer)
    if problems:
        raise ConfigError(problems)
    return answers


def pairs(groups: Sequence[Group], answers: Sequence[str], iteration: int = 1) -> list[dict[str, Any]]:
    """Pairs: `prompt`, `chosen` (the data's answer), `rejected` (a sampled one), `iteration`, `sample`, `key`.

    Left out is what `drops` counts. An empty answer stays where the model really ended at once.

    Args:
        groups: the sampled answers, one group per row of data.
        answers: the data's answers, in the same order.

    Raises:
        StageError: no pair is left; the message has the reasons.
    """
    rows = [
        {
            "prompt": list(group.messages),
            "chosen": _turn(answer),
            "rejected": _turn(candidate.text),
            "iteration": iteration,
            "sample": number,
            "key": candidate.key,
        }
        for group, answer in zip(groups, answers, strict=True)
        for number, candidate in enumerate(group.candidates)
        if _drop(candidate, answer) is None
    ]
    if not rows:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in drops(groups, answers).items()) or "no prompts"
        raise StageError(
            f"self-play left no pair ({reasons}). Raise max_new_tokens if most are truncated; shorten the prompts if "
            "they are too_long; if they are equal the model gives the data's answers already, and there is nothing to "
            "learn"
        )
    return rows


def drops(groups: Sequence[Group], answers: Sequence[str]) -> dict[str, int]:
    """Sampled answers that make no pair, by reason: `answers.truncated` (learnt as rejected, it would teach that the
    end is wrong), `answers.equal` (its gradient is zero), `answers.error`; and `prompts.too_long`.

    Sampled answers = pairs + the sum of `answers.*`.
    """
    counts: Counter[str] = Counter()
    for group, answer in zip(groups, answers, strict=True):
        counts.update(["prompts.too_long"] if group.drop else [])
        counts.update(f"answers.{why}" for one in group.candidates if (why := _drop(one, answer)))
    return dict(counts)


def metrics(groups: Sequence[Group], answers: Sequence[str]) -> dict[str, float]:
    """Shares of the sampled answers: `truncated`, `equal` to the data's."""
    samples = sum(len(group.candidates) for group in groups)
    counts = drops(groups, answers)
    shares = {name: counts.get(f"answers.{name}", 0) for name in ("truncated", "equal")}
    return {name: count / samples for name, count in shares.items()} if samples else {}


def overtrained(beta: float, learning_rate: float, steps: int, adapter: bool) -> bool:
    """Whether an iteration may come near the optimum of a beta below 1/2, which lies beyond the data.

    Trained to its optimum an iteration multiplies log(p / p_data) by 1 - 1 / beta: below beta = 1/2 it diverges, and
    what keeps the usual 0.1 stable is that it is far from trained to its optimum.
    """
    return beta < 0.5 and learning_rate * steps > OVERTRAINED * (10 if adapter else 1)


def contraction(beta: float) -> float:
    """1 - 1 / beta: what one iteration, trained to its optimum, multiplies log(p / p_data) by."""
    return 1 - 1 / beta


def optimum(p: Sequence[float], data: Sequence[float], beta: float) -> list[float]:
    """The distribution that an iteration from `p` ends at with enough capacity: p (data / p)^(1/beta), normalised.

    Source: https://huggingface.co/papers/2401.01335, theorem 5.4.
    """
    weights = [share * math.pow(real / share, 1 / beta) for share, real in zip(p, data, strict=True)]
    return [weight / math.fsum(weights) for weight in weights]


def _drop(candidate: Candidate, answer: str) -> str | None:
    if candidate.finish_reason == "error":
        return "error"
    if candidate.finish_reason == "length":
        return "truncated"
    return "equal" if candidate.text == answer else None


def _turn(text: str) -> list[Message]:
    return [{"role": "assistant", "content": text}]
