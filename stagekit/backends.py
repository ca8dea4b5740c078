"""Generators that are not the model in this process: an OpenAI-compatible server, and vLLM's offline engine.

A server may be vLLM, SGLang, llama.cpp, TGI or any other that answers `POST URL/chat/completions`. Nothing else than
the URL that the user gave is asked, and no proxy or package of a vendor is needed.
"""

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from stagekit.counters import seed_of
from stagekit.errors import ConfigError, StageError
from stagekit.requests import Completion, FinishReason, Message, Request, Sampling


CHARACTERS_PER_TOKEN = 4
"""Of a prompt whose tokens only the server knows: good enough to sort by length."""

_BUSY = {408, 409, 425, 429, 500, 502, 503, 504}


class ServerGenerator:
    """Writes texts by an OpenAI-compatible server.

    Each request has its own seed, so a server that honours seeds answers a resumed run as the first one. A busy or
    broken server is asked again, with growing pauses; what it refuses stops the run, but for a conversation that is
    too long for it: that one answer is an `error`.
    """

    context_length: int | None = None

    def __init__(
        self,
        url: str,
        sampling: Sampling,
        *,
        model: str | None = None,
        api_key_variable: str = "OPENAI_API_KEY",
        parallel: int = 16,
        retries: int = 5,
        pause_seconds: float = 1.0,
        timeout_seconds: float = 600.0,
    ) -> None:
        """Ask the server at `url` (up to and with `/v1`), which must be up.

        Args:
            model: the name under which it serves the model; None: the only one that it lists.
            api_key_variable: environment variable that holds the key, where the server wants one.
            parallel: requests under way at a time.
            retries: times that a request is sent again; the pauses double.

        Raises:
            ConfigError: the server serves several models and none is named.
            StageError: it cannot be reached.
        """
        self.url = url.rstrip("/")
        self.sampling = sampling
        self.parallel, self.retries = parallel, retries
        self.pause_seconds, self.timeout_seconds = pause_seconds, timeout_seconds
        self._key = os.environ.get(api_key_variable)
        self.model = model if model is not None else self._only_model()
        self.fingerprint = f"server {self.model} {sampling}"

    def prompt_length(self, messages: Sequence[Message]) -> int:
        """About how many tokens `messages` take."""
        return sum(4 + len(message["content"]) // CHARACTERS_PER_TOKEN for message in messages)

    def generate(self, requests: Sequence[Request], seed: int) -> list[Completion]:
        """Answer one batch, in the order of the requests."""
        with ThreadPoolExecutor(max_workers=self.parallel) as pool:
            return list(pool.map(lambda request: self._complete(request, seed), requests))

    def _complete(self, request: Request, seed: int) -> Completion:
        body: dict[str, Any] = {
            "model": self.model,
            "messages": list(request.messages),
            "max_tokens": request.max_new_tokens,
            "temperature": self.sampling.temperature,
            "top_p": self.sampling.top_p,
            "seed": seed_of(seed, request.key) % 2**31,
        }
        if self.sampling.top_k > 0:
            body["top_k"] = self.sampling.top_k  # no part of OpenAI's interface, but of most servers'
        answer = self.ask(body)
        if answer is None:
            return Completion("", (), "error", self.prompt_length(request.messages))
        try:
            choice, usage = answer["choices"][0], answer.get("usage") or {}
            text = choice["message"]["content"] or ""
            reason = choice["finish_reason"]
        except (KeyError, IndexError, TypeError) as error:
            raise StageError(
                f"{self.url} answered in another form than OpenAI's chat completions: {json.dumps(answer)[:500]}"
            ) from error
        known: dict[str, FinishReason] = {"stop": "stop", "length": "length"}
        prompt_tokens = usage.get("prompt_tokens", self.prompt_length(request.messages))
        return Completion(text, (), known.get(reason, "error"), prompt_tokens, usage.get("completion_tokens"))

    def ask(self, body: dict[str, Any]) -> Any:
        """The answer to one chat completion; None where the conversation is too long for the server.

        Raises:
            StageError: it refused, or stayed busy.
        """
        status, answer = self._ask("/chat/completions", body)
        if status == 400 and "context" in json.dumps(answer).lower():
            return None
        if status != 200:
            raise StageError(f"{self.url} refused a request with status {status}: {json.dumps(answer)[:500]}")
        return answer

    def _only_model(self) -> str:
        status, answer = self._ask("/models", None)
        names = [one["id"] for one in answer.get("data", [])] if status == 200 else []
        if len(names) != 1:
            have = ", ".join(names) or f"none (status {status})"
            raise ConfigError(f"{self.url} serves {have}; say which model to ask: URL#MODEL")
        return str(names[0])

    def _ask(self, path: str, body: dict[str, Any] | None) -> tuple[int, Any]:
        """Status and answer; a server that is busy or not there is asked again.

        Raises:
            StageError: it stayed so.
        """
        pause = self.pause_seconds
        for attempt in range(self.retries + 1):
            try:
                return self._send(path, body)
            except urllib.error.HTTPError as error:
                if error.code not in _BUSY:
                    return error.code, _json(error.read())
                why = f"status {error.code}"
            except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
                why = str(getattr(error, "reason", error))
            if attempt < self.retries:
                time.sleep(pause)
                pause *= 2
        raise StageError(
            f"{self.url}{path} did not answer in {self.retries + 1} tries ({why}). Is the server up, and the URL "
            "right (up to and with /v1)? All texts so far are in the journal; start again to go on"
        )

    def _send(self, path: str, body: dict[str, Any] | None) -> tuple[int, Any]:
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}{path}", data=data, headers=headers)
        with urllib.request.urlopen(request, timeout=self.timeout_seconds) as answer:
            return int(answer.status), _json(answer.read())


