"""The models and the method that a configuration describes."""

import dataclasses
import inspect
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .. import preconditioning as schemes
from ..accelerate import accelerate
from ..checkpoints import BUNDLED
from ..checkpoints.formats import says_preconditioning
from ..checkpoints.sources import find
from ..model import ConsistencyModel, load
from ..preconditioning import EDM, Preconditioning
from ..unet import UNet, UNetConfig
from .configuration import Configuration, build, coerce, unknown
from .data import Dataset
from .methods import METHODS, Method
from .methods.conversion import viewed


class Made(NamedTuple):
    """What is made of a configuration.

    Attributes:
        method: with its model and its teacher.
        configuration: with every field said, those that followed from the data or a checkpoint too, and absolute paths.
    """

    method: Method
    configuration: Configuration


def make(configuration: Configuration, data: Dataset, device: torch.device | str = "cpu") -> Made:
    """Make the method with its model on the device, new (from the loop's seed) or from a checkpoint, and its teacher.

    The model starts from `init_from`; without it from the teacher, where the method has one; and else from random
    weights. Fields of the network that are not given are those of the checkpoint, or follow from the data: image_size,
    in_channels, out_channels and num_classes.

    Raises:
        ValueError: an unknown name, a value out of its range, or a checkpoint that the configuration does not fit.
        FileNotFoundError: there is no such checkpoint.
    """
    c = configuration
    name = str(c.method["name"])
    if name not in METHODS:
        raise ValueError(unknown(name, METHODS, "method"))
    settings_type, method = METHODS[name]
    settings: Any = build(settings_type, {k: v for k, v in c.method.items() if k != "name"}, "method")
    if method.needs_teacher and c.teacher is None and c.init_from is None:
        raise ValueError(f"the method {name} needs a diffusion model to learn from: give it as teacher (--teacher)")
    if c.teacher is not None and not method.needs_teacher:
        raise ValueError(f"the method {name} has no teacher: to start from a model's weights, give it as init_from")
    teacher = load(c.teacher or str(c.init_from)) if method.needs_teacher else None
    start = c.init_from or c.teacher
    if start is None:
        source = ConsistencyModel(_new_network(c, data), _preconditioning(c.preconditioning) or EDM())
    else:
        source = _loaded(start, c.preconditioning)
        _check_network(c.network, source, start)
    model = method.student(source).to(device)
    if teacher is not None:
        teacher = frozen(teacher.to(device))
    network = source.unet.config if isinstance(source.unet, UNet) else None
    scheme = source.preconditioning
    complete = dataclasses.replace(
        c,
        method={"name": name, **_with_absolute_features(dataclasses.asdict(settings))},
        data=dataclasses.replace(c.data, path=str(Path(c.data.path).absolute())),
        network={} if network is None else dataclasses.asdict(network),
        preconditioning={"type": type(scheme).__name__, **dataclasses.asdict(scheme)},
        init_from=_absolute(c.init_from),
        teacher=_absolute(c.teacher),
    )
    return Made(method(model, settings, c.loop.iterations, teacher), complete)


def frozen(teacher: ConsistencyModel) -> ConsistencyModel:
    """The teacher as training evaluates it: without gradients, and on a processor accelerated."""
    teacher = teacher.eval().requires_grad_(False)
    return accelerate(teacher) if teacher.device.type == "cpu" else teacher


def _with_absolute_features(fields: dict[str, Any]) -> dict[str, Any]:
    return {**fields, "features": _absolute(fields["features"])} if "features" in fields else fields


def _absolute(source: str | None) -> str | None:
    """A checkpoint's path from anywhere; names, which win over paths, and hub ids are as they were."""
    if source is None or source in BUNDLED or not Path(source).exists():
        return source
    return str(Path(source).absolute())


def _loaded(start: str, fields: dict[str, Any]) -> ConsistencyModel:
    """The model to start from. What its file says of its preconditioning stays, but for the fields that are given.

    Its weights are in the terms of its own kind: under another one they would be those of no model.
    """
    path = find(start)
    if not fields or not says_preconditioning(path):
        return load(path, preconditioning=_preconditioning(fields))
    model = load(path)
    own = {"type": type(model.preconditioning).__name__, **dataclasses.asdict(model.preconditioning)}
    for name in ("type", "network"):
        if fields.get(name, own.get(name)) != own.get(name):
            raise ValueError(
                f"preconditioning.{name}: {fields[name]} was given, and {start} has {own.get(name)}, in whose terms "
                "its weights are: leave it out"
            )
    return viewed(model, _preconditioning({**own, **fields}))


def _new_network(c: Configuration, data: Dataset) -> UNet:
    channels, *size = data.images.shape[1:]
    of_the_data = {
        "image_size": size[0] if len(set(size)) == 1 else tuple(size),
        "in_channels": channels,
        "out_channels": channels,
        "num_classes": data.num_classes,
        "dims": len(size),
    }
    config = build(UNetConfig, {**of_the_data, **c.network}, "network")
    factor = config.downsampling[-1] * config.patch_size
    if any(length % factor for length in size[-2:]):
        raise ValueError(
            f"network: its {len(config.channel_mult)} levels need lengths that are multiples of {factor}, and the data "
            f"has {' x '.join(map(str, size))}: give the data another size, or channel_mult fewer levels"
        )
    torch.manual_seed(c.loop.seed)
    return UNet(config)


def _check_network(fields: dict[str, Any], model: ConsistencyModel, source: str) -> None:
    """What is said of the network must be so in the checkpoint."""
    found = getattr(model.unet, "config", None)
    assert isinstance(found, UNetConfig)
    given = build(UNetConfig, {**dataclasses.asdict(found), **fields}, "network")
    for name in fields:
        if getattr(given, name) != getattr(found, name):
            raise ValueError(
                f"network.{name}: {getattr(given, name)} was given, and {source} has {getattr(found, name)}"
            )


def _preconditioning(fields: dict[str, Any]) -> Any:
    """The preconditioning of these fields; None of none."""
    if not fields:
        return None
    known = {
        name: kind
        for name, kind in vars(schemes).items()
        if inspect.isclass(kind)
        and issubclass(kind, Preconditioning)
        and kind is not Preconditioning
        and not name.startswith("_")
    }
    name = coerce(fields.get("type"), str, "preconditioning.type")
    if name not in known:
        raise ValueError(unknown(name, known, "preconditioning"))
    return build(known[name], {k: v for k, v in fields.items() if k != "type"}, "preconditioning")
