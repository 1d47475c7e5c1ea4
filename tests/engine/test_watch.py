"""What a watch sees of a network that changes: dicts in every way they can be, and tensors of every kind."""

import functools

import pytest
import torch
from cmfast.kernels import native
from torch import nn

from cmfast.engine import snapshots
from cmfast.engine.watch import Watch

WAYS = {
    "set": lambda d: d.__setitem__("b", object()),
    "added": lambda d: d.update(c=1),
    "deleted": lambda d: d.__delitem__("a"),
    "popped": lambda d: d.popitem(),
    "cleared": lambda d: d.clear(),
    "merged": lambda d: d.__ior__({"c": 1}),
    "default": lambda d: d.setdefault("c"),
    "in another order": lambda d: d.update(a=d.pop("a")),
    "another key": lambda d: d.update(c=d.pop("b")),
}


WAYS_TO_LOOK = ["extension", "extension, 2 threads", "extension, 3 threads", "extension, by methods", "python"]


@pytest.fixture(params=WAYS_TO_LOOK, autouse=True)
def made_by(request, monkeypatch):
    """What has the snapshots: the extension, or Python where it was not built."""
    if "methods" in request.param:
        by_methods = functools.partial(native.cpu().TensorSnapshot, by_methods=True)
        monkeypatch.setattr(native.cpu(), "TensorSnapshot", by_methods)
    if "threads" in request.param:
        monkeypatch.setattr(torch, "get_num_threads", lambda: int(request.param.split()[1]))
    if request.param == "python":

        def missing():
            raise ImportError("the extension cmfast._cpu was not built")

        monkeypatch.setattr(native, "cpu", missing)
        return snapshots
    return native.cpu()


@pytest.mark.parametrize("change", WAYS.values(), ids=WAYS)
def test_every_way_to_change_a_dict_is_seen(change, made_by):
    dicts = [{}, {"a": object(), "b": object()}, {"a": 1}]
    snapshot = made_by.Snapshot(dicts, [None] * len(dicts))
    assert snapshot.first_difference() == -1
    change(dicts[1])
    assert snapshot.first_difference() == 1
    assert snapshot.first_difference() == 1


def test_what_was_changed_back_is_no_change(made_by):
    a, b = object(), object()
    dicts = [{"a": a, "b": b}, {}]
    snapshot = made_by.Snapshot(dicts, [None] * len(dicts))
    dicts[0]["b"] = a
    dicts[1][0] = 1
    dicts[0]["b"] = b
    del dicts[1][0]
    assert snapshot.first_difference() == -1
    dicts[1][0] = 1
    assert snapshot.first_difference() == 1


def _quantized(x):
    return torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)  # a dtype that DLPack does not have


KINDS = {
    "float32": lambda x: x,
    "large": lambda x: x.repeat(9, 9),
    "float16": torch.Tensor.half,
    "float8": lambda x: x.to(torch.float8_e4m3fn),
    "complex": lambda x: x.to(torch.complex64),
    "boolean": lambda x: x > 0,
    "quantized": pytest.param(
        _quantized, marks=pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
    ),
    "in inference mode": torch.inference_mode()(torch.Tensor.clone),
    "every second": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "of seven bytes": lambda x: x.to(torch.int8).flatten()[:7],
    "of no elements": lambda x: x[:0],
    "of no dimensions": lambda x: x[0, 0],
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_tensors_of_every_kind(kind):
    net = nn.Module()
    net.register_buffer("state", kind(torch.randn(8, 8)))
    watch = Watch(net)
    assert not watch.changed()
    before = net.state
    with torch.inference_mode(before.is_inference()):
        before.data = before.clone() if before.numel() else before.new_empty(0, 4)
    assert net.state is before
    assert watch.changed()


PARTS = {
    "fewer rows": lambda x: x[:4],
    "fewer columns": lambda x: x[:, :4],
    "other strides": lambda x: x.t(),
    "more dimensions": lambda x: x[None, None, None, None, None, None],
    "other memory": torch.clone,
}


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
@pytest.mark.parametrize("numbers", [8, 64])  # whose elements are all read, and not
def test_the_same_memory_seen_otherwise(part, numbers):
    net = nn.Module()
    net.weight = nn.Parameter(torch.zeros(8, numbers)[:8, :8])
    watch = Watch(net)
    assert not watch.changed()
    net.weight.data = part(net.weight.data)
    assert watch.changed()


def test_the_same_memory_in_another_dtype():
    net = nn.Module()
    net.register_buffer("state", torch.zeros(8, 8))
    watch = Watch(net)
    net.state.data = net.state.view(torch.int32)
    assert watch.changed()


def test_tensors_that_are_exchanged():
    a, b = nn.Linear(9, 9), nn.Linear(9, 9)
    watch = Watch(a)
    b.load_state_dict(a.state_dict())
    assert not watch.changed()
    torch.utils.swap_tensors(a.weight, b.weight)
    assert watch.changed()


@pytest.mark.parametrize("which", range(5))
def test_one_of_several_tensors(which):
    net = nn.ParameterList([nn.Parameter(torch.zeros(3)) for _ in range(5)])
    watch = Watch(net)
    assert not watch.changed()
    net[which].detach().numpy()[...] += 1
    assert watch.changed()


@pytest.mark.parametrize("kind", ["float32", "large", "float16", "of seven bytes", "of no dimensions"])
def test_writes_that_torch_does_not_count(kind):
    net = nn.Module()
    net.register_buffer("state", KINDS[kind](torch.randn(8, 8)))
    watch = Watch(net)
    net.state.detach().numpy()[...] += 1
    assert watch.changed()


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_change_of_no_matter_hides_none_that_matters(order):
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1))
    watch = Watch(net)
    net.train()
    net.eval()
    net[order[0]].eval()
    net[order[0]].stride = tuple([1, 1])  # an equal one
    assert not watch.changed()
    net[order[0]].train(False)
    net[order[0]]._compiled_call_impl = print
    net[order[1]].weight = nn.Parameter(torch.zeros(4, net[order[1]].in_channels, 1, 1))
    assert watch.changed()
    assert watch.changed()


@pytest.mark.parametrize("numbers", [1, 2, 63, 64, 65])
def test_each_element_of_a_small_tensor_is_read(numbers):
    """Torch is not asked for writes to one of 256 bytes: equal values are no change there, others anywhere are."""
    module = nn.Module()
    module.w = nn.Parameter(torch.arange(numbers).float(), requires_grad=False)
    for i in range(numbers):
        watch = Watch(module)
        module.w[i] = module.w[i].item()
        assert watch.changed() == (numbers > 64)
        watch = Watch(module)
        module.w[i] += 1
        assert watch.changed()


@pytest.mark.parametrize(("before", "after"), [(1, 1.0), (0, False), (0.0, -0.0), ("1", 1)])
def test_what_is_equal_and_of_another_kind_is_another(before, after):
    """In a list as among the attributes."""
    net = nn.Linear(2, 2)
    net.sizes = [3, before]
    watch = Watch(net)
    assert not watch.changed()
    net.sizes[1] = type(before)(before)
    assert not watch.changed()
    net.sizes[1] = after
    assert watch.changed()
