"""The model that a trainer is given, as a generator: what the trainers that write their own data share."""

import logging
from collections.abc import Mapping
from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from stagekit.counters import digest_of
from stagekit.errors import ConfigError
from stagekit.fingerprints import tokenizer_fingerprint, weights_fingerprint
from stagekit.generation import TransformersGenerator
from stagekit.requests import Sampling
from stagekit.writer import Progress


logger = logging.getLogger(__name__)


def loaded(model: Any, args: TrainingArguments) -> Any:
    """The model on the device of training; by path as TRL loads it, float32 unless model_init_kwargs says else."""
    if isinstance(model, str):
        given = cast(Mapping[str, Any], getattr(args, "model_init_kwargs", None) or {})
        trust = getattr(args, "trust_remote_code", False)
        model = AutoModelForCausalLM.from_pretrained(model, trust_remote_code=trust, **{"dtype": "float32", **given})
    return model if getattr(model, "hf_device_map", None) else model.to(args.device)


def tokenizer_of(model: Any, args: TrainingArguments) -> Any:
    """The tokenizer beside the model."""
    name = model if isinstance(model, str) else model.config._name_or_path
    return AutoTokenizer.from_pretrained(name, trust_remote_code=getattr(args, "trust_remote_code", False))


def generator_of(
    model: Any, processing_class: Any, sampling: Sampling, args: TrainingArguments
) -> TransformersGenerator:
    """The model, in memory, as a generator in the trainer's precision; its fingerprint is that of its content."""
    tokenizer = getattr(processing_class, "tokenizer", processing_class)  # of a processor
    is_float32 = next(model.parameters()).dtype == torch.float32
    autocast = torch.bfloat16 if args.bf16 and is_float32 else None
    cut = (sampling.top_p, sampling.top_k)
    fingerprint = digest_of(
        weights_fingerprint(model),
        tokenizer_fingerprint(tokenizer),
        float(sampling.temperature),
        str(autocast),
        *([] if cut == (1.0, 0) else [cut]),
    )
    return TransformersGenerator(model, tokenizer, sampling, fingerprint, autocast)


def refuse_new_template(args: Any) -> None:
    """The texts are written with the template that training uses.

    Raises:
        ConfigError: an argument would change it in between.
    """
    for name in ("chat_template_path", "eos_token"):
        if getattr(args, name, None) is not None:
            raise ConfigError(
                f"{name} would change the template after the texts are written with the old one. Set it on the "
                "tokenizer and pass that as processing_class."
            )


def journal_info(policy: TransformersGenerator) -> dict[str, Any]:
    """What a journal keeps about who wrote it."""
    return {
        "model": policy.fingerprint,
        "tokenizer": tokenizer_fingerprint(policy.tokenizer),
        "versions": {"torch": torch.__version__},
    }


def log_progress(progress: Progress) -> None:
    """A line per batch."""
    logger.info(
        "round %d, %s: batch %d of %d, %d texts, %d tokens in %.1f s",
        progress.round,
        progress.role,
        progress.batch,
        progress.batches,
        progress.texts,
        progress.new_tokens,
        progress.duration_seconds,
    )
