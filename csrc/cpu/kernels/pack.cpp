// The weights of a convolution as its products read them: see ConvShape.
#include "../isa.h"
#include "../matrix.h"
#include "../team.h"
#include "../winograd.h"

namespace cmfast {
namespace CMFAST_ISA {
namespace {

uint16_t bfloat16(float x) {
  uint32_t w;
  __builtin_memcpy(&w, &x, 4);
  return (uint16_t)(x == x ? (w + 0x7FFF + ((w >> 16) & 1)) >> 16 : w >> 16 | 0x40);
}

// Element k of a row of words, of output j: the first of a pair's halves is written before the second.
void put(uint32_t* row, bool pairs, bool second, int64_t j, float x) {
  if (pairs) {
    uint16_t* to = (uint16_t*)(row + j);
    if (!second) to[1] = 0;
    to[second] = bfloat16(x);
  } else {
    __builtin_memcpy(row + j, &x, 4);
  }
}

// A 3 × 3 kernel to its points.
template <int M>
void transform(const float* g, double* to) {
  constexpr int SIDE = M + 2;
  double kernel[9], half[SIDE * 3];
  for (int i = 0; i < 9; ++i) kernel[i] = g[i];
  for (int x = 0; x < 3; ++x) Winograd<M>::weight(kernel + x, 3, half + x, 3);
  for (int y = 0; y < SIDE; ++y) Winograd<M>::weight(half + 3 * y, 1, to + SIDE * y, 1);
}

void pack_panel(const PackArguments& p, int64_t panel) {
  const ConvShape& s = p.shape;
  int64_t first = panel * PANEL, left = s.width() - first, width = left < PANEL ? left : PANEL;
  int64_t words = s.words(), area = s.kernel * s.kernel;
  uint32_t* to = p.packed + first * s.points() * words;
  bool taps = s.tile == 1 && s.kernel > 1;
  int64_t channels = taps ? s.tap_stride() : s.in_channels;
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t j = 0; j < width; ++j) {
      int64_t o = first + j;
      bool outside = o >= s.out_channels || c >= s.in_channels;
      const float* g = outside ? nullptr : p.weight + (o * s.in_channels + c) * area;
      double points[36] = {};
      if (!outside && s.tile == 4) transform<4>(g, points);
      if (!outside && s.tile == 2) transform<2>(g, points);
      int64_t count = s.tile > 1 ? s.points() : area;
      for (int64_t i = 0; i < count; ++i) {
        int64_t k = s.tile > 1 ? c : i * channels + c, point = s.tile > 1 ? i : 0;
        float x = s.tile > 1 ? (float)points[i] : outside ? 0.0f : g[i];
        put(to + (point * words + (s.pairs ? k / 2 : k)) * width, s.pairs, s.pairs && k % 2, j, x);
      }
    }
}

}  // namespace

const char* pack(const PackArguments& p) {
  if (p.shape.in_channels <= 0 || p.shape.out_channels <= 0 || p.shape.kernel <= 0) return "a size is not positive";
  if (p.shape.tile != 1 && ((p.shape.tile != 2 && p.shape.tile != 4) || p.shape.kernel != 3))
    return "Winograd's tiles are 2 or 4 wide, of 3 by 3 kernels";
  int64_t panels = (p.shape.width() + PANEL - 1) / PANEL;
  auto body = [&](Team team) {
    Share mine = share(panels, team);
    for (int64_t i = mine.begin; i < mine.end; ++i) pack_panel(p, i);
  };
  parallel(p.threads, body);
  return nullptr;
}

}  // namespace CMFAST_ISA
}  // namespace cmfast
