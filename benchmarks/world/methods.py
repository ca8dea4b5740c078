"""All rows of the table, from the modules of `groups/`.

A row is added by a module of its own: `groups/NAME.py` with `ROWS`, a tuple of `Method`, and the row's pipeline in
`pipelines/`. Nothing else is touched: the module is found by being there. Then

    python -m benchmarks.world ROW --tune 1 2 3     # settings are chosen on these seeds and the development split
    python -m benchmarks.world ROW                  # once, with the table's seeds: benchmarks/results/world/ROW.json
    python -m benchmarks.world --table              # the tables from all results

A file of results holds for one version of its row: pipeline, assignments, data and bases (and the teacher, where the
assignments name it). Another version is run anew. Rewards are in `benchmarks.world.reward`, named in a pipeline as
`benchmarks.world.reward:score`.
"""

from collections.abc import Sequence
from importlib import import_module
from pkgutil import iter_modules

from benchmarks.world import groups
from benchmarks.world.method import Method


FIRST = ("sft", "preferences", "reward_models", "constitutional")
"""Modules whose rows stand first, in this order; the others follow by name."""


def _table() -> dict[str, Method]:
    modules = sorted(module.name for module in iter_modules(groups.__path__))
    order = (*FIRST, *(name for name in modules if name not in FIRST))
    found: dict[str, Method] = {}
    for name in order:
        for method in import_module(f"{groups.__name__}.{name}").ROWS:
            if method.name in found:
                raise ValueError(f"two rows are named {method.name!r}; one of them is in groups/{name}.py")
            found[method.name] = method
    return found


METHODS = _table()
"""All rows by name."""


def named(wanted: Sequence[str]) -> list[Method]:
    """The rows of these names or groups.

    Raises:
        SystemExit: there is no such row; names those there are.
    """
    found = [method for name in wanted for method in METHODS.values() if name in (method.name, method.group)]
    missing = [name for name in wanted if not any(name in (one.name, one.group) for one in METHODS.values())]
    if missing:
        groups_there = ", ".join(dict.fromkeys(one.group for one in METHODS.values()))
        raise SystemExit(f"no row or group {missing[0]!r}; groups: {groups_there}; rows: {', '.join(METHODS)}")
    return list({method.name: method for method in found}.values())
