"""Which weights a stage trains: its freezing options, put on a new adapter and on the built trainer."""

import dataclasses
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from stagekit.files import write_text
from stagekit.job import Job
from stagekit.ranks import rank


if TYPE_CHECKING:
    from stagekit.stage import TrainingStage


FILE = "frozen.json"
"""What was frozen, in the stage's folder; only where the stage freezes something."""


def _options(stage: "TrainingStage") -> dict[str, Any]:
    """The arguments of `freeze` as far as the stage sets them."""
    given = {
        "freeze_base_model": stage.freeze_base_model,
        "frozen": stage.frozen_layers,
        "trainable": stage.trainable_layers,
        "unfreeze_top_n": stage.unfreeze_top_n_layers,
    }
    return {name: value for name, value in given.items() if value}


def adapter_extras(stage: "TrainingStage", base: str) -> dict[str, Any]:
    """More arguments of a new adapter's LoraConfig; empty where the stage restricts nothing.

    Raises:
        ConfigError: a pattern that matches nothing, or what an adapter cannot have.
    """
    if stage.lora is None or not (stage.trainable_layers or stage.unfreeze_top_n_layers):
        return {}
    from stagekit.freezing import lora_extras, skeleton

    return lora_extras(
        skeleton(base, stage.method.task),
        stage.lora.target_modules,
        trainable=stage.trainable_layers,
        unfreeze_top_n=stage.unfreeze_top_n_layers,
        where=stage.path,
    )


def hold(job: Job, trainer: Any) -> None:
    """Freeze what the stage does not train; once more right before the optimiser is made. Nothing where it trains all.

    Raises:
        ConfigError: a pattern that matches nothing, or nothing left to train.
    """
    stage, options, holds = job.stage, _options(job.stage), list[Callable[[], None]]()
    if not options and not stage.use_gradual_unfreezing:
        return
    from stagekit.freezing import freeze
    from stagekit.unfreezing import GradualUnfreezing

    kept = freeze(trainer.model, **options, where=stage.path)
    holds.append(kept.hold)
    summary = dict(kept.summary)
    if stage.use_gradual_unfreezing:
        gradual = GradualUnfreezing(trainer.model, stage.gradual_unfreezing_interval, stage.path)
        trainer.add_callback(gradual)
        holds.append(gradual.before_optimizer)
        summary.update(groups=gradual.groups, epochs_between_groups=stage.gradual_unfreezing_interval)

    def before_optimizer() -> None:
        for one in holds:
            one()

    trainer.hooks = dataclasses.replace(trainer.hooks, before_optimizer=before_optimizer)
    if rank() == 0:
        write_text(job.folder / FILE, json.dumps(summary, indent=2) + "\n")
    job.show.line(f"  trains {_said(summary)}")


def _said(summary: dict[str, Any]) -> str:
    share = 100 * summary["trained"] / summary["parameters"]
    parts = [f"{summary['trained']:,} of {summary['parameters']:,} weights ({share:.3g} %)"]
    if summary["blocks"]:
        parts.append(f"{len(summary['trained_blocks'])} of {summary['blocks']} blocks")
    if "groups" in summary:
        parts.append(f"in {summary['groups']} groups from the top")
    return ", ".join(parts)
