// Runs a CUDA kernel on the CPU, one fiber a thread.
//
// A thread runs until it waits for others, at a barrier or in a warp's collective operation, or ends. Which one
// continues then is drawn by the schedule's seed, so a missing barrier shows as a wrong result under some seed:
//   seed 0   threads and blocks in order, as far as each can run; copies (cp.async) happen at their wait
//   seed 1   the reverse order; copies happen at once
//   others   warps, lanes, blocks and the moment of each copy drawn, anew at every barrier
// The blocks of a cluster live at the same time; clusters run one after another.
//
// What the hardware would answer with a hang, a fault or silence ends the launch with a message: a barrier that some
// threads do not reach, an operation on lanes that are elsewhere, a misaligned access, a bad address.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace cmfast::emulation {

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// A line of a kernel's source.
struct Place {
  const char* file;
  int line;
  static constexpr Place here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};

// What a kernel reads of the thread that is running.
extern dim3 thread_index, block_index, block_size, grid_size;
extern unsigned char* shared_memory;

void sync_block(Place);
void sync_cluster(Place);
unsigned cluster_rank();
unsigned cluster_size();
// The address in another block of the cluster that has the same offset in its shared memory as `mine` has here.
void* cluster_shared(const void* mine, unsigned rank, Place);

// Wait for the lanes of `mask`, and once they are all here let the last one run `execute(arguments of the lanes)`.
using Execute = void (*)(void* const (&arguments)[32], uint32_t mask);
void collective(const char* operation, uint32_t mask, void* argument, Execute execute, Place);
unsigned lane();

void copy_async(void* shared, const void* global, unsigned bytes, bool valid, Place);
void copy_async_commit();
void copy_async_wait(unsigned groups_in_flight);

// End the launch with a message; the thread that calls this does not continue.
[[noreturn]] void abort_launch(const std::string& message, Place);
void check_alignment(const void* pointer, size_t bytes, Place);

// Is the fault `number` of the source file seeded? See CMFAST_SYNC.
bool faulted(const char* file, int number);

struct Shape {
  dim3 grid, block;
  size_t shared_bytes;
  unsigned cluster_x;
};
// Run `kernel(argument)` in every thread; empty, or what went wrong.
std::string run(const Shape& shape, void (*kernel)(const void*), const void* argument);

// For the host.
void set_schedule(uint64_t seed);
void set_fault(const std::string& file, int number);

}  // namespace cmfast::emulation
