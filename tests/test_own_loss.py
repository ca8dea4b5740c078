"""A loss of the user's own: in the place of TRL's, the same under accumulation, in evaluations, with an adapter."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from stagekit import Callbacks, ConfigError, Generation, LoRA, StageError, TrainingStage
from tests.running import lines, run, same, stage


Write = Callable[..., Path]
SEEN: list[Any] = []


@pytest.fixture
def rows(write_rows: Write, sft_rows: list[Any]) -> str:
    SEEN.clear()
    return str(write_rows(sft_rows))


def tokens(outputs: Any, labels: Any) -> torch.Tensor:
    """The sum of the tokens' losses."""
    logits = outputs.logits[:, :-1].float()
    return cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")


def by_items(outputs: Any, labels: Any, num_items: Any) -> torch.Tensor:
    """TRL's own loss, written by a user."""
    SEEN.append(num_items)
    return tokens(outputs, labels) / ((labels[:, 1:] != -100).sum() if num_items is None else num_items)


def by_batch(outputs: Any, labels: Any, num_items: Any) -> torch.Tensor:
    """A mean over the batch that looks at no number of items."""
    return tokens(outputs, labels) / (labels[:, 1:] != -100).sum()


def by_both(outputs: Any, labels: Any, num_items: Any) -> torch.Tensor:
    return by_items(outputs, labels, num_items) + outputs.logits.float().pow(2).mean()


def ten_times(outputs: Any, labels: Any, num_items: Any) -> torch.Tensor:
    return 10 * by_items(outputs, labels, num_items)


@pytest.mark.parametrize("lora", [None, LoRA(rank=4, alpha=8, dropout=0)], ids=["full", "lora"])
def test_trl_s_loss_written_by_a_user_trains_as_trl_does(
    lora: Any, rows: str, tiny_model_path: str, tmp_path: Path
) -> None:
    options: dict[str, Any] = {
        "validation_data": rows, "evaluation_steps": 4, "gradient_accumulation_steps": 2, "lora": lora,
        "metrics_to_track": ("loss", "accuracy"), "learning_rate": 1e-3,
    }  # fmt: skip
    plain = run(tiny_model_path, tmp_path / "plain", stage("s", rows, **options))
    own = run(tiny_model_path, tmp_path / "own", stage("s", rows, custom_loss_function=by_items, **options))
    assert None in SEEN, "in evaluations there is no number of items"
    first, second = lines(tmp_path / "plain/01-s"), lines(tmp_path / "own/01-s")
    assert [sorted(line) for line in first] == [sorted(line) for line in second]
    for one, other in zip(first, second, strict=True):
        assert other == pytest.approx(one, rel=1e-4, abs=1e-6)
    assert own["s"].metrics["eval_loss"] == pytest.approx(plain["s"].metrics["eval_loss"], rel=1e-4)


@pytest.mark.parametrize("function", [by_items, by_batch], ids=["by items", "by batch"])
def test_t12_accumulated_batches_have_the_gradient_of_one(
    function: Any, sft_rows: list[Any], write_rows: Write, tiny_model_path: str, tmp_path: Path
) -> None:
    """Trap T12: with a mean over the batch the gradient would be the number of batches too long."""
    data = str(write_rows([sft_rows[0]] * 16))  # of one length, so that both means are the same
    norms = []
    for size, batches in ((16, 1), (4, 4)):
        options = {"batch_size": size, "gradient_accumulation_steps": batches, "max_gradient_norm": 1e9}
        only = stage("s", data, custom_loss_function=function, log_gradient_norms=True, max_steps=1, **options)
        run(tiny_model_path, tmp_path / str(size), only)
        (first, _) = lines(tmp_path / f"{size}/01-s")
        norms.append((first["grad_norm"], first["loss"]))
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_a_mean_over_the_batch_is_averaged_over_the_batches(rows: str, tiny_model_path: str, tmp_path: Path) -> None:
    """On rows of different lengths: the mean of the means, where TRL's is the mean over all tokens."""
    found = {}
    for function in (by_items, by_batch):
        options = {"batch_size": 1, "gradient_accumulation_steps": 16, "max_steps": 1}
        folder = tmp_path / function.__name__
        run(tiny_model_path, folder, stage("s", rows, custom_loss_function=function, **options))
        found[function.__name__] = lines(folder / "01-s")[0]["loss"]
    assert found["by_batch"] == pytest.approx(found["by_items"], rel=0.1)
    assert found["by_batch"] != pytest.approx(found["by_items"], rel=1e-4)


