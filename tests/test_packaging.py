"""The package: what is listed is what is there, floors hold, importing stays light, the wheel is whole."""

import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("backends", "compiler", "dialects", "passes")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT / ".links")}


def python(*arguments: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, cwd=folder, timeout=300)


def tree() -> set[str]:
    folders = {file.parent.relative_to(ROOT) for room in ROOMS for file in (ROOT / room).rglob("*.py")}
    return {"mxloom", *(".".join(("mxloom", *folder.parts)) for folder in folders)}


def test_the_list_of_packages_is_the_tree() -> None:
    assert set(PYPROJECT["tool"]["setuptools"]["packages"]) == tree()
    for package in tree():
        assert (ROOT.joinpath(*package.split(".")[1:]) / "__init__.py").exists(), package


def test_the_root_holds_no_other_module() -> None:
    assert {file.name for file in ROOT.glob("*.py")} == {"__init__.py", "__main__.py"}
    assert not (ROOT / "tests" / "__init__.py").exists()


@pytest.mark.parametrize(
    "module", ["mxloom", "mxloom.dialects.mx", "mxloom.compiler.universe", "mxloom.compiler.recipe"]
)
def test_importing_stays_light(module: str) -> None:
    result = python("-c", f"import sys, {module}; print({{'torch', 'transformers'}} & sys.modules.keys())")
    assert result.stdout == "set()\n", result.stderr


def test_every_public_name_is_there() -> None:
    result = python("-c", "import mxloom\nfor name in mxloom.__all__: assert getattr(mxloom, name).__doc__, name")
    assert result.returncode == 0, result.stderr


def test_the_floors_hold() -> None:
    program = "import sys; from importlinter.cli import lint_imports_command; sys.exit(lint_imports_command())"
    result = python("-c", program)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "0 broken" in result.stdout


def test_the_pins_lie_within_what_the_project_asks() -> None:
    from packaging.requirements import Requirement
    from packaging.version import Version

    pins = dict(
        line.split("==") for line in (ROOT / "requirements" / "core.txt").read_text().splitlines() if "==" in line
    )
    for text in PYPROJECT["project"]["dependencies"]:
        asked = Requirement(text)
        assert Version(pins[asked.name]) in asked.specifier


def test_nothing_names_a_package_index() -> None:
    files = [ROOT / "Makefile", ROOT / "pyproject.toml", ROOT / ".ci" / "run", *(ROOT / "requirements").glob("*.txt")]
    for file in files:
        assert "index-url" not in file.read_text()
        assert "http" not in file.read_text()


@pytest.mark.slow
def test_the_wheel_is_whole(tmp_path: Path) -> None:
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    source = tmp_path / "a checkout under another name"
    for name in filter(None, files.split("\0")):
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if not (ROOT / name).is_symlink():
            target.write_bytes((ROOT / name).read_bytes())
    built = python(
        "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), ".", folder=source
    )
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".py")}
    sources = {name for name in files.split("\0") if name.endswith(".py") and name.startswith((*ROOMS, "__"))}
    assert inside == {f"mxloom/{name}" for name in sources}
    points = zipfile.ZipFile(wheel).read(f"mxloom-{PYPROJECT['project']['version']}.dist-info/entry_points.txt")
    assert b"mxloom-opt = mxloom.compiler.optimizer:main" in points
