import copy
import pickle
import threading
import weakref

import pytest
import torch
from cmfast.kernels import native
from torch import nn
from torch.nn import functional as F

import cmfast
from cmfast import ConsistencyModel, UNet
from cmfast.engine import Accelerator
from cmfast.engine.accelerator import accelerator_of
from cmfast.engine.cpu import tuning, weights
from cmfast.preconditioning import Consistency

from ..fixture_files import NETWORKS
from ..fixture_files import network as fixture
from .networks import IMAGES, KINDS, error, exact, network

ISAS = native.cpu().build_info()["isas"].split(", ")


@pytest.fixture(params=ISAS)
def isa(request):
    """Each instruction set of this machine."""
    previous = native.cpu().build_info()["isa"]
    native.cpu().set_isa(request.param)
    yield request.param
    native.cpu().set_isa(previous)


def torchs_error(unet, inputs, expected):
    """The error of plain bfloat16 in torch."""
    half = copy.deepcopy(unet).bfloat16()
    with torch.no_grad():
        return error(half(inputs[0].bfloat16(), *inputs[1:]), expected)


@pytest.mark.parametrize("name", NETWORKS)
def test_float32_is_accurate(name, isa):
    unet, data = fixture(name)
    inputs = [data["x"], data["timesteps"], *([data["y"]] if "y" in data else [])]
    fast = cmfast.accelerate(unet)
    assert error(fast(*inputs), exact(unet, inputs)) < 1e-5
    assert error(fast(*inputs), data["output"].double()) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_network(kind, isa):
    unet, inputs = network(kind, batch=2)
    assert error(cmfast.accelerate(unet)(*inputs), exact(unet, inputs)) < 1e-5


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "video"])  # torch has no such pooling in bfloat16
def test_bfloat16_is_as_accurate_as_torchs(kind, isa):
    unet, inputs = network(kind)
    expected = exact(unet, inputs)
    found = error(cmfast.accelerate(unet, torch.bfloat16)(*inputs), expected)
    assert 1e-5 < found < 2 * torchs_error(unet, inputs, expected)


def test_the_bundled_model(isa):
    model = cmfast.load("digits")
    generator = torch.Generator().manual_seed(0)
    for sigma in (0.5, 80.0):
        x = sigma * torch.randn(20, 1, 8, 8, generator=generator)
        labels = torch.arange(20) % 10
        inputs = [x / (sigma**2 + 0.25) ** 0.5, torch.full((20,), 250 * torch.tensor(sigma).log().item()), labels]
        expected = exact(model.unet, inputs)
        assert error(cmfast.accelerate(model.unet)(*inputs), expected) < 1e-5
        half = error(cmfast.accelerate(model.unet, torch.bfloat16)(*inputs), expected)
        assert half < 2 * torchs_error(model.unet, inputs, expected)


def test_samples_are_those_of_the_model():
    model = cmfast.load("digits")
    fast = cmfast.accelerate(model)
    assert isinstance(fast, ConsistencyModel)
    assert fast.recommended_levels == model.recommended_levels
    for options in ({"steps": 2, "class_labels": 3}, {"sampler": "heun", "steps": 3}):
        expected = model.sample(4, seed=3, **options)
        torch.testing.assert_close(fast.sample(4, seed=3, **options), expected, rtol=0, atol=1e-4)


def test_the_network_is_left_as_it_was():
    unet, inputs = network("film")
    before = {name: p.clone() for name, p in unet.state_dict().items()}
    fast = cmfast.accelerate(unet, torch.bfloat16)
    fast(*inputs)
    assert all(torch.equal(p, before[name]) for name, p in unet.state_dict().items())
    assert all(a is b for a, b in zip(fast.parameters(), unet.parameters(), strict=True))
    assert type(fast) is type(unet)
    assert list(fast.state_dict()) == list(unet.state_dict())
    assert fast.config is unet.config
    again = cmfast.accelerate(fast)
    assert accelerator_of(again) is not accelerator_of(fast)
    assert accelerator_of(unet) is None
    assert torch.equal(again(*inputs), cmfast.accelerate(unet)(*inputs))


