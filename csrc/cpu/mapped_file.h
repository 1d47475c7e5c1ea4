// A file in memory at once, and in huge pages soon.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <cstdint>
#include <string>
#include <thread>

namespace cmfast {

// The first bytes of a file, which the system reads when they are looked at, while a thread reads all of them into huge
// pages, which take the place of the file's. Nobody may write to the memory, nor to the file before it is `moved`.
class MappedFile {
 public:
  // `error()` is the system's number where the file cannot be mapped; a file that is shorter has no bytes at its end.
  MappedFile(const std::string& path, int64_t bytes);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  int error() const { return error_; }
  void* data() const { return data_; }
  int64_t bytes() const { return bytes_; }
  // How many bytes are in huge pages by now; and whether there will be no more.
  int64_t moved() const { return moved_; }
  bool settled() const { return settled_; }

 private:
  void move();
  bool move(char* at, int64_t bytes);

  void* data_ = nullptr;
  int64_t bytes_;
  int error_ = 0;
  pid_t process_;
  std::atomic<int64_t> moved_{0};
  std::atomic<bool> settled_{false}, unwanted_{false};
  std::thread mover_;
};

}  // namespace cmfast
