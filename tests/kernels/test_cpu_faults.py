"""Do the tests notice a fault in a CPU kernel? Each of csrc/cpu/faults.h is set in turn, and must fail an assertion."""

import contextlib
import os

import pytest
import torch
from cmfast.kernels import native
from cmfast.kernels.conv_forms import SPLIT

from . import (
    emulation,
    test_apply_group_norm,
    test_attention,
    test_channel_norm,
    test_consistency,
    test_conv,
    test_group_norm,
    test_moments,
    test_timestep_embedding,
)

pytestmark = pytest.mark.skipif(
    bool(emulation.missing()) or "CMFAST_SANITIZE" in os.environ,
    reason=emulation.missing() or "a sanitizer ends the process at a fault",
)


def step_cases():
    for layouts in ("cc", "ll", "lc"):
        form = test_consistency.FORMS["seed-vectors"]
        x, model_output, arguments = test_consistency.make(
            (2, 3, 20, 33), test_consistency.DTYPES["fp32"], form, 0, layouts
        )
        test_consistency.check(x, model_output, arguments, "cpu")


def norm_cases():
    for layout in ("contiguous", "channels_last"):
        x, arguments = test_group_norm.make((2, 12, 67, 9), torch.float32, test_group_norm.PARTS, 0, layout, 7)
        test_group_norm.check(x, 2, arguments, "silu", "cpu")


def attention_cases():
    for shape in ((1, 2, 30, 77, 40), (1, 1, 9, 700, 16)):
        q, k, v, _ = test_attention.make(shape, torch.float32)
        test_attention.check(q, k * torch.linspace(0.1, 5, shape[3])[:, None], v, "cpu")


def step_gradient_cases():
    for name in ("noise-vectors", "clip-range"):
        dtypes, shape = test_consistency.DTYPES["fp32"], (2, 3, 20, 33)
        x, model_output, arguments = test_consistency.make(shape, dtypes, test_consistency.FORMS[name], layouts="lc")
        outputs = test_consistency.OUTPUTS if "noise" in name else ("denoised",)
        grads = test_consistency.make_gradients(shape, dtypes, "c")
        test_consistency.check_gradients(x, model_output, arguments, outputs, grads, "cpu")


def norm_gradient_cases():
    for layout in ("contiguous", "channels_last"):
        x, arguments = test_group_norm.make((2, 12, 67, 9), torch.float32, test_group_norm.PARTS, 0, layout, 7)
        test_group_norm.check_gradients(x, 2, arguments, "cpu")


def attention_gradient_cases():
    for shape in ((1, 2, 30, 77, 40), (1, 1, 110, 230, 24)):
        q, k, v, grad = test_attention.make(shape, torch.float32)
        test_attention.check_gradients(grad, q, k, v, "cpu")


def conv_cases():
    for tile in (1, 2, 4):
        for shape, pair in (((2, 37, 50, 9, 11, 3, 1, 1), 18), ((1, 16, 16, 5, 5, 3, 1, 1), 0)):
            x, weight, bias, arguments = test_conv.make(shape, pair=pair, parts=("affine", "residual"))
            test_conv.check(x, weight, bias, arguments, 1, 1, tile, torch.float32, "cpu")
    x, weight, bias, arguments = test_conv.make((1, 70, 50, 8, 8, 3, 1, 1))
    test_conv.check(x, weight, bias, arguments, 1, 1, 4, torch.float32, "cpu", transformed=False)
    x, weight, bias, arguments = test_conv.make((1, 17, 50, 8, 8, 3, 1, 1), parts=("residual",))
    test_conv.check(x, weight, bias, arguments | {"relu": True}, 1, 1, 4, torch.float32, "cpu")
    gated_cases("3x3")
    for part in ("residual_nearest", "residual_average"):
        test_conv.test_resampled_residual("l", 4, part, torch.float32, "cpu")
    test_conv.test_moments((1, 8, 16, 40, 41), 4, 0.0, "cpu")


def gated_cases(name):
    x, weight, bias, arguments, shape, tile = test_conv.make_gated(name)
    test_conv.check(x, weight, bias, arguments | {"gate": "gelu"}, *shape[-2:], tile, torch.float32, "cpu")


def oblong_cases():
    for name in ("2x5-strides", "3x3-right-and-bottom", "3x3-left-and-top", "audio-4-stride-2"):
        shape = test_conv.SHAPES[name]
        x, weight, bias, arguments = test_conv.make(shape, parts=("affine", "residual"))
        test_conv.check(x, weight, bias, arguments, *shape[-2:], 1, torch.float32, "cpu")