def test_layouts_and_dtypes_of_inputs():
    unet, inputs = network("film")
    fast = cmfast.accelerate(unet)
    expected = fast(*inputs)
    x, t, labels = inputs
    assert torch.equal(fast(x.to(memory_format=torch.channels_last), t, labels), expected)
    assert torch.equal(fast(x.double(), t.double(), labels.int()), expected.double())
    assert fast(x.bfloat16(), t, labels).dtype == torch.bfloat16
    wider = torch.cat((x, x), 3)
    assert error(fast(wider, t, labels), exact(unet, [wider, t, labels])) < 1e-5


def test_outputs_are_the_callers_own():
    unet, inputs = network("film")
    fast = cmfast.accelerate(unet)
    first = fast(*inputs)
    kept = first.clone()
    fast(-inputs[0], *inputs[1:])
    assert torch.equal(first, kept)
    assert not first.requires_grad
    first.requires_grad_()  # not an inference tensor


@pytest.mark.parametrize("first", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_a_network_made_in_one_mode_serves_in_the_others(first):
    unet, inputs = network("film")
    unet.requires_grad_(False)
    fast = Accelerator(unet, torch.float32)
    with first():
        expected = fast(*inputs)
    steps = [step.operator for step in fast.executable(inputs).steps.steps]
    assert steps.count("conv2d") > 30
    assert not any(step.startswith("aten.conv") for step in steps)
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        with mode():
            assert torch.equal(fast(*inputs), expected)


def test_changed_weights_are_packed_anew():
    unet, inputs = network("film")
    fast = cmfast.accelerate(unet)
    old = fast(*inputs)
    other, _ = network("film", seed=5)
    unet.load_state_dict(other.state_dict())
    assert error(fast(*inputs), exact(other, inputs)) < 1e-5
    with torch.no_grad():
        unet.out[2].weight.zero_()
    assert not torch.equal(fast(*inputs), old)
    fast.bfloat16()
    assert error(fast(*inputs), exact(unet.float(), inputs)) < 1e-5


def test_bfloat16_parameters_ask_for_bfloat16_products():
    unet, inputs = network("film")
    fast = cmfast.accelerate(unet.bfloat16())
    assert accelerator_of(fast).products == torch.bfloat16
    assert accelerator_of(cmfast.accelerate(unet, torch.float32)).products == torch.float32
    assert fast(inputs[0].bfloat16(), *inputs[1:]).dtype == torch.bfloat16


def test_several_threads_may_call():
    unet, _ = network("film")
    fast = cmfast.accelerate(unet)
    batches = [network("film", batch, seed=batch)[1] for batch in (1, 1, 2, 3)]
    expected = [fast(*inputs) for inputs in batches]
    wrong = []

    def call(i):
        wrong.extend(i for _ in range(20) if not torch.equal(fast(*batches[i]), expected[i]))

    threads = [threading.Thread(target=call, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_many_shapes_do_not_fill_the_memory():
    unet, _ = network("film")
    fast = cmfast.accelerate(unet)
    for batch in range(1, 14):
        inputs = network("film", batch)[1]
        assert error(fast(*inputs), exact(unet, inputs)) < 1e-5
    assert len(accelerator_of(fast)._made.programs) == 8


@pytest.mark.parametrize("through", [copy.deepcopy, lambda fast: pickle.loads(pickle.dumps(fast))])
def test_copies_work_on_their_own(through):
    unet, inputs = network("film")
    fast = cmfast.accelerate(unet)
    expected = fast(*inputs)
    twin = through(fast)
    assert accelerator_of(twin) is None
    torch.testing.assert_close(twin(*inputs), expected, rtol=1e-4, atol=1e-5)
    unet.out[2].weight.data.zero_()
    torch.testing.assert_close(cmfast.accelerate(twin)(*inputs), expected, rtol=1e-4, atol=1e-5)


def test_an_accelerated_model_is_saved_as_the_model(tmp_path):
    model = ConsistencyModel(network("film")[0], Consistency())
    cmfast.save(cmfast.accelerate(model), tmp_path / "saved")
    loaded = cmfast.load(tmp_path / "saved")
    assert isinstance(loaded.unet, UNet)
    assert torch.equal(loaded.sample(2), model.sample(2))


def test_a_model_samples_without_its_own_weights():
    expected = cmfast.load("digits").sample(3, class_labels=[1, 2, 3])
    fast = cmfast.accelerate(cmfast.load("digits"), keep_weights=False)
    assert fast.device.type == "cpu"
    torch.testing.assert_close(fast.sample(3, class_labels=[1, 2, 3]), expected, rtol=0, atol=1e-4)


def test_training_is_refused():
    unet, inputs = network("film")
    fast = cmfast.accelerate(unet)
    with pytest.raises(RuntimeError, match="serves inference: call eval"):
        fast.train()(*inputs)
    fast.eval()
    with pytest.raises(RuntimeError, match="has no gradients"):
        fast(inputs[0].requires_grad_(), *inputs[1:])
    with torch.no_grad():
        fast(*inputs)


def test_derivatives_and_maps_of_torch_func_are_refused():
    unet, (x, *others) = network("film")
    fast = cmfast.accelerate(unet)
    function = lambda x: fast(x, *others)  # noqa: E731
    for transform in (
        lambda: torch.func.jvp(function, (x,), (x,)),
        lambda: torch.func.grad(lambda x: function(x).sum())(x),
        lambda: torch.func.vmap(function)(x[None]),
    ):
        with pytest.raises(RuntimeError, match=r"cannot be differentiated forward or mapped .*cmfast\.restore"):
            transform()
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="cannot be differentiated forward"):
        function(torch.autograd.forward_ad.make_dual(x, x))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda unet: cmfast.accelerate(unet, torch.float16), "float32 or bfloat16, got torch.float16"),
        (lambda unet: cmfast.accelerate(unet.double()), "float64 networks"),
        (lambda unet: cmfast.accelerate(unet.to("meta")), "on the CPU, got some on meta"),
    ],
)
def test_what_is_not_served_is_said(make, message):
    with pytest.raises(ValueError, match=message):
        make(network("film")[0])


