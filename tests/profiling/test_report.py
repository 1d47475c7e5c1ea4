"""The report of a profile, word for word."""

import dataclasses

import torch

from cmfast.engine.trace import Trace
from cmfast.profiling.ceilings import Ceilings
from cmfast.profiling.profile import Profile, rows_of
from cmfast.profiling.recording import Operation

CEILINGS = Ceilings(bandwidth=1e9, copied=4_000_000, products={"float32": 1e10})


def operation(layer, kind, seconds, operations, bytes_, begin=0.0):
    products = torch.float32 if operations else None
    return Operation("n", "", layer, kind, kind, "", operations, bytes_, products, begin, seconds)


def profile(*timeline):
    rows = rows_of(timeline, 0.001, CEILINGS)
    return Profile("a net", "Net", 0.02, 0.025, 7, rows, CEILINGS, list(timeline), Trace(steps_timed=True), {})


def test_the_report():
    conv = operation("a.b.c", "conv", 0.012, 60_000_000, 1_000_000)
    found = profile(conv, operation("a.d", "norm", 0.003, 0, 2_000_000), operation("", "norm", 0.004, 0, 100))
    assert str(found).splitlines() == [
        "a net: 20.00 ms, the fastest of 7 (median 25.00); 0.06 GFLOP, 3 MB, floor 8.00 ms",
        "",
        "step                               calls     ms     %  GFLOP    MB  floor ms  x floor",
        "conv                                   1  12.00  60.0  0.060  1.00      6.00      2.0",
        "norm                                   2   7.00  35.0         2.00      2.00      3.5",
        "Python: calls, checks for changes      1   1.00   5.0                                ",
        "",
        "layer                              calls     ms     %  GFLOP    MB  floor ms  x floor",
        "a.b                                    1  12.00  60.0  0.060  1.00      6.00      2.0",
        "(the network itself)                   1   4.00  20.0         0.00      0.00         ",
        "a.d                                    1   3.00  15.0         2.00      2.00      1.5",
        "Python: calls, checks for changes      1   1.00   5.0                                ",
        "",
        "floors: copies of 4 MB at 1 GB/s, products of matrices at 10 GFLOP/s in float32",
    ]


def test_what_is_faster_than_its_floor_is_explained():
    text = str(profile(operation("a", "conv", 0.003, 60_000_000, 1)))
    assert "Winograd's F(4x4) does a quarter" in text
    assert "      0.5\n" in text


def test_stages_come_first_and_in_order():
    stages = ("noise", "evaluation 1", "sampler", "evaluation 2")
    timeline = [dataclasses.replace(operation("", "x", 0.001, 0, 1), stage=stage) for stage in stages]
    lines = str(profile(*timeline)).splitlines()
    assert [line.split("  ")[0] for line in lines[2:8]] == ["stage", *stages, "outside"]
