"""What distillation can be asked for: the config's fields, and a teacher and a student of one tokenizer."""

from typing import Any

from transformers import AutoTokenizer

from stagekit.distillation_losses import MAX_TEMPERATURE, MIXTURE
from stagekit.errors import ConfigError
from stagekit.trainers.distillation_head import base_of


OTHER_TOKENIZER = (
    "Distil by text (mode: sequence: the teacher writes, the student learns what it wrote), or take a teacher of the "
    "same tokenizer. Logits across tokenizers are in TRL's experimental GOLD trainer, which stagekit does not use"
)


def check_config(args: Any, own_loss: Any) -> None:
    """What the config's fields can be, and that no other loss is asked for beside this one.

    Raises:
        ConfigError: names the first field that cannot be.
    """
    if not 0 <= args.alpha <= 1:
        raise ConfigError(f"alpha: {args.alpha} is no share; it must be between 0 and 1")
    if not 0 < args.temperature <= MAX_TEMPERATURE:
        raise ConfigError(
            f"temperature: {args.temperature} must be above 0 and at most {MAX_TEMPERATURE:g}, beyond which float32 "
            "loses the divergence"
        )
    if args.divergence not in ("forward_kl", "reverse_kl", *MIXTURE):
        raise ConfigError(f"divergence: {args.divergence!r} is none of forward_kl, reverse_kl, {', '.join(MIXTURE)}")
    if args.mixture is not None and (args.divergence not in MIXTURE or not 0 < args.mixture < 1):
        raise ConfigError(f"mixture: {args.mixture} must be between 0 and 1, for {' or '.join(MIXTURE)}")
    if args.hidden_loss not in ("rms_mse", "mse", "cosine"):
        raise ConfigError(f"hidden_loss: {args.hidden_loss!r} is none of rms_mse, mse, cosine")
    if args.alpha > 0 and args.loss_type != "nll":
        raise ConfigError(
            f"loss_type: {args.loss_type!r} is no likelihood of the labels; only 'nll' is distilled with"
        )
    if args.alpha > 0 and args.label_smoothing_factor:
        raise ConfigError(
            "label_smoothing_factor: has no effect beside a teacher, who smooths the labels; leave it out"
        )
    if args.alpha > 0 and own_loss is not None:
        raise ConfigError("compute_loss_func: takes the place of the loss that is distilled with; leave it out")
    for name in ("chunk_tokens", "cache_top_k"):
        if getattr(args, name) < 1:
            raise ConfigError(f"{name}: {getattr(args, name)} must be at least 1")
    if args.teacher_cache is not None and args.match_hidden_states:
        raise ConfigError("teacher_cache: keeps no hidden states; leave it out, or match_hidden_states")


def check_rows(model: Any, whose: str, vocabulary: int) -> None:
    """See that a model has logits for every token.

    Raises:
        ConfigError: its head has fewer rows.
    """
    rows = base_of(model).get_output_embeddings().weight.shape[0]
    if rows < vocabulary:
        raise ConfigError(f"the {whose}'s head has {rows} rows, its tokenizer {vocabulary} tokens")


def shared_vocabulary(student: Any, teacher: Any, teacher_tokenizer: Any) -> int:
    """How many tokens the tokenizer has that both models share.

    Raises:
        ConfigError: they do not share it.
    """
    if teacher_tokenizer is None:
        name = teacher if isinstance(teacher, str) else getattr(teacher, "name_or_path", "")
        if not name:
            raise ConfigError("teacher_processing_class: missing; the teacher does not say where its tokenizer is")
        teacher_tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    ours, theirs = student.get_vocab(), teacher_tokenizer.get_vocab()
    if ours != theirs:
        differing = sorted(token for token in {*ours, *theirs} if ours.get(token) != theirs.get(token))
        raise ConfigError(
            f"the teacher has another tokenizer: {len(theirs)} tokens beside the student's {len(ours)}, and "
            f"{differing[0]!r} is {theirs.get(differing[0])} there and {ours.get(differing[0])} here, so their "
            f"distributions cannot be compared. {OTHER_TOKENIZER}"
        )
    return len(ours)
