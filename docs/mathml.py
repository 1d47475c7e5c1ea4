"""Equations of the documentation as MathML: browsers draw it themselves, so no page needs a script or a font.

`pymdownx.arithmatex` marks what stands between dollar signs; here each mark becomes a formula when the site is built.
"""

import html
import re
from typing import Any

from latex2mathml import converter

_MARKED = re.compile(r'<(span|div) class="arithmatex">(.*?)</\1>', re.DOTALL)


def on_page_content(content: str, **_: Any) -> str:
    r"""MkDocs' event: a page's HTML, with a <math> element for each \(...\) and \[...\]."""
    return _MARKED.sub(lambda found: formula(found[2]), content)


def formula(marked: str) -> str:
    r"""The <math> element of \(LaTeX\), in a line of text, or of \[LaTeX\], on lines of its own.

    Raises:
        ValueError: something else stands between the marks.
    """
    text = html.unescape(marked.strip())
    if (text[:2], text[-2:]) not in ((r"\(", r"\)"), (r"\[", r"\]")):
        raise ValueError(f"expected \\(...\\) or \\[...\\], got {text!r}")
    return converter.convert(text[2:-2].strip(), display="block" if text[1] == "[" else "inline")
