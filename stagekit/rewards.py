"""What scores completions: functions that are watched, and reward models asked in batches.

A reward function is called as TRL calls it: with `prompts`, `completions`, `completion_ids`, every column of the data
as a list, and `trainer_state`, `log_extra`, `log_metric`; it returns one number per completion, or None for one that
it has nothing to say about.
"""

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from stagekit import trl_rewards
from stagekit.errors import ConfigError, StageError, StagekitError
from stagekit.groups import RewardSource, is_function


RewardFunction = Callable[..., Any]
_SHOWN = 400


class Watched:
    """A reward function whose mistakes stop the run with the prompt and completion that they happened on.

    TRL takes NaN for "no opinion" and trains on; here None is the only way to say that.

    Args:
        function: The reward function.
        name: Under which its rewards are logged. None: the function's own.
    """

    def __init__(self, function: RewardFunction, name: str | None = None) -> None:
        self.function = function
        self.__name__ = name or getattr(function, "__name__", type(function).__name__)

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        """One reward per completion.

        Raises:
            StageError: the function raised, returned another number of rewards, or one that is no finite number.
        """
        try:
            found = self.function(prompts=prompts, completions=completions, **columns)
        except StagekitError:
            raise
        except Exception as error:
            row = self._culprit(prompts, completions, columns)
            message = f"raised {type(error).__name__}: {error}"
            raise StageError(self._told(message, prompts, completions, row)) from error
        return self._numbers(found, prompts, completions)

    def _culprit(self, prompts: Sequence[Any], completions: Sequence[Any], columns: dict[str, Any]) -> int | None:
        """The first row that the function raises on by itself; None where it raises on the batch alone."""
        for row in range(len(prompts)):
            one = {
                key: value[row : row + 1] if isinstance(value, list) and len(value) == len(prompts) else value
                for key, value in columns.items()
            }
            try:
                self.function(prompts=prompts[row : row + 1], completions=completions[row : row + 1], **one)
            except Exception:  # told by the caller, with the row that is returned
                return row
        return None

    def _numbers(self, found: Any, prompts: Sequence[Any], completions: Sequence[Any]) -> list[float | None]:
        try:
            rewards = list(found)
        except TypeError:
            raise StageError(f"reward {self.__name__!r} returned {found!r}, not one number per completion") from None
        if len(rewards) != len(prompts):
            raise StageError(
                f"reward {self.__name__!r} returned {len(rewards)} rewards for {len(prompts)} completions; it returns "
                "one each, None where it has nothing to say"
            )
        numbers: list[float | None] = []
        for row, reward in enumerate(rewards):
            value = _number(reward)
            if reward is not None and (value is None or not math.isfinite(value)):
                raise StageError(self._told(f"gave {reward!r}, no finite number", prompts, completions, row))
            numbers.append(value)
        return numbers

    def _told(self, what: str, prompts: Sequence[Any], completions: Sequence[Any], row: int | None) -> str:
        if row is None:
            return f"reward {self.__name__!r} {what}; on single completions it does not, so it is the whole batch"
        return (
            f"reward {self.__name__!r} {what}\n  prompt: {_shown(prompts[row])}\n  completion: "
            f"{_shown(completions[row])}"
        )


class AsyncWatched(Watched):
    """`Watched` for a coroutine function."""

    async def __call__(  # type: ignore[override]
        self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any
    ) -> list[float | None]:
        """As `Watched`; the row is not looked for, since asking again can cost money."""
        try:
            found = await self.function(prompts=prompts, completions=completions, **columns)
        except StagekitError:
            raise
        except Exception as error:
            message = f"raised {type(error).__name__}: {error}"
            raise StageError(self._told(message, prompts, completions, None)) from error
        return self._numbers(found, prompts, completions)


