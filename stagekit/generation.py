"""Text generation with a transformers model, in left-padded batches, leaving no trace on the model or on the RNG."""

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from stagekit.decoding import can_decode, decode
from stagekit.errors import ConfigError
from stagekit.kept import Kept, can_keep
from stagekit.requests import Completion, FinishReason, Message, Request, Sampling


LAID_OUT = 512
"""Conversations whose tokens are remembered: a length is asked for before a text is, and laying out costs time."""


class TransformersGenerator:
    """Writes texts with a causal language model that is in memory.

    The prompt goes through the tokenizer's chat template with a generation prompt, as TRL's trainers do it. The model
    keeps its mode, its cache switch, its checkpointing and its generation config; the caller's random state stays.

    Generation is as fast as the weights' dtype: on CPU a bfloat16 model reads prompts about twice as fast as float32.
    `autocast_dtype` runs float32 weights in that dtype without a second copy on disk.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        sampling: Sampling,
        fingerprint: str,
        autocast_dtype: torch.dtype | None = None,
        on_token: Callable[[int, int, int], None] | None = None,
        templated: bool = True,
    ) -> None:
        """Take a model in memory with its tokenizer; `fingerprint` must name both and the sampling.

        `on_token(rows, tokens, most)` is called after every token of a batch: how many rows the batch has, how many
        tokens each has got, and how many it gets at most. What it raises ends the batch.

        Not `templated`: the one message of a request is a text that is gone on from as it stands.
        """
        if templated and not tokenizer.chat_template:
            raise ConfigError(
                "the tokenizer has no chat template, so prompts cannot be laid out as conversations. Use an instruct "
                "model, or give the tokenizer a template (SFTConfig.chat_template_path, tokenizer.chat_template)."
            )
        self.model = model
        self.tokenizer = tokenizer
        self.sampling = sampling
        self.fingerprint = fingerprint
        self.autocast_dtype = autocast_dtype
        self.on_token = on_token
        self.templated = templated
        self._kept: Kept | None = None
        self._laid_out: dict[Hashable, list[int]] = {}
        self.context_length: int | None = getattr(model.config, "max_position_embeddings", None)

    def prompt_length(self, messages: Sequence[Message]) -> int:
        """How many tokens `messages` take, with the generation prompt."""
        return len(self._known_ids(messages))

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """The token ids that the model is asked to go on from."""
        if not self.templated:
            (text,) = messages
            return list(self.tokenizer(text["content"])["input_ids"])
        encoded = self.tokenizer.apply_chat_template(
            list(messages), tokenize=True, add_generation_prompt=True, return_dict=True
        )
        return list(encoded["input_ids"])

    @contextmanager
    def remembering(self) -> Iterator[None]:
        """While this is open, what was read of a conversation stays in memory and is not read again.

        A model whose cache cannot be cut (a sliding window, a state) reads each turn as a whole.
        """
        self._kept = Kept() if can_decode(self.model) and can_keep(self.model) else None
        try:
            yield
        finally:
            self._kept = None

    def generate(self, requests: Sequence[Request], seed: int) -> list[Completion]:
        """Answer one batch, in the order of the requests; each row is cut at its own `max_new_tokens`."""
        if not requests:
            return []
        prompts = self._prompts_of(requests)
        pad, eos, limits = self._pad_id(), self._eos_ids(), [request.max_new_tokens for request in requests]
        config = self._config(max(limits), pad, eos)
        device = next(self.model.parameters()).device
        with torch.no_grad(), _seeded(seed), self._autocast(device), generating(self.model, config):
            if can_decode(self.model):
                rows = decode(
                    self.model,
                    prompts,
                    limits,
                    sampling=self.sampling,
                    eos=eos,
                    pad=pad,
                    on_token=self.on_token,
                    kept=self._kept,
                    names=[request.conversation for request in requests],
                )
            else:
                rows = self._generate_plainly(prompts, config, device)
        return [
            self._completion(row[:limit], eos, len(ids)) for row, limit, ids in zip(rows, limits, prompts, strict=True)
        ]

    def _prompts_of(self, requests: Sequence[Request]) -> list[list[int]]:
        """The prompts' token ids; a conversation that several requests share is laid out once."""
        known: dict[int, list[int]] = {}
        for request in requests:
            if id(request.messages) not in known:
                known[id(request.messages)] = self._known_ids(request.messages)
        return [known[id(request.messages)] for request in requests]

    def _known_ids(self, messages: Sequence[Message]) -> list[int]:
        """`prompt_ids`, laid out once for the same messages and template while it is among the last ones."""
        key = (self.tokenizer.chat_template, *(tuple(message.items()) for message in messages))
        if key not in self._laid_out:
            if len(self._laid_out) == LAID_OUT:
                del self._laid_out[next(iter(self._laid_out))]
            self._laid_out[key] = self.prompt_ids(messages)
        return self._laid_out[key]

    def _generate_plainly(
        self, prompts: Sequence[Sequence[int]], config: GenerationConfig, device: torch.device
    ) -> list[list[int]]:
        """By transformers' own loop: for models whose state is no cache of keys and values."""
        width, pad = max(len(ids) for ids in prompts), config.pad_token_id
        input_ids = torch.tensor([[pad] * (width - len(ids)) + list(ids) for ids in prompts])
        mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts])
        output = self.model.generate(
            input_ids=input_ids.to(device),
            attention_mask=mask.to(device),
            generation_config=config,
            stopping_criteria=self._heartbeat(width, config.max_new_tokens),
        )
        rows: list[list[int]] = output[:, width:].tolist()
        return rows

    def _heartbeat(self, prompt_width: int, most: int) -> StoppingCriteriaList:
        """Criteria that never stop, but tell how far the batch is."""
        beats = StoppingCriteriaList()
        if self.on_token is not None:
            beats.append(_Heartbeat(self.on_token, prompt_width, most))
        return beats

    def _completion(self, ids: list[int], eos: set[int], prompt_tokens: int) -> Completion:
        end = next((position for position, token in enumerate(ids) if token in eos), None)
        reason: FinishReason = "length" if end is None else "stop"
        kept = tuple(ids[:end])
        return Completion(self.tokenizer.decode(kept, skip_special_tokens=True), kept, reason, prompt_tokens)

    def _config(self, max_new_tokens: int, pad: int, eos: set[int]) -> GenerationConfig:
        sampling = self.sampling
        how: dict[str, Any] = {"do_sample": False}
        if sampling.temperature > 0:
            how = {
                "do_sample": True,
                "temperature": float(sampling.temperature),
                "top_p": float(sampling.top_p),
                "top_k": sampling.top_k,
            }
        return GenerationConfig(
            **how, max_new_tokens=max_new_tokens, use_cache=True, pad_token_id=pad, eos_token_id=sorted(eos) or None
        )

    def _eos_ids(self) -> set[int]:
        declared = self.model.generation_config.eos_token_id
        ids = declared if isinstance(declared, list) else [declared]
        return {token for token in (*ids, self.tokenizer.eos_token_id) if token is not None}

    def _pad_id(self) -> int:
        """Any id will do: padding is masked on the left and cut off on the right."""
        if self.tokenizer.pad_token_id is not None:
            return int(self.tokenizer.pad_token_id)
        return min(self._eos_ids(), default=0)

    def _autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(device.type, dtype=self.autocast_dtype)


