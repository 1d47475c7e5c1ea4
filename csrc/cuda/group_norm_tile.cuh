// What the kernels of group norm have in common: a block's tile of [N, C, P], sums over it, and what its channels are
// multiplied by.
#pragma once

#include "group_norm_plan.h"
#include "primitives.cuh"

namespace cmfast {

constexpr int THREADS = 256;  // of a block, at most
constexpr float LOG2E = 1.4426950408889634f;

// The constants of each channel in shared memory, in rows of `width` floats: what is added to x; what leads from x to z
// (in the forward kernels: what leads from there to the output); what x is taken less in the sums of the statistics; and
// what the backward kernels take besides.
enum ChannelRow { ADDED, GAIN, OFFSET, ORIGIN, MEAN = 3, RSTD, SLOPE, CONSTANT };

template <class T>
__device__ T* shared_at(unsigned char* memory, int offset) {
  return reinterpret_cast<T*>(memory + offset);
}

// The quotient i / d of 0 ≤ i < 2^21: (i + 1/2) / d is further from an integer than it is rounded.
__device__ __forceinline__ int divide(int i, Divisor d) {
  return static_cast<int>(fmaf(static_cast<float>(i), d.inverse, d.half));
}

// e^-z up to 1e37, and 1 / (1 + e^-z): in full precision where the elements are of 32 bits. A division would be a call.
template <class T>
__device__ __forceinline__ float exp_of_minus(float z) {
  return fminf(sizeof(T) == 4 ? expf(-z) : fast_exp2(-LOG2E * z), 1e37f);
}
template <class T>
__device__ __forceinline__ float sigmoid_from(float e) {
  float sigmoid = fast_rcp(1.0f + e);
  if constexpr (sizeof(T) == 4) sigmoid = fmaf(sigmoid, fmaf(-(1.0f + e), sigmoid, 1.0f), sigmoid);
  return sigmoid;
}

// One channel of a parameter, in float32.
__device__ inline float parameter(const Rows& rows, int64_t n, int channel) {
  int64_t i = n * rows.n + channel;
  if (rows.dtype == FLOAT32) return static_cast<const float*>(rows.data)[i];
  if (rows.dtype == FLOAT16) return to_float(static_cast<const __half*>(rows.data)[i]);
  return to_float(static_cast<const __nv_bfloat16*>(rows.data)[i]);
}

// gain = weight · (1 + scale) and offset = bias · (1 + scale) + shift of a channel.
__device__ inline float2 affine_of(const GroupNormProblem& problem, int64_t n, int channel) {
  float gain = problem.weight.data ? parameter(problem.weight, n, channel) : 1.0f;
  float offset = problem.bias.data ? parameter(problem.bias, n, channel) : 0.0f;
  if (problem.scale.data) {
    float film = 1.0f + parameter(problem.scale, n, channel);
    gain *= film;
    offset *= film;
  }
  if (problem.shift.data) offset += parameter(problem.shift, n, channel);
  return {gain, offset};
}

// The part of [N, C, P] that this block and this thread take. A unit is what a lane takes at a time: V channels of one
// position, or V positions of one channel.
template <int V>
struct Tile {
  int64_t n, begin;              // the sample, and the first position
  int split, count;              // the share of the positions, and how many it has
  int first, present;            // the first channel, and how many there are
  int first_group, first_of_it;  // its group, and that one's first channel, counted from `first`
  int groups;                    // groups that have channels here
  int thread, threads, column, lane;
  int channels;                  // of a column
  int units;                     // of the split, which the lanes of a column share
  int left;                      // of those, from this thread's first on; 0 where its column has no channel

  __device__ Tile(const GroupNormProblem& problem, const Division& d) {
    n = problem.samples == 1 ? 0 : blockIdx.x / d.splits;
    split = static_cast<int>(blockIdx.x - n * d.splits);
    begin = static_cast<int64_t>(split) * d.rows;
    count = split == d.splits - 1 ? d.last_rows : d.rows;
    units = d.channels_last ? count : count / V;
    first = static_cast<int>(blockIdx.y) * d.width;
    present = min(d.width, static_cast<int>(problem.channels) - first);
    first_group = divide(first, d.per_group);
    first_of_it = first_group * d.per_group.value - first;
    groups = divide(present - 1 - first_of_it, d.per_group) + 1;
    thread = static_cast<int>(threadIdx.x);
    threads = static_cast<int>(blockDim.x);
    int far = divide(thread, d.neighbours), near = thread - far * d.neighbours.value;
    column = d.channels_last ? near : far;
    lane = d.channels_last ? far : near;
    channels = d.channels_last ? V : 1;
    left = column * channels < present ? units - lane : 0;
  }

