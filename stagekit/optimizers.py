"""Every optimiser by its name in `optimizer_override`: TRL's own by `optim`, the others as a class for the trainer.

Where TRL has none, the class goes to the trainer's `optimizer_cls_and_kwargs`, which `create_optimizer` reads: the
weight decay stays off biases and norms, and checkpoints are those of any other run. Pure data; nothing is loaded.
"""

import importlib
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from stagekit.errors import Problem
from stagekit.options import nearest


_BETAS = frozenset({"adam_beta1", "adam_beta2"})
_ADAM = _BETAS | {"adam_epsilon"}


@dataclass(frozen=True)
class Recipe:
    """How one optimiser is made. `learning_rate` and `weight_decay` count for every one of them."""

    optim: str | None = None
    """TRL's `optim`; None: `cls` is made by the trainer's `optimizer_cls_and_kwargs`."""
    optim_args: str | None = None
    """TRL's `optim_args`."""
    cls: str | None = None
    """The class as `module:Class`."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the class that no option carries."""
    reads: frozenset[str] = frozenset()
    """Which of `adam_beta1`, `adam_beta2` and `adam_epsilon` have an effect."""
    defaults: Mapping[str, float] = field(default_factory=dict)
    """Of these, what holds where the user set nothing and the paper differs from the specification."""
    decay: Literal["decoupled", "coupled"] = "coupled"
    """Whether the decay shrinks the weights beside the step (as in AdamW) or is added to the gradient (L2)."""
    package: str | None = None
    """What has to be installed beside torch."""
    usual_rate: float | None = None
    """A learning rate that is usual, where that of language models (2e-5) is far too low to learn anything."""


OPTIMIZERS: Mapping[str, Recipe] = {
    "adamw": Recipe(optim="adamw_torch_fused", reads=_ADAM, decay="decoupled"),
    "adam": Recipe(cls="torch.optim:Adam", reads=_ADAM),
    "amsgrad": Recipe(cls="torch.optim:Adam", fixed={"amsgrad": True}, reads=_ADAM),
    "sgd": Recipe(optim="sgd", usual_rate=1e-2),
    "momentum": Recipe(optim="sgd", optim_args="momentum=0.9", usual_rate=1e-2),
    "nesterov": Recipe(optim="sgd", optim_args="momentum=0.9,nesterov=true", usual_rate=1e-2),
    "adagrad": Recipe(optim="adagrad", usual_rate=1e-2),
    "rmsprop": Recipe(optim="rmsprop"),
    "adadelta": Recipe(cls="torch.optim:Adadelta", usual_rate=1.0),
    "adamax": Recipe(cls="torch.optim:Adamax", reads=_ADAM),
    "nadam": Recipe(cls="torch.optim:NAdam", reads=_ADAM),
    "radam": Recipe(cls="torch.optim:RAdam", reads=_ADAM),
    "adafactor": Recipe(optim="adafactor", decay="decoupled"),
    "lion": Recipe(
        optim="lion_32bit",
        reads=_BETAS,
        defaults={"adam_beta2": 0.99},  # huggingface.co/papers/2302.06675
        decay="decoupled",
        package="bitsandbytes",
    ),
    "lion8bit": Recipe(
        optim="lion_8bit",
        reads=_BETAS,
        defaults={"adam_beta2": 0.99},
        decay="decoupled",
        package="bitsandbytes",
    ),
    # bitsandbytes has one kernel for Adam8bit and AdamW8bit, with AdamW's decay
    "adam8bit": Recipe(optim="adamw_8bit", reads=_ADAM, decay="decoupled", package="bitsandbytes"),
    "adamw8bit": Recipe(optim="adamw_8bit", reads=_ADAM, decay="decoupled", package="bitsandbytes"),
    "lamb": Recipe(cls="stagekit.layerwise:Lamb", reads=_ADAM, decay="decoupled", usual_rate=1e-3),
    "lars": Recipe(cls="stagekit.layerwise:Lars", usual_rate=1.0),
}
"""`optimizer_override` -> how it is made."""


def arguments_of_optimizer(name: str, given: Mapping[str, float]) -> dict[str, Any]:
    """The arguments of the TRL config: `optim`, `optim_args`, and the betas and epsilon that the optimiser reads.

    Args:
        given: `adam_beta1`, `adam_beta2` and `adam_epsilon` as the user set them; those not set are left out.
    """
    recipe = OPTIMIZERS[name]
    found: dict[str, Any] = {"optim": recipe.optim} if recipe.optim is not None else {}
    if recipe.optim_args is not None:
        found["optim_args"] = recipe.optim_args
    return {**found, **_values(recipe, given)}


