"""What stagekit does on a GPU: small stages of every kind, kill and resume, and what a few things cost there.

    python -m benchmarks.gpu PART ... [--out FILE]

Seconds are wall seconds between synchronisations of the device; the sides of a comparison take turns. Memory is the
peak that torch allocated. Prints one JSON object per finding, and appends it to FILE.

    stages0, stages1, stages2   every stage type and option of precision, quantisation and reference, a third each
    resume      a killed and resumed stage beside a whole one: are the weights the same bits?
    reuse       texts of Constitutional AI with and without the cache between turns: the same? and how fast
    chunks      PPO's memory and time by `logit_chunk_size`
    distil      a distillation step beside an SFT step and a forward of the teacher
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from stagekit.parse import parse


DATA = Path(__file__).parent.parent / "stagekit" / "recipes" / "data"
LISTS, PAIRS, PROMPTS = (str(DATA / f"lists_{name}.jsonl") for name in ("sft", "pairs", "prompts"))
BRIEF = "stagekit.recipes.rejection_sampling:brief"
BF16 = {"use_mixed_precision": True, "mixed_precision_dtype": "bf16"}
FP16 = {"use_mixed_precision": True, "mixed_precision_dtype": "fp16"}
TF32 = {"use_mixed_precision": True, "mixed_precision_dtype": "tf32"}
LORA = {"rank": 8, "alpha": 16, "dropout": 0.0}


def sft(**options: Any) -> dict[str, Any]:
    """A stage on the lists."""
    return {"method": "sft", "training_data": LISTS, **options}


def dpo(mode: str, **options: Any) -> dict[str, Any]:
    """A stage on the pairs with a mode of reference."""
    return {"method": "dpo", "training_data": PAIRS, "reference": {"mode": mode}, **options}


def sampled(kind: str, **method: Any) -> dict[str, Any]:
    """A stage that learns from a reward."""
    options = {name: method.pop(name) for name in ("lora", "reference", *BF16) if name in method}
    given = {"type": kind, "reward": BRIEF, "rollout_samples": 32, **method}
    return {"method": given, "training_data": PROMPTS, "generation": {"max_new_tokens": 24}, **options}


def distilled(**method: Any) -> dict[str, Any]:
    """A stage with a teacher of twice its layers."""
    options = {name: method.pop(name) for name in ("lora", *BF16) if name in method}
    given = {"type": "distillation", "teacher": "MODEL", "init_student": {"layers": 6}, **method}
    return {"method": given, "training_data": LISTS, **options}


CASES: dict[str, dict[str, Any]] = {
    "sft float32": sft(),
    "sft bf16": sft(**BF16),
    "sft fp16, dynamic scale": sft(**FP16),
    "sft fp16, scale from 1024": sft(**FP16, initial_loss_scale=1024.0),
    "sft tf32": sft(**TF32),
    "sft bf16, checkpointing": sft(**BF16, use_gradient_checkpointing=True),
    "sft LoRA bf16": sft(**BF16, lora=LORA),
    "sft DoRA": sft(lora={**LORA, "dora": True}),
    "sft QLoRA 4 bit": sft(**BF16, lora={**LORA, "bits": 4}),
    "sft QLoRA 8 bit": sft(**BF16, lora={**LORA, "bits": 8}),
    "dpo auto": dpo("auto"),
    "dpo copy bf16": dpo("copy", **BF16),
    "dpo precompute bf16": dpo("precompute", **BF16),
    "dpo base, LoRA": dpo("base", lora=LORA),
    "dpo auto, QLoRA 4 bit": dpo("auto", lora={**LORA, "bits": 4}, **BF16),
    "kto": {"method": "kto", "training_data": PAIRS, **BF16},
    "simpo": {"method": "simpo", "training_data": PAIRS, **BF16},
    "orpo": {"method": "orpo", "training_data": PAIRS, **BF16},
    "cpo": {"method": "cpo", "training_data": PAIRS, **BF16},
    "reward bf16": {"method": "reward", "training_data": PAIRS, **BF16},
    "ppo separate": sampled("ppo", critic="separate"),
    "ppo head, LoRA": sampled("ppo", critic="head", lora=LORA),
    "ppo bf16": sampled("ppo", **BF16),
    "grpo": sampled("grpo"),
    "grpo bf16, LoRA": sampled("grpo", lora=LORA, **BF16),
    "rloo": sampled("rloo"),
    "online_dpo": sampled("online_dpo"),
    "online_dpo bf16, LoRA": sampled("online_dpo", lora=LORA, **BF16),
    "distillation": distilled(),
    "distillation, hidden states, bf16": distilled(hidden_states=True, **BF16),
    "distillation, cache": distilled(teacher_cache={}),
    "distillation, teacher 4 bit": distilled(teacher_bits=4),
    "distillation on policy": {**distilled(mode="on_policy"), "generation": {"max_new_tokens": 24},
                               "training_data": PROMPTS},
    "rejection_sampling": {"method": {"type": "rejection_sampling", "reward": BRIEF, "n": 4},
                           "training_data": PROMPTS, "max_training_samples": 16,
                           "generation": {"max_new_tokens": 24}},
    "constitutional": {"method": {"type": "constitutional", "rounds": 2, "max_critique_tokens": 16},
                       "training_data": str(DATA / "red_team.jsonl"), "max_training_samples": 16,
                       "generation": {"max_new_tokens": 24}},
    "ai_feedback": {"method": {"type": "ai_feedback", "judge": "MODEL", "tie_margin": 0.0},
                    "training_data": PROMPTS, "max_training_samples": 16, "generation": {"max_new_tokens": 24}},
    "self_play": {"method": {"type": "self_play", "iterations": 2}, "training_data": LISTS,
                  "max_training_samples": 16, "generation": {"max_new_tokens": 16}},
    "evaluation": {"method": "evaluation", "validation_data": LISTS},
}  # fmt: skip
"""Stages by what they show. MODEL stands for the model's folder."""

