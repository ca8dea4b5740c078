"""Stages that write their own data, split over processes: the texts, rewards, judgements and weights of one."""

import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from stagekit import TrainingPipeline
from stagekit.journal import JOURNALS, Journal
from tests.conftest import QUESTIONS_AND_ANSWERS
from tests.launched import Launched, torchrun
from tests.running import account, losses, pipeline, run, stage, weights
from tests.test_isolation import Parent, finish
from tests.test_launches import ranks_of


pytestmark = pytest.mark.slow

CLOSE = 1e-5
"""What the order of a sum in float32 explains; see `test_distributed.py`."""

LETTERS = "tests.sampled:letters"
STAGES: dict[str, dict[str, Any]] = {
    "rejection": {
        "method": {"type": "rejection_sampling", "reward": LETTERS, "n": 3, "rounds": 2, "min_reward": None},
        "data_preprocessor": "tests.sampled:few_at_once",
    },
    "play": {
        "method": {"type": "self_play", "iterations": 2, "responses_per_prompt": 2, "temperature": 1.5},
        "generation": {"max_new_tokens": 12, "batch_tokens": 300},
        "validation_data": "rows", "evaluation_steps": 1,
    },
    "cai": {"method": {"type": "constitutional", "rounds": 2}},
    "feedback": {"method": {"type": "ai_feedback", "tie_margin": 0.0}},
    "rewarding": {
        "method": {"type": "self_rewarding", "judge_by": "comparison", "n": 4, "iterations": 2},
    },
    "synthetic": {
        "method": {"type": "synthetic_data", "instructions": 12, "min_words": 1, "similarity": 1.0,
                   "max_instruction_tokens": 24, "reward": LETTERS, "min_reward": None},
    },
    "taught": {"method": {"type": "distillation", "mode": "sequence"}},
}  # fmt: skip
TRAINS = [name for name in STAGES if name not in ("feedback", "synthetic")]
LONG = {"max_new_tokens": 12, "temperature": 1.5, "batch_tokens": 300}


def declared(model: str, folder: Path, batch: int, rows: str, **more: Any) -> TrainingPipeline:
    stages = []
    for name, options in STAGES.items():
        given: dict[str, Any] = {"model": model, "generation": LONG, **options, **more}
        if name == "taught":
            given["method"] = {**given["method"], "teacher": model}
        if name in TRAINS:
            given |= {"max_steps": 1, "warmup_ratio": 0.0, "adam_epsilon": 1e-5, "batch_size": batch}
        else:
            given |= dict.fromkeys(("batch_size", "max_steps", "use_deterministic_algorithms"), ...)
            given |= dict.fromkeys(("logging_steps", "checkpoint_save_steps", "learning_rate"), ...)
        if "validation_data" in given:
            given["validation_data"] = rows
        stages.append(stage(name, rows, **given))
    return pipeline(model, folder, *stages)


def written(folder: Path) -> str:
    """A file of conversations; only their prompts are read where a stage writes the answers."""
    path = folder / "rows.jsonl"
    rows = [
        {"prompt": [{"role": "user", "content": question}], "completion": [{"role": "assistant", "content": answer}]}
        for question, answer, _ in QUESTIONS_AND_ANSWERS
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory, tiny_model_path: str) -> Launched:
    folder = tmp_path_factory.mktemp("launched")
    rows = written(folder)
    learnt = stage("sft", rows, batch_size=16, max_steps=24, learning_rate=5e-3, checkpoint_save_steps=0)
    model = str(run(tiny_model_path, folder / "learnt", learnt).policy)  # it says something, and ends
    torchrun(folder, declared(model, folder / "together", 2, rows, distributed_strategy="ddp"))
    torchrun(folder, declared(model, folder / "alone", 4, rows), processes=1)
    return Launched(folder)


def journals(folder: Path) -> dict[str, list[Any]]:
    """The records of every journal in a folder, by their keys."""
    found = {}
    for name in JOURNALS:
        if (folder / name).is_file():
            found[name] = sorted(Journal.read(folder / name), key=lambda record: str(record["key"]))
    return found


def rows_of(folder: Path) -> dict[str, list[Any]]:
    """The rows that a stage wrote."""
    files: Sequence[Path] = [*folder.glob("data/*.jsonl"), *folder.glob("prompts.jsonl")]
    return {file.name: [json.loads(line) for line in file.read_text().splitlines()] for file in files}


