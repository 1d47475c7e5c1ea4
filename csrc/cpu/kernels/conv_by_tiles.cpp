// The direct form of conv2d in bfloat16, by a processor's tiles.
//
// A block is some rows of an image, or several whole images. Its input is read once, activated, resampled and padded, into
// planes [channels/32][rows][columns][32] of bfloat16: sixteen neighbouring positions of a row are then the left operand
// of every tap, at an address of its own, and nothing is copied for the taps. Where rows are not whole tiles, positions are
// counted on from row to row, and those that lie in the padding give outputs that are not written. With a stride, rows and
// columns of each remainder have a plane of their own.
//
// For 32 output channels, 32 positions at a time: all of the products, summed in tiles in the order of the packed weights,
// then bias, residual and moments. So an output is the same sum whatever block it is in, and whoever computes it.
//
// Threads have blocks of their own, or share them: the channels of the planes first, then the output channels.
#include "../conv_by_tiles.h"

#include "../faults.h"
#include "../integers.h"
#include "../isa.h"
#include "../matrix.h"
#include "../running_moments.h"
#include "../scratch.h"
#include "../team.h"
#include "../tile_blocks.h"
#include "../tile_planes.h"
#include "../tile_writer.h"

namespace cmfast {
namespace CMFAST_ISA {
namespace {

constexpr int64_t WEIGHTS = 1 << 19;      // bytes of a panel's weights that meet all tiles together
constexpr int64_t FEW = 4, SOON = 1024;   // pairs of tiles, and words

// TERMS: of each operand, 2 where they are split.
template <int TERMS>
struct ConvByTiles : TileBlocks {
  explicit ConvByTiles(const ConvArguments& p) : TileBlocks(p, TERMS) {}

  // ---- the products

  // Where the taps of an image are read, from the first one on, in bytes.
  struct Taps {
    int64_t count;
    const int64_t* at;
  };

  void find_taps(int64_t* at) const {
    for (int64_t y = 0; y < p.shape.height; ++y)
      for (int64_t x = 0; x < p.shape.width; ++x) {
        int64_t of = y % p.stride_y * p.stride_x + x % p.stride_x;
        *at++ = (of * remainder + y / p.stride_y * plane_columns + x / p.stride_x) * (DEEP * 2);
      }
  }

  // What is the same for all panels of a block: of each tile, where it is read, and the places of its positions.
  struct Tiles {
    const uint16_t** from;
    OutputPlace* places;  // [tiles][TILE]
    int64_t count, of_part;
  };

  int64_t most_tiles() const { return together * ceil_divide(rows * plane_columns, TILE); }
  int64_t bytes_of_products() const {
    int64_t pairs = units_together() < units ? ceil_divide(most_tiles(), 2) : 2;
    return pairs * (2 * TILE * PANEL * 4);
  }
  int64_t bytes_of_tiles() const {
    int64_t each = sizeof(uint16_t*) + TILE * sizeof(OutputPlace);
    return bytes_of_products() + ceil_divide(most_tiles() * each, 64) * 64;
  }

  Tiles find_tiles(int64_t block, const uint16_t* planes, void* memory) const {
    Tiles found{(const uint16_t**)memory, (OutputPlace*)((const uint16_t**)memory + most_tiles()), 0, tiles(part(block, 0))};
    for (int64_t i = 0; i < parts(block); ++i) {
      const Part b = part(block, i);
      const int64_t image_out = p.out.image(b.n, b.z);
      const int64_t image_added = p.residual.image(FAULT(residual_of_first_sample) ? 0 : b.n, b.z);
      const int64_t wide = b.columns - (FAULT(tile_edge_missed) && b.columns % TILE ? 1 : 0);
      auto place = [&](int64_t y, int64_t x) -> OutputPlace {
        return {image_out + (b.y + y) * p.out.y + (b.x + x) * p.out.x,
                image_added + of_residual(b.y + y) * p.residual.y + of_residual(b.x + x) * p.residual.x};
      };
      for (int64_t tile = 0; tile < found.of_part; ++tile, ++found.count) {
        int64_t at = position(b, tile), y = at / plane_columns, x = at % plane_columns;
        found.from[found.count] = planes + (i * image + at) * DEEP;
        OutputPlace next = place(y, x);
        for (int64_t m = 0; m < TILE; ++m) {
          const bool is_output = x < wide && y < b.rows;
          found.places[found.count * TILE + m] = {is_output ? next.out : -1, next.added};
          if (++x == plane_columns) x = 0, ++y, next = place(y, x);
          else if (p.residual_resample == RESAMPLE_NONE) next.out += p.out.x, next.added += p.residual.x;
          else next = place(y, x);
        }
      }
    }
    return found;
  }

