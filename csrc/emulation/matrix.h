// The matrix instructions of a warp: mma.sync.m16n8k16 and ldmatrix, with the fragment layouts of the PTX ISA.
#pragma once

#include <cstdint>
#include <cstring>

#include "cuda.h"

namespace cmfast::emulation {

template <class T>
struct Mma {
  float (*d)[4];
  const uint32_t (*a)[4];
  const uint32_t (*b)[2];
};

template <class T>
void multiply(void* const (&lanes)[32], uint32_t) {
  float a[16][16], b[16][8], d[16][8];
  auto pair = [](uint32_t word, float& first, float& second) {
    T values[2];
    std::memcpy(values, &word, 4);
    first = values[0];
    second = values[1];
  };
  for (int lane = 0; lane < 32; ++lane) {
    const auto& own = *static_cast<const Mma<T>*>(lanes[lane]);
    int row = lane / 4, column = lane % 4 * 2;
    for (int i = 0; i < 4; ++i) {
      int r = row + 8 * (i & 1), c = column + 8 * (i >> 1);
      pair((*own.a)[i], a[r][c], a[r][c + 1]);
      d[row + 8 * (i >> 1)][column + (i & 1)] = (*own.d)[i];
    }
    for (int i = 0; i < 2; ++i) pair((*own.b)[i], b[column + 8 * i][row], b[column + 8 * i + 1][row]);
  }
  for (int i = 0; i < 16; ++i)
    for (int k = 0; k < 16; ++k)
      for (int j = 0; j < 8; ++j) d[i][j] += a[i][k] * b[k][j];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& own = *static_cast<const Mma<T>*>(lanes[lane]);
    for (int i = 0; i < 4; ++i) (*own.d)[i] = d[lane / 4 + 8 * (i >> 1)][lane % 4 * 2 + (i & 1)];
  }
}

template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Place place) {
  Mma<T> own{&d, &a, &b};
  collective("mma_m16n8k16", 0xffffffffu, &own, multiply<T>, place);
}

struct LoadMatrix {
  uint32_t* words;
  const void* row;
};

template <bool transposed>
void load_matrices(void* const (&lanes)[32], uint32_t) {
  uint16_t matrix[4][8][8];
  for (int lane = 0; lane < 32; ++lane)
    std::memcpy(matrix[lane / 8][lane % 8], static_cast<const LoadMatrix*>(lanes[lane])->row, 16);
  for (int lane = 0; lane < 32; ++lane) {
    uint32_t* words = static_cast<const LoadMatrix*>(lanes[lane])->words;
    int i = lane / 4, j = lane % 4 * 2;
    for (int m = 0; m < 4; ++m) {
      uint32_t low = transposed ? matrix[m][j][i] : matrix[m][i][j];
      uint32_t high = transposed ? matrix[m][j + 1][i] : matrix[m][i][j + 1];
      words[m] = low | high << 16;
    }
  }
}

template <bool transposed>
void ldmatrix_x4(uint32_t (&words)[4], const void* row, Place place) {
  check_alignment(row, 16, place);
  LoadMatrix own{words, row};
  collective(transposed ? "ldmatrix_x4_trans" : "ldmatrix_x4", 0xffffffffu, &own, load_matrices<transposed>, place);
}

}  // namespace cmfast::emulation
