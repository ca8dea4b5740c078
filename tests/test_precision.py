"""fp16's loss scale, tf32, and the formats that are refused."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs

from stagekit import ConfigError, TrainingStage
from stagekit.arguments import settings_of
from stagekit.environment import stage_environment
from stagekit.hooks import Hooked, Hooks
from tests.running import run, stage


Write = Callable[..., Path]
FP16 = {"use_mixed_precision": True, "mixed_precision_dtype": "fp16"}


def problems(**options: Any) -> dict[str, str]:
    try:
        TrainingStage(**{"name": "s", "training_data": "rows.jsonl", **options})
    except ConfigError as error:
        return {problem.path: problem.message for problem in error.problems}
    return {}


class Plain:
    """What the mixin finds below it in a trainer."""

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        return {**kwargs, "kwargs_handlers": [DistributedDataParallelKwargs()]}


class Staged(Hooked, Plain):
    """A trainer, as far as its accelerator goes."""


DTYPES: list[set[torch.dtype]] = []


def note_dtypes(model: Any, dataset: Any) -> dict[str, float]:
    DTYPES.append({parameter.dtype for parameter in model.parameters()})
    return {"noted": 1.0}


def test_t36_a_checkpoint_that_is_stored_in_bf16_is_trained_in_float32(
    sft_rows: list[Any], write_rows: Write, tiny_model_path: str, tmp_path: Path
) -> None:
    """Transformers would load it as it is stored, and a stage in full precision would be none."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    stored = str(tmp_path / "stored")
    AutoModelForCausalLM.from_pretrained(tiny_model_path).to(torch.bfloat16).save_pretrained(stored)
    AutoTokenizer.from_pretrained(tiny_model_path).save_pretrained(stored)
    assert AutoModelForCausalLM.from_pretrained(stored).dtype == torch.bfloat16
    data = str(write_rows(sft_rows))
    measured = {"validation_data": data, "evaluation_steps": 1, "custom_evaluation_function": note_dtypes}
    DTYPES.clear()
    result = run(stored, tmp_path / "run", stage("s", data, max_steps=1, **measured))
    (found,) = DTYPES
    assert found == {torch.float32}
    assert AutoModelForCausalLM.from_pretrained(str(result.policy)).dtype == torch.float32


@pytest.mark.parametrize("scale", [None, 1024.0])
def test_t37_the_first_loss_scale_reaches_the_accelerator(scale: float | None) -> None:
    """Trap T37: there is no argument for it."""
    trainer = Staged()
    trainer.hooks = Hooks(loss_scale=scale)
    accelerator = Accelerator(cpu=True, **trainer._build_accelerator_args())
    if scale is None:
        assert accelerator.scaler_handler is None
    else:
        assert accelerator.scaler_handler.init_scale == scale
        assert accelerator.scaler_handler.enabled
        assert torch.amp.GradScaler("cpu", **accelerator.scaler_handler.to_kwargs()).get_scale() == scale


@pytest.mark.parametrize("given", [{}, {"initial_loss_scale": 1024.0}, {"initial_loss_scale": 65536.0}], ids=str)
def test_the_hook_is_set_where_the_option_is(given: dict[str, float]) -> None:
    from stagekit.building import _hooks, _what_is_tracked

    one = TrainingStage(name="s", training_data="rows.jsonl", **FP16, **given)
    job: Any = SimpleNamespace(stage=one)
    hooks = _hooks(job, _what_is_tracked(job), SimpleNamespace(leaves=lambda: False), None)
    assert hooks.loss_scale == given.get("initial_loss_scale")


@pytest.mark.parametrize("option", [{"initial_loss_scale": 1024.0}, {"use_dynamic_loss_scaling": True}], ids=str)
@pytest.mark.parametrize("beside", [{}, {"use_mixed_precision": True, "mixed_precision_dtype": "bf16"}], ids=str)
def test_a_loss_scale_without_fp16_is_refused(option: dict[str, Any], beside: dict[str, Any]) -> None:
    (path,) = option
    message = "has no effect without use_mixed_precision: true and mixed_precision_dtype: fp16"
    assert problems(**option, **beside) == {path: message}


def test_t39_what_fp16_cannot_do_is_refused_with_the_reason() -> None:
    assert problems(**FP16, use_dynamic_loss_scaling=True, initial_loss_scale=1024) == {}
    told = problems(**FP16, use_dynamic_loss_scaling=False)
    assert "knows no constant scale" in told["use_dynamic_loss_scaling"]
    told = problems(**FP16, lora={"bits": 4})
    assert "use bf16" in told["mixed_precision_dtype"]


@pytest.mark.parametrize("value", ["fp8_e4m3", "fp8_e5m2", "fp8_hybrid"])
def test_fp8_is_refused_with_the_reason(value: str) -> None:
    (message,) = problems(use_mixed_precision=True, mixed_precision_dtype=value).values()
    assert message.startswith(f"{value!r} is not supported: TRL's config has no fp8, and without TransformerEngine")


def test_tf32_is_an_argument_of_its_own() -> None:
    given = {setting.target: setting.value for setting in settings_of(tf32("rows.jsonl"))}
    assert (given["tf32"], given["bf16"], given["fp16"]) == (True, False, False)
    plain = settings_of(TrainingStage(name="s", training_data="rows.jsonl"))
    assert "tf32" not in {setting.target for setting in plain}


def tf32(data: str) -> TrainingStage:
    return stage("s", data, max_steps=1, use_mixed_precision=True, mixed_precision_dtype="tf32")


def test_tf32_without_its_gpu_is_refused_before_training(
    sft_rows: list[Any], write_rows: Write, tiny_model_path: str, tmp_path: Path
) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ConfigError, match=r"stages\.s\.mixed_precision_dtype: 'tf32' needs an NVIDIA GPU"):
        run(tiny_model_path, tmp_path, tf32(str(write_rows(sft_rows))))


def test_t10_tf32_is_undone_after_its_stage_and_can_be_had_again() -> None:
    """`enable_tf32` is cached: called a second time it would do nothing."""
    from transformers.utils.import_utils import enable_tf32

    before = torch.backends.fp32_precision
    for _ in range(2):
        with stage_environment():
            enable_tf32(True)
            assert torch.backends.fp32_precision == "tf32"
        assert torch.backends.fp32_precision == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_stage_in_fp16_starts_at_its_scale(
    sft_rows: list[Any], write_rows: Write, tiny_model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stagekit import training

    scales = []
    original = training.build

    def build(job: Any, *args: Any) -> Any:
        trainer, callbacks = original(job, *args)
        scales.append((trainer.accelerator.scaler_handler.init_scale, trainer.accelerator.scaler.get_scale()))
        return trainer, callbacks

    monkeypatch.setattr(training, "build", build)
    data = str(write_rows(sft_rows))
    run(tiny_model_path, tmp_path / "a", stage("s", data, max_steps=2, initial_loss_scale=1024.0, **FP16))
    assert scales == [(1024.0, 1024.0)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_stage_in_tf32_runs_and_leaves_no_trace(
    sft_rows: list[Any], write_rows: Write, tiny_model_path: str, tmp_path: Path
) -> None:
    before = torch.backends.fp32_precision
    result = run(tiny_model_path, tmp_path, tf32(str(write_rows(sft_rows))))
    assert result["s"].status == "completed"
    assert torch.backends.fp32_precision == before
