"""`cmfast serve`: a model as an HTTP service."""

import functools
import importlib.util
from typing import Annotated

import typer

from . import options
from .options import load_model

#: Packages of the extra `serve`, by the names of their modules.
_NEEDED = ("fastapi", "uvicorn", "httptools", "prometheus_client")


def serve(
    model: options.Model = "digits",
    host: Annotated[str, typer.Option(help="By default this machine alone can connect.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any free one, and prints it.")] = 8000,
    name: Annotated[str | None, typer.Option(help="Of the model, as clients see it; as --model by default.")] = None,
    device: options.Device = None,
    dtype: options.Dtype = "float32",
    backend: options.Backend = "auto",
    accelerate: options.Accelerate = False,
    threads: options.Threads = None,
    max_batch: Annotated[int, typer.Option(min=1, help="Samples of one evaluation.")] = 64,
    max_wait: Annotated[float, typer.Option(min=0, help="Milliseconds that a sample waits for others to join.")] = 5.0,
    max_count: Annotated[int, typer.Option(min=1, help="Samples of one request; more are refused (400).")] = 64,
    max_queue: Annotated[int, typer.Option(min=1, help="Samples that wait; more are refused (429).")] = 1024,
    max_steps: Annotated[int, typer.Option(min=1, help="Steps of a request; more are refused (400).")] = 100,
    timeout: Annotated[
        float, typer.Option(min=0.1, help="Seconds that a header, a body, and a stalled answer may take.")
    ] = 10.0,
    grace: Annotated[float, typer.Option(min=0, help="Seconds that accepted requests have after SIGTERM.")] = 30.0,
) -> None:
    """Serve a model over HTTP: OpenAI's images endpoint, a plain one, a page, and metrics (docs/serving.md)."""
    if missing := [package for package in _NEEDED if importlib.util.find_spec(package) is None]:
        raise ImportError(f"cmfast serve needs {', '.join(missing)}: pip install 'cmfast[serve]'")
    from ..serving import server
    from ..serving.settings import Limits, ModelSettings

    limits = Limits(max_batch, max_wait / 1000, max_count, max_queue, max_steps, receive=timeout, grace=grace)
    load = functools.partial(load_model, model, device, dtype, accelerate, backend)
    server.serve(ModelSettings(load, name or model, backend, threads), limits, host, port)
