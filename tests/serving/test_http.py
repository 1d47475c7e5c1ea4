"""A running service over HTTP: its endpoints, many clients at once, and clients that are wrong, huge, slow or gone.

It is the one of docs/serving.md, whose blocks are run here too.
"""

import base64
import concurrent.futures
import contextlib
import io
import json
import os
import re
import shlex
import signal
import subprocess
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from ..documentation import blocks, command_lines
from ..test_docs import of_pip, of_python
from . import chromium
from .client import LONGEST, Service, everything

BLOCKS = blocks("docs/serving.md")
COMMANDS = [line for block in BLOCKS if block.kind == "sh" for line in command_lines(block)]
PYTHON = [block for block in BLOCKS if block.kind == "python"]

#: Small, so that they are met.
LIMITS = ("--max-batch", 16, "--max-count", 32, "--max-queue", 128, "--max-steps", 8, "--timeout", 3)


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    (line,) = [line for line in COMMANDS if line.startswith("cmfast serve")]
    found = Service(tmp_path_factory.mktemp("service"), *shlex.split(line)[2:], *LIMITS)
    yield found
    found.end(signal.SIGKILL)


@pytest.fixture(autouse=True)
def unharmed(service):
    """After each test a request works, and the log has no error."""
    yield
    if service.process.poll() is None:
        assert service.samples(seed=1).status == 200
    assert "Traceback" not in service.log.read_text()


def pictures(answer):
    assert answer.status == 200, answer.content
    return [base64.b64decode(each["b64_json"]) for each in answer.json()["data"]]


def numbers(answer):
    assert answer.status == 200, answer.content
    with np.load(io.BytesIO(answer.content)) as found:
        return dict(found)


def until(condition):
    end = time.monotonic() + LONGEST
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


# ---- endpoints


def test_images(service):
    answer = service.images(prompt="3", n=3, seed=5, steps=2, size="8x8", response_format="b64_json")
    about = answer.json()
    assert about["created"] == pytest.approx(time.time(), abs=LONGEST)
    assert (about["seed"], about["size"], about["output_format"]) == (5, "8x8", "png")
    images = [Image.open(io.BytesIO(data)) for data in pictures(answer)]
    assert [(image.format, image.mode, image.size) for image in images] == [("PNG", "L", (8, 8))] * 3
    drawn = numbers(service.samples(count=3, class_labels=3, seed=5, steps=2, format="npz"))["samples"]
    expected = np.round((drawn[:, 0].clip(-1, 1) + 1) * 127.5).astype(np.uint8)
    np.testing.assert_array_equal(np.stack([np.asarray(image) for image in images]), expected)


def test_a_seed_of_its_own_for_who_names_none(service):
    first, second = service.images(prompt=""), service.images(prompt="")
    assert first.json()["seed"] != second.json()["seed"]
    assert pictures(service.images(prompt="", seed=first.json()["seed"])) == pictures(first)


def test_samples(service):
    grid = service.samples(count=6, columns=3, seed=4)
    assert (grid.status, grid.headers["content-type"], grid.headers["cmfast-seed"]) == (200, "image/png", "4")
    assert Image.open(io.BytesIO(grid.content)).size == (3 * 66 + 2, 2 * 66 + 2)
    found = numbers(service.samples(count=3, seed=4, first_sample=8, format="npz"))
    assert (found["samples"].dtype, found["samples"].shape) == (np.float32, (3, 1, 8, 8))
    assert found["labels"].tolist() == [8, 9, 0]
    whole = numbers(service.samples(count=11, seed=4, format="npz"))["samples"]
    np.testing.assert_array_equal(whole[8:], found["samples"])


def test_what_is_there(service):
    assert service.get("/health").json() == {"status": "ok"}
    (model,) = service.get("/v1/models").json()["data"]
    assert (model["id"], model["size"], model["classes"], model["accelerated"]) == ("digits", "8x8", 10, True)
    assert (model["most_samples"], model["most_steps"]) == (32, 8)
    bodies = service.get("/openapi.json").json()["paths"]["/v1/images/generations"]["post"]["requestBody"]
    assert "prompt" in bodies["content"]["application/json"]["schema"]["properties"]
    page = service.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert not re.search(rb"(src|href)=.?(https?:)?//", page.content)


