"""A student made of some of its teacher's blocks."""

import copy
import re
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from stagekit.errors import ConfigError
from stagekit.files import whole_folder
from stagekit.freezing import layout_of
from stagekit.models import load_policy, load_tokenizer


def kept_blocks(teacher_blocks: int, student_blocks: int) -> list[int]:
    """Which blocks of the teacher the student starts with: spread evenly, the first and the last among them.

    For 12 -> 6 these are DistilBERT's 0, 2, 4, 7, 9, 11. Not the map of hidden states, which begins later: there a
    block of the student is to do the work of those of the teacher up to it.

    Raises:
        ConfigError: the student would have more than the teacher.

    Source: huggingface.co/papers/1910.01108, section 2; huggingface.co/papers/2010.13002, appendix.
    """
    if not 1 <= student_blocks <= teacher_blocks:
        raise ConfigError(
            f"init_student.layers: {student_blocks} of the teacher's {teacher_blocks} blocks cannot be had; "
            f"say 1 to {teacher_blocks}"
        )
    if student_blocks == 1:
        return [0]
    return [round(place * (teacher_blocks - 1) / (student_blocks - 1)) for place in range(student_blocks)]


def student_of(teacher: str | Any, layers: int) -> Any:
    """A model like the teacher with `layers` of its blocks, and its embeddings, last norm and head.

    Args:
        teacher: A folder, a hub id, an adapter's folder (which is merged), or a live model, which stays as it is.
        layers: How many blocks.

    Raises:
        ConfigError: more than there are, or an architecture without a plain list of blocks.
    """
    model: Any = load_policy(teacher, dtype="auto") if isinstance(teacher, str) else teacher
    if hasattr(model, "peft_config"):
        model = copy.deepcopy(model) if model is teacher else model
        model = model.merge_and_unload(safe_merge=True)
    layout = layout_of(model)
    config = copy.deepcopy(model.config)
    inner = config.get_text_config()
    if not layout.blocks or layout.count != getattr(inner, "num_hidden_layers", None):
        raise ConfigError(
            f"init_student: a {type(model).__name__} has no plain list of blocks; give a student instead"
        )
    kept = kept_blocks(layout.count, layers)
    inner.num_hidden_layers = layers
    for name, value in list(vars(inner).items()):
        if "layer" in name and isinstance(value, list) and len(value) == layout.count:  # says something of each block
            setattr(inner, name, [value[block] for block in kept])
    with torch.random.fork_rng():
        student = AutoModelForCausalLM.from_config(config).to(model.dtype)
    block = re.compile(rf"^{re.escape(layout.blocks)}\.(\d+)\.")
    weights = {}
    for name, tensor in model.state_dict().items():
        found = block.match(name)
        if found is None:
            weights[name] = tensor
        elif int(found[1]) in kept:
            weights[block.sub(f"{layout.blocks}.{kept.index(int(found[1]))}.", name)] = tensor
    student.load_state_dict(weights)
    return student


def save_student(teacher: str | Any, layers: int, folder: Path) -> None:
    """Write a student of the teacher's blocks, with the teacher's tokenizer; a folder that is there is kept."""
    if (folder / "config.json").is_file():
        return
    name = teacher if isinstance(teacher, str) else teacher.name_or_path
    with whole_folder(folder) as temporary:
        student_of(teacher, layers).save_pretrained(temporary)
        load_tokenizer(name).save_pretrained(temporary)