def test_a_loss_that_is_half_by_items_cannot_be_accumulated(rows: str, tiny_model_path: str, tmp_path: Path) -> None:
    only = stage("s", rows, custom_loss_function=by_both, gradient_accumulation_steps=2, max_steps=1)
    with pytest.raises(StageError, match=r"stage 's': custom_loss_function: with twice the num_items .* or none"):
        run(tiny_model_path, tmp_path / "a", only)
    alone = stage("s", rows, custom_loss_function=by_both, max_steps=1)
    assert run(tiny_model_path, tmp_path / "b", alone)["s"].steps == 1


def test_a_loss_that_is_no_loss_is_told(rows: str, tiny_model_path: str, tmp_path: Path) -> None:
    only = stage("s", rows, custom_loss_function=lambda outputs, labels, num_items: outputs.logits, max_steps=1)
    with pytest.raises(StageError, match="custom_loss_function returned a tensor of shape"):
        run(tiny_model_path, tmp_path / "a", only)
    only = stage("s", rows, custom_loss_function=lambda outputs, labels, num_items: 1.0, max_steps=1)
    with pytest.raises(StageError, match=r"custom_loss_function returned 1\.0; it returns a loss"):
        run(tiny_model_path, tmp_path / "b", only)


def answer(messages: Any) -> str:
    return f"It is {len(messages)}."


def test_a_constitutional_stage_takes_a_loss_too(
    sft_rows: list[Any], write_rows: Write, tiny_model_path: str, tmp_path: Path
) -> None:
    data = str(write_rows([{"prompt": row["prompt"]} for row in sft_rows[:4]]))
    options: dict[str, Any] = {"generation": Generation(backend=answer), "max_steps": 1, "batch_size": 1}
    first = run(tiny_model_path, tmp_path / "a", stage("s", data, "constitutional", **options))
    options["custom_loss_function"] = ten_times
    second = run(tiny_model_path, tmp_path / "b", stage("s", data, "constitutional", **options))
    assert second["s"].metrics["train_loss"] == pytest.approx(10 * first["s"].metrics["train_loss"], rel=1e-4)


def test_a_perplexity_is_not_told_of_a_loss_that_is_no_likelihood(
    rows: str, tiny_model_path: str, tmp_path: Path
) -> None:
    only = stage("s", rows, custom_loss_function=ten_times, max_steps=1, validation_data=rows)
    found = run(tiny_model_path, tmp_path, only)["s"].metrics
    assert "eval_loss" in found
    assert "eval_perplexity" not in found


def test_other_types_and_a_loss_of_trl_beside_it_are_refused() -> None:
    def told(**options: Any) -> dict[str, str]:
        with pytest.raises(ConfigError) as caught:
            TrainingStage(**{"name": "s", "training_data": "r", "custom_loss_function": "a.b:c", **options})
        return {problem.path: problem.message for problem in caught.value.problems}

    assert told(method="dpo") == {
        "custom_loss_function": "has no effect here: stage type 'dpo' defines its loss itself; "
        "sft and constitutional take one of yours"
    }
    assert told(trl={"loss_type": "dft"}) == {"trl.loss_type": "has no effect with custom_loss_function"}
    assert list(told(metrics_to_track=["perplexity"], validation_data="v")) == ["metrics_to_track"]
    best = {"save_only_best": True, "validation_data": "v", "best_checkpoint_metric": "perplexity"}
    assert list(told(**best)) == ["best_checkpoint_metric"]


def test_the_loss_is_the_same_bits_whether_it_is_watched_or_not(
    rows: str, tiny_model_path: str, tmp_path: Path
) -> None:
    watched = Callbacks(on_batch_complete=lambda step, loss: None)
    first = run(tiny_model_path, tmp_path / "a", stage("s", rows))
    second = run(tiny_model_path, tmp_path / "b", stage("s", rows, callbacks=watched))
    assert same(str(first.policy), str(second.policy))
