"""The world's rows that learn from rewards: their controls, their curves, the picture of these."""

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from benchmarks.world import bench, curves
from benchmarks.world.method import Method, settings
from benchmarks.world.methods import METHODS, named
from stagekit.options import with_overrides
from stagekit.parse import parse, read


ROWS = [method for method in named(["rl"]) if method.control is not None]


def test_four_methods_learn_from_rewards() -> None:
    assert [method.name for method in ROWS] == ["ppo", "grpo", "rloo", "online_dpo"]


@pytest.mark.parametrize("name", [method.name for method in named(["rl"])])
def test_the_pipeline_of_a_row_has_no_problem(name: str, tmp_path: Path) -> None:
    method = METHODS[name]
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a"}\n')
    plain = read(bench.HERE / "pipelines" / f"{method.pipeline}.yaml")
    pipeline = parse(with_overrides(plain, settings(method, {"rows": rows})))
    assert pipeline.stages[0].name == name.removesuffix("-shuffled")


@pytest.mark.parametrize("method", ROWS, ids=lambda method: method.name)
def test_a_control_differs_in_its_rewards_alone(method: Method) -> None:
    assert method.control is not None
    ours, control = method, METHODS[method.control]
    assert (ours.pipeline, ours.data, ours.seeds) == (control.pipeline, control.data, control.seeds)
    added = set(control.assignments) - set(ours.assignments)
    assert added == {f"stages.{ours.name}.method.reward=benchmarks.world.reward:shuffled"}
    assert set(ours.assignments) < set(control.assignments)


def test_a_row_keeps_the_curve_of_its_rewards(tmp_path: Path) -> None:
    done = bench.run(METHODS["grpo"], 1, bench.Setup("dev", 5, 2, tmp_path))
    assert len(done["curve"]) == 2
    assert all(0 < reward < 1 for reward in done["curve"])


def test_the_picture_has_a_line_for_each_seed_from_left_to_right() -> None:
    drawn = curves.picture([("ppo", [[0.0, 0.5, 1.0], [0.2, 0.3, 0.4]], [[0.5, 0.5, 0.5]]), ("rloo", [[0.1]], [])])
    lines = ElementTree.fromstring(drawn).findall("{http://www.w3.org/2000/svg}polyline")
    assert len(lines) == 4
    first = next(line for line in lines if line.get("stroke") == curves.OURS)
    places = [tuple(map(float, point.split(","))) for point in str(first.get("points")).split()]
    left, top = curves.LEFT, curves.TOP
    assert places == [(left, top + curves.HEIGHT), (left + curves.WIDTH / 2, top + curves.HEIGHT / 2),
                      (left + curves.WIDTH, top)]  # fmt: skip
