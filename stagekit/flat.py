"""The flat door: the specification's 108 names, where each lives in a stage, and the way in and out.

One table drives both directions and the parity page (`docs/parity.md`).
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import TypeAdapter, ValidationError

from stagekit.adapters import METHODS
from stagekit.errors import ConfigError, Problem
from stagekit.groups import LoRA, Reference
from stagekit.options import Location, Options, shown
from stagekit.selectors import (
    DPO_LOSS_NAMES,
    FINE_TUNING_NAMES,
    METHOD_NAMES,
    PREFERENCE_NAMES,
    TABLES,
    TYPE_NAMES,
    select,
)
from stagekit.stage_options import StageOptions


if TYPE_CHECKING:
    from stagekit.stage import TrainingStage


class Home(NamedTuple):
    """Where a flat name lives: a path inside the stage, and for `method.*` the stage types that have it."""

    path: str
    types: tuple[str, ...] = ()


_RL = ("ppo", "grpo", "rloo")

MOVED: dict[str, Home] = {
    "stage_type": Home("method.type"),
    "fine_tuning_method": Home("method.type"),
    "preference_loss_type": Home("method.loss", ("dpo",)),
    "custom_training_function": Home("method.function", ("custom",)),
    "options": Home("trl"),
    "use_lora": Home("lora"),
    "lora_rank": Home("lora.rank"),
    "lora_alpha": Home("lora.alpha"),
    "lora_dropout": Home("lora.dropout"),
    "lora_target_modules": Home("lora.target_modules"),
    "use_qlora": Home("lora.bits"),
    "qlora_bits": Home("lora.bits"),
    "merge_lora_after_training": Home("lora.merge"),
    "use_reference_model": Home("reference.mode"),
    "share_reference_model": Home("reference.mode"),
    "update_reference_model": Home("reference.update_every"),
    "reference_model_update_interval": Home("reference.update_every"),
    "dpo_beta": Home("method.beta", ("dpo", "kto", "orpo", "cpo", "simpo", "self_play", "self_rewarding")),
    "preference_label_smoothing": Home("method.label_smoothing", ("cpo", "dpo")),
    "contrastive_margin": Home("method.margin", ("cpo", "dpo", "simpo")),
    "reward_model": Home("method.reward", (*_RL, "rejection_sampling", "synthetic_data")),
    "kl_penalty_coefficient": Home("method.kl_penalty_coefficient", _RL),
    "ppo_clip_range": Home("method.clip_range", _RL),
    "value_function_coefficient": Home("method.value_coefficient", ("ppo",)),
    "entropy_coefficient": Home("method.entropy_coefficient", ("ppo", "grpo")),
    "gae_lambda": Home("method.gae_lambda", ("ppo",)),
    "ppo_epochs_per_batch": Home("method.epochs_per_batch", _RL),
    "rollout_samples": Home("method.rollout_samples", _RL),
    "grpo_group_size": Home("method.group_size", ("grpo",)),
    "grpo_use_relative_rewards": Home("method.relative_rewards", ("grpo",)),
    "constitutional_principles": Home("method.principles", ("constitutional",)),
    "critique_model": Home("method.critique_model", ("constitutional",)),
    "critique_revision_rounds": Home("method.rounds", ("constitutional",)),
    "self_play_iterations": Home("method.iterations", ("self_play",)),
    "self_play_temperature": Home("method.temperature", ("self_play",)),
    "self_play_responses_per_prompt": Home("method.responses_per_prompt", ("self_play",)),
    "rejection_sampling_n": Home("method.n", ("rejection_sampling",)),
    "rejection_sampling_top_k": Home("method.top_k", ("rejection_sampling",)),
    "rejection_sampling_min_reward": Home("method.min_reward", ("rejection_sampling",)),
    "teacher_model": Home("method.teacher", ("distillation", "synthetic_data")),
    "distillation_temperature": Home("method.temperature", ("distillation",)),
    "distillation_alpha": Home("method.alpha", ("distillation",)),
    "use_intermediate_distillation": Home("method.hidden_states", ("distillation",)),
    "distillation_layer_mapping": Home("method.layer_map", ("distillation",)),
}

FLAT: Mapping[str, Home] = {**{name: Home(name) for name in StageOptions.model_fields}, **MOVED}
"""All 108 names."""

_LORA = {name: home.path.removeprefix("lora.") for name, home in MOVED.items() if home.path.startswith("lora.")}
_LORA_VALUES = {name: key for name, key in _LORA.items() if key != "bits"}
_REFERENCE = [name for name, home in MOVED.items() if home.path.startswith("reference.")]
_METHOD = {
    name: home for name, home in MOVED.items() if home.path.startswith("method.") and home.types and name not in TABLES
}
_BOOL = TypeAdapter(bool)
_SWITCHES = (
    "use_lora", "use_qlora", "use_reference_model", "share_reference_model", "update_reference_model"
)  # fmt: skip


def as_spelled(given: Mapping[str, Any], loc: Location) -> Location:
    """A location in a stage as the user spelled it: by the flat name, where that is what was given."""
    if not loc or not isinstance(given.get(str(loc[0]), ""), str):
        return loc
    for name in reversed(MOVED):
        group, _, key = MOVED[name].path.partition(".")
        if name not in given or group != loc[0]:
            continue
        if not key:
            return (name, *loc[1:])
        if key in loc[1:]:
            return (name, *loc[loc.index(key) + 1 :])
    inside = [name for name, home in MOVED.items() if name in given and home.path.startswith(f"{loc[0]}.")]
    return (inside[0],) if len(loc) == 1 and inside else loc


def path_as_spelled(given: Mapping[str, Any], path: str) -> str:
    """`as_spelled` for a path."""
    return ".".join(str(step) for step in as_spelled(given, tuple(path.split("."))))


def to_slots(given: Mapping[str, Any]) -> tuple[dict[str, Any], list[Problem]]:
    """Move flat names into their slots. Returns what to build the stage from, and what was wrong with the names."""
    slots = {name: value for name, value in given.items() if name not in MOVED}
    flat = {name: value for name, value in given.items() if name in MOVED}
    problems = _make_switches(flat)
    if "options" in flat:
        if "trl" in slots:
            problems.append(Problem("options", "trl is given as well; both are one option"))
        slots.setdefault("trl", flat["options"])
    problems += _method_door(flat, slots)
    problems += _lora_door(flat, slots)
    problems += _reference_door(flat, slots)
    return slots, problems


def _open(slots: dict[str, Any], name: str) -> dict[str, Any] | None:
    """The slot `name` as a dict that may be added to; None where it is an object already built."""
    value = slots.get(name)
    if isinstance(value, Options):
        return None
    return dict(value) if isinstance(value, Mapping) else {}


def _make_switches(flat: dict[str, Any]) -> list[Problem]:
    """Read the flat switches as pydantic reads a bool; those that are none are taken out and told."""
    problems = []
    for name in _SWITCHES:
        if name in flat:
            try:
                flat[name] = _BOOL.validate_python(flat[name])
            except ValidationError:
                problems.append(Problem(name, f"must be true or false, not {shown(flat.pop(name))}"))
    return problems


def _method_door(flat: Mapping[str, Any], slots: dict[str, Any]) -> list[Problem]:
    selectors = {name: flat[name] for name in TABLES if flat.get(name) is not None}
    options = {name: value for name, value in flat.items() if name in _METHOD}
    problems: list[Problem] = []
    if selectors and "method" in slots:
        return [Problem(name, "method is given as well; both are one option") for name in selectors]
    if selectors:
        method, tags, problems = select(selectors)
        if method is None:
            return problems
        slots["method"] = method
        own = slots.get("tags", ())
        if tags and isinstance(own, list | tuple):
            slots["tags"] = tuple(dict.fromkeys((*tags, *own)))
    if not options:
        return problems
    if isinstance(slots.get("method"), str):
        slots["method"] = {"type": slots["method"]}
    method = _open(slots, "method")
    for name, value in options.items():
        home, key = FLAT[name], FLAT[name].path.removeprefix("method.")
        kind = method.get("type", "sft") if method is not None else slots["method"].type
        if isinstance(kind, str) and kind in METHODS and kind not in home.types:
            carriers = ", ".join(home.types)
            problems.append(Problem(name, f"stage type {kind!r} has no such option; it belongs to {carriers}"))
        elif method is None or key in method:
            problems.append(Problem(name, f"method is given with its own options; write it there, as {home.path}"))
        else:
            method[key] = value
    if method is not None:
        slots["method"] = {"type": "sft", **method} if method else slots.get("method", "sft")
    return problems


def _lora_door(flat: Mapping[str, Any], slots: dict[str, Any]) -> list[Problem]:
    names = [name for name in flat if name == "use_lora" or name in _LORA]
    if not names:
        return []
    if "lora" in slots:
        return [Problem(name, f"lora is given as well; write it there, as {FLAT[name].path}") for name in names]
    if not flat.get("use_lora") and not flat.get("use_qlora"):
        idle = [name for name in names if name not in {"use_lora", "use_qlora"}]
        slots.update({"lora": None} if flat.get("use_lora") is False else {})
        return [Problem(name, "has no effect without use_lora: true (or use_qlora: true)") for name in idle]
    lora = {_LORA_VALUES[name]: flat[name] for name in names if name in _LORA_VALUES}
    problems = []
    if flat.get("use_lora") is False:
        problems.append(Problem("use_lora", "false contradicts use_qlora: true"))
    if flat.get("use_qlora"):
        lora["bits"] = flat.get("qlora_bits", 4)
        if lora["bits"] is None:
            problems.append(Problem("qlora_bits", "must be 4 or 8, not None"))
    elif "qlora_bits" in flat:
        problems.append(Problem("qlora_bits", "has no effect without use_qlora: true"))
    elif "use_qlora" in flat:
        lora["bits"] = None
    slots["lora"] = lora
    return problems


def _reference_door(flat: Mapping[str, Any], slots: dict[str, Any]) -> list[Problem]:
    names = [name for name in _REFERENCE if name in flat]
    if not names:
        return []
    if "reference" in slots:
        return [Problem(name, f"reference is given as well; write it there, as {FLAT[name].path}") for name in names]
    reference: dict[str, Any] = {}
    problems: list[Problem] = []
    if flat.get("use_reference_model") is False:
        reference["mode"] = "none"
        if flat.get("share_reference_model") is not None:
            problems.append(Problem("share_reference_model", "has no effect with use_reference_model: false"))
    elif "use_reference_model" in flat or "share_reference_model" in flat:
        reference["mode"] = "auto" if flat.get("share_reference_model", True) else "copy"
    if flat.get("update_reference_model"):
        reference["update_every"] = flat.get("reference_model_update_interval", 100)
        if reference["update_every"] is None:
            problems.append(Problem("reference_model_update_interval", "must be a whole number, not None"))
    elif "reference_model_update_interval" in flat:
        name = "reference_model_update_interval"
        problems.append(Problem(name, "has no effect without update_reference_model: true"))
    elif "update_reference_model" in flat:
        reference["update_every"] = None
    if reference:
        slots["reference"] = reference
    return problems


def default_of(name: str) -> Any:
    """The specification's default of a flat name; None for `name`, which has none."""
    special: dict[str, Any] = {
        "name": None,
        "stage_type": "supervised_fine_tuning",
        "learning_rate": METHODS["sft"].default_learning_rate,
        "fine_tuning_method": "sft",
        "use_lora": False,
        "use_qlora": False,
        "qlora_bits": 4,
        "use_reference_model": True,
        "share_reference_model": True,
        "update_reference_model": False,
        "reference_model_update_interval": 100,
        "options": {},
        "custom_training_function": None,
    }
    if name in special:
        return special[name]
    home = FLAT[name]
    group, _, key = home.path.partition(".")
    groups: Mapping[str, type[Options]] = {"lora": LoRA, "reference": Reference}
    owner: type[Options] = groups.get(group, StageOptions)
    if group == "method":
        owner = METHODS[home.types[0]]
    return owner.model_fields[key or group].get_default(call_default_factory=True)


