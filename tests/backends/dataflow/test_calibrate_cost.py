"""mxloom calibrate-cost: recorded runs, files that are cut or malformed, outputs."""

import shutil
from pathlib import Path

import pytest

from mxloom.backends.dataflow.cost import calibration
from mxloom.backends.dataflow.cost.measurements import append_measurements, own_measurements, read_measurements
from mxloom.backends.dataflow.cost.model import VARIABLE, coefficients
from mxloom.compiler import _atomic
from mxloom.compiler._atomic import write_file
from mxloom.compiler.command_line import all_commands, main
from mxloom.dialects.errors import UsageError


def test_calibration_from_recorded_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, out = tmp_path / "runs.jsonl", tmp_path / "mine.json"
    shutil.copy(own_measurements(), runs)
    before = runs.read_text()
    command = ["calibrate-cost", "--quick", "--measurements", str(runs), "--out", str(out)]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert f"use it with {VARIABLE}={out}" in printed
    # Nothing is held out of a quick run.
    assert all(line.split()[-1] == "none" for line in printed.splitlines()[1:-1])
    assert runs.read_text() == before
    monkeypatch.setenv(VARIABLE, str(out))
    mine = coefficients()
    assert mine.fits["nand2"]["NAND2"]["dot"].fitted.designs == 2
    assert mine.text() == coefficients(out).text()
    out.write_text("{}")
    with pytest.raises(UsageError, match="no file of cost coefficients"):
        coefficients(out)
    with pytest.raises(UsageError, match="No such file"):
        coefficients(tmp_path / "absent.json")


def test_commands_have_hyphens(capsys: pytest.CaptureFixture[str]) -> None:
    assert "calibrate-cost" in all_commands() and "calibrate_cost" not in all_commands()
    assert main(["calibrate-cost", "--liberty", "absent.lib"]) == 2
    assert "there is no such file" in capsys.readouterr().err


LINE = '{"design": "fork width=12 ways=2", "target": "nand2", "NAND2": 12.5, "FF": 2}\n'


def test_a_last_line_that_was_cut_short_is_told_and_left_out(tmp_path: Path) -> None:
    file, told = tmp_path / "runs.jsonl", list[str]()
    file.write_text(LINE + LINE[:40])
    expected = {("fork width=12 ways=2", "nand2"): {"NAND2": 12.5, "FF": 2}}
    assert read_measurements(file, told.append) == expected
    assert told == [f"{file}:2: the last line is cut short and left out"]
    new = {("fork width=16 ways=3", "nand2"): {"NAND2": 20.0, "FF": 3.0}}
    append_measurements(file, new)
    assert read_measurements(file, told.append) == expected | new and len(told) == 1


def test_results_are_added_behind_a_last_line_without_an_end(tmp_path: Path) -> None:
    file = tmp_path / "runs.jsonl"
    file.write_text(LINE.strip())
    append_measurements(file, {("fork width=16 ways=3", "nand2"): {"NAND2": 20.0}})
    assert [design for design, _ in read_measurements(file)] == ["fork width=12 ways=2", "fork width=16 ways=3"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nand2 12.5", "no JSON"),
        ("[1, 2]", 'no object with a "design" and a "target"'),
        ('{"design": "fork width=12 ways=2", "NAND2": 1}', 'no object with a "design" and a "target"'),
        ('{"design": "fork", "target": "asic", "NAND2": 1}', '"asic" is no target: nand2, xc7, xc7_dsp, ecp5 are'),
        ('{"design": "fork", "target": "ecp5", "LUT": 1}', "FF is a count from 0 on, got nothing"),
        ('{"design": "fork", "target": "nand2", "NAND2": "12"}', "NAND2 is a count from 0 on, got '12'"),
        ('{"design": "fork", "target": "nand2", "NAND2": NaN}', "NAND2 is a count from 0 on, got nan"),
        ('{"design": "fork", "target": "nand2", "NAND2": 1, "FF": -1}', "FF is a count from 0 on, got -1"),
        ("", "no JSON"),
    ],
)
def test_malformed_results_name_file_and_line(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "runs.jsonl"
    file.write_text(f"{LINE}{line}\n{LINE}")
    with pytest.raises(UsageError) as caught:
        read_measurements(file)
    assert str(caught.value).startswith(f"{file}:2: {message}")


def test_what_cannot_be_written_is_told_before_the_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_run(*_: object) -> None:
        raise AssertionError("a run was started")

    monkeypatch.setattr(calibration, "measured", no_run)
    monkeypatch.setattr(calibration, "verilog", no_run)
    out, runs, folder = tmp_path / "mine.json", tmp_path / "runs.jsonl", tmp_path / "absent"
    for options, message in (
        (["--out", str(folder / "mine.json")], f"{folder}: there is no such folder"),
        (["--out", str(tmp_path)], f"{tmp_path} is a folder: name a file"),
        (["--out", "/proc/mine.json"], "/proc/mine.json cannot be written"),
        (["--out", str(out), "--measurements", str(folder / "runs.jsonl")], "results cannot be added"),
        (["--out", str(out), "--measurements", str(tmp_path)], f"{tmp_path}: "),
        (["--out", str(out), "--measurements", str(out)], "--out and --measurements are two files"),
    ):
        assert main(["calibrate-cost", "--quick", *options]) == 2
        assert message in capsys.readouterr().err
    runs.write_text("[]\n")
    assert main(["calibrate-cost", "--quick", "--out", str(out), "--measurements", str(runs)]) == 2
    assert f"{runs}:1: " in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["runs.jsonl"] and runs.read_text() == "[]\n"


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "mine.json"
    write_file(file, "one\n")
    assert file.read_text() == "one\n"

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_atomic.os, "fsync", full)
    with pytest.raises(UsageError, match="cannot be written: No space left on device"):
        write_file(file, "two\n")
    assert file.read_text() == "one\n" and [each.name for each in tmp_path.iterdir()] == ["mine.json"]
