"""Which weights are trained: patterns over a model's own names, frozen before the optimiser is made.

A pattern is one of

- `layers.3`, `layers.0-5`, `layers.0-5.mlp`, `layers.*.mlp`: blocks by number, ranges with both ends; `layer`,
  `block`, `blocks` and `h` mean the same, whatever the model calls its list of blocks;
- `embedding`: every embedding outside the blocks; `norm`: the norms outside the blocks (the last one); `lm_head`;
- a module or weight by its full name, with or without the model's prefix (`model.layers.3.mlp`, `layers.3.mlp`);
- a name with `*`, `?` or `[...]`, as in file names; it matches weights and the modules that hold them.

An adapter counts as part of the weight that it adapts, so that freezing a block freezes the adapters in it. A weight
that stands in two places of the model (tied embeddings) has two names; both have to be frozen, or both trained.
"""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from stagekit.errors import ConfigError, Problem


_BLOCK_WORDS = ("layers", "layer", "blocks", "block", "h")
_ADAPTER = re.compile(r"\.lora_[A-Za-z_]+(\.[^.]+)*$")
_WRAPPED = re.compile(r"\.(base_layer|original_module|modules_to_save\.[^.]+)(?=\.|$)")


@dataclass(frozen=True)
class Layout:
    """Where a model's weights stand, by plain names: those that the model has without adapters."""

    weights: Mapping[str, tuple[Any, ...]]
    """Plain name -> the parameters behind it: the weight, its adapters, the copy that is trained in its place."""
    prefix: str
    """What the names of the inner model begin with (`model`); empty: nothing."""
    blocks: str
    """The list of blocks (`model.layers`); empty: the model has none."""
    count: int
    """How many blocks there are."""
    parts: Mapping[str, frozenset[str]]
    """`embedding`, `norm`, `lm_head` -> the modules they mean."""

    def block_of(self, name: str) -> int | None:
        """The block that a weight belongs to; None: outside."""
        found = re.match(rf"{re.escape(self.blocks)}\.(\d+)\.", name) if self.blocks else None
        return int(found.group(1)) if found else None

    def within(self, modules: Iterable[str]) -> set[str]:
        """The weights below some modules."""
        starts = tuple(f"{module}." for module in modules)
        return {name for name in self.weights if name.startswith(starts)}

    def names_of(self) -> dict[int, set[str]]:
        """The names of every parameter, by its id; a tied one has several."""
        found: dict[int, set[str]] = {}
        for name, parameters in self.weights.items():
            for parameter in parameters:
                found.setdefault(id(parameter), set()).add(name)
        return found


def layout_of(model: Any) -> Layout:
    """Look at a model, with or without adapters around it."""
    from torch import nn

    base = model.get_base_model() if hasattr(model, "peft_config") else model
    weights: dict[str, list[Any]] = {}
    for name, parameter in base.named_parameters(remove_duplicate=False):
        weights.setdefault(_plain(name), []).append(parameter)
    lists = {
        name: module for name, module in base.named_modules() if isinstance(module, nn.ModuleList) and len(module)
    }
    outermost = {name: one for name, one in lists.items() if not any(name.startswith(f"{other}.") for other in lists)}
    blocks = _block_list(base, outermost)
    outside = {
        name: module
        for name, module in base.named_modules(remove_duplicate=False)
        if not any(f"{name}.".startswith(f"{other}.") for other in outermost)
    }
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    parts = {
        "embedding": {_plain(name) for name, module in outside.items() if isinstance(module, nn.Embedding)},
        "norm": {_plain(name) for name, module in outside.items() if _is_norm(module)},
        "lm_head": {_plain(name) for name, module in outside.items() if head is not None and module is head},
    }
    return Layout(
        weights={name: tuple(parameters) for name, parameters in weights.items()},
        prefix=getattr(base, "base_model_prefix", ""),
        blocks=blocks,
        count=len(outermost[blocks]) if blocks else 0,
        parts={name: frozenset(modules) for name, modules in parts.items()},
    )


def _plain(name: str) -> str:
    """The name without adapters: `q_proj.lora_A.default.weight` is part of `q_proj.weight`."""
    return _ADAPTER.sub(".weight", _WRAPPED.sub("", name))


def _is_norm(module: Any) -> bool:
    return "norm" in type(module).__name__.lower() and any(True for _ in module.parameters(recurse=False))


def _block_list(base: Any, lists: Mapping[str, Any]) -> str:
    """The list of decoder blocks: as long as the configuration says, else the one with the most weights."""
    config = base.config.get_text_config() if hasattr(base.config, "get_text_config") else base.config
    wanted = getattr(config, "num_hidden_layers", None)
    fitting = {name: module for name, module in lists.items() if len(module) == wanted} or lists
    sizes = {name: sum(one.numel() for one in module.parameters()) for name, module in fitting.items()}
    return max(sizes, key=lambda name: sizes[name], default="")


