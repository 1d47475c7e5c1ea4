// What cmfast's CUDA kernels are written with.
//
// nvcc compiles them for a GPU. The host compiler compiles the same files for the CPU where CMFAST_EMULATE is defined
// (csrc/emulation), for tests: so kernels use the dynamic shared memory, launches and barriers of this file and not the
// language's own.
//
// Every barrier and every wait of a kernel has a number, unique in its file, and so have a few bounds. In an emulated
// build a test seeds a fault by number (set_fault): that barrier or wait is left out, or the bound is one too large,
// and the operator's tests must then fail. On a GPU the numbers are nothing.
#pragma once

#include <cstdint>
#include <string>
#include <type_traits>
#include <vector>

#ifdef CMFAST_EMULATE
#include "../emulation/matrix.h"
#define CMFAST_FAULTED(number) (::cmfast::emulation::faulted(__FILE__, number))
#define CMFAST_SHARED(memory) unsigned char* memory = ::cmfast::emulation::shared_memory
#define CMFAST_HERE , ::cmfast::emulation::Place place = ::cmfast::emulation::Place::here()
#define CMFAST_HERE_ONLY ::cmfast::emulation::Place place = ::cmfast::emulation::Place::here()
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define CMFAST_FAULTED(number) false
// One name and alignment in all files: the declarations of one symbol must agree.
#define CMFAST_SHARED(memory)                                     \
  extern __shared__ __align__(128) unsigned char cmfast_shared[]; \
  unsigned char* memory = cmfast_shared
#define CMFAST_HERE
#define CMFAST_HERE_ONLY
#endif

#define CMFAST_SYNC(number)                       \
  do {                                            \
    if (!CMFAST_FAULTED(number)) __syncthreads(); \
  } while (false)
#define CMFAST_SYNC_WARP(number)               \
  do {                                         \
    if (!CMFAST_FAULTED(number)) __syncwarp(); \
  } while (false)
#define CMFAST_SYNC_CLUSTER(number)                        \
  do {                                                     \
    if (!CMFAST_FAULTED(number)) ::cmfast::cluster_sync(); \
  } while (false)
// Wait until at most `groups` groups of copies are in flight.
#define CMFAST_CP_ASYNC_WAIT(number, groups)                        \
  do {                                                              \
    if (!CMFAST_FAULTED(number)) ::cmfast::cp_async_wait<groups>(); \
  } while (false)
#define CMFAST_BOUND(number, n) ((n) + (CMFAST_FAULTED(number) ? 1 : 0))

namespace cmfast {

enum DType : int { FLOAT32 = 0, FLOAT16 = 1, BFLOAT16 = 2 };

inline size_t bytes_of(int dtype) { return dtype == FLOAT32 ? 4 : 2; }

// ---- launches

struct LaunchConfig {
  dim3 grid, block;
  size_t shared_bytes = 0;
  void* stream = nullptr;  // a cudaStream_t
  unsigned cluster_x = 1;  // blocks of a cluster along x; more than 1 needs sm_90
};

#ifdef CMFAST_EMULATE

template <class... Parameters, class... Arguments>
std::string launch(void (*kernel)(Parameters...), const LaunchConfig& config, Arguments&&... arguments) {
  auto call = [&] { kernel(Parameters(arguments)...); };
  using Call = decltype(call);
  return emulation::run({config.grid, config.block, config.shared_bytes, config.cluster_x},
                        [](const void* call) { (*static_cast<const Call*>(call))(); }, &call);
}

#else

// A launch that was asked for and not made.
struct Recorded {
  const void* kernel;  // the host's function of that name
  LaunchConfig config;
};

// Where launches are written down instead of being made, for the static report.
inline thread_local std::vector<Recorded>* recording = nullptr;

// Empty, or the error of the launch (or one that an earlier launch left).
template <class... Parameters, class... Arguments>
std::string launch(void (*kernel)(Parameters...), const LaunchConfig& config, Arguments&&... arguments) {
  if (recording) {
    recording->push_back({reinterpret_cast<const void*>(kernel), config});
    return {};
  }
  cudaError_t error = cudaSuccess;
  if (config.shared_bytes > 48 * 1024)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(config.shared_bytes));
  if (error == cudaSuccess) {
    cudaLaunchAttribute cluster;
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = config.cluster_x;
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    cudaLaunchConfig_t launch_config = {};
    launch_config.gridDim = config.grid;
    launch_config.blockDim = config.block;
    launch_config.dynamicSmemBytes = config.shared_bytes;
    launch_config.stream = static_cast<cudaStream_t>(config.stream);
    launch_config.attrs = &cluster;
    launch_config.numAttrs = config.cluster_x > 1 ? 1 : 0;
    error = cudaLaunchKernelEx(&launch_config, kernel, static_cast<Parameters>(arguments)...);
  }
  if (error == cudaSuccess) return {};
  cudaGetLastError();  // or the next launch would report it again
  auto text = [](dim3 d) {
    return std::to_string(d.x) + "x" + std::to_string(d.y) + "x" + std::to_string(d.z);
  };
  return std::string(cudaGetErrorString(error)) + " (launch of " + text(config.grid) + " blocks of " +
         text(config.block) + " threads and " + std::to_string(config.shared_bytes) + " bytes of shared memory)";
}

