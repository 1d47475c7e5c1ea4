"""Each operator at a tiny shape, and a clock that what is measured moves."""

import random
import types

import torch
from cmfast.kernels import shapes

from cmfast.benchmarking import ceilings, devices, operators, plain_torch


def calls(ops=None, dtype=torch.float32, batch=1):
    """As cmfast.kernels.shapes.calls, one of each operator."""
    norm = ((batch, 32, 4, 4),)
    found = (
        shapes.norm_call(norm, "nhwc", dtype, "affine film silu"),
        shapes.norm_gradient_call(norm, "nhwc", dtype, "affine silu"),
        shapes.moments_call(norm[0], "nhwc", dtype),
        shapes.fold_call((*norm, (batch, 64, 4, 4)), dtype, "affine film"),
        shapes.applied_norm_call(norm, "nhwc", dtype, "affine silu average"),
        shapes.channel_norm_call((6, 20), "tokens", dtype, "layer affine"),
        shapes.attention_call(batch, 2, 16, 16, 32, dtype, "packed 3hd"),
        shapes.attention_gradient_call(batch, 1, 16, 16, 32, dtype, "packed 3hd"),
        shapes.step_call((batch, 3, 8, 8), "nchw", dtype, True),
        shapes.step_gradient_call((batch, 3, 8, 8), "nchw", dtype),
        shapes.conv_call(batch, 16, 8, 24, 8, 3, dtype, "affine silu residual moments"),
        shapes.conv_call(batch, 16, 0, 24, 6, 1, dtype, "moments"),
        shapes.timesteps_call(batch, 8),
    )
    return [call for call in found if ops is None or call.op in ops]


class Clock:
    """A clock that each call of an operator, and of plain torch, moves by about a millisecond.

    The operators `slow` take 1.2 times as long.
    """

    def __init__(self, monkeypatch, seed, slow=()):
        self.now, self.draw = 0.0, random.Random(seed)
        launched, in_torch = operators.launched, plain_torch.in_torch

        def ours(call, *arguments):
            return self._timed(launched(call, *arguments), 1.2 if call.op in slow else 1.0)

        monkeypatch.setattr(operators, "launched", ours)
        monkeypatch.setattr(plain_torch, "in_torch", lambda *arguments: self._timed(in_torch(*arguments), 1.5))
        monkeypatch.setattr(ceilings, "copy", lambda device, size: self._timed(lambda: None, size / 1e7))
        monkeypatch.setattr(ceilings, "read", lambda device, size: self._timed(lambda: None, size / 2e7))
        monkeypatch.setattr(ceilings, "launch", lambda device: self._timed(lambda: None, 1e-3))
        monkeypatch.setattr(ceilings, "product", lambda device, dtype, n: self._timed(lambda: None, n**3 / 1e6))
        monkeypatch.setattr(devices, "time", types.SimpleNamespace(perf_counter=lambda: self.now))

    def _timed(self, call, milliseconds):
        def timed():
            self.now += 1e-3 * milliseconds * self.draw.lognormvariate(0, 0.02)
            return call()

        return timed
