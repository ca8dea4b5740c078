import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants as hub_constants
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.trainer.utils import add_fused_lm_head

from stagekit.errors import ConfigError, StageError
from stagekit.fingerprints import model_fingerprint
from stagekit.models import (
    adapter_base,
    bnb_config,
    check_same_tokenizer,
    load_policy,
    load_tokenizer,
    local_model,
    lora_config,
    same_adapter,
    snapshot_model,
    tokenizer_identity,
)
from tests.adapting import edit_adapter, logits, trained


LORA = {"rank": 4, "alpha": 8.0, "target_modules": ("q_proj", "v_proj")}
SHA = "0123456789abcdef0123456789abcdef01234567"


def hub_copy(folder: str, cache: Path, monkeypatch: pytest.MonkeyPatch, *left_out: str) -> None:
    """Lay the folder out as the hub's cache holds `owner/tiny`, without the files left out."""
    monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    repo = cache / "models--owner--tiny"
    shutil.copytree(folder, repo / "snapshots" / SHA, ignore=shutil.ignore_patterns(*left_out))
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(SHA)


def test_a_folder_is_given_as_it_is_and_a_stage_is_not_resolved(tiny_model_path: str) -> None:
    assert local_model(tiny_model_path) == tiny_model_path
    assert Path(local_model("package:stagekit/recipes/data/tiny")).samefile(tiny_model_path)
    with pytest.raises(ConfigError, match="another stage's result"):
        local_model("stage:sft")


def test_a_folder_with_pickled_weights_only_is_refused(tiny_model_path: str, tmp_path: Path) -> None:
    shutil.copy(Path(tiny_model_path, "config.json"), tmp_path)
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"stages\.a\.model: .*only pickled weights.*save_pretrained"):
        local_model(str(tmp_path), where="stages.a.model")
    with pytest.raises(ConfigError, match="only pickled weights"):
        load_policy(str(tmp_path))


