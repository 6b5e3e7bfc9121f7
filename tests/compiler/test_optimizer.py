"""`mxloom-opt`: passes from files and entry points, and errors without tracebacks."""

import inspect
import os
import re
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest
import xdsl
from xdsl.context import Context
from xdsl.dialects.builtin import ModuleOp
from xdsl.dialects.func import ReturnOp
from xdsl.passes import ModulePass
from xdsl.utils.exceptions import PassFailedException

from mxloom.compiler.driver import run_pipeline
from mxloom.compiler.optimizer import MxloomOptMain, main
from mxloom.compiler.pipeline import apply_pass
from mxloom.compiler.recipe import Recipe
from mxloom.compiler.universe import MXLOOM_UNIVERSE, all_passes, all_targets, own_passes
from mxloom.dialects.errors import MxloomError, UsageError
from mxloom.dialects.mx import context, parse_module

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
    """Everywhere where it is announced to mxloom; the driver, and so recipes, take no other."""
    installed = tmp_path / "installed"
    announce(installed, ROOT / "pyproject.toml", ("xdsl.universe",))
    announce(installed, TOY / "pyproject.toml", groups)
    result = run(installed, *program, str(module), "-p", "toy-clip{ratio=0.5}")
    if program is DRIVER and "mxloom.passes" not in groups:
        assert 'there is no pass "toy-clip" here: mxloom-opt has it' in result.stderr
        return
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


@pytest.mark.parametrize("name", [name for name in all_passes() if name not in own_passes()])
def test_no_pass_of_xdsl_that_is_offered_starts_a_program(name: str) -> None:
    """Read from the source of the pass and from what it calls: neither a program nor passes by their names."""
    kind = all_passes()[name]()
    source = inspect.getsource(inspect.getmodule(kind))  # pyright: ignore[reportArgumentType]
    starts = (
        r"subprocess|os\.(system|popen|exec|spawn|fork)|ctypes|get_all_passes|get_multiverse|(?<![.\w])(eval|exec)\("
    )
    assert not re.search(starts, source)
    assert not {"executable", "command", "program", "binary", "arguments"} & kind.__dataclass_fields__.keys()


def test_all_of_xdsl_that_starts_programs_is_known() -> None:
    """Beside the pass that is left out: tools of their own, a cost model that no pass imports, and a code formatter."""
    folder = Path(xdsl.__path__[0])
    sources = {path.relative_to(folder).as_posix(): path.read_text("utf-8") for path in folder.rglob("*.py")}
    assert {name for name, text in sources.items() if "subprocess" in text} == {
        "transforms/mlir_opt.py",
        "backend/block_throughput_cost_model.py",
        "tools/xdsl_tblgen.py",
        "utils/dialect_codegen.py",
    }
    for module in ("block_throughput_cost_model", "xdsl_tblgen", "dialect_codegen"):
        importing = {name for name, text in sources.items() if re.search(rf"import.*\b{module}|{module} import", text)}
        assert not {name for name in importing if not name.startswith(("tools/", "backend/block", "utils/dialect"))}
    assert all_passes().keys().isdisjoint({"mlir-opt", "transform-interpreter"})


