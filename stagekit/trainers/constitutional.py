"""Constitutional AI, the supervised part: a model answers, criticises its answer by a principle, and rewrites it.

Round r asks, with a principle drawn for (seed, prompt, r):

    [fewshot ...] x | assistant: y_{r-1} | user: critique request | assistant: -> c_r
    [fewshot ...] x | assistant: y_{r-1} | user: critique request | assistant: c_r | user: revision request | -> y_r

and the next round starts again from `x | assistant: y_r`. Each phase (all answers; per round all critiques, then all
revisions) is laid out as a whole, batched as a whole, and written batch by batch to a journal; batches that are in the
journal are not made again, and each batch has its own seed. So a run that was killed goes on to the same texts.

Source: https://huggingface.co/papers/2212.08073, sections 3.1 and 3.5.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from stagekit.counters import digest_of, draw
from stagekit.errors import ConfigError, Problem
from stagekit.journal import Journal, Record
from stagekit.principles import DEFAULT_PRINCIPLES, Principle, principles_from
from stagekit.requests import Generator, Message
from stagekit.trainers.constitutional_rows import (
    Prompt,
    Revisions,
    Round,
    Text,
    Trace,
    drops,
    is_critique_like,
    metrics,
    preference_rows,
    prompts_from,
    samples,
    sft_rows,
    strip_lead_in,
    wrong_with,
)
from stagekit.writer import Ask, Progress, Writer


__all__ = [
    "DEFAULT_PRINCIPLES",
    "Principle",
    "Progress",
    "Prompt",
    "Revisions",
    "drops",
    "metrics",
    "plan_digest",
    "preference_rows",
    "principles_from",
    "prompts_from",
    "replay",
    "revise",
    "samples",
    "sft_rows",
    "strip_lead_in",
]

Role = Literal["initial", "critique", "revision"]


def plan_digest(
    prompts: Sequence[Prompt],
    *,
    policy: Generator,
    critic: Generator | None = None,
    principles: Sequence[Principle] = DEFAULT_PRINCIPLES,
    rounds: int = 2,
    seed: int = 42,
    max_new_tokens: int = 256,
    max_critique_tokens: int = 128,
    batch_tokens: int = 16384,
    fewshot: Sequence[Message] = (),
) -> str:
    """The digest to open the journal under: all that decides which texts `revise` writes."""
    return digest_of(
        "constitutional",
        [[_prompt_id(prompt), prompt.revise] for prompt in prompts],
        [policy.fingerprint, critic.fingerprint if critic is not None else None],
        [[p.name, p.critique_request, p.revision_request] for p in principles],
        [rounds, seed, max_new_tokens, max_critique_tokens, batch_tokens],
        list(fewshot),
    )


def revise(
    prompts: Sequence[Prompt],
    *,
    policy: Generator,
    critic: Generator | None = None,
    principles: Sequence[Principle] = DEFAULT_PRINCIPLES,
    rounds: int = 2,
    seed: int = 42,
    journal: Journal,
    max_new_tokens: int = 256,
    max_critique_tokens: int = 128,
    batch_tokens: int = 16384,
    fewshot: Sequence[Message] = (),
    on_batch: Callable[[Progress], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Revisions:
    """Let `policy` answer every prompt, then criticise and revise the answers in `rounds` rounds.

    Args:
        critic: writes the critiques; None: the policy. Only messages pass between the two, never token ids.
        journal: opened under `plan_digest` of the same arguments. Texts that it holds are not generated again.
        max_new_tokens: of an answer and of a revision. Be generous: what is cut gives no row.
        fewshot: a conversation put in front of critiques and revisions (after a system message), to show the roles;
            left out for a prompt whose conversation would not fit into the context with it.
        on_batch: called after each batch that was generated.
        should_stop: asked before each batch; True raises Interrupted, with all batches so far in the journal.

    Raises:
        ConfigError: no rounds, no principles, or a prompt that does not end with the user's turn.
        StageError: the journal holds texts of another plan.
        Interrupted: `should_stop` said so.
    """
    _check(prompts, principles, rounds)
    writer = Writer(journal, "constitutional", seed, batch_tokens, on_batch, should_stop)
    walk = _Walk(principles, rounds, seed, max_new_tokens, max_critique_tokens, writer)
    walk.add(prompts, fewshot)
    walk.drop_too_long(policy, critic or policy)
    return walk.run(prompts, policy, critic or policy)


def replay(
    prompts: Sequence[Prompt], *, principles: Sequence[Principle], rounds: int, seed: int, journal: Journal
) -> Revisions:
    """The revisions that a finished run left in its journal, without a model: to audit or to rebuild its rows.

    `Journal.read` gives the journal. What it has no text for was too long, the prompt or the round: so it must be
    that of a finished run.
    """
    _check(prompts, principles, rounds)
    walk = _Walk(principles, rounds, seed, 0, 0, Writer(journal, "constitutional", seed, 0))
    walk.add(prompts, ())
    return walk.run(prompts, None, None)


@dataclass
class _Chain:
    """Where one prompt stands: its first answer, the current one, and the rounds so far."""

    prompt: Prompt
    prompt_id: str
    fewshot: tuple[Message, ...]
    initial: Text | None = None
    current: str = ""
    drop: str | None = None
    rounds: list[Round] = field(default_factory=list)

    def conversation(self, *turns: str) -> tuple[Message, ...]:
        """The prompt and then `turns`, by the assistant and by the user in turn, after the few-shot examples."""
        given = self.prompt.messages
        system = 1 if given[0]["role"] == "system" else 0
        roles = ("assistant", "user")
        new = tuple({"role": roles[place % 2], "content": turn} for place, turn in enumerate(turns))
        return (*given[:system], *self.fewshot, *given[system:], *new)


class _Walk:
    """The phases, in order: lays out what each asks for and takes in what it got."""

    def __init__(
        self,
        principles: Sequence[Principle],
        rounds: int,
        seed: int,
        max_new_tokens: int,
        max_critique_tokens: int,
        writer: Writer,
    ) -> None:
        self.principles = principles
        self.rounds = rounds
        self.seed = seed
        self.max_new_tokens = max_new_tokens
        self.max_critique_tokens = max_critique_tokens
        self.writer = writer
        self.chains: dict[tuple[str, bool], _Chain] = {}

    def add(self, prompts: Sequence[Prompt], fewshot: Sequence[Message]) -> None:
        """One chain for each different prompt: repeated prompts are generated once."""
        for prompt in prompts:
            prompt_id = _prompt_id(prompt)
            self.chains.setdefault((prompt_id, prompt.revise), _Chain(prompt, prompt_id, tuple(fewshot)))

    def drop_too_long(self, policy: Generator, critic: Generator) -> None:
        """Drop, before anything is generated, prompts whose longest possible conversation exceeds a context."""
        for chain in self.chains.values():
            fits = self._fits(chain, policy, critic)
            if not fits and chain.fewshot:
                chain.fewshot = ()
                fits = self._fits(chain, policy, critic)
            if not fits:
                chain.drop = "too_long"

    def run(self, prompts: Sequence[Prompt], policy: Generator | None, critic: Generator | None) -> Revisions:
        """All phases; without generators only what the journal holds."""
        self._answer(policy)
        for number in range(1, self.rounds + 1):
            critiques = self._criticise(number, critic)
            self._revise(number, policy, critiques)
        traces = []
        for prompt in prompts:
            chain = self.chains[_prompt_id(prompt), prompt.revise]
            traces.append(Trace(prompt, chain.initial, tuple(chain.rounds), chain.drop))
        return Revisions(tuple(traces), self.rounds)

    def _answer(self, policy: Generator | None) -> None:
        open_chains = [chain for chain in self.chains.values() if chain.drop is None]
        asks = {
            key: _ask(key, chain, chain.prompt.messages, "initial", 0)
            for chain in open_chains
            if (key := self._key(chain, 0, "initial"))
        }
        records = self.writer.write(list(asks.values()), "initial", 0, policy, self.max_new_tokens)
        for chain in open_chains:
            record = records.get(self._key(chain, 0, "initial"))
            if record is None:
                chain.drop = "too_long"
                continue
            chain.initial = _text(record)
            chain.current = chain.initial.text
            if record["finish_reason"] == "error":
                chain.drop = "error"
            elif not chain.current:
                chain.drop = "empty_answer"

    def _criticise(self, number: int, critic: Generator | None) -> dict[str, Text | None]:
        """Prompt id -> critique; None where two tries gave nothing. A prompt that is missing was too long."""
        critiques: dict[str, Text | None] = {}
        chains = self._revised()
        for attempt in (0, 1):
            asks = {chain.prompt_id: self._critique_ask(chain, number, attempt) for chain in chains}
            cap = self.max_critique_tokens
            records = self.writer.write(list(asks.values()), "critique", number, critic, cap)
            for prompt_id, ask in asks.items():
                if ask.key in records:
                    critiques[prompt_id] = _usable(records[ask.key])
            chains = [chain for chain in chains if critiques.get(chain.prompt_id, True) is None]
        return critiques

    def _critique_ask(self, chain: _Chain, number: int, attempt: int) -> Ask:
        principle = self._principle(chain, number)
        messages = chain.conversation(chain.current, principle.critique_request)
        key = self._key(chain, number, "critique", attempt)
        return _ask(key, chain, messages, "critique", number, principle.name, principle.critique_request)

    def _revise(self, number: int, policy: Generator | None, critiques: Mapping[str, Text | None]) -> None:
        chains = self._revised()
        asks = {
            chain.prompt_id: self._revision_ask(chain, number, critiques[chain.prompt_id])
            for chain in chains
            if chain.prompt_id in critiques
        }
        records = self.writer.write(list(asks.values()), "revision", number, policy, self.max_new_tokens)
        for chain in chains:
            ask = asks.get(chain.prompt_id)
            record = records.get(ask.key) if ask is not None else None
            self._take(chain, number, critiques.get(chain.prompt_id), record)

    def _revision_ask(self, chain: _Chain, number: int, critique: Text | None) -> Ask:
        principle = self._principle(chain, number)
        asked = (principle.critique_request, critique.text) if critique is not None else ()
        messages = chain.conversation(chain.current, *asked, principle.revision_request)
        key = self._key(chain, number, "revision")
        return _ask(key, chain, messages, "revision", number, principle.name, principle.revision_request)

    def _take(self, chain: _Chain, number: int, critique: Text | None, record: Record | None) -> None:
        """End the chain's round. What is empty leaves the answer as it was; a truncated revision is revised on."""
        name = self._principle(chain, number).name
        if record is None:
            chain.rounds.append(Round(number, name, critique, None, "too_long"))
            return
        raw = _text(record)
        revision = Text(raw.key, strip_lead_in(raw.text), raw.truncated, raw.new_tokens)
        drop = "truncated" if revision.truncated else None
        if record["finish_reason"] == "error":
            drop = "error"
        elif not revision.text:
            drop = "empty"
        equal = drop is None and revision.text == chain.current
        like = is_critique_like(revision.text)
        chain.rounds.append(Round(number, name, critique, revision, drop, critique is None, equal, like))
        if drop in (None, "truncated"):
            chain.current = revision.text

    def _revised(self) -> list[_Chain]:
        return [chain for chain in self.chains.values() if chain.prompt.revise and chain.drop is None]

    def _principle(self, chain: _Chain, number: int) -> Principle:
        place = draw(self.seed, "principle", chain.prompt_id, str(number))
        return self.principles[int(place * len(self.principles))]

    def _key(self, chain: _Chain, number: int, role: Role, attempt: int = 0) -> str:
        return digest_of(self.writer.journal.digest, chain.prompt_id, number, role, attempt)

    def _fits(self, chain: _Chain, policy: Generator, critic: Generator) -> bool:
        """Whether the longest conversation of any round fits, all texts at their caps."""
        if not chain.prompt.revise:
            return _within(policy, chain.prompt.messages, self.max_new_tokens)
        principles = [self._principle(chain, number) for number in range(1, self.rounds + 1)]
        answered = self.max_new_tokens + self.max_critique_tokens
        return all(
            _within(critic, chain.conversation("", p.critique_request), answered)
            and _within(
                policy,
                chain.conversation("", p.critique_request, "", p.revision_request),
                answered + self.max_new_tokens,
            )
            for p in principles
        )


