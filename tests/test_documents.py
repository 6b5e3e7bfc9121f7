"""What the pages show is run: the walks of CONTRIBUTING in a copy of the tree, the code of the others as it stands."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import mxloom
from mxloom.compiler.recipe import Recipe
from mxloom.dialects.instances import parse_format

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)(?: (\S+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SHELL = 'set -eu\nmxloom() {{ "{0}" -m mxloom "$@"; }}\nmxloom-opt() {{ "{0}" -c "{1}" "$@"; }}\n'
OPTIMIZER = "import sys; from mxloom.compiler.optimizer import main; sys.exit(main())"


def blocks(page: Path, language: str) -> list[tuple[str, str]]:
    """The page's blocks of code in a language: the file that each belongs to (or nothing), and its text."""
    return [(file, text) for kind, file, text in BLOCK.findall(page.read_text("utf-8")) if kind == language]


def environment(tree: Path) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(tree / ".links"), "OMP_NUM_THREADS": "1", "COLUMNS": "120"}


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree in which every file that CONTRIBUTING shows is written."""
    tree = tmp_path_factory.mktemp("tree")
    for room in ("backends", "compiler", "dialects", "passes", ".links"):
        shutil.copytree(ROOT / room, tree / room, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("__init__.py", "__main__.py", "pyproject.toml"):
        shutil.copy(ROOT / file, tree / file)
    for file, text in blocks(ROOT / "CONTRIBUTING.md", "python"):
        if file:
            assert not (ROOT / file).exists(), f"{file} is there already: the walk needs another example"
            (tree / file).parent.mkdir(parents=True, exist_ok=True)
            (tree / file).write_text(text, "utf-8")
    return tree


def test_the_walks_of_contributing(walked: Path) -> None:
    tests = [file for file, _ in blocks(ROOT / "CONTRIBUTING.md", "python") if file.startswith("tests/")]
    assert len(tests) == 3
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    result = subprocess.run(command, cwd=walked, env=environment(walked), capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_walks_are_clean(walked: Path) -> None:
    files = [file for file, _ in blocks(ROOT / "CONTRIBUTING.md", "python") if file]
    for command in (["format", "--check"], ["check"]):
        ruff = [sys.executable, "-m", "ruff", *command, *files]
        result = subprocess.run(ruff, cwd=walked, capture_output=True, text=True, timeout=60)
        assert result.returncode == 0, result.stdout


def test_the_table_row_of_contributing_is_a_format() -> None:
    ((_, row),) = blocks(ROOT / "CONTRIBUTING.md", "text")
    name, text, *_ = eval(row.strip().rstrip(","))
    assert name not in mxloom.formats()
    assert str(parse_format(text)) == text


def test_the_readme_lists_the_formats_that_are_there() -> None:
    rows = [
        f"| `{name}` | {entry.bits:g} | {entry.default_scale_rule or '-'} | `{entry.text}` | {entry.note} |"
        for name, entry in mxloom.formats().items()
    ]
    page = (ROOT / "README.md").read_text("utf-8").splitlines()
    assert [line for line in page if re.match(r"\| `[a-z0-9_<>,]+` \| [0-9.]+ \|", line)] == rows


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_recipes_in_pages_are_right(page: Path) -> None:
    for _, text in blocks(page, "yaml"):
        assert Recipe.from_text(text, page).pipeline()


@pytest.fixture
def workplace(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder in which the page's paths lead to the examples and to the files that the page shows."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    page: Path = request.node.callspec.params["page"]
    for _, file, text in BLOCK.findall(page.read_text("utf-8")):
        if file:
            (tmp_path / file).write_text(text, "utf-8")
    return tmp_path


def named(language: str, fast: str | None = None) -> list[Any]:
    """The pages that have code of a language; all but the page `fast` take long, since each captures models."""
    found = [page for page in PAGES if blocks(page, language)]
    return [pytest.param(page, id=page.stem, marks=[] if page.stem == fast else pytest.mark.slow) for page in found]


@pytest.mark.parametrize("page", named("python", fast="concepts"))
def test_python_in_pages_runs(page: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    program = "\n".join(text for _, text in blocks(page, "python"))
    exec(compile(program, str(page), "exec"), {"__name__": page.stem})


@pytest.mark.parametrize("page", named("sh", fast="recipe"))
def test_shell_in_pages_runs(page: Path, workplace: Path) -> None:
    program = SHELL.format(sys.executable, OPTIMIZER) + "".join(text for _, text in blocks(page, "sh"))
    result = subprocess.run(
        ["bash", "-c", program], cwd=workplace, env=environment(ROOT), capture_output=True, text=True, timeout=3600
    )
    assert result.returncode == 0, result.stderr