def select(layout: Layout, pattern: str) -> set[str]:
    """The plain names of the weights that a pattern means.

    Raises:
        ValueError: it means none; with the nearest names.
    """
    text = pattern.strip().rstrip(".")
    part = "embedding" if text == "embeddings" else text
    if layout.parts.get(part):
        return layout.within(layout.parts[part])
    found = {name for one in _expanded(layout, text) for name in layout.weights if _matches(layout, name, one)}
    if not found:
        raise ValueError(f"{pattern!r} matches no weight of this model; {_hint(layout, text)}")
    return found


def _expanded(layout: Layout, text: str) -> list[str]:
    """The pattern with the model's own name of its blocks, one per block of a range."""
    if not layout.blocks:
        return [text]
    own = layout.blocks
    words = {own, own.removeprefix(f"{layout.prefix}."), own.rpartition(".")[2], *_BLOCK_WORDS}
    word = next((one for one in sorted(words, key=len, reverse=True) if f"{text}.".startswith(f"{one}.")), None)
    if word is None:
        return [text]
    first, dot, rest = text[len(word) + 1 :].partition(".")
    numbers = re.fullmatch(r"(\d+)(?:-(\d+))?", first)
    if numbers is None:
        return [f"{own}.{first}{dot}{rest}".rstrip(".")]
    start = int(numbers.group(1))
    stop = int(numbers.group(2)) if numbers.group(2) else start
    if not start <= stop < layout.count:
        wrong = "runs backwards" if start > stop else "goes beyond them"
        raise ValueError(f"{text!r}: the model has the blocks 0-{layout.count - 1}, and {first} {wrong}")
    return [f"{own}.{index}{dot}{rest}" for index in range(start, stop + 1)]


def _matches(layout: Layout, name: str, pattern: str) -> bool:
    for one in {pattern, f"{layout.prefix}.{pattern}"}:
        if not any(sign in one for sign in "*?["):
            if name == one or name.startswith(f"{one}."):
                return True
            continue
        steps = name.split(".")
        if any(fnmatchcase(".".join(steps[:length]), one) for length in range(1, len(steps) + 1)):
            return True
    return False


def _hint(layout: Layout, text: str) -> str:
    modules = {
        ".".join(name.split(".")[:length]) for name in layout.weights for length in range(1, name.count(".") + 2)
    }
    short = {name.removeprefix(f"{layout.prefix}.") for name in modules}
    parts = {name for name, found in layout.parts.items() if found}
    close = difflib.get_close_matches(text, sorted(modules | short | parts), n=2, cutoff=0.6)
    if close:
        return f"did you mean {' or '.join(repr(one) for one in close)}?"
    blocks = [f"{layout.blocks}.0-{layout.count - 1}"] if layout.blocks else []
    return f"there are {', '.join([*blocks, *sorted(parts)])}"


@dataclass
class Frozen:
    """What was frozen. `hold` freezes it again, right before the optimiser is made."""

    summary: dict[str, Any]
    """How many numbers are trained, of how many, in which blocks, and what outside of them; plain data."""
    frozen: list[Any] = field(repr=False)
    """The parameters that were trained without the freezing."""
    trained: list[Any] = field(repr=False)
    """Those that are trained."""

    def hold(self) -> None:
        """Freeze once more: peft unfreezes every adapter whenever it is switched off and on, as for a reference."""
        for parameter in self.frozen:
            parameter.requires_grad_(False)
        for parameter in self.trained:
            parameter.requires_grad_(True)


