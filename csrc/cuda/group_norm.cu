// The forward kernels of group norm: see kernels/group_norm.py for the formula and group_norm_plan.h for the division.
//
//   u = x + add,  û = (u - mean_g) · rstd_g,  z = û · gain + offset,  y = z or z · sigmoid(z)
//
// Since all but x is constant over the positions of a channel, z is one multiply-add of x. A thread keeps to one column
// of its tile, so what it multiplies by stays in registers, and the same code serves channels next to each other
// (NHWC) and positions next to each other (NCHW).
//
// Two launches: `statistics_kernel` writes the mean and the sum of squared deviations of each group's part in a tile to
// a slot of its own; `apply_kernel`, on the same grid, merges the slots of the groups it touches and writes y. Where
// the blocks of a cluster (or one alone) can hold all positions of whole groups, `resident_kernel` reads x once. No
// atomics: a slot has one writer and its reader a fixed order, so results are bit-identical from run to run.

#include "group_norm.h"

#include "group_norm_tile.cuh"

namespace cmfast {
namespace {

constexpr int BATCH = 6;

// The values of a group in the tile are taken less `base` in the sums: with a mean far from 0 their squares would lose
// the variance. ADDED has what was added to x.
template <int V>
__device__ void stage_origins(float* rows, const float* bases, const Tile<V>& tile, const Division& d) {
  for (int i = tile.thread; i < tile.present; i += tile.threads)
    rows[ORIGIN * d.width + i] = bases[tile.group_of(i, d)] - rows[ADDED * d.width + i];
}

// The average of some values of each group: of its channels in `lanes` units, which lie `lane_step` elements apart, and
// in them `channel_step` from channel to channel.
template <class T, int V>
__device__ void average_first(float* bases, const float* rows, const T* first, int lanes, int lane_step,
                              int channel_step, const Tile<V>& tile, const Division& d) {
  for (int i = tile.thread; i < tile.groups; i += tile.threads) {
    int from = tile.from(i, d), up_to = sizeof(T) == 4 ? tile.up_to(i, d) : from + 1;
    float total = 0.0f;
    for (int channel = from; channel < up_to; ++channel) {
      for (int lane = 0; lane < lanes; ++lane)
        total += to_float(first[lane * lane_step + channel * channel_step]) + rows[ADDED * d.width + channel];
    }
    bases[i] = total * fast_rcp(static_cast<float>(lanes * (up_to - from)));
  }
}

template <class T, int V>
struct Moments {
  float sum[V] = {}, square[V] = {};

  __device__ void add(const Unit<T, V>& x, const float (&origin)[V]) {
    float values[V];
    x.to_floats(values);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      float difference = values[v] - origin[v];
      sum[v] += difference;
      square[v] = fmaf(difference, difference, square[v]);
    }
  }
};

// The mean of a group's part in the tile, and the sum of its squared deviations from it.
template <int V>
__device__ float2 moments_of(int group, const float2* merged, const float* bases, const Tile<V>& tile,
                             const Division& d) {
  float2 sums = sum_of(merged + group * d.sum_threads, d.sum_threads);
  float count = static_cast<float>(tile.count) * static_cast<float>(tile.up_to(group, d) - tile.from(group, d));
  float apart = sums.x * fast_rcp(count);
  return {bases[group] + apart, not_negative(sums.y - sums.x * apart)};
}

// What is merged of a group: Σ count · (mean - base) and Σ deviation + count · (mean - base)² over parts that have
// `count` elements each, their mean and their squared deviations from it (Chan, Golub and LeVeque 1979). base: the mean
// of the first.
struct MergedMoments {
  float2 total = {0.0f, 0.0f};
  float base;