  int64_t of_residual(int64_t i) const {
    if (p.residual_resample == RESAMPLE_POOL) return 2 * i;
    return p.residual_resample == RESAMPLE_UP && !FAULT(residual_not_resampled) ? i / 2 : i;
  }

  // Add the products of `count` units to those of two tiles, or begin with them.
  template <int M, int V, OutputKind KIND>
  __attribute__((noinline)) void multiply(const uint16_t* upper, const uint16_t* lower, int64_t count, bool begins,
                                          Taps taps, const uint32_t* b, float* to, Ahead ahead, const OutputPlace* places,
                                          TileWriter<KIND>& before) const {
    const Product product{to, PANEL, BLOCK, !begins};
    const char *above = (const char*)upper, *below = (const char*)lower;
    const int64_t low = plane * DEEP * 2, next = TERMS * low;  // bytes from term to term, from unit to unit
    const int64_t size = p.dtype == FLOAT32 ? 4 : 2, step = ceil_divide(2 * TILE, count * taps.count);
    const char *out = (const char*)p.out.data + before.o * size, *added = (const char*)p.residual.data + before.o * size;
    int64_t fetched = places ? 0 : M * TILE;
    begin_tiles<M, V>(product);
    for (int64_t unit = 0; unit < count; ++unit, above += next, below += next)
      for (int64_t tap = 0; tap < taps.count; ++tap, b += TERMS * TILE * TILE * V) {
        for (int64_t i = 0; i < ahead.lines; ++i) __builtin_prefetch(ahead.from + i * 64, 0, 2);
        ahead.from += ahead.lines * 64;
        const char *over = above + taps.at[tap], *under = below + taps.at[tap];
        if (TERMS == 1) add_tiles<M, V>(over, under, b, 4 * TILE * V);
        else add_split_tiles<M, V>(over, under, low, (const char*)b, 4 * TILE * V);
        before.some(step);
        for (int64_t i = 0; i < step && fetched < M * TILE; ++i, ++fetched) {
          const OutputPlace at = places[fetched];
          __builtin_prefetch(out + at.out * size, 1);
          if (size == 4) __builtin_prefetch(out + at.out * size + 64, 1);
          if (!p.residual.data) continue;
          __builtin_prefetch(added + at.added * size);
          if (size == 4) __builtin_prefetch(added + at.added * size + 64);
        }
      }
    finish_tiles<M, V>(product);
    before.some(2 * TILE);
  }

  void multiply_panel(int64_t block, int64_t panel, const Tiles& tiles, Taps taps, float* products) const {
    const bool whole = (panel + 1) * PANEL <= p.shape.out_channels && p.residual_resample == RESAMPLE_NONE;
    if (whole && p.dtype == FLOAT32) multiply_panel<WHOLE_FLOAT32>(block, panel, tiles, taps, products);
    else if (whole && p.dtype == BFLOAT16) multiply_panel<WHOLE_BFLOAT16>(block, panel, tiles, taps, products);
    else multiply_panel<ANY>(block, panel, tiles, taps, products);
  }

  // Units whose weights are multiplied with all tiles of a block before the next ones are: they stay in the second cache.
  int64_t units_together() const {
    const int64_t most = WEIGHTS / (p.shape.area() * TERMS * TERMS * TILE * PANEL * 4);
    return ceil_divide(units, ceil_divide(units, most > 1 ? most : 1));
  }

