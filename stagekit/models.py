"""Models on their way to a trainer: found, converted, loaded and copied.

Weights are read from safetensors only and no code of a model repository is run. What a trainer gets is a path or a
hub id (`local_model`); the models loaded here serve for merging, generation and comparison.
"""

import copy
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import snapshot_download
from peft import LoraConfig, PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from stagekit.convert import cache_folder, converted
from stagekit.distributed import live_processes
from stagekit.errors import ConfigError, Problem, StageError
from stagekit.rows import json_object
from stagekit.sources import ModelSource, parse_model, problems_of_model


_HUB_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")
_EXTRAS = ("modules_to_save", "rank_pattern", "alpha_pattern", "exclude_modules", "layers_to_transform")


def local_model(source: ModelSource | str, *, cache: Path | None = None, where: str = "model") -> str:
    """What a TRL trainer can be given for the model: a folder with safetensors, or a hub id that has them.

    A GGUF file is converted once, into `cache`, `$STAGEKIT_CACHE`, `$XDG_CACHE_HOME/stagekit` or `~/.cache/stagekit`.
    A hub model is downloaded without pickled weights and code; the folder of its snapshot is given where an id does
    not say enough: with a revision, or for an adapter.

    Args:
        source: A parsed name, or the text. `stage:NAME` is the pipeline's to resolve.
        cache: Folder for converted models.
        where: The option's path, for messages.

    Raises:
        ConfigError: the model cannot be there or has no safetensors.
        StageError: a download or a conversion failed.
    """
    source = parse_model(source) if isinstance(source, str) else source
    if source.kind == "stage":
        message = f"{source.text!r} is another stage's result, which only a pipeline can resolve; give its folder"
        raise ConfigError([Problem(where, message)])
    if source.kind == "hub":
        return _from_hub(source, where)
    problems = problems_of_model(source, where)
    if problems or source.path is None:
        raise ConfigError(problems)
    if source.path.suffix.lower() == ".gguf":
        return str(converted(source.path, cache or cache_folder()))
    return str(source.path.absolute())


def load_tokenizer(path: str, chat_template: str | None = None) -> Any:
    """The tokenizer of a model folder or hub id, with a padding token as TRL's trainers set it (the EOS token).

    Args:
        path: Folder or hub id.
        chat_template: Replaces the template: Jinja text, a file with it, or a model folder whose template to take.

    Raises:
        StageError: there is no tokenizer, or no token to pad with.
        ConfigError: the template is neither text nor a file.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise StageError(f"{path} has no tokenizer that can be loaded: {error}") from error
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise StageError(f"the tokenizer of {path} has neither pad_token nor eos_token; set one and save it again")
        tokenizer.pad_token = tokenizer.eos_token
    if chat_template is not None:
        tokenizer.chat_template = _template(chat_template)
    return tokenizer


def tokenizer_identity(tokenizer: Any) -> dict[str, Any]:
    """What must not change between two stages that pass a model on."""
    template = tokenizer.chat_template
    text = template if isinstance(template, str) or template is None else json.dumps(template, sort_keys=True)
    return {
        "chat_template_sha256": None if text is None else hashlib.sha256(text.encode()).hexdigest(),
        "eos_token": tokenizer.eos_token,
        "eos_token_id": tokenizer.eos_token_id,
        "vocab_size": len(tokenizer),
    }


def check_same_tokenizer(before: Mapping[str, Any], now: Mapping[str, Any], stage: str) -> None:
    """Stop when a stage is about to train with another tokenizer than the stage before.

    Raises:
        StageError: names every difference with both values.
    """
    names = [*before, *(name for name in now if name not in before)]
    differing = [
        f"{name} was {before.get(name)!r} and is {now.get(name)!r}"
        for name in names
        if before.get(name) != now.get(name)
    ]
    if differing:
        raise StageError(
            f"stage {stage!r}: the tokenizer is not that of the stage before: {'; '.join(differing)}. What was learnt "
            "would be lost; use one template and tokenizer in all stages"
        )


def adapter_base(path: str | Path) -> str | None:
    """The model that the adapter in a folder was trained on; None when the folder holds no adapter."""
    config = Path(path, "adapter_config.json")
    if not config.is_file():
        return None
    base = json_object(config).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise StageError(f"{config} names no base model (base_model_name_or_path is {base!r}); write it there")
    return base


def device_map() -> str | dict[str, int] | None:
    """Where a model is loaded to, as transformers takes it: over all GPUs, or whole on that of the process where each
    process of a launch has one; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    return {"": torch.cuda.current_device()} if live_processes() > 1 else "auto"


