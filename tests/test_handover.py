"""What goes wrong when a model is passed from one TRL trainer to the next (traps T1 to T11), and does not here."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from stagekit import training
from stagekit.adapters import DPO, Evaluation
from stagekit.errors import StageError
from stagekit.groups import LoRA
from stagekit.models import load_policy, snapshot_model
from stagekit.stage import TrainingStage
from tests.running import lines, run, same, stage, weights


Write = Callable[..., Path]
LORA = LoRA(rank=4, alpha=8, dropout=0)


@pytest.fixture
def data(write_rows: Write, sft_rows: list[Any], preference_rows: list[Any]) -> dict[str, str]:
    return {"sft": str(write_rows(sft_rows, "sft.jsonl")), "dpo": str(write_rows(preference_rows, "dpo.jsonl"))}


@pytest.fixture
def trainers(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every trainer that is built, in order; each with the dtype of an MLP's output in its first forward pass."""
    built: list[Any] = []
    original = training.build

    def build(job: Any, *args: Any) -> Any:
        trainer, callbacks = original(job, *args)
        built.append(trainer)
        quantised = [bits for bits in (4, 8) if getattr(trainer.model, f"is_loaded_in_{bits}bit", False)]
        trainer.seen = {"quantised": sum(quantised)}

        def look(module: Any, inputs: Any, output: torch.Tensor) -> None:
            trainer.seen.setdefault("dtype", output.dtype)

        next(m for name, m in trainer.model.named_modules() if name.endswith("down_proj")).register_forward_hook(look)
        return trainer, callbacks

    monkeypatch.setattr(training, "build", build)
    return built


def logits(model: Any) -> torch.Tensor:
    """(1, 12, V) in evaluation mode."""
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(5, 17)[None]).logits


def sft(data: dict[str, str], **options: Any) -> TrainingStage:
    return stage("sft", data["sft"], **{"max_steps": 3, "learning_rate": 1e-2, **options})


def dpo(data: dict[str, str], name: str = "dpo", **options: Any) -> TrainingStage:
    return stage(name, data["dpo"], DPO(beta=0.1), **{"max_steps": 3, **options})


def first_loss(folder: Path) -> float:
    return float(lines(folder)[0]["loss"])


def test_t1_a_copy_of_a_trained_model_does_not_run_the_weights_of_the_original(
    data: dict[str, str], tiny_model_path: str, tmp_path: Path, trainers: list[Any]
) -> None:
    """T1: TRL binds the patched forward to the original; the copy that is made here is free of it."""
    run(tiny_model_path, tmp_path, sft(data))
    model = trainers[0].model
    twin = snapshot_model(model)
    before = logits(twin)
    assert torch.equal(before, logits(model))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5)
    assert torch.equal(before, logits(twin))
    assert not torch.equal(before, logits(model))


def test_t2_the_reference_is_the_model_that_came_in(
    data: dict[str, str], tiny_model_path: str, tmp_path: Path, trainers: list[Any]
) -> None:
    """T2: with a model handed over in memory it would be the one before the previous stage."""
    result = run(tiny_model_path, tmp_path, sft(data), dpo(data))
    assert not same(tiny_model_path, str(result["sft"].policy))
    assert first_loss(tmp_path / "02-dpo") == pytest.approx(math.log(2), abs=1e-6)
    assert trainers[1].model.config._name_or_path == result["sft"].policy


