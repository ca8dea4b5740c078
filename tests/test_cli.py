"""The commands as a user types them: what they print, how they end."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from stagekit.cli import run


SFT_ROW = {"prompt": "Hello", "completion": "Hi"}


@pytest.fixture
def pipeline_file(tmp_path: Path, tiny_model_path: str) -> Path:
    (tmp_path / "rows.jsonl").write_text(json.dumps(SFT_ROW) + "\n")
    path = tmp_path / "p.yaml"
    path.write_text(
        f"name: t\nmodel: {tiny_model_path}\noutput_dir: {tmp_path / 'run'}\nstages:\n"
        f"  - {{name: sft, method: sft, training_data: {tmp_path / 'rows.jsonl'}, epochs: 1}}\n"
    )
    return path


def test_check_says_that_nothing_is_wrong(pipeline_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["check", str(pipeline_file)]) == 0
    assert "1 stage, nothing wrong" in capsys.readouterr().out


def test_check_ends_with_2_and_one_message_without_a_traceback(
    pipeline_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["check", str(pipeline_file), "stages.sft.epochs=0", "stages.sft.lernin_rate=1"]) == 2
    error = capsys.readouterr().err
    assert "stages.sft.epochs: must be greater than or equal to 1, not 0" in error
    assert "stages.sft.lernin_rate: unknown option; did you mean 'learning_rate'?" in error
    assert "Traceback" not in error


def test_debug_shows_the_traceback(pipeline_file: Path) -> None:
    from stagekit.errors import ConfigError

    with pytest.raises(ConfigError):
        run(["check", str(pipeline_file), "stages.sft.epochs=0", "--debug"])


@pytest.mark.parametrize("command", ["check", "plan", "run"])
def test_a_missing_file_is_one_clear_message(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([command, "nowhere.yaml"]) == 2
    assert capsys.readouterr().err == "stagekit: error: nowhere.yaml: no such file\n"


def test_overrides_reach_the_plan_with_their_source(pipeline_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", str(pipeline_file), "stages.sft.learning_rate=3e-5", "--json"]) == 0
    arguments = {one["argument"]: one for one in json.loads(capsys.readouterr().out)[0]["arguments"]}
    assert arguments["learning_rate"]["value"] == 3e-5
    assert arguments["learning_rate"]["source"] == "stages.sft.learning_rate"
    assert arguments["num_train_epochs"] == {"argument": "num_train_epochs", "value": 1, "source": "stages.sft.epochs"}
    assert arguments["weight_decay"]["source"] == "default"


def test_stages_lists_the_types_and_tells_the_nearest_for_an_unknown_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["stages"]) == 0
    assert "constitutional" in capsys.readouterr().out
    assert run(["stages", "dpp"]) == 2
    assert "did you mean" in capsys.readouterr().err


def test_stages_json_is_a_list_with_type_summary_paper_and_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["stages", "dpo", "--json"]) == 0
    (entry,) = json.loads(capsys.readouterr().out)
    assert {"type", "summary", "paper", "options"} <= set(entry)
    options = {option["option"]: option for option in entry["options"]}
    assert options["method.beta"]["default"] == 0.1
    assert options["reference.mode"]["values"][0] == "auto"
    assert options["method.label_smoothing"]["state"] == "effective"
    assert options["sync_batch_norm"]["state"] == "not built"
    assert "generation" not in options
    assert all(option["about"] for option in entry["options"])


def test_the_schema_knows_every_slot_and_every_flat_name(capsys: pytest.CaptureFixture[str]) -> None:
    from stagekit.flat import FLAT

    assert run(["schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    properties = schema["$defs"]["TrainingStage"]["properties"]
    assert set(FLAT) <= set(properties)
    assert {"method", "lora", "reference", "generation", "trl"} <= set(properties)


def test_status_of_a_folder_without_a_run_is_a_configuration_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["status", str(tmp_path)]) == 2
    assert "no run here" in capsys.readouterr().err


def test_help_check_and_plan_import_no_torch(pipeline_file: Path) -> None:
    for arguments in (["--help"], ["check", str(pipeline_file)], ["plan", str(pipeline_file)], ["stages"], ["schema"]):
        code = (
            "import sys\nfrom stagekit.cli import run\n"
            f"try: run({arguments!r})\nexcept SystemExit: pass\n"
            "heavy = {'torch', 'transformers', 'trl', 'peft', 'datasets', 'accelerate'} & set(sys.modules)\n"
            "assert not heavy, heavy"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, (arguments, done.stderr)


def test_without_a_command_the_help_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([]) == 0
    assert "commands:" in capsys.readouterr().out
