"""How the group norm kernels divide x among programs."""

import dataclasses
import math

import triton
from torch import Tensor

from ..layout import concatenated_shape
from ..tiles import Operand, adjacent_rows, make_operand, make_output

# Programs that a launch should have at least: two for each of an H100's 132 multiprocessors. A constant, so that
# results do not depend on the GPU's size.
PROGRAMS = 264
# A program of the two-kernel path with more elements of x than this would share the work unevenly ...
MOST_ELEMENTS = 16384
# ... and with fewer it would move more slots than data.
LEAST_ELEMENTS = 2048
# Programs that the second and the third dimension of a grid may have.
MOST = 65535
# Elements (with the padding to powers of two) that one program may hold in registers: 64 a thread with 8 warps.
RESIDENT_ELEMENTS = 16384


@dataclasses.dataclass(frozen=True)
class Problem:
    """What a call comes down to: x (one operand or a pair) as [N, C, P], and where its result goes."""

    x: tuple[Operand, ...]
    out: Operand
    num_groups: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """N, C, P."""
        n, c, *spatial = self.out.tensor.shape
        return n, c, math.prod(spatial)

    @property
    def per_group(self) -> int:
        """Channels of a group."""
        return self.out.tensor.shape[1] // self.num_groups

    @property
    def sector(self) -> int:
        """Elements in 32 bytes, the least that memory moves."""
        return 32 // self.out.tensor.element_size()

    @property
    def channels_last(self) -> bool:
        """Whether the channels are innermost in memory."""
        _, c, p = self.shape
        return p == 1 or (c > 1 and self.out.strides[1] < self.out.strides[2])

    def seam(self, width: int) -> bool:
        """Whether a tile of `width` channels, counted from the first, may have channels of both tensors of a pair."""
        return len(self.x) == 2 and self.x[0].tensor.shape[1] % width != 0

    def vector(self, *others: Operand, width: int = 0) -> int:
        """The largest vector, up to 16 bytes, of which every row of every operand and every extent is a multiple."""
        _, _, p = self.shape
        extents = [x.tensor.shape[1] for x in self.x] + [width] if self.channels_last else [p]
        strides = []
        for x in (*self.x, self.out, *others):
            strides += [x.strides[0], x.strides[2 if self.channels_last else 1]]
        return math.gcd(self.sector // 2, *extents, *strides)


@dataclasses.dataclass(frozen=True)
class Grid:
    """How two kernels divide [N, C, P]: BLOCK_C channels and `rows` positions a program, BLOCK_P of them at a time."""

    block_p: int
    block_c: int
    unroll: int
    rows: int
    programs: tuple[int, int, int]
    groups: int
    parts: int
    run: int
    whole: bool
    num_warps: int

    @property
    def splits(self) -> int:
        """Programs that share the positions of a sample and tile of channels."""
        return self.programs[2]

    @property
    def slots(self) -> int:
        """Slots of a part, at least the four that are read at a time."""
        return max(4, triton.next_power_of_2(self.splits))

    def constants(self) -> dict[str, int]:
        """The constants that the kernels of both directions take."""
        return dict(
            BLOCK_P=self.block_p,
            BLOCK_C=self.block_c,
            UNROLL=self.unroll,
            GROUPS=self.groups,
            PARTS=self.parts,
            SPLITS=self.slots,
            RUN=self.run,
            WHOLE=self.whole,
        )


def make_problem(h: Tensor, skip: Tensor | None, num_groups: int) -> Problem:
    """View the inputs as [N, C, P], and make the output."""
    out = make_output(h, concatenated_shape(h, skip))
    x = [make_operand(x, out.tensor) for x in (h, skip) if x is not None]
    return Problem(tuple(x), out, num_groups)


def resident_channels(problem: Problem) -> int:
    """The channels of a program of the single-kernel variant, whole groups; 0 where the two kernels serve.

    Channels innermost: as few as make whole sectors, so that no two programs read the same one. Positions innermost:
    one group, which is one piece of memory. The variant serves where this is at most RESIDENT_ELEMENTS. Of smaller
    ones a program takes as many as keep a warp busy.
    """
    _, c, p = problem.shape
    unit = min(c, math.lcm(problem.per_group, problem.sector)) if problem.channels_last else problem.per_group
    if triton.next_power_of_2(p) * triton.next_power_of_2(unit) > RESIDENT_ELEMENTS:
        return 0
    width = min(c, unit * max(1, 1024 // (p * unit)))
    return width if triton.cdiv(c, width) <= MOST else 0


def divide(problem: Problem, lanes: int) -> Grid:
    """Divide [N, C, P] among at least PROGRAMS programs, as far as its size allows.

    Narrower tiles of channels make up for fewer splits than that takes, down to one sector of each position. `lanes`
    are the threads of a warp.
    """
    n, c, p = problem.shape
    per_group = problem.per_group
    if problem.channels_last:
        block_c = 4 * problem.sector
        while block_c > problem.sector and n * triton.cdiv(c, block_c) * _most_splits(p, per_group, block_c) < PROGRAMS:
            if p * block_c <= LEAST_ELEMENTS:
                break
            block_c //= 2
    else:
        block_c = max(1, min(64, 1024 // triton.next_power_of_2(p)), triton.next_power_of_2(triton.cdiv(c, MOST)))
    block_c = min(block_c, triton.next_power_of_2(c))
    blocks = triton.cdiv(c, block_c)
    most = _most_splits(p, per_group, block_c)
    splits = min(most, max(triton.cdiv(PROGRAMS, n * blocks), triton.cdiv(p * block_c, MOST_ELEMENTS)))
    # Several channels of few positions keep more registers than elements: the programs are small anyway.
    per_thread = 96 if problem.channels_last or block_c == 1 else 16
    num_warps = warps_for(triton.cdiv(p, splits) * block_c, per_thread, lanes)
    block_p = num_warps * (lanes // 2) * problem.sector // block_c  # 16 bytes a thread
    if not problem.channels_last and block_c > 1:
        block_p = p  # several channels at a time only where one has too few positions
    block_p = triton.next_power_of_2(max(1, min(block_p, p)))
    tiles = max(1, p // (splits * block_p))
    if triton.cdiv(p, tiles * block_p) > most:
        tiles = triton.cdiv(p, splits * block_p)
    # Tiles in flight at a time; tiles that divide x need no masks.
    unroll = max(u for u in range(1, 7) if tiles % u == 0 and (p % block_p or p % (u * block_p) == 0))
    # Within a tile a group begins at a multiple of `run`: hence the most groups in a tile, the most tiles in a group.
    run = math.gcd(per_group, block_c)
    return Grid(
        block_p=block_p,
        block_c=block_c,
        unroll=unroll,
        rows=tiles * block_p,
        programs=(n, blocks, triton.cdiv(p, tiles * block_p)),
        groups=triton.next_power_of_2(triton.cdiv(per_group - run + block_c, per_group)),
        parts=triton.next_power_of_2(triton.cdiv(block_c - run + per_group, block_c)),
        run=run,
        whole=p % (unroll * block_p) == 0 and c % block_c == 0,
        num_warps=num_warps,
    )


def _most_splits(p: int, per_group: int, block_c: int) -> int:
    """The splits up to which slots cost little beside x, which also bounds what a program keeps of them.

    A program of the second kernel reads those of its groups for all splits: all of them read splits² times the groups
    of a tile, or the tiles of a group. The constant keeps that to a few hundredths of x.
    """
    slots_per_split = max(per_group / block_c, block_c / per_group)
    return max(1, min(math.isqrt(int(p * block_c / (48 * slots_per_split))), p * block_c // LEAST_ELEMENTS))


def warps_for(elements: int, per_thread: int, lanes: int) -> int:
    """Warps of a program, 1 to 8, for about `per_thread` elements a thread."""
    return min(8, max(1, triton.next_power_of_2(triton.cdiv(elements, lanes * per_thread))))


def input_arguments(problem: Problem, vector: int) -> tuple:
    """What every kernel takes first: x and the extents, those of the innermost dimension in vectors."""
    _, c, p = problem.shape
    first = problem.x[0].tensor.shape[1]
    if problem.channels_last:
        c, first = c // vector, first // vector
    else:
        p //= vector
    operands = [argument(x, vector, problem.channels_last) for x in problem.x]
    h, skip = operands if len(operands) == 2 else (operands[0], (None, 0, 0, 0))
    return *h, *skip, first, c, p, problem.num_groups, problem.per_group


def argument(x: Operand, vector: int, channels_last: bool) -> tuple:
    """A tensor and its strides, those of all but the innermost dimension in vectors."""
    n, c, p = x.strides
    return (x.tensor, n // vector, c, p // vector) if channels_last else (x.tensor, n // vector, c // vector, p)


def rows(x: Tensor | None) -> tuple[Tensor | None, int]:
    """A parameter [N, C], its channels adjacent, and the stride of its rows."""
    return (None, 0) if x is None else adjacent_rows(x)


def vectors(*tensors: Tensor | None) -> list[Tensor | None]:
    """Parameters [C], their channels adjacent."""
    return [None if x is None else x.contiguous() for x in tensors]
