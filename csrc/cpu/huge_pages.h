// Memory in huge pages, where the system has them: a long read of small ones waits for their addresses.
#pragma once

#include <cstdint>

namespace cmfast {

constexpr int64_t HUGE_PAGE = 2 << 20;

// Begin and end of the huge pages that are whole within memory; the end is not behind the begin where there are none.
struct HugePages {
  char *begin, *end;
};
inline HugePages huge_pages_within(void* data, int64_t bytes) {
  auto first = (uintptr_t)data, last = first + bytes;
  return {(char*)((first + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE), (char*)(last / HUGE_PAGE * HUGE_PAGE)};
}

// Ask for huge pages of memory that is not yet written.
void huge_pages(void* data, int64_t bytes);

}  // namespace cmfast
