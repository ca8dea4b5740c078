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
    "DistillationConfig": ("trl", "trainer/distillation_config.py"),
    "GRPOConfig": ("trl", "trainer/grpo_config.py"),
    "RLOOConfig": ("trl", "trainer/rloo_config.py"),
    "PPOConfig": ("stagekit", "trainers/ppo_config.py"),
    "OnlineDPOConfig": ("stagekit", "trainers/online_dpo.py"),
    "ProcessRewardConfig": ("stagekit", "trainers/process_reward.py"),
    "stagekit.trainers.distillation:DistillationConfig": ("stagekit", "trainers/distillation.py"),
}
_EXTENDS = {
    "PPOConfig": "GRPOConfig",
    "OnlineDPOConfig": "GRPOConfig",
    "stagekit.trainers.distillation:DistillationConfig": "SFTConfig",
}
"""The config of TRL that one of ours extends, where it is not transformers' own."""


@cache
def fields_of(config_class: str) -> frozenset[str]:
    """Names of the fields of `trl:SFTConfig` and the like, inherited ones too.

    Raises:
        ModuleNotFoundError: trl or transformers is not installed.
    """
    name = config_class if config_class in _FILES else config_class.partition(":")[2]
    bases = (_EXTENDS[name],) if name in _EXTENDS else ()
    return frozenset().union(*(_own_fields(cls) for cls in (name, *bases, "_BaseConfig", "TrainingArguments")))


def _own_fields(cls: str) -> frozenset[str]:
    package, file = _FILES[cls]
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"{package} is not installed")
    source = (Path(spec.submodule_search_locations[0]) / file).read_text()
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef) and node.name == cls.rpartition(":")[2]:
            names = (item.target for item in node.body if isinstance(item, ast.AnnAssign))
            return frozenset(target.id for target in names if isinstance(target, ast.Name))
    raise ModuleNotFoundError(f"{package}/{file} has no class {cls}; this version of {package} is not supported")