def test_metrics(service):
    before = {name: service.metric(name) for name in ("cmfast_samples_total", "cmfast_batch_samples_count")}
    refused = 'cmfast_requests_total{route="/v1/samples",status="400"}'
    service.samples(count=0)
    was = service.metric(refused)
    service.samples(count=0)
    service.samples(count=5)
    assert service.metric(refused) == was + 1
    assert service.metric("cmfast_samples_total") == before["cmfast_samples_total"] + 5
    assert service.metric("cmfast_batch_samples_count") == before["cmfast_batch_samples_count"] + 2  # 4 and 1
    assert service.metric('cmfast_request_seconds_count{route="/v1/samples"}') >= 3
    assert (service.metric("cmfast_queue_samples"), service.metric("cmfast_worker_ready")) == (0, 1)


# ---- the documentation


@pytest.fixture
def here(service, tmp_path, monkeypatch):
    """A function that puts the service's address into a text."""
    monkeypatch.chdir(tmp_path)
    return lambda text: text.replace("http://127.0.0.1:8000", f"http://127.0.0.1:{service.port}")


def test_each_block_is_of_a_kind_that_is_run():
    assert {block.kind for block in BLOCKS} == {"sh", "python"}
    assert {line.split()[0] for line in COMMANDS} == {"pip", "cmfast", "curl", "python"}
    assert len(PYTHON) == 2
    of_pip(shlex.split(next(line for line in COMMANDS if line.startswith("pip")))[1:])
    of_python(shlex.split(next(line for line in COMMANDS if line.startswith("python")))[1:])


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("curl")], ids=lambda line: line[28:50])
def test_curl(here, service, line):
    """The command itself where there is curl, and the request that it stands for."""
    words = shlex.split(line)
    path, body = words[1].removeprefix("http://127.0.0.1:8000"), words[words.index("-d") + 1]
    assert service.post(path, body.encode()).status == 200
    with contextlib.suppress(FileNotFoundError):
        found = subprocess.run(shlex.split(here(line)), capture_output=True)
        assert found.returncode == 0, found.stderr
        if "-o" in words:
            assert Image.open("samples.png").size == (10 * 66 + 2, 3 * 66 + 2)
        else:
            assert found.stdout == service.post(path, body.encode()).content or b'"data"' in found.stdout


def test_numbers(here):
    names = {}
    exec(here(PYTHON[1].text), names)
    assert names["samples"].shape == (4, 1, 8, 8)
    assert names["labels"].tolist() == [1, 2, 3, 4]


def test_the_client_of_openai(here, capsys):
    pytest.importorskip("openai", reason="this block needs OpenAI's client: pip install openai")
    exec(here(PYTHON[0].text), {})
    assert capsys.readouterr().out.startswith("iVBORw0KGgo")


# ---- the page


@pytest.mark.skipif(chromium.FOUND is None, reason="the page is tested in Chromium: apt-get install chromium")
def test_the_page_draws_as_one_clicks(service, tmp_path):
    page = chromium.Page(tmp_path / "profile")
    try:
        address = f"http://127.0.0.1:{service.port}/"
        page.call("Page.navigate", url=address)
        images = "[...document.querySelectorAll('#grid img')]"
        shown = f"{images}.map((image) => image.src)"
        page.until(f"{images}.length == 30 && {images}.every((image) => image.naturalWidth == 8)")
        assert page.value("document.title") == "digits · cmfast"
        first = page.value(shown)
        page.click("#grid")
        page.until(f"{shown}[0] != {json.dumps(first[0])}")
        assert len(set(page.value(shown)) - set(first)) == 30
        page.click("#classes label:nth-of-type(8)")  # all, 0, 1 … 6
        page.until("document.querySelector('#curl').textContent.includes('\"class_labels\":6')")
        page.value(
            "Object.assign(document.querySelector('#seed'), {value: 5}); document.querySelector('#count').value = 4"
        )
        page.value("document.querySelector('#steps').value = 2")
        page.click("#draw")
        page.until("document.querySelector('#status').textContent.includes('seed 5')")
        drawn = [base64.b64decode(source.partition(",")[2]) for source in page.value(shown)]
        assert drawn == pictures(service.images(prompt="6", n=4, seed=5, steps=2))
        page.screenshot(tmp_path / "page.png")
        colours = Image.open(tmp_path / "page.png").convert("L").getextrema()
        assert colours[1] - colours[0] > 200
        page.value("document.querySelector('#steps').removeAttribute('max')")
        page.value("document.querySelector('#steps').value = 99")
        page.click("#draw")
        page.until("document.querySelector('#status.error') != null")
        assert page.value("document.querySelector('#status').textContent") == "at most 8, got 99"
        assert page.value(f"{images}.length") == 4
        assert {url.removeprefix(address) for url in page.urls} == {"", "v1/models", "v1/images/generations"}
        (refused,) = page.complaints  # the browser's own note of the answer that it got
        assert "400" in refused["entry"]["text"]
    finally:
        page.close()