  __device__ explicit MergedMoments(float2 first) : base(first.x) {}
  __device__ void add(float2 moments, float count) {
    float apart = moments.x - base, weighted = count * apart;
    total.x += weighted;
    total.y += moments.y + weighted * apart;
  }
};

// The parameters of each channel of the tile: add, gain and offset.
template <int V>
__device__ void stage_parameters(float* rows, const Tile<V>& tile, const GroupNormProblem& problem, const Division& d) {
  for (int i = tile.thread; i < tile.present; i += tile.threads) {
    int channel = tile.first + i;
    float2 affine = affine_of(problem, tile.n, channel);
    rows[ADDED * d.width + i] = problem.add.data ? parameter(problem.add, tile.n, channel) : 0.0f;
    rows[GAIN * d.width + i] = affine.x;
    rows[OFFSET * d.width + i] = affine.y;
  }
}

// Make of them, which this same thread staged, what leads from x to the output; and write mean and rstd.
//
// 32-bit outputs get z = (x + centre) · gain + offset: one multiply-add would keep the rounding of what the mean
// cancels. 16-bit outputs have room for it. There SiLU is t / (-log2 e · (1 + 2^t)) of t = -log2 e · z.
template <class T, int V>
__device__ void fold_parameters(float* rows, const float2* merged, int threads, const float* bases,
                                const GroupNormOutput& output, const Tile<V>& tile, const GroupNormProblem& problem,
                                const Division& d) {
  for (int i = tile.thread; i < tile.present; i += tile.threads) {
    int index = tile.group_of(i, d);
    float2 sums = sum_of(merged + index * threads, threads);
    float mean = bases[index] + sums.x * d.inverse_size;
    float variance = not_negative(sums.y - sums.x * (sums.x * d.inverse_size)) * d.inverse_size;
    float rstd = rsqrtf(variance + problem.eps);
    if (tile.split == 0 && tile.first_of_it + index * d.per_group.value == i) {
      int64_t at = tile.n * problem.num_groups + tile.first_group + index;
      output.mean[at] = mean;
      output.rstd[at] = rstd;
    }
    float centre = rows[ADDED * d.width + i] - mean;
    // Where all values are the same, as those of a group of one are, nothing is left of them, and no rounding either.
    float gain = variance > 0.0f ? rows[GAIN * d.width + i] * rstd : 0.0f, offset = rows[OFFSET * d.width + i];
    if constexpr (sizeof(T) == 2) {
      float scale = problem.silu ? -LOG2E : 1.0f;
      offset = (offset + centre * gain) * scale;
      gain *= scale;
    }
    rows[ADDED * d.width + i] = centre;
    rows[GAIN * d.width + i] = gain;
    rows[OFFSET * d.width + i] = offset;
  }
}

// The output of a column's units.
template <class T, int V>
struct Output {
  float centre[sizeof(T) == 4 ? V : 1], gain[V], offset[V];
  bool silu;

  __device__ Output(const float* rows, bool silu, const Tile<V>& tile, const Division& d) : silu(silu) {
    if constexpr (sizeof(T) == 4) read_channels(centre, rows + ADDED * d.width, tile);
    read_channels(gain, rows + GAIN * d.width, tile);
    read_channels(offset, rows + OFFSET * d.width, tile);
  }

