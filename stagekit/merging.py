"""An adapter merged into its base, with the logits compared before anything is saved."""

from pathlib import Path
from typing import Any

import torch

from stagekit.errors import ConfigError, StageError
from stagekit.files import whole_folder
from stagekit.models import adapter_base, load_policy, load_tokenizer


MERGE_TOLERANCE = 1e-4
"""Largest difference of logits before and after a merge in float32, relative to the largest logit."""

ROUNDING_TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""The same between the merged model in float32 and as saved: each weight is rounded once (2^-24, 2^-11, 2^-8), each
activation again, and the rounding adds up over the layers."""

_QUANTISED_LAYERS = ("Linear4bit", "Linear8bitLt")


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
