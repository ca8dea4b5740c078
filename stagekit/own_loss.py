"""A loss of the user's own in a supervised trainer: right under gradient accumulation, with TRL's metrics beside."""

from collections.abc import Callable
from typing import Any

import torch

from stagekit.errors import StageError


Loss = Callable[[Any, Any, Any], Any]
"""`(outputs, labels, num_items) -> loss`."""


def own_loss(
    trainer: Any, function: Loss, model: Any, inputs: dict[str, Any], return_outputs: bool, num_items: Any
) -> Any:
    """What `compute_loss` of a trainer returns, with the loss from `function`.

    A loss is either a sum by `num_items`, the labels in all batches of the step, or a mean over its batch, which the
    trainer has to divide by the number of batches; which of them is found out by asking (trap T12).
    """
    inputs = {**inputs, "use_cache": False}
    if trainer.aux_loss_enabled:
        inputs["output_router_logits"] = True
    labels = inputs.pop("labels")
    outputs = model(**inputs)
    loss = _called(function, outputs, labels, num_items)
    if trainer.model.training:
        scaled = num_items is not None and _is_scaled(trainer, function, outputs, labels, num_items)
        trainer.loss_is_scaled_for_ga = scaled
        if scaled and trainer.args.average_tokens_across_devices:
            loss = loss * (trainer.accelerator.num_processes // trainer.get_tp_size())
    _measure(trainer, outputs.logits.detach(), labels, inputs)
    return (loss, outputs) if return_outputs else loss


def _called(function: Loss, outputs: Any, labels: Any, num_items: Any) -> Any:
    loss = function(outputs, labels, num_items)
    if not isinstance(loss, torch.Tensor) or loss.dim() != 0:
        what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else repr(loss)
        raise StageError(f"custom_loss_function returned {what}; it returns a loss, a tensor with one number")
    return loss


def _is_scaled(trainer: Any, function: Loss, outputs: Any, labels: Any, num_items: Any) -> bool:
    """Whether twice the number of items gives half the loss. Asked once, and only where it makes a difference.

    Raises:
        StageError: the loss is neither divided by the number of items nor free of it.
    """
    if trainer.args.gradient_accumulation_steps == 1 and trainer.accelerator.num_processes == 1:
        return True
    known: bool | None = getattr(trainer, "_own_loss_is_scaled", None)
    if known is not None:
        return known
    devices = [outputs.logits.device] if outputs.logits.is_cuda else []
    found = []
    for factor in (1, 2):
        with torch.no_grad(), torch.random.fork_rng(devices):
            found.append(float(_called(function, outputs, labels, num_items * factor)))
    once, twice = found
    if once == 0:
        return True  # a batch without a label says nothing; the next one is asked
    by_items, free = abs(twice - once / 2) <= 1e-3 * abs(once), abs(twice - once) <= 1e-3 * abs(once)
    if not by_items and not free:
        raise StageError(
            f"custom_loss_function: with twice the num_items the loss is {twice:.6g} and not {once / 2:.6g} (a sum by "
            f"num_items) or {once:.6g} (a mean over the batch), so it cannot be accumulated over "
            f"{trainer.args.gradient_accumulation_steps} batches. Divide all of it by num_items, or none"
        )
    trainer._own_loss_is_scaled = by_items
    return by_items


@torch.no_grad()
def _measure(trainer: Any, logits: Any, labels: Any, inputs: dict[str, Any]) -> None:
    """The numbers that TRL logs beside its own loss: token accuracy, entropy, tokens seen."""
    mode = "train" if trainer.model.training else "eval"
    valid = labels[:, 1:] != -100
    correct = ((logits[:, :-1].argmax(-1) == labels[:, 1:]) & valid).sum()
    entropy = torch.zeros((), device=logits.device)
    for row, keep in zip(logits[:, :-1], valid, strict=True):
        chosen = row[keep].float()
        entropy += (torch.logsumexp(chosen, -1) - (chosen.softmax(-1) * chosen).sum(-1)).sum()
    gather, metrics = trainer.accelerator.gather_for_metrics, trainer._metrics[mode]
    count = gather(valid.sum()).sum()
    metrics["entropy"].append((gather(entropy).sum() / count).item() if count > 0 else 0.0)
    metrics["mean_token_accuracy"].append((gather(correct).sum() / count).item() if count > 0 else 0.0)
    if mode == "train":
        local = inputs["attention_mask"].sum() if "attention_mask" in inputs else labels.new_tensor(labels.numel())
        trainer._total_train_tokens += gather(local).sum().item() // trainer._tp_size
    metrics["num_tokens"] = [trainer._total_train_tokens]
