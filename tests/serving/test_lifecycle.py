"""A service's life: what it starts with, a worker that is killed, and an end that loses nothing."""

import os
import signal
import socket
import subprocess
from unittest import mock

import pytest

from cmfast.serving import server
from cmfast.serving.worker import WorkerError

from .client import COMMAND, LONGEST, Service
from .test_http import in_flight, stopped, until


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    found = Service(tmp_path_factory.mktemp("service"), "--model", "digits", "--max-batch", 4, "--name", "mine")
    yield found
    found.end(signal.SIGKILL)


def test_a_killed_worker(service):
    """The requests that it had samples of get an error, those that wait and those that come are served by the next."""
    with stopped(service):
        lost = [service.later("/v1/samples", {"count": 4, "seed": i}) for i in range(2)]
        until(lambda: in_flight(service) == 2)
        waits = service.later("/v1/samples", {"count": 3, "seed": 2})
        until(lambda: service.metric("cmfast_queue_samples") == 3)
        os.kill(service.worker, signal.SIGKILL)
        for answer in lost:
            assert answer().status == 500
            assert answer().error() == {
                "message": "the worker was killed by signal 9 while it evaluated this request",
                "type": "server_error",
                "param": None,
                "code": "worker_failed",
            }
    health = service.get("/health")
    assert (health.status, health.json()) == (503, {"status": "starting"})
    assert service.metric("cmfast_worker_ready") == 0
    assert waits().status == 200
    assert service.samples(count=2).status == 200
    assert service.metric("cmfast_worker_restarts") == 1
    assert service.get("/health").status == 200
    assert service.get("/v1/models").json()["data"][0]["id"] == "mine"
    assert service.log.read_text() == "cmfast: the worker was killed by signal 9; another one is started\n"


def test_told_to_end(service):
    """What was accepted is answered, on all its connections; what comes then is refused. The status is 0."""
    worker = service.worker
    with stopped(service):
        accepted = [service.later("/v1/samples", {"count": 3, "seed": i}) for i in range(6)]
        until(lambda: in_flight(service) + service.metric("cmfast_queue_samples") >= 12)
        with service.kept() as get:
            assert get("/health") == (200, b'{"status":"ok"}')
            os.killpg(service.process.pid, signal.SIGTERM)
            until(lambda: service.get("/health").json() == {"status": "shutting down"})
            assert get("/health") == (503, b'{"status":"shutting down"}')
        refused = service.samples(count=1)
        assert (refused.status, refused.error()["code"], refused.headers["retry-after"]) == (503, "shutting_down", "1")
        assert refused.headers["connection"] == "close"
    assert [answer().status for answer in accepted] == [200] * 6
    assert service.process.wait(LONGEST) == 0
    assert "Traceback" not in service.log.read_text()
    assert not os.path.exists(f"/proc/{worker}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--max-count", 2000), "a request of 2000 samples would never fit into a queue of 1024"),
        (("--host", "no.such.host.invalid"), "no.such.host.invalid:8000: cannot listen ("),
    ],
)
def test_what_cannot_be_served_is_one_line(cmfast, arguments, message):
    status, out, err = cmfast("serve", *arguments)
    assert (status, out) == (2, "")
    assert err.startswith(f"cmfast: {message}")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "error", [ValueError("no such model"), WorkerError("the worker was killed by signal 9 before it was ready")]
)
def test_a_model_that_cannot_be_loaded_is_one_line(cmfast, monkeypatch, error):
    monkeypatch.setattr(server.Worker, "start", mock.AsyncMock(side_effect=error))
    assert cmfast("serve", "--port", 0) == (2, "", f"cmfast: {error}\n")


def test_an_address_that_is_taken(cmfast):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        status, out, err = cmfast("serve", "--port", port)
    assert (status, out, err) == (2, "", f"cmfast: 127.0.0.1:{port}: cannot listen (Address already in use)\n")


def test_without_the_extra(cmfast, monkeypatch):
    monkeypatch.setattr("cmfast.cli.serve._NEEDED", ("fastapi", "no_such_package"))
    status, out, err = cmfast("serve")
    assert (status, out) == (2, "")
    assert err == "cmfast: cmfast serve needs no_such_package: pip install 'cmfast[serve]'\n"


def test_interrupted_while_it_loads(tmp_path):
    process = subprocess.Popen(
        [*COMMAND, "--port", "0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    until(lambda: children(process.pid))
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=LONGEST)
    assert (process.returncode, out, err) == (0, "", "")


def children(process):
    """The worker, in a list, as soon as there is one."""
    command = ["ps", "-ww", "-o", "args=", "--ppid", str(process)]  # whole, whatever COLUMNS is
    found = subprocess.run(command, capture_output=True, text=True).stdout
    return [line for line in found.splitlines() if "spawn_main" in line]