  __device__ int channel() const { return column * channels; }  // of the tile
  // The group of a channel of the tile, counted from the first.
  __device__ int group_of(int channel, const Division& d) const { return divide(channel - first_of_it, d.per_group); }
  // The channels of a group that are here: from, and up to.
  __device__ int from(int group, const Division& d) const { return max(first_of_it + group * d.per_group.value, 0); }
  __device__ int up_to(int group, const Division& d) const {
    return min(first_of_it + (group + 1) * d.per_group.value, present);
  }
};

// Where a thread reads or writes a tensor: its first unit, and the step to the next one of its lane.
template <class T>
struct Cursor {
  T* at;
  int64_t step;

  template <int V>
  __device__ Cursor(const Strided& x, const Tile<V>& tile, const Division& d)
      : Cursor(x.data, x.n, x.c, x.p, tile.first + tile.channel(), tile, d) {}

  // `channel`: of the tensor.
  template <int V>
  __device__ Cursor(void* data, int64_t stride_n, int64_t stride_c, int64_t stride_p, int channel, const Tile<V>& tile,
                    const Division& d) {
    int unit = d.channels_last ? 1 : V;
    at = static_cast<T*>(data) + tile.n * stride_n + channel * stride_c + (tile.begin + tile.lane * unit) * stride_p;
    step = stride_p * (d.lanes * unit);
  }
};

// Where it reads x: of a pair (h, skip) each channel lies in one or the other.
template <class T, int V>
__device__ Cursor<const T> input_cursor(const GroupNormProblem& problem, const Tile<V>& tile, const Division& d) {
  int channel = tile.first + tile.channel();
  bool in_h = channel < problem.first_channels;
  return {in_h ? problem.h.data : problem.skip.data, in_h ? problem.h.n : problem.skip.n,
          in_h ? problem.h.c : problem.skip.c,       in_h ? problem.h.p : problem.skip.p,
          in_h ? channel : channel - static_cast<int>(problem.first_channels), tile, d};
}

// V elements as they lie in registers: words of two where they have 16 bits, which the compiler would take apart.
template <class T, int V>
struct Unit {
  static constexpr bool PACKED = sizeof(T) == 2 && V > 1;
  using Element = std::conditional_t<PACKED, uint32_t, T>;
  static constexpr int ELEMENTS = PACKED ? V / 2 : V;
  Vector<Element, ELEMENTS> words;

  static __device__ __forceinline__ Unit load(const T* pointer) {
    return {load_vector<Element, ELEMENTS>(reinterpret_cast<const Element*>(pointer))};
  }
  __device__ __forceinline__ void store(T* pointer) const { store_vector(reinterpret_cast<Element*>(pointer), words); }

  __device__ __forceinline__ void to_floats(float (&values)[V]) const {
    if constexpr (!PACKED) {
      to_float(words, values);
    } else {
#pragma unroll
      for (int i = 0; i < ELEMENTS; ++i) unpack<T>(words.data[i], values[2 * i], values[2 * i + 1]);
    }
  }
  static __device__ __forceinline__ Unit from_floats(const float (&values)[V]) {
    Unit unit;
    if constexpr (!PACKED) {
      unit.words = from_float<T>(values);
    } else {
#pragma unroll
      for (int i = 0; i < ELEMENTS; ++i) unit.words.data[i] = pack<T>(values[2 * i], values[2 * i + 1]);
    }
    return unit;
  }
};

// B units of a lane, all in flight at a time; `left` of its units remain, counted over all lanes.
template <class T, int V, int B>
struct Batch {
  Unit<T, V> units[B];

