"""Score answers: by a function with TRL's reward signature, by a reward model, or by a weighted sum of several."""

import asyncio
import inspect
import json
import math
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from stagekit.counters import digest_of
from stagekit.errors import ConfigError
from stagekit.options import function_name, is_function_name
from stagekit.requests import Message
from stagekit.rewards import ModelReward, ProcessReward, Watched, as_reward, model_reward


Prompt = str | Sequence[Message]
"""A prompt as the data have it: a text, or a conversation."""


@runtime_checkable
class Scorer(Protocol):
    """What gives answers their reward."""

    @property
    def fingerprint(self) -> str:
        """Names the scorer; equal fingerprints give equal rewards."""

    def score(
        self, prompts: Sequence[Prompt], completions: Sequence[str], columns: Mapping[str, Sequence[Any]]
    ) -> list[float | None]:
        """One finite reward per answer, in the order given; None where the reward does not apply to the answer.

        Args:
            columns: the data's other columns, one value per answer.

        Raises:
            StageError: the reward raised, or gave something that is no number; the message has prompt and answer.
        """


@dataclass(frozen=True)
class FunctionScorer:
    """A function `f(prompts, completions, **columns) -> list[float | None]`, as TRL's trainers call rewards.

    Where the prompts are conversations the completions are too; of the columns a function without `**kwargs` gets
    those that it names.
    """

    function: Callable[..., Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    """Arguments beside those that every reward function gets; a column of the same name does not replace them."""

    @property
    def fingerprint(self) -> str:
        """The function's name, the content of the file that holds it, and the options."""
        function = inspect.unwrap(self.function)
        code = function if hasattr(function, "__code__") else type(function)
        file = inspect.getsourcefile(code)
        content = Path(file).read_text(encoding="utf-8") if file and Path(file).is_file() else ""
        given = (
            f" {digest_of(json.dumps(dict(self.options), sort_keys=True, default=str))[:16]}" if self.options else ""
        )
        return f"{function_name(self.function)} {digest_of(content)[:16]}{given}"

    def score(
        self, prompts: Sequence[Prompt], completions: Sequence[str], columns: Mapping[str, Sequence[Any]]
    ) -> list[float | None]:
        """One call for all answers."""
        if not completions:
            return []
        answers = [_like(prompt, text) for prompt, text in zip(prompts, completions, strict=True)]
        watched = as_reward(self.function)
        watched.__name__ = function_name(self.function)
        given = watched(prompts=list(prompts), completions=answers, **{**self._wanted(columns), **self.options})
        return _waited_for(given) if inspect.iscoroutine(given) else given

    def _wanted(self, columns: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        parameters = inspect.signature(self.function).parameters.values()
        named = {parameter.name for parameter in parameters}
        takes_all = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)
        return {
            name: list(values)
            for name, values in columns.items()
            if (takes_all or name in named) and name not in self.options
        }


@dataclass
class ModelScorer:
    """A reward model by its path, of answers or of their steps, or the adapter of one.

    It reads prompt and answer through its own chat template; what exceeds its context has no reward. It is loaded for
    the first answer, in float32, and `free` gives its memory back.
    """

    path: str
    _loaded: ModelReward | ProcessReward | None = field(default=None, repr=False)

    @property
    def fingerprint(self) -> str:
        """The content of the weights."""
        from stagekit.fingerprints import model_fingerprint

        return model_fingerprint(self.path)

    def score(
        self, prompts: Sequence[Prompt], completions: Sequence[str], columns: Mapping[str, Sequence[Any]]
    ) -> list[float | None]:
        """Scores in length-sorted batches; the columns play no part."""
        from stagekit.models import device_map

        if self._loaded is None:
            self._loaded = model_reward(self.path, device_map=device_map() or "cpu")
        answers = [[{"role": "assistant", "content": text}] for text in completions]
        return Watched(self._loaded.scores, self.path)(prompts, answers)

    def free(self) -> None:
        """Give the model back."""
        self._loaded = None


@dataclass(frozen=True)
class WeightedScorer:
    """A weighted sum of scorers, over those that have a reward for the answer; None where none has, as in TRL."""

    parts: tuple[tuple[Scorer, float], ...]

    @property
    def fingerprint(self) -> str:
        """Of the parts and their weights."""
        return digest_of([[part.fingerprint, weight] for part, weight in self.parts])

    def score(
        self, prompts: Sequence[Prompt], completions: Sequence[str], columns: Mapping[str, Sequence[Any]]
    ) -> list[float | None]:
        """Every part scores all answers."""
        found = [part.score(prompts, completions, columns) for part, _ in self.parts]
        weights = [weight for _, weight in self.parts]
        sums: list[float | None] = []
        for rewards in zip(*found, strict=True):
            terms = [w * reward for w, reward in zip(weights, rewards, strict=True) if reward is not None]
            sums.append(math.fsum(terms) if terms else None)
        return sums

    def free(self) -> None:
        """Give the parts' models back."""
        for part, _ in self.parts:
            free(part)


def free(scorer: Scorer) -> None:
    """Give back what the scorer holds in memory; it is loaded again when it is asked again."""
    if isinstance(scorer, ModelScorer | WeightedScorer):
        scorer.free()


def scorer_from(reward: Any) -> Scorer:
    """The scorer that `reward` names: a scorer, a function or its name, a reward model's path, or a list of those,
    each alone (weight 1) or as a pair with its weight.

    Raises:
        ConfigError: it is none of these.
    """
    if isinstance(reward, Scorer):
        return reward
    if isinstance(reward, list | tuple) and reward:
        pairs = [one if isinstance(one, tuple) and len(one) == 2 else (one, 1.0) for one in reward]
        return WeightedScorer(tuple((scorer_from(one), float(weight)) for one, weight in pairs))
    if isinstance(reward, str | Path):
        if is_function_name(str(reward)):
            from stagekit.custom import resolve

            return FunctionScorer(resolve(str(reward)))
        from stagekit.models import local_model

        return ModelScorer(local_model(str(reward), where="reward"))
    if callable(reward) and not hasattr(reward, "config"):
        return FunctionScorer(reward)
    raise ConfigError(
        f"a reward is a function, 'package.module:function', a reward model's path, or a list of those, not {reward!r}"
    )


def _waited_for(rewards: Coroutine[Any, Any, list[float | None]]) -> list[float | None]:
    """The result of a coroutine; in a thread of its own, since a notebook's thread has a loop that runs already."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        return pool.submit(asyncio.run, rewards).result()


def _like(prompt: Prompt, text: str) -> str | list[Message]:
    """An answer in the form of its prompt."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
