"""What a client is told when it gets no samples: the error object of OpenAI's endpoints."""

import dataclasses
from typing import Any

from pydantic import ValidationError

_LONGEST = 200  # characters of what a client wrote that come back to it


@dataclasses.dataclass
class ApiError(Exception):
    """A request that is answered with an error.

    Attributes:
        status: of HTTP.
        message: for a person.
        code: for a program.
        param: the field that is at fault, if one is.
        retry: seconds after which the same request may succeed, if it may.
    """

    status: int
    message: str
    code: str | None = None
    param: str | None = None
    retry: int | None = None

    def body(self) -> dict[str, Any]:
        """The error as the endpoints of OpenAI write it."""
        kinds = {429: "rate_limit_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """Those that belong to the error."""
        return {} if self.retry is None else {"Retry-After": str(self.retry)}


_CODES = {
    "json_invalid": "invalid_json",
    "missing": "missing_required_parameter",
    "extra_forbidden": "unknown_parameter",
}


def of_validation(error: ValidationError) -> ApiError:
    """The first thing that is wrong with a body."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    # Within a field, places in a list alone: the kinds that a value could have are no part of a body.
    place = [str(each) for i, each in enumerate(first["loc"]) if not i or isinstance(each, int)]
    param = shortened(".".join(place)) or None
    code = _CODES.get(first["type"], "invalid_value")
    if code == "unknown_parameter":
        return ApiError(400, f"there is no field {param!r}", code, param)
    message = shortened(first["msg"].removeprefix("Value error, "))
    return ApiError(400, message if param is None else f"{param}: {message}", code, param)


def shortened(text: str) -> str:
    """A client's own words, but not all of them."""
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
