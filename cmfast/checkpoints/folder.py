"""cmfast's own format: a folder with model.safetensors and config.json."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import preconditioning as schemes
from ..files import whole_file
from ..preconditioning import Preconditioning
from ..sound import Mdct
from ..unet import UNetConfig
from .checkpoint import Checkpoint, CheckpointError
from .tensors import read_json, read_safetensors, write_json, write_safetensors

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
        scheme = preconditioning or _scheme(content["preconditioning"])
        levels = {int(steps): tuple(v) for steps, v in content.get("recommended_levels", {}).items()}
        representation = _representation(content.get("representation"))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path / CONFIG} is not a configuration written by cmfast: {error!r}") from error
    weights = read_safetensors(path / WEIGHTS)
    return Checkpoint(config, weights, scheme, levels, str(path / WEIGHTS), representation)


def write(checkpoint: Checkpoint, path: Path) -> None:
    """Write the two files, each of them whole or not at all.

    Raises:
        ValueError: a preconditioning that is none of `cmfast.preconditioning`, which nobody could read again.
        OSError: the folder cannot be written to.
    """
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"{path} is a file, expected a folder")
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
    # The weights get their name first: a folder with a configuration is whole.
    with whole_file(path / CONFIG) as config_file, whole_file(path / WEIGHTS) as weights_file:
        write_safetensors(weights_file, weights)
        write_json(config_file, content)


def _scheme(fields: Mapping[str, Any]) -> Preconditioning:
    """What a configuration says of the preconditioning; KeyError or TypeError for what is not known."""
    fields = dict(fields)
    return SCHEMES[fields.pop("type")](**fields)


def _representation(fields: Mapping[str, Any] | None) -> Mdct | None:
    """What a configuration says of a model of sound, None of others; KeyError or ValueError for what is not known."""
    if fields is None:
        return None
    fields = dict(fields)
    if (kind := fields.pop("type")) != "Mdct":
        raise ValueError(f"representation {kind!r}: expected Mdct")
    return Mdct(**fields)
