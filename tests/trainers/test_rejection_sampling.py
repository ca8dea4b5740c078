"""The trainer on the tiny model: it samples, chooses, trains as TRL does on the same rows, resumes; RAFT."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from stagekit.errors import ConfigError, StageError
from stagekit.generation import TransformersGenerator
from stagekit.trainers.rejection_sampling import RejectionSamplingConfig, RejectionSamplingTrainer, raft
from tests.answers import by_length
from tests.trainers.one_token import WORDS, answer_probabilities, fit


PROMPTS = [{"prompt": "Name a fruit."}, {"prompt": [{"role": "user", "content": "Is the earth round? Say why."}]}]
TRAINING: dict[str, Any] = {
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-3,
    "bf16": False,
    "use_cpu": True,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "logging_steps": 1,
}
SAMPLING: dict[str, Any] = {"n": 6, "max_new_tokens": 24, "batch_tokens": 200}


def config(tmp_path: Path, **changes: Any) -> RejectionSamplingConfig:
    return RejectionSamplingConfig(str(tmp_path / "out"), **{**TRAINING, **SAMPLING, **changes})


def same(first: Any, second: Any) -> bool:
    one, other = first.state_dict(), second.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_it_keeps_the_longest_answers_and_trains_as_trl_does_on_them(tmp_path: Path, tiny_model_path: str) -> None:
    ours = RejectionSamplingTrainer(tiny_model_path, config(tmp_path, top_k=2), PROMPTS, by_length)
    for group, row in zip(ours.groups, PROMPTS, strict=True):
        finished = sorted({one.text for one in group.candidates if one.finish_reason == "stop"}, key=len)
        rows = [one for one in ours.selected if one["prompt"] == list(group.messages)]
        assert [len(one["completion"][0]["content"]) for one in rows] == [len(text) for text in finished[:-3:-1]]
        assert row["prompt"] in (group.messages[0]["content"], list(group.messages))
    ours.train()
    rows = [{key: row[key] for key in ("prompt", "completion")} for row in ours.selected]
    theirs = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype="float32"),
        SFTConfig(str(tmp_path / "trl"), **TRAINING),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(tiny_model_path),
    )
    theirs.train()
    assert losses(ours) == losses(theirs) and len(losses(ours)) == 2
    assert same(ours.model, theirs.model)


def test_the_prompt_is_that_of_generation_and_the_eos_is_learnt(tmp_path: Path, tiny_model_path: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)
    trainer = RejectionSamplingTrainer(
        tiny_model_path, config(tmp_path), PROMPTS, by_length, processing_class=tokenizer
    )
    encoded = tokenizer.apply_chat_template(
        trainer.selected[0]["prompt"], add_generation_prompt=True, return_dict=True
    )
    row = trainer.train_dataset[0]
    width = len(encoded["input_ids"])
    assert row["input_ids"][:width] == encoded["input_ids"]
    assert set(row["labels"][:width]) == {-100}
    assert tokenizer.eos_token_id in row["labels"]


def test_pairs_and_scored_rows_are_at_hand(tmp_path: Path, tiny_model_path: str) -> None:
    trainer = RejectionSamplingTrainer(tiny_model_path, config(tmp_path), PROMPTS, by_length)
    assert [len(row["candidates"]) for row in trainer.scored] == [6, 6]
    for pair in trainer.preferences:
        assert pair["chosen_reward"] == len(pair["chosen"][0]["content"]) > pair["rejected_reward"]
    assert trainer.preferences
    found = trainer.sampling_metrics
    assert found["reward/best_of_2"] > found["reward/mean"]
    kept = sum(count for name, count in found.items() if name.startswith("answers."))
    assert kept + len(trainer.selected) == 12


def test_a_run_killed_while_sampling_goes_on_from_its_journal(
    tmp_path: Path, tiny_model_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate, calls = TransformersGenerator.generate, []

    def dying(self: TransformersGenerator, requests: Any, seed: int) -> Any:
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(seed)
        return generate(self, requests, seed)

    whole = RejectionSamplingTrainer(tiny_model_path, config(tmp_path / "whole"), PROMPTS, by_length)
    monkeypatch.setattr(TransformersGenerator, "generate", dying)
    with pytest.raises(KeyboardInterrupt):
        RejectionSamplingTrainer(tiny_model_path, config(tmp_path), PROMPTS, by_length)
    monkeypatch.setattr(TransformersGenerator, "generate", generate)
    journal = tmp_path / "out" / "journal.jsonl"
    written = journal.read_bytes()
    assert written.count(b'"type": "batch"') == 2
    again = RejectionSamplingTrainer(tiny_model_path, config(tmp_path), PROMPTS, by_length)
    assert journal.read_bytes().startswith(written)
    assert again.groups == whole.groups


def test_an_adapter_is_trained_on_the_chosen_answers(tmp_path: Path, tiny_model_path: str) -> None:
    lora = LoraConfig(r=2, target_modules=["q_proj"])
    trainer = RejectionSamplingTrainer(tiny_model_path, config(tmp_path), PROMPTS, by_length, peft_config=lora)
    trainer.train()
    assert any("lora_B" in name and bool(weight.any()) for name, weight in trainer.model.named_parameters())


def test_raft_samples_each_round_from_the_model_of_the_one_before(tmp_path: Path, tiny_model_path: str) -> None:
    policy = raft(tiny_model_path, config(tmp_path, learning_rate=1e-2), PROMPTS, by_length, rounds=2)
    assert policy == str(tmp_path / "out/round-2/policy")
    metas = [
        json.loads((tmp_path / f"out/round-{number}/journal.jsonl").read_text().splitlines()[0]) for number in (1, 2)
    ]
    assert metas[0]["info"]["model"] != metas[1]["info"]["model"]
    first, second = (AutoModelForCausalLM.from_pretrained(tmp_path / f"out/round-{n}/policy") for n in (1, 2))
    assert not same(first, second)
    before = (tmp_path / "out/round-1/journal.jsonl").stat().st_mtime_ns
    assert raft(tiny_model_path, config(tmp_path, learning_rate=1e-2), PROMPTS, by_length, rounds=2) == policy
    assert (tmp_path / "out/round-1/journal.jsonl").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({"n": 0}, "n: 0 gives no answer"),
        ({"n": 2, "top_k": 3}, "top_k: 3 answers cannot be kept of 2"),
        ({"temperature": 0.0}, "temperature: at 0.0 all 6 answers are the same"),
        ({"eos_token": "x"}, "eos_token would change the template"),
    ],
    ids=["n", "top_k", "temperature", "template"],
)
def test_an_argument_that_cannot_work_is_refused(
    changes: dict[str, Any], wrong: str, tmp_path: Path, tiny_model_path: str
) -> None:
    with pytest.raises(ConfigError, match=wrong):
        RejectionSamplingTrainer(tiny_model_path, config(tmp_path, **changes), PROMPTS, by_length)


def test_raft_takes_a_path_rounds_and_no_adapter(tmp_path: Path, tiny_model_path: str, tiny_model: Any) -> None:
    for model, rounds, more in (
        (tiny_model, 1, {}),
        (tiny_model_path, 0, {}),
        (tiny_model_path, 1, {"peft_config": 1}),
    ):
        with pytest.raises(ConfigError, match=r"raft|rounds"):
            raft(model, config(tmp_path), PROMPTS, by_length, rounds=rounds, **more)


def test_a_reward_that_keeps_nothing_stops_before_training(tmp_path: Path, tiny_model_path: str) -> None:
    with pytest.raises(StageError, match="no answer was kept"):
        RejectionSamplingTrainer(tiny_model_path, config(tmp_path, min_reward=1e6), PROMPTS, by_length)


# 2.2, test 3, end to end: a model that answers with one token


@pytest.mark.slow
def test_learning_the_best_of_n_moves_the_policy_to_its_closed_form(
    tmp_path: Path, tiny_model: Any, tiny_tokenizer: Any
) -> None:
    """Over one-token answers with ordered rewards the optimum on best-of-N is q(y) = F(y)^N - F(<y)^N."""
    fit(tiny_model, tiny_tokenizer, torch.tensor([0.4, 0.3, 0.2, 0.1]))
    p = answer_probabilities(tiny_model, tiny_tokenizer)
    assert p.sum() > 0.97

    def place(prompts: Any, completions: Any) -> list[float | None]:
        return [float(WORDS.index(text)) if text in WORDS else None for text in completions]

    n, draws = 3, 300
    changes = {"n": n, "max_new_tokens": 4, "batch_tokens": 16384, "min_reward": None, "max_steps": 40,
               "per_device_train_batch_size": 100, "learning_rate": 3e-3, "lr_scheduler_type": "cosine",
               "warmup_steps": 4}  # fmt: skip
    trainer = RejectionSamplingTrainer(
        tiny_model, config(tmp_path, **changes), [{"prompt": "Hi"}] * draws, place, tiny_tokenizer
    )
    trainer.train()
    found, below = answer_probabilities(trainer.model, tiny_tokenizer).tolist(), 0.0
    for share, reached in zip((p / p.sum()).tolist(), found, strict=True):
        q = (below + share) ** n - below**n
        below += share
        assert reached == pytest.approx(q, abs=3 * math.sqrt(q * (1 - q) / draws) + 0.02)
