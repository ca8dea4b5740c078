"""Preference methods that TRL's stable trainers lack, each as a small subclass of its `DPOTrainer`.

Legend: B pairs of a batch, T tokens of its longest sequence. A batch has 2B rows, chosen above rejected. Ref-logps are
the reference model's log-probabilities of the completions, (B,) each.

A margin is asked of x = beta * delta (see `stagekit.losses`), so it is in units of the logged rewards, and a loss f(x)
becomes f(x - m). It is subtracted from delta through the chosen ref-logps. `sigmoid_norm` (SimPO) averages over the
tokens of a completion, so there m / beta is multiplied by their number, as left by truncation.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer, extract_prompt, unpair_preference_dataset

from stagekit.errors import ConfigError
from stagekit.losses import log_odds_ratio, odds_ratio_loss
from stagekit.trainers.reference import CachedReference


OWN_MARGIN = {
    "sigmoid": 0.0,
    "sigmoid_norm": 0.0,
    "hinge": 1.0,
    "robust": 0.0,
    "exo_pair": 0.0,
    "discopop": 0.0,
    "aot": 0.0,
    "aot_unpaired": 0.0,
}
"""The margin that TRL's loss has by itself, for the losses that depend on x only and so can have another."""


class Margin:
    """Mixin for `DPOTrainer`: asks for a margin, and logs rewards that do not depend on it.

    Args:
        margin: m in f(x - m); for hinge, m in max(0, m - x). None: the loss's own, 1 for hinge and 0 for the others.
            All losses of `args.loss_type` but `sft` get the same one.
        arguments: Everything else that the trainer takes.

    Raises:
        ConfigError: a margin that the loss cannot have, or an argument that changes what x is.
    """

    def __init__(self, model: Any, *, args: DPOConfig, margin: float | None = None, **arguments: Any) -> None:
        self._margin = _extra_margin(args, margin)
        super().__init__(model=model, args=args, **arguments)  # type: ignore[call-arg]

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        trainer: Any = self
        length_normalised = "sigmoid_norm" in trainer.loss_types
        chosen_length, rejected_length = inputs["completion_mask"].sum(dim=1).clamp(min=1).chunk(2)
        heard, given = _Heard(model), _with_references(self, inputs)
        per_pair = chosen_length if length_normalised else torch.ones_like(chosen_length)
        shifted = given["ref_chosen_logps"] + self._margin / trainer.beta * per_pair
        with _ReadsReferences(self):
            result = super()._compute_loss(  # type: ignore[misc]
                heard, {**given, "ref_chosen_logps": shifted}, return_outputs
            )
        chosen, rejected = _log_ratios(heard, given)
        if length_normalised:
            chosen, rejected = chosen / chosen_length, rejected / rejected_length
        for name, value in _rewards(self, chosen, rejected).items():
            _metrics(self)[name][-1] = value
        return result


class MarginDPOTrainer(Margin, CachedReference, DPOTrainer):  # type: ignore[misc]
    """`DPOTrainer` with a margin, against a real reference. Hinge is exactly max(0, m - x).

    The logged rewards are beta * (log pi - log ref), and `rewards/accuracies` is the share of pairs with the chosen
    one above the rejected one: neither depends on the margin.

    Args:
        margin: See `Margin`.
        cache_dir: See `CachedReference`.
        cache_key: See `CachedReference`.
        arguments: Everything else that `DPOTrainer` takes.

    Raises:
        ConfigError: a margin that the loss cannot have. For hinge it must be above 0, since at policy == reference
            x is 0 and the gradient of max(0, -x) is too.
    """

    def __init__(self, model: Any, *, args: DPOConfig, margin: float | None = None, **arguments: Any) -> None:
        if margin == 0 and "hinge" in args.loss_type:
            raise ConfigError(
                "margin: hinge with a margin of 0 learns nothing: while the policy is the reference its gradient is "
                "0. Give a margin above 0 (TRL's hinge has 1), or train without a reference"
            )
        super().__init__(model=model, args=args, margin=margin, **arguments)