def test_inputs_that_do_not_fit():
    unet, (x, t, labels) = network("film")
    fast = cmfast.accelerate(unet)
    with pytest.raises(ValueError, match="multiples of 2"):
        fast(x[..., :7], t, labels)
    with pytest.raises(ValueError, match="expected class_labels"):
        fast(x, t)
    with pytest.raises(IndexError):
        fast(x, t, labels + 100)
    with pytest.raises(ValueError, match=r"expects inputs on the CPU, got \['meta', 'cpu', 'cpu'\]"):
        fast(x.to("meta"), t, labels)
    assert error(fast(x, t, labels), exact(unet, [x, t, labels])) < 1e-5


def test_without_the_kernels_the_error_says_how_to_build_them(monkeypatch):
    def missing():
        raise ImportError("the extension cmfast._cpu was not built")

    monkeypatch.setattr(native, "cpu", missing)
    with pytest.raises(ImportError, match="was not built"):
        cmfast.accelerate(network("film")[0])


@pytest.fixture
def packs(monkeypatch):
    """The calls of `pack`."""
    calls = []
    original = weights.pack
    monkeypatch.setattr(weights, "pack", lambda *arguments: calls.append(arguments) or original(*arguments))
    return calls


def test_packed_weights_are_kept_in_a_folder(tmp_path, packs):
    unet, inputs = network("film")
    expected = cmfast.accelerate(unet, cache=tmp_path / "cache")(*inputs)
    assert packs
    packs.clear()
    again = cmfast.accelerate(unet, cache=tmp_path / "cache")
    assert torch.equal(again(*inputs), expected)
    assert not packs
    assert len(list((tmp_path / "cache").iterdir())) == 1
    cmfast.accelerate(unet, torch.bfloat16, cache=tmp_path / "cache")
    with torch.no_grad():
        unet.out[2].weight[0, 0, 0, 0] += 1
    assert error(cmfast.accelerate(unet, cache=tmp_path / "cache")(*inputs), exact(unet, inputs)) < 1e-5
    assert len(list((tmp_path / "cache").iterdir())) == 3


