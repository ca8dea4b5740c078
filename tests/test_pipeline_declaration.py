"""A pipeline as declared: what must hold between stages and on disk, and a file with many mistakes."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stagekit import ConfigError, TrainingPipeline, TrainingStage, load
from stagekit.checks import slug
from stagekit.flat import FLAT
from stagekit.parse import parse


MODEL = Path(__file__).resolve().parent.parent / "stagekit/recipes/data/tiny"


def told(build: Callable[[], object]) -> list[tuple[str, str]]:
    with pytest.raises(ConfigError) as caught:
        build()
    return [(problem.path, problem.message) for problem in caught.value.problems]


def across(*stages: dict[str, Any], **given: Any) -> list[tuple[str, str]]:
    """The problems between stages; stages get a name by position and data where they say none."""
    built = tuple(
        TrainingStage(**{"name": f"s{index}", "training_data": "rows.jsonl", **one})
        for index, one in enumerate(stages)
    )
    try:
        TrainingPipeline(**{"model": "some/model", "stages": built, **given})
    except ConfigError as error:
        return [(problem.path, problem.message) for problem in error.problems]
    return []


EVALUATION = {"method": "evaluation", "training_data": None, "validation_data": "v.jsonl"}
CUSTOM = {"method": {"type": "custom", "function": "json:loads"}}
CAI = {"method": "constitutional"}


@pytest.mark.parametrize(
    ("stages", "expected"),
    [
        ([{"name": "a"}, {"name": "a"}], [("stages.a.name", "'a' is taken by another stage; names are unique")]),
        ([{"name": "A"}, {"name": "a"}], [("stages.a.name", "'a' has the same folder as 'A'")]),
        ([{"name": "a b"}, {"name": "a-b"}], [("stages.a-b.name", "'a-b' has the same folder as 'a b'")]),
        *(
            ([{"name": name}],
             [(f"stages.{name}.name", f"{name!r} cannot name a folder and a path; use letters, digits, - and _")])
            for name in ("a.b", "a/b", "..", "/", "", "-", "a=b", "中")
        ),
        ([{"training_data": "stage:s1/x"}, CAI],
         [("stages.s0.training_data", "stage 's1' comes later; only results of earlier stages can be used")]),
        ([{**CAI, "training_data": "stage:s0/revisions"}],
         [("stages.s0.training_data", "stage 's0' is this one; only results of earlier stages can be used")]),
        ([{"model": "stage:s1"}, {}],
         [("stages.s0.model", "stage 's1' comes later; only results of earlier stages can be used")]),
        ([{**CAI, "name": "sl-cai"}, {"training_data": "stage:sl-cia/revisions"}],
         [("stages.s1.training_data", "no stage 'sl-cia' before this one; did you mean 'sl-cai'?")]),
        ([{"model": "stage:zzz"}], [("stages.s0.model", "no stage 'zzz' before this one")]),
        ([CAI, {"training_data": "stage:s0/preference"}],
         [("stages.s1.training_data", "stage 's0' leaves no dataset 'preference'; it leaves: revisions, preferences "
                                      "(write stage:s0/DATASET)")]),
        ([CAI, {"training_data": "stage:s0"}],
         [("stages.s1.training_data", "stage 's0' leaves no dataset ''; it leaves: revisions, preferences "
                                      "(write stage:s0/DATASET)")]),
        ([{}, {"training_data": "stage:s0/x"}],
         [("stages.s1.training_data",
           "stage 's0' leaves no dataset 'x'; it leaves: none (write stage:s0/DATASET)")]),
        ([CUSTOM, {"training_data": "stage:s0"}],
         [("stages.s1.training_data", "stage 's0' leaves no dataset ''; it leaves: what its function returns "
                                      "(write stage:s0/DATASET)")]),
        ([{**CAI, "enabled": False}, {"training_data": "stage:s0/revisions"}],
         [("stages.s1.training_data", "stage 's0' has enabled: false, so it leaves no dataset")]),
        ([EVALUATION, {"model": "stage:s0"}],
         [("stages.s1.model", "stage 's0' leaves no model (evaluation trains none)")]),
        ([{"enabled": False}, {"model": "stage:s0"}],
         [("stages.s1.model", "stage 's0' leaves no model (enabled: false)")]),
        ([{**EVALUATION, "method": "sft", "is_evaluation_only": True}, {"model": "stage:s0"}],
         [("stages.s1.model", "stage 's0' leaves no model (is_evaluation_only: true)")]),
        ([{}, {"method": {"type": "constitutional", "critique_model": "stage:s9"}}],
         [("stages.s1.method.critique_model", "no stage 's9' before this one")]),
        ([{"training_data": {"a": "x.jsonl", "b": "stage:s1/x"}, "data_mixing_ratios": {"a": 1, "b": 1}}],
         [("stages.s0.training_data.b", "no stage 's1' before this one")]),
        ([{}, {"validation_data": {"source": "stage:s0/x"}}],
         [("stages.s1.validation_data",
           "stage 's0' leaves no dataset 'x'; it leaves: none (write stage:s0/DATASET)")]),
        ([], [("stages", "empty; a pipeline has at least one stage")]),
    ],
)  # fmt: skip
def test_what_does_not_fit_between_stages_is_told(
    stages: list[dict[str, Any]], expected: list[tuple[str, str]]
) -> None:
    assert across(*stages) == expected


@pytest.mark.parametrize(
    "stages",
    [
        [CAI, {"method": "dpo", "training_data": "stage:s0/preferences"}],
        [CUSTOM, {"training_data": "stage:s0/anything"}],
        [{}, {"method": {"type": "constitutional", "critique_model": "stage:s0"}}],
        [{}, {}, {"model": "stage:s0"}],
        [CUSTOM, {"model": "stage:s0"}],
        [{"name": "a"}, {"name": "b_1"}, {"name": "C-2"}],
    ],
)
def test_what_fits_between_stages_is_accepted(stages: list[dict[str, Any]]) -> None:
    assert across(*stages) == []


def test_some_stage_must_say_which_model_it_starts_from() -> None:
    missing = ("model", "missing; say which model the first stage starts from")
    assert across({}, model=None) == [missing]
    assert across({"model": "m"}, {}, model=None) == []
    assert across(CUSTOM, {}, model=None) == []
    assert across({**EVALUATION, "model": "m"}, {}, model=None) == [
        ("stages.s1.model", "missing; no stage before 's1' leaves a model")
    ]
    assert across({}, model="stage:s0") == [
        ("model", "'stage:s0' is no model to start from; a stage's own model can be")
    ]


@pytest.mark.parametrize("name", ["", "/", "a/b", "..", "!!"])
def test_the_name_of_a_pipeline_is_its_folder_unless_it_has_another(name: str) -> None:
    assert across({}, name=name) == [("name", f"{name!r} cannot name a folder; set output_dir, or use letters")]
    assert across({}, name=name, output_dir="run") == []


def test_a_folder_s_name_is_the_stage_s_in_safe_letters() -> None:
    assert [slug(name) for name in ("sl-cai", "RL CAI!", "../x", "a  b", "..", "ä")] == [
        "sl-cai", "rl-cai", "x", "a-b", "", ""
    ]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Good data, and bad ones."""
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n")
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "a"}) + "\n")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "functions.py").write_text("import json\n\n\ndef score(model, dataset):\n    return {}\n")
    return tmp_path


