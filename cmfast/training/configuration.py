"""The configuration of a training: sections of YAML, each the fields of a dataclass.

    network: {image_size: 32, model_channels: 64, channel_mult: [1, 2, 2]}   # UNetConfig; the rest from the data
    preconditioning: {type: EDM, sigma_data: 0.5}
    method: {name: diffusion, log_sigma_mean: -1.2}
    loop: {iterations: 10000, batch_size: 128, schedule: cosine}             # LoopSettings
    data: {path: images, size: 32}

Every section and every field may be left out, but for the method's name and the data's path.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from .settings import LoopSettings

Fields = TypeVar("Fields")


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """Where the data is, and how it is read; see `load_data`.

    Attributes:
        path: of the folder or file.
        split: "train" or "test", of files that have both.
        size: cut images to squares and resize them to so many pixels.
    """

    path: str
    split: str = "train"
    size: int | None = None


@dataclasses.dataclass(frozen=True)
class Configuration:
    """What `cmfast train` is told, section by section; those of the model and the method are still mappings.

    Attributes:
        method: the method's `name` and fields of its settings.
        data: see `DataSettings`.
        loop: see `LoopSettings`.
        network: fields of UNetConfig.
        preconditioning: `type`, the name of a class of `cmfast.preconditioning`, and its fields.
        init_from: a model to start from, as `cmfast.load` takes it.
        teacher: a diffusion model that the method learns from, likewise.
    """

    method: dict[str, Any]
    data: DataSettings
    loop: LoopSettings = dataclasses.field(default_factory=LoopSettings)
    network: dict[str, Any] = dataclasses.field(default_factory=dict)
    preconditioning: dict[str, Any] = dataclasses.field(default_factory=dict)
    init_from: str | None = None
    teacher: str | None = None


def read(path: str | Path) -> dict[str, Any]:
    """The sections of a YAML file.

    Raises:
        ImportError: PyYAML is not installed.
        OSError: there is no such file.
        ValueError: it is not YAML, or not sections.
    """
    content = _yaml(Path(path).read_text(encoding="utf-8"), str(path))
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise ValueError(f"{path}: expected sections, such as method: and data:, got {type(content).__name__}")
    return content


def assignment(text: str) -> tuple[str, Any]:
    """What is set by text such as "loop.iterations=1000", whose value is YAML: ("loop.iterations", 1000).

    Raises:
        ValueError: text of another form.
    """
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise ValueError(f"expected SECTION.FIELD=VALUE, such as loop.iterations=1000, got {text!r}")
    return name.strip(), _yaml(value, text)


def set_values(content: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The sections with the values of names such as "loop.iterations" or "teacher" set in them.

    Raises:
        ValueError: a field of what is no section.
    """
    result = dict(content)
    for name, value in values.items():
        section, dot, field = name.partition(".")
        fields = result.get(section) or {}
        if not dot:
            result[section] = value
        elif isinstance(fields, Mapping):
            result[section] = {**fields, field: value}
        else:
            raise ValueError(f"{name} cannot be set: {section} is {fields!r} and has no fields")
    return result


def parse(content: Mapping[str, Any]) -> Configuration:
    """The configuration of sections.

    Raises:
        ValueError: an unknown section or field, a value of the wrong type or out of its range, or something missing.
            The message names it, and the nearest name that there is.
    """
    known = [field.name for field in dataclasses.fields(Configuration)]
    _check_names(content, known, "the configuration")
    for name in ("method", "data"):
        if not content.get(name):
            raise ValueError(f"the configuration has no section {name}: give it, or --{name}")
    sections: dict[str, Any] = {}
    for name in known:
        value = content.get(name)
        if name in ("init_from", "teacher"):
            sections[name] = coerce(value, str | None, name)
        elif value is not None or name in ("loop", "network", "preconditioning"):
            if not isinstance(value or {}, Mapping):
                raise ValueError(f"{name}: expected fields, such as {name}: {{...}}, got {value!r}")
            sections[name] = dict(value or {})
    if "name" not in sections["method"]:
        raise ValueError("method: its name is missing, such as method: {name: diffusion}")
    sections["data"] = build(DataSettings, sections["data"], "data")
    sections["loop"] = build(LoopSettings, sections["loop"], "loop")
    return Configuration(**sections)


def build(kind: type[Fields], fields: Mapping[str, Any], section: str) -> Fields:
    """A dataclass of fields as YAML has them: lists become tuples, whole numbers floats where these are meant.

    Raises:
        ValueError: an unknown field, a value of the wrong type or out of its range, or a field that is missing.
    """
    known = {field.name: field for field in dataclasses.fields(kind) if field.init}  # type: ignore[arg-type]
    _check_names(fields, known, section)
    hints = typing.get_type_hints(kind)
    values = {name: coerce(value, hints[name], f"{section}.{name}") for name, value in fields.items()}
    for name, field in known.items():
        needed = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if needed and name not in values:
            raise ValueError(f"{section}.{name} is missing")
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"{section}: {error}") from error


def coerce(value: Any, hint: Any, name: str) -> Any:
    """A value of YAML as the type of a field says, or ValueError."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        for choice in arguments:
            try:
                return coerce(value, choice, name)
            except ValueError:
                continue
        raise ValueError(f"{name}: expected {_said(hint)}, got {value!r}")
    if origin is Literal and value in arguments:
        return value
    if origin is tuple and isinstance(value, list | tuple):
        kinds = [arguments[0]] * len(value) if arguments[1:] == (...,) else arguments
        if len(kinds) == len(value):
            return tuple(coerce(part, kind, name) for part, kind in zip(value, kinds, strict=True))
    number = _number(value)
    if hint is float and number is not None:
        return float(number)
    if hint is int and number is not None and number == int(number):
        return int(number)
    if hint in (bool, str, types.NoneType) and type(value) is hint:
        return value
    raise ValueError(f"{name}: expected {_said(hint)}, got {value!r}")


def text(configuration: Configuration) -> str:
    """The configuration as YAML that `read` and `parse` take."""
    yaml = _pyyaml()

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: plain(inner) for name, inner in value.items()}
        return [plain(inner) for inner in value] if isinstance(value, list | tuple) else value

    return yaml.safe_dump(plain(dataclasses.asdict(configuration)), sort_keys=False, default_flow_style=None)


def unknown(name: str, known: Iterable[str], what: str) -> str:
    """What to say of a name that is none of the known ones."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(known)}"
    return f"unknown {what} {name!r}: {hint}"


def _check_names(given: Mapping[str, Any], known: Iterable[str], section: str) -> None:
    known = list(known)
    for name in given:
        if name not in known:
            raise ValueError(f"{section}: {unknown(str(name), known, 'name')}")


def _number(value: Any) -> float | None:
    """A number, also one that YAML 1.1 reads as text, such as 1e-3."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):  # text, or an integer beyond all floats
        return None
    return number if abs(number) < float("inf") else None


def _said(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", types.NoneType: "null"}
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_said(choice) for choice in arguments)
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin is tuple:
        return "a list" + ("" if arguments[1:] == (...,) else f" of {len(arguments)}")
    return names.get(hint, str(hint))


def _yaml(source: str, name: str) -> Any:
    yaml = _pyyaml()
    try:
        return yaml.safe_load(source)
    except yaml.YAMLError as error:
        raise ValueError(f"{name} is not YAML: {error}") from error


def _pyyaml() -> Any:
    try:
        import yaml
    except ImportError as error:
        raise ImportError('configurations are read and written by PyYAML: pip install "cmfast[train]"') from error
    return yaml