class ReferenceFree:
    """Mixin for `DPOTrainer`: no reference model is loaded or run; all ref-logps are 0.

    Args:
        arguments: Everything else that `DPOTrainer` takes but `ref_model`.

    Raises:
        ConfigError: `args.precompute_ref_log_probs` is not set, by which TRL is kept from loading a reference.
    """

    def __init__(self, model: Any, *, args: DPOConfig, **arguments: Any) -> None:
        if not args.precompute_ref_log_probs:
            raise ConfigError(
                f"{type(self).__name__} has no reference: set precompute_ref_log_probs=True, so that "
                "TRL does not load one"
            )
        if arguments.get("ref_model") is not None:
            raise ConfigError(f"{type(self).__name__} has no reference: leave ref_model out")
        super().__init__(model=model, args=args, **arguments)  # type: ignore[call-arg]
        trainer: Any = self
        trainer.precompute_ref_logps = False  # nothing was, so a new data set can be evaluated at any time
        if "ref" in getattr(trainer.model, "peft_config", {}):
            trainer.model.delete_adapter("ref")  # TRL's copy of an adapter that came in

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        return dataset

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Zeros, (B,) each."""
        zeros = torch.zeros(len(inputs["input_ids"]) // 2, device=inputs["input_ids"].device)
        return zeros, zeros.clone()


class ReferenceFreeDPOTrainer(Margin, ReferenceFree, DPOTrainer):  # type: ignore[misc]
    """`DPOTrainer` without a reference, as if it were uniform: CPO, SimPO, and DPO, hinge or IPO without one.

    CPO is `loss_type=["sigmoid", "sft"]` with `loss_weights=[1, alpha]`; SimPO is `["sigmoid_norm"]` with gamma as
    margin. The logged rewards are beta * log pi, for SimPO beta times the average over the tokens;
    `rewards/accuracies` is the share of pairs with the chosen one above the rejected one, by whatever margin. Streamed
    data can be used.

    Args:
        margin: See `Margin`.
        arguments: Everything else that `DPOTrainer` takes but `ref_model`; `args.precompute_ref_log_probs` must be
            set, although nothing is computed ahead.

    Source: huggingface.co/papers/2401.08417 (CPO), huggingface.co/papers/2405.14734 (SimPO).
    """


class ORPOTrainer(ReferenceFree, DPOTrainer):  # type: ignore[misc]
    """Odds-ratio preference optimisation: cross-entropy of the chosen sequence plus lambda times the odds-ratio loss.

    lambda is `args.beta`. The cross-entropy is of prompt and completion, averaged over the tokens of the batch, as in
    the paper's code. `args.loss_type` is not read. The logged rewards are beta times the average log-prob of a
    completion; `nll_loss`, `log_odds_ratio` (its log sigma, as TRL names it) and `log_odds_chosen` are logged too.

    Args:
        arguments: Everything that `DPOTrainer` takes but `ref_model`; `args.precompute_ref_log_probs` must be set,
            although nothing is computed ahead.

    Source: huggingface.co/papers/2403.07691, equation 6.
    """

    _name: ClassVar = "ORPO"
    _tag_names: ClassVar = ["trl", "orpo"]
    _paper: ClassVar = {
        "title": "ORPO: Monolithic Preference Optimization without Reference Model",
        "id": "2403.07691",
        "citation": "",
    }

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        trainer: Any = self
        ids, attention = inputs["input_ids"], inputs["attention_mask"]
        options = {"output_router_logits": True} if trainer.aux_loss_enabled else {}
        labels = ids.masked_fill(attention == 0, -100)
        out = model(
            input_ids=ids, attention_mask=attention, labels=labels, fused_lm_head=True, use_cache=False, **options
        )
        mask = inputs["completion_mask"][:, 1:]  # (2B, T-1)
        log_probs = out.log_probs[:, -mask.size(1) :].float()
        lengths = mask.sum(dim=1).clamp(min=1)
        chosen, rejected = ((log_probs * mask).sum(dim=1) / lengths).chunk(2)
        chosen_tokens = attention[:, 1:].chunk(2)[0].sum()
        nll = -log_probs.chunk(2)[0].sum() / chosen_tokens
        odds_loss = odds_ratio_loss(chosen, rejected).mean()
        loss = nll + trainer.beta * odds_loss
        if trainer.aux_loss_enabled:
            loss = loss + trainer.router_aux_loss_coef * out.aux_loss
        gather = trainer.accelerator.gather
        values = {
            "nll_loss": gather(nll.detach()).mean().item(),
            "log_odds_ratio": -gather(odds_loss.detach()).mean().item(),
            "log_odds_chosen": gather(log_odds_ratio(chosen, rejected).detach()).mean().item(),
            "logps/chosen": gather(chosen.detach()).mean().item(),
            "logps/rejected": gather(rejected.detach()).mean().item(),
            **_rewards(self, chosen, rejected),
        }
        for name, value in values.items():
            _metrics(self)[name].append(value)
        if trainer.model.training:
            trainer._total_train_tokens += int(gather(attention.sum()).sum().item()) // trainer._tp_size
        _metrics(self)["num_tokens"] = [trainer._total_train_tokens]
        return (loss, out) if return_outputs else loss


class SoftLabels:
    """Mixin for `DPOTrainer`: the loss of a pair is the one expected when chosen is better with probability p.

    The column `chosen_prob` says p of each row, 0..1. Where it is missing or null, p is 1 - `args.label_smoothing`.
    """

    def __init__(self, model: Any, *, args: DPOConfig, **arguments: Any) -> None:
        if "sigmoid" not in args.loss_type or set(args.loss_type) - {"sigmoid", "sft"}:
            raise ConfigError(f"loss_type: {args.loss_type!r} has no soft labels; use ['sigmoid'], with 'sft' or not")
        _refuse_other_scores(args)
        if not 0 <= args.label_smoothing <= 1:
            raise ConfigError(f"label_smoothing: {args.label_smoothing} is no probability")
        for data in _data_sets(arguments):
            if isinstance(data, Dataset) and "chosen_prob" in data.column_names:
                _probabilities(data["chosen_prob"][:], 1.0)
        super().__init__(model=model, args=args, **arguments)  # type: ignore[call-arg]
        trainer: Any = self
        trainer.data_collator = _WithProbabilities(trainer.data_collator, 1.0 - args.label_smoothing)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()  # type: ignore[misc]
        trainer: Any = self
        if "chosen_prob" not in trainer._signature_columns:
            trainer._signature_columns.append("chosen_prob")

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Those of TRL, which would hand a key that it does not know to the model."""
        known = {name: value for name, value in inputs.items() if name != "chosen_prob"}
        found: tuple[torch.Tensor, torch.Tensor] = super().compute_ref_log_probs(model, known)  # type: ignore[misc]
        return found

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        trainer: Any = self
        inputs = dict(inputs)
        chosen_prob = inputs.pop("chosen_prob")
        heard, given = _Heard(model), _with_references(self, inputs)
        with _ReadsReferences(self):
            result = super()._compute_loss(heard, given, return_outputs)  # type: ignore[misc]
        chosen, rejected = _log_ratios(heard, given)
        weight = trainer.loss_weights[trainer.loss_types.index("sigmoid")]
        # TRL's loss has -log sigma(x); with -log sigma(-x) = -log sigma(x) + x, soft labels add (1 - p) x.
        soft = weight * ((1 - chosen_prob) * trainer.beta * (chosen - rejected)).mean()
        return (result[0] + soft, result[1]) if return_outputs else result + soft