@pytest.mark.parametrize(
    ("given", "path", "part"),
    [
        ({"training_data": "nope.jsonl"}, "training_data", "nope.jsonl does not exist"),
        ({"training_data": "empty.jsonl"}, "training_data", "empty.jsonl is empty (0 bytes)"),
        ({"training_data": "text.jsonl", "method": "dpo"}, "training_data",
         "needs columns (prompt, chosen, rejected)"),
        ({"training_data": {"source": "text.jsonl", "columns": {"prompt": "question"}}}, "training_data",
         "'question' is no column of the data; it has text"),
        ({"training_data": {"source": "text.jsonl", "columns": {"prompt": "text"}}, "method": "dpo"},
         "training_data", "found prompt. Missing for the nearest: chosen, rejected"),
        ({"training_data": "owner/data"}, "training_data", "say which split"),
        ({"training_data": {"a": "text.jsonl", "b": "nope.jsonl"}, "data_mixing_ratios": {"a": 1, "b": 1}},
         "training_data.b", "nope.jsonl does not exist"),
        ({"validation_data": "nope.jsonl"}, "validation_data", "nope.jsonl does not exist"),
        ({"model": "./nope"}, "model", "nope does not exist"),
        ({"model": "package:no_such_package_here/x.gguf"}, "model", "is not installed"),
        ({"method": {"type": "constitutional", "critique_model": "./nope"}, "training_data": "pairs.jsonl"},
         "method.critique_model", "nope does not exist"),
        ({"run_condition": "no_such_module_here:f"}, "run_condition", "no module 'no_such_module_here'"),
        ({"run_condition": "json.nope:f"}, "run_condition", "no module 'json.nope'"),
        ({"data_preprocessor": "functions:scor"}, "data_preprocessor", "has no 'scor'; did you mean 'score'?"),
        ({"method": {"type": "custom", "function": "functions:train"}}, "method.function", "has no 'train'"),
        ({"generation": {"backend": "no_such_module_here:f"}, "method": "constitutional",
          "training_data": "pairs.jsonl"}, "generation.backend", "no module"),
    ],
)  # fmt: skip
def test_check_finds_what_is_not_on_disk(
    folder: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], path: str, part: str
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    stage = TrainingStage(**{"name": "a", "training_data": "text.jsonl", **given})
    pipeline = TrainingPipeline(model=str(MODEL), stages=(stage,))
    ((told_path, message),) = told(pipeline.check)
    assert told_path == f"stages.a.{path}"
    assert part in message


