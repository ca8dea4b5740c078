"""The options that every stage has, by family. A stage type says which families it uses; `TrainingStage` has them all.

Names and defaults are the specification's. Where TRL or a paper does something else, the docstring says so; the last
line of a docstring names the TRL argument that carries the option.
"""

from collections.abc import Mapping
from datetime import timedelta
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, PlainSerializer, WithJsonSchema

from stagekit.groups import Callbacks, EarlyStopping, OneSet, Sets, wrong
from stagekit.options import (
    Count,
    Fraction,
    Function,
    NonNegativeFloat,
    Options,
    Positive,
    PositiveFloat,
    Seed,
    duration_text,
    shown,
)


_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def _duration(value: object) -> object:
    if value is None:
        return None
    found = value
    if isinstance(value, str) and value[-1:] in _UNITS:
        try:
            found = timedelta(seconds=float(value[:-1]) * _UNITS[value[-1]])
        except (ValueError, OverflowError):
            found = None
    if not isinstance(found, timedelta) or found <= timedelta(0):
        raise wrong(f"a duration is written 90s, 30m, 6h or 2d, and is above 0; not {shown(value)}")
    return found


Duration = Annotated[
    timedelta,
    BeforeValidator(_duration),
    PlainSerializer(duration_text, return_type=str),
    WithJsonSchema({"type": "string", "pattern": r"^[0-9.]+[smhd]$"}),
]

Optimizer = Literal[
    "adamw", "adam", "amsgrad", "sgd", "momentum", "nesterov", "adagrad", "rmsprop", "adadelta", "adamax", "nadam",
    "radam", "adafactor", "lion", "lion8bit", "adam8bit", "adamw8bit", "lamb", "lars",
]  # fmt: skip
Schedule = Literal[
    "constant", "cosine_annealing", "cosine_annealing_warm_restarts", "polynomial", "linear_warmup",
    "reduce_on_plateau", "step", "multi_step", "exponential", "one_cycle", "cyclic", "lambda", "sequential",
]  # fmt: skip
Precision = Literal["none", "fp16", "bf16", "tf32", "fp8_e4m3", "fp8_e5m2", "fp8_hybrid"]
CheckpointMetric = Literal[
    "loss", "accuracy", "perplexity", "f1_score", "bleu", "rouge", "reward_score", "win_rate", "custom"
]
Distributed = Literal[
    "none", "ddp", "fsdp", "zero1", "zero2", "zero3", "pipeline_parallel", "tensor_parallel", "hybrid"
]


class Identity(Options):
    """What the stage is called, and whether it runs."""

    name: str
    """The stage's name: its folder, its path in messages, and how later stages refer to it. Unique in a pipeline."""

    description: str | None = None
    """What the stage is for; written to its result and its model card."""

    tags: tuple[str, ...] = ()
    """Labels for the stage; written to its result and its model card."""

    metadata: Mapping[str, Any] = {}
    """Your own values; written to the stage's result. Only the function of a `custom` stage reads them."""

    enabled: bool = True
    """False skips the stage; the model of the stage before is passed on."""

    run_condition: Function | None = None
    """Called with the result of the stage before (None for the first); the stage is skipped where it returns False."""

    is_evaluation_only: bool = False
    """Measure on the data instead of training; the model is passed on unchanged."""


class DataOptions(Options):
    """What the stage reads, and in which order."""

    training_data: Sets = None
    """A path, a hub id, `stage:NAME/DATASET`, `Data(...)`, a live `Dataset`, or a mapping name -> one of these."""

    validation_data: OneSet = None
    """One set, named as in `training_data`; evaluated every `evaluation_steps`. TRL: `eval_dataset`."""

    data_mixing_ratios: Mapping[str, PositiveFloat] | None = None
    """Name -> share of the mix, where `training_data` is a mapping. Exact, seeded counts; nothing is repeated, so the
    scarcest set bounds the total. TRL has only fractions of each set."""

    data_preprocessor: Function | None = None
    """Called with the dataset and its split (`train` or `validation`); returns the dataset to use. After mixing."""

    shuffle_data: bool = True
    """A new order every epoch. TRL: `train_sampling_strategy`."""

    data_shuffle_seed: Seed | None = None
    """Seed of that order, of the mix and of `max_training_samples`. None = `random_seed`. TRL: `data_seed`."""

    max_training_samples: Positive | None = None
    """Use at most this many rows, drawn at random where `shuffle_data` is on. None = all."""