def freeze(
    model: Any,
    *,
    freeze_base_model: bool = False,
    frozen: Sequence[str] = (),
    trainable: Sequence[str] = (),
    unfreeze_top_n: int = 0,
    where: str = "",
) -> Frozen:
    """Freeze the weights that are not to be trained; what came in frozen stays so.

    With adapters around the model the weights below are frozen anyway: `freeze_base_model` changes nothing,
    `trainable` is for the adapter's configuration (`lora_extras`), and the patterns are about the adapters.

    Args:
        freeze_base_model: Train only what `trainable` matches; where a weight is in `frozen` too, it is trained.
        frozen: Patterns of weights to freeze.
        trainable: Patterns of weights to train.
        unfreeze_top_n: Train only the last blocks, this many, with the last norm and the output head. A head that is
            tied to the embedding stays frozen with it.
        where: What the paths of problems begin with (`stages.sft`).

    Raises:
        ConfigError: a pattern that matches nothing, a weight that is to be frozen and trained, or none left to train.
    """
    layout, adapted = layout_of(model), hasattr(model, "peft_config")
    problems: list[Problem] = []
    off = _selected(layout, "frozen_layers", frozen, problems)
    on = _selected(layout, "trainable_layers", trainable, problems)
    if unfreeze_top_n > layout.count:
        problems.append(Problem("unfreeze_top_n_layers", f"{unfreeze_top_n} is more than the {layout.count} blocks"))
    if not freeze_base_model:
        for name in sorted(set(off) & set(on))[:1]:
            both = f"{on[name]!r} trains what {off[name]!r} of frozen_layers freezes ({name}); narrow one of them"
            problems.append(Problem("trainable_layers", both))
    if unfreeze_top_n:
        wanted = _top(layout, unfreeze_top_n)
    elif freeze_base_model and not adapted:
        wanted = set(on)
    else:
        wanted = set(layout.weights) - (set(off) - set(on) if freeze_base_model else set(off))
    eligible = {id(one): one for parameters in layout.weights.values() for one in parameters if one.requires_grad}
    names = {key: found for key, found in layout.names_of().items() if key in eligible}
    problems += _torn(names.values(), wanted, off, on)
    kept = [one for key, one in eligible.items() if names[key] <= wanted]
    if not problems and not kept:
        problems.append(Problem(_said(freeze_base_model, frozen, unfreeze_top_n), "leaves no weight to train"))
    if problems:
        raise ConfigError([Problem(f"{where}.{one.path}" if where else one.path, one.message) for one in problems])
    chosen = {id(one) for one in kept}
    found = Frozen(
        summary=_summary(layout, chosen),
        frozen=[one for key, one in eligible.items() if key not in chosen],
        trained=kept,
    )
    if adapted:
        for parameter in found.frozen:
            parameter.register_post_accumulate_grad_hook(_drop)
    found.hold()
    return found


def _drop(parameter: Any) -> None:
    """Drop the gradient of an adapter that peft has unfrozen: it would count in the norm that is clipped."""
    parameter.grad = None


def _selected(layout: Layout, option: str, patterns: Sequence[str], problems: list[Problem]) -> dict[str, str]:
    """The weights that some patterns mean, each with the first pattern that does; what is wrong goes to `problems`."""
    found: dict[str, str] = {}
    for pattern in patterns:
        try:
            names = select(layout, pattern)
        except ValueError as error:
            problems.append(Problem(option, str(error)))
            continue
        found.update({name: pattern for name in names if name not in found})
    return found


def _top(layout: Layout, count: int) -> set[str]:
    """The weights of the last blocks and those outside, but for embeddings and what is tied to them."""
    embedding = layout.within(layout.parts["embedding"])
    tied = {name for names in layout.names_of().values() if names & embedding for name in names}
    lower = layout.within(f"{layout.blocks}.{index}" for index in range(layout.count - count))
    return set(layout.weights) - tied - lower


def _torn(tied: Iterable[set[str]], wanted: set[str], off: Mapping[str, str], on: Mapping[str, str]) -> list[Problem]:
    """Weights with two names of which one is to be trained and the other not."""
    for names in tied:
        trained, frozen = sorted(names & wanted), sorted(names - wanted)
        if not trained or not frozen:
            continue
        if frozen[0] in off:
            option, pattern, named, other = "frozen_layers", off[frozen[0]], frozen[0], trained[0]
        else:
            option, pattern, named, other = "trainable_layers", on.get(trained[0], ""), trained[0], frozen[0]
        message = f"{pattern!r} means {named}, which is one weight with {other} (tied); name both or none of them"
        return [Problem(option, message)]
    return []


def _said(freeze_base_model: bool, frozen: Sequence[str], unfreeze_top_n: int) -> str:
    if unfreeze_top_n:
        return "unfreeze_top_n_layers"
    return "freeze_base_model" if freeze_base_model and not frozen else "frozen_layers"


def _summary(layout: Layout, chosen: set[int]) -> dict[str, Any]:
    sizes = {id(one): one.numel() for parameters in layout.weights.values() for one in parameters}
    names = [name for name, parameters in layout.weights.items() if any(id(one) in chosen for one in parameters)]
    inside = sorted({index for name in names if (index := layout.block_of(name)) is not None})
    outside = sorted({name.rpartition(".")[0] for name in names if layout.block_of(name) is None})
    return {
        "parameters": sum(sizes.values()),
        "trained": sum(size for key, size in sizes.items() if key in chosen),
        "trained_blocks": inside,
        "blocks": layout.count,
        "trained_outside": outside,
    }


