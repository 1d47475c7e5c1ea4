// How a call of group norm is divided among the blocks of its launches. Plain C++: no device is asked.

#pragma once

#include "group_norm.h"

namespace cmfast {

/// An integer that others up to 2^21 are divided by, at a fraction of the cost of an integer division.
struct Divisor {
  int value = 1;
  float inverse = 1.0f, half = 0.5f;  // 1 / value and 1 / (2 · value)
};

/// Byte offsets of what a block keeps in shared memory; `apply`, `statistics`, `gradient` and `resident`
/// are what a kernel needs: all before it.
struct SharedOffsets {
  int channels = 0;  // floats [7, width]: constants of each channel
  int merged = 0;    // float2 [groups, threads that share one]
  int bases = 0;     // floats [groups]
  int apply = 0;
  int first = 0;     // the first unit of each column, of first_lanes
  int sums = 0;      // float2 [lanes, width]
  int statistics = 0;
  int partial = 0;   // float2 [width, channel_threads]
  int gradient = 0;
  int moments = 0;   // float2 [groups]
  int held = 0;      // the block's units of x
  int resident = 0;
};

/// How [N, C, P] is divided: a block takes a tile of `width` channels and a share (a split) of the positions.
///
/// Its threads are columns × lanes, the columns of a lane next to each other (channels_last) or the lanes of a column.
/// A column is a vector of channels (channels_last) or one channel. The lanes of a column take its positions in turn:
/// one at a time, or a vector of them.
struct Division {
  bool channels_last = false;
  int width = 0, tiles = 0;
  int columns = 0, lanes = 0;
  int rows = 0, splits = 0;   // positions of a split,
  int last_rows = 0;          // and of the last one
  int groups = 0, parts = 0;  // the most groups of a tile, and the most tiles of a group
  int slots = 0;              // of a part: the splits, padded to whole sectors
  int first_lanes = 0;        // lanes whose first unit tells where the values lie
  int sum_threads = 0;        // threads that share the sum of a group over the tile
  int part_threads = 0;       // threads that share its slots: each takes every part_threads-th part,
  int split_threads = 0;      // and of that every split_threads-th split
  int channel_threads = 0;    // threads that share the sum of a channel over the tile
  float inverse_size = 0;     // 1 / (channels of a group · positions)
  Divisor per_group, by_width, by_sum_threads, by_part_threads, by_split_threads, by_channel_threads;
  Divisor neighbours;         // the threads next to each other: columns or lanes
  SharedOffsets shared;
};

struct Plan {
  int vector = 1;     // elements of an access
  int cluster = 0;    // blocks that share a tile's statistics in the single launch; 0: two launches
  Division division;

  int threads() const { return division.columns * division.lanes; }
  int64_t slots(const GroupNormProblem& problem) const {
      return problem.samples * problem.num_groups * division.parts * division.slots;
  }
};

/// Divide the forward call; capability 90 and up may use clusters.
Plan plan_group_norm(const GroupNormProblem& problem, const Strided& y, int capability);

/// Divide the gradient's two launches.
Plan plan_group_norm_backward(const GroupNormProblem& problem, const Strided& dy, const Strided& dx);

/// What is wrong with a problem that no kernel could serve; empty where nothing is.
std::string check_group_norm(const GroupNormProblem& problem);

/// What is wrong with a plan: more blocks than a launch has, or a workspace of fewer than `floats`.
std::string check_plan(const Plan& plan, const GroupNormProblem& problem, int64_t floats, const Workspace& workspace);

}  // namespace cmfast