class Loop(Options):
    """How long, in which batches, from which seed."""

    epochs: Positive = 3
    """Passes over the data. TRL: `num_train_epochs`."""

    max_steps: Count = 0
    """Optimiser steps; overrides `epochs`, upwards too. 0 = no limit. TRL: `max_steps`, where 0 means one step."""

    max_duration: Duration | None = timedelta(hours=24)
    """Wall-clock limit, from the stage's start; it ends at a checkpoint then, with status `stopped`. Run again with a
    longer one it goes on from there, with that much time. None = none."""

    batch_size: Positive = 8
    """Rows per process and batch: with `distributed_strategy` N processes take N times as many. TRL:
    `per_device_train_batch_size` and `per_device_eval_batch_size`."""

    gradient_accumulation_steps: Positive = 1
    """Batches per optimiser step. TRL: `gradient_accumulation_steps`."""

    use_gradient_checkpointing: bool = False
    """Recompute activations to save memory. TRL: `activation_checkpointing`, on by default there."""

    random_seed: Seed = 42
    """Seed of weights, dropout and, where no other is set, of the data order. TRL: `seed`."""

    use_deterministic_algorithms: bool = False
    """Same bits in every run, at the cost of speed. TRL: `full_determinism`; undone after the stage."""

    max_gradient_norm: NonNegativeFloat = 1.0
    """Clip the gradient to this norm. 0 = off. TRL: `max_grad_norm`."""

    custom_loss_function: Function | None = None
    """A loss of your own in the place of the type's: `(outputs, labels, num_items) -> loss`. It gets the model's
    outputs (logits not shifted), the labels (-100: not learned), and the number of labels in all batches of the
    optimiser step (None in an evaluation). It returns the sum of the tokens' losses by `num_items`, or a mean over the
    batch."""


class OptimizerOptions(Options):
    """The optimiser and its learning rate."""

    optimizer_override: Optimizer = "adamw"
    """The optimiser. TRL: `optim`."""

    learning_rate: PositiveFloat | None = None
    """Peak learning rate. None = the method's default (2e-5 for SFT as in the specification, 1e-6 for DPO; ten times
    that with LoRA), shown by `stagekit plan`. TRL: `learning_rate`."""

    weight_decay: NonNegativeFloat = 0.01
    """Weight decay, not on biases and norms. TRL: `weight_decay`, 0 by default there."""

    adam_beta1: Fraction = 0.9
    """Decay of the first moment. TRL: `adam_beta1`."""

    adam_beta2: Fraction = 0.999
    """Decay of the second moment. TRL: `adam_beta2`."""

    adam_epsilon: PositiveFloat = 1e-8
    """Added to the denominator. TRL: `adam_epsilon`."""


class ScheduleOptions(Options):
    """How the learning rate goes over the steps."""

    scheduler_type: Schedule = "cosine_annealing"
    """The curve after warm-up. TRL: `lr_scheduler_type`, linear by default there."""

    warmup_steps: Count = 0
    """Steps of linear warm-up; set this or `warmup_ratio`, not both. TRL: `warmup_steps`."""

    warmup_ratio: Fraction = 0.1
    """Share of all steps that is warm-up, below 1. TRL: `warmup_steps` as a fraction, 0 by default there."""

    min_learning_rate: NonNegativeFloat = 0.0
    """Where the decay ends. TRL: in `lr_scheduler_kwargs`."""

    num_cycles: Positive = 1
    """Decays of `cosine_annealing_warm_restarts`. TRL: in `lr_scheduler_kwargs`."""

    scheduler_power: PositiveFloat = 1.0
    """Exponent of `polynomial`; 1 is linear. TRL: in `lr_scheduler_kwargs`."""


