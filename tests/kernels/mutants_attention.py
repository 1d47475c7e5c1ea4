"""Faults of attention that its tests must catch: see test_mutants.py."""

_FORWARD = "kernels/triton/attention_forward.py"
_GRADIENTS = "kernels/triton/attention_gradients.py"
_TILES = "kernels/triton/attention_tiles.py"
_PLAN = "kernels/triton/attention.py"

_TEXT = "test_shapes and triton and S77-D40-float32-ntc"
_TEXT_GRADIENTS = "test_gradients and triton and S77-D40-float32-ntc"
_TRANSPOSED = "test_shapes and triton and S77-D40-float32-nct"
_TILE_AFTER_TILE = "test_a_later_tile_has_the_highest_score and triton"
_ORDERS = "test_every_tensor_has_its_own_order and triton"
_FAR = "test_scores_far_from_zero and triton"
_SCALES = "test_any_scale and triton and -0.5"

_EVERY_KEY = "(start + s < keys + BLOCK_S)[None, :]"

MUTANTS = [
    ("keys beyond the last", _FORWARD, "(start + s < keys)[None, :]", _EVERY_KEY, _TEXT),
    ("unscaled softmax", _FORWARD, "factor = log2_scale", "factor = 1.0", _TEXT),
    ("sums not rescaled", _FORWARD, "        out *= shrink[:, None]\n", "", _TILE_AFTER_TILE),
    ("weights not rescaled", _FORWARD, "total * shrink + ", "total + ", _TILE_AFTER_TILE),
    ("another tensor's stride", _FORWARD, "v_stride_n, v_stride_h, S_UNIT", "v_stride_n, k_stride_h, S_UNIT", _ORDERS),
    ("log-sum-exp in base 2", _FORWARD, "tl.log(total)", "tl.log2(total)", _TEXT),
    ("maximum before a negative scale", _PLAN, "scale > 0", "True", _SCALES),
    ("rows that are not aligned", _PLAN, "crossed = (0, 1, 3)", "crossed = (0, 1)", _TRANSPOSED),
    ("lanes outside are NaN", _TILES, "[None, :], other=0.0)", '[None, :], other=float("nan"))', _TEXT),
    ("lanes outside are read", _TILES, "    if WHOLE:\n        return", "    if True:\n        return", _TEXT),
    ("delta dropped", _GRADIENTS, "p * (dp - delta[:, None])", "p * dp", _TEXT_GRADIENTS),
    ("delta of dk dropped", _GRADIENTS, "p * (dp - delta[None, :])", "p * dp", _TEXT_GRADIENTS),
    ("unscaled gradient", _GRADIENTS, "dk * scale", "dk", _TEXT_GRADIENTS),
    ("gradient of keys beyond the last", _GRADIENTS, "(start + s < keys)[None, :]", _EVERY_KEY, _FAR),
]