def test_t2_a_wrong_reference_stops_the_stage_with_both_numbers(
    data: dict[str, str], tiny_model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """T2: step 0 is looked at, not trusted."""
    original = training._check_step0

    def check(job: Any, trainer: Any) -> None:
        with torch.no_grad():
            for parameter in trainer.model.parameters():
                parameter.mul_(1.2)
        original(job, trainer)

    monkeypatch.setattr(training, "_check_step0", check)
    with pytest.raises(StageError, match=r"'dpo': before the first step the dpo loss is \d\.\d+, but .* 0\.693147"):
        run(tiny_model_path, tmp_path, dpo(data))


def test_t3_t34_a_stage_in_bf16_after_one_in_float32_runs_in_bf16(
    data: dict[str, str], tiny_model_path: str, tmp_path: Path, trainers: list[Any]
) -> None:
    """T3 (and T34): on one object the second stage would silently stay in float32."""
    second = {"use_mixed_precision": True, "mixed_precision_dtype": "bf16"}
    run(tiny_model_path, tmp_path, sft(data), stage("again", data["sft"], max_steps=1, **second))
    assert [trainer.seen["dtype"] for trainer in trainers] == [torch.float32, torch.bfloat16]


def test_t4_t34_a_stage_in_float32_after_one_in_bf16_runs_in_float32(
    data: dict[str, str], tiny_model_path: str, tmp_path: Path, trainers: list[Any]
) -> None:
    """T4 (and T34): on one object the autocast wrapper would stay."""
    first = sft(data, use_mixed_precision=True, mixed_precision_dtype="bf16")
    result = run(tiny_model_path, tmp_path, first, stage("again", data["sft"], max_steps=1))
    assert [trainer.seen["dtype"] for trainer in trainers] == [torch.bfloat16, torch.float32]
    clean = AutoModelForCausalLM.from_pretrained(str(result.policy))
    assert clean.dtype == torch.float32
    assert torch.equal(logits(clean), logits(trainers[1].model.float()))


def test_t5_checkpointing_and_dropout_of_a_stage_do_not_reach_the_next(
    data: dict[str, str], tiny_model_path: str, tmp_path: Path, trainers: list[Any]
) -> None:
    """T5: they would stay on the object."""
    run(
        tiny_model_path,
        tmp_path,
        sft(data, use_gradient_checkpointing=True, lora=LoRA(rank=4, alpha=8, dropout=0.3)),
        sft(data).model_copy(update={"name": "again"}),
    )
    first, second = (trainer.model for trainer in trainers)
    assert any(getattr(module, "gradient_checkpointing", False) for module in first.modules())
    assert not any(getattr(module, "gradient_checkpointing", False) for module in second.modules())
    assert any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in first.modules())
    assert not any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in second.modules())


def test_t6_dpo_after_dpo_goes_on_with_one_adapter_and_saves_no_reference(
    data: dict[str, str], tiny_model_path: str, tmp_path: Path
) -> None:
    """T6: TRL leaves an adapter `ref` behind, on which a second DPO stage fails."""
    stages = sft(data, lora=LORA), dpo(data, "one", lora=LORA), dpo(data, "two", lora=LORA)
    result = run(tiny_model_path, tmp_path, *stages)
    for name in ("one", "two"):
        policy = Path(str(result[name].policy))
        assert not (policy / "ref").exists()
        assert not any(".ref." in key for key in weights(policy))
        assert json.loads((policy / "adapter_config.json").read_text())["base_model_name_or_path"] == tiny_model_path
        assert first_loss(tmp_path / f"0{2 if name == 'one' else 3}-{name}") == pytest.approx(math.log(2), abs=1e-6)
    assert not same(str(result["one"].policy), str(result["two"].policy))


def test_t38_dropout_of_the_adapter_is_on_for_the_policy_and_off_for_the_reference(
    data: dict[str, str], tiny_model_path: str, tmp_path: Path, trainers: list[Any]
) -> None:
    """T38: TRL switches dropout off everywhere, or on also for the reference."""
    lora = LoRA(rank=4, alpha=8, dropout=0.25)
    result = run(tiny_model_path, tmp_path, sft(data, lora=LORA), dpo(data, lora=lora))
    found: dict[str, set[float]] = {"default": set(), "ref": set()}
    for name, module in trainers[1].model.named_modules():
        if ".lora_dropout." in name:
            found[name.rpartition(".")[2]].add(getattr(module, "p", 0.0))
    assert found["default"] == {0.25}
    assert found["ref"] <= {0.0}
    assert json.loads(Path(str(result.policy), "adapter_config.json").read_text())["lora_dropout"] == 0.25


def test_t7_an_adapter_travels_to_the_next_stage_and_is_trained_on(
    data: dict[str, str], tiny_model_path: str, tmp_path: Path, trainers: list[Any]
) -> None:
    """T7: a folder with only an adapter is no model to TRL."""
    result = run(tiny_model_path, tmp_path, sft(data, lora=LORA), dpo(data, lora=LORA))
    assert not (tmp_path / "02-dpo/base").exists()
    assert first_loss(tmp_path / "02-dpo") == pytest.approx(math.log(2), abs=1e-6)
    assert weights(str(result["sft"].policy)).keys() == weights(str(result.policy)).keys()
    assert not same(str(result["sft"].policy), str(result.policy))


def test_t8_an_incoming_adapter_has_its_weights_trainable_and_no_others(
    data: dict[str, str], tiny_model_path: str, tmp_path: Path, trainers: list[Any]
) -> None:
    """T8: loaded the usual way nothing of it would be trained."""
    run(tiny_model_path, tmp_path, sft(data, lora=LORA), dpo(data, lora=LORA))
    model = trainers[1].model
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trainable) == sum(".default." in name for name, _ in model.named_parameters()) > 0
    assert all(".lora_" in name for name in trainable)


