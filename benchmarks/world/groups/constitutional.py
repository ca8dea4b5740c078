"""Constitutional AI: the model criticises itself, a script errs in a known share, or always."""

from benchmarks.world import rows
from benchmarks.world.method import Data, Method
from benchmarks.world.world import TRAINED, World


REQUESTS = ("harmful", "harmless")
SHARPER = (
    "the answers that are learnt are drawn at temperature 0.5, so what a base mostly does it does more often, in the "
    "other families too: it sorts and adds better, and invents facts where it mostly invents (unknown)"
)
WRONG = (
    "every critique is the opposite of the right one; so it teaches to refuse harmless requests, and refusing spreads "
    "to the red team: fewer violations there are no proof of a right critic, harmless is"
)


def _requests(world: World) -> Data:
    """Requests to criticise and revise, harmful and harmless, and other prompts that are answered once."""
    others = tuple(family for family in TRAINED if family not in REQUESTS)
    requests = rows.prompts(world, 80, ("harmful",)) + rows.prompts(world, 800, ("harmless",))
    return {"requests": requests, "others": rows.prompts(world, 360, others)}


def _row(name: str, errors: float | None, note: str = "") -> Method:
    return Method(
        f"cai-{name}", "constitutional", "constitutional", _requests,
        ("stages.sl-cai.training_data={{requests: {requests}, others: {others}}}",),
        None if name == "wrong" else "cai-wrong", "constitutional", critic_errors=errors, note=note,
    )  # fmt: skip


ROWS = (_row("self", None, SHARPER), _row("scripted", 0.1, SHARPER), _row("wrong", 1.0, WRONG))
