"""The next-token probabilities of a transformers model, for judging: one forward pass of a left-padded batch."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from transformers import GenerationConfig

from stagekit.choices import Choice, Question
from stagekit.errors import ConfigError
from stagekit.generation import TransformersGenerator, generating
from stagekit.requests import Message


class ModelChooser:
    """A model in memory as a judge; prompts go through its chat template, as for generation.

    The choices are tokenised as the template writes them at the start of an answer. Tokens that both begin with are
    read with the prompt, so "(A)" and "(B)" are told apart by their letters.
    """

    def __init__(self, generator: TransformersGenerator) -> None:
        """Ask the generator's model."""
        self._generator = generator
        self._tokens: dict[tuple[str, str], tuple[list[int], int, int]] = {}
        self.fingerprint = f"choices {generator.fingerprint}"
        self.context_length = generator.context_length

    def prompt_length(self, messages: Sequence[Message]) -> int:
        """How many tokens `messages` take, with the generation prompt."""
        return self._generator.prompt_length(messages)

    @torch.no_grad()
    def choose(self, questions: Sequence[Question]) -> list[Choice]:
        """Answer one batch, in the order of the questions.

        Raises:
            ConfigError: the choices do not differ at any token.
        """
        if not questions:
            return []
        model = self._generator.model
        device = next(model.parameters()).device
        ids = [self._generator.prompt_ids(question.messages) for question in questions]
        lengths = [len(one) for one in ids]
        told = [self._telling(question, prompt) for question, prompt in zip(questions, ids, strict=True)]
        ids = [prompt + shared for prompt, (shared, _, _) in zip(ids, told, strict=True)]
        width = max(map(len, ids))
        input_ids = torch.tensor([[0] * (width - len(one)) + one for one in ids], device=device)
        mask = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in ids], device=device)
        autocast = self._generator.autocast_dtype
        precision: Any = torch.autocast(device.type, dtype=autocast) if autocast is not None else nullcontext()
        with generating(model, GenerationConfig()), precision:
            logits = _last_logits(model, input_ids, mask)
        found = logits.log_softmax(-1)
        pairs = found.gather(1, torch.tensor([[first, second] for _, first, second in told], device=device))
        probabilities = pairs.softmax(-1)[:, 0].tolist()
        masses = pairs.exp().sum(-1).tolist()
        return [Choice(*one) for one in zip(probabilities, masses, lengths, strict=True)]

    def _telling(self, question: Question, prompt: list[int]) -> tuple[list[int], int, int]:
        """The tokens that both choices begin with, and the first ones that tell them apart; the same after every
        prompt, since all of them end with the generation prompt."""
        if question.choices not in self._tokens:
            first, second = (self._answer_ids(question, prompt, choice) for choice in question.choices)
            same = next((place for place, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), None)
            if same is None:
                raise ConfigError(f"the choices {question.choices} begin with the same tokens; give others")
            self._tokens[question.choices] = first[:same], first[same], second[same]
        return self._tokens[question.choices]

    def _answer_ids(self, question: Question, prompt: list[int], choice: str) -> list[int]:
        """The choice as the template writes it after the generation prompt, or by itself where the template writes
        answers otherwise than it asks for them."""
        tokenizer = self._generator.tokenizer
        messages = [*question.messages, {"role": "assistant", "content": choice}]
        whole = list(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"])
        if whole[: len(prompt)] == prompt and len(whole) > len(prompt):
            return whole[len(prompt) :]
        return list(tokenizer(choice, add_special_tokens=False)["input_ids"])


def _last_logits(model: Any, input_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The logits (B, V) after the last token of left-padded rows (B, T), in float32."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    last_only = {"logits_to_keep": 1} if base._supports_logits_to_keep() else {}
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    output = model(input_ids=input_ids, attention_mask=mask, position_ids=positions, use_cache=False, **last_only)
    logits: torch.Tensor = output.logits[:, -1].float()
    return logits
