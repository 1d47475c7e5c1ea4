// How a convolution by tiles is divided: into blocks of outputs, their tiles, and what moments are taken of together.
#pragma once

#include "conv.h"
#include "faults.h"
#include "image_blocks.h"
#include "matrix.h"

namespace cmfast {
namespace CMFAST_ISA {

struct TileBlocks : ImageBlocks {
  static constexpr int64_t DEEP = 2 * TILE;      // channels of a position in a plane
  static constexpr int64_t WIDEST = 128;         // columns of a block that has several rows
  static constexpr int64_t PLANES = 1 << 19;     // bytes of a block's planes: they stay in the second cache
  static constexpr int64_t POSITIONS = 512;      // of a block of one row, or of several images
  static constexpr int64_t APART = 5;            // positions more than needed, so that planes do not meet in the cache
  static constexpr int64_t GROUP = 16;           // tiles whose moments are taken together
  static constexpr int PANEL = Sizes<true>::PANEL;

  const ConvArguments& p;
  int64_t terms;                                 // of each operand: 2 where they are split
  int64_t plane_rows, plane_columns;             // of one remainder
  int64_t remainder, image, plane;               // positions from one to the next; each term has planes of its own
  int64_t units, panels;                         // of 32 channels and of the depth, of 32 outputs
  float* partial = nullptr;

  TileBlocks(const ConvArguments& p, int terms) : p(p), terms(terms) {
    const int64_t bytes = terms * DEEP * 2;  // of a position of a unit
    images = p.samples * p.out_depth;
    per_sample = p.out_depth;
    image_rows = p.out_height;
    image_columns = p.out_width;
    units = p.shape.depth * (p.shape.tap_stride() / DEEP);
    panels = ceil_divide(p.shape.out_channels, PANEL);
    // Nothing here depends on the number of samples or threads: neither do the parts whose moments are merged.
    columns = p.out_width;
    const int64_t widest = p.out_height == 1 ? POSITIONS : WIDEST;
    if (columns > widest) columns = ceil_divide(ceil_divide(columns, ceil_divide(columns, widest)), TILE) * TILE;
    rows = p.out_height;
    for (measure(); rows > 1 && units * image * bytes > terms * PLANES; measure()) rows = ceil_divide(rows, 2);
    divide();
    together = 1;
    if (blocks_y * blocks_x == 1)
      while (together < images && 2 * together * rows * columns <= POSITIONS &&
             2 * together * units * image * bytes <= terms * PLANES)
        together *= 2;
    together = at_most(together, images);
    plane = together * image + TILE + APART;
  }

  void measure() {
    plane_rows = rows + (p.shape.height - 1) / p.stride_y;
    plane_columns = columns + (p.shape.width - 1) / p.stride_x;
    remainder = plane_rows * plane_columns;
    image = p.stride_y * p.stride_x * remainder;
  }

  // How many blocks are worked on at a time, each by threads / so many.
  int64_t at_a_time(int64_t threads) const {
    int64_t best = 1, shortest = INT64_MAX;
    for (int64_t n = 1; n <= threads; ++n) {
      int64_t time = ceil_divide(blocks(), n) * ceil_divide(panels, threads / n);
      if (threads % n == 0 && time <= shortest) best = n, shortest = time;
    }
    return best;
  }

  // From output to output in the input.
  int64_t step_y() const { return FAULT(strides_swapped) ? p.stride_x : p.stride_y; }
  int64_t step_x() const { return FAULT(strides_swapped) ? p.stride_y : p.stride_x; }

  // Tiles of a part: of each row, or of all positions from its first output to the last.
  static bool whole_rows(const Part& b) { return b.columns % TILE == 0; }
  int64_t tiles(const Part& b) const {
    if (whole_rows(b)) return b.rows * b.columns / TILE;
    return ceil_divide((b.rows - 1) * plane_columns + b.columns, TILE);
  }
  int64_t position(const Part& b, int64_t tile) const {
    if (!whole_rows(b)) return tile * TILE;
    int64_t of_row = b.columns / TILE;
    return tile / of_row * plane_columns + tile % of_row * TILE;
  }

  // Groups of tiles of a part, and where the moments [2][Cout] of one of part i of a block are.
  int64_t groups_of_part() const { return ceil_divide(ceil_divide(rows * plane_columns, TILE), GROUP); }
  float* slot(int64_t block, int64_t i, int64_t group) const {
    Part b = part(block, i);
    int64_t at = b.n * p.out_depth + b.z;
    at = (at * blocks_y + b.y / rows) * blocks_x + b.x / columns;
    return partial + (at * groups_of_part() + group) * 2 * p.shape.out_channels;
  }

  // Outputs of a group of tiles of a part, none beyond the last of them.
  int64_t elements(const Part& b, int64_t group) const {
    auto before = [&](int64_t tile) {
      if (whole_rows(b)) return at_most(tile * TILE, b.rows * b.columns);
      int64_t at = tile * TILE;
      return at_most(at / plane_columns * b.columns + at_most(at % plane_columns, b.columns), b.rows * b.columns);
    };
    return before((group + 1) * GROUP) - before(group * GROUP);
  }

  // Outputs of part k of a sample's moments: all of its images are divided alike.
  int64_t elements_of(int64_t k) const {
    return elements(part(k / groups_of_part() % (blocks_y * blocks_x), 0), k % groups_of_part());
  }
};

}  // namespace CMFAST_ISA
}  // namespace cmfast
