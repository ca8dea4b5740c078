"""Verifiable rewards: what is right, what is not, what is refused."""

from typing import Any

import pytest

from stagekit import ConfigError, TrainingStage, sandbox
from stagekit.groups import RewardSource
from stagekit.rewards import reward_of
from stagekit.verifiers import exact, format, json_schema, last_number, numeric, python_tests, regex


def turns(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def test_an_exact_answer_is_the_text_without_white_space_around_it() -> None:
    texts = [" Paris\n", "paris", "It is Paris.", ""]
    assert exact(texts, answer=["Paris"] * 4) == [1, 0, 0, 0]
    assert exact([turns(text) for text in texts], answer=["Paris"] * 4) == [1, 0, 0, 0]
    assert exact(texts, answer=["PARIS"] * 4, ignore_case=True) == [1, 1, 0, 0]
    assert exact(["7"], solution=[7], column="solution") == [1]


def test_the_answer_can_be_taken_out_of_the_completion() -> None:
    texts = ["so #### 4\nno, #### 5", "#### 6", "5"]
    assert exact(texts, answer=["5"] * 3, extract=r"#### (.+)") == [1, 0, 0]
    assert numeric(texts, answer=[5] * 3, extract=r"####.+") == [1, 0, 0]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("It is 5.", 5), ("2 + 3 = 5", 5), ("-3.5", -3.5), ("x=-3", -3), ("1,234.5 euros", 1234.5), ("$1,000", 1000),
        ("50%", 0.5), ("50 %", 0.5), ("3/4", 0.75), ("3 / 4 of it", 0.75), ("1e3", 1000), ("2.5e-1", 0.25),
        (".5", 0.5), ("between 2-3", 3), ("1,2", 2), ("none", None), ("", None), ("1/0", None), ("1e999", None),
        ("12,345,678", 12345678), ("5.", 5), ("a1", 1),
    ],
)  # fmt: skip
def test_the_last_number_of_a_text(text: str, number: float | None) -> None:
    assert last_number(text) == (pytest.approx(number) if number is not None else None)


def test_numbers_are_compared_within_a_tolerance() -> None:
    assert numeric(["3.14", "3.1416", "three"], answer=["3.14159"] * 3, tolerance=1e-4) == [0, 1, 0]
    assert numeric(["0.5 or 50%"], answer=["1/2"]) == [1]
    assert numeric(["0.0"], answer=[0]) == [1]


def test_a_pattern_is_found_or_covers_everything() -> None:
    assert regex(["yes, 42", "42", "no"], pattern=r"\d+") == [1, 1, 0]
    assert regex(["yes, 42", " 42\n", "no"], pattern=r"\d+", whole=True) == [0, 1, 0]


def test_tags_stand_once_each_in_their_order_with_nothing_beside() -> None:
    right = "<think>a\nb</think>\n<answer>c</answer>"
    wrong = [
        f"Well: {right}", "<answer>c</answer><think>a</think>", "<think>a</think>", f"{right}{right}",
        "<think><think>a</think><answer>c</answer>", "<think>a</answer><answer>c</answer>",
    ]  # fmt: skip
    assert format([right, *wrong]) == [1] + [0] * len(wrong)
    assert format(["<plan>x</plan>"], tags=["plan"]) == [1]


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "pattern": "^[A-Z]"},
        "age": {"type": ["integer", "null"], "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b", True]}, "maxItems": 2, "minItems": 1},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
    "title": "A person",
}


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ('{"name": "Ann", "age": 3}', 1), ('```json\n{"name": "Ann", "age": null}\n```', 1),
        ('Here: ```\n{"name": "Ann", "age": 3.0}\n```', 1),
        ('{"name": "Ann", "age": 3, "tags": ["a", true]}', 1), ('{"name": "Ann"}', 0),
        ('{"name": "ann", "age": 3}', 0),
        ('{"name": "", "age": 3}', 0), ('{"name": "Ann", "age": 3.5}', 0), ('{"name": "Ann", "age": true}', 0),
        ('{"name": "Ann", "age": 151}', 0), ('{"name": "Ann", "age": -1}', 0), ('{"name": "Ann", "age": NaN}', 0),
        ('{"name": "Ann", "age": 3, "tags": []}', 0), ('{"name": "Ann", "age": 3, "tags": [1]}', 0),
        ('{"name": "Ann", "age": 3, "tags": ["a", "a", "a"]}', 0), ('{"name": "Ann", "age": 3, "x": 1}', 0),
        ('[{"name": "Ann", "age": 3}]', 0), ("no JSON", 0), ("", 0), ("[" * 100_000, 0),
        ('So {"name": "Ann", "age": 3}', 0),
    ],
)  # fmt: skip
def test_json_fits_its_schema_or_not(text: str, right: int) -> None:
    assert json_schema([text], schema=PERSON) == [right]


