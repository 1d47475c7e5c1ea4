"""Single faults of Python source, made from its syntax tree: what a tired hand writes and a test should notice.

A fault is made from the source as it is, so that files may move and change. Text that only people and type checkers
read has none: docstrings, type hints, f-strings, what is raised or asserted, `__repr__`, protocols.
"""

import ast
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

#: operator: the one that takes its place
OPERATORS: dict[type[ast.AST], tuple[str, str]] = {
    ast.Lt: ("<", "<="),
    ast.LtE: ("<=", "<"),
    ast.Gt: (">", ">="),
    ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
    ast.Is: ("is", "is not"),
    ast.IsNot: ("is not", "is"),
    ast.In: ("in", "not in"),
    ast.NotIn: ("not in", "in"),
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "/"),
    ast.Div: ("/", "*"),
    ast.Pow: ("**", "*"),
    ast.And: ("and", "or"),
    ast.Or: ("or", "and"),
}
#: Arguments that check or describe, and change no result.
_NO_MATTER = ("strict", "help", "stacklevel")
_TYPES = ("annotation", "returns", "decorator_list", "bases", "type_params")
_DEFAULTS = ("defaults", "kw_defaults")  # a constant there is a fault of its own kind
_Span = tuple[int, int]


class Mutant(NamedTuple):
    """A file with one fault.

    Attributes:
        file: its path from the root.
        line: number of the line, from 1.
        source: the line's text.
        change: what was made of it; of the second such change in a line it ends in "(2)".
        kind: of the fault.
        begin: of the bytes that are replaced.
        end: of them.
        text: that takes their place.
    """

    file: str
    line: int
    source: str
    change: str
    kind: str
    begin: int
    end: int
    text: str

    @property
    def key(self) -> tuple[str, str, str]:
        """What tells it from others wherever its line has moved to."""
        return self.file, self.source, self.change

    def seed(self, root: Path) -> None:
        """Write the fault into the file."""
        whole = (root / self.file).read_bytes()
        (root / self.file).write_bytes(whole[: self.begin] + self.text.encode() + whole[self.end :])

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.source}  [{self.change}]"


def mutants_of(file: str, source: str) -> list[Mutant]:
    """All faults of a file's source that are still Python."""
    whole, lines, found, seen = source.encode(), source.splitlines(), [], Counter()
    for kind, begin, end, text, change in _Faults(source).of(ast.parse(source)):
        line = whole[:begin].count(b"\n") + 1
        try:
            compile(whole[:begin] + text.encode() + whole[end:], file, "exec", dont_inherit=True)
        except SyntaxError:
            continue
        seen[line, change] += 1
        times = f" ({seen[line, change]})" if seen[line, change] > 1 else ""
        found.append(Mutant(file, line, lines[line - 1].strip(), change + times, kind, begin, end, text))
    return found


def choose(sources: dict[str, str], count: int, seed: int, least: int = 2) -> list[Mutant]:
    """About `count` faults, in proportion to the files' lines of code, but `least` a file that has so many.

    The same for the same seed and sources; at most one a line, of all kinds alike.
    """
    code = {
        file: sum(bool(re.match(r"\s*[^\s#]", line)) for line in text.splitlines()) for file, text in sources.items()
    }
    chosen = []
    for file, text in sources.items():
        quota = max(least, round(count * code[file] / sum(code.values())))
        chosen += _of_all_kinds(mutants_of(file, text), quota, random.Random(f"{seed} {file}"))
    return chosen


def _of_all_kinds(mutants: Sequence[Mutant], quota: int, generator: random.Random) -> list[Mutant]:
    kinds: dict[str, list[Mutant]] = defaultdict(list)
    for mutant in mutants:
        kinds[mutant.kind].append(mutant)
    for found in kinds.values():
        generator.shuffle(found)
    chosen: dict[int, Mutant] = {}
    turns = list(kinds)
    generator.shuffle(turns)
    while turns and len(chosen) < quota:
        kind = turns.pop(0)
        while kinds[kind]:
            mutant = kinds[kind].pop()
            if mutant.line not in chosen:
                chosen[mutant.line] = mutant
                turns.append(kind)
                break
    return sorted(chosen.values(), key=lambda mutant: mutant.line)


def harmless(text: str) -> dict[tuple[str, str, str], str]:
    """Why faults are harmless, by their keys. A line is "file :: the source line's text :: the change :: why".

    Raises:
        ValueError: a line that is neither such a one nor a comment.
    """
    found = {}
    for line in text.splitlines():
        if line.strip() and not line.startswith("#"):
            parts = [part.strip() for part in line.split(" :: ")]
            if len(parts) != 4:
                raise ValueError(f"expected file :: the line's text :: the change :: why, got {line!r}")
            found[parts[0], parts[1], parts[2]] = parts[3]
    return found


