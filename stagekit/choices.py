"""Which of two choices a judge would say next, and how sure it is: asked of a model, a server, or a function.

One forward pass per question, no text is written. Imports no torch; the model's part is `choosing.py`.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from stagekit.backends import ServerGenerator
from stagekit.errors import StageError, StagekitError
from stagekit.options import function_name
from stagekit.requests import Completion, Message, Request, ScriptedGenerator
from stagekit.scorers import FunctionScorer


TOP_LOGPROBS = 20
"""Next tokens that a server is asked for; OpenAI's interface allows no more."""


@dataclass(frozen=True)
class Comparison:
    """Two responses to a conversation, in the order in which they are shown, and the principle to compare them by."""

    conversation: tuple[Message, ...]
    first: str
    second: str
    principle: str


@dataclass(frozen=True, kw_only=True)
class Question(Request):
    """Which of two `choices` comes next after `messages`: the first stands for the first response of `comparison`."""

    choices: tuple[str, str]
    comparison: Comparison


@dataclass(frozen=True)
class Choice:
    """What came next.

    Attributes:
        probability: of the first choice, given that it is one of the two; None: neither can be told.
        mass: probability of either of the two: near 0 the judge would have said something else. None: not known.
    """

    probability: float | None
    mass: float | None
    prompt_tokens: int


@runtime_checkable
class Chooser(Protocol):
    """What answers questions with a probability."""

    @property
    def fingerprint(self) -> str:
        """Names weights and tokenizer, or the function; equal fingerprints answer the same."""

    @property
    def context_length(self) -> int | None:
        """The most tokens of a prompt; None: no limit known."""

    def prompt_length(self, messages: Sequence[Message]) -> int:
        """How many tokens `messages` take, with the generation prompt."""

    def choose(self, questions: Sequence[Question]) -> list[Choice]:
        """Answer one batch, in the order of the questions."""


class ScriptedChooser:
    """A scripted generator as a judge: the choice that its reply begins with is certain."""

    def __init__(self, generator: ScriptedGenerator) -> None:
        """Ask `generator`, whose replies are texts."""
        self._generator = generator
        self.fingerprint = generator.fingerprint
        self.context_length = generator.context_length

    def prompt_length(self, messages: Sequence[Message]) -> int:
        """As the generator counts."""
        return self._generator.prompt_length(messages)

    def choose(self, questions: Sequence[Question]) -> list[Choice]:
        """The replies to one batch."""
        replies = self._generator.generate(questions, 0)
        return [_said(reply, question) for reply, question in zip(replies, questions, strict=True)]


class FunctionChooser:
    """A function `f(prompts, first, second) -> list[float]` as a judge: the probability that the first response is the
    better one, for each prompt (a conversation). It gets `principles` too where it has such an argument."""

    context_length: int | None = None

    def __init__(self, function: Callable[..., Any]) -> None:
        """Ask `function`."""
        self._function = function
        self.fingerprint = FunctionScorer(function).fingerprint
        parameters = inspect.signature(function).parameters.values()
        takes_all = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters)
        self._wants_principles = takes_all or any(one.name == "principles" for one in parameters)

    def prompt_length(self, messages: Sequence[Message]) -> int:
        """The number of words: enough to make batches by."""
        return sum(1 + len(message["content"].split()) for message in messages)

    def choose(self, questions: Sequence[Question]) -> list[Choice]:
        """One call for the batch.

        Raises:
            StageError: the function raised, or gave something else than a probability for each.
        """
        asked = [question.comparison for question in questions]
        prompts = [list(one.conversation) for one in asked]
        more = {"principles": [one.principle for one in asked]} if self._wants_principles else {}
        name = function_name(self._function)
        try:
            given = self._function(prompts, [one.first for one in asked], [one.second for one in asked], **more)
        except StagekitError:
            raise
        except Exception as error:
            raise StageError(
                f"the judge {name} raised {type(error).__name__}: {error}, on {len(asked)} pairs, the first: prompt "
                f"{prompts[0]!r}, responses {asked[0].first!r} and {asked[0].second!r}"
            ) from error
        if not hasattr(given, "__len__") or len(given) != len(asked):
            raise StageError(f"the judge {name} gave {given!r} for {len(asked)} pairs; it gives a number for each")
        lengths = (self.prompt_length(question.messages) for question in questions)
        return [
            Choice(_probability(number, one, name), None, length)
            for number, one, length in zip(given, asked, lengths, strict=True)
        ]