class SoftLabelDPOTrainer(SoftLabels, CachedReference, DPOTrainer):  # type: ignore[misc]
    """DPO with soft labels: -p log sigma(x) - (1 - p) log sigma(-x), where p says how likely chosen is better.

    p is the column `chosen_prob`, say from AI feedback; without it 1 - `args.label_smoothing`, which is conservative
    DPO (cDPO). `loss_type` is `["sigmoid"]`, or with `"sft"`. `rewards/accuracies` counts chosen above rejected, also
    for pairs with p below 0.5.

    Args:
        cache_dir: See `CachedReference`.
        cache_key: See `CachedReference`.
        arguments: Everything else that `DPOTrainer` takes.

    Raises:
        ConfigError: another loss, or a p that is no probability.

    Source: ericmitchell.ai/cdpo.pdf, equation 3; see `stagekit.losses.soft_label_dpo_loss`.
    """


def kto_rows(dataset: Dataset, seed: int | None) -> Dataset:
    """Rows with prompt, completion and label for TRL's `KTOTrainer`, in a random order that the seed decides.

    TRL unpairs too, but into blocks of 1000 good completions and 1000 bad ones, and KTO reads in sequence: whole
    batches are one-sided and the KL estimate is of one kind. Here both kinds are shuffled, each by itself, and of
    every two rows in a row one is good and one is bad. Rows that are unpaired already are shuffled only. Further
    columns are kept. Train with `train_sampling_strategy="sequential"`, as KTO demands.

    Args:
        dataset: chosen and rejected, with prompt or with the prompt in both; or prompt, completion and label. Texts
            or conversations.
        seed: Of the shuffle. None: the order of the data; of a pair the good completion first.

    Raises:
        ConfigError: other columns, or streamed data.
    """
    if not isinstance(dataset, Dataset):
        raise ConfigError(f"kto_rows: a {type(dataset).__name__} cannot be shuffled as a whole; load it as a Dataset")
    columns = set(dataset.column_names)
    random = np.random.default_rng(seed)
    if {"prompt", "completion", "label"} <= columns:
        return dataset if seed is None else dataset.select(random.permutation(len(dataset)))
    if not {"chosen", "rejected"} <= columns:
        raise ConfigError(
            "kto needs columns prompt, completion and label, or chosen and rejected; the data has "
            f"{', '.join(sorted(columns))}"
        )
    if "prompt" not in columns:
        dataset = dataset.map(extract_prompt)
    unpaired = unpair_preference_dataset(dataset)
    labels = np.array(unpaired["label"][:])
    kinds = [np.flatnonzero(labels == label) for label in (True, False)]
    if seed is not None:
        kinds = [random.permutation(kind) for kind in kinds]
    couples = np.stack(kinds, axis=1) if seed is None else random.permuted(np.stack(kinds, axis=1), axis=1)
    return unpaired.select(couples.reshape(-1))


