"""What a model or a tokenizer is, as a digest: the same wherever its folder stands."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants as hub_constants

from stagekit.errors import StageError
from stagekit.models import adapter_base
from stagekit.rows import json_object
from stagekit.sources import ModelSource, fingerprint_of_path, parse_model


_MODEL_FILES = ("config.json", "adapter_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")

_fingerprints: dict[tuple[str, int, int], str] = {}


def model_fingerprint(path_or_hub: str) -> str:
    """What the weights are: a sha256 over a folder's config, tokenizer and safetensors, or a hub model's commit.

    An adapter's fingerprint takes in that of its base. Content is hashed once per path, time and size. A hub model
    that is not in the local cache gives `hub:NAME@REVISION`.
    """
    path = Path(path_or_hub).expanduser()
    if path.is_file():
        return _file_fingerprint(path)
    if not path.is_dir():
        return _hub_commit(parse_model(path_or_hub))
    files = [path / name for name in _MODEL_FILES if (path / name).is_file()]
    files += sorted(entry for entry in path.iterdir() if entry.name.endswith((".safetensors", ".index.json")))
    digest = hashlib.sha256()
    for file in files:
        content = _adapter_identity(file) if file.name == "adapter_config.json" else _file_fingerprint(file)
        digest.update(f"{file.name}\0{content}\n".encode())
    base = adapter_base(path)
    if base is not None:
        digest.update(model_fingerprint(base).encode())
    return digest.hexdigest()


def _adapter_identity(path: Path) -> str:
    """An adapter's settings without its base's path, which says where a run stands, and without the order of the
    names of its modules, which peft takes from a set."""
    settings = json_object(path)
    settings.pop("base_model_name_or_path", None)
    for name, value in settings.items():
        if isinstance(value, list):
            settings[name] = sorted(value, key=str)
    return json.dumps(settings, sort_keys=True)


def _file_fingerprint(path: Path) -> str:
    stat = path.stat()
    key = (str(path.resolve()), stat.st_mtime_ns, stat.st_size)
    if key not in _fingerprints:
        _fingerprints[key] = fingerprint_of_path(path)
    return _fingerprints[key]


def _hub_commit(source: ModelSource) -> str:
    if source.kind != "hub" or source.repo is None:
        raise StageError(f"{source.text!r} is neither a model folder nor a hub id")
    revision = source.revision or "main"
    folder = Path(hub_constants.HF_HUB_CACHE, f"models--{source.repo.replace('/', '--')}")
    if (folder / "snapshots" / revision).is_dir():
        return revision
    reference = folder / "refs" / revision
    return reference.read_text().strip() if reference.is_file() else f"hub:{source.repo}@{revision}"


def weights_fingerprint(model: Any) -> str:
    """A SHA-256, in hex, of the model's parameters and buffers: their names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """A SHA-256, in hex, of what decides a prompt's tokens: vocabulary, rules, special tokens and chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    parts = [rules, repr(sorted(map(str, tokenizer.all_special_tokens))), str(tokenizer.chat_template)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
