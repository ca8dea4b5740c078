"""The pages of the stage types are those that the classes give, and their examples parse."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from stagekit import TrainingStage
from stagekit.adapters import BUILT
from stagekit.pages import example, pages


FOLDER = Path(__file__).parent.parent / "docs" / "stages"


def test_the_committed_pages_are_the_generated_ones() -> None:
    made = pages()
    assert {path.name: path.read_text() for path in FOLDER.glob("*.md")} == made, "run python -m stagekit.pages"


@pytest.mark.parametrize("kind", BUILT)
def test_the_example_of_every_type_is_a_stage(kind: str) -> None:
    (given,) = yaml.safe_load(example(kind))
    stage: Any = TrainingStage(**given)
    assert stage.method.type == kind
    assert len(example(kind).splitlines()) <= 5
