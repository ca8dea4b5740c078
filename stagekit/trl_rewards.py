"""The reward functions that TRL brings along, by name: what they take, and how they are called here.

What they take is read from TRL's source, since importing it takes ten seconds.
"""

import ast
import functools
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from stagekit.errors import ConfigError


MODULE = "trl.rewards"
MAKERS = frozenset({"get_cosine_scaled_reward", "get_repetition_penalty_reward", "get_soft_overlong_punishment"})
"""Those that make a reward function of their options. What they make counts tokens."""
COMPARERS = frozenset({"accuracy_reward", "reasoning_accuracy_reward", "get_cosine_scaled_reward"})
"""Those that compare with the column `solution`, by math-verify."""
_GIVEN = frozenset({"prompts", "completions", "completion_ids", "solution", "log_extra", "log_metric", "kwargs"})
"""Arguments that the trainer gives, or the data."""


@cache
def options_of(name: str) -> Mapping[str, bool]:
    """The options of one of TRL's reward functions, each with whether it has to be given.

    Raises:
        ModuleNotFoundError: trl is not installed, or has no such function.
    """
    spec = importlib.util.find_spec("trl")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("trl is not installed")
    for file in sorted(Path(spec.submodule_search_locations[0], "rewards").glob("*.py")):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.name == name:
                names = [argument.arg for argument in node.args.args]
                needed = names[: len(names) - len(node.args.defaults)]
                return {one: one in needed for one in names if one not in _GIVEN}
    raise ModuleNotFoundError(f"{MODULE} has no {name}; this version of trl is not supported")


def made(name: str, function: Callable[..., Any], options: Mapping[str, Any]) -> Callable[..., Any]:
    """One of TRL's functions, or what it makes, with its options, for completions in either form.

    Raises:
        ConfigError: it refuses an option's value.
    """
    if name in MAKERS:
        try:
            inner, given = function(**options), {}
        except (TypeError, ValueError) as error:
            raise ConfigError(f"reward {name}: options {dict(options)!r}: {error}") from error
    else:
        inner, given = function, dict(options)

    @functools.wraps(function)
    def call(completions: Sequence[Any], **columns: Any) -> Any:
        turns = [[{"role": "assistant", "content": one}] if isinstance(one, str) else one for one in completions]
        return inner(completions=turns, **{**columns, **given})

    call.__name__ = getattr(inner, "__name__", name)
    return call
