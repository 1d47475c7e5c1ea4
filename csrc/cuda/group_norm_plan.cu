#include "group_norm_plan.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace cmfast {
namespace {

// Blocks that a launch should have at least: two for each of an H100's 132 multiprocessors. A constant, so that results
// do not depend on the device.
constexpr int64_t BLOCKS = 264;
// A block of the two launches with more elements of x than this would share the work unevenly ...
constexpr int64_t MOST_ELEMENTS = 16384;
// ... and with fewer it would move more slots than data.
constexpr int64_t LEAST_ELEMENTS = 2048;
// Elements that a block of the single launch may hold where it stands alone,
constexpr int64_t RESIDENT_ELEMENTS = 16384;
// and bytes where it is one of a cluster, whose multiprocessors have shared memory for three such blocks each.
constexpr int64_t CLUSTER_BYTES = 65536;
// Bytes of shared memory that a block of the single launch takes at most: what every device of sm_80 and newer has.
constexpr int64_t RESIDENT_BYTES = 99 * 1024;
// The largest grid along its second axis, that of the tiles.
constexpr int64_t MOST_TILES = 65535;
// The largest cluster that every device of sm_90 and newer runs.
constexpr int MOST_CLUSTER = 8;
constexpr int MOST_THREADS = 256;
// Units of x (vectors, or elements where those do not fit) that a thread should have: two batches in flight.
constexpr int64_t UNITS = 12;

// Lanes whose first units are averaged for what the values of a tile are taken less. One is near enough for 16 bits.
constexpr int64_t FIRST_LANES = 8;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
int64_t power_of_two_from(int64_t a) {
  int64_t power = 1;
  while (power < a) power *= 2;
  return power;
}
int64_t power_of_two_to(int64_t a) { return a < 1 ? 1 : power_of_two_from(a / 2 + 1); }

Divisor divisor(int64_t value) { return {static_cast<int>(value), 1.0f / static_cast<float>(value), 0.5f / static_cast<float>(value)}; }

int element_size(const GroupNormProblem& problem) { return problem.dtype == 0 ? 4 : 2; }

// The elements of an access: 16 bytes where every row of every tensor is a multiple of them, otherwise one.
int vector_of(const GroupNormProblem& problem, bool channels_last, std::initializer_list<Strided> others) {
  int vector = 16 / element_size(problem);
  int64_t extents[] = {problem.first_channels, problem.channels};
  bool fits = channels_last ? extents[0] % vector == 0 && extents[1] % vector == 0 : problem.positions % vector == 0;
  auto lies = [&](const Strided& x) {
    int64_t inner = channels_last ? x.c : x.p, outer = channels_last ? x.p : x.c;
    return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && inner == 1 && outer % vector == 0 && x.n % vector == 0;
  };
  fits = fits && lies(problem.h) && (!problem.skip.data || lies(problem.skip));
  for (const Strided& x : others) fits = fits && lies(x);
  return fits ? vector : 1;
}

// Splits up to which slots cost little beside x. A block of the second launch reads those of its groups for all
// splits: all of them read splits² times the groups of a tile, or the tiles of a group. The constant keeps that to a
// few hundredths of x.
int64_t most_splits(int64_t positions, double per_group, double width) {
  double slots_per_split = std::max(per_group / width, width / per_group);
  int64_t most = static_cast<int64_t>(std::sqrt(static_cast<double>(positions) * width / (48 * slots_per_split)));
  return std::max<int64_t>(1, std::min(most, static_cast<int64_t>(positions * width) / LEAST_ELEMENTS));
}

void place(SharedOffsets& at, const Division& d, int64_t unit_bytes, int64_t held_units) {
  int64_t next = 0;
  auto take = [&](int& offset, int64_t bytes) {
    offset = static_cast<int>(next);
    next += round_up(bytes, 16);
  };
  int64_t width = d.width, groups = d.groups;
  take(at.channels, 7 * 4 * width);
  take(at.merged, 8 * groups * std::max(d.sum_threads, d.part_threads * d.split_threads));
  take(at.bases, 4 * groups);
  at.apply = static_cast<int>(next);
  take(at.first, unit_bytes * d.columns * d.first_lanes);
  take(at.sums, 8 * width * d.lanes);
  at.statistics = static_cast<int>(next);
  take(at.partial, 8 * width * d.channel_threads);
  at.gradient = static_cast<int>(next);
  take(at.moments, 8 * groups);
  take(at.held, unit_bytes * held_units);
  at.resident = static_cast<int>(next);
}

// Threads that share the sum of `items`: about as many as each then adds, which another thread adds in turn.
int sharers(int64_t items, int64_t threads) {
  auto root = static_cast<int64_t>(std::sqrt(1.5 * static_cast<double>(items)));
  return static_cast<int>(power_of_two_to(std::min({root, threads, int64_t{32}})));
}

// Fill in what follows from the width of a tile and the number of splits, of which there may be fewer in the end.
void divide(const GroupNormProblem& problem, Plan& plan, int64_t width, int64_t splits, bool held) {
  Division& d = plan.division;
  int64_t per_group = problem.channels / problem.num_groups;
  int64_t unit = d.channels_last ? 1 : plan.vector;  // positions that a lane takes at a time
  int64_t units = problem.positions / unit;
  int64_t columns = width / (d.channels_last ? plan.vector : 1);
  int64_t share = ceil_div(units, splits);
  int64_t whole_warps = 32 / std::gcd<int64_t>(32, columns);
  int64_t most_lanes = MOST_THREADS / columns;
  // Where the lanes of a column are next to each other they end with a sector.
  int64_t sector = std::max<int64_t>(1, 32 / (plan.vector * element_size(problem)));
  if (!d.channels_last && most_lanes > sector) most_lanes -= most_lanes % sector;
  int64_t lanes = std::min(round_up(ceil_div(share, UNITS), whole_warps), most_lanes);
  lanes = std::max<int64_t>(1, std::min(lanes, share));
  if (!held) share = round_up(share, lanes);  // no lane is idle but in the last split
  int64_t threads = columns * lanes;
  d.width = static_cast<int>(width);
  d.tiles = static_cast<int>(ceil_div(problem.channels, width));
  d.columns = static_cast<int>(columns);
  d.lanes = static_cast<int>(lanes);
  d.rows = static_cast<int>(share * unit);
  d.splits = static_cast<int>(ceil_div(units, share));
  d.last_rows = static_cast<int>(problem.positions - (d.splits - 1) * share * unit);

  // Within a tile a group begins at a multiple of `run`.
  int64_t run = std::gcd(per_group, width);
  d.groups = static_cast<int>(std::min<int64_t>(ceil_div(per_group - run + width, per_group), problem.num_groups));
  d.parts = static_cast<int>(std::min<int64_t>(ceil_div(width - run + per_group, width), d.tiles));
  d.slots = static_cast<int>(d.splits < 4 ? d.splits : round_up(d.splits, 4));
  d.first_lanes = static_cast<int>(std::min<int64_t>(lanes, element_size(problem) == 4 ? FIRST_LANES : 1));
  int64_t threads_per_group = threads / d.groups;
  int sum_threads = sharers(lanes * std::min(per_group, width), threads_per_group);
  d.sum_threads = static_cast<int>(std::min<int64_t>(sum_threads, power_of_two_from(lanes)));
  int slot_threads = held ? 1 : sharers(int64_t{d.parts} * d.splits, threads_per_group);
  d.split_threads = static_cast<int>(std::min<int64_t>(slot_threads, power_of_two_from(d.splits)));
  d.part_threads = slot_threads / d.split_threads;
  d.channel_threads = sharers(lanes, threads / width);
  d.inverse_size = static_cast<float>(1.0 / (static_cast<double>(per_group) * static_cast<double>(problem.positions)));
  d.per_group = divisor(per_group);
  d.by_width = divisor(width);
  d.by_sum_threads = divisor(d.sum_threads);
  d.by_part_threads = divisor(d.part_threads);
  d.by_split_threads = divisor(d.split_threads);
  d.by_channel_threads = divisor(d.channel_threads);
  d.neighbours = divisor(d.channels_last ? columns : lanes);
  place(d.shared, d, int64_t{plan.vector} * element_size(problem), held ? ceil_div(share, lanes) * threads : 0);
}

// The single launch: a tile is whole groups. Where a cluster may share its positions, as many blocks as it takes.
bool plan_resident(const GroupNormProblem& problem, Plan& plan, int capability) {
  const Division& d = plan.division;
  int64_t per_group = problem.channels / problem.num_groups, size = element_size(problem);
  int64_t unit = per_group;
  if (d.channels_last) {
    // As few groups as make whole sectors, so that no two blocks read the same one.
    unit = std::min<int64_t>(problem.channels, std::lcm<int64_t>(per_group, 32 / size));
  }
  int64_t widest = d.channels_last ? int64_t{MOST_THREADS} * plan.vector : MOST_THREADS;
  if (unit > widest) return false;
  // Of small groups a block takes as many as keep a warp busy.
  int64_t width = unit * std::max<int64_t>(1, 1024 / (problem.positions * unit));
  width = std::min({width, int64_t{problem.channels}, std::max(unit, widest / unit * unit)});
  int64_t tiles = ceil_div(problem.channels, width), elements = width * problem.positions;
  if (tiles > MOST_TILES) return false;
  int64_t cluster = 1;
  if (capability >= 90) {
    auto fits = [&] { return ceil_div(elements, cluster) * size <= CLUSTER_BYTES; };
    auto busy = [&] { return problem.samples * tiles * cluster >= BLOCKS || elements / cluster < 2 * LEAST_ELEMENTS; };
    while (cluster < MOST_CLUSTER && !(fits() && busy())) cluster *= 2;
    if (!fits()) return false;
  } else if (elements > RESIDENT_ELEMENTS) {
    return false;
  }
  divide(problem, plan, width, cluster, true);
  if (plan.division.shared.resident > RESIDENT_BYTES) return false;
  plan.cluster = plan.division.splits;
  return true;
}

void plan_launches(const GroupNormProblem& problem, Plan& plan) {
  int64_t n = problem.samples, c = problem.channels, p = problem.positions;
  int64_t per_group = c / problem.num_groups, sector = 32 / element_size(problem);
  auto width_splits = [&](int64_t width) {
    return most_splits(p, static_cast<double>(per_group), static_cast<double>(width));
  };
  int64_t width;
  if (plan.division.channels_last) {
    // Narrower tiles make up for fewer splits than BLOCKS takes, down to one sector of each position.
    width = 4 * sector;
    while (width > sector && n * ceil_div(c, width) * width_splits(width) < BLOCKS && p * width > LEAST_ELEMENTS)
      width /= 2;
    width = std::max(width, power_of_two_from(ceil_div(c, MOST_TILES)));
  } else {
    // One channel, and several only where one has too few positions.
    width = std::max({int64_t{1}, std::min<int64_t>(64, 1024 / power_of_two_from(std::min<int64_t>(p, 2048))),
                      power_of_two_from(ceil_div(c, MOST_TILES))});
  }
  width = std::min({width, power_of_two_from(c), int64_t{MOST_THREADS}});
  int64_t tiles = ceil_div(c, width);
  int64_t wanted = std::max(ceil_div(BLOCKS, n * tiles), ceil_div(p * width, MOST_ELEMENTS));
  divide(problem, plan, width, std::min(width_splits(width), wanted), false);
}

// Whether the channels of x are next to each other, as in NHWC; where they could as well be, they are.
bool is_channels_last(const GroupNormProblem& problem, const Strided& like) {
  return problem.positions == 1 || (problem.channels > 1 && like.c < like.p);
}

}  // namespace