@torch.no_grad()
def test_weights_of_which_others_are_made_are_given_up_too():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return F.conv2d(x, self.conv.weight * 3.0, self.conv.bias)

    net, x = Scaled().eval(), torch.randn(1, 3, 6, 6)
    expected = net(x)
    torch.testing.assert_close(cmfast.accelerate(net, keep_weights=False)(x), expected, rtol=1e-5, atol=1e-5)
    assert net.conv.weight.is_meta
    assert not net.conv.bias.is_meta


def test_weights_can_be_given_up(tmp_path):
    kept, inputs = network("film")
    unet, _ = network("film")
    fast = cmfast.accelerate(unet, keep_weights=False)
    given_up = {name for name, p in unet.named_parameters() if p.is_meta}
    assert given_up == {name for name, p in kept.named_parameters() if p.ndim > 1} - {"label_emb.weight"}
    assert error(fast(*inputs), exact(kept, inputs)) < 1e-5
    inputs = network("film", 5)[1]
    assert error(fast(*inputs), exact(kept, inputs)) < 1e-5
    with pytest.raises(ValueError, match="gave up its weights"):
        cmfast.save(ConsistencyModel(fast), tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    with pytest.raises(ValueError, match="got some on meta"):
        cmfast.accelerate(fast)
    assert error(fast(*inputs), exact(kept, inputs)) < 1e-5
    for copied in (copy.deepcopy, pickle.dumps):
        with pytest.raises(RuntimeError, match=r"given up its weights .* cannot be copied or pickled"):
            copied(fast)
    with pytest.raises(ValueError, match=r"restore: the network has given up its weights"):
        cmfast.restore(fast)
    assert error(fast(*inputs), exact(kept, inputs)) < 1e-5
    fast.out[2].bias.data.add_(1)  # what it still has is its own
    with pytest.raises(RuntimeError, match=r"was given up \(keep_weights=False\): accelerate"):
        fast(*inputs)


def test_a_cache_does_not_bring_back_weights_that_were_given_up(tmp_path):
    unet, inputs = network("film")
    fast = cmfast.accelerate(unet, keep_weights=False, cache=tmp_path)
    fast(*inputs)
    fast.note = "a change"
    with pytest.raises(RuntimeError, match=r"was given up \(keep_weights=False\): accelerate it anew"):
        fast(*inputs)


def test_what_is_restored_or_recorded_is_in_evaluation_mode():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Dropout(0.5))
    x = torch.ones(1, 1, 5, 5)
    fast = cmfast.accelerate(net)
    expected = fast(x)
    traced = torch.jit.trace(fast, x, check_trace=False)
    assert net.training
    assert net[1].training
    torch.testing.assert_close(traced(x), expected, rtol=1e-5, atol=1e-5)
    restored = cmfast.restore(fast)
    assert not restored[1].training
    torch.testing.assert_close(restored(x), expected, rtol=1e-5, atol=1e-5)


def test_a_hook_of_an_accelerated_model_is_not_the_plain_ones():
    model, called = cmfast.load("digits"), []
    fast = cmfast.accelerate(model)
    fast.register_forward_hook(lambda *_: called.append(1))
    x, label = torch.zeros(1, 1, 8, 8), torch.tensor([3])
    model(x, 1.0, label)
    assert not called
    fast(x, 1.0, label)
    assert called


