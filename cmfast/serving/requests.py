"""The bodies of requests, and what they ask of the model."""

import dataclasses
import secrets
from collections.abc import Callable
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..bulk.shards import MOST_SAMPLES
from ..model import ConsistencyModel
from .batches import Plan
from .description import Description
from .errors import ApiError, of_validation, shortened
from .settings import Limits

Body = TypeVar("Body", bound=BaseModel)

Seed = Annotated[int, Field(ge=0, lt=1 << 64, description="Of the noise; a random one by default.")]
Steps = Annotated[int, Field(ge=1, description="Of the sampler; the model's own number by default.")]
Index = Annotated[int, Field(ge=0, lt=1 << 31)]
#: Higher ones than any model's; the square of a level is a number still.
Level = Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]

#: Seeds that are drawn here; JavaScript has these numbers too.
_RANDOM_SEEDS = 1 << 32


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class ImagesBody(_Strict):
    """The body of OpenAI's images endpoint, and three fields of our own: seed, steps, sampler."""

    prompt: str = Field(description="The number of a class, or empty: then the pictures go through the classes.")
    model: str | None = Field(None, description="The one model's name.")
    n: Annotated[int, Field(ge=1)] | None = Field(None, description="How many pictures; 1 by default.")
    size: str | None = Field(None, description='The model\'s own, such as "64x64"; or "auto".')
    response_format: Literal["b64_json", "url"] | None = Field(None, description="b64_json.")
    output_format: Literal["png"] | None = None
    user: str | None = Field(None, description="Not used.")
    seed: Seed | None = None
    steps: Steps | None = None
    sampler: str | None = None


class SamplesBody(_Strict):
    """The plain form: the arguments of `ConsistencyModel.sample`, and how the samples are wanted."""

    count: Annotated[int, Field(ge=1)] = 1
    class_labels: Index | list[Index] | None = Field(None, description="One for all, or one a sample.")
    steps: Steps | None = None
    timesteps: list[Index] | None = Field(None, description="Instead of steps: indices on the model's Karras grid.")
    sigmas: list[Level] | None = Field(None, description="Instead of steps: the levels themselves.")
    sampler: str | None = None
    seed: Seed | None = None
    first_sample: Annotated[int, Field(ge=0, lt=MOST_SAMPLES)] = 0
    format: Literal["png", "npz"] = Field("png", description="A grid, or numbers.")
    columns: Annotated[int, Field(ge=1)] | None = Field(None, description="Of the grid.")


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What a request asks of the model, found to be possible.

    Attributes:
        plan: of the samples.
        count: how many.
        seed: of their noise.
        first_sample: index of the first one.
        labels: the class of each; None for an unconditional model.
    """

    plan: Plan
    count: int
    seed: int
    first_sample: int
    labels: tuple[int, ...] | None


def read(kind: type[Body], data: bytes) -> Body:
    """The body that the JSON stands for.

    Raises:
        ApiError: it is none.
    """
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        raise of_validation(error) from None


class Reader:
    """Finds out what bodies ask of a model."""

    def __init__(self, description: Description, limits: Limits) -> None:
        self._about, self._limits = description, limits
        self._planner: ConsistencyModel = description.planner()

    def images(self, body: ImagesBody) -> Wanted:
        """What the images endpoint is asked.

        Raises:
            ApiError: it cannot be had from this model.
        """
        about = self._about
        if body.model not in (None, about.name):
            message = f"there is no model {shortened(str(body.model))!r}: this service has {about.name!r}"
            raise ApiError(404, message, "model_not_found", "model")
        if not about.is_picture:
            shape = list(about.sample_shape)
            raise _invalid("model", f"samples {shape} of this model are no images: POST /v1/samples has them")
        if body.size not in (None, "auto", about.size):
            raise _invalid("size", f"this model draws {about.size}, not {shortened(str(body.size))!r}")
        if body.response_format == "url":
            raise _invalid("response_format", "nothing is kept here that a url could lead to: take b64_json")
        asked = SamplesBody.model_construct(
            count=body.n or 1,
            class_labels=self._label(body.prompt),
            steps=body.steps,
            sampler=body.sampler,
            seed=body.seed,
        )
        return self._wanted(asked, "n")

    def samples(self, body: SamplesBody) -> Wanted:
        """What the plain endpoint is asked.

        Raises:
            ApiError: it cannot be had from this model.
        """
        if body.format == "png" and not self._about.is_visible:
            shape = list(self._about.sample_shape)
            raise _invalid("format", f"samples {shape} of this model cannot be drawn: take npz")
        return self._wanted(body, "count")

    def _label(self, prompt: str) -> int | None:
        """The class that a prompt names; none for an empty one."""
        prompt = prompt.strip()
        if not prompt:
            return None
        classes = self._about.num_classes
        if classes is None:
            raise _invalid("prompt", "this model has no classes and reads no text: its prompt must be empty")
        if not (prompt.isascii() and prompt.isdigit()) or len(prompt) > 9 or int(prompt) >= classes:
            message = f"this model reads no text: a prompt is the number of a class, 0 … {classes - 1}, or empty"
            raise _invalid("prompt", f"{message}; got {shortened(prompt)!r}")
        return int(prompt)

    def _wanted(self, body: SamplesBody, count_field: str) -> Wanted:
        limits, labels = self._limits, body.class_labels
        if body.count > limits.count:
            raise _invalid(count_field, f"at most {limits.count} samples a request, got {body.count}")
        if body.first_sample + body.count > MOST_SAMPLES:
            raise _invalid("first_sample", f"samples have indices in 0 … {MOST_SAMPLES - 1}")
        plan = self._plan(body)
        found = _checked("class_labels", lambda: self._planner._labels(labels, body.count, body.first_sample))
        seed = secrets.randbelow(_RANDOM_SEEDS) if body.seed is None else body.seed
        return Wanted(plan, body.count, seed, body.first_sample, None if found is None else tuple(found.tolist()))

    def _plan(self, body: SamplesBody) -> Plan:
        """The sampler and the levels, at which the preconditioning must have coefficients."""
        if body.sampler not in (None, *self._about.samplers):
            known = ", ".join(self._about.samplers)
            raise _invalid("sampler", f"this model's samplers are {known}; got {shortened(str(body.sampler))!r}")
        most = {"steps": body.steps or 0, "timesteps": len(body.timesteps or ()), "sigmas": len(body.sigmas or ())}
        for field, steps in most.items():
            if steps > self._limits.steps:
                raise _invalid(field, f"at most {self._limits.steps}, got {steps}")
        scheme = self._planner.preconditioning

        def find() -> Plan:
            function, levels = self._planner._plan(body.sampler, body.steps, body.timesteps, None, body.sigmas)
            scheme.initial_scale(levels[0])
            for level, following in zip(levels, [*levels[1:], None], strict=True):
                if level > 0:
                    scheme.coefficients(level, following)
                    scheme.renoise(level)
            return Plan(function.__name__.removeprefix("sample_"), tuple(levels))

        return _checked(next((field for field in most if getattr(body, field) is not None), "steps"), find)


Found = TypeVar("Found")


def _checked(field: str, find: Callable[[], Found]) -> Found:
    """What is found; that arguments do not fit is the client's to hear."""
    try:
        return find()
    except (ValueError, ArithmeticError, IndexError) as error:
        message = str(error).removeprefix("sample: ")
        raise _invalid(field, message or type(error).__name__) from None


def _invalid(field: str, message: str) -> ApiError:
    return ApiError(400, message, "invalid_value", field)
