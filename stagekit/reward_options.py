"""What can be known to be wrong with a declared reward before anything is loaded: options, packages, columns."""

import importlib.util
import inspect
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from pydantic import TypeAdapter, ValidationError

from stagekit import trl_rewards
from stagekit.errors import Problem
from stagekit.groups import RewardSource, is_function
from stagekit.options import message_of, nearest


KIT = "stagekit.verifiers:"
_TRL = f"{trl_rewards.MODULE}:"


def reward_problems(rewards: Sequence[RewardSource]) -> Iterable[Problem]:
    """Options that a reward has no use for, or cannot have that value; paths relative to the stage."""
    for path, reward in _by_path(rewards):
        if reward.options and not is_function(reward.source):
            yield Problem(f"{path}.options", "are arguments of a function; a reward model has none")
        if _named(reward, KIT):
            yield from _of_verifier(_named(reward, KIT), reward.options, path)
        elif _named(reward, _TRL):
            yield from _of_trl(_named(reward, _TRL), reward.options, path)


def problems_on_this_machine(rewards: Sequence[RewardSource]) -> Iterable[Problem]:
    """Packages that are not installed, a sandbox that the kernel refuses; paths relative to the stage."""
    for path, reward in _by_path(rewards):
        verifier, trl_name = _named(reward, KIT), _named(reward, _TRL)
        compares = verifier == "maths" or trl_name in trl_rewards.COMPARERS
        if compares and importlib.util.find_spec("math_verify") is None:
            yield Problem(
                path,
                f"{verifier or trl_name!r} needs math-verify, which is not installed; run "
                'pip install "trl-stagekit[verifiers]"',
            )
        if verifier == "python_tests" and reward.options.get("unsafe") is not True:
            from stagekit import sandbox

            refused = sandbox.refused()
            if refused:
                yield Problem(path, str(sandbox.Refused(refused)))


def columns_of(rewards: Sequence[RewardSource]) -> Iterator[str]:
    """The columns of the data that the rewards compare with."""
    for _, reward in _by_path(rewards):
        verifier = _named(reward, KIT)
        if verifier and "column" in (parameters := _parameters(verifier)):
            yield str(reward.options.get("column", parameters["column"].default))
        if _named(reward, _TRL) in trl_rewards.COMPARERS:
            yield "solution"


def counts_tokens(reward: RewardSource) -> bool:
    """Whether a reward looks at the tokens of a completion, which only a trainer that samples has."""
    return _named(reward, _TRL) in trl_rewards.MAKERS


def _by_path(rewards: Sequence[RewardSource]) -> Iterator[tuple[str, RewardSource]]:
    for number, reward in enumerate(rewards):
        yield f"method.reward.{number}" if len(rewards) > 1 else "method.reward", reward


def _named(reward: RewardSource, module: str) -> str:
    """The name of a reward within a module; empty where it is none of that module's."""
    source = reward.source if isinstance(reward.source, str) else ""
    return source.removeprefix(module) if source.startswith(module) else ""


def _parameters(verifier: str) -> Mapping[str, inspect.Parameter]:
    """The options of a verifier; none where there is no such verifier."""
    from stagekit import verifiers

    function = getattr(verifiers, verifier, None)
    if function is None:
        return {}
    found = inspect.signature(function).parameters
    return {name: one for name, one in found.items() if one.kind is inspect.Parameter.KEYWORD_ONLY}


def _of_verifier(verifier: str, options: Mapping[str, Any], path: str) -> Iterable[Problem]:
    parameters = _parameters(verifier)
    if not parameters:
        return
    yield from _unknown(verifier, options, parameters, path)
    from stagekit import verifiers

    hints = typing.get_type_hints(getattr(verifiers, verifier), include_extras=True)
    for name, parameter in parameters.items():
        value = options.get(name, parameter.default)
        try:
            TypeAdapter(hints[name]).validate_python(value, strict=True)
        except ValidationError as error:
            for line in error.errors(include_url=False):
                yield Problem(f"{path}.options.{name}", message_of(line))


def _of_trl(name: str, options: Mapping[str, Any], path: str) -> Iterable[Problem]:
    try:
        known = trl_rewards.options_of(name)
    except ModuleNotFoundError as error:
        yield Problem(path, str(error))
        return
    yield from _unknown(name, options, known, path)
    for option, needed in known.items():
        if needed and option not in options:
            yield Problem(f"{path}.options.{option}", "missing; it has no default")


def _unknown(name: str, options: Iterable[str], known: Iterable[str], path: str) -> Iterable[Problem]:
    for option in sorted(set(options) - set(known)):
        close = nearest(option, known)
        hint = f"; did you mean {close!r}?" if close else f"; it has {', '.join(sorted(known)) or 'none'}"
        yield Problem(f"{path}.options.{option}", f"{name} has no such option{hint}")
