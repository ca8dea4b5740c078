"""Groups of options that a stage has or has not: an adapter, a reference model, generation, data sources."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from stagekit.options import Count, Fraction, Function, NonNegativeFloat, Options, Positive, PositiveFloat


class Data(Options):
    """Where rows come from, where a bare string does not say enough."""

    source: Any
    """A file (jsonl, json, csv, parquet), a saved dataset, a hub id, `stage:NAME/DATASET`, or a live `Dataset`."""

    split: str | None = None
    """Which split of a hub dataset, for instance `train[:1000]`. Needed for hub ids."""

    columns: Mapping[str, str] = {}
    """Renames columns: ours -> the file's, for instance `{prompt: question}`."""

    def __init__(self, source: Any = None, /, **given: Any) -> None:
        super().__init__(**({"source": source} if source is not None else {}), **given)


class LoRA(Options):
    """Train low-rank adapters instead of the full weights. Source: huggingface.co/papers/2106.09685."""

    foreign: ClassVar[Mapping[str, str]] = {"r": "rank", "lora_r": "rank", "lora_rank": "rank", "lora_alpha": "alpha"}

    rank: Positive = 16
    """Rank of the two matrices; 4 to 64 is usual. peft: `r` (whose own default is 8)."""

    alpha: PositiveFloat = 32.0
    """The update is scaled by alpha / rank. peft: `lora_alpha`."""

    dropout: Fraction = 0.05
    """Dropout on the adapter's input. DPO then keeps dropout on for the adapter, which TRL would switch off."""

    target_modules: tuple[str, ...] | str = ("q_proj", "v_proj")
    """Names of the modules that get an adapter, or `all-linear`. peft: `target_modules`."""

    bits: Literal[4, 8] | None = None
    """QLoRA: the frozen base in 4 (nf4, double quantisation) or 8 bits; needs bitsandbytes. None = not quantised."""

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
    """Padded tokens (prompt and reply) of one batch at most: bounds the memory."""

    backend: Literal["transformers"] | Function = "transformers"
    """`transformers`, or a function `messages -> text` that answers instead of the model (scripted, for tests)."""