@pytest.mark.parametrize("name", STAGES)
def test_two_processes_write_the_texts_of_one(name: str, launched: Launched) -> None:
    """Where a stage trains several times, those of its first iteration: its model is the same to the bit."""
    together, alone = launched.both(name)
    if (alone / "iteration-1").is_dir():
        together, alone = together / "iteration-1", alone / "iteration-1"
    assert journals(together) == journals(alone)
    assert rows_of(together) == rows_of(alone)
    for of in (together, alone):
        batches = [len(Journal.read(of / file).batch_times()) for file in journals(of)]
        assert max(batches) > 1, "there was something to share out"


@pytest.mark.parametrize("name", STAGES)
def test_two_processes_count_what_one_does(name: str, launched: Launched) -> None:
    together, alone = (account(folder) for folder in launched.both(name))
    assert (together["processes"], alone["processes"]) == (2, 1)
    if not (launched.both(name)[0] / "iteration-1").is_dir():
        assert together["samples_dropped"] == alone["samples_dropped"]
        assert together["metrics"].keys() == alone["metrics"].keys()
        for key, value in alone["metrics"].items():
            if key != "train_runtime":
                assert together["metrics"][key] == pytest.approx(value, abs=1e-4), key


@pytest.mark.parametrize("name", TRAINS)
def test_two_processes_learn_what_one_does(name: str, launched: Launched) -> None:
    """To the last bits of a sum; where a stage trains several times, in its first iteration. Each wrote rows enough
    for the step that it takes: where they do not fill a batch, accelerate repeats some."""
    together, alone = launched.both(name)
    if (alone / "iteration-1").is_dir():
        together, alone = together / "iteration-1", alone / "iteration-1"
    assert losses(together) == pytest.approx(losses(alone), abs=CLOSE)
    ours, theirs = (weights(folder / "policy") for folder in (together, alone))
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        torch.testing.assert_close(ours[key], tensor, atol=CLOSE, rtol=0)


def test_texts_are_written_once_whatever_ends_a_process_and_however_many_there_are(
    tiny_model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C; then one of the two is killed; then they finish; then three processes learn the same texts."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"Name {number} fruits."}) + "\n" for number in range(24)))
    only = {
        "name": "c", "method": {"type": "constitutional", "rounds": 1}, "training_data": str(prompts),
        "generation": {"backend": "tests.sampled:asked", "max_new_tokens": 8, "batch_tokens": 150}, "max_steps": 1,
    }  # fmt: skip

    def file_of(name: str, **more: Any) -> tuple[Path, Path]:
        folder, file = tmp_path / name, tmp_path / f"{name}.yaml"
        plain = {"name": "r", "model": tiny_model_path, "output_dir": str(folder), "stages": [{**only, **more}]}
        file.write_text(yaml.safe_dump(plain))
        return file, folder

    def asked(folder: Path) -> list[list[str]]:
        """What each process was asked."""
        return [path.read_text().splitlines() for path in sorted(folder.glob("asked.jsonl-?"))]

    file, folder = file_of("run", distributed_strategy="ddp")
    for count, end in ((8, "ctrl-c"), (30, "kill")):
        parent = Parent(file, folder)
        parent.until(lambda count=count: sum(map(len, asked(folder))) >= count)
        if end == "kill":
            os.kill(ranks_of(parent)[1], signal.SIGKILL)
        else:
            parent.process.send_signal(signal.SIGINT)
        code, out = parent.end()
        assert code == (1 if end == "kill" else 130), out
        assert sum(map(len, asked(folder))) < 72
    finish(file, folder)
    both = asked(folder)
    assert len(both) == 2
    assert min(map(len, both)) > 72 / 4, "both wrote their share"
    assert len({*both[0], *both[1]}) == 72
    alone, other = file_of("alone")
    finish(alone, other)
    assert journals(folder / "01-c") == journals(other / "01-c")
    assert rows_of(folder / "01-c") == rows_of(other / "01-c")

    before, file_before = asked(folder), (folder / "01-c/journal.jsonl").read_bytes()
    monkeypatch.setenv("PROCESSES", "3")
    finish(file, folder)
    assert account(folder / "01-c")["processes"] == 3
    assert asked(folder) == before
    assert (folder / "01-c/journal.jsonl").read_bytes() == file_before
