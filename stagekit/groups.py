"""Groups of options that a stage has or has not: an adapter, a reference model, generation, data sources."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Discriminator, PlainSerializer, Tag, ValidationError, WithJsonSchema
from pydantic_core import PydanticCustomError

from stagekit.errors import ConfigError, Problem
from stagekit.options import (
    Count,
    Fraction,
    Function,
    NonNegativeFloat,
    Options,
    Positive,
    PositiveFloat,
    check_function,
    function_name,
    problems_of,
    raise_problems,
    shown,
)
from stagekit.sources import parse_data, parse_model


def wrong(text: str) -> PydanticCustomError:
    """The error that a validator raises, with a message of ours."""
    return PydanticCustomError("stagekit", "{text}", {"text": text})


def _model(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, str):
        try:
            parse_model(value)
        except ConfigError as error:
            raise wrong(str(error)) from None
    elif value is not None and not hasattr(value, "config"):
        raise wrong(f"a model is a path, a hub id, a GGUF file, package:, stage: or a live model, not {shown(value)}")
    return value


Model = Annotated[Any, BeforeValidator(_model), WithJsonSchema({"type": ["string", "null"]})]
"""How a model is named."""


def is_function(value: Any) -> bool:
    """Whether a value that may be a model or a function is a function, live or by its `package.module:function`."""
    if not isinstance(value, str):
        return callable(value) and not hasattr(value, "config")
    module, colon, name = value.partition(":")
    parts = [*module.split("."), *name.split(".")]
    return bool(colon) and module not in {"stage", "package"} and all(part.isidentifier() for part in parts)


def _scorer(value: Any) -> Any:
    if value is None or isinstance(value, str | Path):
        return value if is_function(value) else _model(value)
    if hasattr(value, "config") or not callable(value):
        raise wrong(f"is stage:NAME, a folder, a hub id or a function, not {shown(value)}; save a live model first")
    return value


Scorer = Annotated[
    Any,
    BeforeValidator(_scorer),
    PlainSerializer(lambda value: function_name(value) if callable(value) else value),
    WithJsonSchema({"type": ["string", "null"]}),
]
"""What scores answers: a reward model by its name, or a function."""


def _judge(value: Any) -> Any:
    if is_server(value):
        return value
    if isinstance(value, str) and ":" in value and not value.startswith(("stage:", "package:")):
        return check_function(value)
    return _scorer(value)


Judge = Annotated[
    Any,
    BeforeValidator(_judge),
    PlainSerializer(lambda value: function_name(value) if callable(value) else value),
    WithJsonSchema({"type": ["string", "null"]}),
]
"""Who compares responses: a model by its name, a server, or a function."""


def _source(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, str):
        if not value.startswith("stage:"):
            try:
                parse_data(value)
            except ConfigError as error:
                raise wrong(str(error)) from None
    elif not hasattr(value, "column_names") and not isinstance(value, Mapping):
        raise wrong(f"data are a path, a hub id, stage:NAME/DATASET, package: or a live Dataset, not {shown(value)}")
    return value


class Data(Options):
    """Where rows come from, where a bare string does not say enough."""

    source: Annotated[Any, BeforeValidator(_source), WithJsonSchema({"type": "string"})]
    """A file (jsonl, json, csv, parquet), a saved dataset, a hub id, `stage:NAME/DATASET`, or a live `Dataset`."""

    split: str | None = None
    """Which split of a hub dataset, for instance `train[:1000]`. Needed for hub ids."""

    columns: Mapping[str, str] = {}
    """Renames columns: ours -> the file's, for instance `{prompt: question}`."""

    def __init__(self, source: Any = None, /, **given: Any) -> None:
        super().__init__(**({"source": source} if source is not None else {}), **given)


def _data(value: Any) -> Any:
    """One set of data in any spelling; a mapping with the keys of `Data` becomes one."""
    if value is None or isinstance(value, Data):
        return value
    if isinstance(value, Mapping) and any(key in value for key in Data.model_fields):
        try:
            return Data.model_validate(dict(value))
        except ValidationError as error:
            raise_problems(Data, problems_of(error, Data, value))
    if isinstance(value, Mapping):
        raise wrong("names several sets; here one is meant: a path, or a mapping with source")
    return _source(value)


def _named_data(value: Any) -> Any:
    """One set of data, or several by name."""
    if not isinstance(value, Mapping) or any(key in value for key in Data.model_fields):
        return _data(value)
    problems = [Problem("", "an empty mapping names no data")] if not value else []
    found = {}
    for name, item in value.items():
        try:
            found[name] = _data(item)
        except PydanticCustomError as error:
            problems.append(Problem(str(name), error.message()))
        except ValidationError as error:
            problems += [Problem(f"{name}.{one.path}", one.message) for one in problems_of(error, Data, item)]
        if not isinstance(name, str):
            problems.append(Problem("", f"{name!r} is no name of a set; names are text"))
        elif item is None:
            problems.append(Problem(name, "says no data"))
    raise_problems(Data, problems)
    return found


