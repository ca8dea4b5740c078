"""Losses of the preference trainers, against formulas worked out here and TRL's experimental trainers."""

import contextlib
import importlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch.nn.functional import logsigmoid, relu
from trl import DPOTrainer

from stagekit.errors import ConfigError
from stagekit.losses import cpo_loss, hinge_loss, odds_ratio_loss, simpo_loss, soft_label_dpo_loss
from stagekit.trainers.preference import (
    OWN_MARGIN,
    MarginDPOTrainer,
    ORPOTrainer,
    ReferenceFreeDPOTrainer,
    SoftLabelDPOTrainer,
)
from tests.trainers.pairs import ByHand, another, batch_of, config, load, loss_of, make, metrics_of, plain


FREE = {"precompute_ref_log_probs": True}
EXACT = {"rtol": 2e-6, "atol": 2e-6}
"""Two ways to sum some ten float32 log-probs."""

Loss = Callable[[ByHand], torch.Tensor]


FREE_LOSSES: dict[str, tuple[dict[str, Any], float | None, Loss]] = {
    "cpo": (
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.7], "beta": 0.1},
        None,
        lambda hand: cpo_loss(hand.chosen, hand.rejected, 0.1).mean() + 0.7 * hand.completion_nll,
    ),
    "cpo with a margin": (
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 1.0], "beta": 0.1},
        0.5,
        lambda hand: cpo_loss(hand.chosen, hand.rejected, 0.1, margin=0.5).mean() + hand.completion_nll,
    ),
    "simpo": (
        {"loss_type": ["sigmoid_norm"], "beta": 2.0},
        1.5,
        lambda hand: simpo_loss(hand.chosen_average, hand.rejected_average, 2.0, 1.5).mean(),
    ),
    "simpo of truncated completions": (
        {"loss_type": ["sigmoid_norm"], "beta": 2.0, "max_length": 30},
        1.5,
        lambda hand: simpo_loss(hand.chosen_average, hand.rejected_average, 2.0, 1.5).mean(),
    ),
    "dpo": (
        {"loss_type": ["sigmoid"], "beta": 0.1},
        None,
        lambda hand: -logsigmoid(0.1 * (hand.chosen - hand.rejected)).mean(),
    ),
    "conservative": (
        {"loss_type": ["sigmoid", "robust"], "loss_weights": [1.8, -0.8], "label_smoothing": 0.1, "beta": 0.1},
        0.5,
        lambda hand: soft_label_dpo_loss(hand.chosen - hand.rejected - 5.0, 0.1, 0.9).mean(),
    ),
    "hinge": (
        {"loss_type": ["hinge"], "beta": 0.1},
        None,
        lambda hand: hinge_loss(hand.chosen - hand.rejected, 0.1).mean(),
    ),
    "ipo": (
        {"loss_type": ["ipo"], "beta": 0.1},
        None,
        lambda hand: (hand.chosen_average - hand.rejected_average - 5.0).square().mean(),
    ),
}


@pytest.mark.parametrize("name", FREE_LOSSES)
@pytest.mark.parametrize("texts", [False, True], ids=["chat", "plain"])
def test_t43_reference_free_losses_are_their_formulas(
    name: str, texts: bool, tiny_model_path: str, preference_rows: list[Any], tmp_path: Path
) -> None:
    given, margin, formula = FREE_LOSSES[name]
    if texts and "truncated" in name:
        given = {**given, "max_length": 18}
    rows = plain(preference_rows) if texts else preference_rows
    model = load(tiny_model_path)
    trainer = make(ReferenceFreeDPOTrainer, model, rows, tmp_path, tiny_model_path, {**given, **FREE}, margin=margin)
    batch = batch_of(trainer)
    hand = ByHand(model, batch)
    if "truncated" in name:
        ids = trainer.train_dataset["chosen_ids"][:4]
        assert [len(row) for row in ids] != hand.chosen_length.tolist()
    torch.testing.assert_close(loss_of(trainer, batch), formula(hand), **EXACT)
    average = "sigmoid_norm" in given["loss_type"]
    chosen, rejected = (hand.chosen_average, hand.rejected_average) if average else (hand.chosen, hand.rejected)
    logged = metrics_of(trainer)
    assert logged["rewards/chosen"] == pytest.approx(given["beta"] * float(chosen.mean()), rel=1e-5)
    assert logged["rewards/margins"] == pytest.approx(
        given["beta"] * float((chosen - rejected).mean()), rel=1e-4, abs=1e-6
    )
    assert logged["rewards/accuracies"] == float((chosen > rejected).float().mean())
    assert logged["logps/chosen"] == pytest.approx(float(hand.chosen.mean()), rel=1e-5)


