#include "huge_pages.h"

#include <sys/mman.h>
#include <sys/resource.h>

#include <cstring>

namespace cmfast {
namespace {

constexpr int64_t PAGE = 2 << 20;
constexpr int64_t MOVED_AT_ONCE = 16 * PAGE;  // each move leaves an entry in the system's list of mappings

struct Pages {
  char *begin, *end;
};

Pages whole_pages(void* data, int64_t bytes) {
  auto first = (uintptr_t)data, last = first + bytes;
  return {(char*)((first + PAGE - 1) / PAGE * PAGE), (char*)(last / PAGE * PAGE)};
}

}  // namespace

void huge_pages(void* data, int64_t bytes) {
#ifdef MADV_HUGEPAGE
  Pages pages = whole_pages(data, bytes);
  if (pages.begin < pages.end) madvise(pages.begin, pages.end - pages.begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

int64_t move_to_huge_pages(void* data, int64_t bytes) {
  int64_t moved = 0;
#if defined(MADV_HUGEPAGE) && defined(MREMAP_FIXED)
  Pages pages = whole_pages(data, bytes);
  setpriority(PRIO_PROCESS, 0, 10);  // of this thread
  for (char* at = pages.begin; at < pages.end; at += MOVED_AT_ONCE) {
    int64_t size = pages.end - at < MOVED_AT_ONCE ? pages.end - at : MOVED_AT_ONCE;
    // With one page more, so that whole ones are within it.
    void* fresh = mmap(nullptr, size + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (fresh == MAP_FAILED) break;
    char *begin = (char*)fresh, *copy = whole_pages(fresh, size + PAGE).begin, *end = begin + size + PAGE;
    bool advised = !madvise(copy, size, MADV_HUGEPAGE);
    if (advised) std::memcpy(copy, at, size);
    // The system does this at once: who reads there finds the file's memory or the copy.
    bool placed = advised && mremap(copy, size, size, MREMAP_MAYMOVE | MREMAP_FIXED, at) == at;
    if (begin < copy) munmap(begin, copy - begin);
    if (!placed) {
      munmap(copy, end - copy);
      break;
    }
    if (copy + size < end) munmap(copy + size, end - copy - size);
    moved += size;
  }
#else
  (void)data, (void)bytes;
#endif
  return moved;
}

}  // namespace cmfast
