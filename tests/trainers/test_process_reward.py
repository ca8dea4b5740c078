"""The process reward trainer: TRL 1.12's numbers, a rule that it learns, accumulation, adapters, saving, bad input."""

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForTokenClassification, AutoTokenizer

from stagekit.errors import ConfigError, StageError
from stagekit.models import bnb_config
from stagekit.reward_models import load_process_reward_model, merge_reward_adapter
from stagekit.rewards import ProcessReward
from stagekit.trainers.process_reward import (
    ProcessRewardConfig,
    ProcessRewardTrainer,
    RightPadding,
    score_steps,
    step_ids,
)
from tests.trainers import prm_oracle


SETTINGS: dict[str, Any] = {
    "use_cpu": True,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "logging_steps": 1,
    "lr_scheduler_type": "constant",
}


def config(tmp_path: Path, **changes: Any) -> ProcessRewardConfig:
    return ProcessRewardConfig(str(tmp_path / "out"), **{**SETTINGS, **changes})


def rule_rows(count: int, seed: int) -> Dataset:
    """A step is incorrect if it says `not`: random words around it, about a third incorrect."""
    draw = random.Random(seed)
    words = ("water", "rice", "train", "school", "money", "family", "story", "city", "garden", "river", "bread", "map")
    rows = []
    for _ in range(count):
        labels = [draw.random() > 0.35 for _ in range(draw.randint(1, 4))]
        steps = []
        for label in labels:
            step = draw.sample(words, 3)
            if not label:
                step.insert(draw.randint(0, 3), "not")
            steps.append(" ".join(step))
        rows.append({"prompt": f"Tell of {draw.choice(words)}.\n", "completions": steps, "labels": labels})
    return Dataset.from_list(rows)


def lora(**changes: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "TOKEN_CLS", **changes})


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def test_it_lays_out_and_trains_as_prm_trainer_of_trl_1_12(tmp_path: Path) -> None:
    """Literals from `TRL_EXPERIMENTAL_SILENCE=1 PYTHONPATH=/tmp/trl112:. python -m tests.trainers.prm_oracle`, where
    /tmp/trl112 is trl 1.12.0 unpacked; transformers 5.23, torch 2.13, CPU. Tolerances: float32 in another order."""
    settings = {key: value for key, value in prm_oracle.TRAINING.items() if key != "gradient_checkpointing"}
    rows = Dataset.from_list(prm_oracle.ROWS)
    trainer = ProcessRewardTrainer(
        prm_oracle.model(), config(tmp_path, **settings), rows, rows, processing_class=prm_oracle.tokenizer()
    )
    labels = [row["labels"] for row in trainer.train_dataset]
    assert [{place: label for place, label in enumerate(row) if label != -100} for row in labels] == [
        {14: 1, 21: 1},
        {12: 1, 19: 0, 22: 0},
        {8: 0},
        {28: 1, 50: 0},
    ]
    assert [len(row) for row in labels] == [22, 23, 9, 60]
    assert trainer.train_dataset[2]["input_ids"] == [0, 19, 13, 19, 33, 223, 21, 201, 201]
    assert (trainer.truncated, trainer.dropped) == ({"train": 1, "eval": 1}, {"train": 0, "eval": 0})
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert losses(trainer) == pytest.approx([0.6902686953544617, 0.7730787396430969, 0.7418162822723389], rel=1e-5)
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert norms == pytest.approx([0.6151357889175415, 1.9360920190811157, 2.0965490341186523], rel=1e-4)
    assert [before["eval_loss"], before["eval_accuracy"]] == pytest.approx([0.6902686953544617, 0.625], rel=1e-5)
    assert [after["eval_loss"], after["eval_accuracy"]] == pytest.approx([0.6746171116828918, 0.5], rel=1e-5)
    assert after["eval_majority_baseline"] == 0.5  # 4 of the 8 steps that are left are correct
    head = trainer.model.score.weight.sum(1).tolist()
    assert head == pytest.approx([-0.10032953321933746, -0.02181559056043625], rel=1e-4)