# ---- many clients


def test_nobody_is_lost_and_no_request_depends_on_others(service):
    """Sixteen clients, requests of both endpoints with many seeds, sizes and plans: each gets what it gets alone."""
    asked = [
        {"count": 1 + i % 5, "seed": i % 7, "steps": 1 + i % 3 // 2, "class_labels": i % 4, "format": "npz"}
        for i in range(48)
    ] + [{"count": 16, "seed": i, "format": "npz"} for i in range(4)]
    distinct = {json.dumps(body): body for body in asked}
    alone = {key: numbers(service.samples(**body)) for key, body in distinct.items()}
    evaluated = service.metric("cmfast_batch_samples_count")
    with concurrent.futures.ThreadPoolExecutor(16) as clients:
        answers = list(clients.map(lambda body: service.samples(**body), asked))
    for body, answer in zip(asked, answers, strict=True):
        for name, expected in alone[json.dumps(body)].items():
            np.testing.assert_array_equal(numbers(answer)[name], expected)
    batches = service.metric("cmfast_batch_samples_count") - evaluated
    assert batches < len(asked) - 4  # alone, a request is a batch or more


def test_connections_are_kept(service):
    with service.kept() as get:
        for path in ("/health", "/", "/nowhere", "/health"):
            assert get(path)[0] == (404 if path == "/nowhere" else 200)


def test_as_many_connections_as_are_allowed(service):
    with contextlib.ExitStack() as opened:
        for _ in range(511):
            opened.enter_context(service.connect())
        assert service.get("/health").status == 200
        opened.enter_context(service.connect())
        assert service.get("/health").status == 503


def test_a_full_queue(service):
    """Requests beyond it are told to come again; those that were accepted are answered."""
    with stopped(service):
        accepted = [service.later("/v1/samples", {"count": 16, "seed": i}) for i in range(2)]
        until(lambda: in_flight(service) == 2)
        accepted += [service.later("/v1/samples", {"count": 16, "seed": i}) for i in range(2, 9)]
        until(lambda: service.metric("cmfast_queue_samples") == 112)
        accepted.append(service.later("/v1/samples", {"count": 8}))
        until(lambda: service.metric("cmfast_queue_samples") == 120)
        refused = service.samples(count=9)
        assert (refused.status, refused.error()["code"]) == (429, "queue_full")
        assert refused.error()["type"] == "rate_limit_error"
        assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert [answer().status for answer in accepted] == [200] * 10


def test_a_client_that_goes_leaves_the_queue(service):
    with stopped(service):
        accepted = [service.later("/v1/samples", {"count": 16, "seed": i}) for i in range(2)]
        until(lambda: in_flight(service) == 2)
        with service.connect() as connection:
            connection.sendall(request(b'{"count": 16}'))
            until(lambda: service.metric("cmfast_queue_samples") == 16)
        until(lambda: service.metric("cmfast_queue_samples") == 0)
    assert [answer().status for answer in accepted] == [200] * 2


@contextlib.contextmanager
def stopped(service):
    """Within the block, the worker evaluates nothing."""
    worker = service.worker
    os.kill(worker, signal.SIGSTOP)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):  # it was killed
            os.kill(worker, signal.SIGCONT)


def in_flight(service):
    """Batches that the worker has."""
    return service.metric("cmfast_batch_samples_count") - service.metric("cmfast_evaluation_seconds_count")


# ---- clients that are wrong


def request(body, path=b"/v1/samples", head=b"Content-Type: application/json\r\n"):
    """The bytes of a request."""
    return b"POST %s HTTP/1.1\r\nHost: a\r\n%sContent-Length: %d\r\n\r\n%s" % (path, head, len(body), body)


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status", "code"),
    [
        ("POST", "/v1/samples", {"count": 33}, None, 400, "invalid_value"),
        ("POST", "/v1/images/generations", {"n": 1}, None, 400, "missing_required_parameter"),
        ("POST", "/v1/images/generations", {"prompt": "", "style": "x"}, None, 400, "unknown_parameter"),
        ("POST", "/v1/samples", b"{", None, 400, "invalid_json"),
        ("POST", "/v1/samples", b"[" * 60000, None, 400, "invalid_json"),
        ("POST", "/v1/images/generations", {"prompt": "", "model": "x"}, None, 404, "model_not_found"),
        ("POST", "/v1/samples", b"{}", {}, 415, "unsupported_media_type"),
        ("POST", "/v1/samples", b"{}", {"Content-Type": "text/plain"}, 415, "unsupported_media_type"),
        ("POST", "/v1/samples", b" " * 70000, None, 413, "body_too_large"),
        ("GET", "/v1/samples", None, None, 405, None),
        ("GET", "/../../etc/passwd", None, None, 404, None),
        ("DELETE", "/", None, None, 405, None),
    ],
)
def test_wrong_requests(service, method, path, body, headers, status, code):
    answer = service.request(method, path, body, headers)
    assert (answer.status, answer.error()["code"]) == (status, code)
    assert answer.error()["type"] == "invalid_request_error"


