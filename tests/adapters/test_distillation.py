"""The distillation stage through pipelines on tiny models: learnt, resumed, handed over, compared, refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from stagekit import ConfigError, StageError, TrainingStage
from stagekit.adapters import SFT, Distillation
from stagekit.groups import LoRA
from stagekit.trainers.distillation import DistillationConfig, DistillationTrainer
from tests.running import crash_at, lines, pipeline, run, same, stage, weights
from tests.test_trl_equivalence import COMMON, bare


Write = Callable[..., Path]


@pytest.fixture
def data(sft_rows: list[Any], write_rows: Write) -> str:
    return str(write_rows(sft_rows))


@pytest.fixture
def teacher(tiny_model_path: str, tmp_path: Path) -> str:
    """A teacher of another width and depth, with the tiny model's tokenizer."""
    return made(tiny_model_path, tmp_path / "teacher", hidden_size=96, head_dim=24, num_hidden_layers=4)


def made(path: str, folder: Path, seed: int = 1, **changes: Any) -> str:
    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig.from_pretrained(path, **changes)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(path).save_pretrained(folder)
    return str(folder)


def distil(data: str, teacher: Any, name: str = "kd", **options: Any) -> TrainingStage:
    method = {"teacher": teacher, **options.pop("method", {})}
    return stage(name, data, Distillation(**method), **options)


def curve(folder: Path, key: str = "loss") -> list[float]:
    return [line[key] for line in lines(folder) if key in line]


def test_it_trains_as_the_bare_trainer(
    data: str, teacher: str, tiny_model_path: str, sft_rows: list[Any], tmp_path: Path
) -> None:
    method = {"alpha": 0.7, "temperature": 3.0, "hidden_states": True, "layer_map": {-1: 1}, "divergence": "jsd"}
    result = run(
        tiny_model_path,
        tmp_path / "run",
        distil(data, teacher, method=method, max_steps=20, use_deterministic_algorithms=...),
    )
    given = {**COMMON, "alpha": 0.7, "temperature": 3.0, "match_hidden_states": True, "layer_map": {-1: 1}}
    given["activation_checkpointing"] = given.pop("gradient_checkpointing")
    trainer = DistillationTrainer(
        tiny_model_path,
        DistillationConfig(str(tmp_path / "bare"), **given, divergence="jsd"),
        teacher_model=teacher,
        train_dataset=Dataset.from_list(sft_rows),
        processing_class=AutoTokenizer.from_pretrained(tiny_model_path),
    )
    assert curve(tmp_path / "run/01-kd") == bare(trainer)
    saved, trained = weights(str(result.policy)), dict(trainer.model.named_parameters())
    assert all(torch.equal(trained[name], saved[name]) for name in saved)
    assert len(curve(tmp_path / "run/01-kd", "soft_loss")) == 20
    assert curve(tmp_path / "run/01-kd", "hidden_loss")[-1] < curve(tmp_path / "run/01-kd", "hidden_loss")[0]


@pytest.mark.parametrize("lora", [None, LoRA(rank=4, alpha=8, dropout=0.1)], ids=["full", "lora"])
def test_alpha_zero_is_the_sft_stage_to_the_bit(
    lora: LoRA | None, data: str, teacher: str, tiny_model_path: str, tmp_path: Path
) -> None:
    given: dict[str, Any] = {"max_steps": 4, **({"lora": lora} if lora else {})}
    distilled = run(tiny_model_path, tmp_path / "kd", distil(data, teacher, method={"alpha": 0}, **given))
    tuned = run(tiny_model_path, tmp_path / "sft", stage("sft", data, SFT(), **given))
    assert curve(tmp_path / "kd/01-kd") == curve(tmp_path / "sft/01-sft")
    assert same(str(distilled.policy), str(tuned.policy))