class _Heartbeat(StoppingCriteria):  # type: ignore[misc]
    """Called by transformers after every token."""

    def __init__(self, on_token: Callable[[int, int, int], None], prompt_width: int, most: int) -> None:
        self._on_token, self._prompt_width, self._most = on_token, prompt_width, most

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        rows, length = input_ids.shape
        self._on_token(rows, length - self._prompt_width, self._most)
        return torch.zeros(rows, dtype=torch.bool, device=input_ids.device)


@contextmanager
def generating(model: Any, config: GenerationConfig) -> Iterator[None]:
    """Put `model` into the state for generation, and afterwards back into exactly the one it was in.

    Eval mode (no dropout), no checkpointing (it turns the KV cache off), and `config` as the model's own generation
    config: transformers fills what a passed config leaves open from the model's own, so a checkpoint's repetition
    penalty would otherwise take part.
    """
    training = {module: module.training for module in model.modules()}
    checkpointing = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # a PEFT model wraps it
    owners = [owner for owner in (model, base) if "generation_config" in vars(owner)]
    configs = [(owner, owner.generation_config) for owner in owners]
    use_cache = getattr(base.config, "use_cache", None)
    try:
        model.eval()
        for module in checkpointing:
            module.gradient_checkpointing = False
        for owner in owners:
            owner.generation_config = config
        if use_cache is not None:
            base.config.use_cache = True
        yield
    finally:
        if use_cache is not None:
            base.config.use_cache = use_cache
        for owner, original in configs:
            owner.generation_config = original
        for module in checkpointing:
            module.gradient_checkpointing = True
        for module, mode in training.items():
            module.training = mode


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed torch on all devices, and give the caller's random states back afterwards."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
