"""The pages of the documentation, and their blocks of code."""

import dataclasses
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent

#: README, CONTRIBUTING and docs/, by their paths from the root.
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md")),
]

_FENCE = re.compile(r"^(```+|~~~+)\s*(\w*)\s*(.*)$")


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        page: its page.
        line: of its fence, from 1.
        kind: the word after the fence: python, sh or console.
        title: the file that it is said to be from, "" for none.
        text: what stands in it.
    """

    page: str
    line: int
    kind: str
    title: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: str, text: str | None = None) -> list[Block]:
    """The blocks of a page, in order; ValueError for one that does not end, or an option that is not known."""
    lines = ((ROOT / page).read_text() if text is None else text).splitlines()
    found: list[Block] = []
    start, fence, kind, title = 0, "", "", ""
    for i, line in enumerate(lines, 1):
        if fence:
            if line.strip() == fence:
                found.append(Block(page, start, kind, title, "\n".join(lines[start : i - 1]) + "\n"))
                fence = ""
        elif opened := _FENCE.match(line.strip()):
            start, fence, kind = i, opened[1], opened[2]
            named = re.fullmatch(r'title="([^"]+)"', opened[3])
            if opened[3] and named is None:
                raise ValueError(f'{page}:{i}: expected title="..." or nothing after the kind, got {opened[3]!r}')
            title = named[1] if named else ""
    if fence:
        raise ValueError(f"{page}:{start}: this block does not end")
    return found


def command_lines(block: Block) -> list[str]:
    """The commands of a block of sh, or those after "$ " of a console; a backslash at its end continues a line."""
    text = block.text
    if block.kind == "console":
        text = "\n".join(line[2:] for line in text.splitlines() if line.startswith("$ "))
    return [line for line in text.replace("\\\n", " ").splitlines() if line.split("#")[0].strip()]


def expected_output(block: Block) -> str:
    """What a console shows after its commands."""
    return "\n".join(line for line in block.text.splitlines() if not line.startswith("$ "))


def shows(expected: str, found: str) -> bool:
    """Whether an output is the one that a console shows: but for measured numbers, processors and spaces.

    Measured are numbers that are not whole; the others are compared.
    Dots alone on a line stand for any lines, dots in one for the rest of it; further lines may follow the last.
    """
    parts = [".*" if part == "..." else re.escape(part) for part in re.split(r"(\.\.\.)", _plain(expected))]
    return re.match("".join(parts), _plain(found), re.DOTALL) is not None


def _plain(output: str) -> str:
    output = re.sub(r"\d+ threads? of [^:\n]+:", "threads:", output)
    output = re.sub(r"\d+(\.\d+(e[+-]\d+)?|e[+-]\d+)", "#", output)
    return "\n".join(" ".join(line.split()) for line in output.strip().splitlines())
