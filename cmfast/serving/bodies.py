"""Reading a request's body: not more of it than is allowed, and not longer."""

import asyncio

from starlette.requests import ClientDisconnect, Request

from .errors import ApiError
from .settings import Limits


async def read_json(request: Request, limits: Limits) -> bytes:
    """The bytes of a body that says it is JSON.

    Raises:
        ApiError: it is too large, comes too slowly, or is said to be something else.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # what a form of a foreign page sends is refused with it
        raise ApiError(415, "expected a body with the header Content-Type: application/json", "unsupported_media_type")
    length = request.headers.get("content-length", "")
    if length.isascii() and length.isdigit() and (len(length) > 15 or int(length) > limits.body):
        raise _too_large(limits)
    try:
        return await asyncio.wait_for(_all_of(request, limits), limits.receive)
    except asyncio.TimeoutError:
        message = f"the body did not arrive within {limits.receive:g} s"
        raise ApiError(408, message, "request_timeout") from None
    except ClientDisconnect:
        raise ApiError(400, "the client has gone", "client_disconnected") from None


async def _all_of(request: Request, limits: Limits) -> bytes:
    found = bytearray()
    async for part in request.stream():
        found += part
        if len(found) > limits.body:
            raise _too_large(limits)
    return bytes(found)


def _too_large(limits: Limits) -> ApiError:
    return ApiError(413, f"a body has at most {limits.body} bytes", "body_too_large")
