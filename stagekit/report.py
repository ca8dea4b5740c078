"""What a run folder says: its stages, their progress, where everything lies, how to load the result."""

import json
from pathlib import Path
from typing import Any

from stagekit import audit
from stagekit.adapters import METHODS
from stagekit.errors import ConfigError
from stagekit.journal import TEXTS
from stagekit.parse import read
from stagekit.result import PipelineResult, StageResult
from stagekit.runner import stage_folder
from stagekit.show import Show, clock


MIB = 1 << 20

_LOADED_BY = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
}


def status(folder: Path, samples: int = 0) -> dict[str, Any]:
    """The run in `folder`: its name, and per stage the result, or how far it is; with the texts of `samples` prompts
    of every stage that writes, and what each principle did.

    Raises:
        ConfigError: there is no run.
    """
    if not (folder / "pipeline.yaml").is_file():
        raise ConfigError(f"{folder}: no run here (no pipeline.yaml); give the folder that `stagekit run` wrote to")
    declared = read(folder / "pipeline.yaml")
    stages = []
    for index, stage in enumerate(declared["stages"]):
        path = stage_folder(folder, index, stage["name"])
        result = StageResult.read(path / "result.json", folder.resolve())
        entry: dict[str, Any] = {
            "name": stage["name"],
            "folder": path.name,
            "status": "to do",
            "progress": _progress(path),
        }
        if result is not None:
            entry.update(
                status=result.status,
                reason=result.reason,
                metrics=dict(result.metrics),
                artifacts=dict(result.artifacts),
                steps=result.steps,
                samples_trained=result.samples_trained,
                samples_dropped=dict(result.samples_dropped),
                duration_seconds=result.duration_seconds,
                peak_memory_bytes=result.peak_memory_bytes,
            )
        elif path.is_dir():
            entry["status"] = "begun"
        if samples > 0 and audit.places(path):
            entry.update(samples=audit.samples(path, samples), principles=audit.principles(path))
        stages.append(entry)
    return {"name": declared.get("name", "pipeline"), "folder": str(folder), "stages": stages}


def _progress(path: Path) -> dict[str, int]:
    """Texts in the journal, and the last step that was logged."""
    found = {}
    journals, metrics = [path / name for name in TEXTS if (path / name).is_file()], path / "metrics.jsonl"
    if journals:
        found["texts"] = sum(map(_records_in, journals))
    if metrics.is_file() and (lines := metrics.read_text(encoding="utf-8").splitlines()):
        found["step"] = int(json.loads(lines[-1]).get("step", 0))
    return found


def _records_in(journal: Path) -> int:
    with journal.open("rb") as lines:
        return sum(1 for line in lines if line.startswith(b'{"type": "record"'))


def show_status(folder: Path, samples: int = 0) -> None:
    """Print the status of a run, and the texts of `samples` prompts of every stage that writes."""
    said = status(folder, samples)
    rows = []
    for number, stage in enumerate(said["stages"], start=1):
        progress = ", ".join(f"{name} {count}" for name, count in stage["progress"].items())
        taken = clock(stage["duration_seconds"]) if "duration_seconds" in stage else ""
        memory = f"{stage['peak_memory_bytes'] / MIB:.0f} MiB" if stage.get("peak_memory_bytes") else ""
        reason = str(stage.get("reason") or "").partition("\n")[0]
        rows.append((str(number), stage["name"], stage["status"], progress, taken, memory, reason))
    head = ("", "stage", "status", "progress", "time", "memory", "why")
    show = Show()
    show.table(f"{said['name']} in {said['folder']}", head, rows)
    for stage in said["stages"]:
        _show_texts(show, stage)


def _show_texts(show: Show, stage: dict[str, Any]) -> None:
    """The texts of a stage's samples, and what its principles did."""
    for number, text in enumerate(stage.get("samples", ())):
        before = stage["samples"][number - 1]["prompt"] if number else None
        if text["prompt"] != before:
            show.line()
            show.sample(f"{stage['name']}: {text['prompt']}", {})
        told = [text["finish_reason"], f"{text['tokens']} tokens", text["principle"], text["topic"]]
        told += ["says the same as before"] if text["changed"] is False else []
        told += [f"dropped: {text['drop']}"] if text["drop"] else []
        told += [f"reward {text['reward']:.4g}"] if text["reward"] is not None else []
        told += [f"probability {text['probability']:.2f}"] if text["probability"] is not None else []
        asked = {"asked": text["request"]} if text["request"] else {}
        said = {", ".join(one for one in told if one): text["text"]}
        show.sample(f"  {text['role']} {text['round']}", {**asked, **said})
    table = stage.get("principles", {})
    if table:
        names = list(dict.fromkeys(name for one in table.values() for name in one))
        rows = [(name, *(_cell(one.get(column)) for column in names)) for name, one in table.items()]
        show.line()
        show.table(f"{stage['name']}: what each principle did", ("principle", *names), rows)


def _cell(value: float | None) -> str:
    """A count as it is, a share in per cent."""
    return "" if value is None else str(value) if isinstance(value, int) else f"{value:.0%}"


def show_end(result: PipelineResult) -> None:
    """Say where everything lies, and how to load the result without stagekit."""
    show = Show()
    show.line()
    rows = []
    for stage in result.stages:
        dropped = ", ".join(f"{count} {reason}" for reason, count in stage.samples_dropped.items())
        numbers = ", ".join(
            f"{name} {stage.metrics[name]:.4g}" for name in ("train_loss", "eval_loss") if name in stage.metrics
        )
        rows.append(
            (
                stage.name,
                stage.status,
                str(stage.samples_trained),
                dropped or "-",
                numbers or "-",
                clock(stage.duration_seconds),
            )
        )
    show.table("results", ("stage", "status", "rows", "dropped", "metrics", "time"), rows)
    show.line()
    show.line(f"everything is in {result.folder}:")
    show.line("  NN-stage/result.json (the account), plan.json (every argument), metrics.jsonl (the curves)")
    for stage in result.stages:
        for name, path in stage.artifacts.get("datasets", {}).items():
            show.line(f"  {path}: the dataset {name}")
        if stage.held_back:
            show.line(f"  {stage.artifacts['held_back']}: a model that its gate did not let pass")
        if stage.reward_model is not None:
            show.line(
                f"  {stage.artifacts['reward_model']}: the reward model ({_LOADED_BY[METHODS[stage.type].task]})"
            )
    policy = result.policy
    if policy is None:
        return
    show.line()
    show.line("load the result with plain transformers:", style="bold")
    adapter = (Path(policy) / "adapter_config.json").is_file()
    show.line("  from transformers import AutoModelForCausalLM, AutoTokenizer")
    show.line(
        f'  model = AutoModelForCausalLM.from_pretrained("{policy}")'
        + ("  # an adapter: needs peft" if adapter else "")
    )
    show.line(f'  tokenizer = AutoTokenizer.from_pretrained("{policy}")')
