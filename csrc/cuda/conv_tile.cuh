// A step of a convolution in shared memory: 32 channels of a tile of positions with its halo, and of the weights of all
// nine taps for 32 channels of the output.
//
// Lines of 32 channels lie 80 bytes apart: the same 16 bytes of eight lines that follow one another then lie in all
// banks, so that ldmatrix reads any tap's lines, which are the same ones shifted, without conflicts, at addresses that
// differ by constants.
#pragma once

#include "conv_output.cuh"

namespace cmfast {

constexpr int CONV_THREADS = 128;
constexpr int CONV_PITCH = 80;                // bytes from a line to the next
constexpr int CONV_QUADS = CONV_CHANNELS / 8;  // vectors of a line
static_assert(CONV_CHANNELS == CONV_COLUMNS);
// Lines that the threads copy at a time, a vector each.
constexpr int CONV_LINES = CONV_THREADS / CONV_QUADS;

__device__ __forceinline__ int conv_vector() { return static_cast<int>(threadIdx.x) % CONV_QUADS; }

// The thread's line of CONV_LINES. Eight threads that access shared memory at a time have lines 0 and 4 of eight, 1 and
// 5, and so on: these lie in all banks.
__device__ __forceinline__ int conv_line() {
  int line = static_cast<int>(threadIdx.x) / CONV_QUADS;
  return (line & ~7) | (line >> 1 & 3) | (line & 1) << 2;
}

template <class T, int WIDTH>
struct ConvTile {
  static constexpr int POSITIONS = CONV_ROWS * WIDTH;
  static constexpr int HALO_WIDTH = WIDTH + 2, HALO = (CONV_ROWS + 2) * HALO_WIDTH;
  static constexpr int VECTORS = (HALO + CONV_LINES - 1) / CONV_LINES;  // of the halo, of each thread
  static constexpr int WEIGHTS = HALO * CONV_PITCH;                     // where they begin, in bytes
  static constexpr int BYTES = WEIGHTS + 9 * CONV_CHANNELS * CONV_PITCH;
  // Warps are side by side where a tile has few positions; each has 32 positions, so that it reads weights for two
  // matrices of them.
  static constexpr int WARPS_M = POSITIONS / 32, WARPS_N = CONV_THREADS / 32 / WARPS_M;
  static constexpr int WARP_COLUMNS = CONV_COLUMNS / WARPS_N;
  static_assert(WARPS_M * WARPS_N * 32 == CONV_THREADS && WARP_COLUMNS % 16 == 0);

  using Sums = float[2][WARP_COLUMNS / 8][4];
};

// Where the thread's vectors of the halo are in a sample of an image.
template <class T, int WIDTH>
struct ConvHalo {
  using Tile = ConvTile<T, WIDTH>;
  int offsets[Tile::VECTORS];
  unsigned inside;  // a bit each: within the image

  // The halo of the tile at (y, x) of an image that is upsampled to [height, width] where `up` is 1.
  __device__ __forceinline__ void locate(const ConvView& image, int y, int x, int height, int width, int up) {
    inside = 0;
#pragma unroll
    for (int i = 0; i < Tile::VECTORS; ++i) {
      int line = conv_line() + i * CONV_LINES;
      int at_y = y - 1 + line / Tile::HALO_WIDTH, at_x = x - 1 + line % Tile::HALO_WIDTH;
      bool within = line < Tile::HALO && at_y >= 0 && at_y < CMFAST_BOUND(1, height) && at_x >= 0 &&
                    at_x < CMFAST_BOUND(2, width);
      offsets[i] = within ? (at_y >> up) * image.stride_y + (at_x >> up) * image.stride_x : 0;
      inside |= static_cast<unsigned>(within) << i;
    }
  }

  // Start to copy the channels of `image` from its first on, `channels` of which are left; zeros for all others.
  __device__ __forceinline__ void copy(unsigned char* stage, const T* image, int channels) const {
    int vector = conv_vector();
    bool there = vector * CONV_VECTOR < CMFAST_BOUND(3, channels);
    unsigned valid = there ? inside : 0;
    unsigned char* to = stage + conv_line() * CONV_PITCH + vector * 16;
    image += there ? vector * CONV_VECTOR : 0;
#pragma unroll
    for (int i = 0; i < Tile::VECTORS; ++i)
      if ((i + 1) * CONV_LINES <= Tile::HALO || conv_line() + i * CONV_LINES < Tile::HALO)
        cp_async_16(to + i * CONV_LINES * CONV_PITCH, image + offsets[i], valid >> i & 1);
  }

