"""What is declared but has no effect yet: setting it is a ConfigError. The list only shrinks."""

from collections.abc import Mapping


PENDING: Mapping[str, str] = {
    "callbacks": "the stage's events",
    "custom_loss_function": "a loss of your own inside the trainers",
    "contrastive_margin": "the losses with a margin",
    "preference_label_smoothing": "the robust and conservative losses",
    "update_reference_model": "updating the reference while training",
    "reference_model_update_interval": "updating the reference while training",
    "freeze_base_model": "freezing by pattern",
    "frozen_layers": "freezing by pattern",
    "trainable_layers": "freezing by pattern",
    "unfreeze_top_n_layers": "freezing by pattern",
    "use_gradual_unfreezing": "gradual unfreezing",
    "gradual_unfreezing_interval": "gradual unfreezing",
    "use_dynamic_loss_scaling": "fp16 loss scaling",
    "initial_loss_scale": "fp16 loss scaling",
    "sync_batch_norm": "distributed training",
    "distributed_strategy": "distributed training",
    "reward_model": "the methods that learn from rewards",
    "kl_penalty_coefficient": "the methods that learn from rewards",
    "ppo_clip_range": "the methods that learn from rewards",
    "value_function_coefficient": "the PPO trainer",
    "entropy_coefficient": "the methods that learn from rewards",
    "gae_lambda": "the PPO trainer",
    "ppo_epochs_per_batch": "the methods that learn from rewards",
    "rollout_samples": "the methods that learn from rewards",
    "grpo_group_size": "the GRPO adapter",
    "grpo_use_relative_rewards": "the GRPO adapter",
    "self_play_iterations": "the self-play trainer",
    "self_play_temperature": "the self-play trainer",
    "self_play_responses_per_prompt": "the self-play trainer",
    "rejection_sampling_n": "the rejection sampling trainer",
    "rejection_sampling_top_k": "the rejection sampling trainer",
    "rejection_sampling_min_reward": "the rejection sampling trainer",
    "teacher_model": "the distillation trainer",
    "distillation_temperature": "the distillation trainer",
    "distillation_alpha": "the distillation trainer",
    "use_intermediate_distillation": "the distillation trainer",
    "distillation_layer_mapping": "the distillation trainer",
}
"""Flat name -> what is missing."""

PENDING_VALUES: Mapping[tuple[str, str], str] = {
    **{("scheduler_type", value): "a schedule of our own" for value in (
        "reduce_on_plateau", "step", "multi_step", "exponential", "one_cycle", "cyclic", "lambda", "sequential")},
    **{("optimizer_override", value): "an optimiser outside TRL's own list" for value in (
        "adam", "amsgrad", "adadelta", "adamax", "nadam", "radam", "lion", "adam8bit", "lamb", "lars")},
    **{("mixed_precision_dtype", value): "this precision" for value in ("tf32", "fp8_e4m3", "fp8_e5m2", "fp8_hybrid")},
    **{("best_checkpoint_metric", value): "this metric (custom with a function of your own works)" for value in (
        "f1_score", "bleu", "rouge", "reward_score", "win_rate")},
    **{("method.loss", value): "this loss" for value in (
        "robust", "conservative", "exo", "nca", "apo", "sppo", "aot", "discopop")},
    **{("reference.mode", value): "this reference" for value in ("base", "adapter", "none")},
}  # fmt: skip
"""(path, value) of single values that are not built yet -> what is missing."""