def _ask(
    key: str,
    chain: _Chain,
    messages: tuple[Message, ...],
    role: Role,
    number: int,
    principle: str | None = None,
    request: str | None = None,
) -> Ask:
    facts = {
        "role": role,
        "round": number,
        "prompt_id": chain.prompt_id,
        "principle": principle,
        "request": request,
    }
    return Ask(key, messages, facts)


def _within(generator: Generator, messages: Sequence[Message], more: int) -> bool:
    limit = generator.context_length
    return limit is None or generator.prompt_length(messages) + more <= limit


def _prompt_id(prompt: Prompt) -> str:
    return digest_of(list(prompt.messages))


def _text(record: Record) -> Text:
    return Text(record["key"], record["text"].strip(), record["finish_reason"] == "length", record["n_new"])


def _usable(record: Record) -> Text | None:
    """The critique, or None where there is none: empty, or the back end failed."""
    text = _text(record)
    return text if text.text and record["finish_reason"] != "error" else None


def _check(prompts: Sequence[Prompt], principles: Sequence[Principle], rounds: int) -> None:
    problems = [
        Problem(f"prompts[{place}]", wrong) for place, p in enumerate(prompts) if (wrong := wrong_with(p.messages))
    ]
    if rounds < 1:
        problems.append(Problem("rounds", f"{rounds} gives no revision to train on; set at least 1"))
    if not principles:
        problems.append(Problem("principles", "none given; give at least one, or leave it out for stagekit's own set"))
    if not prompts:
        problems.append(Problem("prompts", "none given"))
    if problems:
        raise ConfigError(problems)
