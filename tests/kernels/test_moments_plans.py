"""What the Triton kernels around moments launch: how many programs, one launch each, and what is left behind."""

import itertools

import pytest
import torch

pytest.importorskip("triton")
from cmfast.kernels.shapes import applied_norm_call, moments_call
from cmfast.kernels.triton.apply_group_norm import plan_apply_group_norm
from cmfast.kernels.triton.group_norm import plan_group_norm
from cmfast.kernels.triton.moments import plan_channel_moments
from cmfast.kernels.triton.moments_tiles import PROGRAMS

from .backends import ON_GPU, gpu_kernels


@pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_an_image_is_enough_for_a_gpu(layout, arch):
    shape = (1, 192, 64, 64)
    for form in ("affine", "affine average"):
        call = applied_norm_call((shape,), layout, torch.bfloat16, form)
        [launch], y = plan_apply_group_norm(*call.arguments, arch=arch)
        assert launch.grid[0] * launch.grid[1] * launch.grid[2] >= (PROGRAMS if form == "affine" else 96)
        assert y.shape[:2] == shape[:2]
    [launch], _ = plan_channel_moments(*moments_call(shape, layout, torch.bfloat16).arguments, arch=arch)
    assert launch.grid[0] * launch.grid[1] * launch.grid[2] >= PROGRAMS


@pytest.mark.parametrize("n", [1, 5])
def test_a_sample_is_divided_as_in_any_batch(n):
    for shape, dtype in itertools.product(((24, 9, 7), (192, 16, 16), (1, 64, 64)), (torch.float32, torch.bfloat16)):
        plans = [plan_channel_moments(torch.empty(m, *shape, dtype=dtype, device="meta"))[0][0] for m in (n, 3)]
        assert plans[0].grid[1:] == plans[1].grid[1:]
        assert plans[0].constants == plans[1].constants


@pytest.mark.skipif(ON_GPU, reason="launches with the interpreter")
def test_a_launch_leaves_its_counters_at_zero():
    x = torch.randn(1, 16, 24, 24).to(memory_format=torch.channels_last)
    with gpu_kernels():
        [launch], moments = plan_channel_moments(x)
        [counters] = [t for t in launch.args if isinstance(t, torch.Tensor) and t.dtype == torch.int32]
        launch.run()
        first = moments.clone()
        assert not counters.any()
        moments.fill_(torch.nan)
        launch.run()
    assert torch.equal(moments, first)


@pytest.mark.parametrize("side", [1024, 2048, 8192])
def test_grids_are_within_what_a_gpu_can_launch(side):
    for layout in ("nchw", "nhwc"):
        for form in ("affine", "affine average"):
            x = torch.empty(1, 128, side, side, dtype=torch.bfloat16, device="meta")
            x = x if layout == "nchw" else torch.empty(1, side, side, 128, device="meta").bfloat16().movedim(-1, 1)
            small = applied_norm_call(((1, 128, 8, 8),), layout, torch.bfloat16, form).arguments
            [launch], _ = plan_apply_group_norm(x, *small[1:], arch="sm_90")
            assert max(launch.grid[1:]) <= 65535


@pytest.mark.parametrize("groups", [1, 70000])
@pytest.mark.parametrize("channels", [70000, 140000, 210000])
@pytest.mark.parametrize("side", [2, 40])
def test_grids_of_very_many_channels(channels, groups, side):
    x = torch.empty(1, channels, side, side, dtype=torch.bfloat16, device="meta")
    options = (None, None, 1e-5, None, None, None, False)
    launches = [
        *plan_group_norm(x, None, groups, *options, arch="sm_90")[0],
        *plan_channel_moments(x, arch="sm_90")[0],
    ]
    assert launches
    for launch in launches:
        assert max(launch.grid[1:]) <= 65535, launch.kernel.__name__
