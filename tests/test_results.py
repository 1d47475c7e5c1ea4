"""Tables in README.md and docs/ are what the commands beside them print of the committed results."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_SHOWN = re.compile(r"^<!-- \$ (cmfast|python) (.+?) -->\n(.*?)^<!-- end -->$", re.MULTILINE | re.DOTALL)


def shown():
    """(program, its arguments, what stands below it) of every table that a command made."""
    for page in PAGES:
        for program, arguments, text in _SHOWN.findall(page.read_text()):
            yield pytest.param(program, arguments, text, id=f"{page.name}: {arguments}")


@pytest.mark.parametrize(("program", "arguments", "text"), list(shown()))
def test_a_table_is_what_its_command_prints(cmfast, monkeypatch, program, arguments, text):
    monkeypatch.chdir(ROOT)
    if program == "cmfast":
        status, out, err = cmfast(*shlex.split(arguments))
    else:
        done = subprocess.run([sys.executable, *shlex.split(arguments)], capture_output=True, text=True)
        status, out, err = (0 if not done.stderr else done.returncode), done.stdout, done.stderr  # 1: it says no
    assert status == 0, err
    assert text.strip() == out.strip()


def test_there_are_such_tables():
    assert {page for page in PAGES if _SHOWN.search(page.read_text())} >= {ROOT / "docs" / "benchmarks.md"}


def test_results_are_used():
    """Each file is shown somewhere, or is a picture that a page has."""
    text = "\n".join(page.read_text() for page in PAGES)
    files = [p for p in (ROOT / "benchmarks" / "results").rglob("*") if p.is_file() and "gpu" not in p.parts]
    names = {str(p.relative_to(ROOT)) for p in files}
    for folder in re.findall(r"never_slower (\S+) -->", text):
        names -= {str(p.relative_to(ROOT)) for p in (ROOT / folder).glob("*-torch-*.json")}
    assert [name for name in names if name not in text] == []
