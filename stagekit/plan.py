"""What a pipeline would do, stage by stage, without loading anything: arguments and sources, rows, steps, memory."""

import json
import math
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stagekit.arguments import settings_of
from stagekit.checks import as_data, data_of, gives_policy, trains
from stagekit.distributed import processes_of
from stagekit.ledger import ledger
from stagekit.optimizers import note_on_rate
from stagekit.rows import rows_of
from stagekit.sources import parse_data, parse_model


if TYPE_CHECKING:
    from stagekit.pipeline import TrainingPipeline
    from stagekit.stage import TrainingStage


GIB = 1 << 30


def plan(pipeline: "TrainingPipeline", processes: int = 1) -> list[dict[str, Any]]:
    """One entry per stage: trainer, arguments `{argument, value, source}`, data, steps, memory, notes, ledger.

    Args:
        pipeline: The pipeline.
        processes: Over how many the work of a stage that splits it is split.
    """
    made: dict[str, dict[str, Any]] = {}
    policy: str | None = pipeline.model if isinstance(pipeline.model, str) else None
    shapes = _shapes(policy)
    entries = []
    for stage in pipeline.stages:
        start = policy if stage.model is None else stage.model if isinstance(stage.model, str) else "<live model>"
        data = {path: _data(value, made) for path, value in data_of(stage)}
        rows, count = _rows_to_train(stage, data), processes_of(stage, processes)
        steps = _steps(stage, rows, count)
        entries.append(
            {
                "stage": stage.name,
                "type": stage.method.type,
                "enabled": stage.enabled,
                "trainer": stage.method.trainer_class,
                "model": start,
                "data": data,
                "rows": rows,
                "processes": count,
                "steps": steps,
                "memory": _memory(stage, shapes),
                "arguments": [
                    {"argument": one.target, "value": one.value, "source": one.source} for one in settings_of(stage)
                ],
                "notes": [*stage.method.notes(stage), *_of_several(stage, count), *_notes_on_rates(stage, steps)],
                "not_used": [
                    f"{entry.option}: {entry.reason}" for entry in ledger(stage) if entry.disposition != "applied"
                ],
            }
        )
        for name in stage.method.makes:
            made[f"stage:{stage.name}/{name}"] = {"rows": rows.get("made", {}).get(name), "columns": None}
        if gives_policy(stage):
            policy = f"stage:{stage.name}"
    return entries


