"""Constitutional AI, the supervised part: a model answers, criticises its answer by a principle, and rewrites it.

Round r asks, with a principle drawn for (seed, prompt, r):

    [fewshot ...] x | assistant: y_{r-1} | user: critique request | assistant: -> c_r
    [fewshot ...] x | assistant: y_{r-1} | user: critique request | assistant: c_r | user: revision request | -> y_r

and the next round starts again from `x | assistant: y_r`. A round of a group of prompts is one batch of the journal:
its critiques and revisions, in the first round its answers too, so that a model need not read again in one turn what
it read or wrote in the one before. A batch is whole or made anew, and each turn has its own seed, so a run that was
killed goes on to the same texts. Prompts that are only answered have batches of their own.

Source: https://huggingface.co/papers/2212.08073, sections 3.1 and 3.5.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from stagekit.counters import digest_of, draw
from stagekit.errors import ConfigError, Problem
from stagekit.journal import Journal, Record
from stagekit.principles import DEFAULT_PRINCIPLES, Principle, principles_from
from stagekit.requests import Generator, Message, Request, plan_batches
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
)
from stagekit.trainers.conversations import unanswerable
from stagekit.writer import Ask, Progress, Turn, Writer


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
    revised = any(prompt.revise for prompt in prompts)
    return digest_of(
        "constitutional, a round is a batch" if revised else "constitutional",
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
        batch_tokens: bounds a batch: its rows times the longest conversation of the round, all texts at their caps.
        max_new_tokens: of an answer and of a revision. Be generous: what is cut gives no row.
        fewshot: a conversation put in front of critiques and revisions (after a system message), to show the roles;
            left out for a prompt whose conversation would not fit into the context with it.
        on_batch: called after each batch that was generated.
        should_stop: asked before each turn of a batch; True raises Interrupted, with all whole batches in the journal.

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
    tokens: int = 0  # of the current answer
    drop: str | None = None
    rounds: list[Round] = field(default_factory=list)
    principles: dict[int, Principle] = field(default_factory=dict)  # those drawn, by round
    lengths: dict[int, int] = field(default_factory=dict)  # round -> tokens of its conversation without the texts

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
        """All rounds, and the prompts that are only answered; without generators only what the journal holds."""
        for number in range(1, self.rounds + 1):
            self._round(number, policy, critic)
        self._answer_only(policy)
        traces = []
        for prompt in prompts:
            chain = self.chains[_prompt_id(prompt), prompt.revise]
            traces.append(Trace(prompt, chain.initial, tuple(chain.rounds), chain.drop))
        return Revisions(tuple(traces), self.rounds)

    def _round(self, number: int, policy: Generator | None, critic: Generator | None) -> None:
        """A round of all prompts that are revised, group by group."""
        chains = {chain.prompt_id: chain for chain in self._open(revise=True)}
        groups = [list(chains)] if chains else []
        generators = []
        if policy is not None and critic is not None:
            generators = [policy, critic]
            lengths = {name: self._longest(chain, number) for name, chain in chains.items()}
            wanted = [Request(name, (), 0) for name in chains]
            batches = plan_batches(wanted, lengths, self.writer.batch_tokens)
            groups = [[request.key for request in batch] for batch in batches]

        def talk(names: Sequence[str], turn: Turn) -> None:
            group = [chains[name] for name in names]
            if number == 1:
                self._answer(group, turn(self._answer_asks(group), policy, self.max_new_tokens))
                group = [chain for chain in group if chain.drop is None]
            critiques = self._criticise(group, number, critic, turn)
            self._revise(group, number, policy, critiques, turn)

        self.writer.converse(groups, number, generators, talk)

    def _answer_only(self, policy: Generator | None) -> None:
        """Answer the prompts that are not revised, but for those that are answered as ones that are."""
        chains = self._open(revise=False)
        twins = {one.prompt_id for one in self.chains.values() if one.prompt.revise and one.initial is not None}
        asks = self._answer_asks([one for one in chains if one.prompt_id not in twins])
        self.writer.write(asks, "initial", 0, policy, self.max_new_tokens)
        records = ((key, self.writer.journal.get(key)) for key in (self._key(one, 0, "initial") for one in chains))
        self._answer(chains, {key: record for key, record in records if record is not None})

    def _answer_asks(self, chains: Sequence[_Chain]) -> list[Ask]:
        return [_ask(self._key(one, 0, "initial"), one, one.prompt.messages, "initial", 0) for one in chains]

    def _answer(self, chains: Sequence[_Chain], records: Mapping[str, Record]) -> None:
        """Take in the first answers."""
        for chain in chains:
            record = records.get(self._key(chain, 0, "initial"))
            if record is None:
                chain.drop = "too_long"
                continue
            chain.initial = _text(record)
            chain.current, chain.tokens = chain.initial.text, chain.initial.new_tokens
            if record["finish_reason"] == "error":
                chain.drop = "error"
            elif not chain.current:
                chain.drop = "empty_answer"

    def _criticise(
        self, chains: Sequence[_Chain], number: int, critic: Generator | None, turn: Turn
    ) -> dict[str, Text | None]:
        """Prompt id -> critique; None where two tries gave nothing. A prompt that is missing was too long."""
        critiques: dict[str, Text | None] = {}
        for attempt in (0, 1):
            asks = {chain.prompt_id: self._critique_ask(chain, number, attempt) for chain in chains}
            records = turn(list(asks.values()), critic, self.max_critique_tokens)
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

    def _revise(
        self,
        chains: Sequence[_Chain],
        number: int,
        policy: Generator | None,
        critiques: Mapping[str, Text | None],
        turn: Turn,
    ) -> None:
        asks = {
            chain.prompt_id: self._revision_ask(chain, number, critiques[chain.prompt_id])
            for chain in chains
            if chain.prompt_id in critiques
        }
        records = turn(list(asks.values()), policy, self.max_new_tokens)
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
            chain.current, chain.tokens = revision.text, revision.new_tokens

    def _open(self, revise: bool) -> list[_Chain]:
        return [one for one in self.chains.values() if one.prompt.revise is revise and one.drop is None]

    def _principle(self, chain: _Chain, number: int) -> Principle:
        if number not in chain.principles:
            place = draw(self.seed, "principle", chain.prompt_id, str(number))
            chain.principles[number] = self.principles[int(place * len(self.principles))]
        return chain.principles[number]

    def _key(self, chain: _Chain, number: int, role: Role, attempt: int = 0) -> str:
        return digest_of(self.writer.journal.digest, chain.prompt_id, number, role, attempt)

    def _fits(self, chain: _Chain, policy: Generator, critic: Generator) -> bool:
        """Whether the longest conversation of any round fits, all texts at their caps."""
        if not chain.prompt.revise:
            return _within(policy, chain.prompt.messages, self.max_new_tokens)
        answered = self.max_new_tokens + self.max_critique_tokens
        for number in range(1, self.rounds + 1):
            principle = self._principle(chain, number)
            asked = ("", principle.critique_request)
            whole = chain.conversation(*asked, "", principle.revision_request)
            chain.lengths[number] = policy.prompt_length(whole)
            if not _is_within(policy, chain.lengths[number] + answered + self.max_new_tokens):
                return False
            if critic is not policy and not _within(critic, chain.conversation(*asked), answered):
                return False
        return True

    def _longest(self, chain: _Chain, number: int) -> int:
        """The tokens of a round's longest conversation, with the texts at their caps that are not written yet."""
        answer = self.max_new_tokens if chain.initial is None else chain.tokens
        return chain.lengths[number] + answer + self.max_critique_tokens + self.max_new_tokens


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
    return Ask(key, messages, facts, chain.prompt_id)


def _within(generator: Generator, messages: Sequence[Message], more: int) -> bool:
    return generator.context_length is None or _is_within(generator, generator.prompt_length(messages) + more)


def _is_within(generator: Generator, tokens: int) -> bool:
    return generator.context_length is None or tokens <= generator.context_length


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
        Problem(f"prompts[{place}]", wrong) for place, p in enumerate(prompts) if (wrong := unanswerable(p.messages))
    ]
    if rounds < 1:
        problems.append(Problem("rounds", f"{rounds} gives no revision to train on; set at least 1"))
    if not principles:
        problems.append(Problem("principles", "none given; give at least one, or leave it out for stagekit's own set"))
    if not prompts:
        problems.append(Problem("prompts", "none given"))
    if problems:
        raise ConfigError(problems)