  // Read them, and leave the cursor at the next.
  __device__ void load(Cursor<const T>& x, int left, int lanes) {
#pragma unroll
    for (int b = 0; b < B; ++b) {
      if (b * lanes < left) units[b] = Unit<T, V>::load(x.at);
      x.at += x.step;
    }
  }
};

// Call use(b) for each unit of a batch that there is; where all are, as in all but the last batch, without asking.
template <int B, class Use>
__device__ __forceinline__ void for_each_unit(int left, int lanes, const Use& use) {
  if ((B - 1) * lanes < left) {
#pragma unroll
    for (int b = 0; b < B; ++b) use(b);
  } else {
#pragma unroll
    for (int b = 0; b < B - 1; ++b)
      if (b * lanes < left) use(b);
  }
}

// The V values of a column: of its channels, or of its one channel V times.
template <int V>
__device__ __forceinline__ void read_channels(float (&values)[V], const float* of_tile, const Tile<V>& tile) {
  const float* column = of_tile + tile.channel();
  if constexpr (V == 1) {
    values[0] = column[0];
  } else if (tile.channels == V) {
    to_float(load_vector<float, V>(column), values);
  } else {
#pragma unroll
    for (int v = 0; v < V; ++v) values[v] = column[0];
  }
}

// The sum of values next to each other.
__device__ __forceinline__ float2 sum_of(const float2* values, int count) {
  float2 total = {0.0f, 0.0f};
#pragma unroll 1
  for (const float2* end = values + count; values < end; ++values) {
    float2 value = *values;
    total.x += value.x;
    total.y += value.y;
  }
  return total;
}

// Two sums of each channel and lane.
template <int V>
__device__ void write_sums(float2* sums, const float (&a)[V], const float (&b)[V], const Tile<V>& tile,
                           const Division& d) {
  float2* row = sums + tile.lane * d.width + tile.channel();
  if (tile.channels == V) {
    Vector<float, 2 * V> both;
#pragma unroll
    for (int v = 0; v < V; ++v) both.data[2 * v] = a[v], both.data[2 * v + 1] = b[v];
    store_vector(&row->x, both);
  } else {
    float2 total = {0.0f, 0.0f};
#pragma unroll
    for (int v = 0; v < V; ++v) total.x += a[v], total.y += b[v];
    *row = total;
  }
}

// Two sums of each group, of each of `sum_threads` threads, which take every `sum_threads`th lane.
template <int V>
__device__ void add_lanes(float2* merged, const float2* sums, const Tile<V>& tile, const Division& d) {
  for (int i = tile.thread; i < tile.groups * d.sum_threads; i += tile.threads) {
    int group = divide(i, d.by_sum_threads), share = i - group * d.sum_threads;
    int from = tile.from(group, d), count = tile.up_to(group, d) - from;
    float2 total = {0.0f, 0.0f};
    for (int lane = share; lane < CMFAST_BOUND(1, d.lanes); lane += d.sum_threads) {
      float2 its = sum_of(sums + lane * d.width + from, count);
      total.x += its.x;
      total.y += its.y;
    }
    merged[i] = total;
  }
}

// The first slot of a group's part: they are [N, G, PARTS, SLOTS].
__device__ inline int64_t slot_of(int64_t n, int group, int part, const GroupNormProblem& problem, const Division& d) {
  return ((n * problem.num_groups + group) * d.parts + part) * d.slots;
}

// The first tile that has channels of a group.
__device__ inline int first_tile(int group, const Division& d) { return divide(group * d.per_group.value, d.by_width); }

// Merge the slots of each group of the tile: Merged(its first slot) adds each, with the elements of x it stands for.
template <class Merged, int V>
__device__ void merge_slots(const float2* slots, float2* merged, float* bases, const Tile<V>& tile,
                            const GroupNormProblem& problem, const Division& d) {
  int threads = d.part_threads * d.split_threads;
  for (int i = tile.thread; i < tile.groups * threads; i += tile.threads) {
    int row = divide(i, d.by_split_threads), first_split = i - row * d.split_threads;
    int index = divide(row, d.by_part_threads), first_part = row - index * d.part_threads;
    int group = tile.first_group + index, begin = group * d.per_group.value, end = begin + d.per_group.value;
    int left = (first_tile(group, d) + first_part) * d.width;
    const float2* its = slots + slot_of(tile.n, group, 0, problem, d);
    Merged sums(its[0]);
    its += first_part * d.slots;
    for (; left < end; left += d.part_threads * d.width) {
      float channels = static_cast<float>(min(left + d.width, end) - max(left, begin));
      float count = channels * static_cast<float>(d.rows), last = channels * static_cast<float>(d.last_rows);
      for (int split = first_split; split < CMFAST_BOUND(2, d.splits); split += d.split_threads)
        sums.add(its[split], split == d.splits - 1 ? last : count);
      its += d.part_threads * d.slots;
    }
    merged[i] = sums.total;
    if (i == index * threads) bases[index] = sums.base;
  }
}

// ---- the host's side of a launch

inline LaunchConfig launch_config(const Plan& plan, const GroupNormProblem& problem, int shared_bytes, void* stream) {
  LaunchConfig config;
  config.grid = dim3(static_cast<unsigned>(problem.samples * plan.division.splits),
                     static_cast<unsigned>(plan.division.tiles));
  config.block = dim3(static_cast<unsigned>(plan.division.columns * plan.division.lanes));
  config.shared_bytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  if (plan.cluster) config.cluster_x = static_cast<unsigned>(plan.cluster);
  return config;
}

// run(an element of the dtype, std::integral_constant of the elements of an access)
template <class T, class Run>
std::string for_vector(int vector, const Run& run) {
  if (vector == 1) return run(T(), std::integral_constant<int, 1>());
  return run(T(), std::integral_constant<int, 16 / sizeof(T)>());
}
template <class Run>
std::string for_elements(int dtype, int vector, const Run& run) {
  if (dtype == FLOAT32) return for_vector<float>(vector, run);
  if (dtype == FLOAT16) return for_vector<__half>(vector, run);
  return for_vector<__nv_bfloat16>(vector, run);
}

}  // namespace cmfast