  // All outputs of a panel of a block; `products` has room for two pairs of tiles, or for all where units are divided.
  template <OutputKind KIND>
  void multiply_panel(int64_t block, int64_t panel, const Tiles& tiles, Taps taps, float* products) const {
    const int64_t o = panel * PANEL, width = at_most(p.shape.columns() - o, PANEL);
    int64_t outputs = at_most(p.shape.out_channels - o, PANEL);
    if (FAULT(tail_of_outputs_missed)) outputs = outputs / LANES * LANES;
    const uint32_t* weights = p.weights + o * p.shape.words();
    const int64_t most = units_together(), pairs = ceil_divide(tiles.count, 2), of_unit = taps.count * TERMS * TILE * width;
    const bool few = pairs < FEW, wide = width > TILE;
    TileWriter<KIND> writer{*this, block, o, outputs, tiles.of_part, nullptr, nullptr, 0, 0, 0, -1, 0, false, {}};
    for (int64_t unit = 0, count; unit < units; unit += count, weights += count * of_unit) {
      count = at_most(units - unit, most);
      // Each product fetches its part of the next weights. Where they are few, memory is waited for: the first one fetches
      // what it reads itself a little later, and the others as much as does not hold them up.
      const int64_t steps = count * taps.count, lines = count * of_unit / TILE;
      const int64_t of_step = few ? 4 : ceil_divide(lines, pairs * steps);
      const char* next = (const char*)(weights + count * of_unit);
      const bool last = unit + count == units;
      for (int64_t t = 0; t < tiles.count; t += 2) {
        const bool itself = few && t == 0, both = t + 1 < tiles.count;
        const Ahead ahead = itself ? Ahead{(const char*)(weights + SOON), TERMS * width} : Ahead{next, of_step};
        if (!itself) next += steps * of_step * 64;
        const int64_t from = unit * TERMS * plane * DEEP;
        const uint16_t *upper = tiles.from[t] + from, *lower = tiles.from[t + both] + from;
        float* to = products + (most < units ? t / 2 : t / 2 % 2) * (2 * TILE * PANEL);
        const OutputPlace* places = last ? tiles.places + t * TILE : nullptr;
        const bool begins = unit == 0 || FAULT(later_units_missed);
        if (both && wide) multiply<2, 2>(upper, lower, count, begins, taps, weights, to, ahead, places, writer);
        else if (both) multiply<2, 1>(upper, lower, count, begins, taps, weights, to, ahead, places, writer);
        else if (wide) multiply<1, 2>(upper, lower, count, begins, taps, weights, to, ahead, places, writer);
        else multiply<1, 1>(upper, lower, count, begins, taps, weights, to, ahead, places, writer);
        if (last) writer.from = to, writer.places = places, writer.tile = t, writer.i = 0, writer.end = (1 + both) * TILE;
      }
    }
    writer.some(2 * TILE);
    writer.finish();
  }

  // ----

  const char* run() {
    const int64_t operand = units * TERMS * plane * DEEP, most = at_a_time(p.threads), area = p.shape.area();
    uint16_t* planes = (uint16_t*)scratch(SCRATCH_INPUT, most * operand * 2);
    int64_t* found = (int64_t*)scratch(SCRATCH_ROWS, area * 8);
    char* found_tiles = (char*)scratch(SCRATCH_PRODUCTS, p.threads * bytes_of_tiles());
    int64_t slots = images * blocks_y * blocks_x * groups_of_part(), of_sample = 2 * p.shape.out_channels;
    partial = p.moments ? (float*)scratch(SCRATCH_STATISTICS, slots * of_sample * 4) : nullptr;
    if (!planes || !found || !found_tiles || (p.moments && !partial)) return "no memory for the operands";
    const TilePlanes<TERMS> reading{*this};
    find_taps(found);
    const Taps taps{area, found};
    auto body = [&](Team team) {
      TileUse use;
      const int64_t groups = at_most(at_a_time(team.size), most), size = team.size / groups;
      const Team mine{(int)(team.rank % size), (int)size};  // who shares a block
      float* products = (float*)(found_tiles + team.rank * bytes_of_tiles());
      void* memory = (char*)products + bytes_of_products();
      uint16_t* to = planes + at_most(team.rank / size, groups - 1) * operand;
      for (int64_t first = 0; first < blocks(); first += groups) {
        int64_t block = first + team.rank / size;
        const bool works = team.rank < groups * size && block < blocks();
        Share channels = share(units, mine), outputs = share(panels, mine);
        if (works) reading.put(block, channels, to);
        if (size > 1) team.barrier();
        if (works) {
          const Tiles tiles = find_tiles(block, to, memory);
          for (int64_t panel = outputs.begin; panel < outputs.end; ++panel) multiply_panel(block, panel, tiles, taps, products);
        }
        if (size > 1) team.barrier();
      }
      if (!partial) return;
      team.barrier();
      Share samples = share(p.samples, team);
      int64_t each = (FAULT(moments_of_one_image) ? 1 : p.out_depth) * blocks_y * blocks_x * groups_of_part();
      for (int64_t n = samples.begin; n < samples.end; ++n)
        merge_moments(partial + n * each * of_sample, each, p.shape.out_channels, 0, p.shape.out_channels,
                      [&](int64_t k) { return elements_of(k); }, p.moments + n * of_sample);
    };
    parallel(p.threads, body);
    return nullptr;
  }
};

}  // namespace

const char* conv_by_tiles(const ConvArguments& p) {
  return p.shape.split() ? ConvByTiles<2>(p).run() : ConvByTiles<1>(p).run();
}

}  // namespace CMFAST_ISA
}  // namespace cmfast
