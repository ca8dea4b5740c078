"""What both kinds of reward model share: an artifact of their own, their dropout, and scores that must be the same
after saving."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from stagekit.adapters.base import Method, Setting
from stagekit.errors import Problem, StageError


if TYPE_CHECKING:
    from stagekit.job import Job
    from stagekit.stage import TrainingStage


PROBED = 4
"""Rows whose scores are compared before and after saving."""


class Scoring(Method):
    """A stage that leaves a reward model; the policy is passed on as it came in."""

    artifact: ClassVar = "reward_model"
    metric_keys: ClassVar = {"loss": "eval_loss", "accuracy": "eval_accuracy", "custom": ""}

    def settings(self, stage: TrainingStage) -> Iterable[Setting]:
        """Dropout stays on where the adapter has one; `_quiet_dropouts` then keeps it to the adapter."""
        if stage.lora is not None:
            keeps = stage.lora.dropout > 0
            reason = "lora.dropout would be switched off" if keeps else "default of TRL"
            yield Setting("disable_dropout", not keeps, reason)

    def problems(self, stage: TrainingStage) -> Iterable[Problem]:
        """A head that is new has nothing to be measured."""
        if stage.is_evaluation_only and stage.model is None:
            yield Problem("model", "missing; say which reward model to measure: stage:NAME, or a folder")

    def notes(self, stage: TrainingStage) -> Iterable[str]:
        """What the next stage starts from."""
        if not stage.is_evaluation_only:
            yield "leaves a reward model; the next stage starts from the policy that this one started from"

    def built(self, job: Job, trainer: Any) -> None:
        """What is measured is a reward model, not one whose head started at random.

        Raises:
            StageError: it is another model.
        """
        if not job.stage.is_evaluation_only or job.model is None:
            return
        from transformers import AutoConfig

        kind = type(trainer.model).__name__
        has = AutoConfig.from_pretrained(job.model.base, trust_remote_code=False).architectures or []
        if kind not in has:
            raise StageError(
                f"stage {job.stage.name!r}: {job.model.base} is a {', '.join(has) or 'model of no kind'}, not a "
                f"{kind}, so its scores would be random. Name a reward model (stage:NAME, or its folder)"
            )

    def scores(self, job: Job, rows: Sequence[Any], model: Any, tokenizer: Any) -> list[float | None]:
        """The model's scores of a few rows; None for what it cannot read whole."""
        raise NotImplementedError

    def reload(self, folder: Path, dtype: Any) -> Any:
        """The saved reward model and its tokenizer."""
        raise NotImplementedError

    def probe(self, job: Job, trainer: Any) -> Any:
        """Scores of a few rows in the weights' own precision; None over a quantised base, which is not saved."""
        if job.stage.lora is not None and job.stage.lora.bits is not None:
            return None
        from stagekit.reward_models import without_autocast

        model = trainer.accelerator.unwrap_model(trainer.model)
        with without_autocast(model):
            return self.scores(job, self._rows(job), model, job.tokenizer)

    def check_saved(self, job: Job, folder: Path, before: Any) -> None:
        """The reloaded reward model scores as the trained one. One that was trained over a quantised base is reloaded
        on the unquantised one: its adapter has to load and, where it was merged, to score as the merged model.

        Raises:
            StageError: with both scores.
        """
        import torch

        from stagekit.merging import ROUNDING_TOLERANCE
        from stagekit.reward_models import SAME_SCORE, same_scores

        given = (job.setting("model_init_kwargs") or {}).get("dtype", "float32")
        dtype = getattr(torch, str(given).removeprefix("torch."), torch.float32)
        tolerance = SAME_SCORE if dtype == torch.float32 else ROUNDING_TOLERANCE[dtype]
        rows = self._rows(job)
        lora = job.stage.lora
        if before is None:
            assert lora is not None
            adapter = job.folder / "adapter" if lora.merge else folder
            before = self.scores(job, rows, *self.reload(adapter, dtype))
        after = self.scores(job, rows, *self.reload(folder, dtype))
        same_scores(str(folder), before, after, tolerance)

    def _rows(self, job: Job) -> list[Any]:
        """Held-out rows where there are any, else rows of the training data."""
        wanted = set(self.columns[-1])
        held_out = job.eval_dataset
        known = held_out is not None and wanted <= set(held_out.column_names)
        dataset = held_out if known else job.train_dataset
        return [dataset[row] for row in range(min(PROBED, len(dataset)))]
