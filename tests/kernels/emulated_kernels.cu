// Small kernels that show what the emulation of csrc/emulation does, and the module of test_emulation.py with them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../../csrc/cuda/primitives.cuh"

namespace py = pybind11;
using namespace cmfast;

namespace {

using Address = uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

__global__ void reverse(const float* in, float* out) {
  CMFAST_SHARED(memory);
  float* values = reinterpret_cast<float*>(memory);
  values[threadIdx.x] = in[threadIdx.x];
  CMFAST_SYNC(1);
  out[threadIdx.x] = values[blockDim.x - 1 - threadIdx.x];
}

__global__ void reverse_in_a_warp(const float* in, float* out) {
  CMFAST_SHARED(memory);
  float* values = reinterpret_cast<float*>(memory);
  values[threadIdx.x] = in[threadIdx.x];
  CMFAST_SYNC_WARP(2);
  out[threadIdx.x] = values[threadIdx.x ^ 31];
}

__global__ void skips_a_barrier(float* out, int threads) {
  if (static_cast<int>(threadIdx.x) < threads) __syncthreads();
  out[threadIdx.x] = 1;
}

__global__ void waits_in_two_places(int kind) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else if (kind == 0) {
    __syncthreads();
  } else {
    __shfl_sync(0xffffffffu, 1, 0);
    if (threadIdx.x < 64) __syncwarp(0xffff);
  }
}

// Which element of the block's shared memory each thread finds before anything is written; then something is.
__global__ void reads_first(float* out) {
  CMFAST_SHARED(memory);
  float* values = reinterpret_cast<float*>(memory);
  out[blockIdx.x * blockDim.x + threadIdx.x] = values[threadIdx.x];
  values[threadIdx.x] = 1;
}

// read: 0 before the wait, 1 after it, 2 instead of it.
__global__ void copies(const float* in, float* out, int read, bool valid) {
  CMFAST_SHARED(memory);
  float4* values = reinterpret_cast<float4*>(memory) + threadIdx.x;
  float4* result = reinterpret_cast<float4*>(out) + threadIdx.x;
  cp_async_16(values, in + threadIdx.x * 4, valid);
  cp_async_commit();
  if (read != 1) *result = *values;
  if (read == 2) return;
  CMFAST_CP_ASYNC_WAIT(3, 0);
  if (read == 1) *result = *values;
}

// Two groups in flight, of which the older one is waited for.
__global__ void copies_two_groups(const float* in, float* out) {
  CMFAST_SHARED(memory);
  float4* values = reinterpret_cast<float4*>(memory);
  for (int i = 0; i < 2; ++i) {
    cp_async_16(values + i, in + 4 * i, true);
    cp_async_commit();
  }
  cp_async_wait<1>();
  reinterpret_cast<float4*>(out)[0] = values[0];
  reinterpret_cast<float4*>(out)[1] = values[1];
  cp_async_wait<0>();
}

// A copy into a buffer that the other lanes may not have read yet.
__global__ void copies_over(const float* in, float* out) {
  CMFAST_SHARED(memory);
  float* values = reinterpret_cast<float*>(memory);
  values[threadIdx.x] = 1;
  __syncthreads();
  if (threadIdx.x == blockDim.x - 1) cp_async_16(values, in, true);
  out[threadIdx.x] = values[0];
  cp_async_commit();
  cp_async_wait<0>();
}

__global__ void writes_at(float* out, int64_t i) { out[i] = 1; }

__global__ void writes_shared(int i) {
  CMFAST_SHARED(memory);
  reinterpret_cast<float*>(memory)[i] = 1;
}

__global__ void loads_a_vector(const float* in, float* out) {
  store_vector(out, load_vector<float, 4>(in));
}

__global__ void shuffles(const int* in, int* out) {
  int value = in[threadIdx.x], lane = threadIdx.x;
  unsigned all = 0xffffffffu;
  int answers[] = {__shfl_sync(all, value, 5),        __shfl_sync(all, value, lane + 3, 8),
                   __shfl_xor_sync(all, value, 6),    __shfl_xor_sync(all, value, 12, 8),
                   __shfl_down_sync(all, value, 3),   __shfl_down_sync(all, value, 3, 8),
                   __shfl_up_sync(all, value, 3),     __shfl_up_sync(all, value, 3, 8),
                   static_cast<int>(__ballot_sync(all, value & 1)),
                   __any_sync(all, value == 7),       __all_sync(all, value >= 0)};
  for (int i = 0; i < 11; ++i) out[i * 32 + lane] = answers[i];
  unsigned half = lane < 16 ? 0xffffu : 0xffff0000u;
  out[11 * 32 + lane] = __shfl_xor_sync(half, value, 1);
}

__global__ void shuffles_outside_its_mask(unsigned mask) { __shfl_sync(mask, 1, 0); }

