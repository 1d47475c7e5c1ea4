// The backward kernels of group norm, in the notation of group_norm.cu: with dz = dy · activation'(z) and D channels a
// group,
//
//   dx = rstd_g · (gain · dz + û · slope + constant),  slope = -Σ_g gain·dz·û / (D·P),  constant = -Σ_g gain·dz / (D·P)
//
// `sums_kernel` writes Σ dz and Σ dz·û of each split and channel, and what they add to the group's two sums to a slot
// of its own; `gradient_kernel`, on the same grid, merges those and writes dx, and its blocks of the first split the sums
// of each channel.

#include "group_norm.h"
#include "group_norm_tile.cuh"

namespace cmfast {
namespace {

constexpr int BATCH = 3;  // of x, and as many of dy

// Add to a sum and to what rounding took from it (Knuth's two-sum). The sums of a channel are results, and large beside
// what is added to them.
__device__ __forceinline__ void add_precisely(float& total, float& rest, float value) {
  float sum = total + value, added = sum - total;
  rest += (total - (sum - added)) + (value - added);
  total = sum;
}

struct PreciseSums {
  float2 total = {0.0f, 0.0f}, rest = {0.0f, 0.0f};

  __device__ void add(float2 value) {
    add_precisely(total.x, rest.x, value.x);
    add_precisely(total.y, rest.y, value.y);
  }
  __device__ float2 value() const { return {total.x + rest.x, total.y + rest.y}; }
};

// What each channel of the tile is multiplied by, up to z.
template <int V>
__device__ void stage_channels(float* rows, const GroupNormGradient& gradient, const Tile<V>& tile,
                               const GroupNormProblem& problem, const Division& d) {
  for (int i = tile.thread; i < tile.present; i += tile.threads) {
    int channel = tile.first + i;
    int64_t group = tile.n * problem.num_groups + tile.first_group + tile.group_of(i, d);
    float2 affine = affine_of(problem, tile.n, channel);
    rows[ADDED * d.width + i] = problem.add.data ? parameter(problem.add, tile.n, channel) : 0.0f;
    rows[MEAN * d.width + i] = gradient.mean[group];
    rows[RSTD * d.width + i] = gradient.rstd[group];
    rows[GAIN * d.width + i] = affine.x;
    rows[OFFSET * d.width + i] = affine.y;
  }
}

// û and dz of a column's units. add - mean in one number would be rounded the same way at all positions, and so add up
// in the sums.
template <class T, int V>
struct Derivative {
  float added[V], mean[V], rstd[V], gain[V], offset[V];
  bool silu;

  __device__ Derivative(const float* rows, bool silu, const Tile<V>& tile, const Division& d) : silu(silu) {
    read_channels(added, rows + ADDED * d.width, tile);
    read_channels(mean, rows + MEAN * d.width, tile);
    read_channels(rstd, rows + RSTD * d.width, tile);
    read_channels(gain, rows + GAIN * d.width, tile);
    read_channels(offset, rows + OFFSET * d.width, tile);
  }

  __device__ void of(const Unit<T, V>& x, const Unit<T, V>& dy, float (&u)[V], float (&dz)[V]) const {
    x.to_floats(u);
    dy.to_floats(dz);
#pragma unroll
    for (int v = 0; v < V; ++v) u[v] = (u[v] + added[v] - mean[v]) * rstd[v];
    if (silu) {
#pragma unroll
      for (int v = 0; v < V; ++v) dz[v] *= silu_derivative(fmaf(u[v], gain[v], offset[v]));
    }
  }

  // s · (1 + z · (1 - s)) with s = sigmoid(z) = 1 / (1 + e), where 1 - s = e · s does not cancel.
  static __device__ __forceinline__ float silu_derivative(float z) {
    float e = exp_of_minus<T>(z), s = sigmoid_from<T>(e);
    return fmaf(z * s, e * s, s);
  }
};

// The two sums of a group over its slots.
struct AddedSums {
  float2 total = {0.0f, 0.0f};
  float base = 0.0f;