def test_t9_a_stage_without_a_policy_passes_on_the_one_before(
    data: dict[str, str], tiny_model_path: str, tmp_path: Path, trainers: list[Any]
) -> None:
    """T9 (and T23): what a stage makes is named; an evaluation makes no policy and changes none."""
    measure = TrainingStage(name="measure", method=Evaluation(), validation_data=data["sft"])
    result = run(tiny_model_path, tmp_path, sft(data), measure, dpo(data))
    before = weights(str(result["sft"].policy))
    assert result["measure"].policy is None
    assert result["measure"].metrics.keys() == {"eval_loss", "eval_perplexity"}
    after = trainers[1].model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert trainers[2].model.config._name_or_path == result["sft"].policy


def test_t10_determinism_and_environment_of_a_stage_do_not_reach_the_next(
    data: dict[str, str], tiny_model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """T10: TRL sets switches of the whole process and leaves them on."""
    seen = []
    original = training.build

    def build(job: Any, *args: Any) -> Any:
        built = original(job, *args)
        seen.append((torch.are_deterministic_algorithms_enabled(), os.environ.get("CUDA_LAUNCH_BLOCKING")))
        return built

    monkeypatch.setattr(training, "build", build)
    before = dict(os.environ)
    run(
        tiny_model_path,
        tmp_path,
        sft(data, max_steps=1),
        stage("free", data["sft"], max_steps=1, use_deterministic_algorithms=False),
    )
    assert seen == [(True, "1"), (False, None)]
    assert not torch.are_deterministic_algorithms_enabled()
    assert dict(os.environ) == before


def test_t11_a_whole_pipeline_can_be_planned_before_a_stage_runs(
    data: dict[str, str], tiny_model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """T11: a TRL config that is made while a trainer lives breaks it; arguments are pure data."""
    from stagekit.arguments import settings_of

    later = dpo(data)
    original = training.build

    def build(job: Any, *args: Any) -> Any:
        built = original(job, *args)
        assert settings_of(later)
        return built

    monkeypatch.setattr(training, "build", build)
    assert run(tiny_model_path, tmp_path, sft(data), later)["dpo"].status == "completed"


def test_an_adapter_of_another_shape_is_merged_into_the_base_of_the_next_stage(
    data: dict[str, str], tiny_model_path: str, tmp_path: Path
) -> None:
    result = run(tiny_model_path, tmp_path, sft(data, lora=LORA), dpo(data, lora=LoRA(rank=2, alpha=4, dropout=0)))
    base = tmp_path / "02-dpo/base"
    assert json.loads(Path(str(result.policy), "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        base
    )
    merged, adapter = load_policy(str(base)), load_policy(str(result["sft"].policy))
    torch.testing.assert_close(logits(merged), logits(adapter), atol=1e-5, rtol=1e-5)
    assert first_loss(tmp_path / "02-dpo") == pytest.approx(math.log(2), abs=1e-6)


def test_an_adapter_is_merged_where_the_next_stage_trains_all_weights(
    data: dict[str, str], tiny_model_path: str, tmp_path: Path
) -> None:
    result = run(tiny_model_path, tmp_path, sft(data, lora=LORA), dpo(data))
    model = AutoModelForCausalLM.from_pretrained(str(result.policy))
    assert not hasattr(model, "peft_config")
    assert first_loss(tmp_path / "02-dpo") == pytest.approx(math.log(2), abs=1e-6)


def test_a_merged_adapter_gives_the_logits_of_the_adapter(
    data: dict[str, str], tiny_model_path: str, tmp_path: Path
) -> None:
    result = run(tiny_model_path, tmp_path, sft(data, lora=LoRA(rank=4, alpha=8, dropout=0.1, merge=True)), dpo(data))
    done = result["sft"]
    assert done.artifacts == {"policy": "01-sft/policy", "adapter": "01-sft/adapter"}
    merged = AutoModelForCausalLM.from_pretrained(str(done.policy))
    adapted = load_policy(str(tmp_path / "01-sft/adapter"))
    torch.testing.assert_close(logits(merged), logits(adapted), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bits", [4, 8])
def test_t39_t40_a_quantised_adapter_goes_from_sft_to_dpo_and_merges_into_the_unquantised_base(
    bits: Any, data: dict[str, str], tiny_model_path: str, tmp_path: Path, trainers: list[Any]
) -> None:
    lora = {"rank": 4, "alpha": 8, "dropout": 0, "bits": bits}
    result = run(
        tiny_model_path,
        tmp_path,
        sft(data, lora=LoRA(**lora), max_steps=2),
        dpo(data, lora=LoRA(**lora, merge=True), max_steps=2),
    )
    assert [trainer.seen["quantised"] for trainer in trainers] == [bits, bits]
    assert first_loss(tmp_path / "02-dpo") == pytest.approx(math.log(2), abs=1e-6)
    merged = AutoModelForCausalLM.from_pretrained(str(result.policy))
    names = {type(module).__name__ for module in merged.modules()}
    assert not names & {"Linear4bit", "Linear8bitLt"}
    torch.testing.assert_close(
        logits(merged), logits(load_policy(str(tmp_path / "02-dpo/adapter"))), atol=1e-5, rtol=1e-5
    )


def test_a_policy_folder_is_plain_for_transformers_and_holds_nothing_else(
    data: dict[str, str], tiny_model_path: str, tmp_path: Path
) -> None:
    result = run(tiny_model_path, tmp_path, sft(data, tags=("mine",)))
    policy = Path(str(result.policy))
    assert {path.name for path in policy.iterdir()} == {
        "README.md", "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    card = (policy / "README.md").read_text()
    assert {"- stagekit", "- mine", "- sft", "- trl"} <= set(card.splitlines())
    assert AutoModelForCausalLM.from_pretrained(policy).dtype == torch.float32
    assert AutoTokenizer.from_pretrained(policy).chat_template


def test_an_adapter_folder_is_plain_for_peft_and_holds_nothing_else(
    data: dict[str, str], tiny_model_path: str, tmp_path: Path
) -> None:
    result = run(tiny_model_path, tmp_path, sft(data, lora=LORA, tags=("mine",)))
    policy = Path(str(result.policy))
    assert {path.name for path in policy.iterdir()} == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    assert {"- stagekit", "- mine"} <= set((policy / "README.md").read_text().splitlines())
    model = peft.AutoPeftModelForCausalLM.from_pretrained(policy)
    assert torch.equal(logits(model), logits(load_policy(str(policy))))


def test_another_template_in_the_model_of_a_stage_stops_it_with_both_values(
    data: dict[str, str], tiny_model_path: str, tmp_path: Path
) -> None:
    stages = sft(data), dpo(data)
    run(tiny_model_path, tmp_path, *stages, until_stage="sft")
    (tmp_path / "01-sft/policy/chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    with pytest.raises(StageError, match=r"stage 'dpo': .*chat_template_sha256 was '\w{64}' and is '\w{64}'"):
        run(tiny_model_path, tmp_path, *stages)


def test_another_end_token_in_the_model_of_a_stage_stops_it_with_both_values(
    data: dict[str, str], tiny_model_path: str, tmp_path: Path
) -> None:
    stages = sft(data), dpo(data)
    run(tiny_model_path, tmp_path, *stages, until_stage="sft")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "01-sft/policy")
    before = tokenizer.eos_token
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(7)
    tokenizer.save_pretrained(tmp_path / "01-sft/policy")
    with pytest.raises(StageError, match="eos_token was ") as caught:
        run(tiny_model_path, tmp_path, *stages)
    assert repr(before) in str(caught.value)
    assert repr(tokenizer.eos_token) in str(caught.value)


def test_the_base_of_an_adapter_outlives_save_checkpoint_after_false(
    data: dict[str, str], tiny_model_path: str, tmp_path: Path
) -> None:
    first = sft(data, save_checkpoint_after=False)
    second = dpo(data, lora=LORA, save_checkpoint_after=False)
    third = dpo(data, "more", lora=LORA)
    result = run(tiny_model_path, tmp_path, first, second, third)
    assert not (tmp_path / "02-dpo/policy").exists()
    assert logits(load_policy(str(result.policy))).isfinite().all()
    kept = run(tiny_model_path, tmp_path, first, second, third)
    assert kept == result


def test_saved_weights_are_those_of_the_trainer(
    data: dict[str, str], tiny_model_path: str, tmp_path: Path, trainers: list[Any]
) -> None:
    result = run(tiny_model_path, tmp_path, sft(data))
    state = trainers[0].model.state_dict()
    saved = load_file(Path(str(result.policy), "model.safetensors"))
    assert saved
    assert all(torch.equal(state[name], tensor) for name, tensor in saved.items())
