"""Which values are laid out as the images that the kernels read."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cmfast.engine import capture
from cmfast.engine.layouts import images
from cmfast.engine.passes import PASSES

BEFORE = {
    "nothing": (lambda x: x, True),
    "element by element": (lambda x: x.exp() + 1, True),
    "upsampled": (lambda x: F.interpolate(x, scale_factor=2.0), True),
    "joined": (lambda x: torch.cat((x, x), 1)[:, :8], True),
    "frames of a video": (lambda x: x.unflatten(2, (2, 3)).transpose(1, 2).flatten(0, 1), True),
    "summed along": (lambda x: x.cumsum(3), False),
    "turned": (lambda x: x.flip(2), False),
}


@pytest.mark.parametrize(("before", "expected"), BEFORE.values(), ids=BEFORE)
def test_an_image_is_what_a_convolution_reads_through_what_keeps_its_order(before, expected):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(8, 4, 3)

        def forward(self, x):
            return self.conv(before(x))

    graph = capture(Net(), [torch.randn(2, 8, 6, 6)])
    for rewrite in PASSES.values():
        rewrite(graph)
    (x,) = graph.nodes.find_nodes(op="placeholder")
    assert (x in images(graph)) == expected
