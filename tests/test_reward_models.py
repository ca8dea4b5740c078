"""Reward models from TRL's RewardTrainer on the tiny model: learnt, saved, merged, scored and checked again."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast
from trl import RewardConfig, RewardTrainer

from stagekit.errors import ConfigError, StageError
from stagekit.models import lora_config
from stagekit.reward_models import (
    check_scores_again,
    held_out_accuracy,
    load_process_reward_model,
    load_reward_model,
    merge_reward_adapter,
    reward_ids,
    score,
)


SETTINGS: dict[str, Any] = {
    "bf16": False,
    "use_cpu": True,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "activation_checkpointing": False,
    "lr_scheduler_type": "constant",
    "per_device_train_batch_size": 16,
}
WORDS = ("water", "rice", "train", "school", "money", "family", "story", "city", "garden", "river", "bread", "map")


def pairs(count: int, seed: int) -> list[dict[str, Any]]:
    """The chosen answer says `Please`, the rejected one `never`, at any place among random words."""
    draw = random.Random(seed)

    def answer(word: str) -> list[dict[str, str]]:
        words = draw.sample(WORDS, draw.randint(2, 5))
        words.insert(draw.randint(0, len(words)), word)
        return [{"role": "assistant", "content": " ".join(words)}]

    return [
        {
            "prompt": [{"role": "user", "content": f"Tell of {draw.choice(WORDS)}."}],
            "chosen": answer("Please"),
            "rejected": answer("never"),
        }
        for _ in range(count)
    ]


def train(tmp_path: Path, model: Any, rows: list[dict[str, Any]], lora: bool = False, **changes: Any) -> Any:
    trainer = RewardTrainer(
        model=model,
        args=RewardConfig(str(tmp_path / "out"), **{**SETTINGS, **changes}),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows[:8]),
        processing_class=AutoTokenizer.from_pretrained(model),
        peft_config=lora_config(8, 16, 0.0, ("q_proj", "v_proj"), task_type="SEQ_CLS") if lora else None,
    )
    trainer.train()
    return trainer


def columns(rows: list[dict[str, Any]]) -> tuple[list[Any], list[Any]]:
    return [row["prompt"] for row in rows], [row["chosen"] for row in rows]


@pytest.fixture(scope="module")
def trained(tiny_model_path: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[float | None], Any]:
    """A reward model that has learnt the rule, saved; its scores on held-out answers before saving; its trainer."""
    folder = tmp_path_factory.mktemp("reward")
    trainer = train(
        folder, tiny_model_path, pairs(256, 0), max_steps=60, learning_rate=1e-3, center_rewards_coefficient=0.01
    )
    before = score(trainer.model, trainer.processing_class, *columns(pairs(20, 1)))
    trainer.save_model(str(folder / "reward_model"))
    return str(folder / "reward_model"), before, trainer


def test_it_orders_pairs_that_it_has_not_seen(trained: tuple[str, list[float | None], Any]) -> None:
    found = held_out_accuracy(*load_reward_model(trained[0]), pairs(100, 2))
    assert found.accuracy > 0.9
    assert (found.pairs, found.too_long) == (100, 0)
    assert found.mean_margin > 0.5
    turned = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in pairs(100, 2)]
    assert held_out_accuracy(*load_reward_model(trained[0]), turned).accuracy < 0.1


def test_its_accuracy_is_that_of_trl(trained: tuple[str, list[float | None], Any]) -> None:
    path, _, trainer = trained
    rows = pairs(32, 3)
    theirs = trainer.evaluate(Dataset.from_list(rows))
    ours = held_out_accuracy(*load_reward_model(path), rows)
    assert ours.accuracy == pytest.approx(theirs["eval_accuracy"])
    assert ours.mean_margin == pytest.approx(theirs["eval_margin"], rel=1e-4)


def test_a_saved_reward_model_scores_as_before(trained: tuple[str, list[float | None], Any], tmp_path: Path) -> None:
    path, before, _ = trained
    assert check_scores_again(path, *columns(pairs(20, 1)), before) < 1e-6
    broken = AutoModelForSequenceClassification.from_pretrained(path)
    with torch.no_grad():
        broken.score.weight *= 1.01
    broken.save_pretrained(tmp_path / "broken")
    AutoTokenizer.from_pretrained(path).save_pretrained(tmp_path / "broken")
    with pytest.raises(StageError, match=r"scores answer 0 with -?[\d.]+, and scored it with -?[\d.]+ before"):
        check_scores_again(str(tmp_path / "broken"), *columns(pairs(20, 1)), before)
    with pytest.raises(StageError, match=r"and scored it with None \(too long\)"):
        check_scores_again(path, *columns(pairs(1, 1)), [None])


def test_a_score_does_not_depend_on_order_or_batch(trained: tuple[str, list[float | None], Any]) -> None:
    model, tokenizer = load_reward_model(trained[0])
    prompts, answers = columns(pairs(20, 1))
    whole = score(model, tokenizer, prompts, answers)
    for batch_tokens in (1, 100, 10**6):
        assert score(model, tokenizer, prompts, answers, batch_tokens=batch_tokens) == pytest.approx(whole, abs=1e-5)
    turned = score(model, tokenizer, prompts[::-1], answers[::-1], batch_tokens=90)
    assert turned[::-1] == pytest.approx(whole, abs=1e-5)
    tokenizer.padding_side = "left"
    assert score(model, tokenizer, prompts, answers) == pytest.approx(whole, abs=1e-5)
    assert len({round(value, 3) for value in whole if value is not None}) > 10


def test_a_score_is_the_models_logit_and_leaves_its_mode(tiny_model_path: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model_path, num_labels=1).train()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)
    ids = reward_ids(tokenizer, "2+2? ", "4")
    with torch.no_grad():
        by_hand = model.eval()(input_ids=torch.tensor([ids])).logits.item()
    model.train()
    assert score(model, tokenizer, ["2+2? "], ["4"]) == pytest.approx([by_hand], abs=1e-6)
    assert model.training
    assert isinstance(score(model.bfloat16(), tokenizer, ["2+2? "], ["4"])[0], float)


def test_an_answer_that_is_too_long_has_no_score(trained: tuple[str, list[float | None], Any]) -> None:
    model, tokenizer = load_reward_model(trained[0])
    assert score(model, tokenizer, ["a", "a"], ["b", "b " * 4000])[1] is None
    rows = [*pairs(3, 1), {**pairs(1, 1)[0], "rejected": [{"role": "assistant", "content": "b " * 200}]}]
    found = held_out_accuracy(model, tokenizer, rows, max_length=100)
    assert (found.pairs, found.too_long) == (3, 1)
    with pytest.raises(StageError, match="none of 1 pairs fits"):
        held_out_accuracy(model, tokenizer, rows[3:], max_length=100)


def test_it_reads_answers_as_reward_trainer_does(trained: tuple[str, list[float | None], Any]) -> None:
    _, _, trainer = trained
    tokenizer = trainer.processing_class
    texts = [{"prompt": "2+2? ", "chosen": "4", "rejected": "5<|im_end|>"}]
    for rows in (pairs(3, 5), texts, [{"chosen": "a", "rejected": "b"}]):
        theirs = trainer._prepare_dataset(Dataset.from_list(rows), tokenizer, trainer.args, "eval")
        for row, prepared in zip(rows, theirs, strict=True):
            for answer in ("chosen", "rejected"):
                assert reward_ids(tokenizer, row.get("prompt"), row[answer]) == prepared[f"{answer}_ids"]
    conversation = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
    assert reward_ids(tokenizer, "2+2?", conversation[1:]) == reward_ids(tokenizer, None, conversation)
    assert reward_ids(tokenizer, conversation[:1], "4") == reward_ids(tokenizer, None, conversation)


def test_there_is_one_bos(tiny_model_path: str) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_model_path)
    core = tokenizer.backend_tokenizer
    bos = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    core.post_processor = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", bos)])
    adding = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<|endoftext|>", eos_token="<|im_end|>", pad_token="<|pad|>",
        chat_template="<|endoftext|>{% for message in messages %}{{ message.content }}{% endfor %}",
    )  # fmt: skip
    for prompt in ("hi", "<|endoftext|>hi"):
        assert reward_ids(adding, prompt, "yes").count(bos) == 1
    assert reward_ids(adding, [{"role": "user", "content": "hi"}], "yes").count(bos) == 1


def test_a_lora_reward_model_is_merged_on_load_and_on_disk(tmp_path: Path, tiny_model_path: str) -> None:
    trainer = train(tmp_path, tiny_model_path, pairs(64, 0), lora=True, max_steps=8, learning_rate=5e-3)
    before = score(trainer.model, trainer.processing_class, *columns(pairs(10, 1)))
    changed = {name for name, value in trainer.model.named_parameters() if value.requires_grad}
    assert any("score.modules_to_save" in name for name in changed) and any("lora_B" in name for name in changed)
    trainer.save_model(str(tmp_path / "adapter"))
    assert check_scores_again(str(tmp_path / "adapter"), *columns(pairs(10, 1)), before) < 1e-5
    assert not hasattr(load_reward_model(str(tmp_path / "adapter")).model, "peft_config")
    told = merge_reward_adapter(tmp_path / "adapter", tmp_path / "merged")
    assert (told["task"], told["dtype"]) == ("SEQ_CLS", "float32")
    assert told["merge_difference"] < 1e-5 and told["saved_difference"] == 0
    assert check_scores_again(str(tmp_path / "merged"), *columns(pairs(10, 1)), before) < 1e-5
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged", num_labels=1)  # as TRL's GRPO does
    assert score(plain, trainer.processing_class, *columns(pairs(10, 1))) == pytest.approx(before, abs=1e-4)
    half = merge_reward_adapter(tmp_path / "adapter", tmp_path / "half", torch.bfloat16)
    assert 0 < half["saved_difference"] < 0.02  # weights and activations rounded to 8 bits
    assert load_reward_model(str(tmp_path / "half")).model.dtype == torch.float32


def test_what_is_no_reward_model_is_refused(
    trained: tuple[str, list[float | None], Any], tmp_path: Path, tiny_model_path: str, tiny_model: Any
) -> None:
    from peft import get_peft_model

    with pytest.raises(StageError, match=r"lacks score.weight, so its scores would be random"):
        load_reward_model(tiny_model_path)
    with pytest.raises(StageError, match="could not be loaded as a reward model"):
        load_reward_model(_only_tokenizer(tiny_model_path, tmp_path / "empty"))
    two = AutoModelForSequenceClassification.from_pretrained(tiny_model_path, num_labels=2)
    two.save_pretrained(tmp_path / "two")
    _only_tokenizer(tiny_model_path, tmp_path / "two")
    with pytest.raises(StageError, match="has 2 labels; a reward model of this kind has 1"):
        load_reward_model(str(tmp_path / "two"))
    with pytest.raises(StageError, match=r"lacks score.bias"):
        load_process_reward_model(trained[0])
    get_peft_model(tiny_model, lora_config(4, 8, 0.0, ("q_proj",))).save_pretrained(tmp_path / "causal")
    with pytest.raises(ConfigError, match=r"no adapter of a reward model \(task_type 'CAUSAL_LM'\)"):
        load_reward_model(str(tmp_path / "causal"))
    with pytest.raises(ConfigError, match=r"no adapter of a reward model \(task_type None\)"):
        merge_reward_adapter(tiny_model_path, tmp_path / "merged")
    model, tokenizer = load_reward_model(trained[0])
    with pytest.raises(ConfigError, match="2 prompts and 1 completions"):
        score(model, tokenizer, ["a", "b"], ["c"])
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="no chat template"):
        score(model, tokenizer, *columns(pairs(1, 0)))


def _only_tokenizer(source: str, folder: Path) -> str:
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return str(folder)
