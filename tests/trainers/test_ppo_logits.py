"""How many tokens' logits PPO holds at once."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from trl.kernels import chunked_logprob

from stagekit.trainers.logit_tiles import ON_CPU, logit_tiles, tokens_at_once
from tests.trainers.rl import bits, log_of, ppo, prompts


class Rows(TorchDispatchMode):  # type: ignore[misc]
    """The most rows of a number per word of the vocabulary that an operation gave, weights' gradients left out."""

    def __init__(self, words: int, others: set[torch.Size]) -> None:
        super().__init__()
        self.words, self.others, self.most = words, others, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for one in found if isinstance(found, (tuple, list)) else [found]:
            if isinstance(one, torch.Tensor) and one.shape not in self.others and one.shape[-1:] == (self.words,):
                self.most = max(self.most, one.numel() // self.words)
        return found


def trained(path: str, folder: Path, chunk: int | None, **options: Any) -> tuple[Any, int]:
    """A trainer after two steps, and the most tokens whose logits were there at once."""
    trainer = ppo(folder, path, max_steps=2, logit_chunk_size=chunk, **options)
    weight = trainer.model.get_output_embeddings().weight
    with Rows(weight.size(0), {weight.shape, weight.t().shape}) as rows:
        trainer.train()
    return trainer, rows.most


def test_no_more_logits_are_held_than_those_of_the_tokens_that_were_asked_for(
    tiny_model_path: str, tmp_path: Path
) -> None:
    whole, most = trained(tiny_model_path, tmp_path, 4096, rollout_chunk_size=2)
    parts, few = trained(tiny_model_path, tmp_path, 5, rollout_chunk_size=2)
    assert most > 40, "the batch fills no more than a few tiles"
    assert few == 5
    for key in ("loss", "entropy", "objective/kl", "grad_norm", "value/loss"):
        assert log_of(parts, key) == pytest.approx(log_of(whole, key), rel=1e-4, abs=1e-6), key
    for name, tensor in bits(whole.model).items():  # two steps of 1e-3
        torch.testing.assert_close(bits(parts.model)[name], tensor, rtol=1e-3, atol=1e-4)


def test_an_evaluation_holds_no_more(tiny_model_path: str, tmp_path: Path) -> None:
    trainer = ppo(tmp_path, tiny_model_path, logit_chunk_size=5, eval_dataset=prompts(4), rollout_chunk_size=2)
    weight = trainer.model.get_output_embeddings().weight
    with Rows(weight.size(0), {weight.shape, weight.t().shape}) as rows:
        trainer.evaluate()
    assert rows.most == 5


def test_trls_own_number_is_back_after_training_and_after_an_error(tiny_model_path: str, tmp_path: Path) -> None:
    before = chunked_logprob.TOKEN_CHUNK_SIZE
    trained(tiny_model_path, tmp_path, 7)
    assert before == chunked_logprob.TOKEN_CHUNK_SIZE
    with pytest.raises(KeyError), logit_tiles(3):
        assert chunked_logprob.TOKEN_CHUNK_SIZE == 3
        raise KeyError("an error in a step")
    assert before == chunked_logprob.TOKEN_CHUNK_SIZE


def test_unless_told_otherwise_the_cpu_holds_few_and_an_accelerator_what_trl_says() -> None:
    assert tokens_at_once(None, torch.device("cpu")) == ON_CPU
    assert tokens_at_once(None, torch.device("cuda")) == chunked_logprob.TOKEN_CHUNK_SIZE
    assert tokens_at_once(9, torch.device("cuda")) == tokens_at_once(9, torch.device("cpu")) == 9
