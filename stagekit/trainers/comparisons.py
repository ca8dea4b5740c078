"""Pairs of responses judged by a principle, in both orders, journalled and resumable.

The judge sees the conversation, a principle, and the responses as (A) and (B); the probability that it says A next is
p_AB, and p_BA where the two have changed places. The first response is the better one with probability

    p = 1/2 (p_AB + 1 - p_BA)

which is 1/2 for a judge that goes by the place alone. Which principle decides a pair depends on the seed, the
conversation and the two texts, not on their order. Pairs change places exactly: with them p becomes 1 - p to the bit.

Source: https://huggingface.co/papers/2212.08073, section 4.1; https://huggingface.co/papers/2309.00267, section 2.1.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stagekit.choices import Chooser, Comparison, Question, facts_of
from stagekit.counters import digest_of, draw
from stagekit.journal import Journal, Record
from stagekit.requests import Generator, Message, plan_batches
from stagekit.shares import share_out
from stagekit.templates import COMPARISON, VERDICT, as_text, filled
from stagekit.writer import Ask, Progress, Writer, is_done


GRID = 2.0**40
"""Differences of probabilities are rounded to 1 / GRID, so that p and 1 - p are both exact."""


@dataclass(frozen=True)
class Asking:
    """How a judge is asked.

    Attributes:
        principles: one of them is drawn for each pair.
        template: with the fields of `templates.COMPARISON_FIELDS`.
        choices: what the judge says for the first and for the second response.
        reasons: the judge writes its reasons first, in at most `max_thought_tokens`; then `verdict` asks for a choice.
    """

    principles: tuple[str, ...]
    template: str = COMPARISON
    choices: tuple[str, str] = ("A", "B")
    reasons: bool = False
    verdict: str = VERDICT
    max_thought_tokens: int = 256

    @property
    def digest(self) -> str:
        """Names all that decides what a judge is asked."""
        thought = [self.verdict, self.max_thought_tokens] if self.reasons else None
        return digest_of(list(self.principles), self.template, list(self.choices), thought)


@dataclass(frozen=True)
class Pair:
    """Two responses to a conversation."""

    messages: tuple[Message, ...]
    first: str
    second: str

    @property
    def id(self) -> str:
        """Names the conversation and the two texts, whichever is the first."""
        return digest_of(list(self.messages), sorted((self.first, self.second)))


@dataclass(frozen=True)
class Verdict:
    """What the judge said of a pair.

    Attributes:
        forward: p_AB, the probability of the first choice where the first response is shown first.
        backward: p_BA, the same where the second response is shown first.
        mass: mean probability that the judge makes one of the two choices; None: not known.
    """

    principle: str
    forward: float | None
    backward: float | None
    mass: float | None = None

    @property
    def probability(self) -> float | None:
        """That the first response is the better one; None where one order was not decided."""
        if self.forward is None or self.backward is None:
            return None
        return 0.5 + round((self.forward - self.backward) / 2 * GRID) / GRID


def verdicts_digest(
    pairs: Sequence[Pair],
    *,
    judge: Chooser,
    asking: Asking,
    thinker: Generator | None = None,
    seed: int,
    batch_tokens: int,
) -> str:
    """The digest to open the journal under: all that decides what `compare` finds. The order of the pairs, and that
    within a pair, play no part."""
    names = [judge.fingerprint, thinker.fingerprint if thinker is not None and asking.reasons else None]
    return digest_of("verdicts", sorted({pair.id for pair in pairs}), names, asking.digest, seed, batch_tokens)


def compare(
    pairs: Sequence[Pair],
    *,
    judge: Chooser | None,
    asking: Asking,
    thinker: Generator | None = None,
    seed: int,
    journal: Journal,
    batch_tokens: int,
    iteration: int = 1,
    stage: str = "ai_feedback",
    on_batch: Callable[[Progress], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> list[Verdict | None]:
    """What the judge says of every pair, in their order; None where the question is too long for it. A pair that
    stands several times is judged once.

    Args:
        judge: None: only what the journal holds, to audit it or to rebuild its rows without a model.
        thinker: writes the reasons where `asking.reasons`; the judge's own model.
        journal: opened under `verdicts_digest` of the same arguments. What it holds is not asked again.
        iteration: stands in the records.
        on_batch: called after each batch that was asked.
        should_stop: asked before each batch.

    Raises:
        StageError: the journal is another plan's, or the judge failed.
        Interrupted: `should_stop` said so, with all batches so far in the journal.
    """
    writer = Writer(journal, stage, seed, batch_tokens, on_batch, should_stop)
    orders = {order.name: order for pair in pairs for order in _orders(pair, asking, seed)}
    thoughts = _thoughts(orders, asking, writer, thinker, iteration) if asking.reasons else {}
    questions: dict[str, Question] = {}
    facts: dict[str, Mapping[str, Any]] = {}
    keys: dict[str, str] = {}
    for name, order in orders.items():
        if asking.reasons and name not in thoughts:
            continue  # the reasons did not fit
        said = thoughts[name] if asking.reasons else None
        messages = order.asked if said is None else (*order.asked, _turn("assistant", said), _ask_for(asking))
        key = digest_of("judgement", list(messages))
        keys[name] = key
        questions[key] = Question(key, messages, 1, choices=asking.choices, comparison=order.comparison)
        facts[key] = {"role": "judgement", "round": iteration, **order.facts}
    _judge(questions, facts, judge, writer, iteration)
    return [_verdict(pair, asking, seed, keys, journal) for pair in pairs]


@dataclass(frozen=True)
class _Order:
    """A pair as it is shown once."""

    name: str
    comparison: Comparison
    asked: tuple[Message, ...]
    facts: Mapping[str, Any]


def _orders(pair: Pair, asking: Asking, seed: int) -> Iterator[_Order]:
    """The pair as it is, and with its responses in each other's place."""
    principle = _principle(pair, asking, seed)
    for first, second in ((pair.first, pair.second), (pair.second, pair.first)):
        text = filled(
            asking.template,
            conversation=as_text(pair.messages),
            principle=principle,
            first=first,
            second=second,
        )
        facts = {
            "prompt_id": digest_of(list(pair.messages)),
            "pair": pair.id,
            "principle": principle,
            "request": text,
        }
        asked = (_turn("user", text),)
        yield _Order(_name(pair, first), Comparison(pair.messages, first, second, principle), asked, facts)


