"""An OpenAI-compatible server in a process of its own as generator; vLLM where it is not installed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stagekit import ConfigError, TrainingStage
from stagekit.adapters import Constitutional, RejectionSampling
from stagekit.backends import ServerGenerator, VLLMGenerator
from stagekit.errors import StageError
from stagekit.groups import Generation
from stagekit.requests import Completion, Generator, Request, Sampling
from tests.answers import by_length
from tests.running import run, stage


def log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def asked(*texts: str, tokens: int = 20) -> list[Request]:
    return [Request(f"k{place}", ({"role": "user", "content": text},), tokens) for place, text in enumerate(texts)]


def generator(url: str, **options: Any) -> ServerGenerator:
    return ServerGenerator(url, options.pop("sampling", Sampling(0.7, 0.9)), pause_seconds=0.01, **options)


def test_a_batch_is_answered_in_order_with_a_seed_for_each_request(served: tuple[str, Path]) -> None:
    url, folder = served
    server = generator(url)
    texts = [f"question {number}" for number in range(40)]
    completions = server.generate(asked(*texts), seed=3)
    assert isinstance(server, Generator)
    assert [completion.text.partition(": ")[2] for completion in completions] == texts
    assert {(one.finish_reason, one.prompt_tokens, one.new_tokens) for one in completions} == {("stop", 11, 4)}
    sent = log(folder)
    assert len({one["seed"] for one in sent}) == 40
    assert {(one["model"], one["temperature"], one["top_p"], one["max_tokens"]) for one in sent} == {
        ("tiny", 0.7, 0.9, 20)
    }
    assert "top_k" not in sent[0]
    assert server.generate(asked(*texts), seed=3) == completions
    assert server.generate(asked(*texts), seed=4) != completions


def test_a_cut_answer_is_told_from_one_that_ended(served: tuple[str, Path]) -> None:
    [completion] = generator(served[0]).generate(asked("one two three four", tokens=3), seed=0)
    assert (completion.finish_reason, completion.new_tokens, completion.token_ids) == ("length", 3, ())


def test_a_busy_server_is_asked_again_and_a_dead_one_stops_the_run(served: tuple[str, Path]) -> None:
    url, folder = served
    server = generator(url, retries=3)
    (folder / "busy").write_text("2")
    assert [one.finish_reason for one in server.generate(asked("a"), seed=0)] == ["stop"]
    assert [one["busy"] for one in log(folder)] == [True, True, False]
    (folder / "busy").write_text("99")
    with pytest.raises(StageError, match=r"did not answer in 4 tries \(status 503\).*start again to go on"):
        server.generate(asked("a"), seed=0)
    with pytest.raises(StageError, match="Is the server up"):
        generator("http://127.0.0.1:9/v1", retries=0)


def test_a_conversation_too_long_for_the_server_is_one_answer_less(served: tuple[str, Path]) -> None:
    completions = generator(served[0]).generate(asked("fine", "toolong", "fine"), seed=0)
    assert [completion.finish_reason for completion in completions] == ["stop", "error", "stop"]
    assert completions[1] == Completion("", (), "error", 5)


@pytest.mark.parametrize(
    ("text", "wrong"), [("refuse", "status 422.*no such parameter"), ("odd", "another form than OpenAI's")]
)
def test_what_the_server_does_not_take_stops_with_its_words(text: str, wrong: str, served: tuple[str, Path]) -> None:
    with pytest.raises(StageError, match=wrong):
        generator(served[0]).generate(asked(text), seed=0)


def test_the_key_comes_from_the_environment(served: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    url, folder = served
    generator(url).generate(asked("a"), seed=0)
    monkeypatch.setenv("MY_KEY", "abc")
    generator(url, api_key_variable="MY_KEY", sampling=Sampling(1.0, top_k=5)).generate(asked("a"), seed=0)
    assert [one["key"] for one in log(folder)] == [None, "Bearer abc"]
    assert log(folder)[1]["top_k"] == 5


def test_a_server_of_several_models_must_be_told_which(served: tuple[str, Path]) -> None:
    url, folder = served
    (folder / "models").write_text("small large")
    with pytest.raises(ConfigError, match=r"serves small, large; say which model to ask: URL#MODEL"):
        generator(url)
    assert generator(url, model="large").fingerprint.startswith("server large ")


def test_a_stage_samples_from_a_server(
    served: tuple[str, Path], write_rows: Callable[..., Path], tiny_model_path: str, tmp_path: Path
) -> None:
    url, folder = served
    (folder / "models").write_text("small large")
    data = str(write_rows([{"prompt": "Name a fruit."}, {"prompt": "Is the earth round?"}]))
    one = stage(
        "rs", data, RejectionSampling(reward=by_length, n=3), max_steps=1,
        generation=Generation(backend=f"{url}#large", max_new_tokens=20),
    )  # fmt: skip
    result = run(tiny_model_path, tmp_path / "run", one)["rs"]
    rows = [json.loads(line) for line in result.dataset("selected").read_text().splitlines()]
    assert [row["completion"][0]["content"].partition(": ")[2] for row in rows] == [
        "Name a fruit.", "Is the earth round?",
    ]  # fmt: skip
    assert {sent["model"] for sent in log(folder)} == {"large"} and len(log(folder)) == 6


def test_a_server_answers_and_a_model_criticises(
    served: tuple[str, Path], write_rows: Callable[..., Path], tiny_model_path: str, tmp_path: Path
) -> None:
    data = str(write_rows([{"prompt": "Name a fruit."}]))
    method = Constitutional(rounds=1, critique_model=tiny_model_path, max_critique_tokens=5)
    generation = Generation(backend=served[0], max_new_tokens=200)
    run(tiny_model_path, tmp_path / "run", stage("sl", data, method, max_steps=1, generation=generation))
    lines = [json.loads(line) for line in (tmp_path / "run/01-sl/journal.jsonl").read_text().splitlines()]
    models = {line["record"]["role"]: line["record"]["model"][:6] for line in lines if line["type"] == "record"}
    assert models["initial"] == models["revision"] == "server" != models["critique"]


@pytest.mark.parametrize(
    "method", [{"type": "self_play"}, {"type": "rejection_sampling", "reward": "a:b", "rounds": 2}]
)
def test_a_server_cannot_follow_the_model_from_iteration_to_iteration(method: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"generation\.backend: a server goes on serving the first"):
        TrainingStage(name="s", method=method, training_data="x.jsonl", generation={"backend": "http://host:1/v1"})


def test_a_backend_is_one_of_four_kinds() -> None:
    for backend in ("transformers", "vllm", "http://host:8000/v1#m", "pkg.mod:f"):
        assert Generation(backend=backend).backend == backend
    with pytest.raises(ConfigError, match="the URL of a server"):
        Generation(backend="vlm")


def test_vllm_that_is_not_installed_is_told() -> None:
    with pytest.raises(ConfigError, match="needs the package vllm"):
        VLLMGenerator("model", None, Sampling(), "f")