@pytest.mark.parametrize(
    "pipeline", ['mlir-opt{executable="/usr/bin/touch" arguments="%s"}', "mlir-opt[cse]", "transform-interpreter"]
)
def test_no_program_is_started(pipeline: str, module: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = pipeline.replace("%s", str(tmp_path / "made"))
    assert main([str(module), "-p", text]) == 2
    assert "there is no pass" in capsys.readouterr().err
    for refuse in (
        lambda: run_pipeline(parse_module(MODULE), None, text),
        lambda: Recipe.from_dict({"passes": [text]}),
    ):
        with pytest.raises(UsageError, match="there is no pass"):
            refuse()
    assert not (tmp_path / "made").exists()


@dataclass(frozen=True)
class Failing(ModulePass):
    """Fails as `how` says."""

    name = "failing"
    how: str = "value"

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        errors = {"value": ValueError("bad value"), "pass": PassFailedException("not so"), "key": KeyError("gone")}
        if self.how in errors:
            raise errors[self.how]
        op.body.block.add_op(ReturnOp())


@pytest.mark.parametrize(("how", "what"), [("value", "bad value"), ("pass", "not so"), ("key", "gone"), ("ir", "func")])
def test_a_pass_that_fails_is_named(how: str, what: str) -> None:
    with pytest.raises(MxloomError, match=rf'the pass "failing" \(.*\) failed: .*{what}'):
        apply_pass(Failing(how), context(), parse_module(MODULE))


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
        ("quantize{weights=mxfp4}", "matches nothing: the model has no contraction"),
        ("quantize{weights=mxfp4 weights=mxint8}", 'the option "weights" comes twice'),
        ("quantize{scale-rule=even weights=mxfp4 scale_rule=even}", 'the option "scale_rule" comes twice'),
        ("quantize{seed=" + "9" * 5000 + "}", "a number in it has thousands of digits"),
        ("quantize{seed=9223372036854775808}", "seed is beyond the integers of 64 bits"),
        ("pack,", "a pass is missing behind the last comma"),
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


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"\xff\xfe", "not UTF-8 text (byte 0)"), (b"module {" * 50_000, ""), (None, "Is a directory")],
)
def test_input_that_is_no_text(
    content: bytes | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "m.mlir"
    file.mkdir() if content is None else file.write_bytes(content)
    assert main([str(file)]) == 1
    is_one_message(capsys, message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a\0b.mlir"], "'a\\x00b.mlir' is no file's name"),
        ([""], "'' is no file's name"),
        (["-o", "."], "-o .: it must name a file in a folder that is there"),
        (["-o", "nowhere/x"], "-o nowhere/x: it must name a file in a folder that is there"),
        (["-o", "a\0b"], "is no file's name"),
        (["--bogus"], "unrecognized arguments: --bogus; see mxloom-opt --help"),
        (["-t", "nope"], "argument -t/--target: invalid choice: 'nope' (choose from"),
        (["-t", "x{"], "argument -t/--target: Expected argument name here"),
    ],
)
def test_wrong_usage_is_one_line(
    arguments: list[str], message: str, module: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = arguments if not arguments[0].startswith("-") or arguments == ["--bogus"] else [str(module), *arguments]
    assert main(given) == 2
    assert is_one_message(capsys, message).count("\n") == 1


def is_one_message(capsys: pytest.CaptureFixture[str], message: str) -> str:
    error = capsys.readouterr().err
    assert error.startswith("mxloom-opt: ")
    assert message in error
    assert "Traceback" not in error
    assert "fault of mxloom" not in error
    return error


def test_the_output_file_is_written_only_when_all_went_well(module: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.mlir"
    assert main([str(module), "-o", str(output)]) == 0
    before = output.read_text()
    assert "mx.cast" in before
    assert main([str(module), "-o", str(output), "-p", "quantize{weights=mxfp4}"]) == 2
    assert output.read_text() == before


def test_an_empty_file_is_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "m.mlir").write_text("")
    assert main([str(tmp_path / "m.mlir")]) == 1
    is_one_message(capsys, "m.mlir:1:1")


def test_what_is_a_fault_of_ours_is_called_so(
    module: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(self: MxloomOptMain) -> None:
        raise KeyError("slot")

    monkeypatch.setattr(MxloomOptMain, "run", fail)
    assert main([str(module)]) == 1
    message = "mxloom-opt: this is a fault of mxloom: KeyError: 'slot'; --debug shows where\n"
    assert capsys.readouterr().err == message
    with pytest.raises(KeyError):
        main([str(module), "--debug"])


def test_a_missing_file_is_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["nowhere.mlir"]) == 2
    assert capsys.readouterr().err == "mxloom-opt: there is no file nowhere.mlir\n"


def test_an_unknown_extension_is_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "module.txt"
    file.write_text(MODULE)
    assert main([str(file)]) == 2
    assert "txt" in capsys.readouterr().err


def test_the_help_names_what_is_mxlooms_own_before_what_is_xdsls(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    shown = "".join(capsys.readouterr().out.split())  # lines are broken behind hyphens too
    own = ",".join(own_passes())
    assert {"pack", "quantize"} <= own_passes().keys() < all_passes().keys()
    assert shown.index(f"mxloom'sownpasses,andthoseannouncedtoit:{own}.") < shown.index("positionalarguments")
    assert f"Availablepassesare:{own}," in shown
    assert "Availabletargetsare:emulate," in shown
