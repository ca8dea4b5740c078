"""The preference family as stages: their losses, their references, and what they refuse."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import AutoTokenizer
from trl import DPOConfig, KTOConfig, KTOTrainer

from stagekit import CPO, DPO, KTO, ORPO, ConfigError, LoRA, Reference, SimPO, TrainingStage
from stagekit.arguments import settings_of
from stagekit.trainers.preference import ORPOTrainer, ReferenceFreeDPOTrainer, kto_rows
from tests.running import lines, run, stage
from tests.test_trl_equivalence import COMMON, agree, bare, staged


LOSSES: list[tuple[dict[str, Any], float]] = [
    ({"loss": "sigmoid"}, math.log(2)),
    ({"loss": "sigmoid", "margin": 0.5}, math.log(1 + math.exp(0.5))),
    ({"loss": "hinge"}, 1.0),
    ({"loss": "hinge", "margin": 0.25}, 0.25),
    ({"loss": "ipo", "beta": 0.5}, 1.0),
    ({"loss": "robust", "label_smoothing": 0.2}, math.log(2)),
    ({"loss": "conservative", "label_smoothing": 0.2}, math.log(2)),
    ({"loss": "exo", "label_smoothing": 0.1}, -math.log(2) - 0.5 * (math.log(0.9) + math.log(0.1))),
    ({"loss": "nca"}, 2 * math.log(2)),
    ({"loss": "apo"}, 1.0),
    ({"loss": "apo_down"}, 1.0),
    ({"loss": "sppo", "beta": 0.5}, 2.0),
    ({"loss": "aot"}, math.log(2)),
    ({"loss": "sigmoid", "soft_labels": True}, math.log(2)),
]


@pytest.mark.parametrize(("options", "expected"), LOSSES, ids=[str(options) for options, _ in LOSSES])
def test_the_first_loss_of_every_reference_based_method_is_the_closed_form_at_policy_equals_reference(
    options: dict[str, Any],
    expected: float,
    tiny_model_path: str,
    preference_rows: list[Any],
    write_rows: Callable[..., Path],
    tmp_path: Path,
) -> None:
    one = stage("dpo", str(write_rows(preference_rows)), DPO(**options), max_steps=1)
    assert one.method.step0_loss(one) == pytest.approx(expected)
    run(tiny_model_path, tmp_path / "run", one)
    assert lines(tmp_path / "run" / "01-dpo")[0]["loss"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("method", "trl", "expected"),
    [
        (DPO(loss="ipo"), {"beta": 0.25}, 4.0),
        (DPO(loss="ipo", beta=0.5), {"beta": 0.25}, 1.0),
        (DPO(loss="sppo"), {"beta": 1}, 0.5),
        (KTO(), {"desirable_weight": 2.0, "undesirable_weight": 2.0}, 1.0),
        (KTO(), {"desirable_weight": 2.0}, None),
    ],
    ids=str,
)
def test_an_argument_in_trl_counts_for_the_first_loss_where_its_option_is_not_set(
    method: Any,
    trl: dict[str, Any],
    expected: float | None,
    tiny_model_path: str,
    preference_rows: list[Any],
    write_rows: Callable[..., Path],
    tmp_path: Path,
) -> None:
    one = stage("s", str(write_rows(preference_rows)), method, max_steps=1, trl=trl)
    assert one.method.step0_loss(one) == expected
    run(tiny_model_path, tmp_path / "run", one)
    if expected is not None:
        assert lines(tmp_path / "run" / "01-s")[0]["loss"] == pytest.approx(expected, rel=1e-4)


def test_discopop_and_mixes_train(
    tiny_model_path: str, preference_rows: list[Any], write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    rows = str(write_rows(preference_rows))
    first = stage("a", rows, DPO(loss="discopop"), max_steps=2)
    second = stage("b", rows, DPO(mix={"sft": 0.5}), max_steps=2)
    run(tiny_model_path, tmp_path / "run", first, second)
    mixed = lines(tmp_path / "run" / "02-b")[0]["loss"]
    assert mixed > math.log(2) + 0.5, "the likelihood of chosen is part of the loss"


def test_kto_trains_as_the_bare_trainer_does(
    tiny_model_path: str, preference_rows: list[Any], write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    losses, policy = staged(tiny_model_path, tmp_path / "run", write_rows(preference_rows), KTO(beta=0.2))
    config = KTOConfig(
        output_dir=str(tmp_path / "trl"),
        beta=0.2,
        train_sampling_strategy="sequential",
        precompute_ref_log_probs=True,
        **COMMON,
    )
    trainer = KTOTrainer(
        model=tiny_model_path,
        args=config,
        train_dataset=kto_rows(Dataset.from_list(preference_rows), 42),
        processing_class=AutoTokenizer.from_pretrained(tiny_model_path),
    )
    assert losses == bare(trainer)
    assert losses[0] == pytest.approx(0.5, rel=1e-4)
    assert agree(trainer.model, policy)


def test_t20_kto_shuffles_its_rows_ahead_and_wants_two_in_a_batch(
    tiny_model_path: str, preference_rows: list[Any], write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    """TRL raises where the sampler is random, and where a batch is of one row."""
    rows = str(write_rows(preference_rows))
    one = stage("kto", rows, KTO(), max_steps=1, batch_size=2, shuffle_data=True)
    assert {given.target: given.value for given in settings_of(one)}["train_sampling_strategy"] == "sequential"
    assert run(tiny_model_path, tmp_path / "run", one)["kto"].steps == 1
    with pytest.raises(ConfigError, match="batch_size: kto estimates a divergence over the batch"):
        stage("kto", rows, KTO(), batch_size=1)


@pytest.mark.parametrize("loss", ["robust", "conservative"])
def test_t42_a_loss_for_noisy_labels_without_noise_is_refused(loss: Any) -> None:
    with pytest.raises(ConfigError, match="needs it above 0; without it this is sigmoid"):
        TrainingStage(name="s", method=DPO(loss=loss), training_data="pairs.jsonl")
    with pytest.raises(ConfigError, match=r"it is below 0\.5"):
        TrainingStage(name="s", method=DPO(loss=loss, label_smoothing=0.5), training_data="pairs.jsonl")


def test_t41_a_stage_with_conservative_labels_trains_on_the_formula_of_cdpo(
    tiny_model_path: str, preference_rows: list[Any], write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    """One row a step: the loss is that of its own logged rewards, x = their difference. TRL has no such loss."""
    rows, e = str(write_rows(preference_rows)), 0.2
    given = {"batch_size": 1, "max_steps": 6, "learning_rate": 1e-2, "warmup_ratio": 0}
    noisy = stage("a", rows, DPO(loss="conservative", label_smoothing=e, beta=1.0), **given)
    plain = stage("b", rows, DPO(beta=1.0), model=tiny_model_path, **given)
    run(tiny_model_path, tmp_path / "run", noisy, plain)

    def steps(name: str) -> list[tuple[float, float]]:
        found = [line for line in lines(tmp_path / "run" / name) if "rewards/margins" in line]
        return [(line["loss"], line["rewards/margins"]) for line in found]

    def cdpo(x: float) -> float:
        return (1 - e) * math.log1p(math.exp(-x)) + e * math.log1p(math.exp(x))

    assert [loss for loss, _ in steps("01-a")] == pytest.approx([cdpo(x) for _, x in steps("01-a")], rel=1e-3)
    assert [loss for loss, _ in steps("02-b")] != pytest.approx([cdpo(x) for _, x in steps("02-b")], rel=1e-3)
    assert any(abs(x) > 0.1 for _, x in steps("01-a")), "at x = 0 every loss is ln 2"


def test_t24_rows_that_kto_leaves_out_are_counted_after_pairs_are_taken_apart(
    tiny_model_path: str, preference_rows: list[Any], write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    long = {**preference_rows[0], "prompt": [{"role": "user", "content": "word " * 200}]}
    rows = str(write_rows([long, *preference_rows[1:]]))
    kto = stage("kto", rows, KTO(), max_steps=1, trl={"max_length": 64})
    result = run(tiny_model_path, tmp_path / "run", kto)["kto"]
    assert result.samples_dropped == {"too_long": 2}
    assert result.samples_trained == 2 * len(preference_rows) - 2


def test_a_first_loss_near_zero_is_not_compared_by_its_share(
    tiny_model_path: str, preference_rows: list[Any], write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    one = stage("exo", str(write_rows(preference_rows)), DPO(loss="exo", label_smoothing=0.499), max_steps=1)
    assert abs(one.method.step0_loss(one)) < 1e-5
    run(tiny_model_path, tmp_path / "run", one)


def test_orpo_cpo_and_simpo_are_their_trainers_with_the_right_arguments(
    tiny_model_path: str, preference_rows: list[Any], write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    rows = write_rows(preference_rows)
    table: list[tuple[str, Any, type, dict[str, Any], dict[str, Any]]] = [
        ("orpo", ORPO(beta=0.3), ORPOTrainer, {"beta": 0.3}, {}),
        (
            "cpo",
            CPO(beta=0.2, margin=0.5),
            ReferenceFreeDPOTrainer,
            {"beta": 0.2, "loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 1.0]},
            {"margin": 0.5},
        ),
        (
            "simpo",
            SimPO(beta=2.0, margin=1.0),
            ReferenceFreeDPOTrainer,
            {"beta": 2.0, "loss_type": ["sigmoid_norm"]},
            {"margin": 1.0},
        ),
    ]
    for name, method, trainer_class, settings, arguments in table:
        losses, _ = staged(tiny_model_path, tmp_path / name, rows, method, max_steps=6)
        config = DPOConfig(
            output_dir=str(tmp_path / f"{name}-trl"),
            precompute_ref_log_probs=True,
            **{**COMMON, **settings, "max_steps": 6},
        )
        trainer = trainer_class(
            tiny_model_path,
            args=config,
            train_dataset=Dataset.from_list(preference_rows),
            processing_class=AutoTokenizer.from_pretrained(tiny_model_path),
            **arguments,
        )
        assert losses == bare(trainer), name


@pytest.mark.parametrize("lora", [None, LoRA(rank=4, dropout=0.0)], ids=["all weights", "lora"])
def test_t44_an_updated_reference_is_the_policy_again_right_after_the_update(
    lora: LoRA | None,
    tiny_model_path: str,
    preference_rows: list[Any],
    write_rows: Callable[..., Path],
    tmp_path: Path,
) -> None:
    one = stage(
        "dpo",
        str(write_rows(preference_rows)),
        DPO(),
        reference=Reference(update_every=2),
        lora=lora,
        max_steps=4,
        warmup_ratio=0.0,
        learning_rate=5e-3,
    )
    run(tiny_model_path, tmp_path / "run", one)
    losses = [line["loss"] for line in lines(tmp_path / "run" / "01-dpo") if "loss" in line]
    assert losses[0] == pytest.approx(math.log(2), rel=1e-5)
    assert losses[1] != pytest.approx(math.log(2), rel=1e-4)
    assert losses[2] == pytest.approx(math.log(2), rel=1e-5)
    assert not (tmp_path / "run" / "01-dpo" / "policy" / "ref").exists()


def test_base_compares_with_the_model_without_the_incoming_adapter(
    tiny_model_path: str,
    sft_rows: list[Any],
    preference_rows: list[Any],
    write_rows: Callable[..., Path],
    tmp_path: Path,
) -> None:
    lora = LoRA(rank=4, dropout=0.0)
    sft = stage("sft", str(write_rows(sft_rows, "sft.jsonl")), lora=lora, learning_rate=1e-2)
    rows = str(write_rows(preference_rows, "pairs.jsonl"))
    base = stage("base", rows, DPO(), lora=lora, reference=Reference(mode="base"), max_steps=1)
    adapter = stage(
        "adapter", rows, DPO(), model="stage:sft", lora=lora, reference=Reference(mode="adapter"), max_steps=1
    )
    run(tiny_model_path, tmp_path / "run", sft, base, adapter)
    first = lines(tmp_path / "run" / "02-base")[0]
    second = lines(tmp_path / "run" / "03-adapter")[0]
    assert abs(first["rewards/chosen"]) > 1e-3
    assert second["rewards/chosen"] == pytest.approx(0.0, abs=1e-6)
    assert second["loss"] == pytest.approx(math.log(2), rel=1e-5)


def test_without_a_reference_the_rewards_are_the_policys_own(
    tiny_model_path: str, preference_rows: list[Any], write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    rows = str(write_rows(preference_rows))
    free = stage("free", rows, DPO(beta=0.1), reference=Reference(mode="none"), max_steps=1)
    run(tiny_model_path, tmp_path / "run", free)
    line = lines(tmp_path / "run" / "01-free")[0]
    assert line["rewards/chosen"] == pytest.approx(0.1 * line["logps/chosen"], rel=1e-4)


def test_precomputed_references_are_kept_between_runs_and_change_nothing(
    tiny_model_path: str,
    preference_rows: list[Any],
    write_rows: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("STAGEKIT_CACHE", str(tmp_path / "cache"))
    one = stage("dpo", str(write_rows(preference_rows)), DPO(), max_steps=4)
    run(tiny_model_path, tmp_path / "a", one)
    kept = sorted((tmp_path / "cache" / "reference").rglob("*"))
    assert kept
    times = [path.stat().st_mtime_ns for path in kept]
    run(tiny_model_path, tmp_path / "b", one)
    assert [path.stat().st_mtime_ns for path in kept] == times
    assert lines(tmp_path / "a" / "01-dpo") == lines(tmp_path / "b" / "01-dpo")


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"method": DPO(label_smoothing=0.1)}, "method.label_smoothing"),
    ({"method": DPO(loss="robust")}, "method.label_smoothing"),
    ({"method": DPO(loss="conservative", label_smoothing=0.6)}, "method.label_smoothing"),
    ({"method": DPO(loss="ipo", margin=1.0)}, "method.margin"),
    ({"method": DPO(loss="hinge", margin=0.0)}, "method.margin"),
    ({"method": DPO(soft_labels=True, loss="ipo")}, "method.soft_labels"),
    ({"method": DPO(loss="nca"), "reference": Reference(mode="none")}, "reference.mode"),
    ({"method": DPO(), "reference": Reference(mode="base")}, "reference.mode"),
    ({"method": DPO(), "reference": Reference(mode="precompute", update_every=3)}, "reference.update_every"),
    ({"method": KTO(), "batch_size": 1}, "batch_size"),
    ({"method": KTO(), "reference": Reference(mode="none")}, "reference.mode"),
    ({"method": ORPO(), "reference": Reference()}, "reference"),
    ({"method": SimPO(), "trl": {"loss_type": ["sigmoid"]}}, "trl.loss_type"),
    ({"method": CPO(label_smoothing=0.5)}, "method.label_smoothing"),
]


@pytest.mark.parametrize(("options", "path"), REFUSED, ids=[f"{path} {options}" for options, path in REFUSED])
def test_what_a_preference_method_cannot_use_is_refused_with_its_path(options: dict[str, Any], path: str) -> None:
    with pytest.raises(ConfigError) as caught:
        TrainingStage(name="s", training_data="pairs.jsonl", **options)
    assert path in [problem.path for problem in caught.value.problems]


def test_t41_label_smoothing_with_sigmoid_names_conservative() -> None:
    with pytest.raises(ConfigError, match="conservative"):
        TrainingStage(name="s", method=DPO(label_smoothing=0.1), training_data="pairs.jsonl")
