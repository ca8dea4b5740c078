"""Process reward models: a trainer of our own, since TRL removed its PRMTrainer in 1.14."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from stagekit.adapters.base import Setting, setting
from stagekit.adapters.scoring import Scoring
from stagekit.errors import Problem


if TYPE_CHECKING:
    from stagekit.job import Job
    from stagekit.stage import TrainingStage


class ProcessReward(Scoring):
    """Process reward model from step labels: at the end of every step of an answer, is it correct?"""

    type: Literal["process_reward"] = "process_reward"
    """The stage type."""

    step_separator: str = "\n"
    """Follows every step; its last token carries the step's label. Saved with the model."""

    train_on_last_step_only: bool = False
    """Learn the label of the last step only. An evaluation measures all steps."""

    summary: ClassVar = "process reward model from step labels; the policy is passed on unchanged"
    paper: ClassVar = "huggingface.co/papers/2305.20050"
    trainer_class: ClassVar = "stagekit.trainers.process_reward:ProcessRewardTrainer"
    config_class: ClassVar = "stagekit.trainers.process_reward:ProcessRewardConfig"
    default_learning_rate: ClassVar = 1e-5
    columns: ClassVar = (("prompt", "completions", "labels"),)
    task: ClassVar = "TOKEN_CLS"
    reports: ClassVar = frozenset({"majority_baseline"})

    def settings(self, stage: "TrainingStage") -> Iterable[Setting]:
        """How steps are laid out, and the adapter's dropout."""
        yield setting(stage, "step_separator", "step_separator", self.step_separator)
        yield setting(stage, "train_on_last_step_only", "train_on_last_step_only", self.train_on_last_step_only)
        yield from super().settings(stage)

    def problems(self, stage: "TrainingStage") -> Iterable[Problem]:
        """A separator that gives no token."""
        yield from super().problems(stage)
        if not self.step_separator:
            yield Problem("method.step_separator", "empty; a step's label needs a token to stand on")

    def cut(self, trainer: Any) -> dict[str, int]:
        """Rows that were trained on without their last steps, which do not fit in `max_length`."""
        return {"truncated": trainer.truncated.get("train", 0) - trainer.dropped.get("train", 0)}

    def scores(self, job: "Job", rows: Sequence[Any], model: Any, tokenizer: Any) -> list[float | None]:
        """How likely each step is correct; rows longer than the model's context are left out."""
        from stagekit.trainers.process_reward import chances_of_steps

        prompts, answers = ([row[column] for row in rows] for column in ("prompt", "completions"))
        found = chances_of_steps(model, tokenizer, prompts, answers, self.step_separator)
        return [chance for chances in found if chances is not None for chance in chances]

    def reload(self, folder: Path, dtype: Any) -> Any:
        """The saved reward model and its tokenizer."""
        from stagekit.reward_models import load_process_reward_model

        return load_process_reward_model(str(folder), dtype=dtype)
