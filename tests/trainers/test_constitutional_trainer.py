"""The trainer on the tiny model: it writes, trains, resumes, and trains as TRL's SFT trainer does on the same rows."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from stagekit.errors import ConfigError, StageError
from stagekit.generation import TransformersGenerator
from stagekit.requests import ScriptedGenerator
from stagekit.trainers.constitutional import sft_rows
from stagekit.trainers.constitutional_trainer import ConstitutionalConfig, ConstitutionalTrainer


PROMPTS = [{"prompt": "Name a fruit."}, {"prompt": [{"role": "user", "content": "Is the earth round? Say why."}]}]
PLAIN = [{"prompt": "Write a short greeting."}]
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
WRITING: dict[str, Any] = {"rounds": 1, "max_new_tokens": 64, "max_critique_tokens": 8, "batch_tokens": 400}


def config(tmp_path: Path, **changes: Any) -> ConstitutionalConfig:
    return ConstitutionalConfig(str(tmp_path / "out"), **{**TRAINING, **WRITING, **changes})


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_it_writes_revisions_and_trains_on_them(tmp_path: Path, tiny_model: Any, tiny_tokenizer: Any) -> None:
    before = weights(tiny_model)
    trainer = ConstitutionalTrainer(
        tiny_model, config(tmp_path), PROMPTS, unrevised_dataset=PLAIN, processing_class=tiny_tokenizer
    )
    assert same(weights(tiny_model), before)
    trainer.train()
    assert not same(weights(trainer.model), before)
    assert trainer.state.global_step == 2
    pairs = trainer.preferences
    assert pairs.column_names == ["prompt", "chosen", "rejected", "principle", "cai_key"]
    assert 1 <= len(pairs) <= 2
    texts = {trace.rounds[0].revision.text for trace in trainer.revisions.traces if trace.rounds}
    assert {row["chosen"][0]["content"] for row in pairs} <= texts
    rows = sft_rows(trainer.revisions)
    assert {row["source"] for row in rows} == {"train_dataset", "unrevised_dataset"}
    prompt_ids = TransformersGenerator.prompt_ids(_Prompting(tiny_tokenizer), rows[0]["prompt"])  # type: ignore[arg-type]
    trained = trainer.train_dataset[0]["input_ids"]
    assert trained[: len(prompt_ids)] == prompt_ids
    assert tiny_tokenizer.decode(trained[len(prompt_ids) :]).startswith(rows[0]["completion"][0]["content"])


class _Prompting:
    """Just what `prompt_ids` needs."""

    templated = True

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer


def test_its_training_is_that_of_trl_on_the_same_rows(tmp_path: Path, tiny_model_path: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)
    critic = ScriptedGenerator(lambda messages: "It is curt.", "critic")
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path)
    ours = ConstitutionalTrainer(model, config(tmp_path), PROMPTS, critique_model=critic, processing_class=tokenizer)
    ours.train()
    rows = [{key: row[key] for key in ("prompt", "completion")} for row in sft_rows(ours.revisions)]
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path)
    theirs = SFTTrainer(
        model,
        SFTConfig(str(tmp_path / "trl"), **TRAINING),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(tiny_model_path),
    )
    theirs.train()
    losses = [[entry["loss"] for entry in trainer.state.log_history if "loss" in entry] for trainer in (ours, theirs)]
    assert losses[0] == losses[1] and len(losses[0]) == 2
    assert same(weights(ours.model), weights(theirs.model))
    assert critic.calls


def test_a_run_killed_while_writing_goes_on_from_its_journal(
    tmp_path: Path, tiny_model: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate, calls = TransformersGenerator.generate, []

    def dying(self: TransformersGenerator, requests: Any, seed: int) -> Any:
        if len(calls) == 5:  # in the second prompt's critique or revision
            raise KeyboardInterrupt
        calls.append(seed)
        return generate(self, requests, seed)

    settings: dict[str, Any] = {"batch_tokens": 1}
    whole = ConstitutionalTrainer(
        tiny_model, config(tmp_path / "whole", **settings), PROMPTS, processing_class=tiny_tokenizer
    )
    model = AutoModelForCausalLM.from_pretrained(tiny_model.config._name_or_path)
    monkeypatch.setattr(TransformersGenerator, "generate", dying)
    with pytest.raises(KeyboardInterrupt):
        ConstitutionalTrainer(model, config(tmp_path, **settings), PROMPTS, processing_class=tiny_tokenizer)
    journal = tmp_path / "out" / "journal.jsonl"
    written = journal.read_bytes()
    assert written.count(b'"type": "batch"') == 1
    monkeypatch.setattr(TransformersGenerator, "generate", generate)
    again = ConstitutionalTrainer(model, config(tmp_path, **settings), PROMPTS, processing_class=tiny_tokenizer)
    assert journal.read_bytes().startswith(written)
    texts = [_texts(folder / "out" / "journal.jsonl") for folder in (tmp_path, tmp_path / "whole")]
    assert texts[0] == texts[1]
    assert again.revisions == whole.revisions


def _texts(path: Path) -> list[dict[str, Any]]:
    entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [entry["record"] for entry in entries if entry["type"] == "record"]


def test_a_model_given_by_path_is_written_with_and_trained(tmp_path: Path, tiny_model_path: str) -> None:
    by_path = ConstitutionalTrainer(tiny_model_path, config(tmp_path), PROMPTS, critique_model=tiny_model_path)
    by_path.train()
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(tiny_model_path),
        AutoTokenizer.from_pretrained(tiny_model_path),
    )
    live = ConstitutionalTrainer(
        model, config(tmp_path / "live"), PROMPTS, critique_model=model, processing_class=tokenizer
    )
    live.train()
    assert by_path.revisions == live.revisions
    assert same(weights(by_path.model), weights(live.model))


def test_nothing_left_to_train_on_is_an_error_and_the_journal_tells_why(
    tmp_path: Path, tiny_model: Any, tiny_tokenizer: Any
) -> None:
    args = config(tmp_path, max_new_tokens=1)
    with pytest.raises(StageError, match=r"left no row to fine-tune on \(truncated: 3\)"):
        ConstitutionalTrainer(tiny_model, args, PROMPTS, unrevised_dataset=PLAIN, processing_class=tiny_tokenizer)
    found = {(record["role"], record["finish_reason"]) for record in _texts(tmp_path / "out" / "journal.jsonl")}
    assert ("revision", "length") in found


def test_another_model_is_refused_by_the_journal(tmp_path: Path, tiny_model: Any, tiny_tokenizer: Any) -> None:
    ConstitutionalTrainer(tiny_model, config(tmp_path), PROMPTS, processing_class=tiny_tokenizer)
    changed = AutoModelForCausalLM.from_pretrained(tiny_model.config._name_or_path)
    with torch.no_grad():
        changed.model.norm.weight[0] += 1
    with pytest.raises(StageError, match="the model changed since"):
        ConstitutionalTrainer(changed, config(tmp_path), PROMPTS, processing_class=tiny_tokenizer)


def test_it_trains_an_adapter(tmp_path: Path, tiny_model: Any, tiny_tokenizer: Any) -> None:
    from peft import LoraConfig

    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    args = config(tmp_path, bf16=True)
    trainer = ConstitutionalTrainer(tiny_model, args, PROMPTS, processing_class=tiny_tokenizer, peft_config=lora)
    before = weights(trainer.model)
    trainer.train()
    changed = {name for name, tensor in weights(trainer.model).items() if not torch.equal(tensor, before[name])}
    assert changed and all("lora_" in name for name in changed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": "last"}, "target is 'last'"),
        ({"chat_template_path": "template.jinja"}, "chat_template_path would change the template"),
        ({"rounds": 0}, "rounds: 0 gives no revision"),
        ({"principles": [""]}, r"principles\[0\]: an empty principle"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    tmp_path: Path, tiny_model: Any, tiny_tokenizer: Any, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        ConstitutionalTrainer(tiny_model, config(tmp_path, **change), PROMPTS, processing_class=tiny_tokenizer)
