"""Distillation from the teacher, beside demonstrations of which half are flawed, and beside clean ones."""

from benchmarks.world import rows
from benchmarks.world.method import DEMONSTRATIONS, Data, Method, demonstrations
from benchmarks.world.world import World


TEACHER = "stages.distillation.method.teacher={teacher}"
HIDDEN = "stages.distillation.method.hidden_states=true"


def prompts(world: World) -> Data:
    """`rows`: as many prompts as there are demonstrations."""
    return {"rows": rows.prompts(world, DEMONSTRATIONS)}


ROWS = (
    Method("distillation-flawed", "distillation", "distillation", demonstrations(0.5), (TEACHER,), "sft-flawed"),
    Method(
        "distillation-hidden-flawed",
        "distillation",
        "distillation",
        demonstrations(0.5),
        (TEACHER, HIDDEN),
        "sft-flawed",
    ),
    Method("distillation-clean", "distillation", "distillation", demonstrations(0.0), (TEACHER,), "sft-clean"),
    Method(
        "distillation-random",
        "distillation",
        "distillation_random",
        demonstrations(0.5),
        ("stages.distillation.model={base}",),
        "sft-flawed",
    ),
    Method("distillation-sequence", "distillation", "distillation_sequence", prompts, (TEACHER,), "sft-flawed"),
    Method("distillation-on_policy", "distillation", "distillation_on_policy", prompts, (TEACHER,), "sft-flawed"),
)
