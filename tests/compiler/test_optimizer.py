"""`mxloom-opt`: passes from files and entry points, and errors without tracebacks."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from mxloom.compiler.optimizer import main
from mxloom.compiler.universe import MXLOOM_UNIVERSE, all_passes, all_targets

ROOT = Path(__file__).parents[2]
TOY = ROOT / "tests" / "toy_package"

MXLOOM_OPT = ("-c", "import sys; from mxloom.compiler.optimizer import main; sys.exit(main())")
XDSL_OPT = ("-m", "xdsl.tools.xdsl_opt")
DRIVER = (
    "-c",
    """
import sys
from xdsl.printer import Printer
from mxloom.compiler.driver import run_pipeline
from mxloom.dialects.mx import parse_module
module = parse_module(open(sys.argv[1]).read())
run_pipeline(module, None, sys.argv[3])
Printer().print_op(module)
""",
)

MODULE = """
builtin.module {
  func.func @forward(%x : tensor<2x64xf32>) -> tensor<2x64x!mx.block<32xf4E2M1FN>> {
    %y = mx.cast %x : tensor<2x64xf32> to tensor<2x64x!mx.block<32xf4E2M1FN>>
    func.return %y : tensor<2x64x!mx.block<32xf4E2M1FN>>
  }
}
"""


@pytest.fixture
def module(tmp_path: Path) -> Path:
    file = tmp_path / "module.mlir"
    file.write_text(MODULE)
    return file


def announce(folder: Path, pyproject: Path, groups: tuple[str, ...]) -> None:
    """Lay what an installation would leave: the metadata with the project's entry points of these groups."""
    project = tomllib.loads(pyproject.read_text())["project"]
    info = folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    points = project["entry-points"]
    lines = [line for group in groups for line in (f"[{group}]", *(f"{k} = {v}" for k, v in points[group].items()))]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Python in a new process that sees the checkout, the toy package and the metadata in `folder`."""
    paths = os.pathsep.join(map(str, (folder, TOY, ROOT / ".links")))
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, timeout=120)


@pytest.mark.parametrize(
    "groups", [("mxloom.passes",), ("xdsl.universe",), ("mxloom.passes", "xdsl.universe")], ids="+".join
)
@pytest.mark.parametrize("program", [MXLOOM_OPT, XDSL_OPT, DRIVER], ids=["mxloom-opt", "xdsl-opt", "driver"])
def test_a_pass_of_another_package_is_found(
    program: tuple[str, str], groups: tuple[str, ...], module: Path, tmp_path: Path
) -> None:
    installed = tmp_path / "installed"
    announce(installed, ROOT / "pyproject.toml", ("xdsl.universe",))
    announce(installed, TOY / "pyproject.toml", groups)
    result = run(installed, *program, str(module), "-p", "toy-clip{ratio=0.5}")
    assert result.returncode == 0, result.stderr
    assert "clip = 5.000000e-01" in result.stdout


def test_without_the_package_its_pass_is_unknown(module: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(module), "-p", "toy-clip"]) == 2
    assert 'there is no pass "toy-clip"' in capsys.readouterr().err


def test_a_file_of_passes_is_a_pass_under_its_name() -> None:
    files = {file.stem.replace("_", "-") for file in (ROOT / "passes").glob("*.py") if not file.stem.startswith("_")}
    assert "quantize" in files
    assert files == MXLOOM_UNIVERSE.all_passes.keys()
    for name in files:
        assert all_passes()[name]().name == name


def test_targets_are_classes_of_their_names() -> None:
    for name in MXLOOM_UNIVERSE.all_targets:
        assert all_targets()[name]().name == name


def test_xdsl_s_own_passes_and_targets_are_there() -> None:
    assert all_passes()["canonicalize"]().name == "canonicalize"
    assert "mlir" in all_targets()


def test_the_dialect_prints_what_it_parses(module: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main([str(module)]) == 0
    again = tmp_path / "again.mlir"
    again.write_text(first := capsys.readouterr().out)
    assert main([str(again)]) == 0
    assert capsys.readouterr().out == first
    assert "mx.cast %x : tensor<2x64xf32> to tensor<2x64x!mx.block<32xf4E2M1FN>>" in first


@pytest.mark.parametrize(
    ("pipeline", "message"),
    [
        ("quantise", 'there is no pass "quantise" (did you mean "quantize"?)'),
        ("quantize{wieghts=mxfp4}", 'pass "quantize" has no option "wieghts" (did you mean "weights"?)'),
        ("quantize{weights=3}", 'pass "quantize": Incompatible types'),
        ("quantize{", "'quantize{' is no pipeline of passes: Expected argument name here (character 10)"),
        ("quantize{weights=mxfp4}", "matches 0 of 0 modules"),
    ],
)
def test_a_wrong_pipeline_is_one_message(
    pipeline: str, message: str, module: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(module), "-p", pipeline]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("builtin.module {", "module.mlir:1:17"),
        (MODULE.replace("mx.cast", "mx.cost"), "mx.cost"),
        (MODULE.replace("32xf4", "0xf4"), "block"),
        (MODULE.replace("2x64xf32", "2x32xf32"), "mx.cast"),
    ],
)
def test_a_wrong_module_is_one_message(
    text: str, message: str, module: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module.write_text(text)
    assert main([str(module)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("mxloom-opt: ")
    assert message in error


def test_a_missing_file_is_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["nowhere.mlir"]) == 2
    assert capsys.readouterr().err == "mxloom-opt: there is no file nowhere.mlir\n"


def test_an_unknown_extension_is_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "module.txt"
    file.write_text(MODULE)
    assert main([str(file)]) == 2
    assert "txt" in capsys.readouterr().err
