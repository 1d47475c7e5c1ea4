"""The static report, and the committed figures that a change of the kernels may not spoil."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer

pytest.importorskip("triton")
from cmfast.kernels import static as common
from cmfast.kernels.triton import shapes, static

from cmfast.cli import kernels as command

COMMITTED = Path(__file__).parents[2] / "benchmarks" / "static"
#: Everything is recompiled where this is set (`make static-check`), else a few kernels for one architecture.
FULL = os.environ.get("CMFAST_STATIC") == "full"

_REPORT = """
import json, sys
from cmfast.kernels.triton import static
from cmfast.kernels.triton.shapes import cases
arches, ops, most = json.loads(sys.argv[1])
rows = []
for arch in arches:
    for op in ops:
        for case in [*cases(arch, [op])][:most]:
            rows += static.rows(case, arch)
print(json.dumps(rows))
"""


def compile_without_interpreter(script, *arguments):
    """Run Python where Triton compiles: these tests run with its interpreter on."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", script, *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def report(arches, ops, most=None):
    return json.loads(compile_without_interpreter(_REPORT, json.dumps([arches, ops, most])))


def committed(arch):
    return json.loads((COMMITTED / f"{arch}.json").read_text())


def check(rows):
    for row in rows:
        name = " ".join(str(row[k]) for k in ("kernel", "arch", "shape", "layout", "form", "dtype"))
        assert row["spill_bytes"] == row["stack_bytes"] == 0, name
        assert row["blocks_per_sm"] >= 1, name


@pytest.mark.parametrize("arch", common.ARCHITECTURES)
def test_committed_figures(arch):
    rows = committed(arch)
    check(rows)
    for row in rows:
        assert row["arch"] == arch
        if row["op"].startswith("consistency_step"):
            assert row["load_bytes_min"] == row["store_bytes_min"] == 16
        if row["op"] in ("channel_moments", "apply_group_norm", "conv2d"):
            assert row["load_bytes"] == 16
        if row["kernel"] == "conv_product_kernel":
            assert set(row["matrix_instructions"]) & {"HMMA", "HGMMA", "tcgen05", "MFMA"}
        if row["op"] == "apply_group_norm" or (row["op"] == "channel_norm" and row["layout"] != "nchw"):
            assert row["load_bytes"] == row["store_bytes_min"] == 16


def test_nothing_got_worse():
    arches, most = (list(common.ARCHITECTURES), None) if FULL else (["sm_90"], 1)
    for arch in arches:
        old = committed(arch)
        rows = report([arch], sorted({row["op"] for row in old}), most)
        check(rows)
        assert rows
        assert common.worse(rows, old) == []


@pytest.mark.parametrize("arch", ["sm_100", "gfx942"])
def test_other_compilers(arch):
    rows = report([arch], ["consistency_step"], 1)
    check(rows)
    assert common.worse(rows, committed(arch)) == []
    assert {row["load_bytes"] for row in rows} == {16}


def test_no_function_of_tritons_gives_none():
    """Before version 3.7, Triton has no value for that."""
    wrong = []
    for path in sorted(Path(shapes.__file__).parent.glob("*.py")):
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef) and "triton.jit" in map(ast.unparse, function.decorator_list):
                returns = [found.value for found in ast.walk(function) if isinstance(found, ast.Return)]
                given = [value for value in returns if value is not None]
                nothing = [value for value in given if isinstance(value, ast.Constant) and value.value is None]
                wrong += [f"{path.name}: {function.name}"] * (len(nothing) + (0 < len(given) < len(returns)))
    assert wrong == []