def test_check_finds_the_pipeline_s_own_model_and_template() -> None:
    stage = TrainingStage(name="a", method="custom", custom_training_function="json:loads")
    assert [path for path, _ in told(
        TrainingPipeline(model="./nope", chat_template="nope.jinja", stages=(stage,)).check
    )] == ["model", "chat_template"]  # fmt: skip


@pytest.mark.parametrize(
    "given",
    [
        {"run_condition": "functions:score"},
        {"run_condition": "json:loads"},
        {"run_condition": "json.decoder:JSONDecoder.decode"},
        {"run_condition": "__main__:anything"},
        {"data_preprocessor": "functions:json.loads"},
        {"enabled": False, "training_data": "nope.jsonl"},
        {"training_data": {"source": "text.jsonl", "columns": {"prompt": "text"}}, "data_preprocessor": "json:loads"},
        {"training_data": "text.jsonl", "method": "dpo", "data_preprocessor": "json:loads"},
    ],
)
def test_check_accepts_what_is_there(folder: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any]) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    stage = TrainingStage(**{"name": "a", "training_data": "text.jsonl", **given})
    TrainingPipeline(model=str(MODEL), stages=(stage,)).check()


def test_check_does_not_run_the_modules_that_it_looks_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    (folder / "loud").mkdir()
    (folder / "loud/__init__.py").write_text("raise RuntimeError('imported')\n")
    (folder / "loud/inner.py").write_text("def f(result):\n    return True\n")
    stage = TrainingStage(name="a", training_data="text.jsonl", run_condition="loud.inner:f")
    TrainingPipeline(model=str(MODEL), stages=(stage,)).check()


MANY_MISTAKES = """
name: a/b
model: ./no-such-model
otput_dir: runs
chat_template: no-such-file.jinja
stages:
  - name: sft
    epochs: "3"
    lerning_rate: 1.0e-5
    training_data: no-such-file.jsonl
    lora: {r: 8, dropout: 2}
    use_mixed_precision: perhaps
  - method: {type: dpo, bta: 0.1, loss: sigmoidd}
    training_data: stage:sfft/preferences
    warmup_steps: 5
    warmup_ratio: 0.5
  - name: sft
    method: dppo
    num_train_epochs: 3
  - name: cai
    stage_type: constitutional
    fine_tuning_method: kto
    training_data: 5
    max_duration: 1 week
  - name: last
    training_data: text.jsonl
    metrics_to_track: loss
    trainable_layers: [a]
    run_condition: no_such_module_here:f
    trl: {max_lenght: 5, output_dir: x}
"""


