"""Self-play: pairs and drops, the closed form of an iteration, the trainer against it, and what must not drift."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from stagekit.errors import ConfigError, StageError
from stagekit.generation import TransformersGenerator
from stagekit.requests import Completion, ScriptedGenerator
from stagekit.selection import Candidate, Group
from stagekit.trainers.self_play import (
    contraction,
    drops,
    metrics,
    optimum,
    overtrained,
    pairs,
    real_answers,
)
from stagekit.trainers.self_play_trainer import SelfPlayConfig, SelfPlayTrainer, StopAtMargin, self_play
from tests.trainers.one_token import PROMPT, WORDS, answer_probabilities, asked_ids, fit
from tests.trainers.scripted import records_of


TRAINING: dict[str, Any] = {
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-3,
    "bf16": False,
    "use_cpu": True,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "logging_steps": 1,
}
SAMPLING: dict[str, Any] = {"responses_per_prompt": 3, "max_new_tokens": 24, "batch_tokens": 300, "temperature": 1.0}
ROWS = [
    {"prompt": "Name a fruit.", "completion": "An apple."},
    {"prompt": [{"role": "user", "content": "Is the earth round?"}],
     "completion": [{"role": "assistant", "content": "Yes, nearly a sphere."}]},
]  # fmt: skip


def config(tmp_path: Path, **changes: Any) -> SelfPlayConfig:
    return SelfPlayConfig(str(tmp_path / "out"), **{**TRAINING, **SAMPLING, **changes})


def group(*answers: tuple[str, str]) -> Group:
    candidates = tuple(Candidate(str(place), text, why) for place, (text, why) in enumerate(answers))  # type: ignore[arg-type]
    return Group(({"role": "user", "content": "Q"},), candidates)


# pairs


def test_every_sample_makes_a_pair_and_repeated_ones_make_repeated_pairs() -> None:
    rows = pairs([group(("a", "stop"), ("a", "stop"), ("b", "stop"))], ["real"], 2)
    assert [row["rejected"][0]["content"] for row in rows] == ["a", "a", "b"]
    assert rows[2] == {
        "prompt": [{"role": "user", "content": "Q"}],
        "chosen": [{"role": "assistant", "content": "real"}],
        "rejected": [{"role": "assistant", "content": "b"}],
        "iteration": 2,
        "sample": 2,
        "key": "2",
    }


def test_what_makes_no_pair_is_counted_and_an_answer_that_ended_at_once_makes_one() -> None:
    groups = [
        group(("real", "stop"), ("real", "length"), ("", "error"), ("", "stop"), (" real", "stop")),
        Group(({"role": "user", "content": "R"},), (), "too_long"),
    ]
    rows = pairs(groups, ["real", "other"])
    assert [row["rejected"][0]["content"] for row in rows] == ["", " real"]
    counts = drops(groups, ["real", "other"])
    assert counts == {"answers.equal": 1, "answers.truncated": 1, "answers.error": 1, "prompts.too_long": 1}
    assert len(rows) + sum(count for why, count in counts.items() if why.startswith("answers.")) == 5
    assert metrics(groups, ["real", "other"]) == {"truncated": 0.2, "equal": 0.2}


def test_no_pair_is_an_error_that_says_why() -> None:
    with pytest.raises(StageError, match=r"answers\.equal: 2.*nothing to learn"):
        pairs([group(("real", "stop"), ("real", "stop"))], ["real"])


def test_the_datas_answer_is_a_text_or_one_turn() -> None:
    assert real_answers(ROWS) == ["An apple.", "Yes, nearly a sphere."]
    wrong = [{"completion": ""}, {"completion": [{"role": "user", "content": "Hi"}]}, {"prompt": "only"}]
    with pytest.raises(ConfigError) as caught:
        real_answers([ROWS[0], *wrong], "data")
    assert [one.path for one in caught.value.problems] == ["data: row 1", "data: row 2", "data: row 3"]


# 3.2: the closed form and what it says


def test_iterating_the_closed_form_gives_the_published_behaviour() -> None:
    """Total variation to the data from 0.494: beta 1 arrives, 5 approaches, 0.5 comes back, 0.1 collapses."""
    data, start = [0.5, 0.3, 0.15, 0.05], [0.05, 0.15, 0.3, 0.5]

    def distances(beta: float, count: int) -> list[float]:
        p, found = start, []
        for _ in range(count):
            p = optimum(p, data, beta)
            found.append(sum(abs(a - b) for a, b in zip(p, data, strict=True)) / 2)
        return found

    assert distances(1.0, 1) == [pytest.approx(0, abs=1e-12)]
    five = distances(5.0, 3)
    assert five[0] > five[1] > five[2]
    half = distances(0.5, 2)
    assert half[1] == pytest.approx(0.6, abs=1e-9)  # where it started: it oscillates for ever
    assert distances(0.1, 2)[1] > 0.9 or math.isclose(distances(0.1, 2)[1], 1, abs_tol=0.1)


def test_the_log_ratio_to_the_data_contracts_by_one_minus_one_over_beta() -> None:
    p, data = [0.1, 0.2, 0.7], [0.5, 0.3, 0.2]
    for beta in (0.7, 1.0, 2.0, 5.0):
        after = optimum(p, data, beta)
        before = [math.log(a / b) for a, b in zip(p, data, strict=True)]
        ratio = [math.log(a / b) for a, b in zip(after, data, strict=True)]
        spread, spread_before = ratio[0] - ratio[1], before[0] - before[1]  # without the normaliser
        assert spread == pytest.approx(contraction(beta) * spread_before, abs=1e-12)


def test_many_steps_at_a_large_rate_are_told_only_below_one_half() -> None:
    assert overtrained(0.1, 1e-4, 200, False)
    assert not overtrained(0.1, 5e-7, 1500, False)
    assert not overtrained(0.1, 1e-4, 200, True)  # an adapter's rate is ten times that
    assert not overtrained(0.5, 1e-2, 10_000, False)


# 3.4, test 1: the loss


def completion_logps(model: Any, batch: Any) -> torch.Tensor:
    with torch.no_grad():
        logps = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.log_softmax(-1)
    picked = logps[:, :-1].gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1)
    return (picked * batch["completion_mask"][:, 1:]).sum(-1)


def test_the_loss_is_the_logistic_loss_of_the_ratios_and_ln_2_at_the_start(
    tmp_path: Path, tiny_model_path: str
) -> None:
    trainer = SelfPlayTrainer(tiny_model_path, config(tmp_path, beta=0.3, learning_rate=1e-2), ROWS)
    batch = trainer.data_collator([trainer.train_dataset[row] for row in range(len(trainer.train_dataset))])
    trainer.model.eval()
    with torch.no_grad():
        assert float(trainer.compute_loss(trainer.model, dict(batch))) == pytest.approx(math.log(2), abs=1e-6)
    reference = completion_logps(AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype="float32"), batch)
    trainer.train()
    trainer.model.eval()
    with torch.no_grad():
        loss = float(trainer.compute_loss(trainer.model, dict(batch)))
    real, own = (completion_logps(trainer.model, batch) - reference).chunk(2)
    expected = -torch.nn.functional.logsigmoid(0.3 * (real - own)).mean()
    assert loss == pytest.approx(float(expected), abs=1e-5)
    assert loss < math.log(2)


# 3.4, tests 2 and 3


def test_the_prompt_of_the_opponent_is_the_prompt_of_training(tmp_path: Path, tiny_model_path: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)
    trainer = SelfPlayTrainer(tiny_model_path, config(tmp_path), ROWS, processing_class=tokenizer)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path)
    from stagekit.requests import Sampling

    generator = TransformersGenerator(model, tokenizer, Sampling(), "same")
    asked = [generator.prompt_ids(row["prompt"]) for row in trainer.pairs]
    assert [row["prompt_ids"] for row in trainer.train_dataset] == asked
    records = {record["key"]: record for record in records_of(tmp_path / "out" / "journal.jsonl")}
    for pair, row in zip(trainer.pairs, trainer.train_dataset, strict=True):
        assert records[pair["key"]]["n_prompt"] == len(row["prompt_ids"])


def test_each_iteration_plays_against_the_model_of_the_one_before(tmp_path: Path, tiny_model_path: str) -> None:
    from stagekit.counters import digest_of
    from stagekit.fingerprints import tokenizer_fingerprint, weights_fingerprint

    settings = config(tmp_path)
    player = self_play(tiny_model_path, settings, ROWS, iterations=3)
    starts = [tiny_model_path, *(str(tmp_path / f"out/iteration-{number}/policy") for number in (1, 2))]
    tokenizer = tokenizer_fingerprint(AutoTokenizer.from_pretrained(tiny_model_path))
    for number, start in enumerate(starts, start=1):
        model = AutoModelForCausalLM.from_pretrained(start, dtype="float32")
        print_ = digest_of(weights_fingerprint(model), tokenizer, 1.0, "None")
        records = records_of(tmp_path / f"out/iteration-{number}/journal.jsonl")
        assert {record["model"] for record in records} == {print_}
        assert {record["round"] for record in records} == {number}
    assert player == str(tmp_path / "out/iteration-3/policy")
    again = (tmp_path / "out/iteration-1/journal.jsonl").stat().st_mtime_ns
    assert self_play(tiny_model_path, settings, ROWS, iterations=3) == player
    assert (tmp_path / "out/iteration-1/journal.jsonl").stat().st_mtime_ns == again


def test_the_pairs_of_the_iteration_before_are_learnt_too(
    tmp_path: Path, tiny_model_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []
    original = SelfPlayTrainer.__init__

    def watching(self: Any, *arguments: Any, **named: Any) -> None:
        original(self, *arguments, **named)
        seen.append((len(self.pairs), len(self.train_dataset)))

    monkeypatch.setattr(SelfPlayTrainer, "__init__", watching)
    self_play(tiny_model_path, config(tmp_path), ROWS, iterations=2)
    self_play(tiny_model_path, config(tmp_path / "alone"), ROWS, iterations=2, mix_previous=False)
    assert seen[1][1] == seen[0][0] + seen[1][0]
    assert seen[3][1] == seen[3][0]


# 3.4, tests 4 and 5: one-token answers, where everything is known


class Drawn(ScriptedGenerator):
    """Answers with words in exact proportion: the n-th sample of a prompt is the n-th word of a list."""

    def __init__(self, words: list[str], model: Any) -> None:
        super().__init__(lambda messages: "", f"drawn {words}")
        self.words = words

    def generate(self, requests: Any, seed: int) -> list[Completion]:
        chosen = [self.words[int(request.key.rpartition("-")[2])] for request in requests]
        return [Completion(word, (0,), "stop", 3) for word in chosen]


def played(tmp_path: Path, model: Any, tokenizer: Any, data: list[str], own: list[str], **changes: Any) -> Any:
    """A trainer on all pairs of the words `data` with the words `own`, as one batch."""
    rows = [{"prompt": PROMPT, "completion": [{"role": "assistant", "content": word}]} for word in data]
    settings = config(
        tmp_path, responses_per_prompt=len(own), per_device_train_batch_size=16, lr_scheduler_type="cosine",
        warmup_steps=5, **changes,
    )  # fmt: skip
    return SelfPlayTrainer(model, settings, rows, tokenizer, opponent=Drawn(own, model))


def distance(p: list[float], q: list[float]) -> float:
    return sum(abs(a - b) for a, b in zip(p, q, strict=True)) / 2


# Three answers: the data are 2 : 1 : 1, the player 1 : 1 : 2. Equal pairs are left out, as their gradient is zero.
DATA, PLAYER = ["A", "A", "B", "C"], ["A", "B", "C", "C"]


@pytest.mark.slow
@pytest.mark.parametrize(("beta", "steps", "rate"), [(1.0, 150, 2e-3), (5.0, 150, 1e-3)])
def test_an_iteration_trained_to_its_optimum_ends_at_the_closed_form(
    beta: float, steps: int, rate: float, tmp_path: Path, tiny_model: Any, tiny_tokenizer: Any
) -> None:
    fit(tiny_model, tiny_tokenizer, torch.tensor([0.25, 0.25, 0.5, 0.0]))
    start = answer_probabilities(tiny_model, tiny_tokenizer)[:3].tolist()
    assert distance(start, [0.25, 0.25, 0.5]) < 0.02
    trainer = played(
        tmp_path, tiny_model, tiny_tokenizer, DATA, PLAYER, beta=beta, max_steps=steps, learning_rate=rate
    )
    trainer.train()
    found = answer_probabilities(trainer.model, tiny_tokenizer)[:3]
    found = (found / found.sum()).tolist()
    data = [0.5, 0.25, 0.25]
    start = [share / sum(start) for share in start]
    assert distance(found, optimum(start, data, beta)) <= 0.02
    before = math.log(start[0] / data[0]) - math.log(start[2] / data[2])
    after = math.log(found[0] / data[0]) - math.log(found[2] / data[2])
    assert after / before == pytest.approx(contraction(beta), abs=0.03 if beta == 5 else 0.05)


def largest_gradient(trainer: Any, rows: list[Any]) -> float:
    trainer.model.zero_grad()
    trainer.compute_loss(trainer.model, dict(trainer.data_collator(rows))).backward()
    gradients = [float(p.grad.abs().max()) for p in trainer.model.parameters() if p.grad is not None]
    trainer.model.zero_grad()
    return max(gradients)


@pytest.mark.slow
def test_a_player_that_is_the_data_stays_there(tmp_path: Path, tiny_model: Any, tiny_tokenizer: Any) -> None:
    fit(tiny_model, tiny_tokenizer, torch.tensor([0.5, 0.25, 0.25, 0.0]))
    trainer = played(tmp_path, tiny_model, tiny_tokenizer, DATA, DATA, beta=1.0, max_steps=40)
    rows = list(trainer.train_dataset)
    alone = largest_gradient(trainer, rows[:1])
    assert largest_gradient(trainer, rows) < 1e-3 * alone  # every pair stands beside its mirror image
    start = answer_probabilities(trainer.model, tiny_tokenizer).tolist()
    trainer.train()
    assert distance(answer_probabilities(trainer.model, tiny_tokenizer).tolist(), start) < 0.02


def test_the_one_token_prompt_is_that_of_the_trainer(tmp_path: Path, tiny_model: Any, tiny_tokenizer: Any) -> None:
    trainer = played(tmp_path, tiny_model, tiny_tokenizer, ["A"], ["B"], max_steps=1)
    [row] = list(trainer.train_dataset)
    ids = tiny_tokenizer.convert_tokens_to_ids(list(WORDS))
    assert (row["prompt_ids"], row["chosen_ids"][0], row["rejected_ids"][0]) == (asked_ids(tiny_tokenizer), *ids[:2])
    assert row["chosen_ids"][1] == tiny_tokenizer.eos_token_id


# guards and refusals


def test_an_iteration_ends_when_the_margin_is_reached(tmp_path: Path, tiny_model: Any, tiny_tokenizer: Any) -> None:
    trainer = played(tmp_path, tiny_model, tiny_tokenizer, ["A"], ["B"], max_steps=60, learning_rate=5e-3, beta=1.0)
    trainer.add_callback(StopAtMargin(0.5))
    trainer.train()
    logged = [entry["rewards/margins"] for entry in trainer.state.log_history if "rewards/margins" in entry]
    assert trainer.state.global_step < 60
    assert logged[-1] >= 0.5 and all(margin < 0.5 for margin in logged[:-1])


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({"responses_per_prompt": 0}, "responses_per_prompt: 0 gives no pair"),
        ({"temperature": 0.0}, "temperature: at 0.0 all 3 answers are the same"),
        ({"precompute_ref_log_probs": False}, "takes the reference from the disk"),
        ({"sync_ref_model": True}, "sync_ref_model: the reference is the opponent"),
    ],
    ids=["responses", "temperature", "reference", "update"],
)
def test_an_argument_that_cannot_work_is_refused(
    changes: dict[str, Any], wrong: str, tmp_path: Path, tiny_model_path: str
) -> None:
    with pytest.raises(ConfigError, match=wrong):
        SelfPlayTrainer(tiny_model_path, config(tmp_path, **changes), ROWS)


def test_self_play_takes_a_path_iterations_and_no_adapter(
    tmp_path: Path, tiny_model_path: str, tiny_model: Any
) -> None:
    wrong: list[tuple[Any, int, dict[str, Any]]] = [
        (tiny_model, 1, {}),
        (tiny_model_path, 0, {}),
        (tiny_model_path, 1, {"peft_config": 1}),
    ]
    for model, iterations, more in wrong:
        with pytest.raises(ConfigError, match=r"self_play|iterations"):
            self_play(model, config(tmp_path), ROWS, iterations=iterations, **more)


def test_a_run_killed_at_any_batch_goes_on_to_the_same_journal(
    tmp_path: Path, tiny_model_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate, calls = TransformersGenerator.generate, []
    whole = SelfPlayTrainer(tiny_model_path, config(tmp_path / "whole", batch_tokens=120), ROWS)
    lines = [json.dumps(one) for one in records_of(tmp_path / "whole/out/journal.jsonl")]
    batches = (tmp_path / "whole/out/journal.jsonl").read_bytes().count(b'"type": "batch"')
    assert batches >= 2
    for life in range(batches):
        calls.clear()

        def dying(self: TransformersGenerator, requests: Any, seed: int, life: int = life) -> Any:
            if len(calls) == life:
                raise KeyboardInterrupt
            calls.append(seed)
            return generate(self, requests, seed)

        folder = tmp_path / str(life)
        monkeypatch.setattr(TransformersGenerator, "generate", dying)
        with pytest.raises(KeyboardInterrupt):
            SelfPlayTrainer(tiny_model_path, config(folder, batch_tokens=120), ROWS)
        monkeypatch.setattr(TransformersGenerator, "generate", generate)
        again = SelfPlayTrainer(tiny_model_path, config(folder, batch_tokens=120), ROWS)
        assert again.pairs == whole.pairs
        assert sorted(json.dumps(one) for one in records_of(folder / "out/journal.jsonl")) == sorted(lines)
