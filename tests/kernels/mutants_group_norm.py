"""Faults of group norm that its tests must catch: see test_mutants.py."""

_TILES = "kernels/triton/group_norm_tiles.py"
_FORWARD = "kernels/triton/group_norm_forward.py"
_GRADIENTS = "kernels/triton/group_norm_gradients.py"
_GRID = "kernels/triton/group_norm_grid.py"

_SMALL = "test_shapes and triton and float32-channels_last and N3-C10"
_PAIR = "test_pair_is_the_concatenation and triton and 13-float32-contiguous"
_MEAN = "test_large_mean_is_not_lost and large-triton-l"
_CONSTANT = "test_constant_input and large-triton"
_LARGE = "test_large_shapes and triton and float32 and N1-C12 and contiguous"
_GROUPS = "test_large_shapes and triton and float32 and N1-C18 and channels_last"
_GRADIENT = "test_gradients and triton-float32-channels_last and False-N3-C10"
_SPLITS = "test_gradients_of_large_shapes and triton and N1-C12 and contiguous"

_TWO_SLOTS = "PARTS + part) * SPLITS + split\n    tl.store"
_ORIGIN = "offset = runs_to_channels(origin, RUN)[None, :]"
_SLOPE = "u * slope[None, :] + constant[None, :]"
_VECTOR = "return math.gcd(self.sector // 2, *extents, *strides)"

MUTANTS = [
    ("dropped mask", _TILES, "tl.load(x, mask=mask, other=0.0).to", "tl.load(x).to", _GRADIENT),
    ("missing other", _TILES, "mask=mask, other=0.0).to", 'mask=mask, other=float("nan")).to', _GRADIENT),
    ("another tensor's stride", _TILES, "tile_pointers(skip, skip_n,", "tile_pointers(skip, h_n,", _PAIR),
    ("second input from its first channel on", _TILES, "n, c - first_channels, p,", "n, c, p,", _PAIR),
    ("FiLM without its one", _TILES, "film = 1.0 + load_row", "film = load_row", _SMALL),
    ("shift scaled", _TILES, "offset += load_row(shift,", "offset = film * load_row(shift,", _SMALL),
    ("a neighbour's group", _TILES, "first % per_group + tl.arange", "tl.arange", _GROUPS),
    ("slots that nobody wrote", _TILES, "(split % 4 + ahead < 4)", "(split % 4 + ahead < 0)", _LARGE),
    ("one slot for all splits", _TILES, _TWO_SLOTS, _TWO_SLOTS.replace(" + split", ""), _LARGE),
    ("squares about zero", _FORWARD, _ORIGIN, f"origin *= 0.0\n        {_ORIGIN}", _MEAN),
    ("squares of the means forgotten", _FORWARD, "deviation + count * apart * apart", "deviation", _GROUPS),
    ("eps forgotten", _FORWARD, "counts * apart * apart) / size + eps)", "counts * apart * apart) / size)", _CONSTANT),
    ("sigmoid of the wrong sign", _FORWARD, "z / (1.0 + tl.exp(-z))", "z / (1.0 + tl.exp(z))", _SMALL),
    ("a step not taken", _FORWARD, "out += out_step", "out += 0 * out_step", _LARGE),
    ("gradient without the mean's", _GRADIENTS, _SLOPE, "u * slope[None, :]", _GRADIENT),
    ("gradient without the variance's", _GRADIENTS, _SLOPE, "constant[None, :]", _GRADIENT),
    ("sums of the first split only", _GRADIENTS, "at += channels", "at += 0", _SPLITS),
    ("vectors across rows", _GRID, _VECTOR, "return self.sector // 2", _SMALL),
]
