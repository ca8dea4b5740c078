"""What is declared but has no effect yet: setting it is a ConfigError. The list only shrinks."""

from collections.abc import Mapping


PENDING: Mapping[str, str] = {
    "sync_batch_norm": "distributed training",
    "distributed_strategy": "distributed training",
    "kl_penalty_coefficient": "the methods that learn from rewards",
    "ppo_clip_range": "the methods that learn from rewards",
    "value_function_coefficient": "the PPO trainer",
    "entropy_coefficient": "the methods that learn from rewards",
    "gae_lambda": "the PPO trainer",
    "ppo_epochs_per_batch": "the methods that learn from rewards",
    "rollout_samples": "the methods that learn from rewards",
    "grpo_group_size": "the GRPO adapter",
    "grpo_use_relative_rewards": "the GRPO adapter",
    "teacher_model": "the distillation trainer",
    "distillation_temperature": "the distillation trainer",
    "distillation_alpha": "the distillation trainer",
    "use_intermediate_distillation": "the distillation trainer",
    "distillation_layer_mapping": "the distillation trainer",
}
"""Flat name -> what is missing."""

PENDING_VALUES: Mapping[tuple[str, str], str] = {
    **{("best_checkpoint_metric", value): "this metric (custom with a function of your own works)" for value in (
        "f1_score", "bleu", "rouge", "reward_score", "win_rate")},
}  # fmt: skip
"""(path, value) of single values that are not built yet -> what is missing."""
