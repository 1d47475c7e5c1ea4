"""Links from a page to files outside docs/: in a checkout they lead there; the site, which lacks them, names them."""

import re
from pathlib import Path
from typing import Any

_LINK = re.compile(r"\[[^\]\n]+\]\((\.\./[^)#\s]+)\)")


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """MkDocs' event: a page's Markdown, with the path in place of each link to a file outside docs/.

    A link to a file that is not there is left as it is, and MkDocs warns of it.
    """
    docs = Path(config["docs_dir"]).resolve()
    folder = (docs / page.file.src_uri).parent

    def named(link: re.Match[str]) -> str:
        path = (folder / link[1]).resolve()
        outside = path.exists() and not path.is_relative_to(docs) and path.is_relative_to(docs.parent)
        return f"`{path.relative_to(docs.parent).as_posix()}`" if outside else link[0]

    return _LINK.sub(named, markdown)