words = st.sampled_from(["prompt", "n", "count", "sigmas", "steps", "seed", "class_labels", "format", "3", "png", ""])
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.binary(max_size=40) | st.dictionaries(words, values, max_size=4) | values)
def test_no_body_is_the_services_fault(service, body):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    for path in ("/v1/samples", "/v1/images/generations"):
        answer = service.post(path, data)
        if answer.status != 200:
            assert answer.error()["type"] == "invalid_request_error"
            assert 400 <= answer.status < 500


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_no_bytes_are_the_services_fault(service, data):
    """Anything, or a request of which a few bytes were changed: an answer, or the end of the connection."""
    given = bytearray(request(b'{"count": 1}'))
    for _ in range(data.draw(st.integers(1, 4))):
        given[data.draw(st.integers(0, len(given) - 1))] = data.draw(st.integers(0, 255))
    given = data.draw(st.binary(max_size=60) | st.just(bytes(given)))
    found = service.raw(given, close_writing=True)
    assert re.match(rb"HTTP/1\.1 (200|4\d\d) |$", found), found


def test_huge_requests(service):
    """Refused before they are there: by what the header says, or by what has come."""
    said = (
        b"POST /v1/samples HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 99999999999\r\n\r\n"
    )
    with service.connect() as connection:
        connection.sendall(said)
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 413")
    chunked = (
        b"POST /v1/samples HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    with service.connect() as connection:
        connection.sendall(chunked)
        for _ in range(20):
            connection.sendall(b"1000\r\n" + b" " * 0x1000 + b"\r\n")
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 413")
    with service.connect() as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n")
        until_refused(connection, b"x: " + b"y" * 1000 + b"\r\n")
    assert service.raw(b"GET /" + b"a" * 40000).startswith(b"HTTP/1.1 431")


def until_refused(connection, data):
    """Send the same again and again, until the other side has closed the connection."""

    def refused():
        try:
            connection.sendall(data)
        except OSError:
            return True
        return False

    until(refused)


def test_slow_requests(service):
    """A header, a body and the reading of an answer that stop: all are ended, while others are served."""
    with service.connect() as header, service.connect() as body, service.connect() as nothing:
        header.sendall(b"POST /v1/samples HTTP/1.1\r\nHost: a\r\n")
        body.sendall(request(b'{"count": 1}')[:-3])
        assert service.samples(count=2).status == 200
        for connection, code in ((header, "request_timeout"), (body, "request_timeout"), (nothing, "request_timeout")):
            answer = connection.recv(1 << 16)
            assert answer.startswith(b"HTTP/1.1 408 Request Timeout")
            while code.encode() not in answer:  # its body may come after its header
                more = connection.recv(1 << 16)
                assert more
                answer += more
        header.close()
    many = [service.connect() for _ in range(20)]
    begin = time.monotonic()
    for connection in many:
        connection.sendall(b"P")
    assert service.samples(count=2).status == 200
    assert all(everything(connection).startswith(b"HTTP/1.1 408") for connection in many)
    assert time.monotonic() - begin > 2.5


def test_requests_that_pile_up(service):
    """Sent on one connection, faster than they are answered: it is closed, before they fill the memory."""
    with service.connect() as connection:
        until_refused(connection, 1000 * b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")


# ---- the end


def test_interrupted_in_a_terminal(service):
    """SIGINT reaches all its processes: the accepted request is answered, and nothing is left."""
    worker = service.worker
    with stopped(service):
        accepted = service.later("/v1/samples", {"count": 3, "seed": 2})
        until(lambda: in_flight(service) == 1)
        os.killpg(service.process.pid, signal.SIGINT)
        until(lambda: service.get("/health").json() == {"status": "shutting down"})
    assert accepted().status == 200
    assert service.process.wait(LONGEST) == 0
    assert service.log.read_text() == ""
    assert not os.path.exists(f"/proc/{worker}")
