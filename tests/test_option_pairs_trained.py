"""Twenty pairs of an option and a type that carries it, drawn at random, really trained with both values.

What must differ is the observable of `docs/options.csv`, read as in `tests/test_every_option.py`: a curve, a weight, a
row order, a file or a call. `tests/test_option_pairs.py` looks at every pair, and trains none of them.
"""

import hashlib
from pathlib import Path
from typing import Any

import pytest

from stagekit import TrainingPipeline
from stagekit.adapters import METHODS
from tests.every_option import Case
from tests.option_pairs import Place, write_files
from tests.test_every_option import CASES, SPIES, spies  # noqa: F401 (a fixture that runs by itself)
from tests.test_option_pairs import APPLYING, BESIDE, HERE, ids


SEED = 2026
COUNT = 20

MEASURES_WHAT_WAS_TRAINED = {("is_evaluation_only", "reward"), ("is_evaluation_only", "process_reward")}
"""They need a reward model that is there: see `tests/adapters/test_reward.py` and `test_process_reward.py`."""

TRAINABLE = [
    (name, kind)
    for name, kind in APPLYING
    if METHODS[kind].trains and name in CASES and (name, kind) not in MEASURES_WHAT_WAS_TRAINED
]
"""fp16's loss scale is none of them: it needs a GPU."""

OF_EVERY_TYPE = {"metrics_to_track", "preference_label_smoothing"}
"""Options whose values in `test_every_option` are of one type only."""

LENGTHS = {"reward": 30, "process_reward": 12}
"""A `max_length` that cuts or leaves out some of the type's rows, where that of the other types takes none or all."""

BASE = {"max_steps": 3, "batch_size": 4, "logging_steps": 1, "learning_rate": 1e-3}


def rank(pair: tuple[str, str]) -> str:
    """A place in a random order that the seed decides, and no other pair: a new option draws few new pairs."""
    return hashlib.sha256(f"{SEED} {pair[0]} {pair[1]}".encode()).hexdigest()


DRAWN = sorted(TRAINABLE, key=rank)[:COUNT]


def case_to_train(name: str, kind: str) -> Case:
    known = CASES[name]
    values = HERE[name] if name in OF_EVERY_TYPE else known
    trains = {} if name == "is_evaluation_only" else BASE
    second = {"options": {"max_length": LENGTHS[kind]}} if name == "options" and kind in LENGTHS else values.b
    return Case(values.a, second, known.observe, {**trains, **BESIDE.get((name, kind), values.shared)}, kind)


@pytest.fixture
def place(tmp_path: Path, tiny_model_path: str, sft_rows: list[Any], preference_rows: list[Any]) -> Place:
    return Place(tmp_path / "run", tiny_model_path, write_files(tmp_path, sft_rows, preference_rows))


def observed(place: Place, case: Case, given: Any, label: str) -> Any:
    """What is to be seen of a run of the stage, and of one after it where the case needs that."""
    stages = [place.stage(case.kind, case, given)]
    if case.shared.get("then"):
        stages.append(place.stage(case.kind, case, {}, name="next"))
    folder = place.folder / label
    SPIES.update(dict.fromkeys(SPIES, 0))
    several = any(one.distributed_strategy != "none" for one in stages)
    pipeline = TrainingPipeline(name="t", model=place.model, output_dir=folder, stages=tuple(stages))
    pipeline.run(quiet=True, isolate=several)
    (first,) = folder.glob("01-*")
    return case.observe(first)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), DRAWN, ids=ids(DRAWN))
def test_a_trained_pair_shows_which_value_it_was_trained_with(
    name: str, kind: str, place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    case = case_to_train(name, kind)
    first, second = observed(place, case, case.a, "a"), observed(place, case, case.b, "b")
    with capsys.disabled():
        print(f"\n{name}-{kind}", end=" ")
    assert first != second, f"{dict(case.a)} and {dict(case.b)} both gave {str(first)[:300]}"


def test_the_drawn_pairs_are_of_many_options_and_types() -> None:
    assert len(set(DRAWN)) == COUNT
    assert len({name for name, _ in DRAWN}) > COUNT / 2
    assert len({kind for _, kind in DRAWN}) > 4
