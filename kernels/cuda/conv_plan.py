"""How a convolution is divided among the blocks of csrc/cuda/conv.cu.

It follows from the shape of one sample alone: so its bits do not depend on the batch that it is in.
"""

import dataclasses
import math
from collections.abc import Sequence

#: Blocks that a launch for one sample must have at least: an H100 has 132 multiprocessors.
PROGRAMS = 132

_ROWS, _COLUMNS, _CHANNELS = 8, 32, 32  # as in csrc/cuda/conv.h
#: The widths of a tile that the kernel has.
_WIDTHS = (16, 8)
#: Steps of a segment: what their gain and offset take of shared memory leaves two blocks to a multiprocessor.
_MOST_STEPS = 24
#: Sectors that an H100's L2 cache delivers in the microsecond of one more launch, at 5.5 TB/s.
_SECTORS_OF_A_LAUNCH = 172_000


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a convolution is divided.

    Attributes:
        tile_width: positions of a tile's row; it has 8 rows.
        tiles: tiles of a sample's positions.
        programs: blocks for one sample.
        segment: steps of 32 input channels of a part of the sum.
        segments: parts of the sum.
        sectors: of 32 bytes, that the blocks of one sample ask of memory or write: input, weights and partial sums.
    """

    tile_width: int
    tiles: int
    programs: int
    segment: int
    segments: int
    sectors: int


def plan(height: int, width: int, columns: int, sources: Sequence[int]) -> Plan:
    """The division that moves the fewest sectors, of those with PROGRAMS blocks; where none has, that of most blocks.

    Args:
        height: of the output.
        width: of the output.
        columns: channels of the output.
        sources: channels of the input, or of each of a pair.
    """
    plans = [_plan(height, width, columns, sources, tile_width) for tile_width in _WIDTHS]
    return min(plans, key=lambda p: (-min(p.programs, PROGRAMS), p.sectors))


def _plan(height: int, width: int, columns: int, sources: Sequence[int], tile_width: int) -> Plan:
    channels, steps = sum(sources), sum(math.ceil(c / _CHANNELS) for c in sources)
    tiles = math.ceil(height / _ROWS) * math.ceil(width / tile_width)
    tiles_n = math.ceil(columns / _COLUMNS)
    wanted = min(steps, math.ceil(PROGRAMS / (tiles * tiles_n)))
    segment = min(steps // wanted, _MOST_STEPS)
    segments = math.ceil(steps / segment)
    halo = (_ROWS + 2) * (tile_width + 2)
    sectors = (tiles_n * tiles * halo * channels + tiles * 9 * channels * columns) // 16
    if segments > 1:
        sectors += 2 * segments * height * width * columns // 8 + _SECTORS_OF_A_LAUNCH
    return Plan(tile_width, tiles, tiles * tiles_n * segments, segment, segments, sectors)
