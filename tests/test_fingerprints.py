import json
import shutil
from pathlib import Path

import pytest

from stagekit.errors import StageError
from stagekit.fingerprints import model_fingerprint
from stagekit.models import load_policy, load_tokenizer
from tests.adapting import edit_adapter, trained


def test_the_fingerprint_of_a_model_follows_weights_tokenizer_and_base(
    adapter: Path, tiny_model_path: str, tmp_path: Path
) -> None:
    copied = Path(shutil.copytree(tiny_model_path, tmp_path / "copy"))
    assert model_fingerprint(str(copied)) == model_fingerprint(tiny_model_path)
    (copied / "README.md").write_text("a model card does not matter")
    assert model_fingerprint(str(copied)) == model_fingerprint(tiny_model_path)
    load_tokenizer(tiny_model_path, "{{ 1 }}").save_pretrained(copied)
    assert model_fingerprint(str(copied)) != model_fingerprint(tiny_model_path)
    first = model_fingerprint(str(adapter))
    trained(load_policy(tiny_model_path)).save_pretrained(copied)
    edit_adapter(adapter, base_model_name_or_path=str(copied))
    assert model_fingerprint(str(adapter)) != first


def test_an_adapter_is_the_same_on_a_moved_base_and_in_any_order_of_its_modules(
    adapter: Path, tiny_model_path: str, tmp_path: Path
) -> None:
    """Else the texts of a stage would follow the folder that a run stands in."""
    first = model_fingerprint(str(adapter))
    moved = shutil.copytree(tiny_model_path, tmp_path / "moved")
    modules = json.loads((adapter / "adapter_config.json").read_text())["target_modules"]
    edit_adapter(adapter, base_model_name_or_path=str(moved), target_modules=modules[::-1])
    assert model_fingerprint(str(adapter)) == first
    edit_adapter(adapter, lora_alpha=1)
    assert model_fingerprint(str(adapter)) != first


def test_a_name_that_is_no_model_has_no_fingerprint() -> None:
    with pytest.raises(StageError, match="neither a model folder nor a hub id"):
        model_fingerprint("./nowhere")