def test_an_earlier_stage_teaches_and_the_student_goes_on(data: str, tiny_model_path: str, tmp_path: Path) -> None:
    """teacher (adapter) -> student from the same start -> one more stage from the student."""
    taught = stage("teacher", data, SFT(), lora=LoRA(rank=8, dropout=0), learning_rate=1e-2)
    student = distil(data, "stage:teacher", name="student", method={"alpha": 1.0}, model=tiny_model_path, max_steps=6)
    after = stage("after", data, SFT(), max_steps=2)
    result = run(tiny_model_path, tmp_path / "run", taught, student, after)
    soft = curve(tmp_path / "run/02-student", "soft_loss")
    assert soft[0] > 0.01
    assert soft[-1] < 0.8 * soft[0]
    whole, about = AutoModelForCausalLM.from_pretrained(str(result["student"].policy), output_loading_info=True)
    assert not about["unexpected_keys"] and not about["missing_keys"]
    assert whole.config.num_hidden_layers == 2
    assert result["after"].status == "completed"
    kept = run(tiny_model_path, tmp_path / "run", taught, student, after)
    assert [one.status for one in kept.stages] == ["completed"] * 3
    again = stage("teacher", data, SFT(), lora=LoRA(rank=8, dropout=0), learning_rate=5e-3)
    run(tiny_model_path, tmp_path / "run", again, student, after)
    assert curve(tmp_path / "run/02-student", "soft_loss") != soft  # another teacher: the student is trained anew