def test_a_file_with_many_mistakes_lists_all_of_them_with_their_paths_in_the_order_of_its_stages(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    (folder / "many.yaml").write_text(MANY_MISTAKES)
    with pytest.raises(ConfigError) as caught:
        load("many.yaml")
    assert [problem.path for problem in caught.value.problems] == [
        "otput_dir",
        "model",
        "chat_template",
        "name",
        "stages.sft.epochs",
        "stages.sft.use_mixed_precision",
        "stages.sft.lora.dropout",
        "stages.sft.lora.r",
        "stages.sft.lerning_rate",
        "stages.sft.training_data",
        "stages.1.name",
        "stages.1.method.loss",
        "stages.1.method.bta",
        "stages.1.warmup_ratio",
        "stages.1.training_data",
        "stages.2.name",
        "stages.2.method",
        "stages.2.num_train_epochs",
        "stages.cai.fine_tuning_method",
        "stages.cai.training_data",
        "stages.cai.max_duration",
        "stages.last.metrics_to_track",
        "stages.last.trainable_layers",
        "stages.last.run_condition",
        "stages.last.trl.max_lenght",
        "stages.last.trl.output_dir",
    ]
    lines = str(caught.value).splitlines()
    assert lines[0] == "26 problems in many.yaml:"
    assert all(line.startswith("  ") and ": " in line for line in lines[1:])
    assert len(lines) == 27


def test_ten_mistakes_are_told_in_a_second_without_torch(folder: Path) -> None:
    (folder / "many.yaml").write_text(MANY_MISTAKES)
    code = (
        "import sys\nfrom stagekit import ConfigError, load\n"
        "try:\n    load('many.yaml')\nexcept ConfigError as error:\n    print(len(error.problems))\n"
        "print(sorted({'torch', 'transformers', 'trl', 'peft', 'datasets'} & set(sys.modules)))\n"
    )
    started = time.monotonic()
    root = str(MODEL.parents[3])
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env={"PYTHONPATH": root}, capture_output=True, text=True, check=True
    )
    assert ran.stdout.splitlines() == ["26", "[]"]
    assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "f.yaml: is empty; a pipeline is a mapping with name, model and stages"),
        (b"# nothing\n", "f.yaml: is empty; a pipeline is a mapping with name, model and stages"),
        (b"- a\n", "f.yaml: a pipeline is a mapping with name, model and stages, not list"),
        (b"just text\n", "f.yaml: a pipeline is a mapping with name, model and stages, not str"),
        (b"name: caf\xe9\n", "f.yaml: is not UTF-8 (byte 9: invalid continuation byte); save it as UTF-8"),
        (b"name: [a\n", "f.yaml, line 2: not YAML: expected ',' or ']', but got '<stream end>'"),
        (b"name: a\nname: b\n", "f.yaml, line 2: not YAML: the key 'name' is there twice"),
        (b"stages:\n  - name: a\n    lora: {rank: 1, rank: 2}\n",
         "f.yaml, line 3: not YAML: the key 'rank' is there twice"),
        (b"a: 1\n---\nb: 2\n", "f.yaml, line 2: not YAML: but found another document"),
        (b"name: !!python/object/apply:os.system [ls]\n",
         "f.yaml, line 1: not YAML: could not determine a constructor for the tag "
         "'tag:yaml.org,2002:python/object/apply:os.system'"),
        (b"name: 2024-13-01\n",
         "f.yaml: a value cannot be read: month must be in 1..12; quote it if it is text"),
        (b"? [a]\n: b\n", "f.yaml, line 1: not YAML: found unhashable key"),
        (b"[" * 5000, "f.yaml: is nested too deep to be a pipeline"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_pipeline_says_what_it_is(
    folder: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, message: str
) -> None:
    monkeypatch.chdir(folder)
    Path("f.yaml").write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load("f.yaml")
    assert str(caught.value) == message


def test_a_file_that_cannot_be_read_says_why(folder: Path) -> None:
    for path, part in ((folder, "is a folder"), (folder / "no.yaml", "no such file"),
                       (folder / "text.jsonl/x.yaml", "cannot be read")):  # fmt: skip
        with pytest.raises(ConfigError, match=part):
            load(path)


def test_a_utf8_file_with_a_byte_order_mark_and_umlauts_is_read(folder: Path) -> None:
    text = f"name: ab\nmodel: {MODEL}\nstages:\n- {{name: a, description: Ä, training_data: {folder}/text.jsonl}}\n"
    (folder / "f.yaml").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert load(folder / "f.yaml").stages[0].description == "Ä"


def test_yaml_s_merge_keys_work(folder: Path) -> None:
    (folder / "f.yaml").write_text(
        f"model: {MODEL}\nstages:\n"
        f"- &base {{name: a, training_data: {folder}/text.jsonl, epochs: 1}}\n"
        "- {<<: *base, name: b, batch_size: 2}\n"
    )
    first, second = load(folder / "f.yaml").stages
    assert (first.epochs, second.epochs, second.batch_size, second.name) == (1, 1, 2, "b")


def test_overrides_are_part_of_what_is_checked(folder: Path) -> None:
    (folder / "f.yaml").write_text(f"model: {MODEL}\nstages:\n- {{name: a, training_data: {folder}/text.jsonl}}\n")
    assert load(folder / "f.yaml", ["stages.a.epochs=1"]).stages[0].epochs == 1
    assert told(lambda: load(folder / "f.yaml", ["stages.a.epochs=x"])) == [
        ("stages.a.epochs", "must be a whole number, not 'x'")
    ]


@pytest.mark.parametrize(
    ("raw", "paths"),
    [
        (5, [""]),
        (None, [""]),
        ([], [""]),
        ({}, ["stages"]),
        ({"stages": None}, ["stages"]),
        ({"stages": "x"}, ["stages"]),
        ({"stages": {"a": {}}}, ["stages"]),
        ({"stages": [], "model": "./nope"}, ["model", "stages"]),
        ({"stages": ["sft"], "model": "./nope"}, ["model", "stages.0"]),
        ({"stages": [None, {"name": 5}], "model": "./nope"}, ["model", "stages.0", "stages.1.name",
                                                             "stages.1.training_data"]),
        ({"stages": [{}], "model": "./nope"}, ["model", "stages.0.name", "stages.0.training_data"]),
        ({5: 1, "stages": [{"name": "a", True: 2, "epochs": 0}], "model": "./nope"},
         ["5", "model", "stages.a.True", "stages.a.epochs", "stages.a.training_data"]),
        ({"stages": [{"name": "a", "tags": [1, 2], "training_data": "x.jsonl"}], "model": "./nope"},
         ["model", "stages.a.tags.0", "stages.a.tags.1", "stages.a.training_data"]),
        ({"stages": [{"name": "a", "method": "custom", "lora": {}}], "model": "./nope"},
         ["model", "stages.a.method.function", "stages.a.lora"]),
        ({"stages": [{"name": "a", "method": {"type": "constitutional", "principles": [5, {"name": "x", "oops": 1}]},
                      "training_data": "x.jsonl"}], "model": "./nope"},
         ["model", "stages.a.method.principles.0", "stages.a.method.principles.x.critique_request",
          "stages.a.method.principles.x.revision_request", "stages.a.method.principles.x.oops",
          "stages.a.training_data"]),
        ({"stages": [{"name": "a", "stage_type": "preference_optimization", "dpo_beta": "x", "use_lora": True,
                      "lora_rank": 0, "preference_label_smoothing": 0.1, "training_data": "x.jsonl"}],
          "model": "./nope"},
         ["model", "stages.a.dpo_beta", "stages.a.lora_rank", "stages.a.preference_label_smoothing",
          "stages.a.training_data"]),
    ],
)  # fmt: skip
def test_plain_data_of_any_shape_is_told_by_path(raw: Any, paths: list[str]) -> None:
    assert [path for path, _ in told(lambda: parse(raw))] == paths


KEYS = st.sampled_from(
    [*TrainingStage.model_fields, *FLAT, "type", "beta", "rank", "source", "split", "principles", "x"]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 3) | st.floats() | st.dates()
    | st.sampled_from(["", "x", "dpo", "sft", "custom", "constitutional", "stage:a", "stage:", "package:", "a:b", "1h",
                       "package:json/x", "\0", "preference_optimization", "kto", "auto", "true"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(KEYS | st.integers(0, 1), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
STAGES = st.dictionaries(KEYS, VALUES, max_size=5) | VALUES


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.fixed_dictionaries({"stages": st.lists(STAGES, max_size=3) | VALUES}, optional={"model": VALUES, "x": VALUES})
)
def test_no_data_of_whatever_shape_end_in_a_traceback(raw: dict[str, Any]) -> None:
    try:
        parse(raw)
    except ConfigError as error:
        assert error.problems
        assert all(problem.path and problem.message for problem in error.problems)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(KEYS, VALUES, max_size=5))
def test_no_stage_of_whatever_shape_ends_in_a_traceback(raw: dict[str, Any]) -> None:
    try:
        TrainingStage(**{"name": "a", **raw})
    except ConfigError as error:
        assert all(problem.path and problem.message for problem in error.problems)