def load_policy(
    path: str,
    *,
    dtype: torch.dtype | str = torch.float32,
    trainable: bool = False,
    quantization: Any = None,
    device_map: Any = None,
) -> Any:
    """A causal language model: the full one in a folder or on the hub, or an adapter on its base.

    Args:
        path: Model folder, adapter folder or hub id.
        dtype: Dtype of the weights, or `auto`.
        trainable: Whether an adapter can be trained on. A full model always can.
        quantization: A `BitsAndBytesConfig` for the (base) model, as `bnb_config` makes it.
        device_map: As in transformers; None leaves the model on the CPU.

    Raises:
        StageError: the model, or an adapter's base, cannot be loaded.
    """
    base = adapter_base(path)
    if base is None:
        return _causal_lm(path, dtype, quantization, device_map)
    if not Path(path, "adapter_model.safetensors").is_file():
        raise ConfigError(f"{path} has no adapter_model.safetensors; save the adapter again with save_pretrained")
    if adapter_base(base) is not None:
        raise ConfigError(f"{path} is an adapter on another adapter ({base}); merge that one first (lora.merge)")
    model = _causal_lm(base, dtype, quantization, device_map)
    try:
        return PeftModel.from_pretrained(model, path, is_trainable=trainable)
    except (ValueError, RuntimeError) as error:
        raise StageError(f"the adapter in {path} does not fit its base {base}: {error}") from error


def lora_config(
    rank: int,
    alpha: float,
    dropout: float,
    target_modules: tuple[str, ...] | list[str] | str,
    task_type: Literal["CAUSAL_LM", "SEQ_CLS", "TOKEN_CLS"] = "CAUSAL_LM",
    **extras: Any,
) -> LoraConfig:
    """The peft configuration; the task type is always set, since peft's default (None) trains no score head.
    `extras` are more arguments of it: variants of LoRA, modules that are trained whole, blocks without an adapter."""
    modules = target_modules if isinstance(target_modules, str) else list(target_modules)
    whole = int(alpha) if float(alpha).is_integer() else alpha
    given = {"r": rank, "lora_alpha": whole, "lora_dropout": dropout, "target_modules": modules, **extras}
    return LoraConfig(task_type=task_type, **given)


