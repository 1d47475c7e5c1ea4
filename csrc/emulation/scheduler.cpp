#include "scheduler.h"

#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <vector>

#include "fiber.h"
#include "sanitizer.h"

namespace cmfast::emulation {

dim3 thread_index, block_index, block_size, grid_size;
unsigned char* shared_memory;

namespace {

#ifdef __SANITIZE_ADDRESS__
constexpr size_t STACK = 512 << 10;  // frames with red zones
#else
constexpr size_t STACK = 128 << 10;
#endif
constexpr size_t PAGE = 4096;
constexpr size_t ENTRY_FRAMES = 16 << 10;  // more than the frames in which a thread ends, which are never left
constexpr uint32_t POISON = 0x7fff7fff;  // a NaN as float32, and two as float16 or bfloat16
constexpr size_t CANARY = 256;           // bytes after a block's shared memory that stay POISON
constexpr size_t SHARED_MOST = 227 << 10;

struct Copy {
  void* shared;
  const void* global;
  unsigned bytes;
  bool valid;
  unsigned group;
  Place place;
};

struct Thread {
  Fiber fiber;
  dim3 index;
  unsigned block, warp, lane;  // the block's rank in its cluster, the warp's index in the cluster
  const char* waits_for = nullptr;
  Place place{};
  std::vector<Copy> copies;
  unsigned group = 0;  // cp.async groups committed
};

struct Warp {
  unsigned first_thread, lanes;
  uint32_t ready = 0, ended = 0, pending = 0;
  uint32_t mask[32];
  void* argument[32];
};

struct Barrier {
  unsigned arrived = 0;
  Place place{};
};

struct Block {
  dim3 index;
  unsigned char* shared = nullptr;
  unsigned ended = 0;
  Barrier barrier;
};

struct Launch {
  Shape shape{};
  void (*kernel)(const void*) = nullptr;
  const void* argument = nullptr;
  unsigned threads_per_block = 0, warps_per_block = 0, remaining = 0;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<Block> blocks;
  std::vector<unsigned> order;  // of warps: the first one with a thread that can run does
  Barrier cluster_barrier;
  Thread* current = nullptr;
  Fiber host;
  std::string error;
};

Launch now;
std::mutex one_launch;
uint64_t seed, state;
std::map<std::string, int> faults;
bool any_fault;
std::vector<unsigned char*> stacks;

uint64_t draw() {  // splitmix64
  uint64_t z = state += 0x9E3779B97F4A7C15ull;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return z ^ (z >> 31);
}

template <class T>
void shuffle(std::vector<T>& items) {
  for (size_t i = items.size(); i > 1; --i) std::swap(items[i - 1], items[draw() % i]);
}

std::string text(dim3 i) {
  return "(" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) + ")";
}

const char* base_name(const char* path) {
  const char* slash = std::strrchr(path, '/');
  return slash ? slash + 1 : path;
}

std::string text(Place place) { return std::string(base_name(place.file)) + ":" + std::to_string(place.line); }

bool same(Place a, Place b) { return a.line == b.line && (a.file == b.file || !std::strcmp(a.file, b.file)); }

Block& own_block() { return now.blocks[now.current->block]; }

unsigned char* stack(size_t i) {
  while (stacks.size() <= i) {
    // A page without access ends each stack, so that an overflow is seen.
    int kind = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void* memory = mmap(nullptr, STACK + PAGE, PROT_READ | PROT_WRITE, kind, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    mprotect(memory, PAGE, PROT_NONE);
    stacks.push_back(static_cast<unsigned char*>(memory) + PAGE);
  }
  return stacks[i];
}

// The next thread to run, or null where all of them wait or have ended.
Thread* next() {
  for (unsigned w : now.order) {
    Warp& warp = now.warps[w];
    if (!warp.ready) continue;
    unsigned lane;
    if (seed == 0) {
      lane = __builtin_ctz(warp.ready);
    } else if (seed == 1) {
      lane = 31 - __builtin_clz(warp.ready);
    } else {
      unsigned turn = draw() & 31;
      uint32_t turned = warp.ready >> turn | (turn ? warp.ready << (32 - turn) : 0);
      lane = (__builtin_ctz(turned) + turn) & 31;
    }
    warp.ready &= ~(1u << lane);
    return &now.threads[warp.first_thread + lane];
  }
  return nullptr;
}

std::string who_waits() {
  std::map<std::string, unsigned> counts;
  unsigned ended = 0;
  for (const Warp& warp : now.warps) ended += __builtin_popcount(warp.ended);
  for (const Thread& t : now.threads) {
    if (now.warps[t.warp].ended >> t.lane & 1 || !t.waits_for) continue;
    ++counts[std::string(" at ") + t.waits_for + ", " + text(t.place)];
  }
  std::string found;
  for (const auto& [where, count] : counts)
    found += (found.empty() ? "" : "; ") + std::to_string(count) + " wait" + where;
  if (ended) found += "; " + std::to_string(ended) + " have ended";
  return found;
}

void resume(Thread& thread) {
  now.current = &thread;
  thread_index = thread.index;
  block_index = now.blocks[thread.block].index;
  shared_memory = now.blocks[thread.block].shared;
}

// Leave the running thread for whichever can run.
void leave(bool ends) {
  Thread* from = now.current;
  Thread* to = next();
  if (to == from) return;
  if (to) {
    resume(*to);
    switch_fiber(from->fiber, to->fiber, ends);
    return;
  }
  if (now.remaining && now.error.empty())
    now.error = "divergent barrier in block " + text(block_index) + ": not every thread comes, " + who_waits();
  switch_fiber(from->fiber, now.host, ends);
}

void wait(const char* operation, Place place) {
  now.current->waits_for = operation;
  now.current->place = place;
  leave(false);
}

void reorder() {
  if (seed > 1) shuffle(now.order);
}

void release(unsigned first_warp, unsigned warps) {
  for (unsigned w = first_warp; w < first_warp + warps; ++w) {
    Warp& warp = now.warps[w];
    warp.ready |= warp.lanes == 32 ? ~0u : (1u << warp.lanes) - 1;
  }
  now.warps[now.current->warp].ready &= ~(1u << now.current->lane);  // it is running
  reorder();
}

void arrive(Barrier& barrier, unsigned expected, unsigned ended, const char* operation, Place place,
            unsigned first_warp, unsigned warps) {
  if (ended)
    abort_launch("divergent barrier: " + std::to_string(ended) + " of the threads ended before this " + operation,
                 place);
  if (barrier.arrived && !same(barrier.place, place))
    abort_launch("divergent barrier: other threads wait at " + text(barrier.place) + ", and this one comes to " +
                     operation + " here", place);
  barrier.place = place;
  if (++barrier.arrived < expected) return wait(operation, place);
  barrier.arrived = 0;
  release(first_warp, warps);
  // Not this thread first: it would always be the last to arrive that goes on.
  if (seed > 1) {
    now.warps[now.current->warp].ready |= 1u << now.current->lane;
    leave(false);
  }
}

void entry() {
  entered();
  now.kernel(now.argument);
  Thread& thread = *now.current;
  for (const Copy& copy : thread.copies)
    abort_launch("the thread ends with a cp.async that it has not waited for", copy.place);
  Block& block = now.blocks[thread.block];
  if (block.barrier.arrived)
    abort_launch("divergent barrier: a thread ends while others wait here", block.barrier.place);
  Warp& warp = now.warps[thread.warp];
  warp.ended |= 1u << thread.lane;
  thread.waits_for = nullptr;
  if (++block.ended == now.threads_per_block && now.shape.cluster_x > 1) {
    // The hardware gives the memory to another block: whoever reads it now is wrong.
    std::fill_n(reinterpret_cast<uint32_t*>(block.shared), now.shape.shared_bytes / 4, POISON);
  }
  --now.remaining;
  leave(true);
  __builtin_unreachable();
}

#ifdef __SANITIZE_ADDRESS__  // which reports bad addresses itself
class CatchBadAddresses {};
#else

// A bad address: the kernel's own, or an overflow of a fiber's stack.
void on_bad_address(int, siginfo_t* info, void*) {
  auto* address = static_cast<unsigned char*>(info->si_addr);
  auto* bottom = static_cast<const unsigned char*>(now.current ? now.current->fiber.stack_bottom : nullptr);
  if (bottom && address < bottom && address >= bottom - PAGE)
    abort_launch("the emulated thread's stack overflowed", {"", 0});
  char hex[32];
  std::snprintf(hex, sizeof hex, "%p", info->si_addr);
  abort_launch(std::string("access to the address ") + hex + ", which is no memory", {"", 0});
}

// While it lives, bad addresses end the launch and not the process.
class CatchBadAddresses {
  struct sigaction segv_, bus_;
  stack_t stack_;
  std::unique_ptr<char[]> memory_{new char[1 << 16]};

 public:
  CatchBadAddresses() {
    stack_t stack{};
    stack.ss_sp = memory_.get();
    stack.ss_size = 1 << 16;
    sigaltstack(&stack, &stack_);
    struct sigaction action {};
    action.sa_sigaction = on_bad_address;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;  // the handler does not return
    sigaction(SIGSEGV, &action, &segv_);
    sigaction(SIGBUS, &action, &bus_);
  }
  ~CatchBadAddresses() {
    sigaction(SIGSEGV, &segv_, nullptr);
    sigaction(SIGBUS, &bus_, nullptr);
    sigaltstack(&stack_, nullptr);
  }
};
#endif

constexpr size_t round_up(size_t n, size_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Shared memory of all blocks of a cluster; each is followed by bytes that nobody may touch.
class SharedMemory {
 public:
  SharedMemory(unsigned blocks, size_t bytes)
      : bytes_(round_up(bytes, 8)), stride_(round_up(bytes_ + CANARY, 128)), blocks_(blocks) {
    memory_ = static_cast<unsigned char*>(std::aligned_alloc(128, blocks * stride_));
    if (!memory_) throw std::bad_alloc();
    for (unsigned b = 0; b < blocks; ++b) forbid(block(b) + bytes_, stride_ - bytes_);
  }
  ~SharedMemory() {
    allow(memory_, blocks_ * stride_);
    std::free(memory_);
  }
  SharedMemory(const SharedMemory&) = delete;
  unsigned char* block(unsigned b) const { return memory_ + b * stride_; }

  // What was there before is gone, and reading what was not written gives NaN.
  void poison() {
    allow(memory_, blocks_ * stride_);
    std::fill_n(reinterpret_cast<uint32_t*>(memory_), blocks_ * stride_ / 4, POISON);
    for (unsigned b = 0; b < blocks_; ++b) forbid(block(b) + bytes_, stride_ - bytes_);
  }
  bool intact() {
    bool all = true;
    for (unsigned b = 0; b < blocks_; ++b) {
      allow(block(b) + bytes_, stride_ - bytes_);
      auto* words = reinterpret_cast<uint32_t*>(block(b) + bytes_);
      all &= std::all_of(words, words + (stride_ - bytes_) / 4, [](uint32_t word) { return word == POISON; });
      forbid(block(b) + bytes_, stride_ - bytes_);
    }
    return all;
  }

 private:
  unsigned char* memory_;
  size_t bytes_, stride_;
  unsigned blocks_;
};

void start_threads(unsigned first_block_of_cluster) {
  const Shape& shape = now.shape;
  for (unsigned b = 0; b < shape.cluster_x; ++b) {
    unsigned i = first_block_of_cluster + b;
    now.blocks[b].index = {i % shape.grid.x, i / shape.grid.x % shape.grid.y, i / shape.grid.x / shape.grid.y};
    now.blocks[b].ended = 0;
    now.blocks[b].barrier = {};
  }
  now.cluster_barrier = {};
  now.remaining = now.threads.size();
  for (Warp& warp : now.warps) {
    warp.ready = warp.lanes == 32 ? ~0u : (1u << warp.lanes) - 1;
    warp.ended = warp.pending = 0;
  }
  for (size_t i = 0; i < now.threads.size(); ++i) {
    Thread& thread = now.threads[i];
    thread.group = 0;
    thread.waits_for = nullptr;
    allow(stack(i) + STACK - ENTRY_FRAMES, ENTRY_FRAMES);
    // Stacks lie a power of two apart: without an offset of each, their tops would share a few lines of the cache.
    prepare(thread.fiber, entry, stack(i), STACK - i * 192 % PAGE);
  }
  std::iota(now.order.begin(), now.order.end(), 0u);
  if (seed == 1) std::reverse(now.order.begin(), now.order.end());
  reorder();
}

void run_cluster(unsigned first_block) {
  start_threads(first_block);
  Thread* first = next();
  resume(*first);
  switch_fiber(now.host, first->fiber, false);
}

std::string check(const Shape& s) {
  auto total = uint64_t{s.block.x} * s.block.y * s.block.z;
  auto blocks = uint64_t{s.grid.x} * s.grid.y * s.grid.z;
  if (!total || total > 1024 || s.block.z > 64) return "a block has 1 to 1024 threads, got " + text(s.block);
  if (!blocks || s.grid.x > 0x7fffffffu || s.grid.y > 65535 || s.grid.z > 65535)
    return "a grid has 1 to (2147483647, 65535, 65535) blocks, got " + text(s.grid);
  if (s.shared_bytes > SHARED_MOST)
    return "a block has at most " + std::to_string(SHARED_MOST) + " bytes of shared memory, got " +
           std::to_string(s.shared_bytes);
  if (!s.cluster_x || s.cluster_x > 8 || s.grid.x % s.cluster_x)
    return "a cluster has 1 to 8 blocks and divides the grid, got " + std::to_string(s.cluster_x) + " for " +
           text(s.grid);
  return "";
}

void set_up(const Shape& shape, void (*kernel)(const void*), const void* argument, const SharedMemory& shared) {
  now.shape = shape;
  now.kernel = kernel;
  now.argument = argument;
  now.error.clear();
  now.host = {};
  block_size = shape.block;
  grid_size = shape.grid;
  now.threads_per_block = shape.block.x * shape.block.y * shape.block.z;
  now.warps_per_block = (now.threads_per_block + 31) / 32;
  now.blocks.resize(shape.cluster_x);
  now.threads.resize(shape.cluster_x * now.threads_per_block);
  now.warps.resize(shape.cluster_x * now.warps_per_block);
  now.order.resize(now.warps.size());
  for (unsigned b = 0, i = 0; b < shape.cluster_x; ++b) {
    now.blocks[b].shared = shared.block(b);
    for (unsigned t = 0; t < now.threads_per_block; ++t, ++i) {
      Thread& thread = now.threads[i];
      thread.index = {t % shape.block.x, t / shape.block.x % shape.block.y, t / shape.block.x / shape.block.y};
      thread.block = b;
      thread.warp = b * now.warps_per_block + t / 32;
      thread.lane = t % 32;
      thread.copies.clear();
      Warp& warp = now.warps[thread.warp];
      if (!thread.lane) warp.first_thread = i;
      warp.lanes = thread.lane + 1;
    }
  }
}

}  // namespace

std::string run(const Shape& shape, void (*kernel)(const void*), const void* argument) {
  if (std::string wrong = check(shape); !wrong.empty()) return wrong;
  std::lock_guard lock(one_launch);
  state = seed;
  SharedMemory shared(shape.cluster_x, shape.shared_bytes);
  set_up(shape, kernel, argument, shared);
  unsigned blocks = shape.grid.x * shape.grid.y * shape.grid.z;
  std::vector<unsigned> clusters(blocks / shape.cluster_x);
  std::iota(clusters.begin(), clusters.end(), 0u);
  if (seed == 1) std::reverse(clusters.begin(), clusters.end());
  if (seed > 1) shuffle(clusters);
  [[maybe_unused]] CatchBadAddresses catching;
  for (unsigned cluster : clusters) {
    shared.poison();
    run_cluster(cluster * shape.cluster_x);
    now.current = nullptr;
    if (now.error.empty() && !shared.intact())
      now.error = "a thread of block " + text(block_index) + " wrote behind its " +
                  std::to_string(shape.shared_bytes) + " bytes of shared memory";
    if (!now.error.empty()) {
      // The fibers are abandoned, with their frames.
      for (size_t i = 0; i < now.threads.size(); ++i) allow(stack(i), STACK);
      return now.error;
    }
  }
  return "";
}

void abort_launch(const std::string& message, Place place) {
  if (now.error.empty()) {
    now.error = (place.line ? text(place) + ": " : "") + message + " (thread " + text(thread_index) + " of block " +
                text(block_index) + ")";
  }
  switch_fiber(now.current->fiber, now.host, true);
  __builtin_unreachable();
}

void sync_block(Place place) {
  Block& block = own_block();
  arrive(block.barrier, now.threads_per_block, block.ended, "__syncthreads", place,
         now.current->block * now.warps_per_block, now.warps_per_block);
}

void sync_cluster(Place place) {
  unsigned ended = 0;
  for (const Block& block : now.blocks) ended += block.ended;
  arrive(now.cluster_barrier, now.threads.size(), ended, "cluster_sync", place, 0, now.warps.size());
}

unsigned cluster_rank() { return now.current->block; }
unsigned cluster_size() { return now.shape.cluster_x; }

void* cluster_shared(const void* mine, unsigned rank, Place place) {
  auto offset = static_cast<const unsigned char*>(mine) - shared_memory;
  if (offset < 0 || static_cast<size_t>(offset) >= now.shape.shared_bytes)
    abort_launch("cluster_shared of an address outside the block's shared memory", place);
  if (rank >= now.shape.cluster_x)
    abort_launch("cluster_shared of block " + std::to_string(rank) + " of a cluster of " +
                     std::to_string(now.shape.cluster_x), place);
  if (now.blocks[rank].ended == now.threads_per_block)
    abort_launch("cluster_shared of a block that has ended", place);
  return now.blocks[rank].shared + offset;
}

unsigned lane() { return now.current->lane; }

void collective(const char* operation, uint32_t mask, void* argument, Execute execute, Place place) {
  Thread& self = *now.current;
  Warp& warp = now.warps[self.warp];
  uint32_t own = 1u << self.lane;
  if (!(mask & own)) abort_launch(std::string(operation) + ": the calling lane is not in the mask", place);
  uint32_t there = (warp.lanes == 32 ? ~0u : (1u << warp.lanes) - 1) & ~warp.ended;
  if (mask & ~there)
    abort_launch(std::string(operation) + ": the mask has lanes that are not there or have ended", place);
  for (uint32_t rest = warp.pending & mask; rest; rest &= rest - 1) {
    unsigned other = __builtin_ctz(rest);
    const Thread& thread = now.threads[warp.first_thread + other];
    if (warp.mask[other] != mask || !same(thread.place, place))
      abort_launch(std::string(operation) + ": lane " + std::to_string(other) + " is in " + thread.waits_for + " at " +
                       text(thread.place) + (warp.mask[other] != mask ? " with another mask" : ""), place);
  }
  warp.mask[self.lane] = mask;
  warp.argument[self.lane] = argument;
  warp.pending |= own;
  if ((warp.pending & mask) != mask) return wait(operation, place);
  warp.pending &= ~mask;
  execute(warp.argument, mask);
  warp.ready |= mask & ~own;
  if (seed > 1 && !(draw() & 7)) {  // now and then another warp goes on first
    warp.ready |= own;
    reorder();
    leave(false);
  }
}

static void perform(const Copy& copy) {
  if (copy.valid) {
    std::memcpy(copy.shared, copy.global, copy.bytes);
  } else {
    std::memset(copy.shared, 0, copy.bytes);
  }
}

void copy_async(void* shared, const void* global, unsigned bytes, bool valid, Place place) {
  check_alignment(shared, bytes, place);
  if (valid) check_alignment(global, bytes, place);
  Thread& self = *now.current;
  Copy copy{shared, global, bytes, valid, self.group, place};
  self.copies.push_back(copy);
  // The hardware may copy at any moment until the wait. A thread that has not waited reads what was there before: the
  // early copy is made only by seeds that look for the opposite fault, a buffer that is overwritten while it is read.
  if (seed == 1 || (seed > 1 && (draw() & 1))) perform(copy);
}

void copy_async_commit() { ++now.current->group; }

void copy_async_wait(unsigned in_flight) {
  Thread& self = *now.current;
  size_t kept = 0;
  for (const Copy& copy : self.copies) {
    if (copy.group + in_flight < self.group) {
      perform(copy);
    } else {
      self.copies[kept++] = copy;
    }
  }
  self.copies.resize(kept);
}

void check_alignment(const void* pointer, size_t bytes, Place place) {
  if (reinterpret_cast<uintptr_t>(pointer) % bytes)
    abort_launch("misaligned access of " + std::to_string(bytes) + " bytes", place);
}

bool faulted(const char* file, int number) {
  if (!any_fault) return false;
  auto found = faults.find(base_name(file));
  return found != faults.end() && found->second == number;
}

void set_schedule(uint64_t value) { seed = value; }

void set_fault(const std::string& file, int number) {
  faults.clear();
  any_fault = number != 0;
  if (any_fault) faults[file] = number;
}

}  // namespace cmfast::emulation
