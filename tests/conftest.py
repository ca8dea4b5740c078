"""Fixtures for every test: the tiny model, small data sets, one thread and no network."""

import os
import signal
import tempfile


# Before torch and the Hugging Face packages are imported, which read them once.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a background job of a shell; children inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ["STAGEKIT_CACHE"] = tempfile.mkdtemp(prefix="stagekit-tests-")

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest


if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

TINY = Path(__file__).resolve().parent.parent / "stagekit/recipes/data/tiny"

QUESTIONS_AND_ANSWERS = (
    ("What is 2 + 3?", "2 + 3 = 5.", "It is 7."),
    ("What is 9 - 4?", "9 - 4 = 5.", "It is 6."),
    ("How many days are in a week?", "There are seven days in a week.", "There are nine."),
    ("What colour is the sky on a clear day?", "It is blue.", "Go away."),
    ("Name a fruit.", "An apple.", "A hammer."),
    ("How long should I boil an egg?", "About eight minutes for a firm yolk.", "Two hours."),
    ("What is the opposite of hot?", "Cold.", "Hot."),
    ("Write a short greeting.", "Hello, how are you today?", "No."),
    ("Which animal says moo?", "A cow.", "A fish."),
    ("How do I print in Python?", "Call print with the text: print('hi').", "You cannot."),
    ("What is ice made of?", "Frozen water.", "Glass."),
    ("How many legs does a spider have?", "Eight.", "Three."),
    ("Should I lock my door at night?", "Yes, that is a good habit.", "Who cares."),
    ("What comes after Monday?", "Tuesday.", "Sunday."),
    ("Give me a word that rhymes with cat.", "Hat.", "Dog."),
    ("Is the earth round?", "Yes, it is nearly a sphere.", "It is flat."),
)


def pytest_runtest_teardown() -> None:
    """A trainer with full determinism leaves it on for the process; the next test starts without."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.deterministic = False
    for name in ("CUDA_LAUNCH_BLOCKING", "CUBLAS_WORKSPACE_CONFIG", "ASCEND_LAUNCH_BLOCKING", "HCCL_DETERMINISTIC",
                 "FLASH_ATTENTION_DETERMINISTIC"):  # fmt: skip
        os.environ.pop(name, None)


def pytest_unconfigure() -> None:
    """Reference log-probabilities that tests kept are not the user's."""
    shutil.rmtree(os.environ["STAGEKIT_CACHE"], ignore_errors=True)


@pytest.fixture(scope="session")
def tiny_model_path() -> str:
    """The folder of the tiny Llama and its tokenizer; also limits torch to one thread."""
    import torch

    torch.set_num_threads(1)
    return str(TINY)


@pytest.fixture
def tiny_tokenizer(tiny_model_path: str) -> "PreTrainedTokenizerFast":
    """A freshly loaded tokenizer, so that a test may change it."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model_path)


@pytest.fixture
def tiny_model(tiny_model_path: str) -> "LlamaForCausalLM":
    """A freshly loaded model in float32, so that a test may train it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model_path)


@pytest.fixture
def sft_rows() -> list[dict[str, Any]]:
    """16 conversational prompt and completion rows."""
    return [
        {"prompt": _message("user", question), "completion": _message("assistant", answer)}
        for question, answer, _ in QUESTIONS_AND_ANSWERS
    ]


@pytest.fixture
def preference_rows() -> list[dict[str, Any]]:
    """16 conversational prompt, chosen and rejected rows."""
    return [
        {
            "prompt": _message("user", question),
            "chosen": _message("assistant", better),
            "rejected": _message("assistant", worse),
        }
        for question, better, worse in QUESTIONS_AND_ANSWERS
    ]


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., Path]:
    """A function `write_rows(rows, name="rows.jsonl")` that writes JSON lines below `tmp_path` and gives the path."""

    def write(rows: Iterable[dict[str, Any]], name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


def _message(role: str, content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A running server's URL, and its folder."""
    folder = tmp_path / "server"
    folder.mkdir()
    command = [sys.executable, "-m", "tests.openai_server", str(folder)]
    with subprocess.Popen(command, cwd=Path(__file__).parent.parent, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{process.stdout.readline().strip()}/v1", folder
        process.terminate()


@pytest.fixture
def adapter(tiny_model_path: str, tmp_path: Path) -> Path:
    """A trained LoRA adapter on the tiny model, saved with its tokenizer."""
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    from stagekit.models import load_tokenizer, lora_config
    from tests.adapting import trained

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(tiny_model_path)
    model = trained(get_peft_model(base, lora_config(4, 8.0, 0.0, ("q_proj", "v_proj"))))
    model.save_pretrained(tmp_path / "adapter")
    load_tokenizer(tiny_model_path).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"
