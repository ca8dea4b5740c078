"""Metrics of generated answers, in stages on the tiny model: equal to plain generation and the libraries by hand."""

import json
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from stagekit import StageError, TextMetrics, TrainingPipeline, TrainingStage
from stagekit.adapters import Reward
from stagekit.digest import digests
from stagekit.generation import TransformersGenerator
from stagekit.groups import EarlyStopping, Gate, LoRA
from stagekit.metrics import token_f1
from stagekit.reward_models import load_reward_model, score
from stagekit.text_metrics import Question, TextEvaluation, questions
from tests.running import lines, run, same, stage
from tests.test_reward_models import pairs


Write = Callable[..., Path]
COMPARED = ("f1_score", "bleu", "rouge")
SHORT = TextMetrics(max_new_tokens=16)


@pytest.fixture
def rows(write_rows: Write, sft_rows: list[Any]) -> str:
    return str(write_rows(sft_rows, "sft.jsonl"))


@pytest.fixture
def preferences(write_rows: Write, preference_rows: list[Any]) -> str:
    return str(write_rows(preference_rows, "dpo.jsonl"))


def plain_answers(path: str, prompts: Sequence[Any], new_tokens: int = 16) -> list[str]:
    """What transformers alone generates, greedily and one prompt at a time."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    found = []
    for prompt in prompts:
        if isinstance(prompt, str):
            ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        else:
            ids = tokenizer.apply_chat_template(
                prompt, add_generation_prompt=True, return_dict=True, return_tensors="pt"
            )["input_ids"]
        out = model.generate(ids, do_sample=False, max_new_tokens=new_tokens, pad_token_id=tokenizer.pad_token_id or 0)
        found.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    return found


def by_libraries(answers: list[str], references: list[str]) -> dict[str, float]:
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])
    each = [scorer.score(one, other)["rougeL"].fmeasure for one, other in zip(references, answers, strict=True)]
    return {
        "eval_f1_score": pytest.approx(token_f1(answers, references)),
        "eval_bleu": pytest.approx(sacrebleu.corpus_bleu(answers, [references]).score),
        "eval_rouge": pytest.approx(sum(each) / len(each)),
    }


def measure(data: str, **options: Any) -> TrainingStage:
    given = {"metrics_to_track": COMPARED, "text_metrics": SHORT, **options}
    return TrainingStage(name="m", method="evaluation", validation_data=data, **given)


def trained(rows: str, **options: Any) -> TrainingStage:
    """40 steps in which the tiny model learns its 16 answers by heart."""
    given = {"max_steps": 40, "learning_rate": 5e-3, "evaluation_steps": 10, "checkpoint_save_steps": ..., **options}
    return stage("s", rows, **{"validation_data": rows, "early_stopping": None, "text_metrics": SHORT, **given})


def series(folder: Path, name: str) -> dict[int, float]:
    """Step -> value of a metric."""
    return {line["step"]: line[name] for line in lines(folder) if name in line}


def half_right(answers: list[str], others: list[str]) -> list[str]:
    """References of which every other one is the answer and two words more: metrics that are neither 0 nor full."""
    mixed = [
        f"{one} and more" if row % 2 else other for row, (one, other) in enumerate(zip(answers, others, strict=True))
    ]
    assert answers != others and 0.2 < token_f1(answers, mixed) < 0.7
    return mixed


def talk(role: str, texts: Sequence[str]) -> list[list[dict[str, str]]]:
    return [[{"role": role, "content": text}] for text in texts]


def test_the_metrics_are_those_of_plain_generation_and_the_libraries(
    write_rows: Write, sft_rows: list[Any], tiny_model_path: str, tmp_path: Path
) -> None:
    prompts = [row["prompt"] for row in sft_rows]
    answers = plain_answers(tiny_model_path, prompts)
    right = half_right(answers, [row["completion"][0]["content"] for row in sft_rows])
    pairs_of = zip(prompts, talk("assistant", right), strict=True)
    data = write_rows([{"prompt": prompt, "completion": answer} for prompt, answer in pairs_of])
    result = run(tiny_model_path, tmp_path, measure(str(data)))
    assert result["m"].metrics == by_libraries(answers, right)


def test_a_prompt_that_is_a_text_is_gone_on_from_without_a_template(
    write_rows: Write, sft_rows: list[Any], tiny_model_path: str, tmp_path: Path
) -> None:
    prompts = [f"Question: {row['prompt'][0]['content']}\nAnswer:" for row in sft_rows]
    answers = plain_answers(tiny_model_path, prompts)
    right = half_right(answers, [row["completion"][0]["content"] for row in sft_rows])
    data = write_rows([{"prompt": one, "completion": other} for one, other in zip(prompts, right, strict=True)])
    result = run(tiny_model_path, tmp_path, measure(str(data)))
    assert result["m"].metrics == by_libraries(answers, right)


def test_a_preference_stage_is_measured_against_the_chosen_answers(
    write_rows: Write, preference_rows: list[Any], tiny_model_path: str, tmp_path: Path
) -> None:
    few = preference_rows[:6]
    answers = plain_answers(tiny_model_path, [row["prompt"] for row in few])
    right = half_right(answers, [row["chosen"][0]["content"] for row in few])
    asked = [{**row, "chosen": chosen} for row, chosen in zip(few, talk("assistant", right), strict=True)]
    only = TrainingStage(
        name="m", method="dpo", is_evaluation_only=True, metrics_to_track=("loss", *COMPARED),
        validation_data=str(write_rows([*asked, *preference_rows[6:]])),
        text_metrics={"max_new_tokens": 16, "samples": 6},
    )  # fmt: skip
    metrics = dict(run(tiny_model_path, tmp_path, only)["m"].metrics)
    assert metrics.pop("eval_loss") > 0
    assert metrics == by_libraries(answers, right)


def test_the_last_number_of_a_training_is_that_of_the_saved_policy(
    rows: str, sft_rows: list[Any], tiny_model_path: str, tmp_path: Path
) -> None:
    lora = LoRA(rank=16, alpha=64, dropout=0.1, target_modules="all-linear", merge=True)
    only = trained(rows, lora=lora, learning_rate=1e-2, metrics_to_track=COMPARED, max_steps=24, evaluation_steps=24)
    result = run(tiny_model_path, tmp_path, only)
    answers = plain_answers(str(result.policy), [row["prompt"] for row in sft_rows])
    expected = by_libraries(answers, [row["completion"][0]["content"] for row in sft_rows])
    assert {name: result["s"].metrics[name] for name in expected} == expected
    assert result["s"].metrics["eval_f1_score"] > 0.2  # it has learnt; an untrained adapter has 0


def draws(prompts: Sequence[Any], first: Sequence[str], second: Sequence[str]) -> list[float]:
    """A judge that takes a number from every source of randomness there is."""
    return [(random.random() + float(np.random.rand()) + float(torch.rand(()))) / 3 for _ in prompts]


def length(completions: Sequence[Any], **kwargs: Any) -> list[float]:
    torch.rand(5)
    return [float(len(turns[0]["content"])) for turns in completions]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lora": LoRA(rank=4, alpha=8, dropout=0.5), "use_gradient_checkpointing": True},
        {"method": "dpo"},
        {"use_mixed_precision": True, "mixed_precision_dtype": "bf16"},
    ],
    ids=["full", "lora dropout, checkpointing", "dpo", "bf16"],
)
def test_to_measure_texts_changes_no_bit_of_the_training(
    options: Mapping[str, Any], rows: str, preferences: str, tiny_model_path: str, tmp_path: Path
) -> None:
    data = preferences if options.get("method") == "dpo" else rows
    given = {"max_steps": 6, "evaluation_steps": 2, "validation_data": data, "checkpoint_save_steps": ..., **options}
    everything = {
        "metrics_to_track": (*COMPARED, "reward_score", "win_rate", "loss"),
        "text_metrics": TextMetrics(max_new_tokens=8, judge=draws, reward_model=length, samples=5),
    }
    without = run(tiny_model_path, tmp_path / "a", stage("s", data, **given, metrics_to_track=("loss",)))
    measured = run(tiny_model_path, tmp_path / "b", stage("s", data, **given, **everything))
    assert len(series(tmp_path / "b/01-s", "eval_win_rate")) == 3
    assert same(str(without.policy), str(measured.policy))
    for name in ("loss", "eval_loss", "learning_rate"):
        assert series(tmp_path / "a/01-s", name) == series(tmp_path / "b/01-s", name) != {}


def test_an_answer_leaves_the_model_as_it_was(rows: str, tiny_model: Any, tiny_tokenizer: Any) -> None:
    tiny_model.train()
    tiny_model.model.layers[0].eval()
    tiny_model.config.use_cache = False
    before = {name: module.training for name, module in tiny_model.named_modules()}
    config, drawn = tiny_model.generation_config, torch.random.get_rng_state()
    asked = [Question(0, ({"role": "user", "content": "Hi"},), "Hello")]
    texts = TextEvaluation(("f1_score", "win_rate"), asked, tiny_tokenizer, where="x", max_new_tokens=4, judge=draws)
    texts.plan(tiny_model)
    texts(tiny_model)
    assert {name: module.training for name, module in tiny_model.named_modules()} == before
    assert tiny_model.config.use_cache is False and tiny_model.generation_config is config
    assert torch.equal(torch.random.get_rng_state(), drawn)


def test_prompts_are_asked_in_few_padded_batches_longest_first(
    tiny_model: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    widths: list[list[int]] = []
    original = TransformersGenerator.generate

    def generate(self: Any, requests: Any, seed: int) -> Any:
        widths.append([self.prompt_length(request.messages) for request in requests])
        return original(self, requests, seed)

    monkeypatch.setattr(TransformersGenerator, "generate", generate)
    asked = [Question(row, "word " * count, "x") for row, count in enumerate((3, 9, 1, 7, 5))]
    texts = TextEvaluation(
        ("f1_score",), asked, tiny_tokenizer, where="x", max_new_tokens=2, batch_tokens=3 * (2 + 4 + 9 * 2)
    )
    texts.plan(tiny_model)
    together = texts.answer(tiny_model)
    assert 1 < len(widths) < 5
    assert [width for batch in widths for width in batch] == sorted(
        (w for batch in widths for w in batch), reverse=True
    )
    alone = []
    for question in asked:
        one = TextEvaluation(("f1_score",), [question], tiny_tokenizer, where="x", max_new_tokens=2)
        one.plan(tiny_model)
        alone += one.answer(tiny_model)
    assert together == alone


def test_the_best_checkpoint_by_f1_is_the_one_that_is_passed_on(
    rows: str, tiny_model_path: str, tmp_path: Path
) -> None:
    best = {"save_only_best": True, "best_checkpoint_metric": "f1_score", "best_checkpoint_metric_maximize": True}
    result = run(tiny_model_path, tmp_path, trained(rows, scheduler_type="constant", **best))
    found = series(tmp_path / "01-s", "eval_f1_score")
    assert list(found) == [10, 20, 30, 40] and found[10] < 0.5
    step = max(found, key=lambda step: found[step])  # of equal ones the first
    (kept,) = (tmp_path / "01-s/checkpoints").glob("checkpoint-*")
    assert kept.name == f"checkpoint-{step}" and step != 10
    assert same(str(result.policy), kept)
    state = json.loads((kept / "trainer_state.json").read_text())
    assert (state["best_metric"], state["best_global_step"]) == (found[step], step)


def test_early_stopping_watches_a_metric_of_texts(rows: str, tiny_model_path: str, tmp_path: Path) -> None:
    early = EarlyStopping(metric="f1_score", patience=1, min_delta=2.0, maximize=True)  # no F1 gains so much
    result = run(tiny_model_path, tmp_path, trained(rows, early_stopping=early, evaluation_steps=3))
    assert (result["s"].status, result["s"].steps) == ("completed", 6)
    assert list(series(tmp_path / "01-s", "eval_f1_score")) == [3, 6]
    assert result["s"].metrics["eval_f1_score"] == series(tmp_path / "01-s", "eval_f1_score")[6]


def test_a_gate_sees_a_metric_of_texts_that_only_it_names(rows: str, tiny_model_path: str, tmp_path: Path) -> None:
    only = trained(rows, max_steps=2, evaluation_steps=2, gate=Gate(metric="bleu", at_least=100.5), logging_steps=0)
    result = run(tiny_model_path, tmp_path, only)
    assert result["s"].held_back and "eval_bleu is" in result["s"].reason


def test_a_reward_stage_scores_and_judges_the_answers_of_a_later_one(
    rows: str, sft_rows: list[Any], write_rows: Write, tiny_model_path: str, tmp_path: Path
) -> None:
    reward = stage("rm", str(write_rows(pairs(64, 0), "pairs.jsonl")), Reward(), max_steps=12, learning_rate=1e-3)
    options = {"max_new_tokens": 16, "reward_model": "stage:rm"}
    second = trained(
        rows, max_steps=6, evaluation_steps=3, metrics_to_track=("reward_score", "win_rate"), text_metrics=options
    )
    result = run(tiny_model_path, tmp_path, reward, second)
    assert result["rm"].policy is None and result["s"].policy == result.policy
    prompts = [row["prompt"] for row in sft_rows]
    answers = plain_answers(str(result.policy), prompts)
    model = AutoModelForSequenceClassification.from_pretrained(str(result["rm"].reward_model))
    tokenizer = load_reward_model(str(result["rm"].reward_model)).tokenizer
    rewards = score(model, tokenizer, prompts, answers)
    others = score(model, tokenizer, prompts, [row["completion"][0]["content"] for row in sft_rows])
    won = [1.0 if one > other else 0.0 for one, other in zip(rewards, others, strict=True)]  # type: ignore[operator]
    metrics = result["s"].metrics
    assert metrics["eval_reward_score"] == pytest.approx(sum(rewards) / 16, abs=1e-4)  # type: ignore[arg-type]
    assert metrics["eval_win_rate"] == pytest.approx(sum(won) / 16)
    assert metrics["eval_win_rate_agreement"] == 1.0
    again = TrainingPipeline(name="t", model=tiny_model_path, output_dir=tmp_path, stages=(reward, second))
    other = reward.model_copy(update={"learning_rate": 2e-3})
    changed = TrainingPipeline(name="t", model=tiny_model_path, output_dir=tmp_path, stages=(other, second))
    assert digests(again)["s"] == result["s"].digest != digests(changed)["s"]


def answered(names: Sequence[str], **options: Any) -> TextEvaluation:
    """Three questions, whose answers are always a, bb and ccc; the references are aa, bb and b."""
    asked = [Question(row, f"p{row}", reference) for row, reference in enumerate(("aa", "bb", "b"))]
    texts = TextEvaluation(names, asked, None, where="x", **options)
    texts.answer = lambda model: ["a", "bb", "ccc"]  # type: ignore[method-assign]
    return texts


def sizes(prompts: Sequence[Any], answers: Sequence[str]) -> list[float]:
    return [float(len(answer)) for answer in answers]


def test_the_higher_score_wins_in_both_orders_and_equal_ones_are_half_a_win() -> None:
    found = answered(("reward_score", "win_rate"), score=sizes)(None)
    assert found == {"reward_score": 2.0, "win_rate": 0.5, "win_rate_agreement": 1.0}  # a loss, a tie, a win

    def rounded(prompts: Sequence[Any], answers: Sequence[str]) -> list[float]:
        return [1.0 + 1e-7 * (answer == "bb") for answer in answers]  # as far as a batch can change a score

    assert answered(("win_rate",), score=rounded)(None)["win_rate"] == 0.5


def test_a_judge_that_takes_the_first_answer_finds_neither_side_better() -> None:
    def first(prompts: Sequence[Any], one: Sequence[str], other: Sequence[str]) -> list[float]:
        return [1.0] * len(prompts)

    found = answered(("win_rate",), judge=first, score=sizes)(None)
    assert found == {"win_rate": 0.5, "win_rate_agreement": 0.0}


def test_scores_that_are_none_stop_the_stage() -> None:
    for wrong in ([1.0], [1.0, 2.0, float("nan")]):
        with pytest.raises(StageError, match=r"text_metrics.reward_model gave \d scores for 3 answers"):
            answered(("reward_score",), score=lambda prompts, answers, wrong=wrong: wrong)(None)


USER = {"role": "user", "content": "Q"}
ASSISTANT = {"role": "assistant", "content": "A"}
TALK = ((USER,), "A")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "Q", "completion": "A"}, ("Q", "A")),
        ({"prompt": [USER], "completion": [ASSISTANT]}, TALK),
        ({"messages": [USER, ASSISTANT, USER, ASSISTANT]}, ((USER, ASSISTANT, USER), "A")),
        ({"conversations": [{"from": "user", "value": "Q"}, {"from": "assistant", "value": "A"}]}, TALK),
        ({"prompt": [USER], "chosen": [ASSISTANT], "rejected": [{**ASSISTANT, "content": "B"}]}, TALK),
        ({"chosen": [USER, ASSISTANT], "rejected": [USER, {**ASSISTANT, "content": "B"}]}, TALK),
        ({"prompt": "Q", "chosen": "A", "rejected": "B"}, ("Q", "A")),
        ({"prompt": [USER], "completion": [ASSISTANT], "label": True}, TALK),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_a_row_of_every_format_is_a_prompt_with_its_reference(row: dict[str, Any], expected: Any) -> None:
    assert questions(Dataset.from_list([row, row]), "v") == [Question(0, *expected), Question(1, *expected)]
    assert len(questions(Dataset.from_list([row, row]), "v", samples=1)) == 1


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        ([{"text": "Q A"}], "v: row 1 has no prompt with an answer"),
        ([{"prompt": "Q", "completion": "A"}, {"prompt": "Q", "completion": "  "}], "v: row 2 has no reference"),
        ([{"messages": [USER, ASSISTANT, USER]}], "v: row 1 has no reference: its answer is empty, or not the assist"),
        ([{"prompt": [USER], "completion": []}], "v: row 1 has no reference"),
        (
            [{"prompt": "Q", "completion": "A", "label": False}],
            "v: none of 1 rows has a reference; each label is false",
        ),
        ([{"prompt": [USER], "completion": [ASSISTANT], "tools": "[]"}], "v: metrics of texts cannot ask .* 'tools'"),
    ],
    ids=["text", "empty", "no assistant", "no turn", "labels", "tools"],
)
def test_validation_data_without_references_are_refused_with_the_row(bad: list[Any], told: str) -> None:
    with pytest.raises(StageError, match=told):
        questions(Dataset.from_list(bad), "v")


def test_an_empty_reference_is_found_before_anything_is_trained(
    write_rows: Write, sft_rows: list[Any], tiny_model_path: str, tmp_path: Path
) -> None:
    empty = [*sft_rows[:3], {**sft_rows[3], "completion": [{"role": "assistant", "content": ""}]}]
    with pytest.raises(StageError, match=r"stages\.s\.validation_data: row 4 has no reference"):
        run(tiny_model_path, tmp_path, trained(str(write_rows(empty)), metrics_to_track=("f1_score",)))
    assert not list(tmp_path.glob("01-s/checkpoints/checkpoint-*"))


def test_a_prompt_without_room_for_an_answer_is_found_before_anything_is_trained(
    rows: str, tiny_model_path: str, tmp_path: Path
) -> None:
    long = {"metrics_to_track": ("f1_score",), "text_metrics": {"max_new_tokens": 2040}}
    with pytest.raises(StageError, match=r"row 1: its prompt has \d+ tokens, .* context of 2048. Lower text_metrics"):
        run(tiny_model_path, tmp_path, trained(rows, **long))


def test_a_function_of_the_users_may_not_return_what_stagekit_measures(
    rows: str, tiny_model_path: str, tmp_path: Path
) -> None:
    def mine(model: Any, dataset: Any) -> dict[str, float]:
        return {"bleu": 1.0}

    only = measure(rows, metrics_to_track=("bleu",), custom_evaluation_function=mine)
    with pytest.raises(StageError, match="custom_evaluation_function returned 'bleu', which stagekit measures"):
        run(tiny_model_path, tmp_path, only)