  __device__ explicit AddedSums(float2) {}
  __device__ void add(float2 sums, float) {
    total.x += sums.x;
    total.y += sums.y;
  }
};

// channel_sums: float2 [N, splits, C].
template <class T, int V>
__global__ void __launch_bounds__(THREADS)
    sums_kernel(GroupNormProblem problem, Division d, GroupNormGradient gradient, float2* slots, float2* channel_sums) {
  CMFAST_SHARED(memory);
  Tile<V> tile(problem, d);
  Cursor<const T> x = input_cursor<T>(problem, tile, d), dy(gradient.dy, tile, d);
  Batch<T, V, BATCH> x_batch, dy_batch;
  int left = tile.left;
  x_batch.load(x, left, d.lanes);
  dy_batch.load(dy, left, d.lanes);
  float* rows = shared_at<float>(memory, d.shared.channels);
  stage_channels(rows, gradient, tile, problem, d);
  CMFAST_SYNC(1);

  constexpr bool PRECISE = sizeof(T) == 4;
  float dz_sum[V] = {}, dzu_sum[V] = {}, dz_rest[PRECISE ? V : 1] = {}, dzu_rest[PRECISE ? V : 1] = {};
  if (left > 0) {
    Derivative<T, V> derivative(rows, problem.silu, tile, d);
    for (;;) {
      for_each_unit<BATCH>(left, d.lanes, [&](int b) {
        float u[V], dz[V];
        derivative.of(x_batch.units[b], dy_batch.units[b], u, dz);
#pragma unroll
        for (int v = 0; v < V; ++v) {
          if constexpr (PRECISE) {
            add_precisely(dz_sum[v], dz_rest[v], dz[v]);
            add_precisely(dzu_sum[v], dzu_rest[v], dz[v] * u[v]);
          } else {
            dz_sum[v] += dz[v];
            dzu_sum[v] = fmaf(dz[v], u[v], dzu_sum[v]);
          }
        }
      });
      left -= BATCH * d.lanes;
      if (left <= 0) break;
      x_batch.load(x, left, d.lanes);
      dy_batch.load(dy, left, d.lanes);
    }
  }

  if constexpr (PRECISE) {
#pragma unroll
    for (int v = 0; v < V; ++v) dz_sum[v] += dz_rest[v], dzu_sum[v] += dzu_rest[v];
  }
  float2* sums = shared_at<float2>(memory, d.shared.sums);
  float2* partial = shared_at<float2>(memory, d.shared.partial);
  write_sums(sums, dz_sum, dzu_sum, tile, d);
  CMFAST_SYNC(2);
  for (int i = tile.thread; i < tile.present * d.channel_threads; i += tile.threads) {
    int channel = divide(i, d.by_channel_threads), share = i - channel * d.channel_threads;
    PreciseSums total;
    for (int lane = share; lane < CMFAST_BOUND(7, d.lanes); lane += d.channel_threads)
      total.add(sums[lane * d.width + channel]);
    partial[i] = total.value();
  }
  CMFAST_SYNC(3);
  // From here on `sums` has one for each channel, with its gain.
  float2* its_sums = channel_sums + (tile.n * d.splits + tile.split) * problem.channels + tile.first;
  for (int i = tile.thread; i < tile.present; i += tile.threads) {
    PreciseSums precise;
    for (int share = 0; share < d.channel_threads; ++share) precise.add(partial[i * d.channel_threads + share]);
    float2 total = precise.value();
    its_sums[i] = total;
    float gain = rows[GAIN * d.width + i];
    sums[i] = {gain * total.x, gain * total.y};
  }
  CMFAST_SYNC(4);
  for (int i = tile.thread; i < tile.groups; i += tile.threads) {
    int group = tile.first_group + i, part = static_cast<int>(blockIdx.y) - first_tile(group, d);
    int from = tile.from(i, d);
    slots[slot_of(tile.n, group, part, problem, d) + tile.split] = sum_of(sums + from, tile.up_to(i, d) - from);
  }
}

template <class T, int V>
__global__ void __launch_bounds__(THREADS)
    gradient_kernel(GroupNormProblem problem, Division d, GroupNormGradient gradient, const float2* slots,
                    const float2* channel_sums) {
  CMFAST_SHARED(memory);
  Tile<V> tile(problem, d);
  Cursor<const T> x = input_cursor<T>(problem, tile, d), dy(gradient.dy, tile, d);
  Cursor<T> dx(gradient.dx, tile, d);
  Batch<T, V, BATCH> x_batch, dy_batch;
  int left = tile.left;
  x_batch.load(x, left, d.lanes);
  dy_batch.load(dy, left, d.lanes);
  float* rows = shared_at<float>(memory, d.shared.channels);
  float2* merged = shared_at<float2>(memory, d.shared.merged);
  stage_channels(rows, gradient, tile, problem, d);
  merge_slots<AddedSums>(slots, merged, shared_at<float>(memory, d.shared.bases), tile, problem, d);
  CMFAST_SYNC(5);
  for (int i = tile.thread; i < tile.present; i += tile.threads) {
    int threads = d.part_threads * d.split_threads;
    float2 of_group = sum_of(merged + tile.group_of(i, d) * threads, threads);
    rows[CONSTANT * d.width + i] = -of_group.x * d.inverse_size;
    rows[SLOPE * d.width + i] = -of_group.y * d.inverse_size;
  }
  if (tile.split == 0) {
    for (int i = tile.thread; i < tile.present; i += tile.threads) {
      PreciseSums total;
      for (int split = 0; split < d.splits; ++split)
        total.add(channel_sums[(tile.n * d.splits + split) * problem.channels + tile.first + i]);
      gradient.dz_sum[tile.n * problem.channels + tile.first + i] = total.value().x;
      gradient.dzu_sum[tile.n * problem.channels + tile.first + i] = total.value().y;
    }
  }
  CMFAST_SYNC(6);

  if (left <= 0) return;
  Derivative<T, V> derivative(rows, problem.silu, tile, d);
  float slope[V], constant[V];
  read_channels(slope, rows + SLOPE * d.width, tile);
  read_channels(constant, rows + CONSTANT * d.width, tile);
  for (;;) {
    for_each_unit<BATCH>(left, d.lanes, [&](int b) {
      float u[V], dz[V];
      derivative.of(x_batch.units[b], dy_batch.units[b], u, dz);
#pragma unroll
      for (int v = 0; v < V; ++v)
        dz[v] = derivative.rstd[v] * fmaf(derivative.gain[v], dz[v], fmaf(u[v], slope[v], constant[v]));
      Unit<T, V>::from_floats(dz).store(dx.at);
      dx.at += dx.step;
    });
    left -= BATCH * d.lanes;
    if (left <= 0) break;
    x_batch.load(x, left, d.lanes);
    dy_batch.load(dy, left, d.lanes);
  }
}

// The workspace: the slots, then the sums of the channels of each split.
int64_t workspace_floats(const Plan& plan, const GroupNormProblem& problem) {
  return 2 * (plan.slots(problem) + problem.samples * plan.division.splits * problem.channels);
}

}  // namespace

int64_t group_norm_backward_workspace(const GroupNormProblem& problem, const GroupNormGradient& gradient) {
  if (!check_group_norm(problem).empty()) return 0;
  return workspace_floats(plan_group_norm_backward(problem, gradient.dy, gradient.dx), problem);
}

std::string group_norm_backward(const GroupNormProblem& problem, const GroupNormGradient& gradient,
                                Workspace workspace, void* stream) {
  std::string error = check_group_norm(problem);
  if (!error.empty()) return "group_norm_backward: " + error;
  if (!gradient.dy.data || !gradient.dx.data || !gradient.mean || !gradient.rstd || !gradient.dz_sum ||
      !gradient.dzu_sum)
    return "group_norm_backward: dy, dx, mean, rstd, dz_sum and dzu_sum need memory";
  Plan plan = plan_group_norm_backward(problem, gradient.dy, gradient.dx);
  error = check_plan(plan, problem, workspace_floats(plan, problem), workspace);
  if (!error.empty()) return "group_norm_backward: " + error;
  const Division& d = plan.division;
  auto* slots = static_cast<float2*>(static_cast<void*>(workspace.data));
  float2* channel_sums = slots + plan.slots(problem);
  error = for_elements(problem.dtype, plan.vector, [&](auto element, auto vector) {
    using T = decltype(element);
    constexpr int V = decltype(vector)::value;
    std::string first = launch(sums_kernel<T, V>, launch_config(plan, problem, d.shared.gradient, stream), problem, d,
                               gradient, slots, channel_sums);
    if (!first.empty()) return first;
    return launch(gradient_kernel<T, V>, launch_config(plan, problem, d.shared.apply, stream), problem, d, gradient,
                  slots, channel_sums);
  });
  return error.empty() ? error : "group_norm_backward: " + error;
}

}  // namespace cmfast