_WAITS = """
import json
from cmfast.kernels.triton import static
from cmfast.kernels.triton.shapes import cases
found = {}
for op in ("channel_moments", "conv2d"):
    launches = [launch for case in cases("gfx942", [op]) for launch in case.launches]
    launch = next(launch for launch in launches if {"counters", "moment_tickets"} & set(launch.kernel.arg_names))
    lines = static.compile_launch(launch, "gfx942").asm["amdgcn"].splitlines()
    lines = [line.split() for line in lines if line.startswith("\\t") and line.strip()[0] not in ".;"]
    found[op] = [" ".join([name, *(part for part in rest if part == "vmcnt(0)")]) for name, *rest in lines]
print(json.dumps(found))
"""


def test_the_waves_of_amds_gpus_have_written_before_one_says_so():
    """Between a wave's last store and the barrier before a counter is raised, it waits for the store."""
    for op, code in json.loads(compile_without_interpreter(_WAITS)).items():
        raised = [i for i, line in enumerate(code) if line.startswith("global_atomic_add")]
        assert raised, op
        for i in raised:
            barrier = max(j for j in range(i) if code[j] == "s_barrier")
            store = max(j for j in range(barrier) if "_store_" in code[j])
            assert "s_waitcnt vmcnt(0)" in code[store:barrier], op


_KEYS = """
import itertools
import torch
from cmfast.kernels.triton.consistency import plan_consistency_step
from cmfast.kernels.triton.static import specialize
keys = set()
values = (0.0, 1.0, 0.3), (0, 1, 16, 2**64 - 1), (1, 16, 2**32 - 1), (0, 1), (2, 16)
for scalar, seed, draw, first, n in itertools.product(*values):
    x = torch.empty(n, 3, 64, 64, device="meta")
    arguments = (x, x.clone(), [None] * 5, [scalar] * 5, -scalar, 1.0, None, seed, draw, first, True, True)
    source, _, options = specialize(plan_consistency_step(*arguments)[0][0], "sm_90")
    keys.add(str((source.signature, source.constants, source.attrs, options)))
print(len(keys))
"""


def test_values_compile_nothing_anew():
    assert compile_without_interpreter(_KEYS).split() == ["1"]


_ON_DEVICE = """
import json
import torch
from cmfast.kernels.triton.consistency import plan_consistency_step
from cmfast.kernels.triton.static import inspect
rows = []
for format in (torch.contiguous_format, torch.channels_last):
    x = torch.empty(1, 3, 64, 64, device="meta").to(memory_format=format)
    seed, first = torch.empty((), dtype=torch.int64, device="meta"), torch.empty(1, dtype=torch.int64, device="meta")
    arguments = (x, x.clone(), [None] * 5, [0.5] * 5, -1.0, 1.0, None, seed, 1, first, True, True)
    rows.append(inspect(plan_consistency_step(*arguments)[0][0], "sm_90"))
print(json.dumps(rows))
"""


def test_a_seed_on_the_device_leaves_wide_accesses():
    for row in json.loads(compile_without_interpreter(_ON_DEVICE)):
        assert row["spill_bytes"] == row["stack_bytes"] == 0
        assert row["load_bytes"] == row["store_bytes_min"] == 16  # the narrower loads are the seed's


def test_worse_says_what():
    row = next(row for row in committed("sm_90") if row["op"] == "consistency_step")
    assert common.worse([row], [row]) == []
    assert common.worse([row | {"shape": "new"}], [row]) == []
    spoilt = {"spill_bytes": 8, "load_bytes_min": 4, "blocks_per_sm": 1, "shared_bytes": row["shared_bytes"] + 1}
    found = common.worse([row | spoilt], [row | {"matrix_instructions": {"HGMMA": 4}}])
    assert len(found) == 5
    other = common.worse([row | spoilt | {"triton": "another version"}], [row])
    assert [message.split(": ")[1].split()[0] for message in other] == ["spill_bytes", "load_bytes_min"]
    assert any(message.endswith("spill_bytes 0 → 8") for message in found)
    assert any(message.endswith("no HGMMA any more") for message in found)


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "warps", "blocks"),
    [
        ("sm_90", 32, 0, 4, 16),  # 64 warps
        ("sm_90", 255, 0, 4, 2),  # 65,536 registers
        ("sm_80", 32, 40 * 1024, 4, 4),  # 164 KB of shared memory, 1 KB of each block reserved
        ("sm_120", 32, 101 * 1024, 4, 0),
        ("sm_120", 16, 0, 1, 24),
        ("gfx942", 128, 0, 4, 4),  # 512 registers a lane of a SIMD
        ("gfx942", 16, 33 * 1024, 4, 1),
    ],
)
def test_blocks_per_sm(arch, registers, shared, warps, blocks):
    assert common.blocks_per_sm(common.ARCHITECTURES[arch], registers, shared, warps) == blocks