def test_without_a_schema_any_json_will_do() -> None:
    assert json_schema(["[1, 2]", "[1, 2"]) == [1, 0]


ADDS = "```python\ndef add(a, b):\n    return a + b\n```"
TESTS = ["assert add(1, 2) == 3", "assert add(0, 0) == 0", "assert add('a', 'b') == 'ba'", "assert add(1, 1) == 2"]


def needs_a_sandbox() -> None:
    if sandbox.refused():
        pytest.skip(f"the kernel refuses a part of the sandbox here: {sandbox.refused()}")


def test_code_is_rewarded_by_the_share_of_its_tests_or_by_all_of_them() -> None:
    needs_a_sandbox()
    texts = [ADDS, "def add(a, b):\n    return b + a", "I cannot.", "", "```python\ndef add(a, b): return 7\n```"]
    given = {"tests": [TESTS] * 5, "wall_seconds": 120.0}
    assert python_tests(texts, **given) == [0.75, 1, 0, 0, 0]
    assert python_tests([turns(text) for text in texts], all_or_nothing=True, **given) == [0, 1, 0, 0, 0]


def test_the_last_block_of_code_counts_whatever_stands_around_it() -> None:
    needs_a_sandbox()
    told = [
        f"Not this:\n```\nx = 1\n```\nbut this:\n{ADDS}\nDone.",
        f"{ADDS}\nIts output:\n```text\n3\n```",
        f"{ADDS}\nand then\n```py\nx = 1\n```",
        "<code>add = lambda a, b: a + b</code>",
    ]
    one = ["assert add(1, 2) == 3"]
    given: dict[str, Any] = {"wall_seconds": 120.0}
    assert python_tests(told, tests=[one] * 4, **given) == [1, 1, 0, 0]
    assert python_tests(told[3:], tests=[one], extract="<code>(.*)</code>", **given) == [1]


def test_a_text_is_one_test_and_may_be_a_script() -> None:
    needs_a_sandbox()
    script = "def check(candidate):\n    for a in range(9):\n        assert candidate(a, 1) == a + 1\n\ncheck(add)\n"
    unit = (
        "import unittest\nclass Case(unittest.TestCase):\n    def test_sum(self):\n"
        "        self.assertEqual(add(2, 2), {})\nran = unittest.TextTestRunner().run(\n"
        "    unittest.defaultTestLoader.loadTestsFromTestCase(Case))\nassert ran.wasSuccessful()\n"
    )
    given: dict[str, Any] = {"column": "check", "wall_seconds": 120.0}
    found = python_tests([ADDS] * 4, check=[script, script + "x", unit.format(4), unit.format(5)], **given)
    assert found == [1, 0, 1, 0]


@pytest.mark.parametrize("given", [[], "", [""], [1], None, 3, ["pass", " "]])
def test_a_row_without_tests_is_an_error(given: Any) -> None:
    with pytest.raises(ConfigError, match=r"reward python_tests: .* in column 'tests' is no test"):
        python_tests([ADDS], tests=[given])


@pytest.mark.parametrize(
    ("reward", "given", "message"),
    [
        (exact, {"solution": ["5"]}, "no column 'answer' with the right answers; they have solution"),
        (numeric, {"answer": ["five"]}, "'five' in column 'answer' has no number"),
        (exact, {"answer": ["5"], "extract": "("}, "reward extract: '\\(' is no regular expression"),
        (regex, {}, "options.pattern is missing"),
        (format, {"tags": "think"}, "give a list of names"),
        (
            json_schema,
            {"schema": {"properties": {"a": {"oneOf": []}}}},
            r"schema\.properties\.a\.oneOf: is not looked",
        ),
        (json_schema, {"schema": {"type": "float"}}, "'float' is no type of JSON"),
        (json_schema, {"schema": [1]}, "is no schema"),
        (json_schema, {"schema": {"items": {"pattern": "("}}}, "is no regular expression"),
    ],
)
def test_what_cannot_be_checked_is_an_error(reward: Any, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        reward(["5"], **given)


def test_options_are_not_replaced_by_columns_of_the_same_name() -> None:
    reward = reward_of(RewardSource("exact", options={"column": "solution"}), exact)
    assert reward(prompts=["?"], completions=["5"], column=["answer"], answer=["6"], solution=["5"]) == [1]
    assert reward.__name__ == "exact"


def test_an_option_that_a_function_does_not_have_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"reward 'exact': options\.colum"):
        reward_of(RewardSource("exact", options={"colum": "x"}), exact)
    method = {"type": "grpo", "reward": {"source": "numeric", "options": {"tolerence": 0.1}}}
    with pytest.raises(ConfigError, match=r"method\.reward\.options\.tolerence: numeric has no such option"):
        TrainingStage(name="s", training_data="x.jsonl", method=method)


def test_a_verifier_is_named_alone() -> None:
    assert RewardSource("numeric").source == "stagekit.verifiers:numeric"