class PrecisionOptions(Options):
    """In which number format the forward and backward passes run."""

    use_mixed_precision: bool = False
    """Autocast to `mixed_precision_dtype` over float32 weights. TRL has bfloat16 on by default; here it is off."""

    mixed_precision_dtype: Precision = "fp16"
    """The format of `use_mixed_precision`. fp16 is the specification's default and needs a GPU; bf16 runs on CPU too.
    tf32 needs an Ampere GPU and keeps float32 outside of matrix products. fp8 is refused. TRL: `bf16`, `fp16`,
    `tf32`."""

    use_dynamic_loss_scaling: bool = True
    """Scale the loss so that fp16 gradients do not vanish; always on with fp16, which has no constant scale."""

    initial_loss_scale: PositiveFloat = 65536.0
    """The first scale of fp16; halved where a gradient overflows. accelerate: `GradScalerKwargs.init_scale`."""


class FreezingOptions(Options):
    """Which of the weights are trained. What a stage freezes stands in its `frozen.json`."""

    freeze_base_model: bool = False
    """Freeze everything but `trainable_layers`; with LoRA that is so anyway."""

    frozen_layers: tuple[str, ...] = ()
    """Patterns of weights to freeze: `layers.0-5` (both ends), `layers.*.mlp`, `embedding`, `norm`, `lm_head`, full
    names; see `stagekit/freezing.py`. With LoRA the adapters there."""

    trainable_layers: tuple[str, ...] = ()
    """Patterns of weights to train where the base model is frozen. With LoRA whole modules, beside the adapters. peft:
    `modules_to_save`."""

    unfreeze_top_n_layers: Count = 0
    """Train only the last N blocks, the last norm and an output head that is not tied to the embedding. 0 = off. With
    LoRA the adapters of these blocks."""

    use_gradual_unfreezing: bool = False
    """Unfreeze one more group of layers every `gradual_unfreezing_interval` epochs, from the top: the last block with
    norm and head, each block below it, the embeddings. Source: huggingface.co/papers/1801.06146."""

    gradual_unfreezing_interval: Positive = 1
    """Epochs between two groups."""


class CheckpointOptions(Options):
    """What is kept on disk, and which state counts as the best."""

    save_checkpoint_after: bool = True
    """False: the stage's model is deleted once no later stage needs it; a resume that does runs the stage again."""

    checkpoint_save_steps: Count = 500
    """Steps between checkpoints. 0 = only at the ends of epochs. TRL: `save_steps`."""

    checkpoint_save_epochs: Count = 1
    """Epochs between checkpoints, beside those of `checkpoint_save_steps`. 0 = off. TRL knows one kind at a time."""

    max_checkpoints_to_keep: Positive = 3
    """Older checkpoints are deleted. TRL: `save_total_limit`."""

    save_only_best: bool = False
    """Keep the checkpoint with the best metric, and pass that one on. Needs validation data."""

    best_checkpoint_metric: CheckpointMetric = "loss"
    """What "best" means; the five after `perplexity` are of the answers that the policy writes (see `text_metrics`).
    TRL: `metric_for_best_model`."""

    custom_metric_name: str = ""
    """The metric where `best_checkpoint_metric` is `custom`: a key that `custom_evaluation_function` returns."""

    best_checkpoint_metric_maximize: bool = False
    """True where higher is better. TRL: `greater_is_better`, which TRL guesses."""

    early_stopping: EarlyStopping | None = EarlyStopping()
    """When to stop for want of progress; active only with validation data. None = never."""