SASS = """
        /*0100*/              @!P0 LDG.E.128 R4, desc[UR6][R22.64] ;
        /*0110*/                   LDG.E.U16.CONSTANT R5, desc[UR6][R22.64] ;
        /*0120*/                   LDGSTS.E.BYPASS.128 [R5], desc[UR6][R22.64] ;
        /*0130*/               @P1 STG.E.64 desc[UR6][R22.64], R4 ;
        /*0140*/                   HMMA.16816.F32.BF16 R4, R4, R6, R8 ;
"""


def test_interpreter_compiles_nothing():
    case = next(shapes.cases("sm_90", ["consistency_step"]))
    if type(case.launches[0].kernel).__name__ == "InterpretedFunction":
        with pytest.raises(RuntimeError, match="unset TRITON_INTERPRET"):
            static.inspect(case.launches[0], "sm_90")


def test_sass_widths():
    accesses = [line.split()[1:] for line in SASS.splitlines() if line]
    names = [next(word for word in line if "." in word and "/" not in word).split(".", 1) for line in accesses]
    assert [common.sass_bytes("." + modifiers) for _, modifiers in names[:4]] == [16, 2, 16, 8]


def test_amdgcn():
    found = static._amdgcn(
        "global_load_dwordx4 v[0:3], v0, s[0:1]\nbuffer_load_ushort v0\nbuffer_store_dwordx2 v[0:1], v2\n"
        "v_mfma_f32_32x32x8_bf16_1k a[0:15], v[0:1]\n .private_segment_fixed_size: 16\n .vgpr_count:     37\n"
        " .vgpr_spill_count: 2\n .sgpr_spill_count: 0\n"
    )
    assert found == {
        "registers": 37,
        "spill_bytes": 8,
        "stack_bytes": 16,
        "load_bytes": 16,
        "load_bytes_min": 2,
        "store_bytes": 8,
        "store_bytes_min": 8,
        "matrix_instructions": {"MFMA": 1},
    }


_COMMAND = """
import sys
import typer
from cmfast.cli.kernels import kernels
typer.run(kernels)
"""


def test_command(capsys):
    arguments = ("--arch", "sm_90", "--op", "consistency_step_backward", "--json")
    rows = json.loads(compile_without_interpreter(_COMMAND, *arguments))
    fields = "op kernel backend arch shape dtype registers spill_bytes stack_bytes shared_bytes blocks_per_sm"
    assert set(f"{fields} load_bytes store_bytes matrix_instructions bytes flops floor_us".split()) <= set(rows[0])
    command._print([rows[0] | {"load_bytes_min": 4, "matrix_instructions": {"HGMMA": 8}}])
    table = capsys.readouterr().out
    for text in (rows[0]["kernel"], "H100", "4–16", "8 HGMMA", f"{rows[0]['bytes']:,}"):
        assert text in table


@pytest.mark.parametrize("arguments", [("--arch", "sm_70"), ("--op", "convolution")])
def test_command_names_what_it_knows(arguments):
    arch, op = ([arguments[1]], None) if arguments[0] == "--arch" else (None, [arguments[1]])
    with pytest.raises(typer.BadParameter, match="is not one of"):
        command.kernels(arch, op)
