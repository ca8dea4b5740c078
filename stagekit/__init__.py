"""stagekit trains language models in declared stages on top of Hugging Face TRL.

    from stagekit import DPO, LoRA, TrainingPipeline, TrainingStage

Names are loaded when they are first used: `import stagekit` alone costs nothing.
"""

import importlib
from typing import Any


_HOME = {
    "TrainingPipeline": "pipeline",
    "TrainingStage": "stage",
    "PipelineResult": "result",
    "StageResult": "result",
    "ConfigError": "errors",
    "Interrupted": "errors",
    "Problem": "errors",
    "RunLocked": "errors",
    "StageError": "errors",
    "StagekitError": "errors",
    "Callbacks": "groups",
    "Data": "groups",
    "EarlyStopping": "groups",
    "Gate": "groups",
    "Generation": "groups",
    "LoRA": "groups",
    "Reference": "groups",
    "RewardSource": "groups",
    "TextMetrics": "groups",
    "SFT": "adapters",
    "DPO": "adapters",
    "KTO": "adapters",
    "ORPO": "adapters",
    "CPO": "adapters",
    "SimPO": "adapters",
    "Reward": "adapters",
    "ProcessReward": "adapters",
    "PPO": "adapters",
    "GRPO": "adapters",
    "RLOO": "adapters",
    "OnlineDPO": "adapters",
    "Constitutional": "adapters",
    "AIFeedback": "adapters",
    "RejectionSampling": "adapters",
    "SelfPlay": "adapters",
    "SelfRewarding": "adapters",
    "Distillation": "adapters",
    "SyntheticData": "adapters",
    "PrinciplePair": "adapters.constitutional",
    "Evaluation": "adapters",
    "Custom": "adapters",
    "CustomContext": "job",
    "load": "parse",
}

__all__ = [
    "CPO",
    "DPO",
    "GRPO",
    "KTO",
    "ORPO",
    "PPO",
    "RLOO",
    "SFT",
    "AIFeedback",
    "Callbacks",
    "ConfigError",
    "Constitutional",
    "Custom",
    "CustomContext",
    "Data",
    "Distillation",
    "EarlyStopping",
    "Evaluation",
    "Gate",
    "Generation",
    "Interrupted",
    "LoRA",
    "OnlineDPO",
    "PipelineResult",
    "PrinciplePair",
    "Problem",
    "ProcessReward",
    "Reference",
    "RejectionSampling",
    "Reward",
    "RewardSource",
    "RunLocked",
    "SelfPlay",
    "SelfRewarding",
    "SimPO",
    "StageError",
    "StageResult",
    "StagekitError",
    "SyntheticData",
    "TextMetrics",
    "TrainingPipeline",
    "TrainingStage",
    "load",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'stagekit' has no attribute {name!r}")
    return getattr(importlib.import_module(f"stagekit.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
