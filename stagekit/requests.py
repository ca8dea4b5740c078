"""What is asked of a generator, what it answers, and how requests are put into batches. Imports no torch."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable


Message = dict[str, str]
FinishReason = Literal["stop", "length", "error"]


@dataclass(frozen=True)
class Request:
    """One text wanted: the answer to `messages`, of at most `max_new_tokens`. `key` names it in plan and journal.

    `conversation` names that of which it is a turn, for generators that are `remembering`.
    """

    key: str
    messages: tuple[Message, ...]
    max_new_tokens: int
    conversation: str = field(default="", kw_only=True)


@dataclass(frozen=True)
class Completion:
    """One text generated.

    `token_ids` are the new tokens without EOS and padding. `finish_reason` is "stop" if and only if an EOS ended the
    text; "length": it was cut at `max_new_tokens`; "error": the back end gave nothing to use. A back end that tells no
    token ids leaves them empty and may say in `counted` how many there were.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    counted: int | None = None

    @property
    def new_tokens(self) -> int:
        """How many tokens the text has."""
        return len(self.token_ids) if self.counted is None else self.counted


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: `temperature` 0 is greedy, `top_k` 0 and `top_p` 1 are off.

    `batch_tokens` bounds a batch's padded size in tokens. It is for whoever plans the batches: a generator runs the
    batch that it is given.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    batch_tokens: int = 16384


@runtime_checkable
class Generator(Protocol):
    """What writes texts: a model with its tokenizer and sampling, or a script in tests."""

    @property
    def fingerprint(self) -> str:
        """Names weights, tokenizer and sampling; equal fingerprints write equal texts for equal seeds."""

    @property
    def context_length(self) -> int | None:
        """The most tokens of prompt and answer together; None: no limit known."""

    def prompt_length(self, messages: Sequence[Message]) -> int:
        """How many tokens `messages` take, with the generation prompt."""

    def generate(self, requests: Sequence[Request], seed: int) -> list[Completion]:
        """Answer one batch, in the order of the requests. The same batch and seed give the same answers."""


@runtime_checkable
class Remembers(Protocol):
    """A generator that can keep what it has read of a conversation."""

    def remembering(self) -> AbstractContextManager[None]:
        """While this is open, a request whose `conversation` was gone on with before reads only what is new in it."""


@contextmanager
def remembering(*generators: Generator) -> Iterator[None]:
    """The turns of a batch of conversations: while this is open, generators that can do not read anything twice.

    The others answer turn by turn. All is forgotten at the end. A resumed run writes the same texts where the same
    requests are asked in the same order from opening to closing: in other batches, numbers differ in the last bits.
    """
    with ExitStack() as stack:
        for generator in {id(one): one for one in generators}.values():
            if isinstance(generator, Remembers):
                stack.enter_context(generator.remembering())
        yield


class ScriptedGenerator:
    """A generator that answers by a function; for tests and for replaying recorded texts.

    A string is a finished answer; a `Completion` is passed on as it is. A token is a word. `calls` keeps the messages
    of every batch.
    """

    def __init__(
        self,
        reply: Callable[[tuple[Message, ...]], str | Completion],
        fingerprint: str = "scripted",
        context_length: int | None = None,
    ) -> None:
        """Answer by `reply`; `context_length` is in words."""
        self.reply = reply
        self.fingerprint = fingerprint
        self.context_length = context_length
        self.calls: list[list[tuple[Message, ...]]] = []

    def prompt_length(self, messages: Sequence[Message]) -> int:
        """The number of words, and one for each message's role."""
        return sum(1 + len(message["content"].split()) for message in messages)

    def generate(self, requests: Sequence[Request], seed: int) -> list[Completion]:
        """The replies to one batch; `seed` has no effect."""
        self.calls.append([request.messages for request in requests])
        return [self._complete(request) for request in requests]

    def _complete(self, request: Request) -> Completion:
        reply = self.reply(request.messages)
        if isinstance(reply, Completion):
            return reply
        words = tuple(range(len(reply.split())))
        return Completion(reply, words, "stop", self.prompt_length(request.messages))


def plan_batches(
    requests: Sequence[Request], lengths: Mapping[str, int], batch_tokens: int
) -> list[tuple[Request, ...]]:
    """Put requests into batches: longest first, so that a memory failure comes first and padding is small.

    A batch's cost is rows * (longest prompt + most new tokens) and stays within `batch_tokens`; a request that is
    larger alone is a batch of its own. Depends on nothing but the arguments, not even on the order of `requests`.

    Args:
        lengths: key -> tokens of the request's prompt.
    """
    batches: list[tuple[Request, ...]] = []
    rows: list[Request] = []
    longest = most_new = 0
    for request in sorted(requests, key=lambda request: (-lengths[request.key], request.key)):
        longest_with = max(longest, lengths[request.key])
        most_new_with = max(most_new, request.max_new_tokens)
        if rows and (len(rows) + 1) * (longest_with + most_new_with) > batch_tokens:
            batches.append(tuple(rows))
            rows, longest_with, most_new_with = [], lengths[request.key], request.max_new_tokens
        rows.append(request)
        longest, most_new = longest_with, most_new_with
    return [*batches, tuple(rows)] if rows else batches
