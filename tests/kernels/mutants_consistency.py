"""Faults of the consistency step that its tests must catch: see test_mutants.py."""

_NCHW = "test_forms and triton and seed-vectors-nchw-nhwc"
_NHWC = "test_forms and triton and seed-vectors-nhwc-nchw"
_STRIDES = "test_strides and triton and cropped-noise-vectors"
_DEVICE = "test_indices_on_the_device and triton and high-word-nchw-nhwc"
_OUTSIDE = "test_writes_nothing_else and triton and seed-vectors-cc"
_NOISE = "test_forms and triton and noise-nchw-nhwc"
_CLIP = "test_forms and triton and clip-nchw-nhwc"
_GRADIENTS = "test_gradients and triton and N1-C4-5x7-fp32-cc"

_FAULTS = [
    ("swapped counter words", "c1 = draw\n    c2 = seed_high", "c1 = seed_high\n    c2 = draw", _NCHW),
    ("wrong multiplier", "0xCD9E8D57", "0xCD9E8D51", _NCHW),
    ("nine rounds", "tl.static_range(10)", "tl.static_range(9)", _NCHW),
    ("draw ignored", "_normals(block.to(tl.uint32), draw.to", "_normals(block.to(tl.uint32), tile.to", _NCHW),
    ("first sample ignored", "(n + first_sample)", "(n + 0 * first_sample)", _NCHW),
    ("wrong quadrant", "((quadrant + 1) & 2)", "(quadrant & 2)", _NCHW),
    ("seed's high word one bit off", "_signed_word(value >> 32)", "_signed_word(value >> 31)", _NCHW),
    ("low word of a seed on the device for both", "high = seed >> 32", "high = seed", _DEVICE),
    ("first sample on the device ignored", "tl.load(first_sample)", "tl.load(first_sample) * 0", _DEVICE),
    ("channels in the order of positions", "lane % CHANNELS) * POSITIONS", "lane % CHANNELS) * CHANNELS", _NHWC),
    ("another tensor's stride", "_load(noise, n * noise_n", "_load(noise, n * x_n", _STRIDES),
    ("digits without stride", "(index % size) * stride", "(index % size)", _STRIDES),
    ("dropped mask", "TILE\n        mask = start + lane < size", "TILE\n        mask = lane >= 0", _OUTSIDE),
    ("clip after the noise", "value += beta * z", "value = tl.minimum(value + beta * z, 0.5)", _NOISE),
    ("lower bound ignored", "value = tl.maximum(value, low,", "value = tl.maximum(value, -high - high,", _CLIP),
    ("gradient of the input unscaled", "input_scale * _load(d_input", "_load(d_input", _GRADIENTS),
    ("gradient not clipped", "(value >= low) & (value <= high)", "value == value", _GRADIENTS),
]

MUTANTS = [(name, "kernels/triton/consistency.py", old, new, tests) for name, old, new, tests in _FAULTS]
