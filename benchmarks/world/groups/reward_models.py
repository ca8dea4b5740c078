"""Reward models: of whole answers from preference pairs, and of the steps of sums."""

from benchmarks.world import rows
from benchmarks.world.groups.preferences import NO_SIGNAL
from benchmarks.world.method import Data, Method, pairs
from benchmarks.world.world import World


def _steps(world: World) -> Data:
    return {"rows": rows.step_labels(world, 800), "held_out": rows.step_labels(world, 100, split="dev")}


ROWS = (
    Method("reward-10", "reward", "reward", pairs(0.1), (), "reward-random", kind="reward"),
    Method("reward-random", "reward", "reward", pairs(0.5), kind="reward", note=NO_SIGNAL),
    Method("process_reward", "process_reward", "process_reward", _steps,
           ("stages.process_reward.training_data={rows}", "stages.process_reward.validation_data={held_out}"),
           kind="process_reward",
           note="it does not learn to judge steps: a base gets a third of the sums right itself. On a tuning seed "
           "four times the rows changed nothing, nor did the teacher in the base's place, which adds rightly"),
)  # fmt: skip
