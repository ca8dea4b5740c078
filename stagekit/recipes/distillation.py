"""Distillation: a teacher learns a small task, a student of half its layers learns from it, and both are compared.

Stage `teacher` fine-tunes a model on sums; stage `student` starts as every other block of it and learns its
distribution and hidden states beside the labels; stage `control` is the same student on the labels alone; stage
`compare` measures size, speed and what was retained on sums that none of them has seen, and prints it. Source:
huggingface.co/papers/1503.02531, huggingface.co/papers/1910.01108.

    python -m stagekit.recipes.distillation
"""

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stagekit.adapters.custom import Custom
from stagekit.adapters.distillation import Distillation, InitStudent
from stagekit.adapters.sft import SFT
from stagekit.groups import LoRA
from stagekit.job import CustomContext
from stagekit.pipeline import TrainingPipeline
from stagekit.recipes.launch import launch
from stagekit.recipes.shipped import SMOLLM2, SUMS, SUMS_HELD_OUT
from stagekit.stage import TrainingStage


def pipeline(
    model: Any = SMOLLM2,
    data: Any = SUMS,
    held_out: Any = SUMS_HELD_OUT,
    layers: int = 15,
    output_dir: str | Path = "runs/distillation",
) -> TrainingPipeline:
    """The distillation pipeline.

    Args:
        model: What the teacher starts from: a path, a hub id, a GGUF file, or a live model. It needs a chat template.
        data: Rows with prompt and completion, both conversations.
        held_out: Rows of the same kind that are not learnt.
        layers: Blocks of the student; half of the model's is 15 for SmolLM2-135M.
        output_dir: The run folder.
    """
    shared: dict[str, Any] = {
        "training_data": data,
        "max_training_samples": 176,
        "batch_size": 8,
        "use_mixed_precision": True,
        "mixed_precision_dtype": "bf16",
        "logging_steps": 4,
    }
    teacher = TrainingStage(
        name="teacher",
        description="learn the task",
        method=SFT(),
        lora=LoRA(rank=16, alpha=32, dropout=0.0, target_modules="all-linear", merge=True),
        epochs=1,
        **shared,
    )
    control = TrainingStage(
        name="control",
        description="the student's start, rows and steps without the teacher: sft",
        method=Distillation(teacher="stage:teacher", init_student=InitStudent(layers=layers), alpha=0.0),
        learning_rate=3e-4,
        epochs=1,
        **shared,
    )
    student = TrainingStage(
        name="student",
        description="half of the teacher's layers learn what it says",
        method=Distillation(
            teacher="stage:teacher", init_student=InitStudent(layers=layers), alpha=0.7, hidden_states=True
        ),
        learning_rate=3e-4,
        epochs=1,
        **shared,
    )
    compare = TrainingStage(
        name="compare",
        description="size, speed and what was retained",
        method=Custom(function="stagekit.recipes.distillation:compare"),
        validation_data=held_out,
    )
    return TrainingPipeline(
        name="distillation", model=model, output_dir=Path(output_dir), stages=(teacher, control, student, compare)
    )


def compare(context: CustomContext) -> dict[str, Any]:
    """Measure the stages `teacher`, `control` and `student`, and the student before it learnt, on the held-out rows.

    `..._exact` is the share of answers that are the data's, greedily; `..._nll` the mean over their tokens;
    `..._retention` how much of the way from the untaught student's nll to the teacher's was gone, and is left out
    where the teacher is no better than the untaught student. Seconds are of all cores together.
    """
    student = context.results["student"].policy
    folders = {
        "teacher": context.results["teacher"].policy,
        "student": student,
        "control": context.results["control"].policy,
        "start": str(Path(student).parent / "student") if student is not None else None,
    }
    missing = [name for name, folder in folders.items() if folder is None]
    if missing:
        raise ValueError(f"no model to compare was left by {', '.join(missing)}")
    rows = list(context.eval_dataset)
    measured = {name: _measure(str(folder), rows, context.seed) for name, folder in folders.items()}
    gap = measured["start"]["nll"] - measured["teacher"]["nll"]
    for name in ("student", "control"):
        if gap > 0:
            measured[name]["retention"] = (measured["start"]["nll"] - measured[name]["nll"]) / gap
    _show(measured, len(rows))
    found = {f"{name}_{key}": value for name, values in measured.items() for key, value in values.items()}
    found["size_ratio"] = found["student_parameters"] / found["teacher_parameters"]
    found["speed_ratio"] = found["teacher_seconds_per_token"] / found["student_seconds_per_token"]
    return {"metrics": found}


_TOLD = {
    "teacher": "teacher",
    "student": "student, distilled",
    "control": "student, labels alone",
    "start": "student, untaught",
}


def _show(measured: Mapping[str, Mapping[str, float]], rows: int) -> None:
    """Print size, speed and quality of every model."""
    from stagekit.show import Show

    lines = []
    for name, told in _TOLD.items():
        one = measured[name]
        retained = f"{one['retention']:.0%}" if "retention" in one else "-"
        lines.append(
            (
                told,
                f"{one['parameters'] / 1e6:.4g} M",
                f"{1 / one['seconds_per_token']:.0f}",
                f"{one['exact']:.0%}",
                f"{one['nll']:.3f}",
                retained,
            )
        )
    show = Show()
    show.line()
    show.table(
        f"on {rows} sums that no model has learnt; tokens per CPU second",
        ("model", "parameters", "tokens/s", "right", "nll", "retained"),
        lines,
    )


def _measure(folder: str, rows: Sequence[Mapping[str, Any]], seed: int) -> dict[str, float]:
    from stagekit.generation import TransformersGenerator
    from stagekit.models import load_policy, load_tokenizer
    from stagekit.requests import Request, Sampling

    model = load_policy(folder).eval()
    generator = TransformersGenerator(model, load_tokenizer(folder), Sampling(temperature=0.0), folder)
    requests = [Request(str(place), tuple(row["prompt"]), 24) for place, row in enumerate(rows)]
    started = time.process_time()
    answers = generator.generate(requests, seed)
    spent = time.process_time() - started
    wanted = [row["completion"][-1]["content"] for row in rows]
    exact = sum(answer.text.strip() == text for answer, text in zip(answers, wanted, strict=True))
    return {
        "parameters": float(sum(parameter.numel() for parameter in model.parameters())),
        "seconds_per_token": spent / max(sum(len(answer.token_ids) for answer in answers), 1),
        "exact": exact / len(rows),
        "nll": _nll(model, generator, rows),
    }


def _nll(model: Any, generator: Any, rows: Sequence[Mapping[str, Any]]) -> float:
    """The mean negative log-likelihood of the completions' tokens, one row at a time."""
    import torch

    total, tokens = 0.0, 0
    for row in rows:
        prompt = generator.prompt_ids(row["prompt"])
        answer = generator.tokenizer(row["completion"][-1]["content"], add_special_tokens=False)["input_ids"]
        ids = torch.tensor([[*prompt, *answer]], device=model.device)
        labels = ids.clone()
        labels[:, : len(prompt)] = -100
        with torch.no_grad():
            total += float(model(input_ids=ids, labels=labels).loss) * len(answer)
        tokens += len(answer)
    return total / tokens


if __name__ == "__main__":
    sys.exit(launch(pipeline, "distillation", "A student of half its teacher's layers, on sums; a small example."))
