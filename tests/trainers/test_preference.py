"""Preference trainers at work: accumulation, adapters, streams, resuming, rows for KTO, what is read of TRL."""

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoTokenizer
from trl import DPOTrainer, KTOConfig, KTOTrainer
from trl.trainer import dpo_trainer
from trl.trainer.utils import FusedCausalLMOutput

from stagekit.errors import ConfigError
from stagekit.hooks import Hooked, Hooks
from stagekit.trainers.preference import (
    MarginDPOTrainer,
    ORPOTrainer,
    ReferenceFreeDPOTrainer,
    SoftLabelDPOTrainer,
    kto_rows,
)
from tests.trainers.pairs import batch_of, config, even_rows, load, make, plain


FREE = {"precompute_ref_log_probs": True}


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