def test_float64_is_refused_later_too():
    unet, (x, *others) = network("film")
    fast = cmfast.accelerate(unet)
    fast(x, *others)
    fast.double()
    with pytest.raises(ValueError, match="float64 networks are not accelerated"):
        fast(x.double(), *others)
    fast.float()
    fast(x, *others)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_given_up_are_freed(dtype, tmp_path, monkeypatch):
    unet, inputs = network("film")
    kept = [weakref.ref(p) for p in unet.to(dtype).parameters() if p.ndim > 1 and p.shape[0] != 10]
    there = []
    original = weights.pack
    monkeypatch.setattr(weights, "pack", lambda *a: there.append(sum(p() is not None for p in kept)) or original(*a))
    fast = cmfast.accelerate(unet, keep_weights=False, cache=tmp_path)
    assert there == sorted(there, reverse=True)  # one by one
    assert there[-1] <= 1
    assert not any(p() is not None for p in kept)
    expected = fast(inputs[0], *inputs[1:])
    again, _ = network("film")
    assert torch.equal(cmfast.accelerate(again.to(dtype), keep_weights=False, cache=tmp_path)(*inputs), expected)


def test_weights_are_packed_once_for_all_batches(packs):
    unet, _ = network("film")
    fast = Accelerator(unet, torch.float32)
    fast(*network("film", 1)[1])
    count = len(packs)
    fast(*network("film", 5)[1])
    assert len(packs) == count


def test_a_broken_file_of_packed_weights_is_said(tmp_path):
    unet, _ = network("film")
    cmfast.accelerate(unet, cache=tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"not a whole file of packed weights .*: delete it"):
        cmfast.accelerate(unet, cache=tmp_path)


def test_what_falls_back_is_said():
    layer = torch.nn.Conv2d(4, 8, 3, groups=2).eval()
    (step,) = Accelerator(layer, torch.float32).executable([torch.randn(1, 4, 8, 8)]).steps.steps
    assert step.operator == "aten.convolution"
    assert step.reason == "the CPU kernels have no such operator"


@pytest.mark.parametrize("kind", IMAGES)
def test_only_the_embedding_of_an_image_network_is_left_to_torch(kind):
    unet, inputs = network(kind)
    steps = Accelerator(unet, torch.float32).executable(inputs).steps.steps
    left = {step.operator for step in steps if step.reason}
    resampling = {"aten.avg_pool2d", "aten.upsample_nearest2d"} if kind == "pooled" else set()
    folding = {"aten.reshape"} if kind == "patches" else set()
    assert left <= {"timestep_embedding", "aten.embedding"} | resampling | folding


@pytest.mark.parametrize("products", [torch.float32, torch.bfloat16])
def test_forms_are_measured_once(products, tmp_path, monkeypatch):
    measured = []
    original = tuning._measure
    monkeypatch.setattr(tuning, "_measure", lambda node, form: measured.append(form) or original(node, form))
    unet, inputs = network("film")
    tuned = cmfast.accelerate(unet, products, tune=True, cache=tmp_path)
    assert measured
    limit = 1e-5 if products == torch.float32 else 2 * torchs_error(unet, inputs, exact(unet, inputs))
    assert error(tuned(*inputs), exact(unet, inputs)) < limit
    measured.clear()
    again = cmfast.accelerate(unet, products, tune=True, cache=tmp_path)
    assert not measured
    assert accelerator_of(again).target.weights.forms == accelerator_of(tuned).target.weights.forms
    (tmp_path / "forms.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"not a file of measured forms .*: delete it"):
        cmfast.accelerate(unet, products, tune=True, cache=tmp_path)


def test_the_fastest_form_is_taken(monkeypatch):
    unet, _ = network("film")
    for slow in (2, 4):
        monkeypatch.setattr(tuning, "_measure", lambda node, form, slow=slow: 2.0 if form.tile == slow else 1.0)
        forms = accelerator_of(cmfast.accelerate(unet, tune=True)).target.weights.forms.values()
        assert {form.tile for form in forms} == {1, 6 - slow}
