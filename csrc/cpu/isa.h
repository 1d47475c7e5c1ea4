// The instruction sets that the kernels are compiled for, and the one that serves this process.
//
// Each file of csrc/cpu/kernels is compiled once for every instruction set, into a namespace of its name. What is
// compiled for a newer processor must not be called on an older one: such a file calls no inline function of another
// header than those of csrc/cpu, since the linker keeps one copy of it, from whichever object comes first.
#pragma once

#include "attention.h"
#include "channel_norm.h"
#include "consistency.h"
#include "conv.h"
#include "group_norm.h"
#include "moments.h"
#include "timestep_embedding.h"

// Those that have products of bfloat16.
#define CMFAST_PRODUCTS(isa)                        \
  namespace isa {                                   \
  const char* attention(const AttentionArguments&); \
  const char* conv2d(const ConvArguments&);         \
  const char* pack(const PackArguments&);           \
  }

#define CMFAST_KERNELS(isa)                                            \
  CMFAST_PRODUCTS(isa)                                                 \
  namespace isa {                                                      \
  const char* consistency_step(const StepArguments&);                  \
  const char* consistency_step_backward(const StepBackwardArguments&); \
  const char* group_norm(const NormArguments&);                        \
  const char* group_norm_backward(const NormBackwardArguments&);       \
  const char* attention_backward(const AttentionBackwardArguments&);   \
  const char* moments(const MomentsArguments&);                        \
  const char* fold_group_norm(const FoldArguments&);                   \
  const char* channel_norm(const ChannelNormArguments&);               \
  const char* timestep_embedding(const TimestepArguments&);            \
  }

namespace cmfast {

CMFAST_KERNELS(portable)
#ifdef __x86_64__
CMFAST_KERNELS(avx2)
CMFAST_KERNELS(avx512)
CMFAST_PRODUCTS(avx512bf16)
CMFAST_PRODUCTS(amx)
#endif

// A kernel returns null, or what was wrong with its arguments; then it has written nothing.
struct Kernels {
  const char* name;
  const char* layout;  // of packed weights: instruction sets that have the same one read each other's
  bool tiles;          // products of bfloat16 are of tiles (tiles.h)
  bool (*runs_here)();
  const char* (*consistency_step)(const StepArguments&);
  const char* (*consistency_step_backward)(const StepBackwardArguments&);
  const char* (*group_norm)(const NormArguments&);
  const char* (*group_norm_backward)(const NormBackwardArguments&);
  const char* (*attention)(const AttentionArguments&);
  const char* (*attention_backward)(const AttentionBackwardArguments&);
  const char* (*conv2d)(const ConvArguments&);
  const char* (*pack)(const PackArguments&);
  const char* (*moments)(const MomentsArguments&);
  const char* (*fold_group_norm)(const FoldArguments&);
  const char* (*channel_norm)(const ChannelNormArguments&);
  const char* (*timestep_embedding)(const TimestepArguments&);
};

// Fastest first, without an entry that this build lacks; with portable at the end, behind which is only the twin of amx.
extern const Kernels ALL_KERNELS[];
extern const int KERNELS_COUNT;

// The kernels in use: those that set_isa or CMFAST_CPU_ISA names, or the first that run here. Null where the variable
// names none that do.
const Kernels* kernels();

// Use the kernels of this name from now on, in all threads; false where there are none, or they do not run here.
bool set_isa(const char* name);

}  // namespace cmfast