def doc_of(name: str) -> str:
    """The docstring of the option behind a flat name."""
    home = FLAT[name]
    group, _, key = home.path.partition(".")
    if group == "method":
        owner: type[Options] = METHODS[(home.types or ("sft",))[0]]
    elif group in {"lora", "reference"} and key:
        owner = LoRA if group == "lora" else Reference
    else:
        from stagekit.stage import TrainingStage

        owner, key = TrainingStage, group
    return owner.model_fields[key].description or ""


def to_flat(stage: "TrainingStage", only_set: bool) -> dict[str, Any]:
    """A stage in the specification's names: all 108, or those that say what was set.

    Raises:
        ConfigError: with `only_set`, for what has no flat name, by path.
    """
    said = _said(stage)
    if only_set:
        problems = _unsayable(stage)
        if problems:
            raise ConfigError(problems)
        return said
    values = {name: default_of(name) for name in FLAT}
    values.update({name: getattr(stage, name) for name in StageOptions.model_fields})
    for name, home in _METHOD.items():
        if stage.method.type in home.types:
            values[name] = getattr(stage.method, home.path.removeprefix("method."))
    if stage.lora is not None:
        values.update({name: getattr(stage.lora, key) for name, key in _LORA_VALUES.items()})
    kind = stage.method.type
    values.update({"stage_type": TYPE_NAMES[kind], "fine_tuning_method": FINE_TUNING_NAMES.get(kind, "sft"), **said})
    values["learning_rate"] = stage.resolved_learning_rate()
    if "preference_loss_type" not in said:
        values.update(preference_loss_type=PREFERENCE_NAMES.get(kind, "sigmoid"))
    return values


