"""Tables in README.md and docs/ are what the commands beside them print of the committed results."""

import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_SHOWN = re.compile(r"^<!-- \$ cmfast (.+?) -->\n(.*?)^<!-- end -->$", re.MULTILINE | re.DOTALL)


def shown():
    """(page, arguments of the command, what stands below it) of every table that a command made."""
    for page in PAGES:
        for command, text in _SHOWN.findall(page.read_text()):
            yield pytest.param(command, text, id=f"{page.name}: {command}")


@pytest.mark.parametrize(("command", "text"), list(shown()))
def test_a_table_is_what_its_command_prints(cmfast, monkeypatch, command, text):
    monkeypatch.chdir(ROOT)
    status, out, err = cmfast(*shlex.split(command))
    assert status == 0, err
    assert text.strip() == out.strip()


def test_there_are_such_tables():
    assert {page for page in PAGES if _SHOWN.search(page.read_text())} >= {ROOT / "docs" / "benchmarks.md"}


def test_results_are_used():
    """Each file is shown somewhere, or is a picture that a page has."""
    text = "\n".join(page.read_text() for page in PAGES)
    files = [p for p in (ROOT / "benchmarks" / "results").rglob("*") if p.is_file() and "gpu" not in p.parts]
    assert [str(p.relative_to(ROOT)) for p in files if str(p.relative_to(ROOT)) not in text] == []
