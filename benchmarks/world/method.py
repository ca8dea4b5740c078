"""What a row of the table is: a method, its settings, its data, and what it is compared with."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.world import rows
from benchmarks.world.world import World


Data = Mapping[str, list[rows.Row]]
MakeData = Callable[[World], Data]
Kind = Literal["policy", "reward", "process_reward", "constitutional"]
Extra = Callable[[Any, World, Path, Any], Mapping[str, Any]]
PAIRS = 1200
DEMONSTRATIONS = 1200


@dataclass(frozen=True)
class Method:
    """A row: a method with its settings.

    Attributes:
        group: rows that are run together and stand together.
        pipeline: the file in `pipelines/`, without its ending.
        data: the row's data files by name: training, validation, whatever the pipeline reads.
        assignments: `path=value`, as on stagekit's command line. In them `{name}` is the file of the data of that
            name, `{base}` the folder of the base that the seed starts from, `{teacher}` the teacher's. Without one
            that sets `training_data`, the stage named like the pipeline up to its first `_` reads `{rows}`.
        control: the row that this one must beat; None: it is a control itself.
        kind: what is measured; `policy`: the last stage's model answers the held-out questions.
        extra: what is measured besides, of the run's result, the world, the base and the setup; what it returns stands
            in the row's file. A curve for example.
        critic_errors: the scripted critic's share of wrong critiques; None: the model criticises itself.
        seeds: how many of the table's seeds it is run with.
        model: what the pipeline starts from, the base of the seed or the teacher.
        note: what to know when reading the row, without a full stop; stands below the table.
    """

    name: str
    group: str
    pipeline: str
    data: MakeData
    assignments: Sequence[str] = ()
    control: str | None = None
    kind: Kind = "policy"
    extra: Extra | None = None
    critic_errors: float | None = None
    seeds: int = 3
    model: Literal["base", "teacher"] = "base"
    note: str = ""


def demonstrations(flaws: float, n: int = DEMONSTRATIONS) -> MakeData:
    """`rows`: demonstrations of all families, of which the share `flaws` is flawed."""
    return lambda world: {"rows": rows.demonstrations(world, n, flaws)}


def pairs(noise: float, n: int = PAIRS) -> MakeData:
    """`rows`: preference pairs of all families, of which the share `noise` is turned."""
    return lambda world: {"rows": rows.preferences(world, n, noise)}


def uses_teacher(method: Method) -> bool:
    """Whether the teacher is a part of the row."""
    return method.model == "teacher" or any("{teacher}" in one for one in method.assignments)


def settings(method: Method, places: Mapping[str, Any]) -> list[str]:
    """The row's assignments with the files of its data and the models' folders."""
    given = method.assignments
    if not any("training_data" in one for one in given):
        given = (*given, f"stages.{method.pipeline.partition('_')[0]}.training_data={{rows}}")
    return [one.format(**{name: str(place) for name, place in places.items()}) for one in given]
