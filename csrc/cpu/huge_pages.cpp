#include "huge_pages.h"

#include <sys/mman.h>

namespace cmfast {

void huge_pages(void* data, int64_t bytes) {
#ifdef MADV_HUGEPAGE
  HugePages pages = huge_pages_within(data, bytes);
  if (pages.begin < pages.end) madvise(pages.begin, pages.end - pages.begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

}  // namespace cmfast
