"""Supervised fine-tuning on clean and on flawed demonstrations, whole and through an adapter."""

from benchmarks.world.method import Method, demonstrations


ROWS = (
    Method("sft-flawed", "sft", "sft", demonstrations(0.5)),
    Method("sft-clean", "sft", "sft", demonstrations(0.0), control="sft-flawed"),
    Method("sft-lora", "lora", "sft_lora", demonstrations(0.0), control="sft-flawed"),
)