class ServerChooser:
    """An OpenAI-compatible server as a judge, by the log-probabilities of its first token.

    A token counts for the choice that alone begins with it. A choice that is not among the likeliest tokens is taken
    to be as likely as the last of them: an upper bound.
    """

    def __init__(self, server: ServerGenerator) -> None:
        """Ask `server`, which must give `logprobs`."""
        self._server = server
        self.fingerprint = f"logprobs {server.fingerprint}"
        self.context_length = server.context_length

    def prompt_length(self, messages: Sequence[Message]) -> int:
        """About how many tokens `messages` take."""
        return self._server.prompt_length(messages)

    def choose(self, questions: Sequence[Question]) -> list[Choice]:
        """Answer one batch.

        Raises:
            StageError: the server gives no log-probabilities.
        """
        with ThreadPoolExecutor(max_workers=self._server.parallel) as pool:
            return list(pool.map(self._choose, questions))

    def _choose(self, question: Question) -> Choice:
        server = self._server
        body = {
            "model": server.model,
            "messages": list(question.messages),
            "max_tokens": 1,
            "temperature": 1.0,
            "top_p": 1.0,
            "logprobs": True,
            "top_logprobs": TOP_LOGPROBS,
        }
        answer = server.ask(body)
        length = server.prompt_length(question.messages)
        if answer is None:
            return Choice(None, None, length)
        try:
            (token,) = answer["choices"][0]["logprobs"]["content"]
            likeliest = [(str(one["token"]), float(one["logprob"])) for one in token["top_logprobs"]]
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise StageError(
                f"{server.url} gives no log-probabilities (logprobs, top_logprobs), so it cannot judge; start it so "
                "that it does, or name a model as the judge"
            ) from error
        usage = answer.get("usage") or {}
        return _of_tokens(likeliest, question.choices, int(usage.get("prompt_tokens", length)))


def choice_of(token: str, choices: tuple[str, str]) -> int | None:
    """The choice that alone begins with the text of a token, white space aside; None where there is none such."""
    text = token.strip()
    begun = [place for place, choice in enumerate(choices) if text and choice.startswith(text)]
    return begun[0] if len(begun) == 1 else None


def _of_tokens(likeliest: Sequence[tuple[str, float]], choices: tuple[str, str], prompt_tokens: int) -> Choice:
    sums = [0.0, 0.0]
    for token, logprob in likeliest:
        place = choice_of(token, choices)
        if place is not None:
            sums[place] += math.exp(logprob)
    if not any(sums):
        return Choice(None, 0.0, prompt_tokens)
    bound = math.exp(min(logprob for _, logprob in likeliest))
    first, second = (mass or bound for mass in sums)
    return Choice(first / (first + second), min(1.0, sum(sums)), prompt_tokens)


def _said(reply: Completion, question: Question) -> Choice:
    begun = [place for place, choice in enumerate(question.choices) if reply.text.strip().startswith(choice)]
    if len(begun) != 1:
        return Choice(None, 0.0, reply.prompt_tokens)
    return Choice(1.0 - begun[0], 1.0, reply.prompt_tokens)


def _probability(given: Any, comparison: Comparison, name: str) -> float:
    try:
        number = float(given)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 <= number <= 1:
        raise StageError(
            f"the judge {name} gave {given!r} for the responses {comparison.first!r} and {comparison.second!r}; it "
            "gives the probability that the first is better: 1, 0, or between"
        )
    return number


def facts_of(question: Question, choice: Choice) -> Mapping[str, Any]:
    """What a journal keeps of an answer: the likelier choice as `text`, `probability` of the first, `mass`."""
    likelier = None if choice.probability is None else question.choices[choice.probability < 0.5]
    return {
        "text": likelier or "",
        "finish_reason": "error" if likelier is None else "stop",
        "probability": choice.probability,
        "mass": choice.mass,
        "n_prompt": choice.prompt_tokens,
        "n_new": 0,
    }
