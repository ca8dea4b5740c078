"""Every property of the specification has a home, a description, and its row in docs/parity.md."""

import csv
from pathlib import Path

import pytest

from stagekit import TrainingStage
from stagekit.adapters import METHODS
from stagekit.flat import FLAT, doc_of
from stagekit.groups import LoRA, Reference
from stagekit.parity import PAGE, table
from stagekit.pending import PENDING


ROOT = Path(__file__).resolve().parent.parent
SPEC = ROOT / "tests/data/spec_properties.csv"
SHARED = ROOT.parent / "shared/spec/flat_names.txt"


def properties() -> list[str]:
    with SPEC.open(encoding="utf-8") as file:
        return [row["name"] for row in csv.DictReader(file)]


def test_the_table_of_flat_names_is_the_specification_s() -> None:
    assert len(properties()) == 108
    assert sorted(FLAT) == properties()
    if SHARED.exists():
        assert sorted(SHARED.read_text(encoding="utf-8").split()) == properties()


@pytest.mark.parametrize("name", properties())
def test_a_flat_name_leads_to_an_option_with_a_description(name: str) -> None:
    group, _, key = FLAT[name].path.partition(".")
    assert group in TrainingStage.model_fields
    owners = {"lora": [LoRA], "reference": [Reference], "method": [METHODS[kind] for kind in FLAT[name].types]}
    if key and FLAT[name].path != "method.type":
        assert owners[group], name
        for owner in owners[group]:
            assert owner.model_fields[key].description, f"{owner.__name__}.{key}"
    assert doc_of(name).strip()


def test_the_page_has_a_row_for_every_name_with_its_state() -> None:
    rows = {line.split("|")[1].strip(" `"): line for line in table().split("\n## ")[0].splitlines() if "| `" in line}
    assert sorted(rows) == properties()
    for name, row in rows.items():
        assert (f"| not built yet: {PENDING[name]} |" if name in PENDING else "| effective |") in row
        assert row.replace("\\|", "").count("|") == 8, row


def test_the_committed_page_is_the_generated_one() -> None:
    assert (ROOT / PAGE).read_text(encoding="utf-8") == table(), "run `python -m stagekit.parity`"
