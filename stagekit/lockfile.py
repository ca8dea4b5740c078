"""`lock.json`: what a run was made of: models, data, package versions, seeds."""

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stagekit.checks import as_data, data_of, models_of
from stagekit.digest import _data_identity, _model_identity
from stagekit.distributed import processes_of
from stagekit.files import write_text


if TYPE_CHECKING:
    from stagekit.pipeline import TrainingPipeline


PACKAGES = (
    "trl-stagekit", "torch", "trl", "transformers", "peft", "accelerate", "datasets", "bitsandbytes", "deepspeed",
    "tokenizers", "numpy",
)  # fmt: skip


def versions() -> dict[str, str]:
    """The installed versions of the packages that decide what a run computes."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return {"python": platform.python_version(), **found}


def write_lock(pipeline: "TrainingPipeline", run: Path, processes: int = 1) -> None:
    """Write `lock.json`; `processes`: of each stage that splits its work."""
    models: dict[str, Any] = {"model": _named(pipeline.model)}
    data: dict[str, Any] = {}
    for stage in pipeline.stages:
        models.update({path: _named(value) for path, value in models_of(stage)})
        for path, value in data_of(stage):
            source = as_data(value).source
            if not (isinstance(source, str) and source.startswith("stage:")):
                data[path] = {"source": str(source)[:200], "fingerprint": _data_identity(value, {})}
    lock = {
        "packages": versions(),
        "models": models,
        "data": data,
        "seeds": {stage.name: stage.random_seed for stage in pipeline.stages},
        "processes": {stage.name: processes_of(stage, processes) for stage in pipeline.stages},
    }
    write_text(run / "lock.json", json.dumps(lock, indent=2) + "\n")


def _named(value: Any) -> dict[str, Any]:
    if not isinstance(value, str):
        return {"source": f"<live {type(value).__name__}>", "identity": None}
    return {"source": value, "identity": None if value.startswith("stage:") else _model_identity(value)}