def lora_extras(
    model: Any,
    target_modules: Sequence[str] | str,
    *,
    trainable: Sequence[str] = (),
    unfreeze_top_n: int = 0,
    where: str = "",
) -> dict[str, Any]:
    """More arguments of a LoraConfig: modules that are trained whole, and the blocks that get an adapter.

    Args:
        model: The model without adapters; its weights do not matter (`skeleton`).
        target_modules: Those of the LoraConfig; peft takes block numbers only beside a list.
        trainable: Patterns of modules to train whole; peft gives them no adapter.
        unfreeze_top_n: Adapters only in the last blocks, this many.

    Raises:
        ConfigError: a pattern that matches nothing or a part of a module, one of two tied modules, too many blocks.
    """
    layout, problems = layout_of(model), list[Problem]()
    on = _selected(layout, "trainable_layers", trainable, problems)
    problems += _torn(layout.names_of().values(), set(on), {}, on)
    modules = sorted({name.rpartition(".")[0] for name in on})
    for module in modules:
        left = sorted(name for name in layout.weights if name.rpartition(".")[0] == module and name not in on)
        if left:
            message = f"with lora whole modules are trained, and {module} has {left[0]} too; name the module"
            problems.append(Problem("trainable_layers", message))
    if unfreeze_top_n > layout.count:
        problems.append(Problem("unfreeze_top_n_layers", f"{unfreeze_top_n} is more than the {layout.count} blocks"))
    if problems:
        raise ConfigError([Problem(f"{where}.{one.path}" if where else one.path, one.message) for one in problems])
    extras: dict[str, Any] = {}
    if modules:
        extras["modules_to_save"] = modules
        extras["ensure_weight_tying"] = any(
            len(names) > 1 and names <= set(on) for names in layout.names_of().values()
        )
    if isinstance(target_modules, str) and 0 < unfreeze_top_n < layout.count:
        below = "|".join(str(index) for index in range(layout.count - unfreeze_top_n))
        extras["exclude_modules"] = rf"{re.escape(layout.blocks)}\.({below})\..*"
    elif unfreeze_top_n and not isinstance(target_modules, str):
        extras["layers_to_transform"] = list(range(layout.count - unfreeze_top_n, layout.count))
        extras["layers_pattern"] = layout.blocks.rpartition(".")[2]
    return extras


def skeleton(base: str, task: str = "CAUSAL_LM") -> Any:
    """The model of a folder or hub id, without its weights; `task` in peft's words."""
    import torch
    import transformers

    kinds = {"CAUSAL_LM": "CausalLM", "SEQ_CLS": "SequenceClassification", "TOKEN_CLS": "TokenClassification"}
    auto = getattr(transformers, f"AutoModelFor{kinds[task]}")
    with torch.device("meta"):
        return auto.from_config(transformers.AutoConfig.from_pretrained(base, trust_remote_code=False))


def groups_of(model: Any) -> list[list[Any]]:
    """What is trained, in groups from the top: the last block with the last norm and the output head; each block below
    it; the embeddings, with a head that is tied to them. Groups without a weight to train are left out.
    """
    layout = layout_of(model)
    embedding = layout.within(layout.parts["embedding"])
    groups: list[list[Any]] = [[] for _ in range(layout.count + 1)]
    parameters = {id(one): one for found in layout.weights.values() for one in found}
    for key, names in layout.names_of().items():
        if not parameters[key].requires_grad:
            continue
        index = layout.block_of(min(names))
        depth = 0 if index is None else layout.count - 1 - index
        groups[layout.count if names & embedding else depth].append(parameters[key])
    return [group for group in groups if group]


def problems_of_freezing(
    *,
    freeze_base_model: bool,
    frozen: Sequence[str],
    trainable: Sequence[str],
    unfreeze_top_n: int,
    lora: bool,
) -> list[Problem]:
    """What contradicts itself or has no effect, from the declaration alone; paths relative to the stage."""
    found = []
    if unfreeze_top_n and (frozen or trainable):
        other = "frozen_layers" if frozen else "trainable_layers"
        found.append(Problem("unfreeze_top_n_layers", f"{other} is set as well; keep one of them"))
    elif trainable and not freeze_base_model and not lora:
        message = "has no effect without freeze_base_model: true; all that is not in frozen_layers is trained"
        found.append(Problem("trainable_layers", message))
    elif freeze_base_model and not lora and not trainable and not unfreeze_top_n:
        message = "leaves nothing to train; set trainable_layers or unfreeze_top_n_layers, or use lora"
        found.append(Problem("freeze_base_model", message))
    return found
