"""The synthetic data stage through a pipeline on the tiny model."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from stagekit import TrainingPipeline
from stagekit.adapters import SFT, SyntheticData
from stagekit.errors import ConfigError, StageError
from stagekit.groups import Generation
from stagekit.pipeline import to_plain
from stagekit.plan import plan
from stagekit.stage import TrainingStage
from tests.answers import by_length
from tests.running import CrashError, pipeline, run, same, stage


Write = Callable[..., Path]
SEEDS = [{"prompt": "Name a fruit."}, {"prompt": "Is the earth round?"}, {"prompt": "What is ice made of?"}]

ASKED = 24


@pytest.fixture
def seeds(write_rows: Write) -> str:
    return str(write_rows(SEEDS, "seeds.jsonl"))


def synthetic(data: Any = None, **options: Any) -> TrainingStage:
    """A stage that takes what the tiny model writes as it is: word salad of a word or more."""
    method = {"instructions": ASKED, "examples": 2, "min_words": 1, "similarity": None, **options.pop("method", {})}
    given = {"generation": Generation(max_new_tokens=48, batch_tokens=1600), **options}
    return TrainingStage(name="synth", method=SyntheticData(**method), training_data=data, **given)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def records(folder: Path, name: str = "journal.jsonl") -> list[dict[str, Any]]:
    return [entry["record"] for entry in rows(folder / name) if entry["type"] == "record"]


def accounted(result: Any, asked: int = ASKED) -> None:
    """Instructions asked for = rows + everything that was dropped; the shares say the same."""
    kept, dropped = len(rows(result.dataset("rows"))), result.samples_dropped
    assert kept + sum(dropped.values()) == asked
    answered = asked - sum(count for reason, count in dropped.items() if reason.startswith("instructions."))
    assert result.metrics["valid_unique_rate"] == pytest.approx(answered / asked)
    assert result.metrics["kept_share"] == pytest.approx(kept / asked)


def test_the_model_writes_rows_that_a_later_stage_learns_and_is_passed_on_unchanged(
    seeds: str, tiny_model_path: str, tmp_path: Path
) -> None:
    result = run(tiny_model_path, tmp_path, synthetic(seeds), stage("sft", "stage:synth/rows", SFT(), max_steps=2))
    made = result["synth"]
    accounted(made)
    assert made.policy is None and made.steps == 0
    learnt = rows(made.dataset("rows"))
    assert result["sft"].samples_trained == len(learnt) > 0
    assert not same(str(result["sft"].policy), tiny_model_path)
    ids = {seed for row in learnt for seed in row["seeds"]}
    assert {record["prompt_id"] for record in records(tmp_path / "01-synth")} != ids and len(ids) <= 3
    asked = rows(made.dataset("instructions"))
    assert len(asked) == ASKED
    for line in asked:
        shown = [seed["prompt"] for seed in SEEDS if seed["prompt"] in line["prompt"][0]["content"]]
        assert len(shown) == len(line["seeds"]) == 2
    kept = {line["completion"][0]["content"] for line in asked if not line["drop"]}
    assert {row["prompt"][0]["content"] for row in learnt} <= kept
    texts = {record["key"]: record for record in records(tmp_path / "01-synth")}
    for row in learnt:
        assert texts[row["key"]]["text"] == row["completion"][0]["content"]
        assert texts[row["key"]]["finish_reason"] == "stop"


def test_a_teacher_writes_in_the_place_of_the_model(seeds: str, tiny_model_path: str, tmp_path: Path) -> None:
    first = stage("teacher", str(_demonstrations(tmp_path)), SFT(), max_steps=2)
    second = synthetic(seeds, method={"teacher": "stage:teacher"}, model=tiny_model_path)
    alone = run(tiny_model_path, tmp_path / "alone", synthetic(seeds))
    taught = run(tiny_model_path, tmp_path / "taught", first, second)
    models = [
        {record["model"] for name in ("instructions.jsonl", "journal.jsonl") for record in records(folder, name)}
        for folder in (tmp_path / "alone/01-synth", tmp_path / "taught/02-synth")
    ]
    assert [len(one) for one in models] == [1, 1] and models[0] != models[1]
    assert taught.policy == taught["teacher"].policy and alone.policy is None


def _demonstrations(folder: Path) -> Path:
    path = folder / "demonstrations.jsonl"
    path.write_text("".join(json.dumps({**row, "completion": "It is."}) + "\n" for row in SEEDS))
    return path


def test_a_live_teacher_is_told_by_its_weights(seeds: str, tiny_model_path: str, tmp_path: Path) -> None:
    from stagekit.fingerprints import weights_fingerprint

    live = AutoModelForCausalLM.from_pretrained(tiny_model_path)
    accounted(run(tiny_model_path, tmp_path, synthetic(seeds, method={"teacher": live}))["synth"])
    (name,) = {record["model"] for record in records(tmp_path / "01-synth", "instructions.jsonl")}
    assert name.startswith(weights_fingerprint(live))


def scripted(messages: Sequence[Any]) -> str:
    """A scripted teacher: a new instruction for a request, an answer for an instruction."""
    asked = messages[0]["content"]
    if "Write one" not in asked:
        return f"Here is what I know of it: {asked}"
    examples = [line.partition(" ")[2] for line in asked.splitlines() if line[:1].isdigit()]
    return f"1. Say more about this please, thank you: {examples[0]}" if examples else f"Ask about {asked.split()[4]}"


SCRIPTED = "tests.adapters.test_synthetic_data:scripted"


def test_repeated_instructions_are_answered_once(seeds: str, tiny_model_path: str, tmp_path: Path) -> None:
    generation = Generation(backend=SCRIPTED)
    method = {"similarity": 0.7, "instructions": 30}
    made = run(tiny_model_path, tmp_path, synthetic(seeds, generation=generation, method=method))["synth"]
    accounted(made, 30)
    assert set(made.samples_dropped) == {"instructions.duplicate"}
    learnt = rows(made.dataset("rows"))
    assert len(learnt) == 3 == len(records(tmp_path / "01-synth"))
    assert {row["prompt"][0]["content"] for row in learnt} == {
        f"Say more about this please, thank you: {seed['prompt']}" for seed in SEEDS
    }
    like = [line["like"] for line in rows(made.dataset("instructions")) if line["drop"]]
    assert len(like) == 27 and set(like) <= {row["prompt"][0]["content"] for row in learnt}


def test_topics_do_without_seeds(tiny_model_path: str, tmp_path: Path) -> None:
    one = synthetic(method={"topics": ("tea", "rain"), "examples": 0}, generation=Generation(backend=SCRIPTED))
    made = run(tiny_model_path, tmp_path, one)["synth"]
    accounted(made)
    assert sorted((row["topic"], row["prompt"][0]["content"]) for row in rows(made.dataset("rows"))) == [
        ("rain", "Ask about rain"), ("tea", "Ask about tea"),
    ]  # fmt: skip


def test_the_teacher_can_be_a_server(
    served: tuple[str, Path], seeds: str, tmp_path: Path, tiny_model_path: str
) -> None:
    url, folder = served
    one = synthetic(seeds, generation=Generation(backend=url, max_new_tokens=200))
    accounted(run(tiny_model_path, tmp_path / "run", one)["synth"])
    sent = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert sum("Write one new instruction" in line["messages"][0]["content"] for line in sent) >= ASKED


def test_a_reward_drops_answers_and_is_noted(seeds: str, tiny_model_path: str, tmp_path: Path) -> None:
    noted = run(tiny_model_path, tmp_path, synthetic(seeds, method={"reward": by_length}))["synth"]
    accounted(noted)
    before = rows(noted.dataset("rows"))
    lengths = sorted(len(row["completion"][0]["content"]) for row in before)
    assert [row["reward"] for row in before] == [len(row["completion"][0]["content"]) for row in before]
    middle = float(lengths[len(lengths) // 2])
    from stagekit.generation import TransformersGenerator

    calls: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TransformersGenerator, "generate", lambda *given: calls.append(1))
        one = synthetic(seeds, method={"reward": by_length, "min_reward": middle})
        kept = run(tiny_model_path, tmp_path, one)["synth"]
    assert not calls, "another threshold writes no text anew"
    accounted(kept)
    after = rows(kept.dataset("rows"))
    assert [row["reward"] for row in after] == [row["reward"] for row in before if row["reward"] > middle]
    assert kept.samples_dropped["answers.below_min_reward"] == len(before) - len(after) > 0
    assert kept.metrics["reward/kept"] > kept.metrics["reward/mean"] == noted.metrics["reward/mean"]


def test_nothing_kept_fails_the_stage_with_the_reasons(seeds: str, tiny_model_path: str, tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"stage 'synth'.*instructions\.too_few_words: \d.*needs a teacher"):
        run(tiny_model_path, tmp_path, synthetic(seeds, method={"min_words": 100, "max_words": None}))
    with pytest.raises(StageError, match=r"answers\.below_min_reward: \d.*median"):
        run(tiny_model_path, tmp_path, synthetic(seeds, method={"reward": by_length, "min_reward": 1e6}))
    said = rows(tmp_path / "01-synth/data/instructions.jsonl")
    assert len(said) == ASKED and any(not line["drop"] for line in said)


def test_other_bounds_choose_anew_from_the_same_instructions(seeds: str, tiny_model_path: str, tmp_path: Path) -> None:
    first = run(tiny_model_path, tmp_path, synthetic(seeds))["synth"]
    written = (tmp_path / "01-synth/instructions.jsonl").read_bytes()
    counts = sorted(len(row["prompt"][0]["content"].split()) for row in rows(first.dataset("rows")))
    least = counts[0] + 1
    second = run(tiny_model_path, tmp_path, synthetic(seeds, method={"min_words": least}))["synth"]
    assert (tmp_path / "01-synth/instructions.jsonl").read_bytes() == written
    assert second.samples_dropped["instructions.too_few_words"] > 0
    assert all(len(row["prompt"][0]["content"].split()) >= least for row in rows(second.dataset("rows")))


@pytest.mark.slow
def test_a_run_that_dies_at_any_batch_ends_as_one_that_does_not(
    seeds: str, tiny_model_path: str, tmp_path: Path
) -> None:
    from stagekit.generation import TransformersGenerator

    generate = TransformersGenerator.generate
    generation = Generation(max_new_tokens=48, batch_tokens=800)
    one = synthetic(seeds, method={"reward": "tests.answers:by_length", "instructions": 16}, generation=generation)
    whole = run(tiny_model_path, tmp_path / "whole", one)["synth"]
    names = ("instructions.jsonl", "journal.jsonl", "scores.jsonl")
    batches = sum(line["type"] == "batch" for name in names[:2] for line in rows(tmp_path / "whole/01-synth" / name))
    assert batches >= 4
    for crash in range(batches):
        calls: list[int] = []

        def dying(self: Any, requests: Any, seed: int, calls: list[int] = calls, crash: int = crash) -> Any:
            if len(calls) == crash:
                raise CrashError("while writing")
            calls.append(seed)
            return generate(self, requests, seed)

        folder = tmp_path / f"died{crash}"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(TransformersGenerator, "generate", dying)
            with pytest.raises(StageError, match="CrashError"):
                run(tiny_model_path, folder, one)
        again = run(tiny_model_path, folder, one)["synth"]
        for name in names:
            ends = [
                sorted(map(json.dumps, records(place / "01-synth", name))) for place in (tmp_path / "whole", folder)
            ]
            assert ends[0] == ends[1], (crash, name)
        assert again.dataset("rows").read_bytes() == whole.dataset("rows").read_bytes()
        assert again.samples_dropped == whole.samples_dropped and again.metrics == whole.metrics


WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"training_data": None}, "training_data", "missing; give seeds"),
    ({"method": {"min_reward": 1.0}}, "method.min_reward", "has no effect without method.reward"),
    ({"method": {"similarity": None, "ngram": 3}}, "method.ngram", "has no effect with method.similarity: null"),
    ({"method": {"similarity": 0}}, "method.similarity", "greater than 0"),
    ({"method": {"min_words": 9, "max_words": 8}}, "method.max_words", "8 is below min_words, 9"),
    ({"method": {"min_answer_words": 9, "max_answer_words": 8}}, "method.max_answer_words", "8 is below"),
    ({"method": {"examples": 0}}, "method.examples", "0 shows no seed"),
    ({"training_data": None, "method": {"topics": ["a"], "examples": 2}}, "method.examples", "has no effect without"),
    ({"method": {"example_line": "-"}}, "method.example_line", "has no {example}"),
    ({"training_data": None, "method": {"topics": ["a"], "example_line": "{example}"}}, "method.example_line",
     "has no effect where no seeds"),
    ({"method": {"request": "Write one."}}, "method.request", "has no {examples}"),
    ({"method": {"request": "{examples} {topic}"}}, "method.request", "has {topic}, which nothing fills"),
    ({"method": {"request": "{examples}", "topics": ["a"]}}, "method.request", "has no {topic}, so method.topics"),
    ({"method": {"teacher": "a/b"}, "generation": {"backend": "http://h:1/v1"}}, "method.teacher", "has no effect"),
    ({"method": {"teacher": "a/b"}, "generation": {"backend": "a:b"}}, "method.teacher", "keep one of them"),
    ({"training_data": None, "method": {"topics": ["a"]}, "generation": {"temperature": 0}},
     "generation.temperature", "0 writes the same instruction for a topic each time"),
    ({"learning_rate": 1e-5}, "learning_rate", "trains nothing"),
    ({"lora": {}}, "lora", "trains nothing"),
    ({"validation_data": "v.jsonl"}, "validation_data", "trains nothing"),
    ({"trl": {"max_length": 5}}, "trl", "trains nothing"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "path", "message"), WRONG)
def test_what_cannot_work_is_told_by_its_path(given: dict[str, Any], path: str, message: str) -> None:
    least = {"name": "s", "training_data": "x.jsonl", **given}
    least["method"] = {"type": "synthetic_data", **given.get("method", {})}
    with pytest.raises(ConfigError) as caught:
        TrainingStage(**{key: value for key, value in least.items() if value is not None})
    assert [(one.path, message in one.message) for one in caught.value.problems] == [(path, True)]


def test_its_rows_are_known_to_the_stages_after_it_and_its_model_is_the_one_before(
    seeds: str, tiny_model_path: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"leaves no dataset 'answers'; it leaves: rows, instructions"):
        pipeline(tiny_model_path, tmp_path, synthetic(seeds), stage("sft", "stage:synth/answers"))
    with pytest.raises(ConfigError, match="leaves no model"):
        pipeline(tiny_model_path, tmp_path, synthetic(seeds), stage("sft", seeds, model="stage:synth"))


@pytest.mark.parametrize("seeded", [True, False])
def test_a_declaration_survives_its_file_and_is_planned(
    seeded: bool, seeds: str, tiny_model_path: str, tmp_path: Path
) -> None:
    one = synthetic(seeds) if seeded else synthetic(method={"topics": ("tea",), "examples": 0})
    after = stage("sft", "stage:synth/rows", SFT(), max_steps=0, epochs=1)
    declared = pipeline(tiny_model_path, tmp_path, one, after)
    assert TrainingPipeline(**to_plain(declared)) == declared
    entry, learns = plan(declared)
    assert entry["rows"]["made"] == {"rows": ASKED, "instructions": ASKED}
    assert (entry["steps"], entry["arguments"]) == (0, [])
    assert entry["notes"] == [
        f"{ASKED} instructions are asked of the model of the stage, and those that are new are answered"
    ]
    assert learns["steps"] == ASKED // 4
    assert learns["model"] == tiny_model_path


def test_another_template_writes_other_texts_and_never_takes_those_of_the_one_before(
    seeds: str, tiny_model_path: str, tmp_path: Path
) -> None:
    found = []
    for turn in ("Q", "Question"):
        template = "{% for m in messages %}" + turn + ": {{ m.content }} {% endfor %}A:"
        pipeline(tiny_model_path, tmp_path, synthetic(seeds), chat_template=template).run(quiet=True)
        found.append(records(tmp_path / "01-synth", "instructions.jsonl"))
    models = [{record["model"] for record in one} for one in found]
    assert [len(one) for one in models] == [1, 1] and models[0] != models[1]


def test_the_request_is_the_users_own(seeds: str, tiny_model_path: str, tmp_path: Path) -> None:
    method = {
        "request": "More like these:\n{examples}\nOne on {topic}:", "topics": ("tea",), "example_line": "- {example}"
    }  # fmt: skip
    made = run(tiny_model_path, tmp_path, synthetic(seeds, method=method))["synth"]
    for line in rows(made.dataset("instructions")):
        text = line["prompt"][0]["content"]
        assert text.startswith("More like these:\n- ") and text.endswith("\nOne on tea:")
    assert Counter(line["drop"] for line in rows(made.dataset("instructions")))[""] > 0