def test_it_learns_a_rule_saves_it_and_scores_as_before(tmp_path: Path, tiny_model_path: str) -> None:
    args = config(tmp_path, max_steps=80, learning_rate=2e-3, per_device_train_batch_size=16, logging_steps=20, seed=1)
    trainer = ProcessRewardTrainer(tiny_model_path, args, rule_rows(320, 0), rule_rows(80, 1))
    trainer.train()
    found = trainer.evaluate()
    assert 0.55 < found["eval_majority_baseline"] < 0.75
    assert found["eval_accuracy"] > found["eval_majority_baseline"] + 0.15
    folder = tmp_path / "prm"
    trainer.save_model(str(folder))
    plain = AutoModelForTokenClassification.from_pretrained(folder)
    assert (plain.config.num_labels, plain.config.step_separator) == (2, "\n")
    assert plain.config.id2label == {0: "incorrect", 1: "correct"}
    model, tokenizer = load_process_reward_model(str(folder))
    steps = ["water rice train", "bread not oven map", "city garden river"]
    trained = score_steps(trainer.model, trainer.processing_class, "Tell of bread.\n", steps)
    assert trained[0] > 0.5 > trained[1]
    for again in (model, plain.eval()):
        assert score_steps(again, tokenizer, "Tell of bread.\n", steps) == pytest.approx(trained, abs=1e-6)


def test_answers_are_scored_in_batches_as_one_by_one(tiny_model_path: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = AutoModelForTokenClassification.from_pretrained(tiny_model_path, num_labels=2)
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_model_path).save_pretrained(tmp_path)
    reward = ProcessReward(str(tmp_path), batch_tokens=64)
    talk = [{"role": "user", "content": "2+2?"}]
    answers = ["2+2=4\nso 4", "no", "\n \n", "4\n" * 2000, "a word\n" * 9 + "and the last one of them"]
    found = reward.scores([talk] * 5, answers)
    assert found[2:4] == [0.0, None]  # without a step, and longer than the context
    for place in (0, 1, 4):
        steps = [one for one in answers[place].split("\n") if one]
        assert found[place] == pytest.approx(min(score_steps(reward.model, reward.tokenizer, talk, steps)), abs=1e-5)
    with torch.no_grad():
        reward.model.score.weight.fill_(math.nan)
    with pytest.raises(StageError, match="scores the steps of answer"):
        reward.scores([talk], ["so 4"])


def test_a_steps_score_does_not_depend_on_later_steps(tiny_model_path: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForTokenClassification.from_pretrained(tiny_model_path, num_labels=2)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)
    model.train()
    long = score_steps(model, tokenizer, "2+2? ", ["2+2=4", "so 4", "done"])
    short = score_steps(model, tokenizer, "2+2? ", ["2+2=4", "so 4"])
    assert long[:2] == pytest.approx(short, abs=1e-6)
    assert model.training and all(0 < score < 1 for score in long)
    with pytest.raises(StageError, match=r"tokens, more than the model's context of 2048"):
        score_steps(model, tokenizer, "2+2? ", ["4"] * 2000)


def test_accumulated_batches_weigh_every_step_alike(tmp_path: Path, tiny_model_path: str) -> None:
    """One batch of 4 rows with 1, 1, 4 and 4 steps, or two of 2: the same gradient, so the same weights."""
    rows = Dataset.from_list(
        [{"prompt": "a ", "completions": ["b"] * count, "labels": [count > 1] * count} for count in (1, 1, 4, 4)]
    )
    trained = []
    for batch, accumulated in ((4, 1), (2, 2), (1, 4)):
        args = config(
            tmp_path,
            max_steps=2,
            learning_rate=1e-3,
            optim="sgd",
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulated,
            train_sampling_strategy="sequential",
        )
        trainer = ProcessRewardTrainer(tiny_model_path, args, rows)
        trainer.train()
        trained.append((losses(trainer), weights(trainer.model)))
    for found, tensors in trained[1:]:
        assert found == pytest.approx(trained[0][0], rel=1e-5)
        for name, tensor in tensors.items():
            torch.testing.assert_close(tensor, trained[0][1][name], rtol=0, atol=1e-6)


def test_the_evaluation_does_not_depend_on_the_batch_size(tmp_path: Path, tiny_model_path: str) -> None:
    rows = rule_rows(12, 3)
    found = []
    for size in (1, 5, 12):
        args = config(tmp_path, per_device_eval_batch_size=size)
        found.append(ProcessRewardTrainer(tiny_model_path, args, rows, {"one": rows, "two": rows}).evaluate())
    for key in ("eval_one_loss", "eval_one_accuracy", "eval_two_loss", "eval_two_majority_baseline"):
        assert [metrics[key] for metrics in found] == pytest.approx([found[0][key]] * 3, rel=1e-5)
    labels = [label for row in rows for label in row["labels"]]
    share = sum(labels) / len(labels)
    assert found[0]["eval_one_majority_baseline"] == pytest.approx(max(share, 1 - share))


