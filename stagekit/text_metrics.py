"""Metrics of the answers that a policy writes while it is trained or measured: generated, compared, scored, judged.

Nothing of the training is changed by it: the model's modes, caches and configs, and all random states, are put back.
"""

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch

from stagekit.custom import resolve
from stagekit.errors import StageError
from stagekit.generation import TransformersGenerator
from stagekit.groups import TextMetrics, is_function
from stagekit.job import Job
from stagekit.measures import text_metrics_of
from stagekit.metrics import Judge, bleu, rouge, token_f1, win_rate
from stagekit.options import function_name
from stagekit.reading import context_length
from stagekit.requests import Message, Request, Sampling, plan_batches
from stagekit.rows import as_messages
from stagekit.scorers import FunctionScorer


Score = Callable[[Sequence[Any], Sequence[str]], Sequence[float]]
"""`score(prompts, answers)` gives the reward of each answer."""

SAME = 1e-5
"""Scores this near to each other, relative to the larger one or to 1, are a tie: so much does a score depend on the
batch that it is computed in."""

COMPARED: Mapping[str, Callable[[list[str], list[str]], float]] = {
    "f1_score": token_f1,
    "bleu": bleu,
    "rouge": rouge,
}
"""The metrics of answers and references alone."""


Prompt = str | tuple[Message, ...]
"""A text to go on from, or a conversation to answer."""


class Question(NamedTuple):
    """A prompt of the validation data (row counted from 0) with the answer that is held to be right."""

    row: int
    prompt: Prompt
    reference: str


class TextEvaluation:
    """Asks a model the questions and measures its answers; `plan` first, once, then call it with the model."""

    def __init__(
        self,
        names: Sequence[str],
        questions: Sequence[Question],
        tokenizer: Any,
        *,
        where: str,
        max_new_tokens: int = 128,
        batch_tokens: int = 16384,
        score: Score | None = None,
        judge: Judge | None = None,
        autocast_dtype: Any = None,
        on_batch: Callable[[int, int], None] | None = None,
    ) -> None:
        """Measure `names`, of `measures.TEXT_METRICS`.

        Args:
            names: The metrics; reward_score needs `score`, win_rate `score` or `judge`.
            questions: What is asked, all of them texts or all conversations.
            tokenizer: The model's.
            where: The path of the data, for messages.
            max_new_tokens: Tokens of an answer at most.
            batch_tokens: Padded tokens of a batch at most.
            score: The rewards of answers.
            judge: Who decides between answer and reference; None: the higher score.
            autocast_dtype: As in `TransformersGenerator`.
            on_batch: Called with the number of batches done and of all.
        """
        self.names, self.questions, self.tokenizer, self.where = tuple(names), list(questions), tokenizer, where
        self.max_new_tokens, self.batch_tokens = max_new_tokens, batch_tokens
        self.autocast_dtype, self.on_batch = autocast_dtype, on_batch
        self.prompts = [question.prompt for question in self.questions]
        self.references = [question.reference for question in self.questions]
        self._batches: list[tuple[Request, ...]] = []
        self._score = score
        self._scores = lru_cache(maxsize=3)(self._score_all)
        self._judge = judge

    def plan(self, model: Any) -> None:
        """Put the prompts into batches.

        Raises:
            StageError: a prompt with its answer does not fit into the model's context.
        """
        generator = self._generator(model)
        lengths = {}
        requests = []
        for number, question in enumerate(self.questions):
            key, messages = f"{number:08d}", as_messages(question.prompt)
            lengths[key] = generator.prompt_length(messages)
            requests.append(Request(key, messages, self.max_new_tokens))
            most = generator.context_length
            if most is not None and lengths[key] + self.max_new_tokens > most:
                raise StageError(
                    f"{self.where}: row {question.row + 1}: its prompt has {lengths[key]} tokens, and an answer of "
                    f"{self.max_new_tokens} would exceed the model's context of {most}. Lower "
                    "text_metrics.max_new_tokens, or drop the row"
                )
        self._batches = plan_batches(requests, lengths, self.batch_tokens)

    def answer(self, model: Any) -> list[str]:
        """The model's greedy answers, in the order of the questions."""
        generator = self._generator(model)
        found = [""] * len(self.questions)
        for number, batch in enumerate(self._batches, start=1):
            for request, completion in zip(batch, generator.generate(batch, seed=0), strict=True):
                found[int(request.key)] = completion.text
            if self.on_batch is not None:
                self.on_batch(number, len(self._batches))
        return found

    def __call__(self, model: Any) -> dict[str, float]:
        """Metric -> value, for the model as it is; a win rate also says how far the judge agrees with itself.

        Raises:
            StageError: an answer cannot be scored, or a function of the user's does not return what it has to.
        """
        with _random_states_kept():
            return self._measure(self.answer(model))

    def _measure(self, answers: list[str]) -> dict[str, float]:
        found = {name: COMPARED[name](answers, self.references) for name in self.names if name in COMPARED}
        if "reward_score" in self.names:
            rewards = self._scores(tuple(answers))
            found["reward_score"] = sum(rewards) / len(rewards)
        if "win_rate" in self.names:
            won = win_rate(self._judge or self._by_score, self.prompts, answers, self.references)
            found["win_rate"], found["win_rate_agreement"] = won.win_rate, won.agreement
        return found

    def _generator(self, model: Any) -> TransformersGenerator:
        return TransformersGenerator(
            model,
            self.tokenizer,
            Sampling(temperature=0.0, batch_tokens=self.batch_tokens),
            fingerprint="",
            autocast_dtype=self.autocast_dtype,
            templated=not isinstance(self.prompts[0], str),
        )

    def _score_all(self, answers: tuple[str, ...]) -> tuple[float, ...]:
        assert self._score is not None
        scores = tuple(float(score) for score in self._score(self.prompts, answers))
        if len(scores) != len(answers) or not all(math.isfinite(score) for score in scores):
            raise StageError(
                f"text_metrics.reward_model gave {len(scores)} scores for {len(answers)} answers: {scores}"
            )
        return scores

    def _by_score(self, prompts: Sequence[Any], first: Sequence[str], second: Sequence[str]) -> list[float]:
        """The answer with the higher score wins."""
        pairs = zip(self._scores(tuple(first)), self._scores(tuple(second)), strict=True)
        return [
            0.5 if math.isclose(one, other, rel_tol=SAME, abs_tol=SAME) else float(one > other) for one, other in pairs
        ]


