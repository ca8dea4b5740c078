"""Get the texts of a plan: from the journal, and the others from a generator, batch by batch. Imports no torch."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stagekit.counters import digest_of, seed_of
from stagekit.errors import Interrupted, StageError
from stagekit.journal import Journal, Record
from stagekit.requests import Completion, Generator, Message, Request, plan_batches


@dataclass(frozen=True)
class Progress:
    """A batch has been written: which phase it belongs to, how far the phase is, and what the batch cost."""

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
    """

    key: str
    messages: tuple[Message, ...]
    facts: Mapping[str, Any]


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
        found = ((ask.key, self.journal.get(ask.key)) for ask in asks)
        return {key: record for key, record in found if record is not None}

    def _generate(
        self, asks: Mapping[str, Ask], role: str, number: int, generator: Generator, max_new_tokens: int
    ) -> None:
        lengths = _lengths(asks, generator)
        limit = generator.context_length
        fitting = [key for key in asks if limit is None or lengths[key] + max_new_tokens <= limit]
        requests = [Request(key, asks[key].messages, max_new_tokens) for key in fitting]
        batches = plan_batches(requests, lengths, self.batch_tokens)
        for position, batch in enumerate(batches):
            batch_id = digest_of(*(request.key for request in batch))
            if is_done(self.journal, batch_id, [request.key for request in batch]):
                continue
            if self.should_stop is not None and self.should_stop():
                raise Interrupted(
                    f"stopped before batch {position + 1} of {len(batches)} of the {role} phase (round {number}). "
                    f"{self.journal.path} holds all texts so far; start again to go on."
                )
            start, seed = time.monotonic(), seed_of(self.seed, batch_id)
            completions = generator.generate(batch, seed)
            records = [
                self._record(asks[request.key], completion, generator.fingerprint, seed)
                for request, completion in zip(batch, completions, strict=True)
            ]
            self.journal.append_batch(batch_id, records)
            if self.on_batch is not None:
                tokens = sum(completion.new_tokens for completion in completions)
                elapsed = time.monotonic() - start
                done = position + 1
                self.on_batch(Progress(role, number, done, len(batches), len(batch), tokens, elapsed))

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


def is_done(journal: Journal, batch_id: str, keys: Sequence[str]) -> bool:
    """Whether the journal has the batch, whole.

    Raises:
        StageError: it has some of the keys under another batch.
    """
    if journal.has_batch(batch_id):
        return True
    if any(key in journal for key in keys):
        raise StageError(
            f"{journal.path} holds some texts of a batch and not the others, so it was written under another "
            "plan with the same digest. Open it with plan_digest of the same arguments, or delete it."
        )
    return False


def _lengths(asks: Mapping[str, Ask], generator: Generator) -> dict[str, int]:
    """Key -> tokens of the prompt; a conversation that is asked several times is measured once."""
    measured: dict[int, int] = {}
    for ask in asks.values():
        if id(ask.messages) not in measured:
            measured[id(ask.messages)] = generator.prompt_length(ask.messages)
    return {key: measured[id(ask.messages)] for key, ask in asks.items()}