#endif

// ---- conversions and vectors

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (std::is_same_v<T, float>) return x;
  else if constexpr (std::is_same_v<T, __half>) return __float2half_rn(x);
  else return __float2bfloat16_rn(x);
}

// Two 16-bit elements in a word of registers, as mma takes them.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  static_assert(sizeof(T) == 2);
  uint32_t word;
  if constexpr (std::is_same_v<T, __half>) {
    __half2 pair = __floats2half2_rn(low, high);
    memcpy(&word, &pair, 4);
  } else {
    __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    memcpy(&word, &pair, 4);
  }
  return word;
}

// The two elements of a word, in an instruction each where T is bfloat16: it is the upper half of its float.
template <class T>
__device__ __forceinline__ void unpack(uint32_t word, float& low, float& high) {
  if constexpr (std::is_same_v<T, __half>) {
    __half2 pair;
    memcpy(&pair, &word, 4);
    float2 both = __half22float2(pair);
    low = both.x;
    high = both.y;
  } else {
#ifdef CMFAST_EMULATE
    low = __uint_as_float(word << 16);
    high = __uint_as_float(word & 0xffff0000u);
#else
    asm("shl.b32 %0, %1, 16;" : "=f"(low) : "r"(word));
    asm("and.b32 %0, %1, 0xffff0000;" : "=f"(high) : "r"(word));
#endif
  }
}

// V elements that are read and written together: in accesses of 16 bytes, or in one of their size where they are fewer.
template <class T, int V>
struct alignas(sizeof(T) * V < 16 ? sizeof(T) * V : 16) Vector {
  T data[V];
};

template <int BYTES>
using Word = std::conditional_t<
    BYTES == 16, uint4,
    std::conditional_t<BYTES == 8, uint2, std::conditional_t<BYTES == 4, uint32_t, uint16_t>>>;

template <class T, int V>
__device__ __forceinline__ Vector<T, V> load_vector(const T* pointer CMFAST_HERE) {
  constexpr int BYTES = sizeof(T) * V < 16 ? sizeof(T) * V : 16, EACH = BYTES / sizeof(T);
#ifdef CMFAST_EMULATE
  emulation::check_alignment(pointer, BYTES, place);
#endif
  Vector<T, V> result;
#pragma unroll
  for (int i = 0; i < V; i += EACH) {
    Word<BYTES> word = *reinterpret_cast<const Word<BYTES>*>(pointer + i);
    memcpy(result.data + i, &word, BYTES);
  }
  return result;
}

template <class T, int V>
__device__ __forceinline__ void store_vector(T* pointer, const Vector<T, V>& value CMFAST_HERE) {
  constexpr int BYTES = sizeof(T) * V < 16 ? sizeof(T) * V : 16, EACH = BYTES / sizeof(T);
#ifdef CMFAST_EMULATE
  emulation::check_alignment(pointer, BYTES, place);
#endif
#pragma unroll
  for (int i = 0; i < V; i += EACH) {
    Word<BYTES> word;
    memcpy(&word, value.data + i, BYTES);
    *reinterpret_cast<Word<BYTES>*>(pointer + i) = word;
  }
}

// The same to global memory, and always in accesses of 16 bytes: nvcc takes a vector's store apart into those of its
// elements where it moves their computation, and does not always put it together again.
template <class T, int V>
__device__ __forceinline__ void store_global(T* pointer, const Vector<T, V>& value CMFAST_HERE) {
#ifdef CMFAST_EMULATE
  store_vector(pointer, value, place);
#else
  constexpr int BYTES = sizeof(T) * V < 16 ? sizeof(T) * V : 16, EACH = BYTES / sizeof(T);
  static_assert(BYTES == 16 || BYTES == 8);
#pragma unroll
  for (int i = 0; i < V; i += EACH) {
    uint32_t words[BYTES / 4];
    memcpy(words, value.data + i, BYTES);
    auto address = __cvta_generic_to_global(pointer + i);
    if constexpr (BYTES == 16)
      asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(words[0]), "r"(words[1]),
                   "r"(words[2]), "r"(words[3])
                   : "memory");
    else
      asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(address), "r"(words[0]), "r"(words[1]) : "memory");
  }
#endif
}

template <class T, int V>
__device__ __forceinline__ void to_float(const Vector<T, V>& vector, float (&values)[V]) {
#pragma unroll
  for (int i = 0; i < V; ++i) values[i] = to_float(vector.data[i]);
}

template <class T, int V>
__device__ __forceinline__ Vector<T, V> from_float(const float (&values)[V]) {
  Vector<T, V> vector;
#pragma unroll
  for (int i = 0; i < V; ++i) vector.data[i] = from_float<T>(values[i]);
  return vector;
}

