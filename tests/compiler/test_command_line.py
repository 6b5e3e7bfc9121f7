"""The command `mxloom`: quick help, errors in one message, exit statuses, JSON alone on stdout."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mxloom.compiler import command_line
from mxloom.compiler.command_line import all_commands, main
from mxloom.dialects.errors import MxloomError

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT / ".links"), "OMP_NUM_THREADS": "1"}


def shell(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mxloom", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=120)


def test_help_answers_in_half_a_second() -> None:
    def seconds() -> float:
        start = time.monotonic()
        assert shell("--help").returncode == 0
        return time.monotonic() - start

    assert min(seconds() for _ in range(5)) < 0.5


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys\nfrom mxloom.compiler.command_line import main\n"
        "try: main(['compile', '--help'])\nexcept SystemExit: pass\n"
        "print({'torch', 'transformers', 'numpy', 'xdsl', 'pydantic', 'yaml', 'rich'} & sys.modules.keys())"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT, timeout=60)
    assert result.stdout.splitlines()[-1] == "set()"


def test_a_command_is_a_file() -> None:
    files = {file.stem for file in (ROOT / "compiler" / "commands").glob("*.py") if not file.stem.startswith("_")}
    assert {file.replace("_", "-") for file in files} == all_commands().keys()
    assert {"compile", "eval", "inspect", "formats", "recipe"} <= files


def test_help_lists_every_command_with_its_summary(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    listed = " ".join(capsys.readouterr().out.split())
    for name, command in all_commands().items():
        assert f"{name} {command.summary}" in listed


@pytest.mark.parametrize("name", all_commands())
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([name, "--help"])
    assert caught.value.code == 0
    assert f"mxloom {name}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compil"], 'there is no command "compil" (did you mean "compile"?); see mxloom --help'),
        (["recipe", "--shema"], '"--shema" is not understood (did you mean "--schema"?); see mxloom recipe --help'),
        (["compile", "model"], "the following arguments are required: --out; see mxloom compile --help"),
        (["compile", "model", "--out", "x"], "give --recipe FILE, or --weights FORMAT and --activations FORMAT"),
        (
            ["compile", "model", "--out", "x", "--recipe", "r.yaml", "--weights", "mxfp4"],
            "--recipe and --weights exclude each other: put the formats into the recipe",
        ),
        (["compile", "model", "--out", "x", "--weights", "mxfp5"], '(did you mean "mxfp4"?)'),
        (["compile", "model", "--out", "x", "--recipe", "nowhere.yaml"], "nowhere.yaml: the recipe cannot be read"),
        (["eval", "model", "--text", "x", "--context", "many"], "argument --context: invalid int value: 'many'"),
        (["recipe"], "give either a recipe to check or --schema"),
        (["formats", "extra"], '"extra" is not understood; see mxloom formats --help'),
    ],
)
def test_wrong_usage_is_one_message_and_status_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("mxloom: ")
    assert message in captured.err
    assert "Traceback" not in captured.err


@pytest.mark.parametrize("arguments", [["inspect", "nowhere"], ["eval", "nowhere", "--text", "x"]])
def test_a_missing_model_is_one_message(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) in (1, 2)
    error = capsys.readouterr().err
    assert "nowhere" in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("raised", "status", "message"),
    [
        (MxloomError("it broke"), 1, "mxloom: it broke\n"),
        (OSError(28, "No space left on device", "out"), 1, "mxloom: [Errno 28] No space left on device: 'out'\n"),
        (OSError(28, "No space left on device"), 1, "mxloom: the output cannot be written: No space left on device\n"),
        (KeyboardInterrupt(), 130, "mxloom: interrupted\n"),
    ],
)
def test_a_run_that_fails(
    raised: BaseException,
    status: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(arguments: list[str]) -> int:
        raise raised

    monkeypatch.setattr(command_line, "_run", fail)
    assert main([]) == status
    assert capsys.readouterr().err == message


def test_debug_shows_the_traceback() -> None:
    result = shell("recipe", "--debug")
    assert "Traceback" in result.stderr
    assert "UsageError: give either a recipe" in result.stderr


def test_a_reader_that_leaves_early_is_no_error_message() -> None:
    command = f"{sys.executable} -m mxloom recipe --schema | head -n 1"
    result = subprocess.run(command, shell=True, capture_output=True, text=True, env=ENVIRONMENT, timeout=60)
    assert result.stdout == "{\n"
    assert result.stderr == ""


def test_an_interrupt_ends_with_130(tmp_path: Path) -> None:
    pipe = tmp_path / "recipe.yaml"
    os.mkfifo(pipe)  # reading the recipe waits here
    process = subprocess.Popen(
        [sys.executable, "-m", "mxloom", "recipe", str(pipe)],
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    with pipe.open("w"):
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
    assert process.stderr is not None
    assert process.stderr.read() == "mxloom: interrupted\n"
    process.stderr.close()


def test_a_recipe_is_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("version: 1\nquantize:\n- {weights: mxfp4, activations: mxint8}\n")
    assert main(["recipe", str(file)]) == 0
    assert capsys.readouterr().out == "quantize{weights=mxfp4 activations=mxint8}\n"


def test_json_is_one_document(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", "--schema"]) == 0
    assert json.loads(capsys.readouterr().out)["title"] == "Recipe"
    assert main(["formats", "--json"]) == 0
    formats = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert formats["mxfp4"]["bits"] == 4.25
    assert formats["nvfp4"]["bits"] == 4.5
