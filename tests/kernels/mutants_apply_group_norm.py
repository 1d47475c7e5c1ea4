"""Faults of the kernels around moments that their tests must catch: see test_mutants.py."""

_TILES = "kernels/triton/moments_tiles.py"
_MOMENTS = "kernels/triton/moments_kernels.py"
_APPLY = "kernels/triton/apply_group_norm.py"

_SEAM = "test_groups_cross_the_seam and triton and 10-13"
_WHOLE = "test_shapes and triton and whole-float32-l"
_AUDIO = "test_shapes and triton and audio-float32-l"
_VIDEO = "test_shapes and triton and video-float32-l"
_SUMS = "tests/kernels/test_moments.py -k 'test_moments and triton and odd-float32-l'"
_MEAN = "tests/kernels/test_moments.py -k 'test_moments_of_a_large_mean and triton'"
_COUNTER = "tests/kernels/test_moments_plans.py -k leaves_its_counters"

_SECOND = "(c - first_channels)\n"
_ORIGIN = "subtract(tiles[i], origin,"

MUTANTS = [
    ("moments of the second from the first's channel on", _TILES, _SECOND, "c\n", _SEAM),
    ("deviations of the means forgotten", _TILES, " + apart * apart, 1)", ", 1)", _SEAM),
    ("added after the fold only", _TILES, "if add is not None:", "if add is not None and False:", _SEAM),
    ("a tile not stepped over", _APPLY, "i * BLOCK_P * POOL_X", "i * BLOCK_P", _AUDIO),
    ("rows of an odd height", _APPLY, "row = image * in_height", "row = image * height * POOL_Y", _VIDEO),
    ("a sum for an average", _APPLY, "value *= 1.0 / TAPS", "value *= 1.0", _VIDEO),
    ("the first tile again", _APPLY, "activated(tiles[i * TAPS],", "activated(tiles[0],", _WHOLE),
    ("squares about zero", _MOMENTS, _ORIGIN, "subtract(tiles[i], origin * 0.0,", _MEAN),
    ("splits of one size", _TILES, "tl.minimum(positions - split * rows, rows)", "(rows + 0 * split)", _SUMS),
    ("means of the splits apart", _TILES, " + count * apart * apart, 0.0)", ", 0.0)", _SUMS),
    ("counter not reset", _TILES, "        tl.store(counter, 0)\n", "        pass\n", _COUNTER),
]
