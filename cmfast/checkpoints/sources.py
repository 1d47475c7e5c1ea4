"""Where a model is: a bundled name, a path, or an id of the Hugging Face hub."""

from importlib import resources
from pathlib import Path
from typing import Any

from . import hub

#: The models that come with cmfast, by the names that `load` takes.
BUNDLED = tuple(f"{name}{of}" for name in ("digits", "fashion", "drums", "moving-digits") for of in ("", "-teacher"))


def find(source: str | Path, **hub_options: Any) -> Path:
    """The path of a model; one of the hub is downloaded to the cache. A path that exists wins over a hub id.

    Args:
        source: a name of `BUNDLED`, a path, or "organisation/name" on the hub.
        **hub_options: as `hub.download` takes them.

    Raises:
        FileNotFoundError: it is none of these.
        ImportError: it can only be a hub id, and huggingface_hub is not installed.
        ValueError: a revision of what is not on the hub.
    """
    path = asset(str(source)) if str(source) in BUNDLED else Path(source)
    if path.exists():
        if hub_options.get("revision") is not None:
            raise ValueError(f"{path} is here, and revision={hub_options['revision']!r} is of models on the hub")
        return path
    if hub.is_hub_id(source):
        return hub.download(str(source), **hub_options)
    raise FileNotFoundError(
        f"no model at {path}: expected a path, one of {', '.join(BUNDLED)}, or an id of the Hugging Face hub "
        "(organisation/name)"
    )


def asset(name: str) -> Path:
    """Path of a file that comes with cmfast."""
    return Path(str(resources.files("cmfast"))) / "assets" / name
