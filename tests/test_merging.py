import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from stagekit.errors import ConfigError, StageError
from stagekit.merging import merge_adapter
from stagekit.models import adapter_base, bnb_config, load_policy, load_tokenizer, lora_config, tokenizer_identity
from tests.adapting import edit_adapter, logits, trained


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merged_model_has_the_adapters_logits(adapter: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    with_adapter = logits(load_policy(str(adapter)))
    told = merge_adapter(adapter, tmp_path / "merged", dtype)
    merged = load_policy(str(tmp_path / "merged"), dtype="auto")
    assert merged.dtype == dtype
    assert adapter_base(tmp_path / "merged") is None
    # Logits up to about 8; each weight is rounded once (2^-24 or 2^-8), and in bfloat16 each activation of two layers.
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 0.4}[dtype]
    torch.testing.assert_close(logits(merged).float(), with_adapter, rtol=0, atol=tolerance)
    assert 0 < told["merge_difference"] < 1e-5
    assert told["saved_difference"] < {torch.float32: 1e-7, torch.bfloat16: 0.05}[dtype]
    assert (told["base"], told["dtype"]) == (adapter_base(adapter), str(dtype).removeprefix("torch."))
    identity = tokenizer_identity(load_tokenizer(str(tmp_path / "merged")))
    assert identity == tokenizer_identity(load_tokenizer(str(adapter)))


@pytest.mark.parametrize("variant", ["use_rslora", "use_dora"])
def test_a_merged_variant_has_the_adapters_logits(variant: str, tiny_model_path: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    extras: dict[str, Any] = {variant: True}
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_model_path),
        lora_config(4, 8.0, 0.0, ("q_proj", "v_proj"), **extras),
    )
    trained(model).save_pretrained(tmp_path / "adapter")
    load_tokenizer(tiny_model_path).save_pretrained(tmp_path / "adapter")
    told = merge_adapter(tmp_path / "adapter", tmp_path / "merged", torch.float32)
    assert told["merge_difference"] < 1e-4
    merged = logits(load_policy(str(tmp_path / "merged")))
    torch.testing.assert_close(merged, logits(model), rtol=0, atol=1e-3)
    assert not torch.allclose(merged, logits(load_policy(tiny_model_path)), atol=1e-2)


def test_a_merge_that_changes_the_logits_stops_and_writes_nothing(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"logits differ by .*allowed 0\).*Nothing was written"):
        merge_adapter(adapter, tmp_path / "merged", torch.float32, tolerance=0.0)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_merge_needs_an_adapter_and_another_folder(adapter: Path, tiny_model_path: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no adapter"):
        merge_adapter(tiny_model_path, tmp_path / "merged", torch.float32)
    with pytest.raises(ConfigError, match="the adapter's own folder"):
        merge_adapter(adapter, adapter, torch.float32)


def test_t40_an_adapter_trained_on_a_quantised_base_is_merged_into_the_plain_one(
    tiny_model_path: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    base = load_policy(tiny_model_path, quantization=bnb_config(4, torch.float32))
    assert type(base.model.layers[0].self_attn.q_proj).__name__ == "Linear4bit"
    model = trained(get_peft_model(base, lora_config(4, 8, 0.0, ("q_proj", "v_proj"))))
    model.save_pretrained(tmp_path / "adapter")
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", torch.float32)
    merged = load_policy(str(tmp_path / "merged"))
    assert {type(module).__name__ for module in merged.modules()} & {"Linear4bit", "Linear8bitLt"} == set()
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())


def test_a_base_saved_quantised_is_not_merged_into(adapter: Path, tiny_model_path: str, tmp_path: Path) -> None:
    quantised = load_policy(tiny_model_path, quantization=bnb_config(8, torch.float32))
    quantised.save_pretrained(tmp_path / "base8")
    edit_adapter(adapter, base_model_name_or_path=str(tmp_path / "base8"))
    with pytest.raises(StageError, match="quantised as saved"):
        merge_adapter(adapter, tmp_path / "merged", torch.float32)
