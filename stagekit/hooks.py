"""What stagekit adds to a TRL trainer: one mixin, which adds nothing where no hook is set."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Hooks:
    """What to add: log keys to leave out, metrics to derive from an evaluation, tags of the model card."""

    hidden_logs: frozenset[str] = frozenset()
    perplexity: bool = False
    evaluate: Callable[[Any, Any], Mapping[str, float]] | None = None
    tags: tuple[str, ...] = ()


class Hooked:
    """Mixin for TRL trainers; set `hooks` before anything is trained."""

    hooks = Hooks()

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Leave out what the stage does not want logged."""
        for key in self.hooks.hidden_logs:
            logs.pop(key, None)
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        """Add perplexity and the user's own metrics, where early stopping and best checkpoints see them."""
        output = super().evaluation_loop(dataloader, *args, **kwargs)  # type: ignore[misc]
        prefix = kwargs.get("metric_key_prefix", "eval")
        loss = output.metrics.get(f"{prefix}_loss")
        if self.hooks.perplexity and loss is not None:
            output.metrics[f"{prefix}_perplexity"] = math.exp(loss) if loss < 700 else math.inf
        if self.hooks.evaluate is not None:
            trainer: Any = self
            model = trainer.accelerator.unwrap_model(trainer.model)
            was_training = model.training
            model.eval()
            try:
                found = self.hooks.evaluate(model, trainer.eval_dataset)
            finally:
                model.train(was_training)
            output.metrics.update({f"{prefix}_{name}": float(value) for name, value in found.items()})
        return output

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the stage's tags into the model card."""
        tags = kwargs.get("tags") or []
        kwargs["tags"] = [*([tags] if isinstance(tags, str) else tags), *self.hooks.tags]
        super().create_model_card(*args, **kwargs)  # type: ignore[misc]
