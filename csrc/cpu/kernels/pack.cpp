// The weights of a convolution as its products read them: see ConvShape.
#include "../isa.h"
#include "../matrix.h"
#include "../team.h"
#include "../winograd.h"

namespace cmfast {
namespace CMFAST_ISA {
namespace {

// 3 × 3 kernels, of LANES outputs, to their points.
template <int M>
CMFAST_INLINE void transform(const Floats* kernel, Floats* points) {
  constexpr int SIDE = M + 2;
  for (int part = 0; part < LANES; part += HALF_LANES) {
    Doubles g[9], half[SIDE * 3], whole[SIDE];
    CMFAST_UNROLL
    for (int i = 0; i < 9; ++i)
      g[i] = load_wide((const float*)(kernel + i) + part, HALF_LANES);
    CMFAST_UNROLL
    for (int x = 0; x < 3; ++x) Winograd<M>::weight(g + x, 3, half + x, 3);
    CMFAST_UNROLL
    for (int y = 0; y < SIDE; ++y) {
      Winograd<M>::weight(half + 3 * y, 1, whole, 1);
      CMFAST_UNROLL
      for (int x = 0; x < SIDE; ++x)
        store_narrow((float*)(points + y * SIDE + x) + part, whole[x], HALF_LANES);
    }
  }
}

// One input channel's weights of LANES outputs from o on, as they are or their points; 0 beyond the last of either.
struct Reader {
  const PackArguments& p;
  int64_t size = p.shape.depth * p.shape.area();

  CMFAST_INLINE Floats at(int64_t o, int64_t c, int64_t i) const {
    int64_t stride = p.shape.in_channels * size, outputs = p.shape.out_channels - o;
    if (outputs <= 0 || c >= p.shape.in_channels) return zeros();
    return gather(p.weight, FLOAT32, o * stride + c * size + i, stride, (int)(outputs < LANES ? outputs : LANES));
  }

  CMFAST_INLINE void points(int64_t o, int64_t c, int64_t tap, Floats* to) const {
    Floats kernel[9];
    for (int i = 0; i < 9; ++i) kernel[i] = at(o, c, tap * 9 + i);
    if (p.shape.tile == 4) transform<4>(kernel, to);
    else transform<2>(kernel, to);
  }
};

CMFAST_INLINE void put(uint32_t* to, Floats x) { *(WordsThere*)to = bits(x); }
CMFAST_INLINE void put(uint32_t* to, Floats x, Floats y) { *(WordsThere*)to = to_bfloat16(x) | to_bfloat16(y) << 16; }

void pack_panel(const PackArguments& p, int64_t panel) {
  const ConvShape& s = p.shape;
  Reader weights{p};
  int64_t first = panel * s.panel(), left = s.columns() - first, width = left < s.panel() ? left : s.panel();
  int64_t words = s.words(), step = s.pairs ? 2 : 1, taps = s.taps(), channels = s.tap_stride();
  uint32_t* panel_words = p.packed + first * s.stored() * words;
  for (int64_t j = 0; j < width; j += LANES) {
    uint32_t* to = panel_words + j;
    int64_t o = first + j;
    if (s.tile > 1 && !s.transforms()) {
      Floats even[36], odd[36];
      for (int64_t tap = 0; tap < taps; ++tap)
        for (int64_t c = 0; c < channels; c += step, to += width) {
          weights.points(o, c, tap, even);
          if (s.pairs) weights.points(o, c + 1, tap, odd);
          for (int64_t i = 0; i < s.points(); ++i) {
            if (s.pairs) put(to + i * words * width, even[i], odd[i]);
            else put(to + i * words * width, even[i]);
          }
        }
    } else if (s.tile > 1) {
      for (int64_t tap = 0; tap < taps; ++tap)
        for (int64_t c = 0; c < channels; ++c)
          for (int64_t i = 0; i < 9; ++i, to += width) put(to, weights.at(o, c, tap * 9 + i));
    } else if (s.tiled()) {
      const int64_t area = s.area();
      for (int64_t first_tap = 0; first_tap < taps; first_tap += area)
        for (int64_t block = 0; block < channels; block += 2 * TILE)
          for (int64_t tap = first_tap; tap < first_tap + area; ++tap)
            for (int64_t c = block; c < block + 2 * TILE; c += 2, to += width) {
              Floats even = weights.at(o, c, tap), odd = weights.at(o, c + 1, tap);
              put(to, even, odd);
              if (s.split()) put(to + TILE * width, even - high_term(even), odd - high_term(odd));
              if (s.split() && c == block + 2 * TILE - 2) to += TILE * width;
            }
    } else {
      for (int64_t tap = 0; tap < taps; ++tap)
        for (int64_t c = 0; c < channels; c += step, to += width) {
          if (s.pairs) put(to, weights.at(o, c, tap), weights.at(o, c + 1, tap));
          else put(to, weights.at(o, c, tap));
        }
    }
  }
}

}  // namespace

const char* pack(const PackArguments& p) {
  const ConvShape& s = p.shape;
  if (s.tiles != TILES) return "the shape is of another instruction set";
  if (s.in_channels <= 0 || s.out_channels <= 0 || s.depth <= 0 || s.area() <= 0) return "a size is not positive";
  if (s.tile != 1 && ((s.tile != 2 && s.tile != 4) || s.height != 3 || s.width != 3))
    return "Winograd's tiles are 2 or 4 wide, of 3 by 3 kernels";
  if (s.transforms() && s.pairs) return "weights to be transformed are Winograd's, of float32";
  int64_t panels = (s.columns() + s.panel() - 1) / s.panel();
  auto body = [&](Team team) {
    Share mine = share(panels, team);
    for (int64_t i = mine.begin; i < mine.end; ++i) pack_panel(p, i);
  };
  parallel(p.threads, body);
  return nullptr;
}

}  // namespace CMFAST_ISA
}  // namespace cmfast
