"""How the scripts in benchmarks/ share the page docs/performance.md."""

import importlib.util
from pathlib import Path

PAGE = Path(__file__).resolve().parents[1] / "benchmarks" / "page.py"


def test_each_script_replaces_its_own_part_of_the_page(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("page", PAGE)
    assert spec is not None
    assert spec.loader is not None
    page = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(page)
    file = tmp_path / "page.md"
    page.write_section(file, "B", "first\n")
    page.write_head(file, "# Title\n\nold\n")
    page.write_section(file, "C", "### part\n\nlast")
    page.write_section(file, "B", "again")
    page.write_head(file, "# Title\n\nnew\n")
    assert file.read_text() == "# Title\n\nnew\n\n## B\n\nagain\n\n## C\n\n### part\n\nlast\n"
    assert page.table(["a", "b"], [["1", "2"]]) == "| a | b |\n|---|---:|\n| 1 | 2 |"
