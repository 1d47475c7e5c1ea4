"""cmfast's own format: a folder with model.safetensors and config.json."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import preconditioning as schemes
from ..files import whole_file
from ..preconditioning import Preconditioning
from ..sound import Mdct
from ..unet import UNetConfig
from .checkpoint import Checkpoint, CheckpointError, recommended_levels
from .diffusers import INDEX
from .tensors import read_json, read_with_metadata, write_json, write_safetensors

#: The preconditionings that a configuration names.
SCHEMES: Mapping[str, type[Preconditioning]] = {
    scheme.__name__: scheme
    for scheme in (
        schemes.EDM,
        schemes.Consistency,
        schemes.TrigFlow,
        schemes.Flow,
        schemes.LatentConsistency,
        schemes.TrajectoryConsistency,
    )
}

WEIGHTS, CONFIG = "model.safetensors", "config.json"
#: What both files have, so that those of two models are told apart: it follows from what the configuration says.
_ID = "id"


def read(path: Path, preconditioning: Preconditioning | None = None) -> Checkpoint:
    """Read a folder that `write` wrote; `preconditioning` takes the place of its own.

    Raises:
        FileNotFoundError: one of the two files is missing.
        CheckpointError: one of them is damaged or another format's, or they do not belong together.
    """
    content = read_json(path / CONFIG)
    if not (path / WEIGHTS).is_file():
        raise FileNotFoundError(f"no model in the folder {path}: {WEIGHTS} is missing")
    try:
        config = UNetConfig(**content["unet"])
        scheme = _scheme(content["preconditioning"], preconditioning)
        levels = recommended_levels(content.get("recommended_levels", {}), scheme, preconditioning)
        representation = _representation(content.get("representation"))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path / CONFIG} is not a configuration written by cmfast: {error!r}") from error
    weights, beside = read_with_metadata(path / WEIGHTS)
    if _ID in beside and beside[_ID] != content.get(_ID):
        raise CheckpointError(
            f"{path}: {WEIGHTS} is of another model than {CONFIG}: a process is saving here, or ended in between; load "
            "or save the model again"
        )
    return Checkpoint(config, weights, preconditioning or scheme, levels, str(path / WEIGHTS), representation)


def write(checkpoint: Checkpoint, path: Path) -> None:
    """Write the two files, each of them whole or not at all.

    Raises:
        ValueError: a preconditioning that is none of `cmfast.preconditioning`, which nobody could read again.
        FileExistsError: the folder has something else than a model of cmfast.
        OSError: the folder cannot be written to.
    """
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"{path} is a file, expected a folder")
    if (other := _another_librarys(path)) is not None:
        raise FileExistsError(
            f"{path} has a {other} that is not cmfast's, and may be read in its place: take another folder"
        )
    scheme = checkpoint.preconditioning
    if SCHEMES.get(type(scheme).__name__) is not type(scheme):
        raise ValueError(
            f"save: the preconditioning {type(scheme).__qualname__} is not one of {', '.join(SCHEMES)}: save the model "
            "with one of these, and give yours to load(preconditioning=...)"
        )
    content: dict[str, Any] = {
        "format": "cmfast",
        "unet": dataclasses.asdict(checkpoint.config),
        "preconditioning": {"type": type(scheme).__name__, **dataclasses.asdict(scheme)},
        "recommended_levels": {str(steps): list(levels) for steps, levels in checkpoint.recommended_levels.items()},
    }
    if checkpoint.representation is not None:
        content["representation"] = {"type": "Mdct", **dataclasses.asdict(checkpoint.representation)}
    weights = {k: v.contiguous() for k, v in checkpoint.weights.items()}
    content[_ID] = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
    # The weights get their name first: a new folder with a configuration is whole.
    with whole_file(path / CONFIG) as config_file, whole_file(path / WEIGHTS) as weights_file:
        write_safetensors(weights_file, weights, {_ID: content[_ID]})
        write_json(config_file, content)


def _another_librarys(path: Path) -> str | None:
    """The configuration of something else in a folder, as that of a pipeline of diffusers."""
    if (path / INDEX).is_file():
        return INDEX
    if not (path / CONFIG).is_file():
        return None
    try:
        return None if read_json(path / CONFIG).get("format") == "cmfast" else CONFIG
    except CheckpointError:
        return CONFIG


def _scheme(fields: Mapping[str, Any], given: Preconditioning | None = None) -> Preconditioning:
    """What a configuration says of the preconditioning; KeyError or TypeError for what is not known and not given."""
    fields = dict(fields)
    kind = fields.pop("type")
    if given is not None and kind not in SCHEMES:  # somebody's own
        return given
    return SCHEMES[kind](**fields)


def _representation(fields: Mapping[str, Any] | None) -> Mdct | None:
    """What a configuration says of a model of sound, None of others; KeyError or ValueError for what is not known."""
    if fields is None:
        return None
    fields = dict(fields)
    if (kind := fields.pop("type")) != "Mdct":
        raise ValueError(f"representation {kind!r}: expected Mdct")
    return Mdct(**fields)