def sorted_(values: torch.Tensor) -> torch.Tensor:
    return values.sort(dim=0)[0]


REAL_LOSSES: dict[str, tuple[dict[str, Any], Callable[..., torch.Tensor]]] = {
    "sigmoid": ({}, lambda x, m, *_: -logsigmoid(x - m)),
    "hinge": ({}, lambda x, m, *_: relu(m - x)),
    "robust": (
        {"label_smoothing": 0.1},
        lambda x, m, *_: (-0.9 * logsigmoid(x - m) + 0.1 * logsigmoid(m - x)) / 0.8,
    ),
    "exo_pair": (
        {"label_smoothing": 0.1},
        lambda x, m, *_: (
            torch.sigmoid(x - m) * (logsigmoid(x - m) - math.log(0.9))
            + torch.sigmoid(m - x) * (logsigmoid(m - x) - math.log(0.1))
        ),
    ),
    "discopop": (
        {},
        lambda x, m, *_: (
            -logsigmoid(x - m) * (1 - torch.sigmoid((x - m) / 0.05)) + torch.exp(m - x) * torch.sigmoid((x - m) / 0.05)
        ),
    ),
    "aot": ({}, lambda x, m, policy, reference, *_: -logsigmoid(0.3 * (sorted_(policy) - sorted_(reference)) - m)),
    "aot_unpaired": (
        {},
        lambda x, m, _1, _2, chosen, rejected: -logsigmoid(0.3 * (sorted_(chosen) - sorted_(rejected)) - m),
    ),
}


@pytest.mark.parametrize("precompute", [False, True])
@pytest.mark.parametrize("name", REAL_LOSSES)
def test_losses_with_a_margin_are_their_formulas(
    name: str, precompute: bool, tiny_model_path: str, preference_rows: list[Any], tmp_path: Path
) -> None:
    given, formula = REAL_LOSSES[name]
    margin = 0.7
    given = {"loss_type": [name], "beta": 0.3, "precompute_ref_log_probs": precompute, **given}
    model, reference = another(load(tiny_model_path)), load(tiny_model_path)
    trainer = make(
        MarginDPOTrainer, model, preference_rows, tmp_path, tiny_model_path, given, margin=margin, ref_model=reference
    )
    batch = batch_of(trainer)
    policy, before = ByHand(model, batch), ByHand(reference, batch)
    chosen, rejected = policy.chosen - before.chosen, policy.rejected - before.rejected
    delta = chosen - rejected
    ratios = policy.chosen - policy.rejected, before.chosen - before.rejected
    expected = formula(0.3 * delta, margin, *ratios, chosen, rejected).mean()
    loss = loss_of(trainer, batch)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    loss.backward()
    found = [parameter.grad.clone() for parameter in model.parameters()]
    wanted = torch.autograd.grad(expected, list(model.parameters()))
    torch.testing.assert_close(found, list(wanted), rtol=1e-3, atol=1e-5)
    logged = metrics_of(trainer)
    assert logged["rewards/margins"] == pytest.approx(0.3 * float(delta.mean()), rel=1e-4, abs=1e-5)
    assert logged["rewards/accuracies"] == float((delta > 0).float().mean())


def test_every_loss_that_can_have_a_margin_is_tested() -> None:
    assert {*REAL_LOSSES, "sigmoid_norm"} == set(OWN_MARGIN)


