"""GGUF files converted to safetensors, once."""

import fcntl
import logging
import os
from pathlib import Path

from stagekit.errors import StageError
from stagekit.files import whole_folder
from stagekit.sources import fingerprint_of_path


logger = logging.getLogger(__name__)

_FORMAT = 1  # part of the cache key: raise it when a conversion would come out differently


def cache_folder() -> Path:
    """Where converted models are kept: `$STAGEKIT_CACHE`, `$XDG_CACHE_HOME/stagekit` or `~/.cache/stagekit`."""
    own = os.environ.get("STAGEKIT_CACHE")
    shared = os.environ.get("XDG_CACHE_HOME")
    return Path(own) if own else Path(shared or "~/.cache").expanduser() / "stagekit"


def conversion_of(gguf: Path, cache: Path | None = None) -> Path:
    """Where the safetensors folder of a GGUF file is, or will be."""
    return (cache or cache_folder()) / "models" / f"{gguf.stem}-{fingerprint_of_path(gguf)[:16]}-v{_FORMAT}"


def converted(gguf: Path, cache: Path) -> Path:
    """The safetensors folder of a GGUF file, converted once; a second process waits for the first."""
    target = conversion_of(gguf, cache)
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.with_name(f".{target.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.is_dir():
                _convert(gguf, target)
    except OSError as error:
        raise StageError(
            f"{gguf} could not be converted into {target}: {error}. Free some space, or set STAGEKIT_CACHE to a "
            "folder that can be written"
        ) from error
    return target


def _convert(gguf: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    logger.info("converting %s to safetensors in %s; this happens once", gguf, target)
    try:
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    except (ValueError, KeyError, NotImplementedError) as error:
        raise StageError(f"{gguf} cannot be converted: {error}; use the model's safetensors instead") from error
    # The weights are dequantised, but transformers still counts the model as quantised and refuses to save it.
    for name in ("hf_quantizer", "quantization_method"):
        model.__dict__.pop(name, None)
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    with whole_folder(target) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