def _data(value: Any, made: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Where the rows come from, how many there are and with which columns; None for what is not known before a run."""
    data = as_data(value)
    if not isinstance(data.source, str):
        live = data.source
        return {
            "source": f"<live {type(live).__name__}>",
            "rows": len(live),
            "columns": list(getattr(live, "column_names", [])),
        }
    if data.source.startswith("stage:"):
        return {"source": data.source, "rows": None, "columns": None, **made.get(data.source, {})}
    source = parse_data(data.source)
    path = source.path
    if path is None or not path.is_file() or path.suffix.lower() not in {".jsonl", ".json", ".csv"}:
        return {"source": data.source, "rows": None, "columns": None}
    rows, columns = 0, list[str]()
    for _, row in rows_of(path):
        rows += 1
        columns = columns or list(row)
    return {"source": data.source, "rows": rows, "columns": columns}


def _rows_to_train(stage: "TrainingStage", data: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Rows that the stage reads (`read`), and at most trains on (`trained`)."""
    prefix = f"{stage.path}.training_data"
    counts = {
        path.removeprefix(prefix).lstrip("."): entry["rows"] for path, entry in data.items() if path.startswith(prefix)
    }
    if not counts or any(count is None for count in counts.values()):
        of_no_data = {} if stage.method.needs_data else dict(stage.method.rows_made(0, {})[1])
        return {"read": None, "trained": None, **({"made": of_no_data} if of_no_data else {})}
    shares = {name: count for name, count in counts.items() if name}
    if shares and stage.data_mixing_ratios:
        from stagekit.mixing import mixing_counts

        mixed = mixing_counts(shares, stage.data_mixing_ratios, stage.max_training_samples)
        read = sum(mixed.values())
    else:
        mixed, read = {}, sum(counts.values())
        read = min(read, stage.max_training_samples or read)
    trained, made = stage.method.rows_made(read, mixed)
    return {"read": read, "trained": trained, **({"made": dict(made)} if made else {})}


def _of_several(stage: "TrainingStage", count: int) -> Iterator[str]:
    if count > 1 and not stage.method.trains:
        yield f"{count} processes share out the texts that are written"
    elif count > 1:
        rows = count * stage.batch_size * stage.gradient_accumulation_steps
        of = stage.method.batches_of
        yield f"{count} processes of batch_size {stage.batch_size}: an optimiser step takes {rows} {of}"


def _steps(stage: "TrainingStage", rows: Mapping[str, Any], processes: int) -> int | None:
    """Optimiser steps, at most: rows that are dropped make fewer."""
    if not trains(stage) or stage.method.trainer_class is None:
        return 0
    given = {setting.target: setting.value for setting in settings_of(stage)}
    if given["max_steps"] > 0:
        return int(given["max_steps"]) * stage.method.trainings()
    if rows["trained"] is None:
        return None
    return stage.method.steps(given, int(rows["trained"]), processes) * stage.method.trainings()


def _notes_on_rates(stage: "TrainingStage", steps: int | None) -> Iterator[str]:
    """Learning rates at which hardly anything is learned: far below what the optimiser needs, or never out of warm-up.
    An optimiser or a schedule that `trl` names is the user's own business."""
    if steps == 0:
        return
    given = {setting.target: setting.value for setting in settings_of(stage)}
    rate, warmup = float(given["learning_rate"]), float(given["warmup_steps"])
    low = note_on_rate(stage.optimizer_override, rate) if "optim" not in stage.trl else None
    if low is not None:
        yield f"learning_rate {low}"
    if steps is None or warmup == 0 or "lr_scheduler_type" in stage.trl:
        return
    climb = math.ceil(steps * warmup) if warmup < 1 else int(warmup)
    if steps == 1:
        yield "warm-up takes the only step, at a learning rate of 0: nothing is learned; set warmup_ratio: 0"
    elif climb >= steps:
        yield (
            f"warm-up takes all {steps} steps: the learning rate climbs from 0 to {rate * (steps - 1) / climb:g} and "
            f"never reaches {rate:g}; lower warmup_steps"
        )


def _shapes(model: str | None) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every weight, from the safetensors headers of a model that is on this machine."""
    if model is None or model.startswith("stage:"):
        return {}
    folder = parse_model(model).path
    if folder is not None and folder.suffix.lower() == ".gguf" and folder.is_file():
        from stagekit.convert import conversion_of

        folder = conversion_of(folder)
    if folder is None or not folder.is_dir():
        return {}
    return dict(item for file in sorted(folder.glob("*.safetensors")) for item in _header(file))


def _header(file: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    with file.open("rb") as stream:
        size = struct.unpack("<Q", stream.read(8))[0]
        header = json.loads(stream.read(size))
    for name, entry in header.items():
        if name != "__metadata__":
            yield name, tuple(entry["shape"])


def _memory(stage: "TrainingStage", shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any] | None:
    """Bytes for weights, gradients and optimiser state; activations come on top and depend on batch and length."""
    if not shapes or stage.method.trainer_class is None:
        return None
    total = sum(math.prod(shape) for shape in shapes.values())
    if not trains(stage):
        return {"weights": 4 * total, "trained_parameters": 0, "at_least": 4 * total}
    if stage.lora is None:
        trained, weights = total, 4 * total
    else:
        matched = [shape for name, shape in shapes.items() if _is_target(name, shape, stage.lora.target_modules)]
        trained = sum(stage.lora.rank * sum(shape) for shape in matched)
        weights = int(total * (stage.lora.bits / 8 if stage.lora.bits else 4))
    return {"weights": weights, "trained_parameters": trained, "at_least": weights + 12 * trained}


def _is_target(name: str, shape: tuple[int, ...], targets: tuple[str, ...] | str) -> bool:
    module = name.removesuffix(".weight").rpartition(".")[2]
    if targets == "all-linear":
        return len(shape) == 2 and module not in {"lm_head", "embed_tokens", "wte", "wpe"}
    names = (targets,) if isinstance(targets, str) else targets
    return len(shape) == 2 and module in names


def as_text(plans: list[dict[str, Any]]) -> str:
    """The plan as people read it."""
    lines: list[str] = []
    for number, entry in enumerate(plans, start=1):
        off = "" if entry["enabled"] else " (enabled: false)"
        lines += [f"{number}. {entry['stage']}: {entry['type']}{off}", f"   trainer  {entry['trainer'] or '-'}"]
        lines.append(f"   model    {entry['model'] or '-'}")
        for path, data in entry["data"].items():
            columns = ", ".join(data["columns"]) if data["columns"] else "columns known when it runs"
            rows = f"{data['rows']} rows" if data["rows"] is not None else "rows known when it runs"
            lines.append(f"   data     {path.split('.', 2)[2]}: {data['source']} ({rows}; {columns})")
        lines.append(f"   work     {_work(entry)}")
        width = max((len(one["argument"]) for one in entry["arguments"]), default=0)
        values = [f"{one['value']!r}" for one in entry["arguments"]]
        value_width = min(28, max((len(value) for value in values), default=0))
        for one, value in zip(entry["arguments"], values, strict=True):
            lines.append(f"     {one['argument']:<{width}} = {value:<{value_width}}  {one['source']}")
        lines += [f"   note     {note}" for note in entry["notes"]]
        lines.append("")
    lines.append("use_cpu and output_dir are set when a stage runs; not used options: `--json`.")
    return "\n".join(lines)


def _work(entry: Mapping[str, Any]) -> str:
    rows, steps, memory = entry["rows"], entry["steps"], entry["memory"]
    parts = []
    if rows["read"] is not None:
        parts.append(f"{rows['read']} rows read")
    if rows["trained"] is not None and rows["trained"] != rows["read"]:
        parts.append(f"at most {rows['trained']} rows to learn")
    parts.append("steps known when it runs" if steps is None else f"at most {steps} steps")
    if memory is not None:
        trained = memory["trained_parameters"]
        parts.append(f"{trained:,} parameters trained, {memory['at_least'] / GIB:.2f} GiB plus activations")
    return "; ".join(parts)