def bnb_config(bits: Literal[4, 8], compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    """QLoRA's quantisation: nf4 with double quantisation for 4 bits (bitsandbytes' own default is fp4), int8 for 8."""
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def same_adapter(path: str | Path, lora: Mapping[str, Any], extras: Mapping[str, Any] | None = None) -> bool:
    """Whether the adapter in a folder is of the declared shape, so that it can be trained on instead of a new one.

    Args:
        path: Adapter folder.
        lora: `rank`, `alpha`, `target_modules`, `rslora` and `dora`; other keys (dropout, bits, merge) do not change
            the shape.
        extras: More arguments that a new adapter would be made with.
    """
    config = json_object(Path(path, "adapter_config.json"))
    wants = {
        **dict.fromkeys(_EXTRAS),
        **(extras or {}),
        "use_rslora": lora.get("rslora"),
        "use_dora": lora.get("dora"),
    }
    if config.get("r") != lora["rank"] or config.get("lora_alpha") != lora["alpha"]:
        return False
    if any(_set_like(config.get(name)) != _set_like(value) for name, value in wants.items()):
        return False
    wanted, has = lora["target_modules"], config.get("target_modules")
    if wanted == "all-linear" and isinstance(has, list):
        linear = _linear_names(adapter_base(path) or "")
        return linear == {name for name in linear if any(f".{name}".endswith(f".{part}") for part in has)}
    if isinstance(wanted, str) or isinstance(has, str):
        return bool(wanted == has)
    return set(wanted) == set(has or ())


def _set_like(value: Any) -> Any:
    return (sorted(value) if isinstance(value, list | tuple | set) else value) or None


def snapshot_model(model: Any, frozen: bool = True) -> Any:
    """A copy of a model that stays what it is while the original is trained on.

    TRL stores a patched `forward` on the instance that is closed over the original's method (`add_fused_lm_head`), and
    accelerate does the same for autocast, so a plain deepcopy runs the original's weights. They are set aside for the
    copy and put back. Forwards of accelerate's device hooks stay: they carry over correctly.

    Args:
        model: A transformers or peft model.
        frozen: Whether the copy is in evaluation mode and needs no gradients.
    """
    names = ("forward", "_original_forward", "_is_accelerate_prepared")
    aside = [
        (module, name, module.__dict__.pop(name))
        for module in model.modules()
        if not hasattr(module, "_hf_hook")
        for name in names
        if name in module.__dict__
    ]
    try:
        twin = copy.deepcopy(model)
    finally:
        for module, name, value in aside:
            module.__dict__[name] = value
    return twin.eval().requires_grad_(False) if frozen else twin


def _from_hub(source: ModelSource, where: str) -> str:
    try:
        folder = snapshot_download(
            source.repo or "",
            revision=source.revision,
            allow_patterns=list(_HUB_FILES),
            ignore_patterns=["*/*", "consolidated*"],  # other formats of the same weights
        )
    except (OSError, ValueError) as error:
        raise StageError(
            f"{where}: {source.text!r} is no folder here and could not be loaded from the hub: {error}. Check the "
            "name (owner/name or owner/name@revision) and the network, or download it and give the folder"
        ) from error
    if not any(Path(folder).glob("*.safetensors")):
        message = (
            f"{source.text!r} has no *.safetensors on the hub; pickled weights can run code when loaded, so stagekit "
            "does not. Convert it (huggingface.co/spaces/safetensors/convert) or choose another model"
        )
        raise ConfigError([Problem(where, message)])
    is_adapter = Path(folder, "adapter_config.json").is_file()
    return folder if source.revision or is_adapter else source.repo or folder


def _template(given: str) -> str:
    if "{" in given:
        return given
    path = Path(given).expanduser()
    if path.is_file():
        return path.read_text(encoding="utf-8")
    if path.is_dir():
        template = load_tokenizer(str(path)).chat_template
        if isinstance(template, str):
            return template
        raise ConfigError(f"chat_template: the tokenizer in {path} has no template")
    raise ConfigError(f"chat_template: {given!r} is neither Jinja text nor a file or model folder that exists")


def _causal_lm(path: str, dtype: torch.dtype | str, quantization: Any, device_map: Any) -> Any:
    if Path(path).expanduser().is_dir():
        problems = problems_of_model(parse_model(str(Path(path).expanduser().absolute())), "model")
        if problems:
            raise ConfigError(problems)
    load: Callable[..., Any] = AutoModelForCausalLM.from_pretrained
    options = {"quantization_config": quantization} if quantization is not None else {}
    try:
        return load(path, dtype=dtype, device_map=device_map, use_safetensors=True, trust_remote_code=False, **options)
    except (OSError, ValueError) as error:
        raise StageError(f"{path} could not be loaded as a causal language model: {error}") from error


def _linear_names(base: str) -> set[str]:
    """Full names of the linear layers that peft's `all-linear` adapts: all but the output head."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base, trust_remote_code=False))
    head = model.get_output_embeddings()
    return {
        name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and module is not head
    }
