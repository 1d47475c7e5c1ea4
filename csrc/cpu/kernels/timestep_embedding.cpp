// Sines and cosines of the multiples of timesteps: a register of frequencies at a time, both of the same angles.
#include "../timestep_embedding.h"

#include "../functions.h"
#include "../isa.h"
#include "../team.h"

namespace cmfast {
namespace CMFAST_ISA {
namespace {

constexpr int64_t SMALL = 1 << 13;  // angles that one thread takes sooner than two

// Both products are rounded, as torch rounds them.
void embed(const TimestepArguments& p, int64_t n) {
  float t = p.t[n * p.stride];
  float *first = p.y + n * 2 * p.count, *second = first + p.count;
  for (int64_t i = 0; i < p.count; i += LANES) {
    int lanes = (int)(p.count - i < LANES ? p.count - i : LANES);
    Floats cosine, sine, angle = t * load(p.frequencies + i, lanes);
    cos_sin(p.scale * angle, cosine, sine);
    store(first + i, p.sin_first ? sine : cosine, lanes);
    store(second + i, p.sin_first ? cosine : sine, lanes);
  }
}

}  // namespace

const char* timestep_embedding(const TimestepArguments& p) {
  if (p.samples <= 0 || p.count <= 0) return "there are no timesteps, or no frequencies";
  auto body = [&](Team team) {
    Share mine = share(p.samples, team);
    for (int64_t n = mine.begin; n < mine.end; ++n) embed(p, n);
  };
  parallel(p.samples * p.count < SMALL ? 1 : p.threads, body);
  return nullptr;
}

}  // namespace CMFAST_ISA
}  // namespace cmfast
