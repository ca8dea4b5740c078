"""Every trap that TRL sets has a test that carries its number: `test_t13_...`, or `test_t3_t34_...` for two of them.

| numbers | what goes wrong with a stage that only passes its options on to TRL |
|---|---|
| 1-11 | models, adapters and process state that are handed from one trainer to the next |
| 12-24 | steps, batches, the order and the number of rows |
| 25-40 | rates, optimisers, frozen layers, number formats, quantisation |
| 41-48 | preference losses, references, rewards, distillation |
| 49-57 | evaluation, checkpoints, time, private hooks |
"""

import ast
import re
from pathlib import Path


ALL = set(range(1, 58))
A_SENTENCE = {57}
"""Said in the documentation: there is nothing to test in a function of the user's."""


def traps_of(name: str) -> set[int]:
    """The traps that the name of a test begins with."""
    found = re.match(r"test_((?:t\d+_)+)", name)
    return {int(one[1:]) for one in found[1].strip("_").split("_")} if found is not None else set()


def named_tests() -> dict[str, set[int]]:
    """Every test that is named after a trap, as file and name."""
    found = {}
    for file in sorted(Path(__file__).parent.rglob("test_*.py")):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and traps_of(node.name):
                found[f"{file.name}::{node.name}"] = traps_of(node.name)
    return found


def test_the_numbers_of_a_name_are_read() -> None:
    assert traps_of("test_t3_t34_a_stage") == {3, 34}
    assert traps_of("test_tf32_is_undone") == traps_of("test_two_steps") == set()


def test_every_trap_has_a_test_that_is_named_after_it() -> None:
    covered = set().union(*named_tests().values())
    assert covered == ALL - A_SENTENCE


def test_what_cannot_be_tested_is_said_in_the_documentation() -> None:
    """Trap 57: a function that seeds torch changes what is drawn after it."""
    said = (Path(__file__).parent.parent / "docs/decisions.md").read_text(encoding="utf-8")
    assert "seeds torch again" in said
