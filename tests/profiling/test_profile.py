"""`cmfast.profile`: rows that add up, of every kind of network."""

import itertools
import json

import pytest
import torch
from PIL import Image
from torch import nn

import cmfast
from cmfast.engine import work
from cmfast.profiling import profile_sampling

from ..engine.networks import network


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.conv = nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        return torch.tanh(self.conv(self.norm(x)))


class Draws(nn.Module):
    """Not captured as a whole, but in its parts."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.alone = Block(), Block(), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        return self.alone(self.second(self.second(self.first(x)) + torch.rand(1)))


def digits(batch):
    unet = cmfast.load("digits").unet
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 1, 8, 8, generator=generator)
    return unet, (x, torch.full((batch,), 500.0), torch.arange(batch) % 10)


@pytest.fixture(scope="module")
def engine():
    unet, inputs = digits(16)
    return cmfast.profile(cmfast.accelerate(unet), *inputs)


@pytest.mark.usefixtures("_thorough")
@pytest.mark.parametrize("kind", ["engine", "torch", "sampling"])
def test_the_rows_add_up_to_the_evaluation(kind):
    """The best of five: other work on the machine falls on the one or on the other, on short calls seldom on both."""
    unet, inputs = digits(2)
    net = unet if kind == "torch" else cmfast.accelerate(unet)
    model = cmfast.accelerate(cmfast.load("digits"))
    found = []
    for _ in range(5):
        profile = profile_sampling(model, 2, "", steps=2) if kind == "sampling" else cmfast.profile(net, *inputs)
        found.append(sum(row.seconds for row in profile.rows) / profile.seconds)
        if abs(found[-1] - 1) <= 0.05:
            break
    assert min(abs(share - 1) for share in found) <= 0.05, found
    assert profile.seconds <= profile.median_seconds


def test_a_row_is_a_step_of_the_engine(engine):
    steps = engine.trace.runs[0].executable.steps.steps
    rows = [row for row in engine.rows if row.name]
    assert [(row.name, row.layer, row.operator, row.reason) for row in rows] == [
        (step.name, step.layer, step.operator, step.reason) for step in steps
    ]
    assert [row.operations for row in rows] == work.operations_of(steps)
    assert all(row.seconds > 0 for row in rows)
    others = [row.operator for row in engine.rows if not row.name]
    assert others == ["copies of inputs", "copies of outputs", "python"]
    assert {row.module for row in rows} == {""}


def test_least_times_are_those_of_the_ceilings(engine):
    c = engine.ceilings
    assert c.bandwidth > 1e8
    assert c.products.keys() == {"float32"}
    assert c.products["float32"] > 1e8
    for row in engine.rows:
        assert row.floor_seconds == max(row.bytes / c.bandwidth, row.operations / c.products["float32"])
    held = sum(run.executable.bytes + run.target.bytes for run in engine.trace.runs)
    assert c.copied == pytest.approx(max(held, 1 << 20), rel=0.01)


def test_groups_have_the_sums_of_their_rows_and_the_longest_comes_first(engine):
    for groups in (engine.by_operator(), engine.by_layer(), engine.by_layer(1), engine.by_layer(2)):
        assert sum(group.calls for group in groups) == len(engine.rows)
        for field in ("seconds", "operations", "bytes", "floor_seconds"):
            assert sum(getattr(g, field) for g in groups) == pytest.approx(sum(getattr(r, field) for r in engine.rows))
        assert all(a.seconds >= b.seconds for a, b in itertools.pairwise(groups))
    names = {group.name for group in engine.by_layer(1)}
    assert {"input_blocks", "middle_block", "output_blocks", "out", "time_embed"} <= names
    assert {"input_blocks.1", "middle_block.0"} <= {group.name for group in engine.by_layer(2)}


def test_the_report_shows_both_tables(engine):
    text = str(engine)
    assert text.startswith("UNet, 1 thread of ")
    assert "\nstep " in text
    assert "conv 3x3 at 8 x 8, F(4x4), float32" in text
    assert "\nlayer " in text
    assert "\noutput_blocks.1 " in text
    assert "floors: copies of " in text
    assert "\noutput_blocks " in engine.report(1)


def test_layers_beyond_the_first_are_summed_up():
    net = nn.Sequential(*(nn.Linear(2, 2) for _ in range(30))).eval()
    lines = cmfast.profile(net, torch.ones(1, 2)).report(None).splitlines()
    assert any(line.startswith("(8 more)") for line in lines)


def test_json_is_whole(engine):
    found = json.loads(engine.to_json())
    assert found["rows"] == [row._asdict() for row in engine.rows]
    assert found["operations"] == engine.operations == sum(row["operations"] for row in found["rows"])
    assert {"seconds", "median_seconds", "rounds", "bytes", "floor_seconds", "ceilings", "environment"} <= found.keys()
    assert found["not_captured"] == {}


def nested(path):
    """The trace's events, each checked to lie within those that are open when it begins."""
    found = json.loads(path.read_text())["traceEvents"]
    complete = [event for event in found if event["ph"] == "X"]
    open_ = []
    for event in complete:
        while open_ and event["ts"] >= open_[-1]["ts"] + open_[-1]["dur"] - 1e-6:
            open_.pop()
        if open_:
            assert event["ts"] + event["dur"] <= open_[-1]["ts"] + open_[-1]["dur"] + 1e-3
        event["within"] = [other["name"] for other in open_]
        open_.append(event)
    return complete


