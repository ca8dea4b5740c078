"""Preference trainers: their losses against formulas worked out here and against TRL's experimental trainers."""

import contextlib
import importlib
import inspect
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn.functional import logsigmoid, relu
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOTrainer, KTOConfig, KTOTrainer
from trl.trainer import dpo_trainer
from trl.trainer.utils import FusedCausalLMOutput

from stagekit.errors import ConfigError
from stagekit.hooks import Hooked, Hooks
from stagekit.losses import cpo_loss, hinge_loss, odds_ratio_loss, simpo_loss, soft_label_dpo_loss
from stagekit.trainers.preference import (
    OWN_MARGIN,
    MarginDPOTrainer,
    ORPOTrainer,
    ReferenceFreeDPOTrainer,
    SoftLabelDPOTrainer,
    kto_rows,
)
from tests.trainers.pairs import ByHand, another, batch_of, config, even_rows, loss_of, metrics_of, plain


FREE = {"precompute_ref_log_probs": True}
EXACT = {"rtol": 2e-6, "atol": 2e-6}
"""Two ways to sum some ten float32 log-probs."""

Loss = Callable[[ByHand], torch.Tensor]


def load(path: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(path)


def make(kind: Any, model: Any, rows: Any, folder: Path, path: str, given: dict[str, Any], **options: Any) -> Any:
    """A trainer; `given` goes into its config."""
    data = Dataset.from_list(rows) if isinstance(rows, list) else rows
    tokenizer = AutoTokenizer.from_pretrained(path)
    return kind(model=model, args=config(folder, **given), train_dataset=data, processing_class=tokenizer, **options)


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


METHODS: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "cpo": (
        ReferenceFreeDPOTrainer,
        {**FREE, "loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 1.0]},
        {"margin": 0.2},
    ),
    "simpo": (ReferenceFreeDPOTrainer, {**FREE, "loss_type": ["sigmoid_norm"], "beta": 2.0}, {"margin": 1.0}),
    "orpo": (ORPOTrainer, FREE, {}),
    "hinge": (MarginDPOTrainer, {"loss_type": ["hinge"]}, {"margin": 2.0}),
    "soft": (SoftLabelDPOTrainer, {"label_smoothing": 0.1}, {}),
}


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", METHODS)
def test_accumulated_gradients_are_those_of_the_whole_batch(
    name: str, lora: bool, tiny_model_path: str, tmp_path: Path
) -> None:
    kind, given, options = METHODS[name]
    rows = even_rows(AutoTokenizer.from_pretrained(tiny_model_path))
    found = []
    for batch, steps in ((16, 1), (4, 4)):
        sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": steps}
        peft = {"peft_config": LoraConfig(r=4, task_type="CAUSAL_LM")} if lora else {}
        trainer = make(kind, tiny_model_path, rows, tmp_path, tiny_model_path, {**given, **sizes}, **options, **peft)
        trainer.train()
        found.append((trainer.state.log_history[0]["grad_norm"], trainer.state.log_history[0]["loss"]))
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    assert found[0][0] > 1e-3


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", METHODS)
def test_the_loss_of_a_batch_that_can_be_memorised_falls(
    name: str, lora: bool, tiny_model_path: str, preference_rows: list[Any], tmp_path: Path
) -> None:
    kind, given, options = METHODS[name]
    peft = {"peft_config": LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")} if lora else {}
    given = {**given, "max_steps": 25, "learning_rate": 1e-2 if lora else 2e-3}
    rows = Dataset.from_list(preference_rows[:4])
    trainer = make(kind, tiny_model_path, rows, tmp_path, tiny_model_path, given, **options, **peft)
    before = {key: tensor.clone() for key, tensor in trainer.model.state_dict().items()}
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.7 * losses[0]
    accuracies = [entry["rewards/accuracies"] for entry in trainer.state.log_history if "rewards/accuracies" in entry]
    assert accuracies[-1] == 1.0
    moved = {key for key, tensor in trainer.model.state_dict().items() if not torch.equal(tensor, before[key])}
    assert moved and all(("lora_" in key) is lora for key in moved)


@pytest.mark.parametrize("kind", [ReferenceFreeDPOTrainer, ORPOTrainer])
def test_no_reference_model_is_loaded_or_run(
    kind: Any, tiny_model_path: str, preference_rows: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = []
    original = dpo_trainer.create_model_from_path

    def count(*args: Any, **kwargs: Any) -> Any:
        loaded.append(args)
        return original(*args, **kwargs)

    monkeypatch.setattr(dpo_trainer, "create_model_from_path", count)
    forwards = []
    data = Dataset.from_list(preference_rows)
    trainer = make(kind, tiny_model_path, data, tmp_path, tiny_model_path, FREE, eval_dataset=data)
    trainer.model.model.register_forward_hook(lambda *_: forwards.append(1))
    trainer.train()
    assert (len(loaded), len(forwards)) == (1, 1)
    assert trainer.ref_model is None
    assert not {"ref_chosen_logps", "ref_rejected_logps"} & set(trainer.train_dataset.column_names)


@pytest.mark.parametrize("kind", [ReferenceFreeDPOTrainer, ORPOTrainer])
def test_an_adapter_that_comes_in_gets_no_copy_as_reference(
    kind: Any, tiny_model_path: str, preference_rows: list[Any], tmp_path: Path
) -> None:
    model = get_peft_model(load(tiny_model_path), LoraConfig(r=4, task_type="CAUSAL_LM"))
    trainer = make(kind, model, preference_rows, tmp_path, tiny_model_path, FREE)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    assert list(trainer.model.peft_config) == ["default"]
    again = PeftModel.from_pretrained(load(tiny_model_path), tmp_path / "saved")
    batch = batch_of(trainer)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    trainer.model.eval()
    assert torch.equal(trainer.model(**inputs).logits, again.eval()(**inputs).logits)


@pytest.mark.parametrize("kind", [ReferenceFreeDPOTrainer, ORPOTrainer, MarginDPOTrainer, SoftLabelDPOTrainer])
def test_several_evaluation_sets_and_a_new_one_after_training(
    kind: Any, tiny_model_path: str, preference_rows: list[Any], tmp_path: Path
) -> None:
    data = Dataset.from_list(preference_rows)
    given = FREE if kind in (ReferenceFreeDPOTrainer, ORPOTrainer) else {}
    sets = {"a": data.select(range(8)), "b": data.select(range(8, 16))}
    trainer = make(kind, tiny_model_path, data, tmp_path, tiny_model_path, given, eval_dataset=sets)
    trainer.train()
    found = trainer.evaluate()
    assert {"eval_a_loss", "eval_b_loss", "eval_rewards/accuracies"} <= set(found)  # TRL names no set in the latter
    again = trainer.evaluate(data.select(range(8)))
    assert again["eval_loss"] == pytest.approx(found["eval_a_loss"], rel=1e-5)


@pytest.mark.parametrize("kind", [ReferenceFreeDPOTrainer, ORPOTrainer])
def test_a_run_without_a_reference_takes_streamed_data(
    kind: Any, tiny_model_path: str, preference_rows: list[Any], tmp_path: Path
) -> None:
    losses = []
    for stream in (False, True):
        data: Any = Dataset.from_list(preference_rows)
        data = data.to_iterable_dataset() if stream else data
        given = {**FREE, "train_sampling_strategy": "sequential", "max_steps": 3}
        trainer = make(kind, tiny_model_path, data, tmp_path, tiny_model_path, given)
        assert isinstance(trainer.train_dataset, IterableDataset) is stream
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == losses[1] and len(losses[0]) == 3


@pytest.mark.parametrize("name", METHODS)
def test_the_hooks_of_a_stage_go_on_top(
    name: str, tiny_model_path: str, preference_rows: list[Any], tmp_path: Path
) -> None:
    kind, given, options = METHODS[name]
    losses = []
    for made in (kind, type("Staged", (Hooked, kind), {"hooks": Hooks(hidden_logs=frozenset({"grad_norm"}))})):
        trainer = make(made, tiny_model_path, preference_rows, tmp_path, tiny_model_path, given, **options)
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[0] == losses[1]
    assert "grad_norm" not in trainer.state.log_history[0]


@pytest.mark.parametrize("kind", [MarginDPOTrainer, SoftLabelDPOTrainer])
def test_streamed_data_is_refused_where_log_probs_are_computed_ahead(
    kind: Any, tiny_model_path: str, preference_rows: list[Any], tmp_path: Path
) -> None:
    data = Dataset.from_list(preference_rows).to_iterable_dataset()
    with pytest.raises(ConfigError, match="cannot be computed ahead for streamed data"):
        make(kind, tiny_model_path, data, tmp_path, tiny_model_path, FREE)


@pytest.mark.parametrize("name", METHODS)
def test_a_resumed_run_ends_with_the_same_weights(
    name: str, tiny_model_path: str, preference_rows: list[Any], tmp_path: Path
) -> None:
    kind, given, options = METHODS[name]
    weights = []
    for resume in (None, tmp_path / "out" / "checkpoint-2"):
        whole = {**given, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
        trainer = make(kind, tiny_model_path, preference_rows, tmp_path, tiny_model_path, whole, **options)
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        weights.append(trainer.model.state_dict())
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_the_model_card_of_orpo_names_orpo(tiny_model_path: str, preference_rows: list[Any], tmp_path: Path) -> None:
    trainer = make(ORPOTrainer, tiny_model_path, preference_rows, tmp_path, tiny_model_path, FREE)
    trainer.create_model_card(model_name="mine")
    text = (tmp_path / "out/README.md").read_text()
    assert "ORPO: Monolithic Preference Optimization" in text and "2403.07691" in text


@pytest.mark.parametrize("texts", [False, True], ids=["chat", "plain"])
def test_t19_kto_rows_mix_both_labels_into_every_batch(texts: bool, preference_rows: list[Any]) -> None:
    data = plain(preference_rows) if texts else Dataset.from_list(preference_rows)
    rows = kto_rows(data, seed=3)
    assert len(rows) == 32
    labels = rows["label"][:]
    for size in (2, 3, 4):
        batches = [labels[start : start + size] for start in range(0, 30, size)]
        assert all(0 < sum(batch) < size for batch in batches)
    wanted = {
        (str(row["prompt"]), str(row[side]), side == "chosen") for row in data for side in ("chosen", "rejected")
    }
    assert {(str(row["prompt"]), str(row["completion"]), row["label"]) for row in rows} == wanted
    assert rows["label"][:] != [True, False] * 16  # the order within a couple is random too


def test_kto_rows_depend_on_the_seed_only(preference_rows: list[Any]) -> None:
    data = Dataset.from_list(preference_rows)
    assert kto_rows(data, 1).to_list() == kto_rows(data, 1).to_list() != kto_rows(data, 2).to_list()


def test_kto_rows_without_a_seed_keep_the_order_and_still_mix_the_labels(preference_rows: list[Any]) -> None:
    rows = kto_rows(Dataset.from_list(preference_rows), None)
    assert rows["label"][:] == [True, False] * 16
    assert rows["completion"][:4] == [preference_rows[n][side] for n in (0, 1) for side in ("chosen", "rejected")]
    labelled = rows.select(range(5))
    assert kto_rows(labelled, None).to_list() == labelled.to_list()


def test_unpaired_rows_are_only_shuffled() -> None:
    data = Dataset.from_list([{"prompt": "p", "completion": str(n), "label": n < 3, "extra": n} for n in range(20)])
    rows = kto_rows(data, 0)
    assert rows.to_list() != data.to_list()
    assert sorted(rows.to_list(), key=lambda row: row["extra"]) == data.to_list()


def test_kto_rows_find_the_prompt_in_both_completions() -> None:
    turn = {"role": "user", "content": "hi"}
    pair = [{"role": "assistant", "content": "good"}], [{"role": "assistant", "content": "bad"}]
    rows = kto_rows(Dataset.from_list([{"chosen": [turn, *pair[0]], "rejected": [turn, *pair[1]]}]), 0)
    assert sorted((row["completion"][0]["content"], row["label"]) for row in rows) == [("bad", False), ("good", True)]
    assert [row["prompt"] for row in rows] == [[turn], [turn]]


def test_kto_rows_say_what_is_missing(preference_rows: list[Any]) -> None:
    with pytest.raises(ConfigError, match="the data has completion, prompt"):
        kto_rows(Dataset.from_list([{"prompt": "a", "completion": "b"}]), 0)
    with pytest.raises(ConfigError, match="IterableDataset cannot be shuffled as a whole"):
        kto_rows(Dataset.from_list(preference_rows).to_iterable_dataset(), 0)


def test_trls_kto_trainer_takes_kto_rows(tiny_model_path: str, preference_rows: list[Any], tmp_path: Path) -> None:
    given = vars(config(tmp_path))
    names = ("output_dir", "max_steps", "learning_rate", "bf16", "use_cpu", "logging_steps", "disable_tqdm")
    args = KTOConfig(
        **{name: given[name] for name in names},
        report_to="none",
        save_strategy="no",
        gradient_checkpointing=False,
        per_device_train_batch_size=4,
        train_sampling_strategy="sequential",
    )
    trainer = KTOTrainer(
        model=tiny_model_path,
        args=args,
        train_dataset=kto_rows(Dataset.from_list(preference_rows), 0),
        processing_class=AutoTokenizer.from_pretrained(tiny_model_path),
    )
    for batch in trainer.get_train_dataloader():
        assert 0 < sum(batch["label"]) < 4
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0.5, abs=1e-5)  # 1 - sigma(0) at the reference


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("_precompute_ref_logps", ["self", "dataset", "name", "batch_size"]),
        ("compute_ref_log_probs", ["self", "model", "inputs"]),
        ("_compute_loss", ["self", "model", "inputs", "return_outputs"]),
        ("_set_signature_columns_if_needed", ["self"]),
    ],
)
def test_t50_canary_the_methods_of_trl_that_are_overridden(name: str, parameters: list[str]) -> None:
    assert list(inspect.signature(getattr(DPOTrainer, name)).parameters) == parameters


def test_canary_what_is_read_of_trls_trainer(
    tiny_model_path: str, preference_rows: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"precompute_ref_log_probs": True, "loss_type": ["sigmoid", "sft"]}
    trainer = make(DPOTrainer, tiny_model_path, preference_rows, tmp_path, tiny_model_path, given)
    assert trainer.precompute_ref_logps is True and trainer.ref_model is None
    assert trainer.loss_types == ["sigmoid", "sft"] and trainer.loss_weights == [1.0, 1.0]
    assert trainer.beta == 0.1 and trainer._tp_size == 1 and trainer._total_train_tokens == 0
    assert trainer.aux_loss_enabled is False and trainer.loss_is_scaled_for_ga is False
    assert isinstance(trainer._precompute_model_hash, str)
    assert set(trainer._metrics) == {"train", "eval"}
    assert {"ref_chosen_logps", "ref_rejected_logps"} <= set(trainer.train_dataset.column_names)
    # With the flag on, the loss takes the batch's ref-logps and calls no reference; off, it calls one.
    batch, calls = batch_of(trainer), []
    model = lambda **inputs: calls.append(sorted(inputs)) or trainer.model(**inputs)  # noqa: E731
    trainer.model.eval()
    shifted = {**batch, "ref_chosen_logps": batch["ref_chosen_logps"] + 7.0}
    one, other = trainer._compute_loss(model, batch, False), trainer._compute_loss(model, shifted, False)
    assert float(other) > float(one) and len(calls) == 2
    assert "fused_lm_head" in calls[0] and "chosen_prob" not in calls[0]
    rewards = {"rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"}
    assert rewards <= set(trainer._metrics["eval"])


def test_canary_the_fused_output_has_log_probs_that_are_0_outside_the_labels(
    tiny_model_path: str, preference_rows: list[Any], tmp_path: Path
) -> None:
    assert "log_probs" in inspect.signature(FusedCausalLMOutput).parameters
    trainer = make(DPOTrainer, tiny_model_path, preference_rows, tmp_path, tiny_model_path, FREE)
    batch = batch_of(trainer)
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    out = trainer.model(input_ids=batch["input_ids"], labels=labels, fused_lm_head=True, use_cache=False)
    assert out.log_probs.shape == (8, labels.size(1) - 1)
    assert not out.log_probs[labels[:, 1:] == -100].any() and (out.log_probs[labels[:, 1:] != -100] < 0).all()
