"""The fields of the installed TRL configs, read from their source: importing them takes ten seconds."""

import ast
import importlib.util
from functools import cache
from pathlib import Path


_FILES = {
    "TrainingArguments": ("transformers", "training_args.py"),
    "_BaseConfig": ("trl", "trainer/base_config.py"),
    "SFTConfig": ("trl", "trainer/sft_config.py"),
    "DPOConfig": ("trl", "trainer/dpo_config.py"),
    "KTOConfig": ("trl", "trainer/kto_config.py"),
    "RewardConfig": ("trl", "trainer/reward_config.py"),
    "GRPOConfig": ("trl", "trainer/grpo_config.py"),
    "RLOOConfig": ("trl", "trainer/rloo_config.py"),
    "PPOConfig": ("stagekit", "trainers/ppo_config.py"),
    "OnlineDPOConfig": ("stagekit", "trainers/online_dpo.py"),
    "ProcessRewardConfig": ("stagekit", "trainers/process_reward.py"),
}


_EXTENDS = {"PPOConfig": "GRPOConfig", "OnlineDPOConfig": "GRPOConfig"}
"""Configs of ours that extend one of TRL's."""


@cache
def fields_of(config_class: str) -> frozenset[str]:
    """Names of the fields of `trl:SFTConfig` and the like, inherited ones too.

    Raises:
        ModuleNotFoundError: trl or transformers is not installed.
    """
    name = config_class.partition(":")[2]
    classes = [name, *([_EXTENDS[name]] if name in _EXTENDS else []), "_BaseConfig", "TrainingArguments"]
    return frozenset().union(*(_own_fields(cls) for cls in classes))


def _own_fields(cls: str) -> frozenset[str]:
    package, file = _FILES[cls]
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"{package} is not installed")
    source = (Path(spec.submodule_search_locations[0]) / file).read_text()
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef) and node.name == cls:
            names = (item.target for item in node.body if isinstance(item, ast.AnnAssign))
            return frozenset(target.id for target in names if isinstance(target, ast.Name))
    raise ModuleNotFoundError(f"{package}/{file} has no class {cls}; this version of {package} is not supported")