def video_cases():
    for tile, name in ((1, "video-3x3x3-stride-2"), (1, "video-2x3x3-apart"), (4, "video-of-all-strides")):
        shape = test_conv.SHAPES[name]
        x, weight, bias, arguments = test_conv.make(shape, pair=5, parts=("affine", "residual"))
        test_conv.check(x, weight, bias, arguments, *shape[-2:], tile, torch.float32, "cpu")
    test_conv.test_images_that_lie_apart(3, 2, "cpu")
    test_conv.test_moments((2, 9, 50, 5, 7, 9), 4, 0.0, "cpu")
    # Images of a sample are far apart: their moments must be those of all of it.
    x, weight, bias, _ = test_conv.make((2, 4, 20, 3, 6, 6, (1, 3, 3), 1, (0, 1, 1)))
    x = x * torch.tensor([1.0, 30.0, -10.0])[:, None, None] + 5
    prepared = test_conv.prepare_conv(weight, bias, padding=(0, 1, 1), depth=3, height=6, width=6)
    y, moments = test_conv.conv2d(x, prepared, moments=True, backend="cpu")
    torch.testing.assert_close(moments[:, 0], y.mean((2, 3, 4)), rtol=1e-5, atol=1e-5)
    deviation = y.double().var((2, 3, 4), correction=0) * y[0, 0].numel()
    torch.testing.assert_close(moments[:, 1], deviation.float(), rtol=2e-5, atol=1e-5)


def pointwise_cases():
    for shape, pair in (((2, 37, 50, 9, 11, 1, 1, 0), 18), ((3, 8, 16, 5, 1, 1, 1, 0), 0)):
        x, weight, bias, arguments = test_conv.make(shape, pair=pair, parts=("affine", "residual"))
        test_conv.check(x, weight, bias, arguments | {"relu": True}, 1, 0, 1, torch.float32, "cpu")
    gated_cases("1x1")
    test_conv.test_moments_of_single_elements((3, 9, 50, 7, 9), "cpu")
    test_conv.test_moments_of_single_elements((2, 9, 50, 3, 7, 5), "cpu")


def moments_cases():
    test_moments.check_moments(test_moments.guarded(test_moments.draw(2, 67, 20, 9), "l"), "cpu")


def fold_cases():
    test_moments.check_fold(2, 30, (5, 7), 3, "cpu", ("add", "scale", "shift"), 13)


def channel_norm_cases():
    for form in test_channel_norm.FORMS.values():
        for layout in ("c", "l"):
            x, arguments = test_channel_norm.make((3, 67, 20, 33), torch.float32, layout, mean=3.0)
            test_channel_norm.check(x, arguments, "cpu", **form)


def apply_group_norm_cases():
    for layout in ("c", "l"):
        x, moments, rows, arguments = test_apply_group_norm.make((2, 30, 7, 9), torch.float32, layout, 13)
        test_apply_group_norm.check(x, moments, 3, rows, arguments, "cpu")


def timestep_embedding_cases():
    test_timestep_embedding.check(torch.tensor([1.0, 30.0]), test_timestep_embedding.frequencies_of(37), "cpu")


@contextlib.contextmanager
def tiles():
    previous = native.cpu().build_info()["isa"]
    assert native.cpu().set_isa("amx") == ""
    try:
        yield
    finally:
        native.cpu().set_isa(previous)


def tiles_cases():
    """The direct form by tiles, which amx alone has."""
    with tiles():
        for products, form in ((torch.bfloat16, (1, False)), (torch.float32, SPLIT[:2])):
            for name, pair in (("3x3-odd", 5), ("2x5-strides", 0), ("3x3-left-and-top", 0), ("video-2x3x3-apart", 0)):
                shape = test_conv.SHAPES[name]
                x, weight, bias, arguments = test_conv.make(shape, pair=pair, parts=("affine", "residual"))
                test_conv.check(x, weight, bias, arguments, *shape[-2:], form[0], products, "cpu", form[1])
            x, weight, bias, arguments, shape, _ = test_conv.make_gated("3x3")
            relu = {"gate": "gelu", "relu": True}
            test_conv.check(x, weight, bias, arguments | relu, *shape[-2:], 1, products, "cpu", form[1])
            # So deep that the weights are divided.
            x, weight, bias, arguments = test_conv.make((1, 1024, 33, 3, 4, 3, 1, 1))
            test_conv.check(x, weight, bias, arguments, 1, 1, 1, products, "cpu", form[1])
        for part in ("residual_nearest", "residual_average"):
            for dtype in (torch.float32, torch.bfloat16):
                test_conv.check_resampled_residual("l", 1, part, dtype, "cpu", torch.bfloat16)
        test_conv.check_output_moments((2, 9, 50, 3, 7, 9), 1, 0.0, "cpu", torch.bfloat16)


def tiled_attention_cases():
    with tiles():
        for shape in ((1, 2, 30, 77, 40), (1, 1, 9, 700, 16)):
            q, k, v, _ = test_attention.make(shape, torch.bfloat16)
            k = (k * torch.linspace(0.1, 20, shape[3])[:, None]).bfloat16()
            test_attention.check(q, k, v, "cpu")