template <class T>
__global__ void multiply(const T* a, const T* b, float* d) {
  CMFAST_SHARED(memory);
  T* rows_a = reinterpret_cast<T*>(memory);  // [16, 16]
  T* rows_b = rows_a + 256;                  // [16, 8]
  int lane = threadIdx.x;
  store_vector(rows_a + lane * 8, load_vector<T, 8>(a + lane * 8));
  if (lane < 16) store_vector(rows_b + lane * 8, load_vector<T, 8>(b + lane * 8));
  __syncwarp();
  uint32_t words_a[4], words_b[4];
  ldmatrix_x4(words_a, shared_address(rows_a + lane % 16 * 16 + lane / 16 * 8));
  ldmatrix_x4_trans(words_b, shared_address(rows_b + lane % 16 * 8));
  uint32_t half_b[2] = {words_b[0], words_b[1]};
  float sums[4];
  for (int i = 0; i < 4; ++i) sums[i] = d[(lane / 4 + 8 * (i / 2)) * 8 + lane % 4 * 2 + i % 2];
  mma_m16n8k16<T>(sums, words_a, half_b);
  for (int i = 0; i < 4; ++i) d[(lane / 4 + 8 * (i / 2)) * 8 + lane % 4 * 2 + i % 2] = sums[i];
}

__global__ void neighbours(float* out, bool stays) {
  CMFAST_SHARED(memory);
  float* values = reinterpret_cast<float*>(memory);
  values[threadIdx.x] = blockIdx.x * 100.0f + threadIdx.x;
  CMFAST_SYNC_CLUSTER(4);
  unsigned next = (cluster_rank() + 1) % cluster_size();
  out[blockIdx.x * blockDim.x + threadIdx.x] = *cluster_shared(values + threadIdx.x, next);
  if (stays) cluster_sync();
}

__global__ void tickets(int* counter, int* order) { order[atomicAdd(counter, 1)] = blockIdx.x * 64 + threadIdx.x; }

template <class T>
__global__ void convert(const float* in, T* narrow, float* wide) {
  int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  narrow[i] = from_float<T>(in[i]);
  wide[i] = to_float(narrow[i]);
}

__global__ void overflows_its_stack(volatile char* out) {
  volatile char frame[1 << 20];
  frame[0] = 1;
  *out = frame[0];
}

LaunchConfig config(unsigned blocks, unsigned threads, size_t shared, unsigned cluster = 1) {
  return {dim3(blocks), dim3(threads), shared, nullptr, cluster};
}

}  // namespace

PYBIND11_MODULE(CMFAST_MODULE, m) {
  m.def("set_schedule", emulation::set_schedule);
  m.def("set_fault", emulation::set_fault);
  m.def("empty", [](unsigned blocks, unsigned threads, size_t shared, unsigned cluster) {
    return launch(writes_shared, config(blocks, threads, shared, cluster), 0);
  });
  m.def("reverse", [](Address in, Address out, unsigned threads, bool warp) {
    return launch(warp ? reverse_in_a_warp : reverse, config(1, threads, threads * 4), at<float>(in), at<float>(out));
  });
  m.def("skips_a_barrier", [](Address out, int threads) {
    return launch(skips_a_barrier, config(3, 64, 0), at<float>(out), threads);
  });
  m.def("waits_in_two_places", [](int kind) { return launch(waits_in_two_places, config(1, 64, 0), kind); });
  m.def("reads_first", [](Address out) { return launch(reads_first, config(4, 64, 256), at<float>(out)); });
  m.def("copies", [](Address in, Address out, int read, bool valid) {
    return launch(copies, config(1, 64, 1024), at<float>(in), at<float>(out), read, valid);
  });
  m.def("copies_two_groups", [](Address in, Address out) {
    return launch(copies_two_groups, config(1, 1, 32), at<float>(in), at<float>(out));
  });
  m.def("copies_over", [](Address in, Address out) {
    return launch(copies_over, config(1, 64, 256), at<float>(in), at<float>(out));
  });
  m.def("writes_at", [](Address out, int64_t i) { return launch(writes_at, config(2, 1, 0), at<float>(out), i); });
  m.def("writes_shared", [](size_t bytes, int i) { return launch(writes_shared, config(1, 1, bytes), i); });
  m.def("loads_a_vector", [](Address in, Address out) {
    return launch(loads_a_vector, config(1, 1, 0), at<float>(in), at<float>(out));
  });
  m.def("shuffles", [](Address in, Address out) {
    return launch(shuffles, config(1, 32, 0), at<int>(in), at<int>(out));
  });
  m.def("shuffles_outside_its_mask", [](unsigned mask, unsigned threads) {
    return launch(shuffles_outside_its_mask, config(1, threads, 0), mask);
  });
  m.def("multiply", [](bool half, Address a, Address b, Address d) {
    return half ? launch(multiply<__half>, config(1, 32, 768), at<__half>(a), at<__half>(b), at<float>(d))
                : launch(multiply<__nv_bfloat16>, config(1, 32, 768), at<__nv_bfloat16>(a), at<__nv_bfloat16>(b),
                         at<float>(d));
  });
  m.def("neighbours", [](Address out, bool stays) {
    return launch(neighbours, config(8, 64, 256, 4), at<float>(out), stays);
  });
  m.def("tickets", [](Address counter, Address order) {
    return launch(tickets, config(3, 64, 0), at<int>(counter), at<int>(order));
  });
  m.def("convert", [](bool half, Address in, Address narrow, Address wide, unsigned blocks) {
    auto c = config(blocks, 256, 0);
    return half ? launch(convert<__half>, c, at<float>(in), at<__half>(narrow), at<float>(wide))
                : launch(convert<__nv_bfloat16>, c, at<float>(in), at<__nv_bfloat16>(narrow), at<float>(wide));
  });
  m.def("overflows_its_stack", [](Address out) {
    return launch(overflows_its_stack, config(1, 1, 0), at<volatile char>(out));
  });
}
