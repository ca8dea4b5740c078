"""Instructions written by a teacher, and its answers to them: what is asked for, what is kept, and the rows of it.

Each request shows some of the seeds, drawn by the counter RNG, or names a topic, and asks for one new instruction. The
instructions that are well formed and repeat no seed and none before them, in the order of the plan, are answered.

Source: Self-Instruct, https://huggingface.co/papers/2212.10560, sections 2.2 and 2.3: few-shot requests, filters by
length and by overlap with the pool. There a request lists several instructions, and overlap is ROUGE-L; here each is
a text of its own, with its own end, and overlap is the Jaccard similarity of n-grams.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from stagekit.counters import digest_of, draw
from stagekit.duplicates import copies, normalised
from stagekit.errors import ConfigError, Problem, StageError
from stagekit.journal import Journal
from stagekit.requests import Generator, Message
from stagekit.selection import Candidate, Group, quantiles
from stagekit.trainers.conversations import turns_in
from stagekit.trainers.sampling import Prompt
from stagekit.writer import Ask, Progress, Writer


SHOWN = "Here are examples of instructions:\n\n{examples}\n\n"
NEW = "Write one new instruction of the same kind{about} that differs from all of them. "
FIRST = "Write one instruction{about} that a person could give to an assistant. "
ONLY = "Reply with the instruction only."
LINE = "{number}. {example}"

_LEAD_IN = re.compile(
    r"""^(?:
        \d+[.)](?:\s+|$)
      | [-*]\s+
      | \**(?:new\s+|here\s+is\s+(?:a|one|the)\s+(?:new\s+)?)?(?:instruction|task|question|prompt)\**\s*\d*\s*:\**\s*
    )+""",
    re.VERBOSE | re.IGNORECASE,
)
_QUOTES = (('"', '"'), ("“", "”"), ("«", "»"))


@dataclass(frozen=True)
class Seed:
    """An instruction of the data; `id` is the digest of its conversation, as everywhere in the journals."""

    text: str
    id: str


@dataclass(frozen=True)
class Wanted:
    """Which instructions are asked for.

    Attributes:
        count: how many are asked for.
        examples: seeds shown in a request; as many as there are where there are fewer.
        topics: each request names one of these, in turn; empty: none does.
        request: what is asked, with `{examples}` and `{topic}` where they go; None: a text of ours.
        line: how an example is written, with `{number}` and `{example}` where they go.
    """

    count: int
    examples: int = 8
    topics: tuple[str, ...] = ()
    request: str | None = None
    line: str = LINE


@dataclass(frozen=True)
class Bounds:
    """How many words a text may have, as white space separates them; `most` None: any number."""

    least: int = 0
    most: int | None = None

    def broken_by(self, text: str) -> str | None:
        """`too_few_words`, `too_many_words`, or None."""
        words = len(text.split())
        if words < self.least:
            return "too_few_words"
        return "too_many_words" if self.most is not None and words > self.most else None


@dataclass(frozen=True)
class Instruction:
    """What became of one request.

    Attributes:
        key: of its text in the journal.
        asked: the request.
        text: the instruction, without what stands around it; empty where nothing was written.
        seeds: ids of the seeds that the request showed.
        drop: why it is not answered: `too_long`, `error`, `truncated`, `empty`, `too_few_words`, `too_many_words`,
            `copies_seed`, `duplicate`, `similar_to_seed`, `similar`; None: it is.
        like: the seed or the instruction that it repeats.
    """

    key: str
    asked: tuple[Message, ...]
    text: str
    seeds: tuple[str, ...]
    topic: str | None = None
    drop: str | None = None
    like: str | None = None

    @property
    def prompt(self) -> Prompt:
        """The instruction as a prompt to answer."""
        messages = ({"role": "user", "content": self.text},)
        return Prompt(messages, {"prompt": list(messages), "seeds": list(self.seeds)})


def seeds_from(rows: Iterable[Mapping[str, Any]], where: str = "training_data") -> list[Seed]:
    """Seeds from dataset rows whose `prompt` is a text or a conversation of one turn of the user.

    Raises:
        ConfigError: with every row that has no such prompt; or no rows.
    """
    seeds, problems = [], []
    for position, row in enumerate(rows):
        messages = turns_in(row.get("prompt"))
        turns = [message for message in messages if message["role"] != "system"]
        if len(turns) != 1 or turns[0]["role"] != "user" or not turns[0]["content"].strip():
            wrong = "a seed is one instruction: prompt must be a text, or a conversation of one turn of the user"
            problems.append(Problem(f"{where}: row {position}", wrong))
            continue
        seeds.append(Seed(turns[0]["content"].strip(), digest_of(list(messages))))
    if not seeds and not problems:
        problems.append(Problem(where, "has no rows"))
    if problems:
        raise ConfigError(problems)
    return seeds


def instructions_digest(
    seeds: Sequence[Seed],
    wanted: Wanted,
    *,
    teacher: Generator,
    seed: int,
    max_new_tokens: int,
    batch_tokens: int,
) -> str:
    """The digest to open the journal of the instructions under: all that decides which texts are written."""
    return digest_of(
        "instructions",
        [[one.text, one.id] for one in seeds],
        [wanted.count, wanted.examples, list(wanted.topics), wanted.request, wanted.line],
        teacher.fingerprint,
        [seed, max_new_tokens, batch_tokens],
    )


def write_instructions(
    seeds: Sequence[Seed],
    wanted: Wanted,
    *,
    teacher: Generator | None,
    seed: int,
    journal: Journal,
    max_new_tokens: int,
    batch_tokens: int,
    on_batch: Callable[[Progress], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> list[Instruction]:
    """One instruction per request, in the order of the plan, each with its reason where its text says it is none.

    Args:
        teacher: None: only what the journal holds, to audit it or to choose anew without a model.
        journal: opened under `instructions_digest` of the same arguments. Texts that it holds are not written again.

    Raises:
        StageError: the journal holds texts of another plan.
        Interrupted: `should_stop` said so, with all batches so far in the journal.
    """
    asks = asks_for(seeds, wanted, seed, journal.digest)
    writer = Writer(journal, "synthetic_data", seed, batch_tokens, on_batch, should_stop)
    records = writer.write(asks, "instruction", 1, teacher, max_new_tokens)
    found = []
    for ask in asks:
        record = records.get(ask.key)
        facts = (tuple(ask.facts["seeds"]), ask.facts["topic"])
        if record is None:
            found.append(Instruction(ask.key, ask.messages, "", *facts, drop="too_long"))
            continue
        text = instruction_in(record["text"])
        drop = {"error": "error", "length": "truncated"}.get(record["finish_reason"]) or (None if text else "empty")
        found.append(Instruction(ask.key, ask.messages, text, *facts, drop=drop))
    return found


def asks_for(seeds: Sequence[Seed], wanted: Wanted, seed: int, digest: str) -> list[Ask]:
    """The requests, in the order of the plan: `digest` is that of the journal. Equal ones are asked as often as they
    were drawn."""
    asks = []
    for number in range(wanted.count):
        shown = [seeds[place] for place in _drawn(seed, number, len(seeds), min(wanted.examples, len(seeds)))]
        topic = wanted.topics[number % len(wanted.topics)] if wanted.topics else None
        messages = (
            {"role": "user", "content": request_text([one.text for one in shown], topic, wanted.request, wanted.line)},
        )
        facts = {
            "role": "instruction",
            "round": 1,
            "prompt_id": digest_of(list(messages)),
            "sample": number,
            "seeds": [one.id for one in shown],
            "topic": topic,
        }
        asks.append(Ask(f"{digest_of(digest, number)[:32]}-{number:06d}", messages, facts))
    return asks


def choose(
    instructions: Sequence[Instruction],
    seeds: Sequence[Seed],
    *,
    bounds: Bounds = Bounds(3, 150),
    similarity: float | None = 0.7,
    ngram: int = 5,
) -> list[Instruction]:
    """The instructions with the reasons of those that are too short, too long, or repeat a seed or one before them.

    Of those that repeat each other the first in the order of the plan stays. Pure: it can be done anew.
    """
    formed = [one if one.drop else _with(one, bounds.broken_by(one.text)) for one in instructions]
    places = [place for place, one in enumerate(formed) if one.drop is None]
    texts, known = [formed[place].text for place in places], [seed.text for seed in seeds]
    for place, copy in zip(places, copies(texts, known, similarity=similarity, ngram=ngram), strict=True):
        if copy is not None:
            reason = ("copies_seed" if copy.known else "duplicate") if copy.exact else "similar"
            reason += "_to_seed" if copy.known and not copy.exact else ""
            formed[place] = _with(formed[place], reason, (known if copy.known else texts)[copy.place])
    return formed


def instruction_in(text: str) -> str:
    """The instruction that a reply holds, without a number, a heading or quotation marks around it."""
    found = _LEAD_IN.sub("", text.strip()).strip()
    for opening, closing in _QUOTES:
        inner = found[1:-1]
        if len(found) > 1 and found.startswith(opening) and found.endswith(closing) and opening not in inner:
            return inner.strip()
    return found


def wrong_answer(prompt: Prompt, candidate: Candidate | None, bounds: Bounds = Bounds(1)) -> str | None:
    """Why an answer cannot be learnt, whatever it is worth: `too_long`, `error`, `truncated`, `empty`,
    `too_few_words`, `too_many_words`, `repeats_instruction`; None: it can. A cut one would be learnt with an end."""
    if candidate is None:
        return "too_long"
    if candidate.finish_reason != "stop":
        return "truncated" if candidate.finish_reason == "length" else "error"
    if not candidate.text.strip():
        return "empty"
    if normalised(candidate.text) == normalised(prompt.messages[-1]["content"]):
        return "repeats_instruction"
    return bounds.broken_by(candidate.text)


def worth(candidate: Candidate, min_reward: float | None) -> str | None:
    """Why the reward of an answer drops it: `no_reward`, `below_min_reward` (strictly above it stays), or None."""
    if candidate.reward is None:
        return "no_reward"
    return "below_min_reward" if min_reward is not None and candidate.reward <= min_reward else None


@dataclass(frozen=True)
class Answered:
    """An instruction that was answered: its group of one answer, and why that gives no row."""

    instruction: Instruction
    group: Group
    drop: str | None

    @property
    def reward(self) -> float | None:
        """What the answer is worth; None where nothing says."""
        return self.group.candidates[0].reward if self.group.candidates else None


def rows(answered: Sequence[Answered]) -> list[dict[str, Any]]:
    """Rows to learn: `prompt`, `completion`, `seeds` (ids of those that the request showed), `key`; and `topic` and
    `reward` where there are any."""
    found = []
    for one in answered:
        if one.drop is not None:
            continue
        (candidate,) = one.group.candidates
        found.append(
            {
                "prompt": list(one.group.messages),
                "completion": [{"role": "assistant", "content": candidate.text}],
                "seeds": list(one.instruction.seeds),
                **({"topic": one.instruction.topic} if one.instruction.topic is not None else {}),
                **({"reward": one.reward} if one.reward is not None else {}),
                "key": candidate.key,
            }
        )
    return found


def instruction_rows(instructions: Sequence[Instruction]) -> list[dict[str, Any]]:
    """What became of every request: `prompt` (the request), `completion` (the instruction), `drop` (why it was not
    answered, else empty), `like` (what it repeats, else empty), `seeds`, `key`."""
    return [
        {
            "prompt": list(one.asked),
            "completion": [{"role": "assistant", "content": one.text}],
            "drop": one.drop or "",
            "like": one.like or "",
            "seeds": list(one.seeds),
            "key": one.key,
        }
        for one in instructions
    ]


def drops(instructions: Sequence[Instruction], answered: Sequence[Answered]) -> dict[str, int]:
    """What gave no row, by reason. Instructions asked for = rows + the sum of all."""
    counts = Counter(f"instructions.{one.drop}" for one in instructions if one.drop is not None)
    counts.update(f"answers.{one.drop}" for one in answered if one.drop is not None)
    return dict(counts)


def metrics(instructions: Sequence[Instruction], answered: Sequence[Answered]) -> dict[str, float]:
    """Of the instructions asked for: `valid_unique_rate`, those that are well formed and repeat nothing; `kept_share`,
    those that made a row. With rewards: their means, of all answers that have one and of those kept."""
    asked = len(instructions)
    kept = [one for one in answered if one.drop is None]
    rewards = [one.reward for one in answered if one.reward is not None]
    found = {"valid_unique_rate": len(answered) / asked, "kept_share": len(kept) / asked}
    if rewards:
        found["reward/mean"] = fmean(rewards)
        found |= {"reward/kept": fmean(one.reward for one in kept if one.reward is not None)} if kept else {}
    return found


def nothing_kept(instructions: Sequence[Instruction], answered: Sequence[Answered]) -> StageError:
    """The error where no row is left: the reasons, the rewards there were, and what helps."""
    counts = drops(instructions, answered)
    reasons = ", ".join(f"{reason}: {count}" for reason, count in counts.items())
    rewards = [one.reward for one in answered if one.reward is not None]
    spread = ", ".join(f"{name} {value:.4g}" for name, value in quantiles(rewards).items())
    told = f"; rewards of the answers: {spread}" if spread else ""
    return StageError(
        f"no instruction and answer was kept ({reasons}{told}). Raise max_new_tokens if they are truncated; raise the "
        "temperature or the similarity if they are copies; lower min_reward if they are below it; a small model that "
        "cannot write instructions needs a teacher"
    )


def _with(one: Instruction, drop: str | None, like: str | None = None) -> Instruction:
    return Instruction(one.key, one.asked, one.text, one.seeds, one.topic, drop, like)


def request_text(
    examples: Sequence[str], topic: str | None = None, request: str | None = None, line: str = LINE
) -> str:
    """What is asked of the teacher: by the user's own text, or by ours."""
    listed = "\n".join(
        _filled(line, {"{number}": str(number), "{example}": text}) for number, text in enumerate(examples, start=1)
    )
    if request is None:
        request = (SHOWN + NEW if examples else FIRST) + ONLY
        request = request.replace("{about}", " about {topic}" if topic is not None else "")
    return _filled(request, {"{examples}": listed, "{topic}": topic or ""})


def _filled(template: str, parts: Mapping[str, str]) -> str:
    """A template with its places filled at once, so that braces in what is filled in stay as they are."""
    places = re.split("(" + "|".join(map(re.escape, parts)) + ")", template)
    return "".join(parts.get(part, part) for part in places)


def _drawn(seed: int, number: int, count: int, k: int) -> list[int]:
    """`k` of `count` places, without repetition, for a request by its number: the first steps of a shuffle."""
    moved: dict[int, int] = {}
    found = []
    for place in range(k):
        other = place + int(draw(seed, "examples", str(number), str(place)) * (count - place))
        found.append(moved.get(other, other))
        moved[other] = moved.get(place, place)
    return found
