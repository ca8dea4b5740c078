"""Get the texts of a plan: from the journal, and the others from a generator, batch by batch. Imports no torch."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stagekit.counters import digest_of, seed_of
from stagekit.errors import Interrupted, StageError
from stagekit.journal import Journal, Record
from stagekit.requests import Completion, Generator, Message, Request, plan_batches, remembering
from stagekit.shares import share_out


@dataclass(frozen=True)
class Progress:
    """A batch has been written: which phase it belongs to, how far the phase is, and what the batch cost.

    `role` is that of the batch's texts; a batch of conversations, with texts of several roles, says "round".
    """

    role: str
    round: int
    batch: int
    batches: int
    texts: int
    new_tokens: int
    duration_seconds: float


@dataclass(frozen=True)
class Ask:
    """One text wanted in a phase, before it is known whether it fits and whether the journal has it.

    `facts` are kept beside the text: `role` and `round` of the phase, `prompt_id`, and what the method adds.
    `conversation` names that of which the text is a turn, see `Writer.converse`.
    """

    key: str
    messages: tuple[Message, ...]
    facts: Mapping[str, Any]
    conversation: str = ""


Turn = Callable[[Sequence[Ask], Generator | None, int], dict[str, Record]]
"""Asks a generator for texts of at most so many tokens; gives the records by key, without those that do not fit."""


@dataclass
class Writer:
    """Writes phases into a journal. Each batch has its own seed, so a run that was killed goes on to the same texts.

    Attributes:
        stage: what the records name as their stage, where the journal does not say.
        on_batch: called after each batch that was generated.
        should_stop: asked before each batch; True raises Interrupted.
    """

    journal: Journal
    stage: str
    seed: int
    batch_tokens: int
    on_batch: Callable[[Progress], None] | None = None
    should_stop: Callable[[], bool] | None = None

    def write(
        self, asks: Sequence[Ask], role: str, number: int, generator: Generator | None, max_new_tokens: int
    ) -> dict[str, Record]:
        """The journal's records of `asks` by key; without those that do not fit into the generator's context.

        Args:
            generator: None: only what the journal holds.

        Raises:
            StageError: the journal holds texts of another plan.
            Interrupted: `should_stop` said so, with all batches so far in the journal.
        """
        if generator is not None:
            self._generate({ask.key: ask for ask in asks}, role, number, generator, max_new_tokens)
        return self._recorded(asks, generator, max_new_tokens)

    def converse(
        self,
        groups: Sequence[Sequence[str]],
        number: int,
        generators: Sequence[Generator],
        talk: Callable[[Sequence[str], Turn], None],
    ) -> None:
        """Write conversations of several turns: all turns of a group of them are one batch of the journal.

        So what a generator has read of them can stay in memory from turn to turn, and a run that was killed still
        goes on to the same texts: the batch that it was in is made anew from its first turn. Each turn has a seed of
        its own.

        Args:
            groups: names of the conversations that make up each batch.
            generators: who writes; none: only what the journal holds.
            talk: asks for the turns of one group, one after another, by the function that it is given.

        Raises:
            StageError: the journal holds texts of another plan.
            Interrupted: `should_stop` said so, with all batches so far in the journal.
        """
        pending: list[tuple[int, Sequence[str]]] = []
        for position, group in enumerate(groups):
            if generators and not self.journal.has_batch(_round_id(number, group)):
                pending.append((position, group))
            else:
                talk(group, self._recorded)

        def held(piece: tuple[int, Sequence[str]]) -> _Written:
            written: dict[str, Record] = {}
            start = time.monotonic()
            with remembering(*generators):
                talk(piece[1], self._asking(written, f"at batch {piece[0] + 1} of {len(groups)} of round {number}"))
            return _Written(list(written.values()), time.monotonic() - start)

        for done in share_out(pending, held):  # which asks before each turn whether to stop
            position, group = done.piece
            self._append(_round_id(number, group), done.result, "round", number, position + 1, len(groups))
            if not done.mine:  # the other process took the answers in, this one takes them from the journal
                talk(group, self._recorded)

    def _recorded(self, asks: Sequence[Ask], generator: Generator | None, most: int) -> dict[str, Record]:
        found = ((ask.key, self.journal.get(ask.key)) for ask in asks)
        return {key: record for key, record in found if record is not None}

    def _asking(self, written: dict[str, Record], where: str) -> Turn:
        """Generates a turn, and puts its records into `written`."""

        def turn(asks: Sequence[Ask], generator: Generator | None, most: int) -> dict[str, Record]:
            assert generator is not None
            self._leave_if_asked(where)
            if any(ask.key in self.journal for ask in asks):
                raise _other_plan(self.journal)
            lengths = _lengths(asks, generator)
            limit = generator.context_length
            fitting = [ask for ask in asks if limit is None or lengths[ask.key] + most <= limit]
            if not fitting:
                return {}
            requests = [Request(ask.key, ask.messages, most, conversation=ask.conversation) for ask in fitting]
            seed = seed_of(self.seed, digest_of(*(request.key for request in requests)))
            completions = generator.generate(requests, seed)
            records = {
                ask.key: self._record(ask, completion, generator.fingerprint, seed)
                for ask, completion in zip(fitting, completions, strict=True)
            }
            written.update(records)
            return records

        return turn

    def _leave_if_asked(self, where: str) -> None:
        if self.should_stop is not None and self.should_stop():
            raise Interrupted(self._left(where))

    def _left(self, where: str) -> str:
        return f"stopped {where}; {self.journal.path} holds all batches before it; start again to go on."

    def _generate(
        self, asks: Mapping[str, Ask], role: str, number: int, generator: Generator, max_new_tokens: int
    ) -> None:
        lengths = _lengths(list(asks.values()), generator)
        limit = generator.context_length
        fitting = [key for key in asks if limit is None or lengths[key] + max_new_tokens <= limit]
        requests = [Request(key, asks[key].messages, max_new_tokens) for key in fitting]
        batches = plan_batches(requests, lengths, self.batch_tokens)
        pending = [
            (position, batch)
            for position, batch in enumerate(batches)
            if not is_done(self.journal, _batch_id(batch), [request.key for request in batch])
        ]

        def written(piece: tuple[int, Sequence[Request]]) -> _Written:
            batch = piece[1]
            start, seed = time.monotonic(), seed_of(self.seed, _batch_id(batch))
            completions = generator.generate(batch, seed)
            records = [
                self._record(asks[request.key], completion, generator.fingerprint, seed)
                for request, completion in zip(batch, completions, strict=True)
            ]
            return _Written(records, time.monotonic() - start)

        def left(piece: tuple[int, Sequence[Request]]) -> str:
            return self._left(f"at batch {piece[0] + 1} of {len(batches)} of the {role} phase")

        for done in share_out(pending, written, self.should_stop, left):
            position, batch = done.piece
            self._append(_batch_id(batch), done.result, role, number, position + 1, len(batches))

    def _append(self, batch_id: str, written: "_Written", role: str, number: int, position: int, batches: int) -> None:
        records = written.records
        self.journal.append_batch(batch_id, records)
        if self.on_batch is not None:
            tokens = sum(record["n_new"] for record in records)
            self.on_batch(Progress(role, number, position, batches, len(records), tokens, written.seconds))

    def _record(self, ask: Ask, completion: Completion, fingerprint: str, seed: int) -> Record:
        return {
            "key": ask.key,
            "stage": self.journal.info.get("stage", self.stage),
            **ask.facts,
            "text": completion.text,
            "token_ids": list(completion.token_ids),
            "finish_reason": completion.finish_reason,
            "n_prompt": completion.prompt_tokens,
            "n_new": completion.new_tokens,
            "model": fingerprint,
            "seed": seed,
        }


@dataclass(frozen=True)
class _Written:
    """The records of a batch, and how long it took, as one process tells the others."""

    records: Sequence[Record]
    seconds: float


def _batch_id(batch: Sequence[Request]) -> str:
    return digest_of(*(request.key for request in batch))


def _round_id(number: int, group: Sequence[str]) -> str:
    return digest_of("round", number, *group)


def is_done(journal: Journal, batch_id: str, keys: Sequence[str]) -> bool:
    """Whether the journal has the batch, whole.

    Raises:
        StageError: it has some of the keys under another batch.
    """
    if journal.has_batch(batch_id):
        return True
    if any(key in journal for key in keys):
        raise _other_plan(journal)
    return False


def _other_plan(journal: Journal) -> StageError:
    return StageError(
        f"{journal.path} holds some texts of a batch and not the others, so it was written under another "
        "plan with the same digest. Open it with plan_digest of the same arguments, or delete it."
    )


def _lengths(asks: Sequence[Ask], generator: Generator) -> dict[str, int]:
    """Key -> tokens of the prompt; a conversation that is asked several times is measured once."""
    measured: dict[int, int] = {}
    for ask in asks:
        if id(ask.messages) not in measured:
            measured[id(ask.messages)] = generator.prompt_length(ask.messages)
    return {ask.key: measured[id(ask.messages)] for ask in asks}
