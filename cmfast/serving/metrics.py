"""What a service counts, for Prometheus."""

from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

#: Of the text that `Metrics.text` returns.
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """The counters of one service; each has a registry of its own.

    Attributes:
        requests: answered, by route and status.
        seconds: from a request's header to the end of its answer, by route.
        samples: that clients asked for and got evaluated.
        padding: samples that batches were filled up with.
        batches: samples of each batch that were asked for.
        evaluation: seconds of each batch in the worker.
        encoding: seconds in which a request's samples became pictures or numbers.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        """Take the sizes of batches."""
        self._registry = own = CollectorRegistry()
        self.requests = Counter("cmfast_requests", "Requests answered.", ["route", "status"], registry=own)
        self.samples = Counter("cmfast_samples", "Samples evaluated for requests.", registry=own)
        self.padding = Counter("cmfast_padding_samples", "Samples that batches were filled up with.", registry=own)
        self.batches = Histogram("cmfast_batch_samples", "Asked for of each batch.", buckets=sizes, registry=own)

        def seconds(name: str, about: str, labels: Sequence[str] = ()) -> Histogram:
            return Histogram(f"cmfast_{name}_seconds", about, labels, buckets=_SECONDS, registry=own)

        self.seconds = seconds("request", "From a request's header to the end of its answer.", ["route"])
        self.evaluation = seconds("evaluation", "Of a batch, in the worker.")
        self.encoding = seconds("encoding", "Of a request's samples, as pictures or numbers.")

    def watch(self, queue: Callable[[], float], ready: Callable[[], float], restarts: Callable[[], float]) -> None:
        """Take what is looked up when the text is asked for."""
        gauges = (
            ("cmfast_queue_samples", "Samples that wait for an evaluation.", queue),
            ("cmfast_worker_ready", "1 while there is a worker that takes batches.", ready),
            ("cmfast_worker_restarts", "How many times the worker was started again.", restarts),
        )
        for name, about, value in gauges:
            Gauge(name, about, registry=self._registry).set_function(value)

    def text(self) -> bytes:
        """All of it, in Prometheus's text format."""
        return generate_latest(self._registry)