def _name(pair: Pair, shown_first: str) -> str:
    return digest_of(pair.id, shown_first)


def _principle(pair: Pair, asking: Asking, seed: int) -> str:
    return asking.principles[int(draw(seed, "comparison", pair.id) * len(asking.principles))]


def _thoughts(
    orders: Mapping[str, _Order], asking: Asking, writer: Writer, thinker: Generator | None, iteration: int
) -> dict[str, str]:
    """The judge's reasons by the order's name; what is cut is used as it is."""
    asks = {
        name: Ask(
            digest_of("thought", list(order.asked)),
            order.asked,
            {"role": "thought", "round": iteration, **order.facts},
        )
        for name, order in orders.items()
    }
    records = writer.write(list(asks.values()), "thought", iteration, thinker, asking.max_thought_tokens)
    return {name: records[ask.key]["text"].strip() for name, ask in asks.items() if ask.key in records}


def _judge(
    questions: Mapping[str, Question],
    facts: Mapping[str, Mapping[str, Any]],
    judge: Chooser | None,
    writer: Writer,
    iteration: int,
) -> None:
    """Ask what the journal does not hold, batch by batch."""
    if judge is None:
        return
    journal, limit = writer.journal, judge.context_length
    lengths = {key: judge.prompt_length(question.messages) for key, question in questions.items()}
    fitting = [question for key, question in questions.items() if limit is None or lengths[key] < limit]
    batches = plan_batches(fitting, lengths, writer.batch_tokens)
    pending = [
        (position, keys)
        for position, keys in enumerate([question.key for question in batch] for batch in batches)
        if not is_done(journal, digest_of(*keys), keys)
    ]

    def judged(piece: tuple[int, list[str]]) -> tuple[list[dict[str, Any]], float]:
        start, asked = time.monotonic(), [questions[key] for key in piece[1]]
        records = [
            {
                "key": question.key,
                "stage": journal.info.get("stage", writer.stage),
                **facts[question.key],
                **facts_of(question, choice),
                "model": judge.fingerprint,
            }
            for question, choice in zip(asked, judge.choose(asked), strict=True)
        ]
        return records, time.monotonic() - start

    def left(piece: tuple[int, list[str]]) -> str:
        return (
            f"stopped before batch {piece[0] + 1} of {len(batches)} of the judgements. {journal.path} holds all "
            "so far; start again to go on."
        )

    for done in share_out(pending, judged, writer.should_stop, left):
        (position, keys), (records, seconds) = done.piece, done.result
        journal.append_batch(digest_of(*keys), records)
        if writer.on_batch is not None:
            writer.on_batch(Progress("judgement", iteration, position + 1, len(batches), len(keys), 0, seconds))


def _verdict(pair: Pair, asking: Asking, seed: int, keys: Mapping[str, str], journal: Journal) -> Verdict | None:
    found: list[Record] = []
    for shown_first in (pair.first, pair.second):
        key = keys.get(_name(pair, shown_first))
        record = journal.get(key) if key is not None else None
        if record is None:
            return None
        found.append(record)
    masses = [record["mass"] for record in found]
    mass = None if None in masses else sum(masses) / 2
    return Verdict(_principle(pair, asking, seed), found[0]["probability"], found[1]["probability"], mass)


def _ask_for(asking: Asking) -> Message:
    return _turn("user", asking.verdict)


def _turn(role: str, text: str) -> Message:
    return {"role": role, "content": text}
