"""Outcome reward models: TRL's RewardTrainer."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from stagekit.adapters.base import Setting, setting
from stagekit.adapters.scoring import Scoring
from stagekit.errors import Problem
from stagekit.options import NonNegativeFloat


if TYPE_CHECKING:
    from stagekit.job import Job
    from stagekit.stage import TrainingStage


class Reward(Scoring):
    """Outcome reward model from preferences: -log sigmoid(score of `chosen` - score of `rejected` - margin). A column
    `margin`, a number for each pair, is read where it is there."""

    type: Literal["reward"] = "reward"
    """The stage type."""

    center_rewards: NonNegativeFloat | None = None
    """Weight of the squared sum of a pair's two scores, which keeps scores around 0; 0.01 is usual. None = off.
    TRL: `center_rewards_coefficient`."""

    summary: ClassVar = "outcome reward model from preferences; the policy is passed on unchanged"
    paper: ClassVar = "huggingface.co/papers/2203.02155"
    trainer_class: ClassVar = "trl:RewardTrainer"
    config_class: ClassVar = "trl:RewardConfig"
    default_learning_rate: ClassVar = 1e-4
    columns: ClassVar = (("prompt", "chosen", "rejected"), ("chosen", "rejected"))
    optional_columns: ClassVar = ("margin",)
    task: ClassVar = "SEQ_CLS"
    reports: ClassVar = frozenset({"min_reward", "mean_reward", "max_reward", "margin"})

    def settings(self, stage: "TrainingStage") -> Iterable[Setting]:
        """The centring of scores, and the adapter's dropout."""
        yield setting(stage, "center_rewards", "center_rewards_coefficient", self.center_rewards)
        yield from super().settings(stage)

    def problems(self, stage: "TrainingStage") -> Iterable[Problem]:
        """Over a quantised base TRL makes the head bfloat16, which only runs under bf16."""
        yield from super().problems(stage)
        if stage.lora is None or stage.lora.bits is None:
            return
        if not (stage.use_mixed_precision and stage.mixed_precision_dtype == "bf16"):
            yield Problem(
                "lora.bits",
                "a reward head over a quantised base is bfloat16; set use_mixed_precision: true with "
                "mixed_precision_dtype: bf16, or drop bits",
            )

    def scores(self, job: "Job", rows: Sequence[Any], model: Any, tokenizer: Any) -> list[float | None]:
        """The scores of both answers of each row."""
        from stagekit.reward_models import score

        prompts = [row.get("prompt") for row in rows]
        answers = [row[side] for side in ("chosen", "rejected") for row in rows]
        return score(model, tokenizer, prompts * 2, answers)

    def reload(self, folder: Path, dtype: Any) -> Any:
        """The saved reward model and its tokenizer."""
        from stagekit.reward_models import load_reward_model

        return load_reward_model(str(folder), dtype=dtype)
