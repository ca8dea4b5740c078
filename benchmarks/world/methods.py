"""The rows of the table: which pipeline each method runs, on which data, and what it is compared with."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from benchmarks.world import rows
from benchmarks.world.world import TRAINED, World


Data = Mapping[str, list[rows.Row]]
Kind = Literal["policy", "reward", "process_reward", "constitutional"]
REQUESTS = ("harmful", "harmless")
PAIRS = 1200
DEMONSTRATIONS = 1200


@dataclass(frozen=True)
class Method:
    """A row: a method with its settings.

    Attributes:
        pipeline: the file in `pipelines/`, without its ending.
        data: the training rows by the file name that `assignments` use as `{name}`.
        assignments: `path=value`, as on stagekit's command line; `{name}` is the file with these rows.
        control: the row that this one must beat; None: it is a control itself.
        critic_errors: the scripted critic's share of wrong critiques; None: the model criticises itself.
        seeds: how many of the table's seeds it is run with.
    """

    name: str
    group: str
    pipeline: str
    data: Callable[[World], Data]
    assignments: Sequence[str] = ()
    control: str | None = None
    kind: Kind = "policy"
    critic_errors: float | None = None
    seeds: int = 3

    @property
    def note(self) -> str:
        """What to know when reading the row; empty where there is nothing."""
        return next((text for key, text in NOTES.items() if key in self.name), "")


def _demonstrations(flaws: float, n: int = DEMONSTRATIONS) -> Callable[[World], Data]:
    return lambda world: {"rows": rows.demonstrations(world, n, flaws)}


def _pairs(noise: float, n: int = PAIRS) -> Callable[[World], Data]:
    return lambda world: {"rows": rows.preferences(world, n, noise)}


def _both(noise: float) -> Callable[[World], Data]:
    return lambda world: {
        "demonstrations": rows.demonstrations(world, DEMONSTRATIONS),
        "pairs": rows.preferences(world, PAIRS, noise),
    }


def _steps(world: World) -> Data:
    return {"rows": rows.step_labels(world, 800), "held_out": rows.step_labels(world, 100, split="dev")}


def _requests(world: World) -> Data:
    """Requests to criticise and revise, harmful and harmless, and other prompts that are answered once."""
    others = tuple(family for family in TRAINED if family not in REQUESTS)
    requests = rows.prompts(world, 160, ("harmful",)) + rows.prompts(world, 400, ("harmless",))
    return {"requests": requests, "others": rows.prompts(world, 360, others)}


NOTES = {
    "conservative": "the loss of cDPO is least at a finite margin, logit(1 - smoothing) where no pair is turned, so "
    "it moves less than plain DPO; what it gives is calibration, which this table does not measure",
    "robust-0": "assumes that a tenth of the pairs is turned where none is",
    "random": "half of the pairs are turned: no signal, so what it gains or loses is not from preferences",
    "orpo": "the likelihood term is of prompt and answer together, and the bases never learnt to write prompts",
    "zephyr": "the control is SFT on clean demonstrations alone, which leaves little to learn",
    "process_reward": "the bases get about a third of the sums right themselves; too little to judge steps",
    "discopop": "this loss is not convex: at the reference its slope in the margin is +0.78 at tau 0.05, so the first "
    "steps go the wrong way",
    "apo_down": "lowers the chosen answers too: it is for a model that is better than they are",
    "cai-wrong": "every critique is the opposite of the right one; so it teaches to refuse harmless requests, and "
    "refusing spreads to the red team: fewer violations there are no proof of a right critic, harmless is",
}
"""What to know when reading rows whose names contain the key."""


def _table() -> dict[str, Method]:
    made = [
        Method("sft-flawed", "sft", "sft", _demonstrations(0.5)),
        Method("sft-clean", "sft", "sft", _demonstrations(0.0), control="sft-flawed"),
        Method("sft-lora", "lora", "sft_lora", _demonstrations(0.0), control="sft-flawed"),
    ]
    smoothing = {0: 0.1, 10: 0.1, 30: 0.3}
    for noise in (0, 10, 30):
        for loss in ("sigmoid", "ipo", "robust", "conservative"):
            chosen = [f"stages.dpo.method.loss={loss}"]
            if loss in ("robust", "conservative"):
                chosen.append(f"stages.dpo.method.label_smoothing={smoothing[noise]}")
            if loss == "ipo":
                chosen.append("stages.dpo.method.beta=0.5")
            control = "dpo-random" if loss in ("sigmoid", "ipo") else f"dpo-sigmoid-{noise}"
            made.append(Method(f"dpo-{loss}-{noise}", "dpo", "dpo", _pairs(noise / 100), chosen, control))
    made.append(Method("dpo-random", "dpo", "dpo", _pairs(0.5)))
    for loss, more in (
        ("hinge", ()),
        ("exo", ("stages.dpo.method.label_smoothing=0.1",)),
        ("nca", ()),
        ("apo", ()),
        ("apo_down", ()),
        ("sppo", ()),
        ("aot", ()),
        ("discopop", ()),
    ):
        chosen = [f"stages.dpo.method.loss={loss}", *more]
        made.append(
            Method(f"dpo-{loss}-10", "dpo-losses", "dpo_losses", _pairs(0.1), chosen, "dpo-losses-random", seeds=1)
        )
    made.append(Method("dpo-losses-random", "dpo-losses", "dpo_losses", _pairs(0.5), seeds=1))
    made.append(Method("dpo-lora-10", "lora", "dpo_lora", _pairs(0.1), (), "dpo-random"))
    for name in ("kto", "orpo", "cpo", "simpo"):
        made.append(Method(f"{name}-10", name, name, _pairs(0.1), (), f"{name}-random"))
        made.append(Method(f"{name}-random", name, name, _pairs(0.5)))
    made += [
        Method("zephyr-sft-dpo", "zephyr", "sft_dpo", _both(0.1),
               ("stages.sft.training_data={demonstrations}", "stages.dpo.training_data={pairs}"), "sft-clean"),
        Method("reward-10", "reward", "reward", _pairs(0.1), (), "reward-random", kind="reward"),
        Method("reward-random", "reward", "reward", _pairs(0.5), kind="reward"),
        Method("process_reward", "process_reward", "process_reward", _steps,
               ("stages.process_reward.training_data={rows}", "stages.process_reward.validation_data={held_out}"),
               kind="process_reward"),
    ]  # fmt: skip
    for name, errors in (("self", None), ("scripted", 0.1), ("wrong", 1.0)):
        made.append(
            Method(f"cai-{name}", "constitutional", "constitutional", _requests,
                   ("stages.sl-cai.training_data={{requests: {requests}, others: {others}}}",),
                   None if name == "wrong" else "cai-wrong", "constitutional", errors)
        )  # fmt: skip
    return {method.name: method for method in made}


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
        groups = ", ".join(dict.fromkeys(one.group for one in METHODS.values()))
        raise SystemExit(f"no row or group {missing[0]!r}; groups: {groups}; rows: {', '.join(METHODS)}")
    return list({method.name: method for method in found}.values())


def settings(method: Method, files: Mapping[str, Any]) -> list[str]:
    """The row's assignments with the files of its data."""
    given = method.assignments
    if not any("training_data" in one for one in given):
        given = (*given, f"stages.{method.pipeline.partition('_')[0]}.training_data={{rows}}")
    return [one.format(**files) for one in given]
