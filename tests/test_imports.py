"""What may import what: the describing half stays light, and the layers look one way."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "stagekit"
HEAVY = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "bitsandbytes")
MODULES = sorted(
    str(path.relative_to(ROOT).with_suffix("")).replace("/", ".").removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
)


def imports(module: str, everywhere: bool) -> set[str]:
    """The modules that a module imports, at its top or also inside functions; not those under TYPE_CHECKING."""
    path = ROOT / module.replace(".", "/")
    tree = ast.parse((path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text(encoding="utf-8"))
    body = [node for node in tree.body if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))]
    nodes = [inner for node in body for inner in ast.walk(node)] if everywhere else body
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


LIGHT = (
    "stagekit", "stagekit.parse", "stagekit.checks", "stagekit.children", "stagekit.digest", "stagekit.parity",
    "stagekit.walk", "stagekit.cli",
)  # fmt: skip


@pytest.mark.parametrize("module", LIGHT)
def test_a_module_of_the_describing_half_loads_nothing_heavy(module: str) -> None:
    code = f"import {module}, sys, json; print(json.dumps(sorted(set({HEAVY!r}) & set(sys.modules))))"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(ran.stdout) == []


def test_every_public_name_of_the_declaration_loads_nothing_heavy() -> None:
    code = (
        "import stagekit, sys, json\n"
        "for name in stagekit.__all__: getattr(stagekit, name)\n"
        f"print(json.dumps(sorted(set({HEAVY!r}) & set(sys.modules))))"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(ran.stdout) == []


DECLARATION = {
    "errors": set(),
    "options": {"errors"},
    "requests": {"errors"},
    "rows": {"errors", "requests"},
    "sources": {"errors", "rows"},
    "groups": {"errors", "options", "sources"},
    "stage_options": {"groups", "options"},
    "adapters.base": {"errors", "options", "stage_options"},
    "pending": set(),
    "selectors": {"errors", "options"},
    "trl_fields": set(),
    "flat": {"adapters", "errors", "groups", "options", "selectors", "stage_options"},
    "freezing": {"errors"},
    "measures": {"errors", "options"},
    "ledger": {
        "adapters",
        "adapters.base",
        "errors",
        "flat",
        "freezing",
        "measures",
        "optimizers",
        "options",
        "pending",
        "schedules",
        "stage_options",
    },
    "stage": {"adapters", "adapters.sft", "flat", "groups", "ledger", "options", "selectors", "stage_options"},
    "distributed": {"errors"},
    "arguments": {"adapters.base", "distributed", "ledger", "measures", "optimizers", "schedules"},
    "trl_rewards": {"errors"},
    "reward_options": {"errors", "groups", "options", "trl_rewards"},
    "checks": {"arguments", "errors", "groups", "measures", "options", "reward_options", "sources", "trl_fields"},
    "pipeline": {"checks", "errors", "groups", "options", "stage"},
    "parse": {"checks", "errors", "flat", "ledger", "options", "pipeline", "selectors"},
    "digest": {"checks", "distributed", "options", "sources"},
    "parity": {"adapters", "adapters.base", "flat", "options", "pending", "selectors", "stage_options"},
}
"""Module of the declaration -> the modules of stagekit that it may import at its top."""


def own(module: str, everywhere: bool) -> set[str]:
    """The modules of stagekit that a module imports, without the package's name."""
    known = {name.removeprefix("stagekit.") for name in MODULES} - {"stagekit"}
    found = {name for name in imports(module, everywhere) if name.startswith("stagekit.")}
    return {name.removeprefix("stagekit.") for name in found} & known


@pytest.mark.parametrize("module", sorted(DECLARATION))
def test_a_module_of_the_declaration_imports_only_what_stands_below_it(module: str) -> None:
    assert own(f"stagekit.{module}", everywhere=False) <= DECLARATION[module]


def test_the_table_above_has_no_circle() -> None:
    order: list[str] = []
    waiting = {name: {one for one in below if one in DECLARATION} for name, below in DECLARATION.items()}
    while waiting:
        free = sorted(name for name, below in waiting.items() if below <= set(order))
        assert free, f"a circle among {sorted(waiting)}"
        order += free
        waiting = {name: below for name, below in waiting.items() if name not in free}


SHARED = {
    "adapters.judged",
    "adapters.own_pairs",
    "adapters.references",
    "adapters.reinforcement",
    "adapters.scoring",
}
"""What several stage types have in common; no type of its own."""


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("stagekit.adapters.")])
def test_a_stage_type_s_module_imports_options_at_its_top_and_machinery_inside_functions(module: str) -> None:
    allowed = {
        "adapters.base", "errors", "groups", "options", "reward_options", "stage_options", "templates", *SHARED
    }  # fmt: skip
    assert own(module, everywhere=False) <= allowed
    assert not own(module, everywhere=True) & {"pipeline", "parse", "stage", "flat", "ledger", "walk", "runner"}


def test_every_module_of_the_stage_types_is_in_the_union() -> None:
    listed = {name for name in own("stagekit.adapters", everywhere=False) if name.startswith("adapters.")}
    modules = {name.removeprefix("stagekit.") for name in MODULES if name.startswith("stagekit.adapters.")}
    assert modules - SHARED == listed


BLIND = (
    "stagekit.trainers",
    "stagekit.losses",
    "stagekit.models",
    "stagekit.data",
    "stagekit.generation",
    "stagekit.decoding",
    "stagekit.choosing",
    "stagekit.kept",
)


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith(BLIND)])
def test_trainers_and_machinery_never_see_a_stage(module: str) -> None:
    seen = {"stage", "stage_options", "pipeline", "parse", "flat", "ledger", "arguments", "runner", "walk"}
    assert not own(module, everywhere=True) & seen
    assert not any(name.startswith("adapters") for name in own(module, everywhere=True))


@pytest.mark.parametrize("module", MODULES)
def test_nothing_imports_what_trl_calls_experimental(module: str) -> None:
    assert not any(name.startswith("trl.experimental") for name in imports(module, everywhere=True))


@pytest.mark.parametrize("module", [name for name in MODULES if not name.startswith("stagekit.recipes")])
def test_nothing_but_recipes_imports_recipes(module: str) -> None:
    assert not any(name.startswith("stagekit.recipes") for name in imports(module, everywhere=False))
