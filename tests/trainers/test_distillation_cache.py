"""A teacher's answers kept on disk: the online teacher to the bit, smaller with fewer tokens, hashed, shared."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from stagekit.distillation_losses import soften
from stagekit.errors import ConfigError
from stagekit.trainers import distillation_cache
from stagekit.trainers.distillation import DistillationTrainer
from stagekit.trainers.distillation_cache import Targets, open_cache, top_k, write_cache
from tests.trainers.distilling import batch, builder, loss_of, losses, model, tokenizer


@pytest.fixture
def rows(sft_rows: list[Any]) -> Dataset:
    return Dataset.from_list(sft_rows)


@pytest.fixture
def build(tiny_model_path: str, rows: Dataset, tmp_path: Path) -> Callable[..., DistillationTrainer]:
    return builder(tiny_model_path, rows, tmp_path)


def test_a_cache_of_the_whole_distribution_is_the_teacher_to_the_bit(
    build: Any, tiny_model_path: str, tmp_path: Path
) -> None:
    """Rows in their order, so that the cache is written in the batches that are trained on."""
    given = {"alpha": 0.8, "temperature": 3.0, "train_sampling_strategy": "sequential", "max_steps": 4}
    online = build(model(tiny_model_path, 1), **given)
    online.train()
    cached = build(model(tiny_model_path, 1), teacher_cache=str(tmp_path / "cache"), cache_top_k=960, **given)
    assert cached.teacher is None
    cached.train()
    assert losses(cached) == losses(online)
    for (name, one), (_, other) in zip(cached.model.named_parameters(), online.model.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    assert cached.evaluate()["eval_loss"] == pytest.approx(online.evaluate()["eval_loss"], rel=1e-6)


def test_with_more_tokens_kept_the_divergence_rises_to_the_full_one(
    build: Any, tiny_model_path: str, tmp_path: Path
) -> None:
    found = []
    for k in (1, 8, 64, 959, 960):
        trainer = build(model(tiny_model_path, 1), alpha=1.0, teacher_cache=str(tmp_path / "cache"), cache_top_k=k)
        found.append(loss_of(trainer, batch(trainer), 100))
    assert found[0] > 0
    assert found[:4] == sorted(found[:4])
    assert found[3] == pytest.approx(found[4], rel=1e-5)
    assert found[0] < 0.9 * found[4]


def test_the_cache_is_written_once_and_shared_by_a_sweep(
    build: Any, tiny_model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    original = DistillationTrainer._teacher_states
    monkeypatch.setattr(
        DistillationTrainer, "_teacher_states", lambda *given: asked.append(1) or original(*given)  # type: ignore[func-returns-value]
    )  # fmt: skip
    teacher = str(tmp_path / "teacher")
    model(tiny_model_path, 1).save_pretrained(teacher)
    tokenizer(tiny_model_path).save_pretrained(teacher)
    cache = {"teacher_cache": str(tmp_path / "cache"), "cache_top_k": 16}
    first = build(teacher, **cache, num_train_epochs=2, max_steps=-1)
    assert len(asked) == 4  # 16 rows, four at a time; the evaluation's rows are the same, and so is their cache
    first.train()
    for changes in ({"alpha": 0.9}, {"learning_rate": 1e-4}, {"divergence": "reverse_kl"}, {"seed": 5}):
        build(teacher, **cache, **changes).train()
    assert len(asked) == 4
    build(teacher, **cache, temperature=1.0)
    assert len(asked) == 8  # softened otherwise
    build(teacher, **{**cache, "cache_top_k": 17})
    assert len(asked) == 12
    model(tiny_model_path, 2).save_pretrained(teacher)
    again = build(teacher, **cache)
    assert len(asked) == 16  # another teacher under the same name
    other = Dataset.from_list([{"text": "What is this?"}])
    assert again.evaluate(other)["eval_loss"] > 0  # rows that were never kept: the teacher is loaded and asked
    assert len(asked) == 17


def test_a_cache_that_is_damaged_is_written_again(build: Any, tiny_model_path: str, tmp_path: Path) -> None:
    cache = {"teacher_cache": str(tmp_path / "cache"), "cache_top_k": 4, "alpha": 1.0}
    trainer = build(model(tiny_model_path, 1), **cache)
    found = loss_of(trainer, batch(trainer), 100)
    (folder,) = (tmp_path / "cache").iterdir()
    file = folder / "00000.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-4] + b"\x00\x00\x80\x40")
    with pytest.warns(UserWarning, match="is damaged: a checksum is wrong; the teacher is asked again"):
        again = build(model(tiny_model_path, 1), **cache)
    assert loss_of(again, batch(again), 100) == found
    assert file.read_bytes() == whole
    (folder / "index.json").write_text("{")
    with pytest.warns(UserWarning, match="cannot be read"):
        build(model(tiny_model_path, 1), **cache)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda index: {**index, "rows": 7}, "is damaged: a checksum is wrong"),
        (lambda index: {**index, "shards": [{**index["shards"][0], "first_row": 1}]}, "is damaged"),
        (lambda index: {**index, "key": "another teacher's"}, "is damaged"),
        (lambda index: {name: value for name, value in index.items() if name != "sha256"}, "cannot be read"),
        (lambda index: [index], "cannot be read"),
        (lambda index: None, "cannot be read"),
    ],
    ids=["rows", "offsets", "foreign", "no checksum", "list", "null"],
)
def test_an_index_that_is_changed_is_never_believed(change: Any, words: str, tmp_path: Path) -> None:
    rows = [Targets(None, torch.zeros(3, 4)), Targets(None, torch.ones(2, 4))]
    write_cache(tmp_path, {"a": 1}, rows, 4)
    assert open_cache(tmp_path, {"a": 1}) is not None
    (file,) = tmp_path.rglob("index.json")
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    with pytest.warns(UserWarning, match=words):
        assert open_cache(tmp_path, {"a": 1}) is None
    write_cache(tmp_path, {"a": 1}, rows, 4)
    assert open_cache(tmp_path, {"a": 1}) is not None


def test_a_cache_under_another_s_name_or_cut_short_is_not_used(tmp_path: Path) -> None:
    write_cache(tmp_path, {"a": 1}, [Targets(None, torch.zeros(3, 4))], 4)
    write_cache(tmp_path, {"a": 2}, [Targets(None, torch.ones(3, 4))], 4)
    ours, theirs = (distillation_cache._place(tmp_path, {"a": number})[0] for number in (1, 2))
    shutil.rmtree(ours)
    shutil.copytree(theirs, ours)
    with pytest.warns(UserWarning, match="is damaged"):
        assert open_cache(tmp_path, {"a": 1}) is None
    file = theirs / "00000.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.warns(UserWarning, match="is damaged"):
        assert open_cache(tmp_path, {"a": 2}) is None
    file.unlink()
    with pytest.warns(UserWarning, match="cannot be read"):
        assert open_cache(tmp_path, {"a": 2}) is None


@pytest.mark.parametrize(("vocabulary", "most"), [(960, 388), (100_000, 452)])
def test_a_token_takes_at_most_512_bytes_at_the_top_64(vocabulary: int, most: int, tmp_path: Path) -> None:
    logps = soften(torch.randn(50, vocabulary, generator=torch.Generator().manual_seed(0)), 1.0)
    kept = top_k(logps, 64)
    rows = [kept.at(part, logps.device) for part in (slice(0, 20), slice(20, 50))]
    cache = write_cache(tmp_path, {"a": 1}, rows, vocabulary)
    (file,) = tmp_path.rglob("*.safetensors")
    assert file.stat().st_size / 50 < most + 20  # and a header
    for numbers, wanted in (([0], [*range(20)]), ([1, 0], [*range(20, 50), *range(20)])):
        read = cache.read(numbers)
        assert read.ids is not None and kept.ids is not None
        assert torch.equal(read.ids, kept.ids[wanted])
        assert torch.equal(read.logps, kept.logps[wanted])


def test_many_files_are_one_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distillation_cache, "SHARD_TOKENS", 10)
    rows = [Targets(None, torch.full((length, 3), float(number))) for number, length in enumerate([4, 7, 0, 12, 3])]
    write_cache(tmp_path, {"a": 1}, iter(rows), 3)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 3
    found = open_cache(tmp_path, {"a": 1})
    assert found is not None and found.rows == 5
    assert found.read([4, 1, 2, 0, 3]).logps[:, 0].tolist() == [4.0] * 3 + [1.0] * 7 + [0.0] * 4 + [3.0] * 12
    assert open_cache(tmp_path, {"a": 2}) is None


@pytest.mark.parametrize("packing", [False, True])
def test_a_cache_serves_rows_that_are_packed_into_one(
    packing: bool, build: Any, tiny_model_path: str, rows: Dataset, tmp_path: Path
) -> None:
    """Padding-free batches, and rows packed to one length: the cached teacher is the online one."""
    given: dict[str, Any] = {
        "padding_free": True,
        "max_length": None,
        "train_sampling_strategy": "sequential",
        "max_steps": 3,
    }
    if packing:
        given.update(packing=True, packing_strategy="bfd", max_length=64)
    online = build(model(tiny_model_path, 1), **given)
    online.train()
    cached = build(model(tiny_model_path, 1), teacher_cache=str(tmp_path / "cache"), cache_top_k=960, **given)
    cached.train()
    assert losses(cached) == losses(online)


def test_a_cache_has_no_hidden_states_and_needs_rows_with_numbers(
    build: Any, tiny_model_path: str, rows: Dataset, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="teacher_cache: keeps no hidden states"):
        build(model(tiny_model_path, 1), teacher_cache=str(tmp_path), match_hidden_states=True)
    with pytest.raises(ConfigError, match="teacher_cache: the train data is a IterableDataset"):
        build(model(tiny_model_path, 1), teacher_cache=str(tmp_path), data=rows.to_iterable_dataset())
