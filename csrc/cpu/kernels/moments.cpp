// The mean and the sum of squared deviations of each channel, of chunks of positions that are then merged.
#include "../moments.h"

#include "../isa.h"
#include "../running_moments.h"
#include "../scratch.h"
#include "../team.h"

namespace cmfast {
namespace CMFAST_ISA {
namespace {

constexpr int64_t CHUNK = 128, SMALL = 1 << 15;  // positions, and elements that one thread takes sooner than two

}  // namespace

const char* moments(const MomentsArguments& p) {
  int64_t channels = p.x.channels, chunks = (p.positions + CHUNK - 1) / CHUNK;
  if (p.samples <= 0 || channels <= 0 || p.positions <= 0) return "the input has no elements";
  float* parts = (float*)scratch(SCRATCH_STATISTICS, p.samples * chunks * 2 * channels * 4);
  if (!parts) return "no memory for the statistics";
  auto count = [&](int64_t k) { return p.positions - k * CHUNK < CHUNK ? p.positions - k * CHUNK : CHUNK; };
  auto body = [&](Team team) {
    Share mine = share(p.samples * chunks, team);
    for (int64_t i = mine.begin; i < mine.end; ++i) {
      int64_t n = i / chunks, k = i % chunks;
      float* to = parts + i * 2 * channels;
      moments_of_rows(p.x.data, p.dtype, n * p.x.n + k * CHUNK * p.x.p, p.x.p, count(k), channels, to, to + channels);
    }
    team.barrier();
    mine = share(p.samples, team);
    for (int64_t n = mine.begin; n < mine.end; ++n)
      merge_moments(parts + n * chunks * 2 * channels, chunks, channels, 0, channels, count,
                    p.moments + n * 2 * channels);
  };
  parallel(p.samples * p.positions * channels < SMALL ? 1 : p.threads, body);
  return nullptr;
}

}  // namespace CMFAST_ISA
}  // namespace cmfast