CASES = {
    "consistency_step": step_cases,
    "group_norm": norm_cases,
    "attention": attention_cases,
    "consistency_step_backward": step_gradient_cases,
    "group_norm_backward": norm_gradient_cases,
    "attention_backward": attention_gradient_cases,
    "conv2d": conv_cases,
    "oblong": oblong_cases,
    "video": video_cases,
    "pointwise": pointwise_cases,
    "moments": moments_cases,
    "fold_group_norm": fold_cases,
    "channel_norm": channel_norm_cases,
    "apply_group_norm": apply_group_norm_cases,
    "timestep_embedding": timestep_embedding_cases,
    "tiles": tiles_cases,
    "tiled_attention": tiled_attention_cases,
}
#: The operators whose cases must notice each fault.
FAULTS = {
    "counter_words_swapped": ("consistency_step",),
    "block_of_normals_repeated": ("consistency_step",),
    "last_tile_short": ("consistency_step",),
    "clip_of_gradient_missed": ("consistency_step_backward",),
    "gradient_of_input_missed": ("consistency_step_backward",),
    "strides_of_x": ("consistency_step",),
    "tail_of_channels_missed": ("group_norm", "moments", "pointwise", "channel_norm", "group_norm_backward"),
    "variance_not_merged": ("group_norm", "fold_group_norm", "apply_group_norm"),
    "second_input_from_zero": ("group_norm", "group_norm_backward", "apply_group_norm"),
    "last_sums_missed": ("group_norm_backward",),
    "gradient_of_mean_missed": ("group_norm_backward",),
    "gradient_of_variance_missed": ("group_norm_backward",),
    "tail_of_keys_attended": ("attention", "tiled_attention"),
    "sum_not_rescaled": ("attention", "tiled_attention"),
    "values_not_rescaled": ("attention", "tiled_attention"),
    "last_queries_missed": ("attention", "tiled_attention"),
    "delta_missed": ("attention_backward",),
    "first_part_only": ("attention_backward",),
    "last_keys_missed": ("attention_backward",),
    "padding_one_row_off": ("conv2d", "tiles"),
    "padding_not_zero": ("conv2d", "oblong", "video", "tiles"),
    "activation_of_padding": ("conv2d", "tiles"),
    "tile_edge_missed": ("conv2d", "tiles"),
    "tail_of_outputs_missed": ("conv2d", "pointwise", "tiles"),
    "tail_of_products_missed": ("conv2d", "pointwise"),
    "residual_of_first_sample": ("conv2d", "pointwise", "tiles"),
    "residual_not_resampled": ("conv2d", "tiles"),
    "moments_not_merged": ("conv2d", "moments", "pointwise", "tiles"),
    "last_rows_missed": ("pointwise",),
    "part_across_samples": ("pointwise",),
    "second_moments_from_zero": ("fold_group_norm", "apply_group_norm"),
    "quadrant_one_off": ("timestep_embedding",),
    "tail_of_kernels_missed": ("conv2d",),
    "first_kernels_missed": ("conv2d",),
    "mean_not_subtracted": ("channel_norm",),
    "tail_of_positions_missed": ("channel_norm",),
    "rows_of_first_sample": ("channel_norm",),
    "relu_before_residual": ("conv2d", "pointwise", "tiles"),
    "strides_swapped": ("oblong", "tiles"),
    "paddings_swapped": ("oblong", "video", "tiles"),
    "depth_stride_missed": ("video",),
    "depth_tap_one_off": ("video", "tiles"),
    "depth_edge_not_zero": ("video",),
    "moments_of_one_image": ("video", "tiles"),
    "images_of_one_sample": ("video", "pointwise", "tiles"),
    "gate_of_first_position": ("conv2d", "pointwise", "tiles"),
    "low_terms_missed": ("tiles",),
    "later_units_missed": ("tiles",),
    "remainders_missed": ("tiles",),
}


@pytest.fixture(scope="module")
def faulty():
    module = emulation.cpu_kernels("twin")
    with native.stand_in(module, "_cpu"):
        yield module
        module.set_fault(-1)


def test_every_fault_has_its_cases(faulty):
    assert set(faulty.FAULTS) == {*FAULTS, "barrier_missed"}  # the last is for the thread sanitizer


@pytest.mark.parametrize("op", CASES)
def test_healthy(op, faulty):
    faulty.set_fault(-1)
    CASES[op]()


@pytest.mark.parametrize(("fault", "op"), [(fault, op) for fault, ops in FAULTS.items() for op in ops])
def test_fault_is_caught(fault, op, faulty):
    faulty.set_fault(faulty.FAULTS.index(fault))
    with pytest.raises(AssertionError):
        CASES[op]()