def _said(stage: "TrainingStage") -> dict[str, Any]:
    given = stage.model_fields_set
    said = {name: getattr(stage, name) for name in StageOptions.model_fields if name in given}
    if "trl" in given:
        said["options"] = stage.trl
    if "method" in given:
        said.update(_said_method(stage))
    if "lora" in given:
        said.update(_said_lora(stage.lora))
    if "reference" in given and stage.reference is not None:
        said.update(_said_reference(stage.reference))
    return said


def _said_method(stage: "TrainingStage") -> dict[str, Any]:
    method = stage.method
    said: dict[str, Any] = {"stage_type": TYPE_NAMES[method.type]}
    if method.type in METHOD_NAMES:
        said["fine_tuning_method"] = METHOD_NAMES[method.type]
    loss = str(getattr(method, "loss", ""))
    if "loss" in method.model_fields_set and loss in DPO_LOSS_NAMES:
        name, value = DPO_LOSS_NAMES[loss]
        said[name] = value
    for name, home in _METHOD.items():
        key = home.path.removeprefix("method.")
        if method.type in home.types and key in method.model_fields_set:
            said[name] = getattr(method, key)
    return said


def _said_lora(lora: LoRA | None) -> dict[str, Any]:
    if lora is None:
        return {"use_lora": False}
    said: dict[str, Any] = {"use_lora": True}
    said.update({name: getattr(lora, key) for name, key in _LORA_VALUES.items() if key in lora.model_fields_set})
    if lora.bits is not None:
        said.update({"use_qlora": True, "qlora_bits": lora.bits})
    elif "bits" in lora.model_fields_set:
        said["use_qlora"] = False
    return said


