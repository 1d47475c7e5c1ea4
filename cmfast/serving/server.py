"""The service's life: a socket, a worker, requests, and an orderly end."""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator

import uvicorn

from .application import application
from .connections import protocol
from .service import Service
from .settings import Limits, ModelSettings
from .worker import Worker, WorkerError

_KEEP_ALIVE = 30  # seconds that a connection may be idle between two requests
_CLOSING = 5  # seconds in which the last answers must be sent


def serve(model: ModelSettings, limits: Limits, host: str = "127.0.0.1", port: int = 8000) -> None:
    """Serve a model over HTTP until SIGINT or SIGTERM.

    Then requests that were accepted are ended, for `limits.grace` seconds at most, new ones are answered with 503, and
    the worker is ended. A second signal does not wait.

    Args:
        model: how the worker gets it.
        limits: of requests.
        host: an address of this machine.
        port: 0 takes any that is free; it is printed.

    Raises:
        OSError: the address cannot be used.
        ValueError: the model cannot be loaded.
    """
    logging.getLogger("cmfast.serving").addHandler(_stderr())
    asyncio.run(_serve(model, limits, host, port))


async def _serve(model: ModelSettings, limits: Limits, host: str, port: int) -> None:
    signals = _Signals()
    with _listening(host, port) as listener:
        worker = Worker(model, limits.sizes)
        try:
            starting = asyncio.create_task(worker.start())
            await _first(starting, signals.stop)
            if not starting.done():
                return
            service = Service(worker, starting.result(), limits)
            await _answer(service, listener, signals)
        except WorkerError as error:
            raise ValueError(str(error)) from None
        finally:
            starting.cancel()
            await worker.stop()


async def _answer(service: Service, listener: socket.socket, signals: "_Signals") -> None:
    """Answer requests until there is a signal, and then those that were accepted."""
    config = uvicorn.Config(
        application(service),
        http=protocol(service.limits),
        ws="none",
        lifespan="off",
        log_level="error",
        access_log=False,
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE,
        limit_concurrency=service.limits.connections + 1,  # uvicorn counts the connection that asks as well
        timeout_graceful_shutdown=_CLOSING,
    )
    server = _Server(config)
    running = asyncio.create_task(server.serve(sockets=[listener]))
    host, port = listener.getsockname()[:2]
    print(f"{service.description.name} at http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
    await _first(running, signals.stop)
    await service.drain(service.limits.grace, signals.hurry)
    server.should_exit = True
    cut = asyncio.get_running_loop().call_later(_CLOSING / 2, server.cut)  # those that still send or do not read
    await running
    cut.cancel()


class _Server(uvicorn.Server):
    """uvicorn's, without its handling of signals, which ends the process by the signal."""

    def cut(self) -> None:
        """End all connections."""
        for connection in list(self.server_state.connections):
            connection.transport.abort()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Signals:
    """SIGINT and SIGTERM as events: the first one asks for an end, the second one for a quick one."""

    def __init__(self) -> None:
        self.stop, self.hurry = asyncio.Event(), asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, self._came)

    def _came(self) -> None:
        (self.hurry if self.stop.is_set() else self.stop).set()


async def _first(task: "asyncio.Task[object]", event: asyncio.Event) -> None:
    """Wait until a task is done, or an event is set."""
    waiting = asyncio.create_task(event.wait())
    await asyncio.wait({task, waiting}, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()


@contextlib.contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket at the address, which the loading of a model does not wait to find out about.

    Raises:
        OSError: the address cannot be used; the message has it.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.create_server(address[:2], family=family, backlog=1024)
    except (OSError, OverflowError) as error:
        number = getattr(error, "errno", None) or 0
        reason = os.strerror(number) if number > 0 else getattr(error, "strerror", None) or str(error)
        raise OSError(number, f"cannot listen ({reason})", f"{host}:{port}") from error
    with listener:
        yield listener


def _stderr() -> logging.Handler:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("cmfast: %(message)s"))
    return handler