def test_an_adapter_trains_its_head_and_merges_into_a_folder_that_scores_the_same(
    tmp_path: Path, tiny_model_path: str
) -> None:
    args = config(
        tmp_path,
        max_steps=3,
        learning_rate=1e-2,
        per_device_train_batch_size=8,
        step_separator="\n\n",
        activation_checkpointing=True,
    )
    trainer = ProcessRewardTrainer(tiny_model_path, args, rule_rows(24, 0), peft_config=lora())
    before = weights(trainer.model)
    trainer.train()
    changed = {name for name, tensor in weights(trainer.model).items() if not torch.equal(tensor, before[name])}
    assert any("score" in name for name in changed) and any("lora_B" in name for name in changed)
    assert all("lora_" in name or "modules_to_save" in name for name in changed)
    trainer.save_model(str(tmp_path / "adapter"))
    said = score_steps(trainer.model, trainer.processing_class, "Go: ", ["water not", "bread"])
    told = merge_reward_adapter(tmp_path / "adapter", tmp_path / "merged")
    assert (told["task"], told["base"]) == ("TOKEN_CLS", tiny_model_path)
    assert told["merge_difference"] < 1e-5 and told["saved_difference"] < 1e-6
    for folder in ("adapter", "merged"):
        model, tokenizer = load_process_reward_model(str(tmp_path / folder))
        assert model.config.step_separator == "\n\n"
        assert score_steps(model, tokenizer, "Go: ", ["water not", "bread"]) == pytest.approx(said, abs=1e-5)
        plain = AutoModelForTokenClassification.from_pretrained(tmp_path / folder)
        assert score_steps(plain, tokenizer, "Go: ", ["water not", "bread"], "\n\n") == pytest.approx(said, abs=1e-5)


def test_an_adapter_on_a_quantised_base_has_a_plain_head_and_merges_into_the_plain_base(
    tmp_path: Path, tiny_model_path: str
) -> None:
    pytest.importorskip("bitsandbytes")
    given = bnb_config(4, torch.float32)
    trainer = ProcessRewardTrainer(
        tiny_model_path,
        config(tmp_path, max_steps=2, learning_rate=1e-2),
        rule_rows(8, 0),
        quantization_config=given,
        peft_config=lora(),
    )
    kinds = {name: type(module).__name__ for name, module in trainer.model.named_modules()}
    assert kinds["base_model.model.score.modules_to_save.default"] == "Linear"
    assert kinds["base_model.model.model.layers.0.self_attn.q_proj.base_layer"] == "Linear4bit"
    assert given.llm_int8_skip_modules is None
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    merge_reward_adapter(tmp_path / "adapter", tmp_path / "merged")
    model, tokenizer = load_process_reward_model(str(tmp_path / "merged"))
    assert not any("4bit" in type(module).__name__ for module in model.modules())
    # Of a base in 4 bits and in 32; the untrained head alone gives about one half.
    said = score_steps(trainer.model, trainer.processing_class, "Go: ", ["water not", "bread"])
    assert score_steps(model, tokenizer, "Go: ", ["water not", "bread"]) == pytest.approx(said, abs=0.1)


def test_a_trained_model_can_be_trained_on(tmp_path: Path, tiny_model_path: str) -> None:
    args = config(tmp_path, max_steps=2, learning_rate=1e-2)
    first = ProcessRewardTrainer(tiny_model_path, args, rule_rows(8, 0), rule_rows(8, 1))
    first.train()
    first.save_model(str(tmp_path / "first"))
    second = ProcessRewardTrainer(str(tmp_path / "first"), args, rule_rows(8, 0), rule_rows(8, 1))
    assert second.evaluate()["eval_loss"] == pytest.approx(first.evaluate()["eval_loss"], rel=1e-6)


