"""The rejection sampling stage through a pipeline on the tiny model."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stagekit import TrainingPipeline
from stagekit.adapters import DPO, ProcessReward, RejectionSampling, Reward
from stagekit.errors import ConfigError, Interrupted, StageError
from stagekit.groups import Generation, LoRA
from stagekit.pipeline import to_plain
from stagekit.plan import plan
from stagekit.stage import TrainingStage
from tests.answers import by_length
from tests.running import CrashError, crash_at, pipeline, run, same, stage
from tests.trainers.test_process_reward import rule_rows


Write = Callable[..., Path]
PROMPTS = [{"prompt": "Name a fruit."}, {"prompt": "Is the earth round?"}, {"prompt": "What is ice made of?"}]
GENERATION = Generation(max_new_tokens=24, batch_tokens=300)


@pytest.fixture
def prompts(write_rows: Write) -> str:
    return str(write_rows(PROMPTS, "prompts.jsonl"))


def sampled(name: str, data: Any, **options: Any) -> TrainingStage:
    method = {"reward": by_length, "n": 6, **options.pop("method", {})}
    given = {"max_steps": 2, "generation": GENERATION, **options}
    return stage(name, data, RejectionSampling(**method), **given)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def records(folder: Path, name: str = "journal.jsonl") -> list[dict[str, Any]]:
    return [entry["record"] for entry in rows(folder / name) if entry["type"] == "record"]


def test_it_learns_the_best_answers_and_leaves_three_datasets(
    prompts: str, tiny_model_path: str, tmp_path: Path
) -> None:
    first = sampled("rs", prompts, method={"top_k": 2})
    second = stage("dpo", "stage:rs/preferences", DPO(), max_steps=2)
    result = run(tiny_model_path, tmp_path, first, second)
    selected, scored = rows(result["rs"].dataset("selected")), rows(result["rs"].dataset("scored"))
    assert result["rs"].samples_trained == len(selected)
    assert [len(row["candidates"]) for row in scored] == [6, 6, 6]
    for row in scored:
        finished = {text for text, why in zip(row["candidates"], row["finish_reasons"], strict=True) if why == "stop"}
        kept = [one for one in selected if one["prompt"] == row["prompt"]]
        assert [one["reward"] for one in kept] == sorted((float(len(text)) for text in finished), reverse=True)[:2]
    assert result["dpo"].samples_trained == len(rows(result["rs"].dataset("preferences"))) > 0
    dropped = result["rs"].samples_dropped
    assert len(selected) + sum(n for why, n in dropped.items() if why.startswith("answers.")) == 18
    metrics = result["rs"].metrics
    assert metrics["reward/kept"] > metrics["reward/mean"] and metrics["reward/best_of_2"] > metrics["reward/mean"]
    assert not same(str(result["rs"].policy), tiny_model_path)


def test_a_reward_stage_scores_the_answers(
    prompts: str, write_rows: Write, preference_rows: list[Any], tiny_model_path: str, tmp_path: Path
) -> None:
    judge = stage("judge", str(write_rows(preference_rows)), Reward(), max_steps=2)
    method = {"reward": [{"source": "stage:judge", "weight": 0.5}, "tests.answers:by_length"], "min_reward": None}
    result = run(tiny_model_path, tmp_path, judge, sampled("rs", prompts, method=method))
    from stagekit.reward_models import load_reward_model, score

    [first, *_] = rows(result["rs"].dataset("selected"))
    model, tokenizer = load_reward_model(str(result["judge"].reward_model))
    [own] = score(model, tokenizer, [first["prompt"]], [first["completion"]])
    assert first["reward"] == pytest.approx(0.5 * own + len(first["completion"][0]["content"]), abs=1e-4)


def test_a_process_reward_stage_scores_the_weakest_step_of_an_answer(
    prompts: str, write_rows: Write, tiny_model_path: str, tmp_path: Path
) -> None:
    steps = str(write_rows(rule_rows(8, 0), "steps.jsonl"))
    judge = stage("judge", steps, ProcessReward(step_separator=" "), max_steps=2, lora=LoRA(rank=4))
    method = {"reward": "stage:judge", "min_reward": None}
    result = run(tiny_model_path, tmp_path, judge, sampled("rs", prompts, method=method))
    from stagekit.reward_models import load_process_reward_model
    from stagekit.trainers.process_reward import score_steps

    [first, *_] = rows(result["rs"].dataset("selected"))
    model, tokenizer = load_process_reward_model(str(result["judge"].reward_model))
    words = [one for one in first["completion"][0]["content"].split(" ") if one.strip()]
    asked = first["prompt"][-1]["content"]  # a text in the data, so a text for the reward model
    assert first["reward"] == pytest.approx(min(score_steps(model, tokenizer, asked, words)), abs=1e-5)


def test_rounds_sample_from_the_model_of_the_round_before(prompts: str, tiny_model_path: str, tmp_path: Path) -> None:
    result = run(tiny_model_path, tmp_path, sampled("rs", prompts, method={"rounds": 2}))["rs"]
    folder = tmp_path / "01-rs"
    models = [{record["model"] for record in records(place)} for place in (folder / "iteration-1", folder)]
    assert [len(one) for one in models] == [1, 1] and models[0] != models[1]
    assert {record["round"] for record in records(folder)} == {2}
    assert result.steps == 4
    assert not same(folder / "iteration-1/policy", str(result.policy))
    assert not (folder / "iteration-1/checkpoints").exists()
    assert {"reward/mean", "iteration_1/reward/mean", "iteration_2/train_loss"} <= result.metrics.keys()


@pytest.mark.slow
def test_rounds_with_an_adapter_train_one_adapter_on(prompts: str, tiny_model_path: str, tmp_path: Path) -> None:
    one = sampled("rs", prompts, method={"rounds": 2}, lora=LoRA(rank=2, merge=True), learning_rate=1e-2)
    result = run(tiny_model_path, tmp_path, one)["rs"]
    assert (Path(tmp_path) / result.artifacts["adapter"] / "adapter_config.json").is_file()
    two = sampled("rs", prompts, method={"rounds": 2}, lora=LoRA(rank=2), learning_rate=1e-2)
    result = run(tiny_model_path, tmp_path / "kept", two)["rs"]
    config = json.loads(Path(str(result.policy), "adapter_config.json").read_text())
    assert Path(config["base_model_name_or_path"]).resolve() == Path(tiny_model_path).resolve()


@pytest.mark.slow
@pytest.mark.parametrize("where", ["sampling of round 1", "training of round 1", "training of round 2"])
def test_a_run_that_dies_anywhere_ends_as_one_that_does_not(
    where: str, prompts: str, tiny_model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = sampled("rs", prompts, method={"rounds": 2}, max_steps=4, checkpoint_save_steps=2)
    whole = run(tiny_model_path, tmp_path / "whole", one)
    with monkeypatch.context() as patch:
        _die(patch, where)
        with pytest.raises(StageError, match="CrashError"):
            run(tiny_model_path, tmp_path / "died", one)
    again = run(tiny_model_path, tmp_path / "died", one)
    assert same(str(whole.policy), str(again.policy))
    for place in ("01-rs/iteration-1", "01-rs"):
        for name in ("journal.jsonl", "scores.jsonl"):
            texts = [sorted(map(json.dumps, records(tmp_path / run_ / place, name))) for run_ in ("whole", "died")]
            assert texts[0] == texts[1]
    assert again["rs"].metrics.keys() == whole["rs"].metrics.keys()
    assert again["rs"].steps == whole["rs"].steps == 8


@pytest.mark.slow
def test_a_sampling_that_dies_at_any_batch_leaves_the_journal_of_one_that_does_not(
    prompts: str, tiny_model_path: str, tmp_path: Path
) -> None:
    """With the model in this process, on one thread: the texts are the same bits."""
    from stagekit.generation import TransformersGenerator

    generate = TransformersGenerator.generate
    one = TrainingStage(
        name="rs", method=RejectionSampling(reward="tests.answers:by_length", n=6), validation_data=prompts,
        is_evaluation_only=True, generation=Generation(max_new_tokens=24, batch_tokens=160),
    )  # fmt: skip
    run(tiny_model_path, tmp_path / "whole", one)
    batches = sum(line["type"] == "batch" for line in rows(tmp_path / "whole/01-rs/journal.jsonl"))
    assert batches >= 4
    for life in range(batches):
        calls: list[int] = []

        def dying(self: Any, requests: Any, seed: int, calls: list[int] = calls, life: int = life) -> Any:
            if len(calls) == life:
                raise CrashError("while sampling")
            calls.append(seed)
            return generate(self, requests, seed)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(TransformersGenerator, "generate", dying)
            with pytest.raises(StageError, match="CrashError"):
                run(tiny_model_path, tmp_path / str(life), one)
        run(tiny_model_path, tmp_path / str(life), one)
        for name in ("journal.jsonl", "scores.jsonl"):
            ends = [
                sorted(map(json.dumps, records(tmp_path / where / "01-rs", name))) for where in ("whole", str(life))
            ]
            assert ends[0] == ends[1], (life, name)


def _die(patch: pytest.MonkeyPatch, where: str) -> None:
    if where.startswith("sampling"):
        from stagekit.generation import TransformersGenerator

        generate, calls = TransformersGenerator.generate, []

        def dying(self: Any, requests: Any, seed: int) -> Any:
            if len(calls) == 2:
                raise CrashError("while sampling")
            calls.append(seed)
            return generate(self, requests, seed)

        patch.setattr(TransformersGenerator, "generate", dying)
    elif where.endswith("1"):
        crash_at(patch, 3)
    else:
        from stagekit import iterations

        keep = iterations._keep

        def then_crash(*arguments: Any) -> None:
            keep(*arguments)
            crash_at(patch, 3)

        patch.setattr(iterations, "_keep", then_crash)


def test_a_stop_while_scoring_keeps_the_answers(prompts: str, tiny_model_path: str, tmp_path: Path) -> None:
    def stopping(prompts: Any, completions: Any, **columns: Any) -> list[float]:
        raise Interrupted("while scoring")

    with pytest.raises(Interrupted):
        run(tiny_model_path, tmp_path, sampled("rs", prompts, method={"reward": stopping}))
    assert len(records(tmp_path / "01-rs")) == 18


def test_another_reward_reuses_the_texts_of_the_run_before(
    prompts: str, tiny_model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tiny_model_path, tmp_path, sampled("rs", prompts, method={"reward": "tests.answers:by_length"}))
    from stagekit.generation import TransformersGenerator

    def never(self: Any, requests: Any, seed: int) -> Any:
        raise AssertionError("texts are written anew")

    monkeypatch.setattr(TransformersGenerator, "generate", never)
    result = run(tiny_model_path, tmp_path, sampled("rs", prompts, method={"reward": "tests.answers:by_shortness"}))
    assert rows(result["rs"].dataset("selected"))[0]["reward"] < 1


def test_evaluation_only_measures_the_best_of_n_and_learns_nothing(
    prompts: str, tiny_model_path: str, tmp_path: Path
) -> None:
    one = TrainingStage(
        name="best-of-n", method=RejectionSampling(reward=by_length, n=6), validation_data=prompts,
        is_evaluation_only=True, generation=GENERATION,
    )  # fmt: skip
    result = run(tiny_model_path, tmp_path, one, stage("dpo", "stage:best-of-n/preferences", DPO(), max_steps=1))
    found = result["best-of-n"]
    assert found.policy is None and found.steps == 0
    assert found.metrics["reward/best_of_1"] < found.metrics["reward/best_of_2"]
    assert result["dpo"].samples_trained > 0


def test_the_reward_reads_the_other_columns(write_rows: Write, tiny_model_path: str, tmp_path: Path) -> None:
    seen: set[tuple[str, str]] = set()

    def look(prompts: Any, completions: Any, answer: Any) -> list[float]:
        seen.update((prompt, one) for prompt, one in zip(prompts, answer, strict=True))
        return [1.0] * len(completions)

    data = write_rows([{**row, "answer": row["prompt"].upper()} for row in PROMPTS])
    run(tiny_model_path, tmp_path, sampled("rs", str(data), method={"reward": look}))
    assert seen == {(row["prompt"], row["prompt"].upper()) for row in PROMPTS}


def test_nothing_kept_fails_the_stage_with_the_quantiles(prompts: str, tiny_model_path: str, tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"stage 'rs'.*below_min_reward.*median"):
        run(tiny_model_path, tmp_path, sampled("rs", prompts, method={"min_reward": 1e6}))


def test_a_threshold_on_a_models_score_that_leaves_little_is_told(
    prompts: str, write_rows: Write, preference_rows: list[Any], tiny_model_path: str, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    judge = stage("judge", str(write_rows(preference_rows)), Reward(), max_steps=1)
    method = {"reward": "stage:judge", "min_reward": None, "top_k": 6}
    everything = run(tiny_model_path, tmp_path, judge, sampled("rs", prompts, method=method))
    rewards = sorted(row["reward"] for row in rows(everything["rs"].dataset("selected")))
    assert "zero of a reward model" not in caplog.text
    method = {"reward": "stage:judge", "min_reward": rewards[-2]}
    run(tiny_model_path, tmp_path, judge, sampled("rs", prompts, method=method))
    assert "the zero of a reward model's score means nothing" in caplog.text


WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"method": {"type": "rejection_sampling"}}, "method.reward", "missing; say what scores the answers"),
    ({"method": {"type": "rejection_sampling", "reward": "a:b", "n": 2, "top_k": 3}}, "method.top_k",
     "3 answers cannot be kept of n = 2"),
    ({"generation": {"temperature": 0}}, "generation.temperature", "0 gives the same answer 10 times"),
    ({"is_evaluation_only": True, "training_data": None, "validation_data": "x.jsonl",
      "method": {"type": "rejection_sampling", "reward": "a:b", "rounds": 2}}, "method.rounds", "has no effect"),
    ({"method": {"type": "rejection_sampling", "reward": 3}}, "method.reward", "a hub id"),
    ({"method": {"type": "rejection_sampling", "reward": []}}, "method.reward", "an empty list rewards nothing"),
    ({"method": {"type": "rejection_sampling", "reward": ["a:b", {"source": "a:b", "wight": 1}]}},
     "method.reward.1.wight", "did you mean 'weight'"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "path", "message"), WRONG)
def test_what_cannot_work_is_told_by_its_path(given: dict[str, Any], path: str, message: str) -> None:
    least = {"name": "s", "training_data": "x.jsonl", "method": {"type": "rejection_sampling", "reward": "a:b"}}
    with pytest.raises(ConfigError) as caught:
        TrainingStage(**{key: value for key, value in {**least, **given}.items() if value is not None})
    assert [(one.path, message in one.message) for one in caught.value.problems] == [(path, True)]


def test_a_stage_that_leaves_a_policy_cannot_score(prompts: str, tiny_model_path: str, tmp_path: Path) -> None:
    first = stage("first", prompts, "sft")
    with pytest.raises(ConfigError, match=r"it is a sft stage\); name a reward or process_reward stage"):
        pipeline(tiny_model_path, tmp_path, first, sampled("rs", prompts, method={"reward": "stage:first"}))


def test_a_declaration_survives_its_file_and_is_planned(prompts: str, tiny_model_path: str, tmp_path: Path) -> None:
    method = {"reward": [{"source": "tests.answers:by_length", "weight": 2.0}], "rounds": 2, "top_k": 2}
    declared = pipeline(tiny_model_path, tmp_path, sampled("rs", prompts, method=method))
    assert TrainingPipeline(**to_plain(declared)) == declared
    [entry] = plan(declared)
    assert entry["rows"] == {
        "read": 3, "trained": 6, "made": {"selected": 6, "preferences": 3, "scored": 3},
    }  # fmt: skip
    assert entry["steps"] == 4
    assert entry["notes"] == ["6 answers are sampled for every prompt, in each of 2 rounds"]