@dataclass
class _Heard:
    """A model, and the log-probs (2B, T-1) of its completions in the one call that TRL's loss makes of it."""

    model: Any
    log_probs: torch.Tensor | None = None

    def __call__(self, **inputs: Any) -> Any:
        out = self.model(**inputs)
        if inputs.get("fused_lm_head"):
            self.log_probs = out.log_probs
        return out


class _ReadsReferences:
    """While it lasts, TRL's loss takes the ref-logps of the batch instead of running a reference model."""

    def __init__(self, trainer: Any) -> None:
        self._trainer, self._before = trainer, trainer.precompute_ref_logps

    def __enter__(self) -> None:
        self._trainer.precompute_ref_logps = True

    def __exit__(self, *error: object) -> None:
        self._trainer.precompute_ref_logps = self._before


@dataclass
class _WithProbabilities:
    """A collator that adds p of each row, (B,)."""

    collate: Any
    default: float

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = self.collate(rows)
        batch["chosen_prob"] = torch.tensor(_probabilities([row.get("chosen_prob") for row in rows], self.default))
        return batch


def _probabilities(values: list[float | None], default: float) -> list[float]:
    found = [default if value is None else float(value) for value in values]
    for value in found:
        if not 0 <= value <= 1:
            raise ConfigError(f"chosen_prob: {value!r} is no probability; it must be between 0 and 1, or null")
    return found


def _data_sets(arguments: dict[str, Any]) -> list[Any]:
    evaluation = arguments.get("eval_dataset")
    return [arguments.get("train_dataset"), *(evaluation.values() if isinstance(evaluation, dict) else [evaluation])]


def _extra_margin(args: DPOConfig, margin: float | None) -> float:
    """What is added to the margin that TRL's losses have by themselves."""
    _refuse_other_scores(args)
    if margin is None:
        return 0.0
    if not 0 <= margin < math.inf:
        raise ConfigError(f"margin: {margin!r} is no margin; give a number of at least 0")
    asked = [name for name in args.loss_type if name != "sft"]
    without = [name for name in asked if name not in OWN_MARGIN]
    if without and margin > 0:
        raise ConfigError(f"margin: the loss {without[0]!r} has none; one of {', '.join(OWN_MARGIN)} has")
    if without:
        return 0.0
    kinds = {(OWN_MARGIN[name], name == "sigmoid_norm") for name in asked}
    extra = {margin - own for own, _ in kinds}
    if len(kinds) > 1 and extra != {0.0}:
        raise ConfigError(
            f"margin: the losses {', '.join(asked)} cannot have one margin together; train with one of them"
        )
    return extra.pop() if extra else 0.0


def _refuse_other_scores(args: DPOConfig) -> None:
    """Arguments by which TRL's losses no longer depend on beta * delta."""
    if args.ld_alpha is not None:
        raise ConfigError("ld_alpha: cannot be combined with a margin, soft labels or no reference; leave it out")
    if args.f_divergence_type != "reverse_kl":
        raise ConfigError(
            f"f_divergence_type: {args.f_divergence_type!r} cannot be combined with a margin, soft labels or no "
            "reference; use 'reverse_kl'"
        )


def _with_references(trainer: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """The batch with its ref-logps, from its columns or from the reference model."""
    if trainer.precompute_ref_logps:
        return inputs
    chosen, rejected = trainer.compute_ref_log_probs(trainer.ref_model or trainer.model, inputs)
    return {**inputs, "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}


def _log_ratios(heard: _Heard, given: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """log pi - log ref of the chosen and of the rejected completions, (B,) each."""
    assert heard.log_probs is not None
    tokens = given["completion_mask"].size(1) - 1  # prompt learning puts virtual tokens before them
    chosen, rejected = heard.log_probs[:, -tokens:].sum(dim=1).chunk(2)
    return chosen - given["ref_chosen_logps"], rejected - given["ref_rejected_logps"]


def _metrics(trainer: Any) -> Any:
    return trainer._metrics["train" if trainer.model.training else "eval"]


def _rewards(trainer: Any, chosen: torch.Tensor, rejected: torch.Tensor) -> dict[str, float]:
    """The logged rewards of (B,) log-probs or log-ratios, over all processes."""
    chosen, rejected = trainer.beta * chosen.detach(), trainer.beta * rejected.detach()
    values = {
        "chosen": chosen,
        "rejected": rejected,
        "accuracies": (chosen > rejected).float(),
        "margins": chosen - rejected,
    }
    return {f"rewards/{name}": trainer.accelerator.gather(value).mean().item() for name, value in values.items()}
