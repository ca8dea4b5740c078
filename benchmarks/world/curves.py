"""The rewards of PPO, GRPO, RLOO and online DPO over their rollouts, as a picture.

python -m benchmarks.world.curves      # benchmarks/results/world-rewards.svg, from the results that are there
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.world import bench
from benchmarks.world.method import Method
from benchmarks.world.methods import METHODS, named


WIDTH, HEIGHT, LEFT, TOP = 330, 200, 45, 35
"""Of a panel's axes, and what stands to their left and above."""
OURS, CONTROL = "#2a6", "#999"


def panel(title: str, curves: Sequence[Sequence[float]], controls: Sequence[Sequence[float]], x: int, y: int) -> str:
    """One method: a line per seed, from 0 to 1, over all rollouts; those of its control are dashed."""
    last = max(len(curve) for curve in (*curves, *controls)) - 1
    parts = [f'<text x="{x}" y="{y - 10}" font-weight="bold">{title}</text>']
    for tick in range(6):
        level = y + HEIGHT * (1 - tick / 5)
        parts.append(f'<line x1="{x}" y1="{level:.1f}" x2="{x + WIDTH}" y2="{level:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{x - 6}" y="{level + 4:.1f}" text-anchor="end">{tick / 5:.1f}</text>')
    for share, anchor in ((0.0, "start"), (1.0, "end")):
        parts.append(
            f'<text x="{x + WIDTH * share:.1f}" y="{y + HEIGHT + 15}" text-anchor="{anchor}">'
            f"{'rollout ' if share else ''}{1 + round(last * share)}</text>"
        )
    for group, style in ((controls, f'stroke="{CONTROL}" stroke-dasharray="4 2"'), (curves, f'stroke="{OURS}"')):
        for curve in group:
            points = " ".join(
                f"{x + WIDTH * place / max(last, 1):.1f},{y + HEIGHT * (1 - value):.1f}"
                for place, value in enumerate(curve)
            )
            parts.append(f'<polyline points="{points}" fill="none" stroke-width="1.5" {style}/>')
    return "\n".join(parts)


def picture(shown: Sequence[tuple[str, Sequence[Sequence[float]], Sequence[Sequence[float]]]]) -> str:
    """An SVG of panels, two in a row: title, the method's curves, its control's."""
    across, down = WIDTH + LEFT + 25, HEIGHT + TOP + 30
    height = down * ((len(shown) + 1) // 2) + 30
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{2 * across}" height="{height}" font-family="sans-serif" '
        'font-size="12"><rect width="100%" height="100%" fill="white"/>'
    ]
    for place, (title, curves, controls) in enumerate(shown):
        parts.append(panel(title, curves, controls, LEFT + across * (place % 2), TOP + down * (place // 2)))
    parts.append(
        f'<text x="{LEFT}" y="{height - 10}">mean score of a rollout, a line per seed; dashed: the control, whose '
        "scores are dealt out in a drawn order</text>"
    )
    return "\n".join([*parts, "</svg>"]) + "\n"


def curves_of(method: Method) -> list[list[float]]:
    """The curve of each seed in the row's file, of the row's present version."""
    return [run["curve"] for run in _runs(method) if "curve" in run]


def _runs(method: Method) -> Sequence[Mapping[str, Any]]:
    found: Sequence[Mapping[str, Any]] = bench.results_of(method)["runs"]
    return found


def main() -> None:
    """Write the picture and say where it lies."""
    rows = [(one.name, curves_of(one), curves_of(METHODS[one.control])) for one in named(["rl"]) if one.control]
    path = bench.RESULTS.parent / "world-rewards.svg"
    path.write_text(picture([row for row in rows if row[1]]), encoding="utf-8")
    print(json.dumps({"picture": str(path), "rows": [name for name, curves, _ in rows if curves]}))


if __name__ == "__main__":
    main()
