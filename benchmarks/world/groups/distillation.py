"""Distillation from the teacher, beside demonstrations of which half are flawed, and beside clean ones."""

from benchmarks.world import rows
from benchmarks.world.method import DEMONSTRATIONS, Data, Method, demonstrations
from benchmarks.world.world import World


TEACHER = "stages.distillation.method.teacher={teacher}"
HIDDEN = "stages.distillation.method.hidden_states=true"
RANDOM = "the teacher has random weights; what the demonstrations teach is left a tenth of its weight"


def prompts(world: World) -> Data:
    """`rows`: as many prompts as there are demonstrations."""
    return {"rows": rows.prompts(world, DEMONSTRATIONS)}


def _row(
    name: str, pipeline: str, *assignments: str, flaws: float = 0.5, control: str = "sft-flawed", note: str = ""
) -> Method:
    data = demonstrations(flaws)
    return Method(f"distillation-{name}", "distillation", pipeline, data, assignments, control, note=note)


ROWS = (
    _row("flawed", "distillation", TEACHER),
    _row("hidden-flawed", "distillation", TEACHER, HIDDEN),
    Method(
        "distillation-random", "distillation", "distillation_random", demonstrations(0.5),
        ("stages.distillation.model={base}",), note=RANDOM,
    ),
    _row("clean", "distillation", TEACHER, flaws=0.0, control="sft-clean",
         note="clean demonstrations say all that the teacher knows"),
    Method(
        "distillation-sequence", "distillation", "distillation_sequence", prompts, (TEACHER,), "sft-flawed",
        note="learns texts of the teacher, no demonstrations",
    ),
    Method(
        "distillation-on_policy", "distillation", "distillation_on_policy", prompts, (TEACHER,), "sft-flawed",
        note="learns from prompts alone",
    ),
)  # fmt: skip
