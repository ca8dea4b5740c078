"""Learning from preference pairs: DPO and its losses at several noise rates, KTO, ORPO, CPO, SimPO, Zephyr's order.

Every control is the same method on pairs of which half are turned; the losses that know the noise are compared with
the plain one at the same noise.
"""

from benchmarks.world import rows
from benchmarks.world.method import DEMONSTRATIONS, PAIRS, Data, Method, demonstrations, pairs
from benchmarks.world.world import World


NO_SIGNAL = "half of the pairs are turned: no signal, so what it gains or loses is not from preferences"
CONSERVATIVE = (
    "the loss of cDPO is least at a finite margin, logit(1 - smoothing) where no pair is turned, so it moves less "
    "than plain DPO; what it gives is calibration, which this table does not measure"
)
ZEPHYR_FLAWS = 0.1
"""Share of flawed demonstrations in Zephyr's order: with none, SFT leaves DPO nothing to learn."""
SMOOTHING = {0: 0.1, 10: 0.1, 30: 0.3}


def _dpo(loss: str, noise: int) -> Method:
    chosen, note = [f"stages.dpo.method.loss={loss}"], ""
    if loss in ("robust", "conservative"):
        chosen.append(f"stages.dpo.method.label_smoothing={SMOOTHING[noise]}")
        note = CONSERVATIVE if loss == "conservative" else note
    if loss == "robust" and not noise:
        note = "assumes that a tenth of the pairs is turned where none is"
    if loss == "robust" and noise == 10:
        note = "at a tenth of turned pairs plain DPO loses little, less than the two bases differ by"
    if loss == "ipo":
        chosen.append("stages.dpo.method.beta=0.5")
    control = "dpo-random" if loss in ("sigmoid", "ipo") else f"dpo-sigmoid-{noise}"
    return Method(f"dpo-{loss}-{noise}", "dpo", "dpo", pairs(noise / 100), chosen, control, note=note)


def _loss(name: str, note: str = "", *more: str) -> Method:
    chosen = [f"stages.dpo.method.loss={name}", *more]
    return Method(f"dpo-{name}-10", "dpo-losses", "dpo_losses", pairs(0.1), chosen, "dpo-losses-random", seeds=1,
                  note=note)  # fmt: skip


def _both(world: World) -> Data:
    return {
        "demonstrations": rows.demonstrations(world, DEMONSTRATIONS, ZEPHYR_FLAWS),
        "pairs": rows.preferences(world, PAIRS, 0.1),
    }


ROWS = (
    *(_dpo(loss, noise) for noise in (0, 10, 30) for loss in ("sigmoid", "ipo", "robust", "conservative")),
    Method("dpo-random", "dpo", "dpo", pairs(0.5), note=NO_SIGNAL),
    _loss("hinge"),
    _loss("exo", "", "stages.dpo.method.label_smoothing=0.1"),
    _loss("nca"),
    _loss("apo"),
    _loss("apo_down", "lowers the chosen answers too: it is for a model that is better than they are"),
    _loss("sppo"),
    _loss("aot"),
    _loss("discopop", "with tau 1: at the paper's 0.05 the slope in the margin is +0.78 at the reference, so the "
          "first steps go the wrong way, and the row ended below its control", "stages.dpo.trl.discopop_tau=1.0"),
    Method("dpo-losses-random", "dpo-losses", "dpo_losses", pairs(0.5), seeds=1, note=NO_SIGNAL),
    Method("dpo-lora-10", "lora", "dpo_lora", pairs(0.1), (), "dpo-random"),
    *(
        row
        for name in ("kto", "orpo", "cpo", "simpo")
        for row in (
            Method(f"{name}-10", name, name, pairs(0.1), (), f"{name}-random"),
            Method(f"{name}-random", name, name, pairs(0.5), note=NO_SIGNAL),
        )
    ),
    Method("zephyr-sft", "zephyr", "sft", demonstrations(ZEPHYR_FLAWS), (), "dpo-sigmoid-10",
           note="the control is DPO alone, on the pairs of zephyr-sft-dpo"),
    Method("zephyr-sft-dpo", "zephyr", "sft_dpo", _both,
           ("stages.sft.training_data={demonstrations}", "stages.dpo.training_data={pairs}"), "zephyr-sft",
           note=f"{ZEPHYR_FLAWS:.0%} of the demonstrations are flawed, a tenth of the pairs is turned"),
)  # fmt: skip
