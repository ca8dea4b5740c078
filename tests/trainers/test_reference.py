"""References that are remembered on disk, or that follow the policy."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, safe_open, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOTrainer
from trl.trainer.callbacks import SyncRefModelCallback

from stagekit.errors import ConfigError, StageError
from stagekit.trainers.preference import MarginDPOTrainer, SoftLabelDPOTrainer
from stagekit.trainers.reference import (
    REFERENCE_FILE,
    REFERENCE_UPDATE,
    CachedReferenceDPOTrainer,
    ReferenceAdapterUpdate,
    ReferenceModelCheckpoint,
    tokens_digest,
)
from tests.trainers.pairs import another, batch_of, config, loss_of, plain


AHEAD = {"precompute_ref_log_probs": True}
COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")


def load(path: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(path)


def make(kind: Any, model: Any, rows: Any, folder: Path, path: str, given: dict[str, Any], **options: Any) -> Any:
    data = Dataset.from_list(rows) if isinstance(rows, list) else rows
    tokenizer = AutoTokenizer.from_pretrained(path)
    return kind(model=model, args=config(folder, **given), train_dataset=data, processing_class=tokenizer, **options)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every batch that a reference was run on."""
    batches: list[int] = []
    original = DPOTrainer.compute_ref_log_probs

    def count(self: Any, model: Any, inputs: Any) -> Any:
        batches.append(len(inputs["input_ids"]) // 2)
        return original(self, model, inputs)

    monkeypatch.setattr(DPOTrainer, "compute_ref_log_probs", count)
    return batches


def columns(trainer: Any) -> list[list[float]]:
    return [trainer.train_dataset[name][:] for name in COLUMNS]


@pytest.mark.parametrize(
    ("kind", "options"),
    [(CachedReferenceDPOTrainer, {}), (MarginDPOTrainer, {"margin": 0.5}), (SoftLabelDPOTrainer, {})],
)
def test_a_cached_reference_is_not_run_again_and_gives_the_same_bits(
    kind: Any,
    options: dict[str, Any],
    computed: list[int],
    tiny_model_path: str,
    preference_rows: list[Any],
    tmp_path: Path,
) -> None:
    cache = tmp_path / "cache"
    data = Dataset.from_list(preference_rows)
    bare = make(DPOTrainer, tiny_model_path, data, tmp_path / "a", tiny_model_path, AHEAD)
    first = make(kind, tiny_model_path, data, tmp_path / "b", tiny_model_path, AHEAD, cache_dir=cache, **options)
    assert sum(computed) == 2 * len(data)
    given = {**AHEAD, "beta": 0.37, "learning_rate": 1e-5, "seed": 5}
    sets = {"eval_dataset": {"same": data}}
    second = make(
        kind, tiny_model_path, data, tmp_path / "c", tiny_model_path, given, cache_dir=cache, **options, **sets
    )
    assert sum(computed) == 2 * len(data)
    assert columns(bare) == columns(first) == columns(second)
    assert second.train_dataset.features["ref_chosen_logps"] == bare.train_dataset.features["ref_chosen_logps"]
    assert len(list(cache.iterdir())) == 1
    second.train()


@pytest.mark.parametrize("what", ["model", "rows", "template", "max_length", "batch size", "key"])
def test_other_numbers_are_another_file(
    what: str, computed: list[int], tiny_model_path: str, preference_rows: list[Any], tmp_path: Path
) -> None:
    def build(model: Any, data: Any, given: dict[str, Any], **options: Any) -> None:
        cache = {"cache_dir": tmp_path / "cache", **options}
        make(CachedReferenceDPOTrainer, model, data, tmp_path, tiny_model_path, {**AHEAD, **given}, **cache)

    build(tiny_model_path, preference_rows, {})
    before = sum(computed)
    if what == "model":
        build(another(load(tiny_model_path)), preference_rows, {})
    elif what == "rows":
        build(tiny_model_path, preference_rows[::-1], {})
    elif what == "template":
        build(tiny_model_path, plain(preference_rows), {})
    elif what == "max_length":
        build(tiny_model_path, preference_rows, {"max_length": 30})
    elif what == "batch size":
        build(tiny_model_path, preference_rows, {"precompute_ref_batch_size": 8})
    else:
        build(tiny_model_path, preference_rows, {}, cache_key="another reference")
    assert len(list((tmp_path / "cache").iterdir())) == 2
    assert sum(computed) > before


def test_a_key_of_ones_own_stands_for_the_model(
    computed: list[int], tiny_model_path: str, preference_rows: list[Any], tmp_path: Path
) -> None:
    # The weights of a new adapter depend on the seed, those of its reference do not.
    peft = LoraConfig(r=2, task_type="CAUSAL_LM")
    for seed, runs in ((1, 16), (2, 16)):
        given = {**AHEAD, "seed": seed}
        options = {"cache_dir": tmp_path / "cache", "cache_key": "tiny", "peft_config": peft}
        trainer = make(
            CachedReferenceDPOTrainer, tiny_model_path, preference_rows, tmp_path, tiny_model_path, given, **options
        )
        assert sum(computed) == runs
        assert float(loss_of(trainer, batch_of(trainer))) == pytest.approx(math.log(2), abs=1e-6)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def _foreign(path: Path) -> None:
    save_file({name: torch.zeros(16) for name in COLUMNS}, path, metadata={"key": "another"})


def _bare(path: Path) -> None:
    save_file({"weight": torch.zeros(3)}, path)


@pytest.mark.parametrize("harm", [_cut, _flip, _foreign, _bare])
def test_a_file_that_cannot_be_trusted_is_replaced_with_a_warning(
    harm: Any, tiny_model_path: str, preference_rows: list[Any], tmp_path: Path
) -> None:
    def build() -> Any:
        cache = {"cache_dir": tmp_path / "cache"}
        return make(
            CachedReferenceDPOTrainer, tiny_model_path, preference_rows, tmp_path, tiny_model_path, AHEAD, **cache
        )

    wanted = columns(build())
    [path] = (tmp_path / "cache").iterdir()
    good = {name: tensor.clone() for name, tensor in load_file(path).items()}  # not the mapped file
    harm(path)
    with pytest.warns(UserWarning, match=r"computed again and replace it"):
        assert columns(build()) == wanted
    assert [file.name for file in (tmp_path / "cache").iterdir()] == [path.name]
    assert all(torch.equal(load_file(path)[name], good[name]) for name in COLUMNS)


def test_the_file_says_what_it_depends_on(tiny_model_path: str, preference_rows: list[Any], tmp_path: Path) -> None:
    options = {"cache_dir": tmp_path / "cache", "cache_key": "the model"}
    trainer = make(
        CachedReferenceDPOTrainer, tiny_model_path, preference_rows, tmp_path, tiny_model_path, AHEAD, **options
    )
    [path] = (tmp_path / "cache").iterdir()
    with safe_open(path, framework="pt") as file:
        key = json.loads(file.metadata()["key"])
    assert key["model"] == "the model" and key["max_length"] == 1024 and key["rows"] == 16
    assert key["tokens"] == tokens_digest(trainer.train_dataset)
    assert not {"beta", "loss_type"} & set(key)


def test_the_digest_tells_where_a_completion_starts() -> None:
    def digest(prompt: list[int], chosen: list[int]) -> str:
        row = {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": [9]}
        return tokens_digest(Dataset.from_list([row]))

    assert digest([1, 2], [3]) != digest([1], [2, 3])
    assert digest([1, 2], [3]) == digest([1, 2], [3])


class Watch(TrainerCallback):
    """Notes policy and reference after every step, and what the optimiser holds."""

    def __init__(self, reference: Any = None) -> None:
        self.policy: dict[int, dict[str, torch.Tensor]] = {}
        self.reference: dict[int, dict[str, torch.Tensor]] = {}
        self.model = reference
        self.optimised: list[int] = []
        self.trainable: set[str] = set()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        named = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
        self.policy[state.global_step] = {key: value for key, value in named.items() if ".ref." not in key}
        if self.model is not None:
            source = {name: tensor.detach().clone() for name, tensor in self.model.named_parameters()}
        else:
            source = {key.replace(".ref.", ".default."): value for key, value in named.items() if ".ref." in key}
        self.reference[state.global_step] = source
        self.optimised = [id(parameter) for group in kwargs["optimizer"].param_groups for parameter in group["params"]]
        self.trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        reference = [id(parameter) for name, parameter in model.named_parameters() if ".ref." in name]
        assert not set(reference) & set(self.optimised)


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **options)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return bool(one) and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("incoming", [False, True], ids=["new adapter", "adapter that came in"])
def test_the_reference_adapter_is_the_policy_of_the_last_update(
    incoming: bool, dropout: float, tiny_model_path: str, preference_rows: list[Any], tmp_path: Path
) -> None:
    watch = Watch()
    given = {"max_steps": 7, "disable_dropout": False, "beta": 0.5, "learning_rate": 5e-3}
    model = get_peft_model(load(tiny_model_path), lora(lora_dropout=dropout)) if incoming else tiny_model_path
    options = {} if incoming else {"peft_config": lora(lora_dropout=dropout)}
    callbacks = [ReferenceAdapterUpdate(3), watch]
    trainer = make(
        DPOTrainer, model, preference_rows, tmp_path, tiny_model_path, given, callbacks=callbacks, **options
    )
    trainer.train()
    for step in (3, 4, 5):
        assert same(watch.reference[step], watch.policy[3])
    for step in (6, 7):
        assert same(watch.reference[step], watch.policy[6])
    assert bool(watch.reference[2]) is incoming  # a new adapter's first reference is the base
    assert not same(watch.policy[4], watch.policy[3])
    assert watch.trainable and all(".default." in name for name in watch.trainable)
    assert list(trainer.model.peft_config) == ["default"]
    trainer.save_model(str(tmp_path / "saved"))
    assert not (tmp_path / "saved/ref").exists()
    PeftModel.from_pretrained(load(tiny_model_path), tmp_path / "saved")


def test_t44_right_after_an_update_the_loss_is_ln_2_and_the_reference_drops_nothing(
    tiny_model_path: str, preference_rows: list[Any], tmp_path: Path
) -> None:
    given = {"max_steps": 6, "disable_dropout": False, "learning_rate": 1e-2, "beta": 0.5}
    seen = {}

    class AfterUpdate(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            batch = batch_of(trainer)
            seen[state.global_step] = float(loss_of(trainer, batch))
            trainer.model.train()
            if "ref" in trainer.model.peft_config:
                twice = [trainer.compute_ref_log_probs(trainer.model, batch)[0] for _ in range(2)]
                assert torch.equal(*twice)
            trainer._metrics["eval"].clear()

    trainer = make(
        DPOTrainer,
        tiny_model_path,
        preference_rows,
        tmp_path,
        tiny_model_path,
        given,
        callbacks=[ReferenceAdapterUpdate(3), AfterUpdate()],
        peft_config=lora(lora_dropout=0.3),
    )
    trainer.train()
    assert seen[3] == pytest.approx(math.log(2), abs=1e-6) and seen[6] == pytest.approx(math.log(2), abs=1e-6)
    assert all(abs(seen[step] - math.log(2)) > 1e-3 for step in (1, 2, 4, 5))


@pytest.mark.parametrize("at", [2, 4])
@pytest.mark.parametrize("incoming", [False, True], ids=["new adapter", "adapter that came in"])
def test_a_resumed_run_goes_on_with_the_reference_adapter_of_the_last_update(
    incoming: bool, at: int, tiny_model_path: str, preference_rows: list[Any], tmp_path: Path
) -> None:
    given = {"max_steps": 7, "save_strategy": "steps", "save_steps": 2, "learning_rate": 5e-3, "beta": 0.5}
    given = {**given, "disable_dropout": False}
    found = []
    for resume in (None, str(tmp_path / "out" / f"checkpoint-{at}")):
        torch.manual_seed(0)
        model = get_peft_model(load(tiny_model_path), lora(lora_dropout=0.1)) if incoming else tiny_model_path
        options = {} if incoming else {"peft_config": lora(lora_dropout=0.1)}
        watch = Watch()
        callbacks = [ReferenceAdapterUpdate(3), watch]
        trainer = make(
            DPOTrainer, model, preference_rows, tmp_path, tiny_model_path, given, callbacks=callbacks, **options
        )
        trainer.train(resume_from_checkpoint=resume)
        found.append(watch)
    whole, resumed = found
    assert sorted(resumed.policy) == list(range(at + 1, 8))
    for step in resumed.policy:
        assert same(resumed.policy[step], whole.policy[step]), step
        assert resumed.reference[step].keys() == whole.reference[step].keys()
        assert not whole.reference[step] or same(resumed.reference[step], whole.reference[step]), step


def test_an_adapter_reference_that_cannot_follow_is_refused(
    tiny_model_path: str, preference_rows: list[Any], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="0 is no interval"):
        ReferenceAdapterUpdate(0)
    for given, options, message in (
        ({}, {}, "the model has no adapter"),
        (AHEAD, {"peft_config": lora()}, "precompute_ref_log_probs=False"),
    ):
        callbacks = [ReferenceAdapterUpdate(1)]
        trainer = make(
            DPOTrainer,
            tiny_model_path,
            preference_rows,
            tmp_path,
            tiny_model_path,
            given,
            callbacks=callbacks,
            **options,
        )
        with pytest.raises(ConfigError, match=message):
            trainer.train()


@pytest.mark.parametrize("kind", [DPOTrainer, MarginDPOTrainer])
def test_t44_a_whole_reference_model_becomes_the_policy_and_survives_a_resume(
    kind: Any, tiny_model_path: str, preference_rows: list[Any], tmp_path: Path
) -> None:
    given = {"max_steps": 7, "save_strategy": "steps", "save_steps": 4, "learning_rate": 1e-3, "beta": 0.5}
    given = {**given, **REFERENCE_UPDATE, "ref_model_sync_steps": 3}
    found = []
    for resume in (None, str(tmp_path / "out" / "checkpoint-4")):
        keep, watch = ReferenceModelCheckpoint(), Watch()
        trainer = make(kind, tiny_model_path, preference_rows, tmp_path, tiny_model_path, given, callbacks=[keep])
        keep.trainer = trainer
        watch.model = trainer.ref_model
        trainer.add_callback(watch)
        trainer.train(resume_from_checkpoint=resume)
        found.append(watch)
    whole, resumed = found
    for step in (3, 4, 5):
        assert same(whole.reference[step], whole.policy[3])
    assert same(whole.reference[6], whole.policy[6]) and same(
        whole.reference[2], dict(load(tiny_model_path).named_parameters())
    )
    for step in (5, 6, 7):
        assert same(resumed.policy[step], whole.policy[step]) and same(resumed.reference[step], whole.reference[step])
    (tmp_path / "out/checkpoint-4" / REFERENCE_FILE).unlink()
    with pytest.raises(StageError, match="the reference of step 4 is not known"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-4"))


def test_canary_trls_update_with_alpha_1_is_a_copy(tiny_model_path: str) -> None:
    policy, reference = another(load(tiny_model_path)), load(tiny_model_path)
    SyncRefModelCallback._sync_target_model(policy, reference, REFERENCE_UPDATE["ref_model_mixup_alpha"])
    assert same(dict(policy.named_parameters()), dict(reference.named_parameters()))


def test_canary_trl_takes_the_adapter_named_ref_as_reference(
    tiny_model_path: str, preference_rows: list[Any], tmp_path: Path
) -> None:
    trainer = make(DPOTrainer, tiny_model_path, preference_rows, tmp_path, tiny_model_path, {}, peft_config=lora())
    batch = batch_of(trainer)
    base = trainer.compute_ref_log_probs(trainer.model, batch)[0]
    trainer.model.add_adapter("ref", lora(init_lora_weights=False))
    assert not torch.equal(trainer.compute_ref_log_probs(trainer.model, batch)[0], base)
    assert abs(float(loss_of(trainer, batch)) - math.log(2)) > 1e-4
    trainer.model.delete_adapter("ref")
    assert torch.equal(trainer.compute_ref_log_probs(trainer.model, batch)[0], base)
