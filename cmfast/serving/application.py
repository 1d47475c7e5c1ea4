"""The routes of the service, as a FastAPI application."""

import functools
import time
from importlib import resources
from typing import Any

import numpy as np
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .bodies import read_json
from .errors import ApiError
from .metrics import CONTENT_TYPE
from .requests import ImagesBody, SamplesBody, read
from .service import Service, until_gone

#: The page may load nothing from elsewhere, and be framed by nobody.
_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def application(service: Service) -> FastAPI:
    """All routes of a service.

    `GET /` is the page, `POST /v1/images/generations` and `GET /v1/models` have the form of OpenAI's endpoints, and
    `POST /v1/samples` is the plain one. `GET /health`, `/metrics` and `/openapi.json` are for machines.
    """
    app = FastAPI(title="cmfast", docs_url=None, redoc_url=None, description=f"Samples of {service.description.name}.")
    app.add_exception_handler(ApiError, _answer_api_error)
    app.add_exception_handler(HTTPException, _answer_http_exception)
    app.add_exception_handler(Exception, _answer_exception)
    started = int(time.time())

    @app.post("/v1/images/generations", openapi_extra=_body_of(ImagesBody))
    async def images(request: Request) -> Response:
        """Pictures as PNG in base64, in the form of OpenAI's endpoint."""
        body = await _read(ImagesBody, request)
        wanted = service.reader.images(body)
        pixels = await service.draw(wanted, True, functools.partial(until_gone, request))
        about = {"created": int(time.time()), "output_format": "png", "size": service.description.size}
        content = await service.encoder.images(pixels, {**about, "seed": wanted.seed})
        return Response(content, media_type="application/json")

    @app.post("/v1/samples", openapi_extra=_body_of(SamplesBody))
    async def samples(request: Request) -> Response:
        """Samples as one PNG, or as numbers in an .npz file. The header cmfast-seed has the seed."""
        body = await _read(SamplesBody, request)
        wanted = service.reader.samples(body)
        found = await service.draw(wanted, body.format == "png", functools.partial(until_gone, request))
        headers = {"cmfast-seed": str(wanted.seed)}
        if body.format == "png":
            content = await service.encoder.picture(found, body.columns)
            return Response(content, media_type="image/png", headers=headers)
        arrays = {"samples": found}
        if wanted.labels is not None:
            arrays["labels"] = np.array(wanted.labels, np.int64)
        content = await service.encoder.arrays(arrays)
        headers["Content-Disposition"] = 'attachment; filename="samples.npz"'
        return Response(content, media_type="application/octet-stream", headers=headers)

    async def _read(kind: type[Any], request: Request) -> Any:
        if service.draining:
            raise ApiError(503, "the service is shutting down", "shutting_down", retry=1)
        return read(kind, await read_json(request, service.limits))

    @app.get("/v1/models")
    async def models() -> JSONResponse:
        """The one model, in the form of OpenAI's endpoint, with what it can be asked for."""
        about, limits = service.description, service.limits
        model = {
            "id": about.name,
            "object": "model",
            "created": started,
            "owned_by": "cmfast",
            "sample_shape": list(about.sample_shape),
            "size": about.size if about.is_picture else None,
            "classes": about.num_classes,
            "samplers": about.samplers,
            "accelerated": about.accelerated,
            "device": about.device,
            "most_samples": limits.count,
            "most_steps": limits.steps,
        }
        return JSONResponse({"object": "list", "data": [model]})

    @app.get("/health")
    async def health() -> JSONResponse:
        """200 while requests are taken, else 503."""
        return JSONResponse({"status": service.state}, 200 if service.state == "ok" else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(service.metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    page = resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")

    @app.get("/", include_in_schema=False)
    async def root() -> HTMLResponse:
        return HTMLResponse(page, headers={"Content-Security-Policy": _POLICY, "Cache-Control": "no-cache"})

    app.add_middleware(_Counted, service=service)
    return app


class _Counted:
    """Middleware that counts requests, and those that are being answered."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status, begin, service = 500, time.perf_counter(), self._service

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if service.draining:
                    message = {**message, "headers": [*message["headers"], (b"connection", b"close")]}
            await send(message)

        service.active += 1
        try:
            await self._app(scope, receive, noted)
        finally:
            service.active -= 1
            route = getattr(scope.get("route"), "path", "other")
            service.metrics.requests.labels(route, status).inc()
            service.metrics.seconds.labels(route).observe(time.perf_counter() - begin)


def _body_of(kind: type[BaseModel]) -> dict[str, Any]:
    """What /openapi.json says of a body."""
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": kind.model_json_schema()}}}}


def _error(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body(), error.status, error.headers())


async def _answer_api_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    return _error(error)


async def _answer_http_exception(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    answer = _error(ApiError(error.status_code, f"{request.method} {request.url.path[:100]}: {error.detail}"))
    answer.headers.update(error.headers or {})
    return answer


async def _answer_exception(request: Request, error: Exception) -> JSONResponse:
    return _error(ApiError(500, "an error of the service, which its log has", "internal_error"))