_DATA_SCHEMA = WithJsonSchema({"type": ["string", "object", "null"]})
OneSet = Annotated[Any, BeforeValidator(_data), _DATA_SCHEMA]
"""One set of data."""
Sets = Annotated[Any, BeforeValidator(_named_data), _DATA_SCHEMA]
"""One set of data, or a mapping name -> set."""


def _modules_kind(value: Any) -> str:
    return "text" if isinstance(value, str) else "names"


Modules = Annotated[
    Annotated[tuple[str, ...], Tag("names")] | Annotated[str, Tag("text")], Discriminator(_modules_kind)
]
"""Names of modules, or one pattern or keyword for them."""


class LoRA(Options):
    """Train low-rank adapters instead of the full weights. Source: huggingface.co/papers/2106.09685."""

    foreign: ClassVar[Mapping[str, str]] = {"r": "rank", "lora_r": "rank", "lora_rank": "rank", "lora_alpha": "alpha"}

    rank: Positive = 16
    """Rank of the two matrices; 4 to 64 is usual. peft: `r` (whose own default is 8)."""

    alpha: PositiveFloat = 32.0
    """The update is scaled by alpha / rank. peft: `lora_alpha`."""

    dropout: Fraction = 0.05
    """Dropout on the adapter's input. DPO then keeps dropout on for the adapter, which TRL would switch off."""

    target_modules: Modules = ("q_proj", "v_proj")
    """Names of the modules that get an adapter, or `all-linear`. peft: `target_modules`."""

    bits: Literal[4, 8] | None = None
    """QLoRA: the frozen base in 4 (nf4, double quantisation) or 8 bits; needs bitsandbytes. None = not quantised."""

    rslora: bool = False
    """Scale the update by alpha / sqrt(rank), so that high ranks learn too. peft: `use_rslora`.
    Source: huggingface.co/papers/2312.03732."""

    dora: bool = False
    """Learn the size of each column beside the low-rank direction; slower. peft: `use_dora`.
    Source: huggingface.co/papers/2402.09353."""

    merge: bool = False
    """Merge the adapter into the (unquantised) base after training; the adapter stays beside it."""


class Reference(Options):
    """Which model a preference method is compared with."""

    mode: Literal["auto", "base", "adapter", "copy", "precompute", "none"] = "auto"
    """auto: with LoRA the incoming weights (adapter off, or a frozen copy of it), else precompute.
    copy: a second model in memory; precompute: the reference's log-probabilities once, before training."""

    update_every: Positive | None = None
    """Steps between two updates of the reference to the policy. None = frozen."""


class EarlyStopping(Options):
    """Stop when a metric no longer gets better. Active only with validation data."""

    patience: Positive = 5
    """Evaluations without a gain before the stage stops."""

    metric: str = "loss"
    """The metric to watch, without its `eval_` prefix."""

    min_delta: NonNegativeFloat = 1e-4
    """Gains smaller than this, against the best value so far, do not count."""

    maximize: bool = False
    """True where higher is better."""


class Callbacks(Options):
    """Your own functions at the stage's events. What one of them raises fails the stage. They observe: a stage that is
    done stays so where a callback was edited, added or taken away."""

    on_stage_start: Function | None = None
    """Called with the stage, before its model and data are loaded; not where it is skipped."""

    on_epoch_complete: Function | None = None
    """Called with the number of whole epochs and the mean loss over the last one."""

    on_batch_complete: Function | None = None
    """Called with the number of optimiser steps and the loss of the last one, over all its accumulated batches. Steps
    that a resume does again are told again. Reading the loss makes an accelerator wait at every step."""

    on_stage_complete: Function | None = None
    """Called with the stage's `StageResult`, right before it is written."""

    on_stage_error: Function | None = None
    """Called with the exception that fails the stage; not where the user stops it."""


class TextMetrics(Options):
    """How the answers are written and judged that text metrics measure: greedily, one for each prompt of the
    validation data, by the policy as it is at the evaluation. References are the completions or the chosen answers."""

    max_new_tokens: Positive = 128
    """Tokens of an answer at most; one that reaches it is measured as it is, cut."""

    batch_tokens: Positive = 16384
    """Padded tokens (prompt and answer) of one batch at most: bounds the memory."""

    samples: Positive | None = None
    """Ask only the first of the prompts, this many. None = all."""

    reward_model: Scorer = None
    """What scores the answers for `reward_score`, and for `win_rate` where there is no `judge`: `stage:NAME` of a
    reward stage, a folder, a hub id, or a function that returns a number for each answer, called as TRL calls its own:
    `function(prompts=..., completions=...)`. A model stays in memory, in float32."""

    judge: Function | None = None
    """Who decides for `win_rate`: `judge(prompts, first, second)` says for each prompt how far the first answer is
    better (1 wins, 0.5 a tie, 0 loses). It is asked in both orders. None = the higher score of `reward_model`."""


class Gate(Options):
    """What must hold for a stage's result to be passed on."""

    metric: str
    """A metric of the result, with or without its `eval_` prefix."""

    at_least: float | None = None
    """The metric must be this or more."""

    at_most: float | None = None
    """The metric must be this or less."""

    otherwise: Literal["keep_previous", "stop"] = "keep_previous"
    """keep_previous: the stage completes, and later stages start from the model before it.
    stop: the stage fails, and with it the run."""