class EvaluationOptions(Options):
    """Measuring while training."""

    evaluation_steps: Count = 100
    """Steps between evaluations on `validation_data`. 0 = never. TRL: `eval_steps`."""

    metrics_to_track: tuple[str, ...] = ("loss", "perplexity")
    """Metrics kept from an evaluation: `loss`, `perplexity` (exp of the loss, where that is a likelihood), `accuracy`;
    of the answers that the policy writes (see `text_metrics`) `f1_score`, `bleu`, `rouge`, `reward_score`, `win_rate`;
    and the names that `custom_evaluation_function` returns."""

    custom_evaluation_function: Function | None = None
    """Called as `function(model, dataset)` at every evaluation; returns a mapping name -> number."""


class LoggingOptions(Options):
    """What is written while training."""

    logging_steps: Count = 10
    """Steps between log lines. 0 = none. TRL: `logging_steps`."""

    log_gradient_norms: bool = False
    """Write the gradient norm with every log line. TRL always does."""

    log_learning_rate: bool = True
    """Write the learning rate with every log line. TRL always does."""


class DistributedOptions(Options):
    """More than one device."""

    distributed_strategy: Distributed = "none"
    """How the work is split over processes, one per GPU: `ddp` gives each a copy of the model and its share of every
    batch. The others are not built yet. `stagekit run --num-processes N`; `python -m stagekit.distributed` prints
    their TRL arguments. TRL: its launcher decides."""

    sync_batch_norm: bool = False
    """Synchronise batch normalisation over devices."""


class CallbackOptions(Options):
    """Your own code at the stage's events."""

    callbacks: Callbacks | None = None
    """Functions to call when the stage starts, ends an epoch or batch, completes or fails."""


FAMILIES: tuple[type[Options], ...] = (
    Identity, DataOptions, Loop, OptimizerOptions, ScheduleOptions, PrecisionOptions, FreezingOptions,
    CheckpointOptions, EvaluationOptions, LoggingOptions, DistributedOptions, CallbackOptions,
)  # fmt: skip


class StageOptions(
    CallbackOptions, DistributedOptions, LoggingOptions, EvaluationOptions, CheckpointOptions, FreezingOptions,
    PrecisionOptions, ScheduleOptions, OptimizerOptions, Loop, DataOptions, Identity,
):  # fmt: skip
    """All families together."""

    foreign: ClassVar[Mapping[str, str]] = {
        "num_train_epochs": "epochs", "num_epochs": "epochs", "per_device_train_batch_size": "batch_size",
        "micro_batch_size": "batch_size", "train_batch_size": "batch_size", "lr": "learning_rate",
        "seed": "random_seed", "bf16": "use_mixed_precision with mixed_precision_dtype: bf16",
        "fp16": "use_mixed_precision with mixed_precision_dtype: fp16", "max_grad_norm": "max_gradient_norm",
        "gradient_checkpointing": "use_gradient_checkpointing", "eval_steps": "evaluation_steps",
        "save_steps": "checkpoint_save_steps", "save_total_limit": "max_checkpoints_to_keep",
        "lr_scheduler_type": "scheduler_type", "optim": "optimizer_override", "dataset": "training_data",
        "datasets": "training_data", "dataset_name": "training_data", "train_dataset": "training_data",
        "eval_dataset": "validation_data", "rl": "method", "stage": "method", "peft_config": "lora",
        "lora_r": "lora.rank", "use_peft": "lora", "load_in_4bit": "lora.bits: 4", "load_in_8bit": "lora.bits: 8",
        "beta": "method.beta", "loss_type": "method.loss", "max_length": "trl.max_length", "type": "method.type",
        "max_seq_length": "trl.max_length", "sequence_len": "trl.max_length", "cutoff_len": "trl.max_length",
        "model_name_or_path": "model", "output_dir": "output_dir of the pipeline", "packing": "trl.packing",
        "full_determinism": "use_deterministic_algorithms", "shuffle_dataset": "shuffle_data",
    }  # fmt: skip


def family_of(option: str) -> type[Options] | None:
    """The family that declares `option`; None for slots."""
    return next((family for family in FAMILIES if option in family.__annotations__), None)