Plan plan_group_norm(const GroupNormProblem& problem, const Strided& y, int capability) {
  Plan plan;
  plan.division.channels_last = is_channels_last(problem, y);
  plan.vector = vector_of(problem, plan.division.channels_last, {y});
  if (!plan_resident(problem, plan, capability)) plan_launches(problem, plan);
  return plan;
}

Plan plan_group_norm_backward(const GroupNormProblem& problem, const Strided& dy, const Strided& dx) {
  Plan plan;
  plan.division.channels_last = is_channels_last(problem, dx);
  plan.vector = vector_of(problem, plan.division.channels_last, {dy, dx});
  plan_launches(problem, plan);
  return plan;
}

std::string check_group_norm(const GroupNormProblem& problem) {
  const GroupNormProblem& p = problem;
  auto text = [](int64_t value) { return std::to_string(value); };
  if (p.dtype < 0 || p.dtype > 2) return "dtype must be 0 (float32), 1 (float16) or 2 (bfloat16), got " + text(p.dtype);
  for (const Rows* row : {&p.weight, &p.bias, &p.add, &p.scale, &p.shift}) {
    if (row->data && (row->dtype < 0 || row->dtype > 2))
      return "the dtype of a parameter must be 0, 1 or 2, got " + text(row->dtype);
  }
  if (p.samples < 1 || p.channels < 1 || p.positions < 1)
    return "x must have elements, got [" + text(p.samples) + ", " + text(p.channels) + ", " + text(p.positions) + "]";
  if (p.channels > 1 << 20) return "at most 2^20 channels are served, got " + text(p.channels);
  if (p.num_groups < 1 || p.channels % p.num_groups)
    return "num_groups must divide the channels, got " + text(p.num_groups) + " for " + text(p.channels);
  if (p.first_channels < 1 || (p.skip.data ? p.first_channels >= p.channels : p.first_channels != p.channels))
    return "h must have all channels, or of a pair some, got " + text(p.first_channels) + " of " + text(p.channels);
  if (!p.h.data) return "x has no memory";
  return {};
}

std::string check_plan(const Plan& plan, const GroupNormProblem& problem, int64_t floats, const Workspace& workspace) {
  int64_t blocks = problem.samples * plan.division.splits;
  if (blocks > INT32_MAX) return std::to_string(blocks) + " blocks along x are more than a launch can have";
  if (workspace.floats < floats || (floats && !workspace.data))
    return "the workspace must have " + std::to_string(floats) + " floats, got " + std::to_string(workspace.floats);
  return {};
}

}  // namespace cmfast