def test_only_the_last_step_is_learnt_where_asked_and_all_are_measured(tmp_path: Path, tiny_model_path: str) -> None:
    rows = Dataset.from_list([{"prompt": "a ", "completions": ["b", "c", "d"], "labels": [True, True, False]}])
    trainer = ProcessRewardTrainer(tiny_model_path, config(tmp_path, train_on_last_step_only=True), rows, rows)
    assert [label for label in trainer.train_dataset[0]["labels"] if label != -100] == [0]
    assert [label for label in trainer.eval_dataset[0]["labels"] if label != -100] == [1, 1, 0]
    assert trainer.evaluate()["eval_majority_baseline"] == pytest.approx(2 / 3)


def test_what_max_length_takes_is_counted(tmp_path: Path, tiny_model_path: str) -> None:
    rows = [{"prompt": "a " * size, "completions": ["b", "c"], "labels": [True, False]} for size in (1, 3, 40)]
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)
    ends = [step_ids(tokenizer, row["prompt"], row["completions"])[1] for row in rows]
    args = config(tmp_path, max_length=ends[1][1])  # one token too few for the second step of the second row
    trainer = ProcessRewardTrainer(tiny_model_path, args, Dataset.from_list(rows))
    assert (trainer.truncated, trainer.dropped) == ({"train": 2}, {"train": 1})
    assert trainer.train_dataset.column_names == ["input_ids", "labels"] and len(trainer.train_dataset) == 2
    with pytest.raises(StageError, match=r"no labelled step of 3 train rows fits in max_length \(2\)"):
        ProcessRewardTrainer(tiny_model_path, config(tmp_path, max_length=2), Dataset.from_list(rows))


def test_a_conversation_goes_through_the_template_and_has_one_bos(tiny_tokenizer: Any) -> None:
    ids, ends = step_ids(tiny_tokenizer, [{"role": "user", "content": "2+2?"}], ["4"])
    text = tiny_tokenizer.decode(ids)
    assert text == "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n4\n"
    assert ends == [len(ids) - 1]
    tokenizer = prm_oracle.tokenizer()
    tokenizer.chat_template = "<s>{% for message in messages %}{{ message.content }} {% endfor %}"
    for prompt in ("hi ", [{"role": "user", "content": "hi"}]):
        assert step_ids(tokenizer, prompt, ["4"])[0].count(tokenizer.bos_token_id) == 1


def test_rows_are_padded_on_the_right_without_labels() -> None:
    batch = RightPadding(9)([{"input_ids": [1, 2, 3], "labels": [-100, -100, 1]}, {"input_ids": [4], "labels": [0]}])
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 1], [0, -100, -100]]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "completions": ["b", "c"], "labels": [True]}, "row 0 has 2 completions and 1 labels"),
        ({"prompt": "a", "completions": [], "labels": []}, "row 0 has 0 completions"),
        ({"prompt": "a", "completions": ["b"], "labels": [2]}, "row 0 has the label 2"),
        ({"prompt": "a", "completion": "b", "label": True}, "needs the columns prompt, completions, labels"),
    ],
)
def test_rows_that_cannot_be_are_refused(
    tmp_path: Path, tiny_model_path: str, row: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        ProcessRewardTrainer(tiny_model_path, config(tmp_path), Dataset.from_list([row]))


def test_models_and_arguments_that_cannot_be_are_refused(
    tmp_path: Path, tiny_model_path: str, tiny_model: Any
) -> None:
    rows = rule_rows(2, 0)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)
    with pytest.raises(ConfigError, match="the model is a LlamaForCausalLM"):
        ProcessRewardTrainer(tiny_model, config(tmp_path), rows, processing_class=tokenizer)
    three = AutoModelForTokenClassification.from_pretrained(tiny_model_path, num_labels=3)
    with pytest.raises(ConfigError, match="with 3 labels"):
        ProcessRewardTrainer(three, config(tmp_path), rows, processing_class=tokenizer)
    with pytest.raises(ConfigError, match="leaves the head untrained; use TOKEN_CLS"):
        ProcessRewardTrainer(tiny_model_path, config(tmp_path), rows, peft_config=lora(task_type="CAUSAL_LM"))
    with pytest.raises(ConfigError, match="step_separator is ''"):
        ProcessRewardTrainer(tiny_model_path, config(tmp_path, step_separator=""), rows)
    with pytest.raises(ConfigError, match="the train data is a list"):
        ProcessRewardTrainer(tiny_model_path, config(tmp_path), list(rows))  # type: ignore[arg-type]
