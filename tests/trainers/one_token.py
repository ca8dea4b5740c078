"""A model that answers one prompt with one of four tokens: what has a closed form can be tested on it."""

from typing import Any

import torch


WORDS = ("A", "B", "C", "D")
"""The answers; each is one token."""
PROMPT = [{"role": "user", "content": "Hi"}]


def asked_ids(tokenizer: Any) -> list[int]:
    return list(tokenizer.apply_chat_template(PROMPT, add_generation_prompt=True, return_dict=True)["input_ids"])


def answer_probabilities(model: Any, tokenizer: Any) -> torch.Tensor:
    """(4,) probabilities of the one-token answers."""
    with torch.no_grad():
        logits = model(torch.tensor([asked_ids(tokenizer)])).logits[0, -1]
    return logits.double().softmax(-1)[tokenizer.convert_tokens_to_ids(list(WORDS))]


def fit(model: Any, tokenizer: Any, p: torch.Tensor) -> None:
    """Train the model to answer with one of WORDS by probability `p`, and then EOS."""
    words = tokenizer.convert_tokens_to_ids(list(WORDS))
    ids = torch.tensor([[*asked_ids(tokenizer), word] for word in words])
    wanted = torch.zeros(len(tokenizer)).index_put((torch.tensor(words),), p.float())
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(150):
        logps = model(ids).logits[:, -2:].log_softmax(-1)
        loss = -(wanted * logps[0, 0]).sum() - logps[:, 1, tokenizer.eos_token_id].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
