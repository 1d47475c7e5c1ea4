"""A network of the user's own, made by a function of a file or module of theirs."""

import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import nn

_EXPECTED = "(network, args), (network, args, kwargs) or a dict of these"
#: Whose frames do not tell users where their mistake is.
_NOT_THEIRS = (str(Path(__file__).parents[1]), str(Path(torch.__file__).parent), "<frozen ")


class Call(NamedTuple):
    """A call of a network."""

    network: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def load_call(source: str) -> Call:
    """What the function at FILE.py:FUNCTION or package.module:function returns.

    Other modules are found as by `python FILE.py` and `python -m package.module`: from the file's folder, and from the
    current one.

    Raises:
        ValueError: there is no such file, module or function, it raises, or it returns something else; the message
            says which, and where it was raised.
    """
    place, _, name = source.rpartition(":")
    if not place or not name:
        raise ValueError(f"--from must be FILE.py:FUNCTION or package.module:function, got {source}")
    module = _import_file(Path(place)) if place.endswith(".py") else _import_module(place)
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"--from: {place} has no function {name}")
    with errors_of(source):
        returned = function()
    return _read(source, returned)


@contextmanager
def errors_of(what: str) -> Iterator[None]:
    """Within the block, an error of the user's code becomes a ValueError that says where in it that was raised."""
    try:
        yield
    except (Exception, SystemExit) as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(_NOT_THEIRS)]
        where = f" (line {frames[-1].lineno} of {frames[-1].filename})" if frames else ""
        raise ValueError(f"{what} raised {type(error).__name__}: {error}{where}") from error


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise ValueError(f"--from: there is no file {path}")
    sys.path.insert(0, str(path.resolve().parent))
    name = f"_profiled_{path.stem}"  # another name than that of any installed module
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    with errors_of(f"--from: {path}"):
        spec.loader.exec_module(module)
    return module


def _import_module(name: str) -> ModuleType:
    sys.path.insert(0, os.getcwd())
    with errors_of(f"--from: {name}"):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            missing = error.name
            if missing is None or not f"{name}.".startswith(f"{missing}."):  # one that the module imports
                raise
    raise ValueError(f"--from: there is no module {missing}")


def _read(source: str, returned: Any) -> Call:
    if isinstance(returned, Mapping) and {"network", "args"} <= returned.keys() <= {"network", "args", "kwargs"}:
        returned = (returned["network"], returned["args"], returned.get("kwargs", {}))
    if not isinstance(returned, tuple | list) or len(returned) not in (2, 3):
        raise ValueError(f"{source} must return {_EXPECTED}, got {_described(returned)}")
    network, args, kwargs = (*returned, {})[:3]
    if not isinstance(network, nn.Module):
        raise ValueError(f"{source} must return a torch.nn.Module as the network, got {_described(network)}")
    if not isinstance(args, tuple | list):
        raise ValueError(f"{source} must return the arguments of the call as a tuple, got {_described(args)}")
    if not isinstance(kwargs, Mapping) or not all(isinstance(key, str) for key in kwargs):
        raise ValueError(f"{source} must return the keyword arguments as a dict by name, got {_described(kwargs)}")
    return Call(network, tuple(args), dict(kwargs))


def _described(value: Any) -> str:
    """A value in an error message: its type, and what it holds where that is what matters."""
    kind = type(value).__name__
    if isinstance(value, Mapping):
        return f"{kind} of {', '.join(map(str, value))}" if value else f"empty {kind}"
    if isinstance(value, tuple | list):
        return f"{kind} of {len(value)}"
    return "None" if value is None else kind
