"""When a kernel is right, as the benchmarks judge it: see `cmfast.benchmarking.accuracy`."""

from cmfast.benchmarking.accuracy import assert_as_accurate, error

__all__ = ["assert_as_accurate", "error"]
