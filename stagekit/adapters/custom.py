"""A stage that is your own function."""

from typing import TYPE_CHECKING, ClassVar, Literal

from stagekit.adapters.base import Method
from stagekit.options import Function
from stagekit.stage_options import CallbackOptions, DataOptions, Identity, Loop


if TYPE_CHECKING:
    from stagekit.job import Job, Outcome


OWN_FUNCTION = "a custom stage does only what its function does; pass the value to the function through metadata"


class Custom(Method):
    """Calls `function(context)`; its result is the stage's. The door for what stagekit does not know."""

    type: Literal["custom"] = "custom"
    """The stage type."""

    function: Function
    """`package.module:function`, or the callable. Called with a `stagekit.job.CustomContext` (model path, datasets,
    output folder, seed, metadata, stop event); returns None, or a mapping with `policy` (a folder), `metrics` and
    `datasets` (name -> JSONL path)."""

    summary: ClassVar = "calls a function of your own with the model and the data"
    families: ClassVar = frozenset({Identity, DataOptions, Loop, CallbackOptions})
    slots: ClassVar = frozenset({"model"})
    instead: ClassVar = OWN_FUNCTION
    refused: ClassVar = {
        **dict.fromkeys(
            ("epochs", "max_steps", "batch_size", "gradient_accumulation_steps", "use_gradient_checkpointing",
             "max_gradient_norm", "custom_loss_function", "max_duration", "is_evaluation_only",
             "use_deterministic_algorithms"),
            OWN_FUNCTION,
        ),
    }  # fmt: skip
    trains: ClassVar = False
    needs_data: ClassVar = False
    reads: ClassVar = frozenset({"metadata"})

    def run(self, job: "Job") -> "Outcome":
        """Call the function."""
        from stagekit.custom import call

        return call(job, self.function)
