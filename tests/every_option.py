"""One case per flat name: two values, on the stage type that carries it, and what must differ between the two runs."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.running import weights


Observe = Callable[[Path], Any]


@dataclass(frozen=True)
class Case:
    """Flat arguments of the stage in both runs, beside `shared`, and what to look at in the stage's folder."""

    a: Mapping[str, Any]
    b: Mapping[str, Any]
    observe: Observe
    shared: Mapping[str, Any] = field(default_factory=dict)
    kind: str = "sft"


def curve(folder: Path) -> list[float]:
    """The loss of every logged step."""
    return [line["loss"] for line in logged(folder) if "loss" in line]


def logged(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def log_keys(folder: Path) -> set[str]:
    return {key for line in logged(folder) for key in line}


def logged_steps(folder: Path) -> list[int]:
    return [line["step"] for line in logged(folder) if "loss" in line]


def evaluated_steps(folder: Path) -> list[int]:
    return [line["step"] for line in logged(folder) if "eval_loss" in line]


def rates(folder: Path) -> list[float]:
    """The learning rate of every logged step."""
    return [line["learning_rate"] for line in logged(folder) if "learning_rate" in line]


def model_of(folder: Path) -> Path:
    """The model that the stage left: a policy, or a reward model."""
    return next((path for name in ("policy", "reward_model") if (path := folder / name).exists()), folder / "none")


def weight(folder: Path) -> str:
    """The bits of the saved model."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights(model_of(folder)).items()):
        digest.update(name.encode() + tensor.float().numpy().tobytes())
    return digest.hexdigest()


def result(*keys: str) -> Observe:
    """Entries of `result.json`."""

    def observe(folder: Path) -> Any:
        found = json.loads((folder / "result.json").read_text())
        return [found[key] for key in keys]

    return observe


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").glob("checkpoint-*"))


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def adapter(folder: Path) -> Any:
    """The saved adapter's settings and the shapes of its weights."""
    config = json.loads((model_of(folder) / "adapter_config.json").read_text())
    shapes = {name: tuple(tensor.shape) for name, tensor in weights(model_of(folder)).items()}
    return config["r"], config["lora_alpha"], sorted(config["target_modules"]), shapes


def folder_name(folder: Path) -> str:
    return folder.name


def texts(folder: Path) -> list[str]:
    """The audit of a generating stage: role, principle and request of every text."""
    lines = [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]
    records = [line["record"] for line in lines if line["type"] == "record"]
    return [f"{r['role']} {r['round']} {r['principle']} {r['model'][:40]}" for r in records]


def card(folder: Path) -> str:
    return (model_of(folder) / "README.md").read_text()


def kept(folder: Path) -> list[tuple[str, float]]:
    """The answers that a sampling stage learns, with their rewards."""
    rows = [json.loads(line) for line in (folder / "data" / "selected.jsonl").read_text().splitlines()]
    return [(row["completion"][0]["content"], row["reward"]) for row in rows]


def paired(folder: Path) -> list[tuple[int, str]]:
    """The opponent's answers that a self-play stage learns to reject, with their iteration."""
    rows = [json.loads(line) for line in (folder / "data" / "pairs.jsonl").read_text().splitlines()]
    return [(row["iteration"], row["rejected"][0]["content"]) for row in rows]