def is_server(backend: Any) -> bool:
    """Whether a backend is the URL of a server."""
    return isinstance(backend, str) and backend.startswith(("http://", "https://"))


def _backend(value: Any) -> Any:
    if value in ("transformers", "vllm") or is_server(value):
        return value
    if callable(value) or (isinstance(value, str) and ":" in value):
        return check_function(value)
    raise wrong(
        "is 'transformers', 'vllm', the URL of a server (http://HOST:PORT/v1, with #MODEL where it serves several), "
        f"or a function named as 'package.module:function', not {shown(value)}"
    )


Backend = Annotated[
    Any,
    BeforeValidator(_backend),
    PlainSerializer(lambda value: function_name(value), return_type=str),
    WithJsonSchema({"type": "string", "pattern": r"^(transformers|vllm|https?://.+|[\w.]+:[\w.]+)$"}),
]


class Generation(Options):
    """How a stage that writes its own data samples from a model."""

    max_new_tokens: Positive = 256
    """Tokens of a reply at most; a reply that reaches it counts as truncated."""

    temperature: NonNegativeFloat = 1.0
    """Sampling temperature; 0 is greedy."""

    top_p: Fraction = 1.0
    """Nucleus sampling: the smallest set of tokens with this probability. 1 = off."""

    top_k: Count = 0
    """Sample from the k likeliest tokens. 0 = off."""

    batch_tokens: Positive = 16384
    """Padded tokens of one batch at most, prompts and replies, of a conversation all its turns: bounds the memory."""

    backend: Backend = "transformers"
    """`transformers`; `vllm` (its offline engine; needs the package and a GPU); the URL of an OpenAI-compatible server
    that serves the stage's model, as `http://HOST:PORT/v1`, with `#MODEL` behind it where it serves several (its key
    is read from the environment variable OPENAI_API_KEY); or a function `messages -> text` that answers instead of the
    model (scripted, for tests)."""


VERIFIERS = ("exact", "numeric", "maths", "regex", "json_schema", "format", "python_tests")
"""Rewards of `stagekit.verifiers` that can be named alone."""

TRL_REWARDS = (
    "accuracy_reward",
    "reasoning_accuracy_reward",
    "think_format_reward",
    "get_cosine_scaled_reward",
    "get_repetition_penalty_reward",
    "get_soft_overlong_punishment",
)
"""Rewards of `trl.rewards` that can be named alone; for `get_`, the options are what it makes a reward of."""


def _reward_source(value: Any) -> Any:
    if isinstance(value, str) and value in VERIFIERS:
        return f"stagekit.verifiers:{value}"
    if isinstance(value, str) and value in TRL_REWARDS:
        return f"trl.rewards:{value}"
    misspelt = isinstance(value, str) and ":" in value and not value.startswith(("stage:", "package:"))
    if is_function(value) or misspelt:
        return check_function(value)
    if value is None:
        raise wrong("says no reward: name a function, a reward model or stage:NAME")
    return _model(value)


class RewardSource(Options):
    """One of several rewards, or one that takes options."""

    source: Annotated[Any, BeforeValidator(_reward_source), WithJsonSchema({"type": "string"})]
    """`stage:NAME` (a reward or process_reward stage), a reward model's folder or hub id, a function as
    `package.module:function`, a verifier's name (exact, numeric, maths, regex, json_schema, format, python_tests), the
    name of one of TRL's (accuracy_reward, think_format_reward, get_soft_overlong_punishment, ...), or a live one."""

    weight: float = 1.0
    """Rewards are multiplied by their weights and summed."""

    name: str | None = None
    """The name in the log, `rewards/NAME/mean`. None = the stage's, folder's or function's."""

    options: Mapping[str, Any] = {}
    """Arguments of a function beside those that every reward function gets."""

    def __init__(self, source: Any = None, /, **given: Any) -> None:
        super().__init__(**({"source": source} if source is not None else {}), **given)


def _rewards(value: Any) -> Any:
    """One reward in any spelling, or a list of them, as a tuple; None stays."""
    if value is None:
        return None
    given = list(value) if isinstance(value, list | tuple) else [value]
    found, problems = [], []
    for number, one in enumerate(given):
        place = str(number) if isinstance(value, list | tuple) else ""
        try:
            plain = one if isinstance(one, Mapping | RewardSource) else {"source": one}
            found.append(RewardSource.model_validate(plain if isinstance(plain, RewardSource) else dict(plain)))
        except ValidationError as error:
            told = problems_of(error, RewardSource, plain)
            alone = not isinstance(one, Mapping)
            problems += [
                Problem(".".join(part for part in (place, "" if alone else item.path) if part), item.message)
                for item in told
            ]
    if not given:
        problems.append(Problem("", "an empty list rewards nothing"))
    raise_problems(RewardSource, problems)
    return tuple(found)


Rewards = Annotated[Any, BeforeValidator(_rewards), WithJsonSchema({"type": ["string", "object", "array", "null"]})]
"""One reward, or several with weights."""