@pytest.mark.parametrize("lora", [None, LoRA(rank=4, alpha=8, dropout=0.1)], ids=["full", "lora"])
def test_it_resumes_to_the_same_bits_with_its_projections(
    lora: LoRA | None, data: str, teacher: str, tiny_model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only = distil(data, teacher, method={"hidden_states": True}, lora=lora if lora else ...)
    whole = run(tiny_model_path, tmp_path / "whole", only)
    with monkeypatch.context() as patch:
        crash_at(patch, 5)
        with pytest.raises(StageError, match="CrashError"):
            run(tiny_model_path, tmp_path / "killed", only)
    torch.manual_seed(7)
    resumed = run(tiny_model_path, tmp_path / "killed", only)
    assert same(str(whole.policy), str(resumed.policy))
    assert lines(tmp_path / "whole/01-kd") == lines(tmp_path / "killed/01-kd")
    for where in ("whole", "killed"):
        assert not list((tmp_path / where / "01-kd/policy").glob("*projection*"))


def test_a_teacher_in_eight_bits_says_nearly_what_it_says_in_thirty_two(
    data: str, tiny_model_path: str, tmp_path: Path
) -> None:
    """The student is the teacher, so what it loses is what the rounding took."""
    rounded = distil(data, tiny_model_path, method={"alpha": 1.0, "teacher_bits": 8}, max_steps=1)
    run(tiny_model_path, tmp_path / "8", rounded)
    run(tiny_model_path, tmp_path / "32", distil(data, tiny_model_path, method={"alpha": 1.0}, max_steps=1))
    assert curve(tmp_path / "32/01-kd") == [0.0]
    assert 0 < curve(tmp_path / "8/01-kd")[0] < 0.1


def test_an_evaluation_measures_the_whole_loss_and_early_stopping_sees_it(
    data: str, teacher: str, tiny_model_path: str, tmp_path: Path
) -> None:
    only = distil(
        data, teacher, validation_data=data, evaluation_steps=4, metrics_to_track=("loss", "accuracy"),
        save_only_best=True, checkpoint_save_steps=...,
    )  # fmt: skip
    result = run(tiny_model_path, tmp_path, only)
    assert {"eval_loss", "eval_mean_token_accuracy"} <= set(result["kd"].metrics)
    (line, *_) = [line for line in lines(tmp_path / "01-kd") if "eval_loss" in line]
    parts = 0.5 * line["eval_soft_loss"] + 0.5 * line["eval_hard_loss"]
    assert line["eval_loss"] == pytest.approx(parts, rel=0.1)  # batches of unequal tokens weigh the same in TRL's mean


def test_a_live_teacher_is_taken_as_it_is(data: str, teacher: str, tiny_model_path: str, tmp_path: Path) -> None:
    live = AutoModelForCausalLM.from_pretrained(teacher)
    run(tiny_model_path, tmp_path / "live", distil(data, live, max_steps=2))
    run(tiny_model_path, tmp_path / "named", distil(data, teacher, max_steps=2))
    assert curve(tmp_path / "live/01-kd") == curve(tmp_path / "named/01-kd")


def test_a_cached_teacher_is_asked_once_for_a_sweep_and_a_resume(
    data: str, teacher: str, tiny_model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[int] = []
    original = DistillationTrainer._load_teacher
    monkeypatch.setattr(DistillationTrainer, "_load_teacher", lambda self: loaded.append(1) or original(self))  # type: ignore[func-returns-value]
    cached = {"teacher_cache": {"top_k": 32, "folder": str(tmp_path / "cache")}}
    only = distil(data, teacher, method=cached)
    whole = run(tiny_model_path, tmp_path / "whole", only)
    assert len(loaded) == 1
    with monkeypatch.context() as patch:
        crash_at(patch, 5)
        with pytest.raises(StageError, match="CrashError"):
            run(tiny_model_path, tmp_path / "killed", only)
    resumed = run(tiny_model_path, tmp_path / "killed", only)
    assert same(str(whole.policy), str(resumed.policy))
    run(tiny_model_path, tmp_path / "other", distil(data, teacher, method={**cached, "alpha": 0.9}))
    assert len(loaded) == 1
    online = run(tiny_model_path, tmp_path / "online", distil(data, teacher))
    assert not same(str(whole.policy), str(online.policy))
    kept, asked = (curve(tmp_path / where / "01-kd", "soft_loss")[0] for where in ("whole", "online"))
    assert 0 < kept < asked


def test_the_teacher_s_texts_are_learnt_across_tokenizers_and_journalled(
    write_rows: Write, sft_rows: list[Any], teacher: str, tiny_model_path: str, tmp_path: Path
) -> None:
    """The teacher's tokenizer has a token more; cut and empty answers are counted, not learnt."""
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(teacher)
    prompts = str(write_rows([{"prompt": row["prompt"]} for row in sft_rows], "prompts.jsonl"))
    only = distil(
        prompts, teacher, method={"mode": "sequence"}, max_steps=2,
        generation={"max_new_tokens": 24, "backend": "tests.answers:short"},
    )  # fmt: skip
    scripted = run(tiny_model_path, tmp_path / "scripted", only)
    rows = [json.loads(line) for line in (tmp_path / "scripted/01-kd/data/answers.jsonl").read_text().splitlines()]
    assert len(rows) == scripted["kd"].samples_trained == 16
    assert rows[0]["prompt"] == sft_rows[0]["prompt"]
    assert scripted["kd"].artifacts["datasets"] == {"answers": "01-kd/data/answers.jsonl"}
    sampled = distil(prompts, teacher, method={"mode": "sequence"}, generation={"max_new_tokens": 8})
    with pytest.raises(StageError, match=r"the teacher gave no answer to learn \(.*truncated\)"):
        run(tiny_model_path, tmp_path / "sampled", sampled)  # a random teacher never ends
    journal = [json.loads(line) for line in (tmp_path / "sampled/01-kd/journal.jsonl").read_text().splitlines()]
    assert sum(line["type"] == "record" for line in journal) == 16


def test_text_distillation_is_sft_on_the_teacher_s_answers(
    write_rows: Write, sft_rows: list[Any], tiny_model_path: str, tmp_path: Path
) -> None:
    prompts = str(write_rows([{"prompt": row["prompt"]} for row in sft_rows], "prompts.jsonl"))
    scripted = {"max_new_tokens": 24, "backend": "tests.answers:short"}
    kd = distil(prompts, tiny_model_path, method={"mode": "sequence"}, generation=scripted)
    after = stage("after", "stage:kd/answers", SFT(), model=tiny_model_path)
    result = run(tiny_model_path, tmp_path / "run", kd, after)
    assert curve(tmp_path / "run/01-kd") == curve(tmp_path / "run/02-after")
    assert same(str(result["kd"].policy), str(result["after"].policy))


def test_the_student_s_own_samples_are_taught_as_the_bare_trl_trainer_does(
    write_rows: Write, sft_rows: list[Any], teacher: str, tiny_model_path: str, tmp_path: Path
) -> None:
    prompts = [{"prompt": row["prompt"]} for row in sft_rows]
    result = run(
        tiny_model_path,
        tmp_path / "run",
        distil(
            str(write_rows(prompts, "prompts.jsonl")), teacher, max_steps=6, use_deterministic_algorithms=...,
            method={"mode": "on_policy", "divergence": "jsd", "mixture": 0.3},
            generation={"max_new_tokens": 8, "top_k": 50},
        ),
    )  # fmt: skip
    given = {**COMMON, "max_steps": 6}
    given["activation_checkpointing"] = given.pop("gradient_checkpointing")
    trainer = trl.DistillationTrainer(
        tiny_model_path,
        AutoModelForCausalLM.from_pretrained(teacher),
        trl.DistillationConfig(str(tmp_path / "bare"), **given, beta=0.3, max_completion_length=8, top_k=50),
        Dataset.from_list(prompts),
        processing_class=AutoTokenizer.from_pretrained(tiny_model_path),
    )
    assert curve(tmp_path / "run/01-kd") == bare(trainer)
    saved, trained = weights(str(result.policy)), dict(trainer.model.named_parameters())
    assert all(torch.equal(trained[name], saved[name]) for name in saved)


def test_on_the_student_s_own_samples_the_reverse_divergence_falls_and_it_resumes_to_the_same_bits(
    write_rows: Write, sft_rows: list[Any], tiny_model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = str(write_rows([{"prompt": row["prompt"]} for row in sft_rows], "prompts.jsonl"))
    near = made(tiny_model_path, tmp_path / "near", seed=5)
    only = distil(
        prompts, near, method={"mode": "on_policy", "teacher_bits": 8}, generation={"max_new_tokens": 8}, max_steps=8
    )
    whole = run(tiny_model_path, tmp_path / "whole", only)
    losses = curve(tmp_path / "whole/01-kd")
    assert losses[-1] < 0.9 * losses[0]
    with monkeypatch.context() as patch:
        crash_at(patch, 5)
        with pytest.raises(StageError, match="CrashError"):
            run(tiny_model_path, tmp_path / "killed", only)
    torch.manual_seed(7)
    resumed = run(tiny_model_path, tmp_path / "killed", only)
    assert lines(tmp_path / "whole/01-kd") == lines(tmp_path / "killed/01-kd")
    assert same(str(whole.policy), str(resumed.policy))


@pytest.mark.parametrize("lora", [None, LoRA(rank=4, alpha=8, merge=True)], ids=["full", "lora"])
def test_a_student_of_the_teacher_s_blocks_starts_as_they_are(
    lora: LoRA | None, data: str, teacher: str, tiny_model_path: str, tmp_path: Path
) -> None:
    only = distil(
        data, teacher, method={"init_student": {"layers": 2}, "hidden_states": True}, max_steps=2,
        **({"lora": lora} if lora else {}),
    )  # fmt: skip
    result = run(tiny_model_path, tmp_path / "run", only)
    start, theirs = weights(tmp_path / "run/01-kd/student"), weights(teacher)
    for ours, block in ((0, 0), (1, 3)):
        for name in (name for name in start if f".layers.{ours}." in name):
            assert torch.equal(start[name], theirs[name.replace(f".layers.{ours}.", f".layers.{block}.")])
    assert torch.equal(start["model.embed_tokens.weight"], theirs["model.embed_tokens.weight"])
    policy, about = AutoModelForCausalLM.from_pretrained(str(result.policy), output_loading_info=True)
    assert (policy.config.num_hidden_layers, policy.config.hidden_size) == (2, 96)
    assert not about["unexpected_keys"] and not about["missing_keys"]
    with pytest.raises(ConfigError, match=r"init_student.layers: 5 of the teacher's 4 blocks cannot be had"):
        run(tiny_model_path, tmp_path / "more", distil(data, teacher, method={"init_student": {"layers": 5}}))


def test_the_digest_follows_the_teacher_s_content(
    data: str, teacher: str, tiny_model_path: str, tmp_path: Path
) -> None:
    from stagekit.digest import digests

    declared = pipeline(tiny_model_path, tmp_path / "run", distil(data, teacher))
    before = digests(declared)
    assert digests(declared) == before
    made(tiny_model_path, Path(teacher), seed=2, hidden_size=96, head_dim=24, num_hidden_layers=4)
    assert digests(declared) != before


def test_a_teacher_of_another_tokenizer_is_told_with_the_mode_that_works(
    data: str, teacher: str, tiny_model_path: str, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(teacher)
    with pytest.raises(ConfigError, match=r"another tokenizer: 961 tokens .*\(mode: sequence"):
        run(tiny_model_path, tmp_path / "run", distil(data, teacher))


def test_a_teacher_that_is_not_there_is_told_before_anything_is_loaded(data: str, tmp_path: Path) -> None:
    from stagekit.checks import problems_on_disk

    missing = pipeline("package:stagekit/recipes/data/tiny", tmp_path / "run", distil(data, str(tmp_path / "none")))
    assert [one.path for one in problems_on_disk(missing)] == ["stages.kd.method.teacher"]
    with pytest.raises(ConfigError, match=r"stages.kd.method.teacher: no stage 'none' before this one"):
        pipeline("package:stagekit/recipes/data/tiny", tmp_path / "run", distil(data, "stage:none"))


@pytest.mark.parametrize(
    ("method", "given", "path", "words"),
    [
        ({"teacher": None}, {}, "method.teacher", "missing; say which model to learn from"),
        ({"temperature": 0}, {}, "method.temperature", "greater than 0"),
        ({"temperature": 101}, {}, "method.temperature", "less than or equal to 100"),
        ({"alpha": 1.5}, {}, "method.alpha", "less than or equal to 1"),
        ({"mixture": 0.3}, {}, "method.mixture", "has no effect on this divergence; it is of jsd and skewed_kl"),
        ({"layer_map": {0: 0}}, {}, "method.layer_map", "has no effect without method.hidden_states: true"),
        ({"hidden_loss": "mse"}, {}, "method.hidden_loss", "has no effect without method.hidden_states: true"),
        ({"teacher_cache": {}, "hidden_states": True}, {}, "method.teacher_cache", "keeps no hidden states"),
        ({"teacher_cache": {"top_k": 0}}, {}, "method.teacher_cache.top_k", "greater than or equal to 1"),
        ({"mode": "sequence", "alpha": 0.3}, {}, "method.alpha", "has no effect in mode 'sequence'; it is of logits"),
        ({"mode": "sequence", "temperature": 2.0}, {}, "method.temperature", "it is of logits and on_policy"),
        ({"mode": "on_policy", "hidden_states": True}, {}, "method.hidden_states", "no effect in mode 'on_policy'"),
        ({"mode": "on_policy", "teacher_cache": {}}, {}, "method.teacher_cache", "no effect in mode 'on_policy'"),
        ({"mode": "on_policy", "divergence": "skewed_kl"}, {}, "method.divergence", "use jsd with a mixture"),
        ({"mode": "on_policy"}, {"generation": {"temperature": 0.7}}, "generation.temperature", "method.temperature"),
        ({"mode": "on_policy"}, {"data_shuffle_seed": 3}, "data_shuffle_seed", "random_seed decides the order"),
        ({"mode": "on_policy"}, {"trl": {"beta": 0.5}}, "trl.beta", "belongs to method.divergence"),
        ({}, {"generation": {"top_p": 0.5}}, "generation", "has no effect in mode 'logits'"),
        ({"init_student": {"layers": 1}}, {"model": "a/model"}, "model", "has no effect with method.init_student"),
        ({}, {"trl": {"alpha": 0.1}}, "trl.alpha", "belongs to method.alpha"),
        ({}, {"trl": {"loss_type": "dft"}}, "trl.loss_type", "no likelihood of the labels"),
        ({}, {"reference": {}}, "reference", "has no use for it"),
        ({}, {"metrics_to_track": ["perplexity"], "validation_data": "v.jsonl"}, "metrics_to_track", "no likelihood"),
    ],
)
def test_what_it_cannot_do_is_told_with_the_way_out(
    method: dict[str, Any], given: dict[str, Any], path: str, words: str
) -> None:
    declared = {"type": "distillation", "teacher": "a/teacher", **method}
    with pytest.raises(ConfigError) as caught:
        TrainingStage(**{"name": "kd", "method": declared, "training_data": "p.jsonl", **given})
    told = [one.message for one in caught.value.problems if one.path == path]
    assert len(told) == 1 and words in told[0], caught.value.problems