@pytest.mark.parametrize(
    "loss", ["sigmoid", "hinge", "ipo", "nca_pair", "sppo_hard", "apo_zero", "apo_down", "bco_pair"]
)
def test_without_a_margin_loss_and_metrics_are_trls(
    loss: str, tiny_model_path: str, preference_rows: list[Any], tmp_path: Path
) -> None:
    found = []
    for kind in (DPOTrainer, MarginDPOTrainer):
        trainer = make(
            kind,
            another(load(tiny_model_path)),
            preference_rows,
            tmp_path,
            tiny_model_path,
            {"loss_type": [loss]},
            ref_model=load(tiny_model_path),
        )
        found.append((float(loss_of(trainer, batch_of(trainer))), metrics_of(trainer)))
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("loss", "margin", "expected"),
    [
        ("sigmoid", 0.0, math.log(2)),
        ("sigmoid", 0.5, math.log1p(math.exp(0.5))),
        ("hinge", 2.5, 2.5),
        ("hinge", 0.25, 0.25),
    ],
)
def test_step_0_of_a_loss_with_a_margin(
    loss: str, margin: float, expected: float, tiny_model_path: str, preference_rows: list[Any], tmp_path: Path
) -> None:
    given = {"loss_type": [loss], "precompute_ref_log_probs": True}
    trainer = make(MarginDPOTrainer, tiny_model_path, preference_rows, tmp_path, tiny_model_path, given, margin=margin)
    assert float(loss_of(trainer, batch_of(trainer))) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("kind", "given", "options", "message"),
    [
        (MarginDPOTrainer, {"loss_type": ["hinge"]}, {"margin": 0.0}, "margin of 0 learns nothing"),
        (MarginDPOTrainer, {"loss_type": ["ipo"]}, {"margin": 0.5}, "'ipo' has none"),
        (MarginDPOTrainer, {"loss_type": ["sigmoid", "hinge"]}, {"margin": 0.5}, "one margin together"),
        (MarginDPOTrainer, {}, {"margin": -1.0}, "-1.0 is no margin"),
        (MarginDPOTrainer, {"ld_alpha": 0.5}, {}, "ld_alpha"),
        (MarginDPOTrainer, {"f_divergence_type": "forward_kl"}, {}, "f_divergence_type"),
        (MarginDPOTrainer, {}, {"cache_dir": "x"}, "precompute_ref_log_probs=True"),
        (ReferenceFreeDPOTrainer, {}, {}, "precompute_ref_log_probs=True"),
        (ReferenceFreeDPOTrainer, FREE, {"ref_model": object()}, "leave ref_model out"),
        (ORPOTrainer, {}, {}, "precompute_ref_log_probs=True"),
        (SoftLabelDPOTrainer, {"loss_type": ["hinge"]}, {}, "has no soft labels"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_loaded(
    kind: Any, given: dict[str, Any], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        kind(model="no/such-model", args=config(tmp_path, **given), **options)


def orpo_by_hand(hand: ByHand, weight: float) -> torch.Tensor:
    return hand.sequence_nll + weight * odds_ratio_loss(hand.chosen_average, hand.rejected_average).mean()


@pytest.mark.parametrize("texts", [False, True], ids=["chat", "plain"])
def test_orpo_is_its_formula(texts: bool, tiny_model_path: str, preference_rows: list[Any], tmp_path: Path) -> None:
    model = load(tiny_model_path)
    rows = plain(preference_rows) if texts else preference_rows
    trainer = make(ORPOTrainer, model, rows, tmp_path, tiny_model_path, {"beta": 0.4, **FREE})
    batch = batch_of(trainer)
    hand = ByHand(model, batch)
    loss, expected = loss_of(trainer, batch), orpo_by_hand(hand, 0.4)
    torch.testing.assert_close(loss, expected, **EXACT)
    loss.backward()
    found = [parameter.grad.clone() for parameter in model.parameters()]
    torch.testing.assert_close(
        found, list(torch.autograd.grad(expected, list(model.parameters()))), rtol=1e-3, atol=1e-5
    )
    logged = metrics_of(trainer)
    assert logged["nll_loss"] == pytest.approx(float(hand.sequence_nll), rel=1e-5)
    assert logged["rewards/accuracies"] == float((hand.chosen_average > hand.rejected_average).float().mean())


@contextlib.contextmanager
def experimental(name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A trainer class of trl.experimental, as an oracle only."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    try:
        module = importlib.import_module(f"trl.experimental.{name.lower()}")
    except ImportError:
        pytest.skip(f"this TRL has no experimental {name}")
    yield getattr(module, f"{name}Trainer")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("loss", "given", "margin", "smoothing"),
    [
        ("sigmoid", {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 1.0]}, None, 0.0),
        (
            "sigmoid",
            {
                "loss_type": ["sigmoid", "robust", "sft"],
                "loss_weights": [1.6, -0.6, 1.0],
                "label_smoothing": 0.2,
            },
            None,
            0.2,
        ),
        ("simpo", {"loss_type": ["sigmoid_norm"]}, 0.9, 0.0),
        ("hinge", {"loss_type": ["hinge"]}, None, 0.0),
    ],
    ids=["cpo", "cpo with smoothing", "simpo", "hinge"],
)
def test_t43_cpo_and_simpo_agree_with_trls_experimental_trainer(
    loss: str,
    given: dict[str, Any],
    margin: float | None,
    smoothing: float,
    tiny_model_path: str,
    preference_rows: list[Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = load(tiny_model_path)
    given = {**given, "beta": 0.3, **FREE}
    trainer = make(ReferenceFreeDPOTrainer, model, preference_rows, tmp_path, tiny_model_path, given, margin=margin)
    batch = batch_of(trainer)
    hand = ByHand(model, batch)
    it = SimpleNamespace(
        alpha=0.0,
        beta=0.3,
        loss_type=loss,
        simpo_gamma=margin,
        label_smoothing=smoothing,
        accelerator=trainer.accelerator,
    )
    pair = (hand.chosen_average, hand.rejected_average) if loss == "simpo" else (hand.chosen, hand.rejected)
    with experimental("CPO", monkeypatch) as oracle:
        losses, chosen, rejected = oracle.cpo_loss(it, *pair)
    expected = losses.mean() + (hand.completion_nll if "sft" in given["loss_type"] else 0.0)
    torch.testing.assert_close(loss_of(trainer, batch), expected, **EXACT)
    assert metrics_of(trainer)["rewards/chosen"] == pytest.approx(float(chosen.mean()), rel=1e-5)
    assert metrics_of(trainer)["rewards/rejected"] == pytest.approx(float(rejected.mean()), rel=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_orpo_agrees_with_trls_experimental_trainer(
    tiny_model_path: str, preference_rows: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(tiny_model_path)
    trainer = make(ORPOTrainer, model, preference_rows, tmp_path, tiny_model_path, {"beta": 0.3, **FREE})
    batch = batch_of(trainer)
    rows = {}
    for half, name in enumerate(("chosen", "rejected")):
        for key in ("input_ids", "attention_mask"):
            rows[f"{name}_{key}"] = batch[key].chunk(2)[half]
        completion = batch["completion_mask"].chunk(2)[half]
        rows[f"{name}_labels"] = rows[f"{name}_input_ids"].masked_fill(completion == 0, -100)
    with experimental("ORPO", monkeypatch) as oracle:
        it = SimpleNamespace(
            beta=0.3,
            accelerator=trainer.accelerator,
            is_encoder_decoder=False,
            padding_value=trainer.processing_class.pad_token_id,
            aux_loss_enabled=False,
            aux_loss_coef=0.0,
            concatenated_inputs=oracle.concatenated_inputs,
            get_batch_logps=oracle.get_batch_logps,
        )
        it.concatenated_forward = lambda *given: oracle.concatenated_forward(it, *given)
        it.odds_ratio_loss = lambda *given: oracle.odds_ratio_loss(it, *given)
        expected, logged = oracle.get_batch_loss_metrics(it, load(tiny_model_path), rows)
    torch.testing.assert_close(loss_of(trainer, batch), expected, **EXACT)
    mine = metrics_of(trainer)
    for name in (
        "nll_loss",
        "log_odds_ratio",
        "log_odds_chosen",
        "logps/chosen",
        "rewards/margins",
        "rewards/accuracies",
    ):
        assert mine[name] == pytest.approx(logged[name], rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("precompute", [False, True])
def test_soft_labels_are_their_formula(
    precompute: bool, tiny_model_path: str, preference_rows: list[Any], tmp_path: Path
) -> None:
    probabilities = [0.9, None, 0.2, 0.5, *[None] * 12]
    rows = [{**row, "chosen_prob": p} for row, p in zip(preference_rows, probabilities, strict=True)]
    model, reference = another(load(tiny_model_path)), load(tiny_model_path)
    given = {"beta": 0.3, "label_smoothing": 0.1, "precompute_ref_log_probs": precompute}
    trainer = make(SoftLabelDPOTrainer, model, rows, tmp_path, tiny_model_path, given, ref_model=reference)
    batch = batch_of(trainer)
    assert batch["chosen_prob"].tolist() == pytest.approx([0.9, 0.9, 0.2, 0.5])
    loss = loss_of(trainer, dict(batch))
    policy, before = ByHand(model, batch), ByHand(reference, batch)
    delta = (policy.chosen - before.chosen) - (policy.rejected - before.rejected)
    expected = soft_label_dpo_loss(delta, 0.3, batch["chosen_prob"]).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    loss.backward()
    found = [parameter.grad.clone() for parameter in model.parameters()]
    torch.testing.assert_close(
        found, list(torch.autograd.grad(expected, list(model.parameters()))), rtol=1e-3, atol=1e-5
    )
    trainer.train()  # the column reaches the batches of a real run
    assert trainer.state.log_history[0]["loss"] > 0


def test_soft_labels_with_the_chosen_ones_cross_entropy(
    tiny_model_path: str, preference_rows: list[Any], tmp_path: Path
) -> None:
    model, reference = another(load(tiny_model_path)), load(tiny_model_path)
    given = {"loss_type": ["sft", "sigmoid"], "loss_weights": [0.5, 2.0], "beta": 0.3, "label_smoothing": 0.25}
    trainer = make(SoftLabelDPOTrainer, model, preference_rows, tmp_path, tiny_model_path, given, ref_model=reference)
    batch = batch_of(trainer)
    policy, before = ByHand(model, batch), ByHand(reference, batch)
    delta = (policy.chosen - before.chosen) - (policy.rejected - before.rejected)
    expected = 0.5 * policy.completion_nll + 2.0 * soft_label_dpo_loss(delta, 0.3, 0.75).mean()
    torch.testing.assert_close(loss_of(trainer, batch), expected, rtol=1e-5, atol=1e-5)


def test_soft_labels_equal_the_conservative_weights_of_trls_losses(
    tiny_model_path: str, preference_rows: list[Any], tmp_path: Path
) -> None:
    weights = {"loss_type": ["sigmoid", "robust"], "loss_weights": [1.8, -0.8]}
    found = []
    for kind, given in ((SoftLabelDPOTrainer, {}), (DPOTrainer, weights)):
        trainer = make(
            kind,
            another(load(tiny_model_path)),
            preference_rows,
            tmp_path,
            tiny_model_path,
            {"label_smoothing": 0.1, **given},
            ref_model=load(tiny_model_path),
        )
        found.append(float(loss_of(trainer, batch_of(trainer))))
    assert found[0] == pytest.approx(found[1], abs=1e-6)


def test_soft_labels_start_at_ln_2_whatever_they_are(
    tiny_model_path: str, preference_rows: list[Any], tmp_path: Path
) -> None:
    rows = [{**row, "chosen_prob": n / 15} for n, row in enumerate(preference_rows)]
    trainer = make(SoftLabelDPOTrainer, tiny_model_path, rows, tmp_path, tiny_model_path, FREE)
    assert float(loss_of(trainer, batch_of(trainer, 16))) == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("where", ["train", "eval", "eval of several"])
def test_a_label_that_is_no_probability_is_refused(
    where: str, tiny_model_path: str, preference_rows: list[Any], tmp_path: Path
) -> None:
    good = Dataset.from_list(preference_rows)
    bad = Dataset.from_list([{**row, "chosen_prob": 1.5} for row in preference_rows])
    data = {"train": {"rows": bad}, "eval": {"rows": good, "eval_dataset": bad}}.get(
        where, {"rows": good, "eval_dataset": {"a": good, "b": bad}}
    )
    with pytest.raises(ConfigError, match=r"1\.5 is no probability"):
        make(SoftLabelDPOTrainer, tiny_model_path, folder=tmp_path, path=tiny_model_path, given={}, **data)
