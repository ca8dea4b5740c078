import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict, IterableDataset, Json, Value
from hypothesis import given, settings
from hypothesis import strategies as st

from stagekit.data import (
    as_messages,
    check_columns,
    fingerprint,
    load_data,
    mix,
    mixing_counts,
    read_jsonl,
    shuffled,
    take,
    write_jsonl,
)
from stagekit.errors import ConfigError, StageError


WHERE = "stages.sft.training_data"
ROWS = [{"prompt": f"p{i}", "completion": f"c{i}"} for i in range(4)]


def write(path: Path, *lines: Any) -> Path:
    """Write each line as JSON, or as it is when it is a text."""
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def numbers(count: int, offset: int = 0) -> Dataset:
    """A data set with one column of numbers."""
    return Dataset.from_dict({"n": list(range(offset, offset + count))})


def test_jsonl_json_csv_parquet_and_saved_datasets_give_the_same_rows(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", *ROWS)
    write(tmp_path / "rows.json", ROWS)
    Dataset.from_list(ROWS).to_csv(tmp_path / "rows.csv")
    Dataset.from_list(ROWS).to_parquet(tmp_path / "rows.parquet")
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    for name in ("rows.jsonl", "rows.json", "rows.csv", "rows.parquet", "saved"):
        dataset = load_data(str(tmp_path / name), where=WHERE)
        assert dataset.to_list() == ROWS, name
        assert dataset.cache_files == [], name


def test_live_datasets_and_columns_are_taken_as_they_are() -> None:
    assert load_data(Dataset.from_list(ROWS), where=WHERE).to_list() == ROWS
    assert load_data({"n": [1, 2]}, where=WHERE).to_list() == [{"n": 1}, {"n": 2}]


def test_a_file_edited_between_two_loads_is_read_again(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", {"text": "old"})
    assert load_data(str(path), where=WHERE)["text"][:] == ["old"]
    write(path, {"text": "new"})
    assert load_data(str(path), where=WHERE)["text"][:] == ["new"]


def test_columns_are_renamed_ours_from_theirs(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", {"question": "q", "completion": "c"})
    dataset = load_data(str(path), where=WHERE, columns={"prompt": "question"})
    assert dataset.to_list() == [{"prompt": "q", "completion": "c"}]


def test_columns_can_be_swapped() -> None:
    dataset = load_data({"a": [1], "b": [2]}, where=WHERE, columns={"a": "b", "b": "a"})
    assert dataset.to_list() == [{"b": 1, "a": 2}]


def test_a_rename_of_a_column_that_is_not_there_lists_those_that_are() -> None:
    with pytest.raises(ConfigError, match=r"training_data: columns: prompt: 'q' is no column.*question, answer"):
        load_data({"question": ["a"], "answer": ["b"]}, where=WHERE, columns={"prompt": "q"})


def test_a_missing_file_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"stages\.sft\.training_data: .*rows\.jsonl does not exist"):
        load_data(str(tmp_path / "rows.jsonl"), where=WHERE)


def test_broken_utf8_far_down_is_reported_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "a"}\n' * 99 + b'{"text": "\xff"}\n')
    with pytest.raises(StageError, match=rf"training_data: {path}, line 100: broken UTF-8 \(byte 11 is 0xff\)"):
        load_data(str(path), where=WHERE)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ({"text": "a", "extra": 1}, "line 61: columns text, extra differ"),
        ({}, r"line 61: columns \(none\) differ"),
        ({"text": 1}, r"column 'text' holds str \(line 1\) and int \(line 61\)"),
        ({"text": True}, r"str \(line 1\) and bool \(line 61\)"),
        ("{", "line 61: invalid JSON"),
    ],
)
def test_a_row_unlike_the_others_is_reported_with_its_line(tmp_path: Path, line: Any, expected: str) -> None:
    path = write(tmp_path / "rows.jsonl", *[{"text": "a"}] * 60, line)
    with pytest.raises(StageError, match=expected):
        load_data(str(path), where=WHERE)