class VLLMGenerator:
    """Writes texts with vLLM's offline engine in this process, with its prefix cache on.

    vLLM is no dependency: it is imported here and needs a GPU. Each request has its own seed.
    """

    def __init__(self, model: str, tokenizer: Any, sampling: Sampling, fingerprint: str, **engine: Any) -> None:
        """Load `model`, a folder or hub id; `tokenizer` lays the prompts out, as everywhere else.

        Args:
            engine: further arguments of `vllm.LLM`, for instance `gpu_memory_utilization`.

        Raises:
            ConfigError: vLLM is not installed.
        """
        try:
            from vllm import LLM
        except ImportError as error:
            raise ConfigError(
                "generation.backend: vllm needs the package vllm, which is not installed; install it, or use "
                "transformers"
            ) from error
        self.tokenizer, self.sampling, self.fingerprint = tokenizer, sampling, fingerprint
        self._engine = LLM(model=model, enable_prefix_caching=True, **engine)
        self.context_length: int | None = self._engine.llm_engine.model_config.max_model_len

    def prompt_length(self, messages: Sequence[Message]) -> int:
        """How many tokens `messages` take, with the generation prompt."""
        return len(self._ids(messages))

    def generate(self, requests: Sequence[Request], seed: int) -> list[Completion]:
        """Answer one batch, in the order of the requests."""
        from vllm import SamplingParams

        how = [
            SamplingParams(
                temperature=float(self.sampling.temperature),
                top_p=float(self.sampling.top_p),
                top_k=self.sampling.top_k or -1,
                max_tokens=request.max_new_tokens,
                seed=seed_of(seed, request.key) % 2**31,
            )
            for request in requests
        ]
        prompts = [{"prompt_token_ids": self._ids(request.messages)} for request in requests]
        outputs = self._engine.generate(prompts, how, use_tqdm=False)
        return [self._completion(output) for output in outputs]

    def _ids(self, messages: Sequence[Message]) -> list[int]:
        encoded = self.tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=True)
        return list(encoded["input_ids"])

    def _completion(self, output: Any) -> Completion:
        [written] = output.outputs
        ids = tuple(written.token_ids)
        ended = written.finish_reason == "stop"
        kept = ids[:-1] if ended and ids else ids
        reason: FinishReason = "stop" if ended else "length" if written.finish_reason == "length" else "error"
        text = self.tokenizer.decode(kept, skip_special_tokens=True)
        return Completion(text, kept, reason, len(output.prompt_token_ids))


def _json(data: bytes) -> Any:
    """What a server said: JSON, or its text."""
    try:
        return json.loads(data)
    except ValueError:
        return {"text": data.decode("utf-8", "replace")}
