"""A model that answers one prompt with one of four words: what has a closed form can be tested on it.

An answer is the word, EOS, and the line break that the chat template puts behind it, which trainers learn too.
"""

from typing import Any

import torch


WORDS = ("A", "B", "C", "D")
"""The answers; each is one token."""

PROMPT = [{"role": "user", "content": "Hi"}]


def asked_ids(tokenizer: Any) -> list[int]:
    """The prompt, as it stands before an answer."""
    return list(tokenizer.apply_chat_template(PROMPT, add_generation_prompt=True, return_dict=True)["input_ids"])


def answered(tokenizer: Any) -> tuple[torch.Tensor, int]:
    """(4, T) the prompt with each answer, as a trainer lays it out, and where the answers begin."""
    turns = [[*PROMPT, {"role": "assistant", "content": word}] for word in WORDS]
    ids = [tokenizer.apply_chat_template(one, return_dict=True)["input_ids"] for one in turns]
    return torch.tensor(ids), len(asked_ids(tokenizer))


def answer_logps(model: Any, tokenizer: Any) -> torch.Tensor:
    """(4, 3) log-probabilities of the tokens of each answer."""
    ids, start = answered(tokenizer)
    logps = model(ids).logits[:, start - 1 : -1].double().log_softmax(-1)
    return logps.gather(-1, ids[:, start:, None]).squeeze(-1)


def answer_probabilities(model: Any, tokenizer: Any) -> torch.Tensor:
    """(4,) probabilities of the answers, whole."""
    with torch.no_grad():
        return answer_logps(model, tokenizer).sum(-1).exp()


def fit(model: Any, tokenizer: Any, p: torch.Tensor) -> None:
    """Train the model to give the answers with probability `p`."""
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(200):
        logps = answer_logps(model, tokenizer)
        loss = -(p * logps[:, 0]).sum() - logps[:, 1:].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
