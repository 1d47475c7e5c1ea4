"""The mechanics of run_mutants.py: which faults there are, which are chosen, and that a fault is in its copy alone."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from .mutants import choose, harmless, mutants_of

HERE = Path(__file__).parent


def changed(source):
    """The source with each fault, by the fault's change."""
    whole = source.encode()
    return {
        m.change: (whole[: m.begin] + m.text.encode() + whole[m.end :]).decode() for m in mutants_of("f.py", source)
    }


@pytest.mark.parametrize(
    ("source", "change", "expected"),
    [
        ("y = σ < b", "< to <=", "y = σ <= b"),
        ("y = a <= b < c", "< to <=", "y = a <= b <= c"),
        ("y = a == b", "== to !=", "y = a != b"),
        ("y = island is None", "is to is not", "y = island is not None"),
        ("y = a  not  in b", "not in to in", "y = a  in b"),
        ("y = (a + b) * c", "+ to -", "y = (a - b) * c"),
        ("y = (a + b) * c", "* to /", "y = (a + b) / c"),
        ("y = a**b", "** to *", "y = a*b"),
        ("y += 2", "+ to -", "y -= 2"),
        ("y = -x", "minus dropped", "y = x"),
        ("y = -1", "1 to 2", "y = -2"),
        ("y = a and b or c", "and to or", "y = a or b or c"),
        ("y = a and not (b or c)", "not dropped", "y = a and (b or c)"),
        ("y = 3", "3 to 4", "y = 4"),
        ("y = 0.5", "0.5 to 0.25", "y = 0.25"),
        ("y = 0.0", "0.0 to 1.0", "y = 1.0"),
        ("y = True", "True to False", "y = False"),
        ("if a < b:\n    pass", "always", "if True:\n    pass"),
        ("if a < b:\n    pass", "never", "if False:\n    pass"),
        ("y = a if b else c", "never", "y = a if False else c"),
        ("while a:\n    pass", "never", "while False:\n    pass"),
        ("y = [a for a in b if a]", "always", "y = [a for a in b if True]"),
        ("def f(x, k=2):\n    pass", "2 to 3", "def f(x, k=3):\n    pass"),
        ("a.append(\n    1,\n)", "call dropped", "pass"),
        ("def f(x):\n    y = x\n    return x", "x to y", "def f(x):\n    y = x\n    return y"),
        ("y = x[1:n]", "n to (n) + 1", "y = x[1:(n) + 1]"),
        ("y = x[:1]", "1 to 2", "y = x[:2]"),
    ],
)
def test_faults(source, change, expected):
    assert changed(source)[change] == expected


@pytest.mark.parametrize(
    "source",
    [
        '"""A module of 3 < 4 words."""',
        "x: Annotated[int, 3 < 4]",
        "def f(x: L[1]) -> L[2]:\n    ...",
        "raise ValueError(1 + 1)",
        "assert x is not None, 1 + 1",
        "y = f'{a + 1}'",
        "y = 'a' + b",
        "class A(Protocol):\n    def f(self, k=1): return k + 1",
        "class A:\n    def __repr__(self): return 1 + 1",
        "if TYPE_CHECKING:\n    f()",
        "y = zip(a, b, strict=True)",
        "@dataclass(frozen=True)\nclass A:\n    pass",
    ],
)
def test_what_has_no_faults(source):
    assert changed(source) == {}


def test_a_second_change_in_a_line_has_its_number():
    assert [m.change for m in mutants_of("f.py", "y = a < b < c")] == ["< to <=", "< to <= (2)"]
    assert [m.kind for m in mutants_of("f.py", "def f(x=1, *, k=-2): pass")] == ["default", "constant"]


SOURCES = {
    "long.py": "\n".join(f"a{i} = b{i} + c{i} if d{i} < {i} else not e{i}" for i in range(90)),
    "short.py": "a = 1\nb = 2\nc = 3\nd = 4\n",
    "empty.py": '"""Nothing."""\n',
}


def test_the_choice_is_spread_and_repeatable():
    chosen = choose(SOURCES, 30, seed=0)
    files = Counter(m.file for m in chosen)
    assert files["short.py"] == 2
    assert 25 <= files["long.py"] <= 30
    assert len({(m.file, m.line) for m in chosen}) == len(chosen)
    kinds = Counter(m.kind for m in chosen if m.file == "long.py")
    assert kinds.keys() == {"arithmetic", "branch", "comparison", "constant", "not"}
    assert max(kinds.values()) - min(kinds.values()) <= 1
    assert choose(SOURCES, 30, seed=0) == chosen
    assert choose(SOURCES, 30, seed=1) != chosen
    # A change of one file leaves the others' faults as they are.
    other = {**SOURCES, "empty.py": "a = 1\n"}
    assert [m for m in choose(other, 30, seed=0) if m.file == "short.py"] == [m for m in chosen if m.file == "short.py"]


def test_a_key_stays_where_a_line_moves():
    (mutant,) = mutants_of("f.py", "a = 1\n")
    (moved,) = mutants_of("f.py", "# A comment.\n\nif b:\n    a = 1\n".replace("if b:\n    ", ""))
    assert moved.line == 3
    assert moved.key == mutant.key == ("f.py", "a = 1", "1 to 2")


def test_a_fault_is_written_into_one_file(tmp_path):
    (tmp_path / "f.py").write_text("y = σ * 2\n")
    (mutant, _) = mutants_of("f.py", "y = σ * 2\n")
    mutant.seed(tmp_path)
    assert (tmp_path / "f.py").read_text() == "y = σ / 2\n"
    assert str(mutant) == "f.py:1: y = σ * 2  [* to /]"


SCRIPT = """
import json, sys
sys.path.insert(0, {here!r})
import run_mutants as run
from mutants import mutants_of
source = (run.ROOT / "cmfast/files.py").read_text()
dropped, *_ = [m for m in mutants_of("cmfast/files.py", source) if m.change == "call dropped" and "replace" in m.source]
test = {test!r}
jobs = [(None, [test], 60), (dropped, [test], 60), (None, [test], 60), (None, [{slow!r}], 2)]
print(json.dumps([(job[0] is None, result["status"], result["first"]) for job, result in run.run_all(jobs, 1)]))
"""


def test_tests_run_on_a_copy_with_the_fault(tmp_path):
    """Without a fault they pass, with it they fail, and without it they pass again; what does not end is killed."""
    (tmp_path / "test_slow.py").write_text("import time\n\n\ndef test_slow():\n    time.sleep(100)\n")
    test = "tests/test_files.py"
    script = SCRIPT.format(here=str(HERE), test=test, slow=str(tmp_path / "test_slow.py"))
    before = (HERE.parent / "cmfast/files.py").read_text()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    healthy, faulty, again, slow = json.loads(done.stdout.splitlines()[-1])
    assert healthy == again == [True, 0, ""]
    assert faulty[:2] == [False, 1]
    assert faulty[2].startswith(test)
    assert slow[1] < 0
    assert (HERE.parent / "cmfast/files.py").read_text() == before


def test_harmless_faults_are_read_as_they_are_written():
    line = "cmfast/a.py :: if a < b: :: < to <= :: they are never equal"
    assert harmless(f"# a comment\n\n{line}\n") == {("cmfast/a.py", "if a < b:", "< to <="): "they are never equal"}
    with pytest.raises(ValueError, match=r"expected file :: .*, got 'cmfast/a.py :: if a < b:'"):
        harmless("cmfast/a.py :: if a < b:")
