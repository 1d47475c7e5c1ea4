"""Faults of the kernel of layer norms and RMS norms that its tests must catch: see test_mutants.py."""

_FILE = "kernels/triton/channel_norm.py"

_ODD = "test_it_is_its_definition and triton and odd-l"
_PLANES = "test_it_is_its_definition and triton and odd-c"
_MANY = "test_it_is_its_definition and triton and many-channels-l"
_LEAST = "test_small_values and triton"
_TOKENS = "test_views and triton"

_BEGIN = "    begin = tl.program_id(0) % tiles * BLOCK_P\n"
_SQUARE = (
    "factor = tl.rsqrt(tl.maximum(squares / channels, least, propagate_nan=tl.PropagateNan.ALL) + eps)\n        gain"
)
_DIFFERENCE = "            u = subtract(u, mean, mask)\n        squares"
_GAIN = "shift, shift_n, n, start + c, valid)"
_SWAP = "return Operand(x.tensor, (0, c, n))"

MUTANTS = [
    ("the next sample's first position again", _FILE, _BEGIN, "    begin = tl.program_id(0) * BLOCK_P\n", _ODD),
    ("rows of the first sample", _FILE, "(tl.program_id(0) // tiles)", "(tl.program_id(0) // tiles * 0)", _ODD),
    ("no least mean square", _FILE, _SQUARE, "factor = tl.rsqrt(squares / channels + eps)\n        gain", _LEAST),
    ("the mean of the blocks not taken", _FILE, "mean += total / channels", "mean += 0.0 * total", _MANY),
    ("the tail of the channels", _FILE, _DIFFERENCE, "            u = u - mean\n        squares", _ODD),
    ("the gain of the first block", _FILE, _GAIN, "shift, shift_n, n, c, valid)", _PLANES),
    ("positions of tokens apart", _FILE, _SWAP, "return Operand(x.tensor, (0, c, c))", _TOKENS),
]
