"""Checks that the methods of training share."""

from typing import TypeVar

from ...model import ConsistencyModel
from ...preconditioning import EDM, Preconditioning

Kind = TypeVar("Kind", bound=Preconditioning)


def require(settings: object, field: str, holds: bool, expected: str) -> None:
    """Raise ValueError unless a setting is what is expected of it, such as "at least 1"."""
    if not holds:
        raise ValueError(f"{type(settings).__name__}: {field} must be {expected}, got {getattr(settings, field)!r}")


def preconditioning_of(who: str, model: ConsistencyModel, *kinds: type[Kind]) -> Kind:
    """The model's preconditioning, which must be one of the kinds and not of a subclass; else ValueError."""
    found = model.preconditioning
    if type(found) not in kinds:
        wanted = " or ".join(kind.__name__ for kind in kinds)
        raise ValueError(f"{who}: expected the preconditioning {wanted}, got {type(found).__name__}")
    return found  # type: ignore[return-value]


def same_sigma_data(who: str, teacher: EDM, student: EDM) -> None:
    """Raise ValueError where teacher and student are for data of another spread: their weights mean other functions."""
    if teacher.sigma_data != student.sigma_data:
        raise ValueError(
            f"{who}: the teacher's sigma_data is {teacher.sigma_data}, the student's {student.sigma_data}: they must "
            "be equal"
        )
