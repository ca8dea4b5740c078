"""Rejection sampling: sample several answers, keep the best by reward, fine-tune on them; and best-of-n, measured."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from stagekit.adapters.base import Method
from stagekit.errors import Problem
from stagekit.groups import Generation, Rewards, is_function, is_server
from stagekit.options import Positive
from stagekit.reward_options import counts_tokens, reward_problems


if TYPE_CHECKING:
    from stagekit.job import Job, Outcome
    from stagekit.stage import TrainingStage


class RejectionSampling(Method):
    """Sample several answers to every prompt, keep the best by reward, fine-tune on them. Leaves three datasets:
    `selected` (what was learnt, with rewards), `preferences` (the best against the worst answer, for dpo), `scored`
    (every answer with its reward). With `is_evaluation_only: true` nothing is learnt: the prompts of `validation_data`
    are sampled and scored, and the metrics say what the best of 1, 2, 4, ... answers are worth."""

    type: Literal["rejection_sampling"] = "rejection_sampling"
    """The stage type."""

    reward: Rewards = None
    """What scores the answers: a function `f(prompts, completions, **columns) -> list[float | None]`, a verifier
    (`exact`, `maths`, `python_tests`, ...), a reward of TRL (`accuracy_reward`, ...), a reward model (`stage:NAME`, a
    path), or a list of them with weights. Needed. A reward that raises or gives NaN stops the stage; None leaves an
    answer out. The data's other columns reach a function by name; of a mix of sets, only `source`."""

    n: Positive = 10
    """Answers sampled for every prompt, 4 to 32. A prompt that stands twice in the data is sampled twice as often."""

    top_k: Positive = 1
    """Answers kept for a prompt, at most: the best ones; of equal rewards the ones sampled first."""

    min_reward: float | None = 0.0
    """Keep only answers with a reward strictly above this: 0 keeps the right ones of 0 / 1 rewards. The zero of a
    preference model's reward means nothing; there, use None. None = no threshold."""

    rounds: Positive = 1
    """Repeat sampling and fine-tuning, each round from the model of the one before (RAFT). `epochs` and `max_steps`
    are of one round."""

    summary: ClassVar = "sample several answers, keep the best by reward, fine-tune on them"
    paper: ClassVar = "huggingface.co/papers/2304.06767"
    trainer_class: ClassVar = "trl:SFTTrainer"
    config_class: ClassVar = "trl:SFTConfig"
    default_learning_rate: ClassVar = 2e-5
    slots: ClassVar = frozenset({"model", "lora", "generation", "trl"})
    columns: ClassVar = (("prompt",),)
    makes: ClassVar = ("selected", "preferences", "scored")
    metric_keys: ClassVar = {
        "loss": "eval_loss",
        "accuracy": "eval_mean_token_accuracy",
        "perplexity": "eval_perplexity",
        "custom": "",
    }
    perplexity: ClassVar = True
    takes_loss: ClassVar = True

    def problems(self, stage: "TrainingStage") -> Iterable[Problem]:
        """Answers that cannot be had, or cannot be told apart."""
        if self.reward is None:
            yield Problem(
                "method.reward", "missing; say what scores the answers: a function, stage:NAME, or a reward model"
            )
        yield from reward_problems(self.reward or ())
        if any(counts_tokens(reward) for reward in self.reward or ()):
            yield Problem("method.reward", "what TRL's get_ functions make counts tokens, and texts are scored here")
        if self.top_k > self.n:
            yield Problem("method.top_k", f"{self.top_k} answers cannot be kept of n = {self.n}")
        generation = stage.generation or Generation()
        if self.rounds > 1 and is_server(generation.backend):
            yield Problem("generation.backend", "a server goes on serving the first round's model; use transformers")
        if generation.temperature == 0 and self.n > 1 and not is_function(generation.backend):
            yield Problem("generation.temperature", f"0 gives the same answer {self.n} times; sample above 0")
        if stage.is_evaluation_only and self.rounds > 1:
            yield Problem("method.rounds", "has no effect with is_evaluation_only: true")

    def notes(self, stage: "TrainingStage") -> Iterable[str]:
        """How much is written."""
        again = f", in each of {self.rounds} rounds" if self.rounds > 1 else ""
        yield f"{self.n} answers are sampled for every prompt{again}"

    def trainings(self) -> int:
        """Once per round."""
        return self.rounds

    def rows_made(self, read: int, mixed: Mapping[str, int]) -> tuple[int, Mapping[str, int]]:
        """At most the best `top_k` of every prompt, and one pair."""
        return read * self.top_k, {"selected": read * self.top_k, "preferences": read, "scored": read}

    def run(self, job: "Job") -> "Outcome":
        """Sample, score, select and train, round by round; or measure."""
        from stagekit.rejection import measure, run

        return measure(job, self) if job.stage.is_evaluation_only else run(job, self)