@contextmanager
def _random_states_kept() -> Iterator[None]:
    """Put every random state back: a judge may draw numbers, training must not notice."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    drawn, numpy_drawn = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(drawn)
        np.random.set_state(numpy_drawn)


def text_evaluation(job: Job) -> TextEvaluation:
    """What measures the answers of a stage's policy, with its reward model loaded.

    Raises:
        StageError: the validation data have no prompts with references, or the reward model cannot be loaded.
    """
    stage = job.stage
    options = stage.text_metrics or TextMetrics()
    names, where = text_metrics_of(stage), f"{stage.path}.validation_data"
    asked = questions(job.eval_dataset, where, options.samples)
    dtype = torch.bfloat16 if job.setting("bf16") else torch.float16 if job.setting("fp16") else None
    bars: dict[int, Any] = {}

    def progress(done: int, total: int) -> None:
        if done == 1:
            bars[0] = job.show.progress("answering validation prompts", total, "batch", "batches", passing=True)
        bars[0].update(done)

    return TextEvaluation(
        names,
        asked,
        job.tokenizer,
        where=where,
        max_new_tokens=options.max_new_tokens,
        batch_tokens=options.batch_tokens,
        score=_scorer(job, options, asked),
        judge=resolve(options.judge) if options.judge is not None else None,
        autocast_dtype=dtype,
        on_batch=progress,
    )


def questions(dataset: Any, where: str, samples: int | None = None) -> list[Question]:
    """The prompts of validation data with their references: the completion, the chosen answer, or what the assistant
    says last. Rows with a `label` that is false have no reference, and are no questions.

    Raises:
        StageError: there is no prompt, or a reference holds no text; names the row.
    """
    odd = sorted({"tools", "chat_template_kwargs", "images", "image"} & set(dataset.column_names))
    if odd:
        what = f"metrics of texts cannot ask prompts with {odd[0]!r}"
        raise StageError(f"{where}: {what}; drop the column, or these metrics")
    found: list[Question] = []
    for number, row in enumerate(dataset):
        if samples is not None and len(found) == samples:
            break
        if row.get("label", True):
            found.append(Question(number, *_asked(row, f"{where}: row {number + 1}")))
    if not found:
        raise StageError(f"{where}: none of {len(dataset)} rows has a reference; each label is false")
    return found


def _asked(row: Mapping[str, Any], place: str) -> tuple[Prompt, str]:
    """Prompt and reference of a row in any of TRL's formats."""
    from trl.data_utils import maybe_convert_to_chatml, maybe_extract_prompt

    row = maybe_convert_to_chatml(dict(row))
    if "messages" in row:
        *before, last = as_messages(row["messages"], where=place)
        prompt: Any = before
        answer: Any = [last]
    elif "chosen" in row or "completion" in row:
        row = maybe_extract_prompt(row) if "chosen" in row else row
        prompt, answer = row.get("prompt"), row["chosen"] if "chosen" in row else row["completion"]
    else:
        has = ", ".join(row)
        raise StageError(f"{place} has no prompt with an answer, so there are no texts to compare; it has {has}")
    if not isinstance(prompt, str) or not isinstance(answer, str):
        prompt = as_messages(prompt, where=f"{place}, prompt")
        turns = as_messages(answer, where=f"{place}, answer") if answer else ()
        answer = turns[0]["content"] if turns and turns[0]["role"] == "assistant" else ""
    if not answer.strip():
        raise StageError(f"{place} has no reference: its answer is empty, or not the assistant's; drop the row")
    return prompt, answer