def _said_reference(reference: Reference) -> dict[str, Any]:
    said: dict[str, Any] = {}
    if "mode" in reference.model_fields_set:
        if reference.mode == "none":
            said["use_reference_model"] = False
        else:
            said.update({"use_reference_model": True, "share_reference_model": reference.mode == "auto"})
    if reference.update_every is not None:
        said.update({"update_reference_model": True, "reference_model_update_interval": reference.update_every})
    elif "update_every" in reference.model_fields_set:
        said["update_reference_model"] = False
    return said or {"use_reference_model": True}


def _unsayable(stage: "TrainingStage") -> list[Problem]:
    """What a stage says that the flat names cannot."""
    no_name = "has no flat name; keep the slot spelling"
    found = [
        Problem(f"{stage.path}.{name}", no_name)
        for name in ("model", "generation", "text_metrics", "gate")
        if getattr(stage, name) is not None
    ]
    said = _said_method(stage)
    chosen, _, _ = select({name: said[name] for name in TABLES if name in said})
    if chosen is not None and chosen["type"] != stage.method.type:
        found.append(Problem(f"{stage.path}.method.type", f"{stage.method.type!r} {no_name}"))
    if stage.reference is not None and stage.reference.mode not in {"auto", "copy", "none"}:
        found.append(Problem(f"{stage.path}.reference.mode", f"{stage.reference.mode!r} {no_name}"))
    sayable = {home.path.removeprefix("method.") for home in _METHOD.values() if stage.method.type in home.types}
    for key in sorted(stage.method.model_fields_set - sayable - {"type"}):
        value = getattr(stage.method, key)
        if key == "loss" and value in DPO_LOSS_NAMES:
            continue
        found.append(Problem(f"{stage.path}.method.{key}", no_name))
    return found