def test_whole_and_broken_numbers_make_one_column_but_bool_and_int_do_not(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", {"score": 1}, {"score": 0.5})
    assert load_data(str(path), where=WHERE)["score"][:] == [1.0, 0.5]
    write(path, {"label": True}, {"label": 0})
    with pytest.raises(StageError, match=r"bool .line 1. and int .line 2."):
        load_data(str(path), where=WHERE)


def test_a_number_too_big_for_the_column_is_reported(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", {"n": 1}, {"n": 2**70})
    with pytest.raises(ConfigError, match="line 2: the number 1180591620717411303424 does not fit into 64 bits"):
        load_data(str(path), where=WHERE)


def test_objects_with_differing_keys_are_not_filled_with_null(tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": "a"}], "tools": [{"name": "f", "parameters": {"x": 1}}]},
        {
            "messages": [{"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}],
            "tools": [{"name": "g", "parameters": {"y": "z"}}],
        },
    ]
    dataset = load_data(str(write(tmp_path / "rows.jsonl", *rows)), where=WHERE)
    assert dataset.to_list() == rows
    assert list(dataset) == rows


def test_null_is_kept_where_it_stands(tmp_path: Path) -> None:
    rows = [{"text": "a", "note": None}, {"text": "b", "note": "x"}]
    assert load_data(str(write(tmp_path / "rows.jsonl", *rows)), where=WHERE).to_list() == rows


def test_csv_values_stay_text(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text('prompt,completion\n1,"NA"\n"a\nb",null\n')
    expected = [{"prompt": "1", "completion": "NA"}, {"prompt": "a\nb", "completion": "null"}]
    assert load_data(str(tmp_path / "rows.csv"), where=WHERE).to_list() == expected


@pytest.mark.parametrize("empty", [Dataset.from_dict({"text": []}), {"text": []}])
def test_no_rows_are_an_error(empty: Any) -> None:
    with pytest.raises(StageError, match="holds no rows"):
        load_data(empty, where=WHERE)


def test_a_file_without_rows_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no rows"):
        load_data(str(write(tmp_path / "rows.jsonl", "")), where=WHERE)
    Dataset.from_dict({"text": []}).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(StageError, match="holds no rows"):
        load_data(str(tmp_path / "rows.parquet"), where=WHERE)


def test_a_split_is_chosen_by_name_and_never_guessed(tmp_path: Path) -> None:
    splits = DatasetDict({"train": numbers(3), "test": numbers(2)})
    splits.save_to_disk(tmp_path / "saved")
    assert len(load_data(str(tmp_path / "saved"), where=WHERE, split="test")) == 2
    with pytest.raises(ConfigError, match="no split is given; choose one with split: train, test"):
        load_data(str(tmp_path / "saved"), where=WHERE)
    with pytest.raises(ConfigError, match="it has no split 'dev'"):
        load_data(splits, where=WHERE, split="dev")


def test_a_split_of_a_file_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", *ROWS)
    with pytest.raises(ConfigError, match="split 'train' needs a hub dataset"):
        load_data(str(path), where=WHERE, split="train")


def test_a_stages_data_set_is_found_by_the_pipeline(tmp_path: Path) -> None:
    path = write(tmp_path / "preferences.jsonl", *ROWS)
    found = {("sl-cai", "preferences"): path}
    dataset = load_data("stage:sl-cai/preferences", where=WHERE, stage_datasets=lambda *names: found[names])
    assert dataset.to_list() == ROWS
    with pytest.raises(ConfigError, match="only be read inside a pipeline"):
        load_data("stage:sl-cai/preferences", where=WHERE)


def test_a_hub_data_set_out_of_reach_names_source_and_split() -> None:
    with pytest.raises(StageError, match=r"'no-such-owner/nothing' \(split 'train'\).*the network"):
        load_data("no-such-owner/nothing", where=WHERE, split="train")


def test_streams_and_named_sets_without_ratios_are_refused() -> None:
    with pytest.raises(ConfigError, match="streaming"):
        load_data(IterableDataset.from_generator(lambda: iter(ROWS)), where=WHERE)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="data_mixing_ratios"):
        load_data({"a": numbers(2)}, where=WHERE)  # type: ignore[dict-item]


@given(
    st.lists(st.tuples(st.integers(10, 400), st.floats(0.05, 20)), min_size=1, max_size=5),
)
@settings(max_examples=200, deadline=None)
def test_t22_mixing_counts_are_exact(sets: list[tuple[int, float]]) -> None:
    lengths = {str(i): length for i, (length, _) in enumerate(sets)}
    ratios = {str(i): ratio for i, (_, ratio) in enumerate(sets)}
    counts = mixing_counts(lengths, ratios)
    total, weight = sum(counts.values()), sum(ratios.values())
    for name, count in counts.items():
        assert count <= lengths[name]
        assert abs(count - total * ratios[name] / weight) < 1 + 1e-9
    # One more row would use some set beyond its length.
    assert any((total + 1) * ratios[name] / weight > lengths[name] - 1e-6 for name in lengths)


@pytest.mark.parametrize(
    ("lengths", "ratios", "expected"),
    [
        ({"a": 100, "b": 10}, {"a": 0.5, "b": 0.5}, {"a": 10, "b": 10}),
        ({"a": 100, "b": 10}, {"a": 9, "b": 1}, {"a": 90, "b": 10}),
        ({"a": 10, "b": 10, "c": 10}, {"a": 1, "b": 1, "c": 1}, {"a": 10, "b": 10, "c": 10}),
        ({"a": 7, "b": 100, "c": 100}, {"a": 0.7, "b": 0.2, "c": 0.1}, {"a": 7, "b": 2, "c": 1}),
        # N = floor(5 / (1/3)) = 15 with weights 1/3, 2/3
        ({"a": 5, "b": 100}, {"a": 1, "b": 2}, {"a": 5, "b": 10}),
        # N = floor(2 / 0.3) = 6, shares 2.4, 1.8, 1.8: the two largest remainders get the rows that are left
        ({"a": 99, "b": 99, "c": 2}, {"a": 4, "b": 3, "c": 3}, {"a": 2, "b": 2, "c": 2}),
    ],
)
def test_t22_mixing_counts_by_hand(
    lengths: dict[str, int], ratios: dict[str, float], expected: dict[str, int]
) -> None:
    assert mixing_counts(lengths, ratios) == expected


def test_t22_a_mixture_uses_no_row_twice_and_depends_on_the_seed_only() -> None:
    sets = {"a": numbers(100), "b": numbers(10, 1000)}
    mixed = mix(sets, {"a": 3, "b": 1}, seed=0, where="ratios")["n"][:]
    assert len(mixed) == len(set(mixed)) == 40
    assert sum(n >= 1000 for n in mixed) == 10
    assert mixed == mix(sets, {"b": 1, "a": 3}, seed=0, where="ratios")["n"][:]
    assert mixed != mix(sets, {"a": 3, "b": 1}, seed=1, where="ratios")["n"][:]
    assert mixed != sorted(mixed)


def test_a_mixture_can_tell_where_each_row_is_from() -> None:
    mixed = mix({"a": numbers(4), "b": numbers(4, 100)}, {"a": 1, "b": 1}, 0, "ratios", source_column=True)
    assert all((row["source"] == "b") == (row["n"] >= 100) for row in mixed)
    with pytest.raises(ConfigError, match="already has a column 'source'"):
        mix({"a": Dataset.from_dict({"source": [1]})}, {"a": 1}, 0, "ratios", source_column=True)


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [
        ({"a": 1}, "ratios.b: the data set has no ratio"),
        ({"a": 1, "b": 1, "c": 1}, "ratios.c: has no data set"),
        ({"a": 1, "b": 0}, "ratios.b: 0 is no ratio"),
        ({"a": 1, "b": float("nan")}, "ratios.b: nan is no ratio"),
        ({"a": 1, "b": -1}, "ratios.b: -1 is no ratio"),
        ({"a": 1, "b": 1e-9}, "ratios.b: with ratio 1e-09 no row"),
    ],
)
def test_t22_wrong_ratios_are_refused(ratios: dict[str, float], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        mix({"a": numbers(3), "b": numbers(3)}, ratios, 0, "ratios")


def test_t22_differing_columns_are_refused_with_every_difference() -> None:
    sets = {"a": Dataset.from_dict({"x": [1], "y": ["s"]}), "b": Dataset.from_dict({"x": ["1"], "z": ["s"]})}
    with pytest.raises(ConfigError) as raised:
        mix(sets, {"a": 1, "b": 1}, 0, "ratios")
    text = str(raised.value)
    assert len(raised.value.problems) == 3
    assert "column 'x' differs (a: Value('int64'), b: Value('string'))" in text
    assert "column 'y' differs (a: Value('string'), b: missing)" in text
    assert "column 'z' differs (a: missing, b: Value('string'))" in text


def test_plain_chats_and_chats_with_tools_can_be_mixed(tmp_path: Path) -> None:
    plain = {"messages": [{"role": "user", "content": "a"}]}
    tools = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": []}]}
    first = load_data(str(write(tmp_path / "plain.jsonl", plain)), where=WHERE)
    second = load_data(str(write(tmp_path / "tools.jsonl", tools)), where=WHERE)
    mixed = mix({"a": first, "b": second}, {"a": 1, "b": 1}, 0, "ratios")
    assert sorted(mixed.to_list(), key=repr) == sorted([plain, tools], key=repr)
    assert isinstance(mixed.features["messages"].feature, Json)


def test_columns_in_another_order_and_large_strings_are_the_same_schema() -> None:
    first = Dataset.from_dict({"x": ["a"], "y": [1]})
    second = Dataset.from_dict({"y": [2], "x": ["b"]}).cast_column("x", Value("large_string"))
    mixed = mix({"a": first, "b": second}, {"a": 1, "b": 1}, 0, "ratios")
    assert sorted(mixed.to_list(), key=repr) == [{"x": "a", "y": 1}, {"x": "b", "y": 2}]


def test_take_gives_the_first_rows_or_a_seeded_draw() -> None:
    dataset = numbers(100)
    assert take(dataset, 3, None)["n"][:] == [0, 1, 2]
    drawn = take(dataset, 10, 0)["n"][:]
    assert drawn == take(dataset, 10, 0)["n"][:] == shuffled(dataset, 0)["n"][:10]
    assert len(set(drawn)) == 10
    assert len(take(dataset, 1000, None)) == 100


def test_shuffling_is_that_of_datasets_and_leaves_no_cache_file(tmp_path: Path) -> None:
    numbers(50).save_to_disk(tmp_path / "saved")
    before = sorted(tmp_path.rglob("*"))
    dataset = load_data(str(tmp_path / "saved"), where=WHERE)
    assert shuffled(dataset, 7)["n"][:] == numbers(50).shuffle(seed=7)["n"][:]
    assert sorted(tmp_path.rglob("*")) == before


def test_wanted_columns_are_checked_with_the_nearest_alternative() -> None:
    wanted = [["messages"], ["prompt", "completion"]]
    check_columns(Dataset.from_list(ROWS), wanted, WHERE)
    with pytest.raises(StageError, match=r"found prompt, reply.*nearest: completion"):
        check_columns(Dataset.from_dict({"prompt": ["a"], "reply": ["b"]}), wanted, WHERE)


def test_a_null_in_a_wanted_column_is_reported_with_its_row() -> None:
    dataset = Dataset.from_dict({"text": ["a", None, "b"], "note": [None, "x", None]})
    with pytest.raises(StageError, match="row 2 has no 'text'"):
        check_columns(dataset, [["text"]], WHERE)
    check_columns(dataset.select([0, 2]), [["text"]], WHERE)


def test_a_label_that_is_text_is_refused() -> None:
    dataset = Dataset.from_dict({"prompt": ["a"], "completion": ["b"], "label": ["False"]})
    with pytest.raises(StageError, match=r"'False'.*any text would count as true"):
        check_columns(dataset, [["prompt", "completion", "label"]], WHERE)


def test_written_rows_are_read_back_the_same(tmp_path: Path) -> None:
    rows = [{"text": "ü \u2028 \n", "score": 0.1, "list": [1, None], "empty": {}}, {"text": "", "more": True}]
    write_jsonl(rows, tmp_path / "deep" / "rows.jsonl")
    assert read_jsonl(tmp_path / "deep" / "rows.jsonl") == rows
    write_jsonl(Dataset.from_list(ROWS), tmp_path / "rows.jsonl")
    assert read_jsonl(tmp_path / "rows.jsonl") == ROWS


@pytest.mark.parametrize("value", [float("nan"), {1, 2}, "\ud800"])
def test_what_json_cannot_hold_keeps_the_earlier_file(tmp_path: Path, value: Any) -> None:
    write_jsonl(ROWS, tmp_path / "rows.jsonl")
    with pytest.raises(StageError, match="row 2"):
        write_jsonl([{"a": 1}, {"a": value}], tmp_path / "rows.jsonl")
    assert read_jsonl(tmp_path / "rows.jsonl") == ROWS
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_full_disk_while_writing_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    code = """
        import resource, sys
        from stagekit.errors import StageError
        from stagekit.rows import write_jsonl
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        try:
            write_jsonl(({"text": "x" * 1000} for _ in range(1000)), sys.argv[1])
        except StageError as error:
            print(error)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "rows.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"{tmp_path / 'rows.jsonl'} cannot be written: File too large" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_equal_content_has_an_equal_fingerprint() -> None:
    dataset = Dataset.from_list(ROWS)
    assert fingerprint(dataset) == fingerprint(Dataset.from_list([*ROWS, ROWS[0]]).select(range(4)))
    assert fingerprint(dataset) != fingerprint(dataset.select([1, 0, 2, 3]))
    assert fingerprint(dataset) != fingerprint(dataset.rename_column("prompt", "question"))
    assert fingerprint(numbers(1)) != fingerprint(numbers(1).cast_column("n", Value("int32")))


def test_a_prompt_is_a_text_or_a_list_of_messages() -> None:
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "u", "name": None}]
    assert as_messages("hello") == ({"role": "user", "content": "hello"},)
    assert as_messages(turns) == ({"role": "system", "content": "s"}, {"role": "user", "content": "u"})


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ([{"role": "human", "content": "a"}], "data: row 8: message 1 has role 'human'; roles are system"),
        ([{"from": "human", "value": "a"}], "rename from/value to role/content"),
        ([{"role": "user", "content": None}], "message 1 .user. has content None"),
        ([{"role": "user", "content": "a"}, "b"], "message 2 is 'b', not an object"),
        ([], "neither a text nor a list"),
        (None, "neither a text nor a list"),
    ],
)
def test_a_wrong_prompt_is_reported_with_its_row(prompt: Any, expected: str) -> None:
    with pytest.raises(StageError, match=expected):
        as_messages(prompt, row=7, where="data")