def optimizer_class(name: str, lr: float, given: Mapping[str, float]) -> tuple[type, dict[str, Any]] | None:
    """What a trainer's `optimizer_cls_and_kwargs` is set to; None where TRL makes the optimiser by its name.

    Args:
        lr: The peak learning rate.
        given: As in `arguments_of_optimizer`.
    """
    recipe = OPTIMIZERS[name]
    if recipe.cls is None:
        return None
    values = _values(recipe, given)
    kwargs: dict[str, Any] = {"lr": lr, **recipe.fixed}
    if recipe.reads >= _BETAS:
        kwargs["betas"] = (values["adam_beta1"], values["adam_beta2"])
    if "adam_epsilon" in recipe.reads:
        kwargs["eps"] = values["adam_epsilon"]
    module, _, attribute = recipe.cls.partition(":")
    return getattr(importlib.import_module(module), attribute), kwargs


_SPECIFIED = {"adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8}


def _values(recipe: Recipe, given: Mapping[str, float]) -> dict[str, float]:
    every = {**_SPECIFIED, **recipe.defaults, **given}
    return {option: every[option] for option in _SPECIFIED if option in recipe.reads}


def problems_of_optimizer(name: str, given: Collection[str]) -> list[Problem]:
    """Options that were set and that the optimiser does not read; paths relative to the stage.

    Args:
        given: The names of the options that the user set.
    """
    recipe = OPTIMIZERS.get(name)
    if recipe is None:
        return [Problem("optimizer_override", no_optimizer(name))]
    return [
        Problem(option, f"has no effect on optimizer_override {name!r}; use adamw")
        for option in sorted(_ADAM - recipe.reads)
        if option in given
    ]


def note_on_rate(name: str, lr: float) -> str | None:
    """A warning for a rate at which the optimiser hardly moves; None where there is nothing to say."""
    usual = OPTIMIZERS[name].usual_rate
    if usual is None or lr >= usual / 100:
        return None
    return f"{lr:g} is far below what is usual for {name!r} (about {usual:g}): hardly anything will be learned"


def forget_overrides() -> None:
    """Undo what an 8-bit optimiser left in bitsandbytes for the whole process, after its stage.

    transformers registers the embeddings there to be kept in 32 bits. The list outlives the trainer: it holds the
    module in memory, and goes by position and by `id()`, so that other weights of a later stage would be meant.
    """
    import sys

    if "bitsandbytes" in sys.modules:
        sys.modules["bitsandbytes"].optim.GlobalOptimManager.get_instance().initialize()


_SPELLINGS = {
    "adamoptimizer": "adam",
    "gradientdescent": "sgd",
    "stochasticgradientdescent": "sgd",
    "minibatchgradientdescent": "sgd",
    "nesterovacceleratedgradient": "nesterov",
    "nag": "nesterov",
    "adaptivegradient": "adagrad",
    "pagedadamw8bit": "adamw8bit",
}
_NO_CLOSURE = "asks for the loss several times per step, and the trainers compute it once"
_NO_GRADIENT = "searches without gradients, which cannot train millions of weights"
_REFUSED: Mapping[str, tuple[str, str]] = {
    **dict.fromkeys(
        (
            "lbfgs", "bfgs", "dfp", "newton", "newtonmethod", "levenbergmarquardt", "lm", "conjugategradient", "cg",
            "trustregion",
        ),
        (_NO_CLOSURE, "adamw"),
    ),
    **dict.fromkeys(
        (
            "genetic", "geneticalgorithm", "particleswarm", "antcolony", "differentialevolution", "simulatedannealing",
            "tabusearch", "bayesian", "bayesianoptimization", "neldermead", "powell", "cmaes", "evolution",
        ),
        (_NO_GRADIENT, "adamw"),
    ),
    "coordinatedescent": ("changes one weight at a time, which is hopeless for millions of them", "sgd"),
    "ftrl": ("is made for sparse linear models, and torch has none", "adagrad"),
    "proximalgradientdescent": ("needs a regulariser, which a stage does not declare", "sgd"),
    "admm": ("splits a problem into parts, and a language model has no such split", "adamw"),
    "normal": ("solves linear models in closed form", "adamw"),
    "nestedlearning": ("is a kind of model as much as an optimiser", "adamw"),
    "asgd": ("averages the weights, and the average is never in what is saved: it would be plain sgd", "sgd"),
    "rprop": ("ignores the learning rate schedule and needs the whole data set in one batch", "rmsprop"),
}  # fmt: skip
"""Names of other libraries, bare -> why there is none here, and the nearest that there is."""


def no_optimizer(name: str) -> str:
    """What to say of an optimiser that there is none of: why, and what to use; `name` is not in `OPTIMIZERS`."""
    bare = re.sub(r"[^a-z0-9]", "", name.lower())
    here = {one.replace("_", ""): one for one in OPTIMIZERS}
    same = here.get(bare) or _SPELLINGS.get(bare)
    if same is not None:
        return f"{name!r} is called {same!r} here"
    if bare in _REFUSED:
        reason, instead = _REFUSED[bare]
        return f"{name!r} {reason}; the nearest here is {instead!r}"
    close = nearest(bare, OPTIMIZERS)
    hint = f"did you mean {close!r}?" if close else f"there are {', '.join(OPTIMIZERS)}"
    return f"{name!r} is no optimiser here; {hint}"