def test_a_hub_model_keeps_its_id_and_a_revision_gives_its_snapshot(
    tiny_model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub_copy(tiny_model_path, tmp_path, monkeypatch)
    assert local_model("owner/tiny") == "owner/tiny"
    assert local_model(f"owner/tiny@{SHA}") == str(tmp_path / "models--owner--tiny" / "snapshots" / SHA)
    assert model_fingerprint("owner/tiny") == SHA
    assert model_fingerprint("owner/other") == "hub:owner/other@main"


def test_an_adapter_on_the_hub_gives_its_snapshot(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub_copy(str(adapter), tmp_path / "hub", monkeypatch)
    folder = local_model("owner/tiny")
    assert Path(folder).name == SHA
    assert torch.equal(logits(load_policy(folder)), logits(load_policy(str(adapter))))


def test_a_hub_model_without_safetensors_is_refused(
    tiny_model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub_copy(tiny_model_path, tmp_path, monkeypatch, "*.safetensors")
    with pytest.raises(ConfigError, match=r"'owner/tiny' has no \*\.safetensors"):
        local_model("owner/tiny")


def test_a_hub_model_out_of_reach_names_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(StageError, match=r"'owner/tiny' is no folder here.*or download it and give the folder"):
        local_model("owner/tiny")


def test_a_missing_pad_token_becomes_the_eos_token(tiny_model_path: str, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)
    assert load_tokenizer(tiny_model_path).pad_token == tokenizer.pad_token
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).pad_token == tokenizer.eos_token


def test_a_template_is_text_a_file_or_another_models(tiny_model_path: str, tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text("{{ 1 }}")
    assert load_tokenizer(tiny_model_path, str(tmp_path / "t.jinja")).chat_template == "{{ 1 }}"
    assert load_tokenizer(tiny_model_path, "{{ 2 }}").chat_template == "{{ 2 }}"
    own = load_tokenizer(tiny_model_path).chat_template
    assert load_tokenizer(tiny_model_path, tiny_model_path).chat_template == own
    with pytest.raises(ConfigError, match=r"'chatml\.jinja' is neither"):
        load_tokenizer(tiny_model_path, "chatml.jinja")


def test_a_model_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="has no tokenizer"):
        load_tokenizer(str(tmp_path))


def test_another_template_or_eos_between_stages_stops_with_both_values(tiny_model_path: str) -> None:
    before = tokenizer_identity(load_tokenizer(tiny_model_path))
    check_same_tokenizer(before, tokenizer_identity(load_tokenizer(tiny_model_path)), "dpo")
    other = load_tokenizer(tiny_model_path, "{{ 1 }}")
    other.eos_token = other.pad_token
    with pytest.raises(StageError) as raised:
        check_same_tokenizer(before, tokenizer_identity(other), "dpo")
    text = str(raised.value)
    assert "stage 'dpo'" in text
    assert f"eos_token was {before['eos_token']!r} and is {other.eos_token!r}" in text
    assert f"chat_template_sha256 was {before['chat_template_sha256']!r}" in text


def test_t8_a_saved_adapter_is_loaded_trainable_or_frozen_with_the_same_logits(
    adapter: Path, tiny_model_path: str
) -> None:
    frozen, live = load_policy(str(adapter)), load_policy(str(adapter), trainable=True)
    assert isinstance(live, PeftModel)
    assert sum(p.numel() for p in frozen.parameters() if p.requires_grad) == 0
    names = {name for name, p in live.named_parameters() if p.requires_grad}
    assert names
    assert all("lora_" in name for name in names)
    assert torch.equal(logits(live), logits(frozen))
    assert not torch.allclose(logits(live), logits(load_policy(tiny_model_path)), atol=1e-2)
    before = logits(live)
    assert not torch.allclose(logits(trained(live)), before, atol=1e-3)


def test_an_adapter_names_its_base(adapter: Path, tiny_model_path: str, tmp_path: Path) -> None:
    assert adapter_base(adapter) == tiny_model_path
    assert adapter_base(tiny_model_path) is None
    assert adapter_base("HuggingFaceTB/SmolLM2-135M") is None


def test_an_adapter_that_cannot_be_loaded_says_why(adapter: Path, tmp_path: Path) -> None:
    edit_adapter(adapter, r=8)
    with pytest.raises(StageError, match="does not fit its base"):
        load_policy(str(adapter))
    edit_adapter(adapter, base_model_name_or_path=str(tmp_path / "gone"))
    with pytest.raises(StageError, match="gone could not be loaded"):
        load_policy(str(adapter))
    edit_adapter(adapter, base_model_name_or_path=str(adapter))
    with pytest.raises(ConfigError, match="adapter on another adapter"):
        load_policy(str(adapter))
    edit_adapter(adapter, base_model_name_or_path=None)
    with pytest.raises(StageError, match="names no base model"):
        load_policy(str(adapter))
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    edit_adapter(adapter, base_model_name_or_path="owner/tiny")
    with pytest.raises(ConfigError, match=r"no adapter_model\.safetensors"):
        load_policy(str(adapter))


def test_an_adapter_of_the_declared_shape_is_recognised(adapter: Path) -> None:
    assert same_adapter(adapter, LORA)
    assert same_adapter(adapter, LORA | {"dropout": 0.5, "target_modules": ["v_proj", "q_proj"]})
    assert not same_adapter(adapter, LORA | {"rank": 8})
    assert not same_adapter(adapter, LORA | {"alpha": 16.0})
    assert not same_adapter(adapter, LORA | {"target_modules": ("q_proj",)})
    assert not same_adapter(adapter, LORA | {"target_modules": "all-linear"})
    assert not same_adapter(adapter, LORA | {"rslora": True})
    assert not same_adapter(adapter, LORA, {"modules_to_save": ["lm_head"]})
    edit_adapter(adapter, use_dora=True)
    assert not same_adapter(adapter, LORA)
    assert same_adapter(adapter, LORA | {"dora": True})
    edit_adapter(adapter, use_dora=False, use_rslora=True, modules_to_save=["b", "a"])
    assert not same_adapter(adapter, LORA | {"rslora": True})
    assert same_adapter(adapter, LORA | {"rslora": True}, {"modules_to_save": ["a", "b"]})


def test_all_linear_is_recognised_after_peft_has_spelt_it_out(tiny_model_path: str, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_model_path)
    get_peft_model(base, lora_config(4, 8, 0.0, "all-linear")).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] != "all-linear"
    assert same_adapter(tmp_path, LORA | {"target_modules": "all-linear"})


def test_t39_quantisation_is_that_of_the_qlora_paper() -> None:
    four, eight = bnb_config(4, torch.bfloat16), bnb_config(8, torch.bfloat16)
    assert (four.load_in_4bit, four.bnb_4bit_quant_type, four.bnb_4bit_use_double_quant) == (True, "nf4", True)
    assert four.bnb_4bit_compute_dtype == torch.bfloat16
    assert (eight.load_in_8bit, eight.load_in_4bit) == (True, False)


def test_the_lora_configuration_always_has_a_task_type() -> None:
    config = lora_config(4, 8.0, 0.05, ("q_proj",))
    assert (config.task_type, config.r, config.lora_alpha, config.lora_dropout) == ("CAUSAL_LM", 4, 8, 0.05)
    assert isinstance(config.lora_alpha, int)
    assert lora_config(4, 8, 0.0, ("q_proj",), task_type="SEQ_CLS").task_type == "SEQ_CLS"


def test_t1_a_plain_deepcopy_still_runs_the_originals_weights_and_a_snapshot_does_not(tiny_model: Any) -> None:
    # Trap T1: if the first half fails, TRL no longer closes over the original and snapshot_model may go.
    import copy

    add_fused_lm_head(tiny_model)
    forward = tiny_model.forward
    plain, snapshot, before = copy.deepcopy(tiny_model), snapshot_model(tiny_model), logits(tiny_model)
    assert tiny_model.forward == forward
    trained(tiny_model)
    assert torch.equal(logits(plain), logits(tiny_model))
    assert not torch.allclose(logits(tiny_model), before, atol=1e-2)
    assert torch.equal(logits(snapshot), before)


def test_a_snapshot_of_a_peft_model_is_one_too_and_is_frozen(adapter: Path) -> None:
    model = load_policy(str(adapter), trainable=True)
    add_fused_lm_head(model.base_model.model)
    snapshot, live, before = snapshot_model(model), snapshot_model(model, frozen=False), logits(model)
    trained(model)
    assert torch.equal(logits(snapshot), before)
    assert not any(p.requires_grad for p in snapshot.parameters())
    assert any(p.requires_grad for p in live.parameters())
    assert "forward" in model.base_model.model.__dict__
