#include "scratch.h"

#include <cstdlib>
#include <cstring>

#include "huge_pages.h"

namespace cmfast {
namespace {

constexpr int64_t LINE = 64;

struct Buffer {
  void* data = nullptr;
  int64_t bytes = 0;
  ~Buffer() { std::free(data); }
};

thread_local Buffer buffers[SCRATCH_SLOTS];

}  // namespace

void* scratch(Slot slot, int64_t bytes) {
  Buffer& buffer = buffers[slot];
#ifdef CMFAST_CHECKED
  // As much as is asked for and no more, and not a number, so that what is read beyond it or before it was written shows.
  std::free(buffer.data);
  buffer.bytes = (bytes + LINE - 1) / LINE * LINE;
  buffer.data = std::aligned_alloc(LINE, buffer.bytes);
  if (buffer.data) std::memset(buffer.data, 0xFF, buffer.bytes);
#else
  if (buffer.bytes < bytes) {
    std::free(buffer.data);
    int64_t unit = bytes < HUGE_PAGE / 8 ? 4096 : HUGE_PAGE;
    buffer.bytes = (bytes + unit - 1) / unit * unit;
    buffer.data = std::aligned_alloc(unit, buffer.bytes);
    if (!buffer.data) buffer.bytes = 0;
    if (buffer.data) huge_pages(buffer.data, buffer.bytes);
  }
#endif
  return buffer.data;
}

}  // namespace cmfast