class _Faults:
    """Finds faults as (kind, begin, end, text, change), with places in bytes."""

    def __init__(self, source: str) -> None:
        self._bytes = source.encode()
        self._starts = [0]
        for line in self._bytes.splitlines(keepends=True):
            self._starts.append(self._starts[-1] + len(line))

    def of(self, node: ast.AST, names: Sequence[str] = ()) -> Iterator[tuple[str, int, int, str, str]]:
        """The faults of a node and all within it; `names` are the variables of the function around it."""
        if _has_none(node):
            return
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            names = _variables(node)
        own = getattr(self, f"_{type(node).__name__.lower()}", None)
        if own is not None:
            yield from own(node, names)
        for field, value in ast.iter_fields(node):
            if field in _TYPES:
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST) and not (field in _DEFAULTS and isinstance(child, ast.Constant)):
                    yield from self.of(child, names)

    def _span(self, node: ast.AST) -> _Span:
        return self._starts[node.lineno - 1] + node.col_offset, self._starts[node.end_lineno - 1] + node.end_col_offset

    def _text(self, node: ast.AST) -> str:
        begin, end = self._span(node)
        return self._bytes[begin:end].decode()

    def _between(self, left: ast.AST, right: ast.AST, operator: ast.AST, kind: str):
        """Another operator between two operands."""
        if type(operator) not in OPERATORS:
            return
        old, new = OPERATORS[type(operator)]
        begin, end = self._span(left)[1], self._span(right)[0]
        pattern = re.escape(old).replace(r"\ ", r"\s+")
        match = re.search(rf"\b{pattern}\b" if old.isascii() and old[0].isalpha() else pattern, self._at(begin, end))
        yield kind, begin + match.start(), begin + match.end(), new, f"{old} to {new}"

    def _at(self, begin: int, end: int) -> str:
        return self._bytes[begin:end].decode("latin-1")  # a character a byte

    def _compare(self, node: ast.Compare, names: Sequence[str]):
        operands = [node.left, *node.comparators]
        for left, right, operator in zip(operands, operands[1:], node.ops, strict=False):
            yield from self._between(left, right, operator, "comparison")

    def _binop(self, node: ast.BinOp, names: Sequence[str]):
        if not any(isinstance(x, ast.JoinedStr | ast.List | ast.Tuple) or _is_text(x) for x in (node.left, node.right)):
            yield from self._between(node.left, node.right, node.op, "arithmetic")

    def _augassign(self, node: ast.AugAssign, names: Sequence[str]):
        if not isinstance(node.value, ast.JoinedStr | ast.List) and not _is_text(node.value):
            yield from self._between(node.target, node.value, node.op, "arithmetic")

    def _boolop(self, node: ast.BoolOp, names: Sequence[str]):
        for left, right in zip(node.values, node.values[1:], strict=False):
            yield from self._between(left, right, node.op, "and, or")

    def _unaryop(self, node: ast.UnaryOp, names: Sequence[str]):
        begin, _ = self._span(node)
        if isinstance(node.op, ast.Not):
            yield "not", begin, begin + len("not "), "", "not dropped"
        elif isinstance(node.op, ast.USub) and not isinstance(node.operand, ast.Constant):
            yield "arithmetic", begin, begin + len("-"), "", "minus dropped"

    def _constant(self, node: ast.Constant, names: Sequence[str], kind: str = "constant"):
        value = node.value
        if isinstance(value, bool):
            new = repr(not value)
        elif isinstance(value, int):
            new = repr(value + 1)
        elif isinstance(value, float):
            new = repr(value / 2 or 1.0)
        else:
            return
        yield kind, *self._span(node), new, f"{self._text(node)} to {new}"

    def _arguments(self, node: ast.arguments, names: Sequence[str]):
        for default in (*node.defaults, *node.kw_defaults):
            if isinstance(default, ast.Constant):
                yield from self._constant(default, names, "default")

    def _branch(self, test: ast.AST, answers: Sequence[str]):
        for answer in answers:
            yield "branch", *self._span(test), answer, {"True": "always", "False": "never"}[answer]

    def _if(self, node: ast.If, names: Sequence[str]):
        yield from self._branch(node.test, ("True", "False"))

    _ifexp = _if

    def _while(self, node: ast.While, names: Sequence[str]):
        yield from self._branch(node.test, ("False",))

    def _comprehension(self, node: ast.comprehension, names: Sequence[str]):
        for test in node.ifs:
            yield from self._branch(test, ("True",))

    def _expr(self, node: ast.Expr, names: Sequence[str]):
        if isinstance(node.value, ast.Call):
            yield "call", *self._span(node), "pass", "call dropped"

    def _return(self, node: ast.Return, names: Sequence[str]):
        if isinstance(node.value, ast.Name):
            others = [name for name in names if name != node.value.id]
            if others:
                yield "return", *self._span(node.value), others[-1], f"{node.value.id} to {others[-1]}"

    def _slice(self, node: ast.Slice, names: Sequence[str]):
        for bound in (node.lower, node.upper):
            if bound is not None and not isinstance(bound, ast.Constant):
                new = f"({self._text(bound)}) + 1"
                yield "slice", *self._span(bound), new, f"{self._text(bound)} to {new}"


def _has_none(node: ast.AST) -> bool:
    """Whether there is nothing in a node that could change a result."""
    if isinstance(node, ast.Raise | ast.Assert | ast.JoinedStr | ast.Import | ast.ImportFrom):
        return True
    if isinstance(node, ast.If):
        return isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    if isinstance(node, ast.ClassDef):
        return any(isinstance(base, ast.Name) and base.id == "Protocol" for base in node.bases)
    if isinstance(node, ast.FunctionDef):
        return node.name == "__repr__"
    return isinstance(node, ast.keyword) and node.arg in _NO_MATTER


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str | bytes)


def _variables(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """The names of a function's arguments and of what it assigns, in order."""
    a = function.args
    given = [
        argument.arg for argument in (*a.posonlyargs, *a.args, *a.kwonlyargs) if argument.arg not in ("self", "cls")
    ]
    nodes = [node for node in ast.walk(function) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
    assigned = [node.id for node in sorted(nodes, key=lambda node: (node.lineno, node.col_offset))]
    return list(dict.fromkeys(given + assigned))
