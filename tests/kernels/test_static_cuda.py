"""The static report of the built CUDA kernels, and what the build promises: no spills, 16-byte accesses, HMMA."""

import json
import os

import pytest
import torch
import typer
from cmfast.kernels import cuda, native, shapes
from cmfast.kernels.cuda import static

from cmfast.cli import kernels as command


def built() -> str:
    """Why there is no report, or nothing."""
    found = native._built("_cuda")
    if isinstance(found, str):
        return found
    try:
        static._find("nvdisasm")
        static._find("cuobjdump")
    except FileNotFoundError as error:
        return str(error)
    return ""


pytestmark = pytest.mark.skipif(bool(built()), reason=built())


@pytest.fixture(autouse=True)
def _the_extension(monkeypatch):
    monkeypatch.setattr(native, "_stand_in", {})


#: All that were compiled for where this is set, else the first and the last: reading machine code takes a while.
FULL = os.environ.get("CMFAST_STATIC") == "full"


def read():
    return static.architectures() if FULL else [static.architectures()[0], static.architectures()[-1]]


@pytest.fixture(scope="module")
def rows():
    before, native._stand_in = native._stand_in, {}
    try:
        return list(static.report(read()))
    finally:
        native._stand_in = before


def test_every_call_of_every_operator_has_its_launches(rows):
    assert static.architectures() == ["sm_80", "sm_90", "sm_100", "sm_120"]
    found = {(r["arch"], r["op"], r["shape"], r["layout"], r["form"], r["dtype"]) for r in rows}
    expected = {(c.op, c.shape, c.layout, c.form, c.dtype) for c in static.served()}
    assert found == {(arch, *key) for arch in read() for key in expected}
    assert {op for _, op, *_ in found} == {*cuda.OPERATORS}


def test_the_convolutions_of_the_network_are_served():
    refused = {(c.shape, c.form, c.dtype) for c in shapes.calls(["conv2d"])} - {
        (c.shape, c.form, c.dtype) for c in static.served(["conv2d"])
    }
    kinds = {"float32": 1, "1x1": 3, "average": 1, "3 channels": 2}
    assert len(refused) == sum(kinds.values()), refused


def test_what_the_build_promises(rows):
    for row in rows:
        name = f"{row['kernel']} {row['arch']} {row['shape']}"
        assert row["spill_bytes"] == row["stack_bytes"] == 0, name
        assert row["blocks_per_sm"] >= 1, name
        assert row["load_bytes"] == 16, name
        if row["op"].startswith("consistency_step"):
            assert row["store_bytes_min"] == 16, name
        if row["kernel"].startswith("conv_product"):
            # Of a step: nine taps of 32 channels, 16 by 32 of the output or 32 by 16 a warp.
            assert row["matrix_instructions"]["HMMA"] >= (144 if ", 16>" in name else 72), name
            assert row["programs"] >= 132, name
            assert row["blocks_per_sm"] >= (1 if row["arch"] == "sm_120" else 2), name
        if row["op"].startswith("attention") and row["dtype"] != "float32":
            assert row["matrix_instructions"]["HMMA"] >= 64, name
        assert row["programs"] >= 1
        assert row["floor_us"] > 0


def test_clusters_serve_from_hopper_on(rows):
    clustered = {row["arch"] for row in rows if row["cluster"] > 1}
    assert clustered == {"sm_90", "sm_100", "sm_120"} & {*read()}


def test_planning_launches_nothing_and_ends():
    x = torch.full((1, 3, 8, 8), float("nan"))
    arguments = (x, x, [None] * 5, [0.5] * 5, None, None, None, None, 0, 0, False, False)
    outputs = []
    ((offset, grid, threads, shared, cluster),) = native.cuda().planned(
        lambda: outputs.extend(cuda.consistency_step(*arguments))
    )
    assert "step_dense" in static._host_functions()[offset]
    assert (grid, threads, shared, cluster) == ((1, 1, 1), 64, 0, 1)
    with pytest.raises(ZeroDivisionError):
        native.cuda().planned(lambda: 1 / 0)
    assert native.cuda().planned(lambda: None) == []


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("_ZN6cmfast12_GLOBAL__N_110step_denseIf13__nv_bfloat16EEvNS0_9DenseStepE", "step_dense<float, bfloat16>"),
        ("_ZN6cmfast47_GLOBAL__N__3c348d85_14_consistency_cu_7abd7f3410step_denseI6__halfS2_EEvNS0_9DenseStepE",
         "step_dense<half, half>"),
        ("_ZN6cmfast12_GLOBAL__N_112step_stridedENS0_11StridedStepE", "step_strided"),
        ("_ZN6cmfast12_GLOBAL__N_1L12apply_kernelIfLi4EEEvNS_16GroupNormProblemE", "apply_kernel<float, 4>"),
    ],
)  # fmt: skip
def test_names(name, expected):
    assert static._readable(static._without_file(name)) == expected


def test_command(rows, monkeypatch, capsys):
    monkeypatch.setattr(
        static, "report", lambda arches, ops: (r for r in rows if r["arch"] in arches and r["op"] in ops)
    )
    command.kernels(["sm_80"], ["attention"], "cuda", True)
    printed = json.loads(capsys.readouterr().out)
    assert printed == [row for row in rows if (row["arch"], row["op"]) == ("sm_80", "attention")]
    command.kernels(["sm_80"], ["attention"], "cuda", False)
    table = capsys.readouterr().out
    assert "CUDA C++ kernels" in table
    assert "attention_forward_kernel<bfloat16, 64, 0>" in table
    with pytest.raises(typer.BadParameter, match=r"'channel_norm' is not one of attention, .*group_norm"):
        command.kernels(["sm_90"], ["channel_norm"], "cuda", False)
