// Memory in huge pages, where the system has them: a long read of small ones waits for their addresses.
#pragma once

#include <cstdint>

namespace cmfast {

// Ask for huge pages of memory that is not yet written.
void huge_pages(void* data, int64_t bytes);

// Put copies in huge pages in the place of memory that is only read, such as that of a mapped file, whoever reads it
// meanwhile. Its first and last bytes, which fill no huge page, stay where they are; all of it does where the system has
// no huge pages or no memory left. How many bytes were moved.
int64_t move_to_huge_pages(void* data, int64_t bytes);

}  // namespace cmfast