  __device__ Unit<T, V> of(const Unit<T, V>& x) const {
    float values[V];
    x.to_floats(values);
#pragma unroll
    for (int v = 0; v < V; ++v)
      values[v] = fmaf(sizeof(T) == 4 ? values[v] + centre[v] : values[v], gain[v], offset[v]);
    if (silu) {
#pragma unroll
      for (int v = 0; v < V; ++v) {
        if constexpr (sizeof(T) == 4) values[v] *= sigmoid_from<T>(exp_of_minus<T>(values[v]));
        else values[v] *= fast_rcp(fmaf(fast_exp2(values[v]), -LOG2E, -LOG2E));
      }
    }
    return Unit<T, V>::from_floats(values);
  }
};

template <class T, int V>
__global__ void __launch_bounds__(THREADS) statistics_kernel(GroupNormProblem problem, Division d, float2* slots) {
  CMFAST_SHARED(memory);
  Tile<V> tile(problem, d);
  Cursor<const T> x = input_cursor<T>(problem, tile, d);
  Batch<T, V, BATCH> batch;
  int left = tile.left;
  batch.load(x, left, d.lanes);

  float* rows = shared_at<float>(memory, d.shared.channels);
  float2* merged = shared_at<float2>(memory, d.shared.merged);
  float* bases = shared_at<float>(memory, d.shared.bases);
  T* first = shared_at<T>(memory, d.shared.first);
  if (tile.lane < d.first_lanes && left > 0) batch.units[0].store(first + (tile.lane * d.columns + tile.column) * V);
  for (int i = tile.thread; i < tile.present; i += tile.threads)
    rows[ADDED * d.width + i] = problem.add.data ? parameter(problem.add, tile.n, tile.first + i) : 0.0f;
  CMFAST_SYNC(1);
  average_first(bases, rows, first, min(d.first_lanes, tile.units), d.columns * V,
                d.channels_last ? 1 : V, tile, d);
  CMFAST_SYNC(2);
  stage_origins(rows, bases, tile, d);
  CMFAST_SYNC(3);

  Moments<T, V> moments;
  if (left > 0) {
    float origin[V];
    read_channels(origin, rows + ORIGIN * d.width, tile);
    for (;;) {
      for_each_unit<BATCH>(left, d.lanes, [&](int b) { moments.add(batch.units[b], origin); });
      left -= BATCH * d.lanes;
      if (left <= 0) break;
      batch.load(x, left, d.lanes);
    }
  }

  float2* sums = shared_at<float2>(memory, d.shared.sums);
  write_sums(sums, moments.sum, moments.square, tile, d);
  CMFAST_SYNC(4);
  add_lanes(merged, sums, tile, d);
  CMFAST_SYNC(5);
  for (int i = tile.thread; i < tile.groups; i += tile.threads) {
    int group = tile.first_group + i, part = static_cast<int>(blockIdx.y) - first_tile(group, d);
    slots[slot_of(tile.n, group, part, problem, d) + tile.split] = moments_of(i, merged, bases, tile, d);
  }
}

template <class T, int V>
__global__ void __launch_bounds__(THREADS)
    apply_kernel(GroupNormProblem problem, Division d, const float2* slots, GroupNormOutput output) {
  CMFAST_SHARED(memory);
  Tile<V> tile(problem, d);
  Cursor<const T> x = input_cursor<T>(problem, tile, d);
  Cursor<T> y(output.y, tile, d);
  Batch<T, V, BATCH> batch;
  int left = tile.left;
  batch.load(x, left, d.lanes);

  float* rows = shared_at<float>(memory, d.shared.channels);
  float2* merged = shared_at<float2>(memory, d.shared.merged);
  float* bases = shared_at<float>(memory, d.shared.bases);
  stage_parameters(rows, tile, problem, d);
  merge_slots<MergedMoments>(slots, merged, bases, tile, problem, d);
  CMFAST_SYNC(7);
  fold_parameters<T>(rows, merged, d.part_threads * d.split_threads, bases, output, tile, problem, d);
  CMFAST_SYNC(8);

  if (left <= 0) return;
  Output<T, V> of_column(rows, problem.silu, tile, d);
  for (;;) {
    for_each_unit<BATCH>(left, d.lanes, [&](int b) {
      of_column.of(batch.units[b]).store(y.at);
      y.at += y.step;
    });
    left -= BATCH * d.lanes;
    if (left <= 0) break;
    batch.load(x, left, d.lanes);
  }
}

// One launch: the blocks of a cluster, or one alone, have all positions of the whole groups of a tile, and keep them in
// shared memory, each thread its own.
template <class T, int V>
__global__ void __launch_bounds__(THREADS, 1)
    resident_kernel(GroupNormProblem problem, Division d, GroupNormOutput output) {
  CMFAST_SHARED(memory);
  Tile<V> tile(problem, d);
  Cursor<const T> x = input_cursor<T>(problem, tile, d);
  T* held = shared_at<T>(memory, d.shared.held);
  T* mine = held + tile.thread * V;
  int step = tile.threads * V;
  T* next = mine;
  for (int left = tile.left; left > 0; left -= d.lanes) {
    if constexpr (V > 1) cp_async_16(next, x.at, true);
    else *next = *x.at;
    next += step;
    x.at += x.step;
  }
  cp_async_commit();
  float* rows = shared_at<float>(memory, d.shared.channels);
  float2* merged = shared_at<float2>(memory, d.shared.merged);
  float* bases = shared_at<float>(memory, d.shared.bases);
  float2* sums = shared_at<float2>(memory, d.shared.sums);
  float2* moments = shared_at<float2>(memory, d.shared.moments);
  stage_parameters(rows, tile, problem, d);
  CMFAST_CP_ASYNC_WAIT(9, 0);
  CMFAST_SYNC(10);
  average_first(bases, rows, held, 1, 0, d.channels_last ? 1 : d.lanes * V, tile, d);
  CMFAST_SYNC(11);

  // Twice: what the first time gives for the mean leaves nothing to cancel in the second.
  for (int time = 0; time < 2; ++time) {
    stage_origins(rows, bases, tile, d);
    CMFAST_SYNC(12);
    Moments<T, V> its;
    if (tile.left > 0) {
      float origin[V];
      read_channels(origin, rows + ORIGIN * d.width, tile);
      for (const T* unit = mine; unit < next; unit += step) its.add(Unit<T, V>::load(unit), origin);
    }
    write_sums(sums, its.sum, its.square, tile, d);
    CMFAST_SYNC(13);
    add_lanes(merged, sums, tile, d);
    CMFAST_SYNC(14);
    for (int i = tile.thread; i < tile.groups; i += tile.threads) {
      moments[i] = moments_of(i, merged, bases, tile, d);
      bases[i] = moments[i].x;
    }
    if (time == 0) CMFAST_SYNC(15);
  }
  if (d.splits > 1) CMFAST_SYNC_CLUSTER(16);
  else CMFAST_SYNC(17);
  for (int i = tile.thread; i < tile.groups; i += tile.threads) {
    MergedMoments group(d.splits > 1 ? cluster_shared(moments, 0)[i] : moments[i]);
    for (int split = 0; split < d.splits; ++split) {
      float count = static_cast<float>(split == d.splits - 1 ? d.last_rows : d.rows) *
                    static_cast<float>(d.per_group.value);
      group.add(d.splits > 1 ? cluster_shared(moments, split)[i] : moments[i], count);
    }
    merged[i] = group.total;
    bases[i] = group.base;
  }
  // No block may end while others read its moments.
  if (d.splits > 1) CMFAST_SYNC_CLUSTER(18);
  else CMFAST_SYNC(19);
  fold_parameters<T>(rows, merged, 1, bases, output, tile, problem, d);
  CMFAST_SYNC(20);

  if (tile.left <= 0) return;
  Output<T, V> of_column(rows, problem.silu, tile, d);
  Cursor<T> y(output.y, tile, d);
  for (const T* unit = mine; unit < next; unit += step) {
    of_column.of(Unit<T, V>::load(unit)).store(y.at);
    y.at += y.step;
  }
}

template <class T, int V>
std::string run(const Plan& plan, const GroupNormProblem& problem, const GroupNormOutput& output, float2* slots,
                void* stream) {
  const Division& d = plan.division;
  if (plan.cluster)
    return launch(resident_kernel<T, V>, launch_config(plan, problem, d.shared.resident, stream), problem, d, output);
  std::string error = launch(statistics_kernel<T, V>, launch_config(plan, problem, d.shared.statistics, stream),
                             problem, d, slots);
  if (!error.empty()) return error;
  return launch(apply_kernel<T, V>, launch_config(plan, problem, d.shared.apply, stream), problem, d, slots, output);
}

}  // namespace

int64_t group_norm_workspace(const GroupNormProblem& problem, const GroupNormOutput& output, int capability) {
  if (!check_group_norm(problem).empty()) return 0;
  Plan plan = plan_group_norm(problem, output.y, capability);
  return plan.cluster ? 0 : 2 * plan.slots(problem);
}

std::string group_norm(const GroupNormProblem& problem, const GroupNormOutput& output, Workspace workspace,
                       int capability, void* stream) {
  std::string error = check_group_norm(problem);
  if (!error.empty()) return "group_norm: " + error;
  if (!output.y.data || !output.mean || !output.rstd) return "group_norm: y, mean and rstd need memory";
  Plan plan = plan_group_norm(problem, output.y, capability);
  error = check_plan(plan, problem, plan.cluster ? 0 : 2 * plan.slots(problem), workspace);
  if (!error.empty()) return "group_norm: " + error;
  auto* slots = static_cast<float2*>(static_cast<void*>(workspace.data));
  error = for_elements(problem.dtype, plan.vector, [&](auto element, auto vector) {
    return run<decltype(element), decltype(vector)::value>(plan, problem, output, slots, stream);
  });
  return error.empty() ? error : "group_norm: " + error;
}

}  // namespace cmfast