class _OfModel:
    """A model that gives rewards, as a reward function."""

    __name__: str

    def scores(self, prompts: Sequence[Any], completions: Sequence[Any]) -> list[float | None]:
        """The score of each completion; None for one that does not fit in the model's context."""
        raise NotImplementedError

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        """The score of each completion.

        Raises:
            StageError: one does not fit in the reward model's context.
        """
        found = self.scores(prompts, completions)
        if None in found:
            row = found.index(None)
            raise StageError(
                f"reward {self.__name__!r}: a completion does not fit in the reward model's context; sample fewer "
                f"tokens\n  prompt: {_shown(prompts[row])}\n  completion: {_shown(completions[row])}"
            )
        return found


class ModelReward(_OfModel):
    """A reward model as a reward function: its own tokenizer, in batches by tokens, without gradients.

    TRL would run it on a whole rollout at once, load it with the policy's arguments and, for an adapter, fail.

    Args:
        source: A folder or hub id that `load_reward_model` takes, or a model with one label.
        tokenizer: Of a model that was handed over; None: the one of its folder.
        name: Under which its rewards are logged.
        batch_tokens: Padded size of a batch.
        device_map: Where a model is loaded to, as in transformers. None: the device of the trainer.
    """

    def __init__(
        self,
        source: Any,
        *,
        tokenizer: Any = None,
        name: str | None = None,
        batch_tokens: int = 16384,
        device_map: Any = None,
    ) -> None:
        from stagekit.reward_models import load_reward_model

        if isinstance(source, str | Path):
            self.model, self.tokenizer = load_reward_model(str(source), device_map=device_map or {"": _device()})
            self.__name__ = name or Path(source).name
        else:
            self.model, self.tokenizer = source.eval().to(_device()), tokenizer or _tokenizer_of(source)
            self.__name__ = name or Path(source.config._name_or_path).name or type(source).__name__
        self.batch_tokens = batch_tokens

    def scores(self, prompts: Sequence[Any], completions: Sequence[Any]) -> list[float | None]:
        """The score of each completion; None for one that does not fit in the model's context."""
        from stagekit.reward_models import score

        return score(self.model, self.tokenizer, prompts, completions, batch_tokens=self.batch_tokens)


class ProcessReward(_OfModel):
    """A process reward model as a reward function: the probability of the completion's weakest step.

    Args:
        source: A folder or hub id that `load_process_reward_model` takes.
        name: Under which its rewards are logged.
        batch_tokens: Padded size of a batch.
        device_map: As of `ModelReward`.

    Source: huggingface.co/papers/2305.20050, section 2.6, which multiplies the steps instead of taking the least.
    """

    def __init__(
        self, source: str | Path, *, name: str | None = None, batch_tokens: int = 16384, device_map: Any = None
    ) -> None:
        from stagekit.reward_models import load_process_reward_model

        self.model, self.tokenizer = load_process_reward_model(str(source), device_map=device_map or {"": _device()})
        self.separator = getattr(self.model.config, "step_separator", "\n")
        self.batch_tokens = batch_tokens
        self.__name__ = name or Path(source).name

    def scores(self, prompts: Sequence[Any], completions: Sequence[Any]) -> list[float | None]:
        """The probability of the weakest step of each completion; 0 for one without a step, None for one that does
        not fit in the model's context."""
        from stagekit.trainers.process_reward import chances_of_steps

        texts = map(text_of, completions)
        steps = [[step for step in text.split(self.separator) if step.strip()] for text in texts]
        found = chances_of_steps(self.model, self.tokenizer, prompts, steps, self.separator, self.batch_tokens)
        return [None if chances is None else min(chances, default=0.0) for chances in found]


def text_of(completion: Any) -> str:
    """A completion as text: itself, or what the assistant's turns say."""
    return completion if isinstance(completion, str) else "".join(str(turn["content"]) for turn in completion)


def reward_of(declared: RewardSource, place: Any) -> Watched:
    """A declared reward as a watched function.

    Args:
        declared: Its name and options.
        place: The function, or the folder of the reward model, or the live model.
    """
    if is_function(place):
        watched = as_reward(function_of(declared, place))
        watched.__name__ = declared.name or watched.__name__
        return watched
    stage = str(declared.source).removeprefix("stage:")
    name = declared.name or (stage if stage != str(declared.source) else None)
    return Watched(model_reward(place, name))


