"""A service in a process of its own, and how it is asked."""

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

LONGEST = 180  # seconds that anything may take on a busy machine

COMMAND = (sys.executable, "-c", "from cmfast.cli import main; main()", "serve")


class Answer:
    def __init__(self, status, headers, content):
        self.status, self.headers, self.content = status, headers, content

    def json(self):
        return json.loads(self.content)

    def error(self):
        """The error object, which has the endpoint's form."""
        (name,) = self.json()
        assert name == "error"
        assert set(self.json()["error"]) == {"message", "type", "param", "code"}
        return self.json()["error"]


class Service:
    """`cmfast serve` with these options, once it listens."""

    def __init__(self, folder, *options):
        self.log = Path(folder) / "stderr"
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*COMMAND, *map(str, options), "--port", "0"],
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
                text=True,
                cwd=folder,
                start_new_session=True,
            )
        line = self.process.stdout.readline()
        found = re.fullmatch(r"(.+) at http://127\.0\.0\.1:(\d+)\n", line)
        assert found, line + self.log.read_text()
        self.name, self.port = found[1], int(found[2])

    def request(self, method, path, body=None, headers=None):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=LONGEST)
        try:
            data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
            given = {"Content-Type": "application/json"} if headers is None else headers
            connection.request(method, path, data, given)
            answer = connection.getresponse()
            return Answer(answer.status, answer.headers, answer.read())
        finally:
            connection.close()

    def get(self, path):
        return self.request("GET", path)

    def post(self, path, body, headers=None):
        return self.request("POST", path, body, headers)

    def samples(self, **body):
        return self.post("/v1/samples", body)

    def images(self, **body):
        return self.post("/v1/images/generations", body)

    def later(self, path, body):
        """A request in a thread of its own; call what is returned for the answer."""
        found = []
        thread = threading.Thread(target=lambda: found.append(self.post(path, body)), daemon=True)
        thread.start()

        def answer():
            thread.join(LONGEST)
            return found[0]

        return answer

    @contextlib.contextmanager
    def kept(self):
        """GET on one connection, again and again; gives status and content."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=LONGEST)
        connection.connect()
        used = connection.sock

        def get(path):
            assert connection.sock is used
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read()

        yield get
        connection.close()

    def connect(self):
        return socket.create_connection(("127.0.0.1", self.port), timeout=LONGEST)

    def raw(self, data, close_writing=False):
        """All that comes back for these bytes until the connection ends."""
        with self.connect() as connection:
            connection.sendall(data)
            if close_writing:
                connection.shutdown(socket.SHUT_WR)
            return everything(connection)

    def metric(self, name):
        """The value of a line of /metrics."""
        text = self.get("/metrics").content.decode()
        (value,) = re.findall(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
        return float(value)

    @property
    def worker(self):
        """The id of the process that has the model."""
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                parent = entry.joinpath("stat").read_text().rpartition(")")[2].split()[1]
                command = entry.joinpath("cmdline").read_bytes()
            except OSError:
                continue
            if int(parent) == self.process.pid and b"spawn_main" in command:
                return int(entry.name)
        raise AssertionError(f"no worker; {self.log.read_text()}")

    def end(self, number=signal.SIGTERM):
        """End all its processes as a terminal or an init system does; the exit status."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, number)
        try:
            return self.process.wait(LONGEST)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            raise


def everything(connection):
    found = b""
    while data := connection.recv(1 << 16):
        found += data
    return found