@pytest.mark.parametrize("accelerated", [True, False])
def test_the_trace_has_operators_within_their_blocks(tmp_path, accelerated):
    unet, inputs = network("film")
    profile = cmfast.profile(cmfast.accelerate(unet) if accelerated else unet, *inputs)
    profile.save_trace(tmp_path / "trace.json")
    events = nested(tmp_path / "trace.json")
    assert events[0]["name"] == "UNet"
    operators = [event for event in events if event["cat"] == "operator"]
    assert len(operators) == len(profile.rows) - 1
    modules = {event["name"] for event in events if event["cat"] == "module"}
    assert {"input_blocks.1", "input_blocks.1.0", "middle_block.1.qkv", "output_blocks.0", "time_embed.2"} <= modules
    assert modules - {"UNet"} <= {
        ".".join(name.split(".")[:i]) for name, _ in unet.named_modules() for i in range(1, 9)
    }
    for event in operators:
        parts = event["args"]["layer"].split(".") if event["args"]["layer"] else []
        assert event["within"] == ["UNet", *(".".join(parts[: i + 1]) for i in range(len(parts)))]


def test_a_network_in_its_parts(tmp_path):
    net = Draws().eval()
    profile = cmfast.profile(cmfast.accelerate(net), torch.randn(1, 8, 4, 4))
    rows = {(row.module, row.layer, row.operator): row for row in profile.rows}
    assert ("second", "second.conv", "conv2d") in rows
    assert ("first", "first", "aten.tanh") in rows
    assert rows[None, "alone", "aten.convolution"].reason == "it is outside the captured modules"
    assert rows[None, "", "aten.rand"].operations == 0
    assert sum(row.operator == "conv2d" for row in profile.rows) == 3
    assert "random numbers" in profile.left[""]
    profile.save_trace(tmp_path / "trace.json")
    conv = next(e for e in nested(tmp_path / "trace.json") if e["name"] == "conv2d")
    assert conv["within"] == ["Draws", "first", "first.conv"]
    assert profile.memory().arena_bytes == sum(
        {id(run.executable): run.executable.bytes for run in profile.trace.runs}.values()
    )


def test_what_is_not_accelerated_is_recorded_as_torch_runs_it():
    net = Draws().eval()
    profile = cmfast.profile(net, torch.randn(2, 8, 4, 4))
    assert [(row.layer, row.operator) for row in profile.rows if row.operations] == [
        ("first.conv", "aten.convolution"),
        *[("second.conv", "aten.convolution")] * 2,
        ("alone", "aten.convolution"),
    ]
    assert [row.operations for row in profile.rows if row.operations] == [2 * 2 * 16 * 8 * 72] * 3 + [
        2 * 2 * 16 * 8 * 4
    ]
    assert all(row.module is None and row.reason == "" for row in profile.rows)
    assert not nn.modules.module._has_any_global_hook()
    with pytest.raises(ValueError, match="it ran nothing: accelerate the network"):
        profile.memory()


def test_a_consistency_model_and_other_arguments():
    model = cmfast.load("digits")
    profile = cmfast.profile(cmfast.accelerate(model), torch.randn(2, 1, 8, 8), sigma=3.0, class_labels=torch.arange(2))
    assert {row.layer.split(".")[0] for row in profile.rows} == {"", "unet"}
    assert ("cmfast.consistency_step", "") in {(row.operator, row.layer) for row in profile.rows}
    assert "unet.output_blocks.1" in {group.name for group in profile.by_layer(3)}


def test_a_pipeline():
    tiny_pipelines = pytest.importorskip("tests.engine.tiny_pipelines")
    pipe = cmfast.accelerate(tiny_pipelines.pipeline(tiny=True))
    with torch.no_grad():
        profile = cmfast.profile(
            pipe, "a cat", num_inference_steps=1, output_type="np", generator=torch.Generator().manual_seed(0)
        )
    assert {"unet", "vae.decoder"} <= {row.module for row in profile.rows}
    assert any(row.layer.startswith("vae.decoder.") for row in profile.rows)


def test_what_is_no_model():
    with pytest.raises(TypeError, match=r"profile: expected a torch network, a ConsistencyModel, or .*, got list"):
        cmfast.profile([1.0], 2)


def test_errors_of_the_call_are_its_own_and_nothing_is_left_behind():
    net = Block().eval()
    for module in (net, cmfast.accelerate(net)):
        with pytest.raises(RuntimeError, match="channels"):
            cmfast.profile(module, torch.ones(1, 3, 4, 4))
    assert not nn.modules.module._has_any_global_hook()
    assert not cmfast.engine.trace.is_on()


def test_the_roofline_is_a_picture(engine, tmp_path):
    engine.plot(tmp_path / "roofline.png")
    assert Image.open(tmp_path / "roofline.png").size == (1170, 845)
    empty = cmfast.profile(nn.Tanh(), torch.ones(3))
    with pytest.raises(ValueError, match=r"a roofline shows products .*: this network has none"):
        empty.plot(tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
