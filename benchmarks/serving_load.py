"""`cmfast serve` under load, beside direct sampling: nothing lost, the ratio of throughputs, the times of answers.

    python -m benchmarks.serving_load --model digits --steps 4 --count 16
    python -m benchmarks.serving_load --model cd_imagenet64_l2.pt --requests 100 --max-batch 8 --threads 2

Clients are as many threads of a process of their own, each with a connection that it keeps and its next request when it
has the answer to the last. Direct sampling is one process that makes as many samples in batches of --max-batch, as fast
as it can, and sends them nowhere. The two take turns, and share the cores with nothing else: the service's HTTP, its
PNGs and the clients are on the same cores as its evaluation. Stated are medians over the rounds, and the processor
time that a request takes in each process, which says what the service is bound by. The exit status is 1 where a request
was lost.
"""

import argparse
import base64
import contextlib
import http.client
import json
import os
import re
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

from cmfast.environment import processor


def options():
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--model", default="digits")
    found.add_argument("--requests", type=int, default=500)
    found.add_argument("--clients", type=int, default=16)
    found.add_argument("--count", type=int, default=16, help="samples of a request")
    found.add_argument("--steps", type=int, default=1)
    found.add_argument("--max-batch", type=int, default=64)
    found.add_argument("--threads", type=int, default=os.cpu_count(), help="of each evaluation, in both")
    found.add_argument("--rounds", type=int, default=3)
    found.add_argument("--endpoint", choices=("images", "npz", "png"), default="images")
    found.add_argument("--plain", action="store_true", help="without --accelerate")
    return found.parse_args()


def direct(given):
    """In a process of its own: for each line that comes, sample, and print the seconds."""
    import torch

    import cmfast

    torch.set_num_threads(given.threads)
    model = cmfast.load(given.model)
    model = model if given.plain else cmfast.accelerate(model)
    samples = given.requests * given.count
    model.sample(given.max_batch, steps=given.steps)
    print("ready", flush=True)
    for _ in sys.stdin:
        begin = time.perf_counter()
        model.sample(samples, steps=given.steps, batch_size=given.max_batch)
        print(time.perf_counter() - begin, flush=True)


class Client(threading.Thread):
    """Sends the requests of its share, one after the other."""

    def __init__(self, port, given, seeds):
        super().__init__()
        self.port, self.given, self.seeds = port, given, seeds
        self.seconds, self.lost = [], 0

    def run(self):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=3600)
        for seed in self.seeds:
            begin = time.perf_counter()
            try:
                self.ask(connection, seed)
            except (OSError, ValueError, KeyError, http.client.HTTPException) as error:
                print(f"lost: {error!r}", file=sys.stderr)
                self.lost += 1
                connection.close()
            self.seconds.append(time.perf_counter() - begin)
        connection.close()

    def ask(self, connection, seed):
        given = self.given
        body = {"seed": seed, "steps": given.steps}
        if given.endpoint == "images":
            path, body = "/v1/images/generations", {**body, "prompt": "", "n": given.count}
        else:
            path, body = "/v1/samples", {**body, "count": given.count, "format": given.endpoint}
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        content = answer.read()
        if answer.status != 200:
            raise ValueError(f"{answer.status}: {content[:200]!r}")
        if given.endpoint == "images":
            pictures = [base64.b64decode(each["b64_json"]) for each in json.loads(content)["data"]]
            if len(pictures) != given.count or any(not picture.startswith(b"\x89PNG") for picture in pictures):
                raise ValueError(f"{len(pictures)} pictures of {given.count}")


def clients(given, port):
    """In a process of its own: for each line that comes, send all requests, and print what became of them."""
    for _ in sys.stdin:
        all_clients = [Client(port, given, range(i, given.requests, given.clients)) for i in range(given.clients)]
        begin = time.perf_counter()
        for client in all_clients:
            client.start()
        for client in all_clients:
            client.join()
        whole = time.perf_counter() - begin
        seconds = sorted(second for client in all_clients for second in client.seconds)
        print(json.dumps([whole, sum(client.lost for client in all_clients), seconds]), flush=True)


def started(code):
    """A process of Python that reads lines and prints lines."""
    return subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def turn(process):
    """Have a process do its work once; what it prints."""
    process.stdin.write("\n")
    process.stdin.flush()
    return json.loads(process.stdout.readline())


def processor_seconds(pid):
    """What a process has used of the processor."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def worker_of(pid):
    """The process of the service that has the model."""
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = entry.joinpath("stat").read_text().rpartition(")")[2].split()[1]
            if int(parent) == pid and b"spawn_main" in entry.joinpath("cmdline").read_bytes():
                return int(entry.name)
    raise RuntimeError("the service has no worker")


def main():
    given = options()
    words = ["--model", given.model, "--max-batch", given.max_batch, "--threads", given.threads, "--port", 0]
    words += ["--max-count", given.count, "--max-queue", max(1024, given.clients * given.count)]
    words += ["--max-steps", max(100, given.steps)] + ([] if given.plain else ["--accelerate"])
    command = f"import sys; sys.argv = ['cmfast', 'serve', *{[str(word) for word in words]}]"
    service = started(f"{command}; from cmfast.cli import main; main()")
    port = int(re.search(r":(\d+)$", service.stdout.readline().strip())[1])
    arguments = f"import argparse; given = argparse.Namespace(**{vars(given)})"
    sampling = started(f"{arguments}; from benchmarks.serving_load import direct; direct(given)")
    assert sampling.stdout.readline() == "ready\n"
    sending = started(f"{arguments}; from benchmarks.serving_load import clients; clients(given, {port})")
    turn(sending)  # warm
    turn(sampling)
    processes = {"worker": worker_of(service.pid), "service": service.pid, "clients": sending.pid}
    processes["direct sampling"] = sampling.pid
    before = {name: processor_seconds(pid) for name, pid in processes.items()}
    ratios, rates, lost, seconds = [], [], 0, []
    samples = given.requests * given.count
    for _ in range(given.rounds):
        alone = turn(sampling)
        whole, failed, answers = turn(sending)
        ratios.append(alone / whole)
        rates.append((samples / whole, samples / alone))
        lost += failed
        seconds += answers
    each = 1e3 / (given.rounds * given.requests)
    used = {name: each * (processor_seconds(pid) - before[name]) for name, pid in processes.items()}
    for process in (sending, sampling):
        process.stdin.close()
        process.wait()
    service.terminate()
    status = service.wait()
    seconds.sort()
    served, of_one = (statistics.median(rate) for rate in zip(*rates, strict=True))
    at = {p: 1e3 * seconds[min(len(seconds) - 1, int(p / 100 * len(seconds)))] for p in (50, 95, 99)}
    print(f"{processor()}, {given.threads} threads; {given.model}{'' if given.plain else ', accelerated'}")
    print(
        f"{given.rounds} rounds of {given.requests} requests by {given.clients} clients, {given.count} samples each in "
        f"{given.steps} steps ({given.endpoint}), batches of {given.max_batch}"
    )
    print(f"lost {lost}; the service ended with status {status}")
    print(f"samples a second: {served:.0f} served, {of_one:.0f} direct, ratio {statistics.median(ratios):.3f}")
    print(f"milliseconds of an answer: p50 {at[50]:.1f}, p95 {at[95]:.1f}, p99 {at[99]:.1f}")
    print("processor ms a request:", ", ".join(f"{name} {spent:.2f}" for name, spent in used.items()))
    sys.exit(bool(lost or status))


if __name__ == "__main__":
    main()
