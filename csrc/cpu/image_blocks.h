// Images, divided into blocks of some rows and columns of one, or of several whole ones.
#pragma once

#include "integers.h"

namespace cmfast {
namespace CMFAST_ISA {

// Rows and columns are of outputs, or of tiles of them.
struct ImageBlocks {
  int64_t images, per_sample;       // of all samples, of one
  int64_t image_rows, image_columns;
  int64_t rows, columns, together;  // of a block, and whole images (1 where rows divide one)
  int64_t blocks_y, blocks_x;       // blocks of an image

  // After rows or columns have changed.
  void divide() {
    blocks_y = ceil_divide(image_rows, rows);
    blocks_x = ceil_divide(image_columns, columns);
  }

  int64_t blocks() const { return blocks_y * blocks_x * ceil_divide(images, together); }

  // Where that lies which a block has of one image, or some of it.
  struct Part {
    int64_t n, z, y, x, rows, columns;  // sample and image, first row and column and their count
  };

  int64_t parts(int64_t block) const { return at_most(images - block / (blocks_x * blocks_y) * together, together); }

  Part part(int64_t block, int64_t i) const {
    int64_t x = block % blocks_x * columns, y = block / blocks_x % blocks_y * rows;
    int64_t image = block / (blocks_x * blocks_y) * together + i;
    return {image / per_sample, image % per_sample, y, x, at_most(image_rows - y, rows),
            at_most(image_columns - x, columns)};
  }
};

}  // namespace CMFAST_ISA
}  // namespace cmfast
