"""Several answers to every prompt, journalled and resumable, and their rewards: what rejection sampling and self-play
share.

The texts and the rewards have a journal each, so that another reward does not write the texts anew. A prompt that
stands several times in the data is sampled as often.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stagekit.counters import digest_of
from stagekit.errors import ConfigError, Problem
from stagekit.journal import Journal
from stagekit.requests import Generator, Message
from stagekit.scorers import Scorer
from stagekit.selection import Candidate, Group
from stagekit.shares import share_out
from stagekit.trainers.conversations import asked_in
from stagekit.writer import Ask, Progress, Writer, is_done


SCORED_AT_ONCE = 256
"""Answers whose rewards are written together: what a crash while scoring costs at most."""


@dataclass(frozen=True)
class Prompt:
    """A conversation that ends with the user's turn, and the row of data that it is from."""

    messages: tuple[Message, ...]
    row: Mapping[str, Any]

    @property
    def id(self) -> str:
        """Names the conversation."""
        return digest_of(list(self.messages))


def prompts_from(rows: Iterable[Mapping[str, Any]], where: str = "train_dataset") -> list[Prompt]:
    """Prompts from dataset rows whose `prompt` is a text or a conversation.

    Raises:
        ConfigError: with every row that has no prompt, or one that does not end with the user's turn; or no rows.
    """
    rows = list(rows)
    if not rows:
        raise ConfigError([Problem(where, "has no rows")])
    return [Prompt(messages, row) for messages, row in zip(asked_in(rows, where), rows, strict=True)]


def texts_digest(
    prompts: Sequence[Prompt],
    *,
    policy: Generator,
    n: int,
    seed: int,
    max_new_tokens: int,
    batch_tokens: int,
    iteration: int = 1,
) -> str:
    """The digest to open the journal of the texts under: all that decides which texts `sample` writes."""
    return digest_of(
        "samples",
        [prompt.id for prompt in prompts],
        policy.fingerprint,
        [n, seed, max_new_tokens],
        batch_tokens,
        iteration,
    )


def scores_digest(prompts: Sequence[Prompt], texts: str, scorer: Scorer) -> str:
    """The digest to open the journal of the rewards under; a reward may read every column of the data."""
    return digest_of("scores", texts, scorer.fingerprint, [repr(sorted(prompt.row.items())) for prompt in prompts])


def sample(
    prompts: Sequence[Prompt],
    *,
    policy: Generator | None,
    n: int,
    seed: int,
    journal: Journal,
    max_new_tokens: int,
    batch_tokens: int,
    iteration: int = 1,
    stage: str = "rejection_sampling",
    on_batch: Callable[[Progress], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> list[Group]:
    """`n` answers of the policy to every prompt, one group per prompt, in the order of the prompts.

    Args:
        policy: None: only what the journal holds, to audit it or to rebuild its rows without a model.
        journal: opened under `texts_digest` of the same arguments. Texts that it holds are not generated again.
        iteration: stands in the records, and draws other texts than every other iteration.
        on_batch: called after each batch that was generated.
        should_stop: asked before each batch.

    Raises:
        StageError: the journal holds texts of another plan.
        Interrupted: `should_stop` said so, with all batches so far in the journal.
    """
    asks = _asks(prompts, n, journal.digest, iteration)
    writer = Writer(journal, stage, seed, batch_tokens, on_batch, should_stop)
    records = writer.write([ask for row in asks for ask in row], "answer", iteration, policy, max_new_tokens)
    groups = []
    for prompt, row in zip(prompts, asks, strict=True):
        found = [records[ask.key] for ask in row if ask.key in records]
        candidates = tuple(Candidate(one["key"], one["text"], one["finish_reason"]) for one in found)
        groups.append(Group(prompt.messages, candidates, None if candidates else "too_long"))
    return groups


def score(
    groups: Sequence[Group],
    prompts: Sequence[Prompt],
    *,
    scorer: Scorer,
    journal: Journal,
    on_batch: Callable[[Progress], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> list[Group]:
    """The groups with the rewards of their answers; a text that stands several times in a group is scored once.

    What is empty, was cut, or failed is not scored. The longest answers come first, so that a memory failure does.

    Args:
        journal: opened under `scores_digest` of the same arguments. Rewards that it holds are not asked for again.

    Raises:
        StageError: the reward raised or gave no number, with prompt and answer; or the journal is another plan's.
        Interrupted: `should_stop` said so.
    """
    first = _to_score(groups)
    order = sorted(first, key=lambda key: (-len(first[key][1].text), key))
    batches = [order[start : start + SCORED_AT_ONCE] for start in range(0, len(order), SCORED_AT_ONCE)]
    pending = [keys for keys in batches if not is_done(journal, digest_of(*keys), keys)]

    def rewards_of(keys: list[str]) -> list[float | None]:
        rows = [prompts[first[key][0]].row for key in keys]
        columns = {name: [row.get(name) for row in rows] for name in rows[0] if name != "prompt"}
        return scorer.score([row["prompt"] for row in rows], [first[key][1].text for key in keys], columns)

    def left(keys: list[str]) -> str:
        return f"stopped while scoring; {journal.path} holds the rewards so far; start again to go on."

    for done in share_out(pending, rewards_of, should_stop, left):
        keys = done.piece
        written = [{"key": key, "reward": reward} for key, reward in zip(keys, done.result, strict=True)]
        journal.append_batch(digest_of(*keys), written)
        if on_batch is not None:
            on_batch(Progress("reward", 0, batches.index(keys) + 1, len(batches), len(keys), 0, 0.0))
    return [_with_rewards(group, journal) for group in groups]


def _asks(prompts: Sequence[Prompt], n: int, digest: str, iteration: int) -> list[list[Ask]]:
    """The texts wanted, by prompt. The samples of a prompt have keys that stand together, so they share batches."""
    seen: Counter[str] = Counter()
    asks = []
    for prompt in prompts:
        seen[prompt.id] += 1
        name = digest_of(digest, iteration, prompt.id, seen[prompt.id])[:32]
        asks.append(
            [
                Ask(
                    f"{name}-{number:04d}",
                    prompt.messages,
                    {"role": "answer", "round": iteration, "prompt_id": prompt.id, "sample": number},
                )
                for number in range(n)
            ]
        )
    return asks


def _to_score(groups: Sequence[Group]) -> dict[str, tuple[int, Candidate]]:
    """Key -> (place of its group, answer) of the answers to score: the first of each text in its group."""
    found: dict[str, tuple[int, Candidate]] = {}
    for place, group in enumerate(groups):
        texts: set[str] = set()
        for candidate in group.candidates:
            says_something = candidate.finish_reason == "stop" and candidate.text.strip()
            if says_something and candidate.text not in texts:
                texts.add(candidate.text)
                found[candidate.key] = (place, candidate)
    return found


def _with_rewards(group: Group, journal: Journal) -> Group:
    by_text: dict[str, float | None] = {}
    for candidate in group.candidates:
        record = journal.get(candidate.key)
        if record is not None:
            by_text[candidate.text] = record["reward"]
    scored = tuple(
        dataclasses.replace(one, reward=by_text.get(one.text) if one.finish_reason == "stop" else None)
        for one in group.candidates
    )
    return dataclasses.replace(group, candidates=scored)