def _scorer(job: Job, options: TextMetrics, asked: Sequence[Question]) -> Score | None:
    """The reward model or the function that the stage names."""
    given = options.reward_model
    if given is None:
        return None
    if is_function(given):
        return _by_function(resolve(given), function_name(given))
    from stagekit.models import local_model
    from stagekit.reward_models import load_reward_model

    where = f"{job.stage.path}.text_metrics.reward_model"
    if given.startswith("stage:"):
        path = job.results[given.removeprefix("stage:")].reward_model
        if path is None:
            raise StageError(f"{where}: {given!r} left no reward model")
    else:
        path = local_model(given, where=where)
    with _random_states_kept():
        model, tokenizer = load_reward_model(path)
    _check_context(model, tokenizer, asked, options.max_new_tokens, where)
    return _by_model(model, tokenizer, options.batch_tokens)


def _by_function(function: Callable[..., Any], name: str) -> Score:
    scorer = FunctionScorer(function)

    def score(prompts: Sequence[Any], answers: Sequence[str]) -> list[float]:
        talks = not isinstance(prompts[0], str)
        given = [[dict(turn) for turn in prompt] for prompt in prompts] if talks else list(prompts)
        found = scorer.score(given, answers, {})
        known = [value for value in found if value is not None]
        if len(known) < len(found):
            raise StageError(
                f"text_metrics.reward_model: {name} returned {found!r}; it returns a number for each answer"
            )
        return known

    return score


def _by_model(model: Any, tokenizer: Any, batch_tokens: int) -> Score:
    from stagekit.reward_models import score as score_with

    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"

    def score(prompts: Sequence[Any], answers: Sequence[str]) -> list[float]:
        found = score_with(model.to(device), tokenizer, prompts, answers, batch_tokens=batch_tokens)
        known = [value for value in found if value is not None]
        if len(known) < len(found):
            left = f"{len(found) - len(known)} of {len(found)} answers"
            raise StageError(
                f"text_metrics.reward_model cannot read {left} whole; lower text_metrics.max_new_tokens, or name a "
                "reward model with a longer context"
            )
        return known

    return score


def _check_context(model: Any, tokenizer: Any, asked: Sequence[Question], max_new_tokens: int, where: str) -> None:
    """Every prompt leaves room for an answer and its reference, so that no training ends at an answer too long."""
    from stagekit.reward_models import reward_ids

    context = context_length(model)
    if context is None:
        return
    for question in asked:
        prompt = len(reward_ids(tokenizer, question.prompt, ""))
        whole = len(reward_ids(tokenizer, question.prompt, question.reference))
        if max(prompt + max_new_tokens, whole) > context:
            raise StageError(
                f"{where}: it reads {context} tokens; row {question.row + 1} of validation_data has {prompt}, and an "
                f"answer up to {max_new_tokens} more. Lower text_metrics.max_new_tokens, or drop the row"
            )
