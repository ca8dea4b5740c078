"""Models on their way to a trainer: found, converted, loaded, merged, copied and compared.

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
from huggingface_hub import constants as hub_constants
from huggingface_hub import snapshot_download
from peft import LoraConfig, PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from stagekit.convert import cache_folder, converted
from stagekit.distributed import live_processes
from stagekit.errors import ConfigError, Problem, StageError
from stagekit.files import whole_folder
from stagekit.rows import json_object
from stagekit.sources import ModelSource, fingerprint_of_path, parse_model, problems_of_model


MERGE_TOLERANCE = 1e-4
"""Largest difference of logits before and after a merge in float32, relative to the largest logit."""

ROUNDING_TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""The same between the merged model in float32 and as saved: each weight is rounded once (2^-24, 2^-11, 2^-8), each
activation again, and the rounding adds up over the layers."""

_HUB_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")
_MODEL_FILES = ("config.json", "adapter_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
_QUANTISED_LAYERS = ("Linear4bit", "Linear8bitLt")
_EXTRAS = ("modules_to_save", "rank_pattern", "alpha_pattern", "exclude_modules", "layers_to_transform")

_fingerprints: dict[tuple[str, int, int], str] = {}


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


def merge_adapter(
    adapter_path: str | Path, out_dir: str | Path, dtype: torch.dtype, tolerance: float = MERGE_TOLERANCE
) -> dict[str, Any]:
    """Merge an adapter into its unquantised base and save the full model with its tokenizer, if the logits agree.

    The merge is done in float32 and rounded once, to `dtype`; merging into a quantised base would round the adapter
    away. What was saved is loaded again and compared too. The folder appears whole or not at all.

    Args:
        adapter_path: Adapter folder.
        out_dir: Where the full model goes; an earlier result there is replaced.
        dtype: Dtype of the saved weights.
        tolerance: Largest allowed difference by the merge, relative to the largest logit.

    Returns:
        `base`, `dtype`, and the relative differences `merge_difference` and `saved_difference`.

    Raises:
        StageError: the logits differ by more than the tolerance, the base is quantised, or the disk is full.
    """
    source, target = Path(adapter_path), Path(out_dir)
    base = adapter_base(source)
    if base is None:
        raise ConfigError(f"{source} holds no adapter (no adapter_config.json); there is nothing to merge")
    if target.resolve() == source.resolve():
        raise ConfigError(f"{target} is the adapter's own folder; give another one for the merged model")
    model = load_policy(str(source), dtype=torch.float32)
    _refuse_quantised(model, base)
    with_adapter = fixed_logits(model)
    model = model.merge_and_unload(safe_merge=True)
    _refuse_quantised(model, base)
    merged = fixed_logits(model)
    by_merge = _difference(with_adapter, merged, tolerance, f"{source}: after the merge")
    tokenizer = load_tokenizer(str(source) if (source / "tokenizer_config.json").is_file() else base)
    with whole_folder(target) as temporary:
        model.to(dtype).save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        del model
        saved = fixed_logits(load_policy(str(temporary), dtype=dtype))
        allowed = ROUNDING_TOLERANCE.get(dtype, 1e-1)
        by_saving = _difference(merged, saved, allowed, f"{source}: after saving the merged model in {dtype}")
    name = str(dtype).removeprefix("torch.")
    return {"base": base, "dtype": name, "merge_difference": by_merge, "saved_difference": by_saving}


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


@torch.no_grad()
def fixed_logits(model: Any, rows: int = 2) -> torch.Tensor:
    """Logits (rows, 32, V), or (rows, labels) of a classifier, in float32 on fixed token ids; at most 2 rows."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.get_input_embeddings().num_embeddings, (2, 32), generator=generator)[:rows]
    model.eval()
    logits: torch.Tensor = model(input_ids=ids.to(model.device)).logits
    return logits.float().cpu()


def _difference(before: torch.Tensor, after: torch.Tensor, allowed: float, what: str) -> float:
    """The largest difference of logits relative to the largest logit, if it is allowed."""
    difference = float((after - before).abs().max())
    relative = difference / max(float(before.abs().max()), 1e-6)
    if not relative <= allowed:  # also for NaN
        raise StageError(
            f"{what} the logits differ by {difference:.3g} ({relative:.3g} of the largest, allowed {allowed:.3g}), so "
            "the model is not the trained one. Nothing was written; save in float32, or keep the adapter "
            "(lora.merge: false)"
        )
    return relative


def _refuse_quantised(model: Any, base: str) -> None:
    layers = [name for name, module in model.named_modules() if type(module).__name__ in _QUANTISED_LAYERS]
    if layers or getattr(model.config, "quantization_config", None) is not None:
        raise StageError(
            f"{base} is quantised as saved ({layers[0] if layers else 'quantization_config in its config.json'}), and "
            "a merge would round the adapter away; name the unquantised model in adapter_config.json"
        )