// ---- functions in one instruction, to about two units in the last place

__device__ __forceinline__ float fast_exp2(float x) {
#ifdef CMFAST_EMULATE
  return exp2f(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

__device__ __forceinline__ float fast_rcp(float x) {
#ifdef CMFAST_EMULATE
  return 1.0f / x;
#else
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// The larger of x and 0; what is no number stays, which fmaxf would make 0.
__device__ __forceinline__ float not_negative(float x) { return x < 0.0f ? 0.0f : x; }

// ---- matrices of a warp

// An address in shared memory, from which others are an addition away.
#ifdef CMFAST_EMULATE
using SharedAddress = const unsigned char*;
inline SharedAddress shared_address(const void* pointer) { return static_cast<SharedAddress>(pointer); }
#else
using SharedAddress = uint32_t;
__device__ __forceinline__ SharedAddress shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}
#endif

// Four 8x8 matrices of 16-bit elements: lane 8i + r gives the address of row r of matrix i, 16 bytes; words[i] of lane
// l gets elements 2(l mod 4) and the next of row l div 4 of matrix i (of the transposed matrix: of column l div 4).
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&words)[4], SharedAddress row CMFAST_HERE) {
#ifdef CMFAST_EMULATE
  emulation::ldmatrix_x4<false>(words, row, place);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(row)
               : "memory");
#endif
}

__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&words)[4], SharedAddress row CMFAST_HERE) {
#ifdef CMFAST_EMULATE
  emulation::ldmatrix_x4<true>(words, row, place);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(row)
               : "memory");
#endif
}

// d += a·b with d [16, 8], a [16, 16] and b [16, 8]. Lane l holds, with g = l div 4 and t = 2(l mod 4):
// d: (g, t), (g, t+1), (g+8, t), (g+8, t+1); a: pairs from (g, t), (g+8, t), (g, t+8), (g+8, t+8); b: pairs of rows
// from (t, g), (t+8, g).
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2] CMFAST_HERE) {
  static_assert(std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>);
#ifdef CMFAST_EMULATE
  emulation::mma_m16n8k16<T>(d, a, b, place);
#else
#define CMFAST_MMA(type)                                                                                            \
  asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "   \
      "{%0, %1, %2, %3};"                                                                                           \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                              \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
  if constexpr (std::is_same_v<T, __half>) {
    CMFAST_MMA("f16");
  } else {
    CMFAST_MMA("bf16");
  }
#undef CMFAST_MMA
#endif
}

// ---- copies to shared memory that the thread does not wait for

// 16 bytes, or zeros where they are not valid (global memory is not read then).
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, bool valid CMFAST_HERE) {
#ifdef CMFAST_EMULATE
  emulation::copy_async(shared, global, 16, valid, place);
#else
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(__cvta_generic_to_global(global)), "r"(valid ? 16 : 0)
               : "memory");
#endif
}

// Close the group of the copies since the last one.
__device__ __forceinline__ void cp_async_commit() {
#ifdef CMFAST_EMULATE
  emulation::copy_async_commit();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Wait until at most GROUPS groups are in flight; for the other threads' copies a barrier follows. Kernels write
// CMFAST_CP_ASYNC_WAIT.
template <int GROUPS>
__device__ __forceinline__ void cp_async_wait() {
#ifdef CMFAST_EMULATE
  emulation::copy_async_wait(GROUPS);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS) : "memory");
#endif
}

// ---- clusters: blocks that run at the same time and read each other's shared memory. sm_90 and newer.

#ifdef CMFAST_EMULATE

inline unsigned cluster_rank() { return emulation::cluster_rank(); }
inline unsigned cluster_size() { return emulation::cluster_size(); }
inline void cluster_sync(CMFAST_HERE_ONLY) { emulation::sync_cluster(place); }
template <class T>
T* cluster_shared(T* mine, unsigned rank CMFAST_HERE) {
  return static_cast<T*>(emulation::cluster_shared(mine, rank, place));
}

#else

__device__ __forceinline__ unsigned cluster_rank() {
  unsigned rank = 0;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#else
  __trap();
#endif
  return rank;
}

__device__ __forceinline__ unsigned cluster_size() {
  unsigned size = 1;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
#else
  __trap();
#endif
  return size;
}

// All threads of the cluster; what they wrote to shared memory before is seen after it.
__device__ __forceinline__ void cluster_sync() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.aligned;\n\tbarrier.cluster.wait.aligned;" ::: "memory");
#else
  __trap();
#endif
}

// The same place in the shared memory of another block. That block must not end before a cluster_sync after the access.
template <class T>
__device__ __forceinline__ T* cluster_shared(T* mine, unsigned rank) {
#if __CUDA_ARCH__ >= 900
  uint64_t address;
  asm("mapa.u64 %0, %1, %2;" : "=l"(address) : "l"(reinterpret_cast<uint64_t>(mine)), "r"(rank));
  return reinterpret_cast<T*>(address);
#else
  __trap();
  return mine;
#endif
}

#endif

}  // namespace cmfast