NO_TRAINING = {"ai_feedback", "evaluation"}


def model(folder: Path, width: int = 1024, blocks: int = 12) -> str:
    """A random Llama with the tiny model's tokenizer, 163 million parameters by default, saved into a folder."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(DATA / "tiny")
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=3 * width, num_hidden_layers=blocks,
        num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=4096, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def words(texts: int, width: int, blocks: int) -> Any:
    """A random Llama over a vocabulary of many words, on the device."""
    from benchmarks.toys import llama

    return llama(texts, width, blocks, 0).to(device())


def device() -> torch.device:
    """Where things are measured."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def wait() -> None:
    """Until the device has done what it was asked."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@contextmanager
def peak() -> Iterator[dict[str, float]]:
    """Seconds, and the most MiB that torch had allocated, in what is done meanwhile."""
    found: dict[str, float] = {}
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    wait()
    start = time.perf_counter()
    yield found
    wait()
    found["seconds"] = round(time.perf_counter() - start, 3)
    if torch.cuda.is_available():
        found["peak_mib"] = round(torch.cuda.max_memory_allocated() / 2**20, 1)


def put(given: Any, path: str) -> Any:
    """The same with a path for MODEL."""
    if isinstance(given, Mapping):
        return {key: put(value, path) for key, value in given.items()}
    return path if given == "MODEL" else given


def run(path: str, folder: Path, name: str, given: Mapping[str, Any], **more: Any) -> Any:
    """One stage in this process: 4 steps of 8 rows, a log line each; the run's result."""
    training = {"max_steps": 4, "batch_size": 8, "logging_steps": 1, "checkpoint_save_steps": 2, "learning_rate": 1e-5}
    stage = {"name": "s", **({} if name in NO_TRAINING else training), **put(given, path), **more}
    if name == "self_play":
        del stage["max_steps"]
        stage["epochs"] = 1
    return parse({"name": "gpu", "model": path, "output_dir": str(folder), "stages": [stage]}).run(quiet=True)


def losses(folder: Path) -> list[float]:
    """Of the log lines of a run's only stage."""
    found = [json.loads(line) for file in folder.glob("01-s/metrics.jsonl") for line in file.read_text().splitlines()]
    return [round(line["loss"], 5) for line in found if "loss" in line]


def stages(part: int, path: str, folder: Path) -> Iterator[dict[str, Any]]:
    """Every third case: whether it completes, its losses, its memory."""
    for place, (name, given) in enumerate(CASES.items()):
        if place % 3 != part:
            continue
        own = folder / f"case{place}"
        try:
            with peak() as found:
                result = run(path, own, name, given)
            yield {"case": name, "status": result["s"].status, "losses": losses(own), **found}
        except Exception:  # every case is tried; what it failed of is the finding
            yield {"case": name, "status": "failed", "error": traceback.format_exc()[-2500:]}
        shutil.rmtree(own, ignore_errors=True)  # checkpoints of all cases would fill the disk


class Killed(Exception):
    """Thrown into a training."""


