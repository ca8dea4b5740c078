"""The public names, and that everything public says what it is."""

import importlib
import inspect
from types import ModuleType

import pytest
from pydantic import BaseModel

import stagekit
from stagekit import (
    arguments,
    checks,
    digest,
    errors,
    flat,
    groups,
    ledger,
    measures,
    options,
    parity,
    parse,
    pending,
    pipeline,
    selectors,
    stage,
    stage_options,
    templates,
    trl_fields,
)
from stagekit.adapters import (
    METHODS,
    ai_feedback,
    base,
    constitutional,
    custom,
    distillation,
    dpo,
    evaluation,
    grpo,
    judged,
    kto,
    online_dpo,
    own_pairs,
    ppo,
    process_reward,
    reference_free,
    references,
    reinforcement,
    rejection_sampling,
    reward,
    rloo,
    scoring,
    self_play,
    self_rewarding,
    sft,
    synthetic_data,
)


DESCRIBING = (
    arguments, checks, digest, errors, flat, groups, ledger, measures, options, parity, parse, pending, pipeline,
    selectors, stage, stage_options, trl_fields, base, constitutional, custom, distillation, dpo, evaluation, grpo,
    kto, online_dpo, ppo, process_reward, reference_free, references, reinforcement, rejection_sampling, reward, rloo,
    scoring, self_play, self_rewarding, sft, synthetic_data, ai_feedback, judged, own_pairs,
    templates,
)  # fmt: skip


def test_all_is_the_public_names_in_order() -> None:
    assert sorted(stagekit.__all__) == sorted(stagekit._HOME)
    assert len(set(stagekit.__all__)) == len(stagekit.__all__)
    assert dir(stagekit) == sorted(stagekit.__all__)


@pytest.mark.parametrize("name", stagekit.__all__)
def test_a_public_name_loads_from_its_home_and_says_what_it_is(name: str) -> None:
    found = getattr(stagekit, name)
    home = importlib.import_module(f"stagekit.{stagekit._HOME[name]}")
    assert found is getattr(home, name)
    assert found.__doc__


def test_a_name_that_is_not_public_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'stagekit' has no attribute 'Nope'"):
        stagekit.Nope  # noqa: B018


def option_classes() -> list[type[BaseModel]]:
    found: list[type[BaseModel]] = []
    waiting: list[type[BaseModel]] = [options.Options]
    while waiting:
        cls = waiting.pop()
        waiting += cls.__subclasses__()
        if cls.__module__.startswith("stagekit."):
            found.append(cls)
    return sorted(set(found), key=lambda cls: cls.__qualname__)


@pytest.mark.parametrize("cls", option_classes(), ids=lambda cls: cls.__qualname__)
def test_every_option_has_a_docstring_of_a_sentence(cls: type[BaseModel]) -> None:
    assert inspect.getdoc(cls)
    for name, field in cls.model_fields.items():
        assert field.description and field.description.strip().endswith((".", ")", "`")), f"{cls.__name__}.{name}"


@pytest.mark.parametrize("module", DESCRIBING, ids=lambda module: module.__name__)
def test_everything_public_in_the_describing_half_has_a_docstring(module: ModuleType) -> None:
    assert module.__doc__
    for name, found in vars(module).items():
        if name.startswith("_") or getattr(found, "__module__", None) != module.__name__:
            continue
        if inspect.isfunction(found):
            assert found.__doc__, f"{module.__name__}.{name}"
        elif inspect.isclass(found):
            assert found.__doc__, f"{module.__name__}.{name}"
            for key, method in vars(found).items():
                if inspect.isfunction(method) and not key.startswith("_"):
                    assert method.__doc__, f"{module.__name__}.{name}.{key}"


@pytest.mark.parametrize("kind", sorted(METHODS))
def test_a_stage_type_says_what_it_does_in_one_line(kind: str) -> None:
    summary = METHODS[kind].summary
    assert summary and "\n" not in summary and not summary.endswith(".")