def model_reward(place: Any, name: str | None = None, **loading: Any) -> ModelReward | ProcessReward:
    """The reward model in a folder, or a live one, as a reward function: of answers, or of their steps.

    Args:
        place: A folder, a hub id, or a live model.
        name: Under which its rewards are logged.
        loading: More arguments of the two.
    """
    if isinstance(place, str) and _gives(place, "ForTokenClassification", "TOKEN_CLS"):
        return ProcessReward(place, name=name, **loading)
    return ModelReward(place, name=name, **loading)


def function_of(declared: RewardSource, function: RewardFunction) -> RewardFunction:
    """A declared function with its options; one of TRL's takes completions in either form, too.

    Raises:
        ConfigError: the function has no such option.
    """
    module, _, name = str(declared.source).partition(":")
    if isinstance(declared.source, str) and module == trl_rewards.MODULE:
        return trl_rewards.made(name, function, declared.options)
    return with_options(function, declared.options) if declared.options else function


def with_options(function: RewardFunction, options: Mapping[str, Any]) -> RewardFunction:
    """The function with some of its arguments given; a column of the data of the same name does not replace them.

    Raises:
        ConfigError: the function has no such argument.
    """
    strange = unknown_options(function, options)
    name = getattr(function, "__name__", type(function).__name__)
    if strange:
        raise ConfigError(f"reward {name!r}: options.{strange[0]}: the function has no such argument")
    if inspect.iscoroutinefunction(function):

        @functools.wraps(function)
        async def later(**given: Any) -> Any:
            return await function(**{**given, **options})

        return later

    @functools.wraps(function)
    def call(**given: Any) -> Any:
        return function(**{**given, **options})

    return call


def unknown_options(function: RewardFunction, options: Mapping[str, Any]) -> list[str]:
    """Options that are no arguments of the function by name: it would take them for columns, and not look at them."""
    return sorted(set(options) - set(inspect.signature(function).parameters))


def reads_the_same_tokens(place: Any, tokenizer: Any) -> bool:
    """Whether a reward model has the policy's vocabulary, so that a value model can start from it."""
    from stagekit.models import load_tokenizer

    if not isinstance(place, str) or _gives(place, "ForTokenClassification", "TOKEN_CLS"):
        return False
    return bool(load_tokenizer(place).get_vocab() == tokenizer.get_vocab())


def _gives(place: str, suffix: str, task: str) -> bool:
    """Whether a folder or hub id is a model of a kind, by its config or its adapter's."""
    from stagekit.rows import json_object

    adapter = Path(place, "adapter_config.json")
    if adapter.is_file():
        return json_object(adapter).get("task_type") == task
    from transformers import AutoConfig

    names = AutoConfig.from_pretrained(place, trust_remote_code=False).architectures or []
    return any(name.endswith(suffix) for name in names)


def as_reward(source: Any, tokenizer: Any = None) -> Watched:
    """A function, a reward model, or the name of one, as a watched reward function."""
    if isinstance(source, Watched):
        return source
    if isinstance(source, str | Path) or (hasattr(source, "config") and hasattr(source, "parameters")):
        return Watched(ModelReward(source, tokenizer=tokenizer))
    if not callable(source):
        raise ConfigError(f"reward: {source!r} is no function, no reward model and no name of one")
    asynchronous = inspect.iscoroutinefunction(source) or inspect.iscoroutinefunction(source.__call__)
    return AsyncWatched(source) if asynchronous else Watched(source)


def _device() -> Any:
    """Where the trainer of this process is."""
    from accelerate import PartialState

    return PartialState().device


def _tokenizer_of(model: Any) -> Any:
    from stagekit.models import load_tokenizer

    return load_tokenizer(model.config._name_or_path)


def _number(reward: Any) -> float | None:
    """A reward as a float; None for what is no number."""
    if isinstance(reward, str) or reward is None:
        return None
    try:
        return float(reward)
    except (TypeError, ValueError):
        return None


def _shown(text: Any) -> str:
    shown = text if isinstance(text, str) else " / ".join(f"{turn['role']}: {turn['content']}" for turn in text)
    return shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}... ({len(shown)} characters)"