def resume(path: str, folder: Path) -> Iterator[dict[str, Any]]:
    """A run that dies in its third step and goes on from its second, beside a whole one, with and without
    deterministic algorithms; and two whole runs beside each other."""
    from safetensors.torch import load_file

    from stagekit.callbacks import Bar
    from stagekit.errors import StageError

    original = Bar.on_step_end

    def dies(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            raise Killed
        original(self, args, state, control, **kwargs)

    def weights(result: Any) -> dict[str, torch.Tensor]:
        return {k: v for file in Path(result.policy).glob("*.safetensors") for k, v in load_file(file).items()}

    def apart(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> float:
        assert one.keys() == other.keys()
        return max(float((one[key].float() - other[key].float()).abs().max()) for key in one)

    cases = {"sft": sft(**BF16), "sft float32": sft(), "grpo": sampled("grpo", **BF16), "ppo": sampled("ppo")}
    for name, given in cases.items():
        for exact in (True, False):
            own = folder / f"resume-{name}-{exact}".replace(" ", "-")
            more = {"use_deterministic_algorithms": exact, "learning_rate": 1e-4}
            try:
                whole = weights(run(path, own / "whole", name, given, **more))
                again = weights(run(path, own / "again", name, given, **more))
                Bar.on_step_end = dies  # type: ignore[method-assign]
                try:
                    run(path, own / "killed", name, given, **more)
                except StageError as error:
                    assert "Killed" in str(error)
                finally:
                    Bar.on_step_end = original  # type: ignore[method-assign]
                killed = weights(run(path, own / "killed", name, given, **more))
                yield {"resume": name, "deterministic": exact, "whole and whole apart": apart(whole, again),
                       "whole and resumed apart": apart(whole, killed)}  # fmt: skip
            except Exception:
                yield {"resume": name, "deterministic": exact, "error": traceback.format_exc()[-2500:]}
            shutil.rmtree(own, ignore_errors=True)


def reuse(path: str, folder: Path) -> Iterator[dict[str, Any]]:
    """Two rounds over 64 prompts, greedy, by dtype: texts with the cache of earlier turns beside texts without."""
    from stagekit.generation import TransformersGenerator
    from stagekit.journal import Journal
    from stagekit.requests import Sampling
    from stagekit.rows import read_jsonl
    from stagekit.trainers.constitutional import plan_digest, prompts_from, revise

    tokenizer = AutoTokenizer.from_pretrained(path)
    rows = read_jsonl(DATA / "red_team.jsonl")[:64]
    for dtype in (torch.float32, torch.bfloat16):
        network = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device()).eval()
        texts: dict[str, list[str]] = {}
        spent: dict[str, list[float]] = {"kept": [], "anew": []}
        tokens = {"kept": 0, "anew": 0}
        for number in range(4):  # the first warms up
            for side in ("kept", "anew") if number % 2 else ("anew", "kept"):
                generator = TransformersGenerator(network, tokenizer, Sampling(temperature=0.0), "gpu")
                if side == "anew":
                    generator.remembering = nullcontext  # type: ignore[method-assign,assignment]
                prompts = prompts_from(rows)
                plan: dict[str, Any] = {"policy": generator, "rounds": 2, "seed": 0, "max_new_tokens": 96,
                                        "max_critique_tokens": 64, "batch_tokens": 65536}  # fmt: skip
                file = folder / f"{dtype}-{side}-{number}.jsonl"
                with Journal.open(file, plan_digest(prompts, **plan)) as journal, peak() as found:
                    revise(prompts, **plan, journal=journal)
                    records = list(journal)
                texts[side] = [one["text"] for one in sorted(records, key=lambda one: str(one["key"]))]
                tokens[side] = sum(one["n_new"] for one in records)
                if number:
                    spent[side].append(found["seconds"])
        equal = sum(one == other for one, other in zip(texts["kept"], texts["anew"], strict=True))
        yield {"reuse": str(dtype), "texts": len(texts["kept"]), "the same": equal, "seconds": spent,
               "tokens": tokens,
               "tokens a second": {side: round(tokens[side] / statistics.median(spent[side])) for side in spent},
               }  # fmt: skip


def chunks(path: str, folder: Path) -> Iterator[dict[str, Any]]:
    """One rollout over 32,768 words, 64 tokens each, one pass over it."""
    from datasets import Dataset

    from benchmarks.ppo_sides import Task, counted, prompts
    from benchmarks.toys import llama, tokenizer
    from stagekit.trainers.ppo import PPOConfig, PPOTrainer

    policy = str(folder / "policy")
    llama(32_768, 512, 4, 0).save_pretrained(policy)
    for samples in (64, 256):
        for chunk in (None, 128, 1024, 4096, 16384):
            spent: list[float] = []
            for _ in range(3):
                task = Task(seed=1, words=32_768, samples=samples, length=64, updates=1, epochs=1)
                args = PPOConfig(
                    str(folder / "ppo"), per_device_train_batch_size=64, gradient_accumulation_steps=samples // 64,
                    generation_batch_size=samples, max_completion_length=64, num_iterations=1, max_steps=1,
                    learning_rate=1e-4, bf16=False, save_strategy="no", report_to="none", disable_tqdm=True,
                    gradient_checkpointing=False, beta=0.01, critic="separate", logit_chunk_size=chunk, seed=1,
                )  # fmt: skip
                data = Dataset.from_dict({"prompt": prompts(task)})
                trainer = PPOTrainer(policy, counted, args, data, processing_class=tokenizer(32_768))
                wait()
                base = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
                with peak() as found:
                    trainer.train()
                spent.append(found["seconds"])
                grown = found.get("peak_mib", 0.0) - base / 2**20
                del trainer
            yield {"chunks": chunk, "samples": samples, "seconds": spent[1:], "growth_mib": round(grown)}


def distil(path: str, folder: Path) -> Iterator[dict[str, Any]]:
    """Steps of 16 rows of 512 tokens over 32,768 words: teacher 1024 x 12, student 512 x 6, float32, tf32 and bf16."""
    from benchmarks import distillation as bench

    bench.WORDS, bench.LENGTH, bench.BATCH = 32_768, 250, 16
    bench.SETTINGS.update(use_cpu=not torch.cuda.is_available(), per_device_train_batch_size=16)
    teacher = words(bench.WORDS, 1024, 12)
    for kind in ("float32", "bf16"):
        changes = {"bf16": kind == "bf16"}
        sides: dict[str, Callable[[], Any]] = {}
        for name, more in (("sft", None), ("distillation", {}), ("hidden", {"match_hidden_states": True})):
            student, data = words(bench.WORDS, 512, 6), bench.cost_data()
            own = str(folder / name)
            if more is None:
                trainer = bench.tuner(student, data, bench.WORDS, own, **changes)
            else:
                trainer = bench.distiller(student, teacher, data, bench.WORDS, own, **changes, **more)
            sides[name] = _step(trainer, bench.BATCH * (bench.LENGTH - 1))
        ids = torch.tensor(bench.cost_data()[: bench.BATCH]["input_ids"], device=device())
        frozen = teacher.to(torch.bfloat16 if kind == "bf16" else torch.float32)
        sides["teacher"] = torch.no_grad()(lambda net=frozen, ids=ids: net(input_ids=ids, use_cache=False))
        spent: dict[str, list[float]] = {name: [] for name in sides}
        memory: dict[str, float] = {}
        for number in range(14):
            for name in sides if number % 2 else reversed(sides):
                with peak() as found:
                    sides[name]()
                if number >= 4:
                    spent[name].append(found["seconds"])
                memory[name] = found.get("peak_mib", 0.0)
        middle = {name: statistics.median(values) for name, values in spent.items()}
        both = middle["sft"] + middle["teacher"]
        yield {"distil": kind, "median seconds": middle, "peak_mib": memory,
               "ratio": {name: round(middle[name] / both, 3) for name in ("distillation", "hidden")}}  # fmt: skip


def _step(trainer: Any, labels: int) -> Callable[[], Any]:
    """A forward and backward pass of a trainer over its first batch."""
    rows = [trainer.train_dataset[row] for row in range(trainer.args.per_device_train_batch_size)]
    batch = trainer._prepare_inputs(trainer.data_collator(rows))
    items = torch.tensor(labels, device=device())

    def work() -> None:
        trainer.model.train()
        trainer.model.zero_grad()
        trainer.training_step(trainer.model, dict(batch), items)

    return work


PARTS: dict[str, Callable[[str, Path], Iterator[dict[str, Any]]]] = {
    **{f"stages{part}": (lambda path, folder, part=part: stages(part, path, folder)) for part in range(3)},
    "resume": resume, "reuse": reuse, "chunks": chunks, "distil": distil,
}  # fmt: skip


def machine() -> dict[str, Any]:
    """What all was measured on."""
    found = {name: version(name) for name in ("torch", "trl", "transformers", "peft")}
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return {"card": card, "cuda": torch.version.cuda, "python": platform.python_version(), **found}


def main() -> None:
    """Do the parts, and print what was found as it is found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=PARTS)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--blocks", type=int, default=12)
    given = parser.parse_args()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        path = model(folder / "model", given.width, given.blocks)
        for part in given.parts:
            own = folder / part
            own.mkdir()
            for found in findings(part, path, own):
                print(json.dumps(found), flush=True)
                if given.out is not None:
                    with given.out.open("a") as file:
                        file.write(json.dumps(found) + "\n")


def findings(part: str, path: str, folder: Path) -> Iterator[dict[str, Any]]:
    """The machine, and what a part finds; what ends the part is a finding too, and then raised."""
    yield {"part": part, **machine()}
    try:
        yield from PARTS[part](path, folder)
    except Exception:
        yield {"part": part, "error": traceback.format_exc()[-2500:]}
        raise


if __name__ == "__main__":
    main()
