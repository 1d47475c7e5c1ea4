"""Faults of the convolution's GPU kernels that their tests must catch: see test_mutants.py."""

_PRODUCT = "kernels/triton/conv_product.py"
_INPUT = "kernels/triton/conv_input.py"
_SHARED = "kernels/triton/moments_tiles.py"

_PLAIN = "test_parts and triton and None--float32-l"
_UP = "test_parts and triton and None-nearest-float32-l"
_POOLED = "test_parts and triton and None-affine-average-residual-float32-l and not audio and not video"
_STRIDE = "test_shapes and triton and 3x3-stride-2-chosen-fp32 and not video"
_PAIR = "test_pair_is_the_concatenation and triton and 21-plain-None"
_JOINED = "test_pair_is_the_concatenation and triton and 21-affine-None"
_RESIDUAL = "test_resampled_residual and triton and l-None-residual_average-float32"
_MOMENTS = "test_moments and triton and shape3-None-0"
_BITS = "test_a_sample_has_the_same_bits"
_TICKETS = "test_launches_of_triton_leave_their_tickets_at_zero"

_WITHIN = "return (i >= 0) & (i < size)"
_TAIL = "        if not C_WHOLE:\n"
_SEGMENTS = "for i in range(SEGMENTS):"
_SEAM = "tl.cast(tap * channels + first, tl.int64)"
_HALVED = "            value *= 0.5\n"
_COUNT = "tl.minimum(positions - tile * BLOCK_M, BLOCK_M)"

MUTANTS = [
    ("a tap above the image", _PRODUCT, _WITHIN, "return i < size", _PLAIN),
    ("the tail of the channels", _PRODUCT, _TAIL, "        if not C_WHOLE and False:\n", _PLAIN),
    ("the rows of another stride", _PRODUCT, "y * STRIDE[1] - ", "y * STRIDE[2] * 0 + y - ", _STRIDE),
    ("a sum before the others are there", _SHARED, "== programs - 1", "== programs - 2", _BITS),
    ("segments in another order", _PRODUCT, _SEGMENTS, "for i in range(SEGMENTS - 1, -1, -1):", _BITS),
    ("a segment of its own from the start", _PRODUCT, "tl.maximum(begin - steps, 0)", "0 * begin", _PAIR),
    ("ticket not reset", _SHARED, "        tl.store(counter, 0)\n", "        pass\n", _TICKETS),
    ("the weights of the second as the first's", _PRODUCT, "weight += tl.cast(first, ", "weight += tl.cast(0, ", _PAIR),
    ("taps of one of a pair", _PRODUCT, _SEAM, _SEAM.replace("channels", "size"), _PAIR),
    ("the second's channels from the first's on", _INPUT, "(c - first)[None, :]", "c[None, :]", _JOINED),
    ("taps halved before they are added", _PRODUCT, "(y + tap_y >> UP[1])", "((y >> UP[1]) + (tap_y >> UP[1]))", _UP),
    ("a sum for an average", _INPUT, "0.25 if ROWS", "1.0 if ROWS", _POOLED),
    ("the residual's average of two rows", _PRODUCT, _HALVED, "", _RESIDUAL),
    ("the residual's second column", _PRODUCT, "pointers + stride_y + stride_x", "pointers + stride_y", _RESIDUAL),
    ("the last tile's mean as of a whole one", _PRODUCT, _COUNT, "BLOCK_M + 0 * tile", _MOMENTS),
    ("means of the tiles apart", _SHARED, " + count * apart * apart, 0.0)", ", 0.0)", _MOMENTS),
]