  // Normalise and activate the thread's vector i, in place. What lies outside the image stays 0.
  __device__ __forceinline__ void activate(unsigned char* stage, int i, const float (&gain)[CONV_VECTOR],
                                           const float (&offset)[CONV_VECTOR], bool silu) const {
    if (!(inside >> i & 1)) return;
    auto* at = reinterpret_cast<uint4*>(stage + (conv_line() + i * CONV_LINES) * CONV_PITCH + conv_vector() * 16);
    uint4 word = *at;
    uint32_t words[4] = {word.x, word.y, word.z, word.w};
    float values[CONV_VECTOR];
#pragma unroll
    for (int j = 0; j < 4; ++j) unpack<T>(words[j], values[2 * j], values[2 * j + 1]);
#pragma unroll
    for (int j = 0; j < CONV_VECTOR; ++j) values[j] = values[j] * gain[j] + offset[j];
    if (silu) {
#pragma unroll
      for (float& v : values) v *= fast_rcp(1.0f + fast_exp2(-1.4426950408889634f * v));
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) words[j] = pack<T>(values[2 * j], values[2 * j + 1]);
    *at = {words[0], words[1], words[2], words[3]};
  }
};

// Start to copy the weights of a step from `weight` on: rows of `columns`, those of a tap `tap_stride` elements after
// those of the one before. Of a tap `channels` rows are left, and of a row `left` columns; zeros for all others.
template <class T>
__device__ __forceinline__ void copy_weights(unsigned char* weights, const T* weight, int64_t tap_stride, int columns,
                                             int channels, int left) {
  static_assert(CONV_LINES == CONV_CHANNELS);
  int line = conv_line(), vector = conv_vector();
  bool there = line < channels && vector * CONV_VECTOR < left;
  unsigned char* to = weights + line * CONV_PITCH + vector * 16;
  weight += there ? static_cast<int64_t>(line) * columns + vector * CONV_VECTOR : 0;
  tap_stride = there ? tap_stride : 0;
#pragma unroll
  for (int tap = 0; tap < 9; ++tap, weight += tap_stride)
    cp_async_16(to + tap * CONV_CHANNELS * CONV_PITCH, weight, there);
}

// Where the thread's lanes read the operands of a step.
template <class T, int WIDTH>
struct ConvOperands {
  using Tile = ConvTile<T, WIDTH>;
  SharedAddress left, right;

  __device__ __forceinline__ ConvOperands(const unsigned char* stage) {
    int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    int row = warp / Tile::WARPS_N * 32 + lane % 16;
    int line = row / WIDTH * Tile::HALO_WIDTH + row % WIDTH;
    left = shared_address(stage) + line * CONV_PITCH + lane / 16 * 16;
    right = shared_address(stage) + Tile::WEIGHTS + lane % 16 * CONV_PITCH + lane / 16 * 16 +
            warp % Tile::WARPS_N * Tile::WARP_COLUMNS * 2;
  }

  // Add the products of a tap.
  __device__ __forceinline__ void multiply(typename Tile::Sums& sums, int tap) const {
    constexpr int NEXT = 16 / WIDTH * Tile::HALO_WIDTH;  // lines from a matrix of 16 positions to the next
    int shift = (tap / 3 * Tile::HALO_WIDTH + tap % 3) * CONV_PITCH;
#pragma unroll
    for (int k = 0; k < CONV_CHANNELS; k += 16) {
      uint32_t a[2][4];
#pragma unroll
      for (int m = 0; m < 2; ++m) ldmatrix_x4(a[m], left + shift + m * NEXT * CONV_PITCH + k * 2);
#pragma unroll
      for (int n = 0; n < Tile::WARP_COLUMNS; n += 16) {
        uint32_t words[4];
        ldmatrix_x4_trans(words, right + (tap * CONV_CHANNELS + k) * CONV_PITCH + n * 2);
        uint32_t first[2] = {words[0], words[1]}, second[2] = {words[2], words[3]};
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          mma_m16n8k16<T>(sums[m][n / 8], a[m], first);
          mma_m16n8k16<T>(sums[m][n / 8 + 1], a[m], second);
        }
      }
    }
  }
};

// The sums of a tile in shared memory, to be read a vector of columns at a time; the halves of a vector are exchanged in
// odd rows, so that eight threads read them from all banks.
struct ConvSums {
  static constexpr int PITCH = CONV_COLUMNS + 8;  // floats
  float* memory;

  __device__ __forceinline__ float* place(int row, int column) const {
    return memory + row * PITCH + (column ^ (row & 1) * 4);
  }

  template <class T, int WIDTH>
  __device__ __forceinline__ void put(const typename ConvTile<T, WIDTH>::Sums& sums) const {
    using Tile = ConvTile<T, WIDTH>;
    int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    int row = warp / Tile::WARPS_N * 32 + lane / 4, column = warp % Tile::WARPS_N * Tile::WARP_COLUMNS + lane % 4 * 2;
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int n = 0; n < Tile::WARP_COLUMNS / 8; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i)
          *reinterpret_cast<float2*>(place(row + 16 * m + 8 * i, column + 8 * n)) =
              make_float2(sums[m][n][2 * i], sums[m][n][2 * i + 1]);
  }

  template <int V>
  __device__ __forceinline__ void get(int row, int column, float (&values)[V]) const {
#pragma unroll
    for (int i = 0; i < V; i += 4) {
      float4 part = *reinterpret_cast<const float4*>(place(row, column + i));
      values[i] = part.x;
      values[i + 1] = part.y;
      values[i + 2] = part.z;
      values[i + 3] = part.w;
    }
  }
};

}  // namespace cmfast
