#include "mapped_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <system_error>

#include "huge_pages.h"

namespace cmfast {
namespace {

constexpr int64_t MOVED_AT_ONCE = 16 * HUGE_PAGE;  // each move leaves an entry in the system's list of mappings

}  // namespace

MappedFile::MappedFile(const std::string& path, int64_t bytes) : bytes_(bytes), process_(getpid()) {
  int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  void* found = file < 0 ? MAP_FAILED : mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE, file, 0);
  if (found == MAP_FAILED) error_ = errno;
  if (file >= 0) close(file);
  if (error_) return;
  data_ = found;
  try {
    mover_ = std::thread([this] {
      move();
      settled_ = true;
    });
  } catch (const std::system_error&) {  // there may be no more threads: then it stays where it is
    settled_ = true;
  }
}

MappedFile::~MappedFile() {
  unwanted_ = true;
  // In a fork of the process there is no such thread.
  if (mover_.joinable()) process_ == getpid() ? mover_.join() : mover_.detach();
  if (data_) munmap(data_, bytes_);
}

void MappedFile::move() {
#ifdef __linux__
  setpriority(PRIO_PROCESS, 0, 10);  // of this thread: evaluations go first
#endif
  HugePages pages = huge_pages_within(data_, bytes_);
  for (char* at = pages.begin; at < pages.end && !unwanted_; at += MOVED_AT_ONCE) {
    int64_t size = pages.end - at < MOVED_AT_ONCE ? pages.end - at : MOVED_AT_ONCE;
    if (!move(at, size)) return;
    moved_ += size;
  }
}

bool MappedFile::move(char* at, int64_t bytes) {
#if defined(MADV_HUGEPAGE) && defined(MREMAP_FIXED)
  // With one page more, so that whole ones are within it.
  void* fresh = mmap(nullptr, bytes + HUGE_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (fresh == MAP_FAILED) return false;
  char *begin = (char*)fresh, *end = begin + bytes + HUGE_PAGE;
  char* copy = huge_pages_within(fresh, end - begin).begin;
  bool advised = !madvise(copy, bytes, MADV_HUGEPAGE);  // not where the system has no huge pages
  if (advised) std::memcpy(copy, at, bytes);
  // The system does this at once: who reads there finds the file's memory or the copy.
  bool placed = advised && mremap(copy, bytes, bytes, MREMAP_MAYMOVE | MREMAP_FIXED, at) == at;
  if (begin < copy) munmap(begin, copy - begin);
  char* rest = placed ? copy + bytes : copy;
  if (rest < end) munmap(rest, end - rest);
  return placed;
#else
  (void)at, (void)bytes;
  return false;
#endif
}

}  // namespace cmfast
