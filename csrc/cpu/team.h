// Threads, of torch's pool: libgomp's entry points, which are not linked but resolve to the copy that torch has loaded.
#pragma once

#include <cstdint>

namespace cmfast {

// The threads that run a kernel's body together, as one of them sees it.
struct Team {
  int rank, size;
  void barrier() const;
};

// Run body(team, data) in so many threads, or fewer where the pool gives fewer; returns when all are done.
void run_team(int threads, void (*body)(Team, void*), void* data);

// A thread's share of `count` pieces of work: [begin, end).
struct Share {
  int64_t begin, end;
};
static inline Share share(int64_t count, Team team) {
  return {count * team.rank / team.size, count * (team.rank + 1) / team.size};
}

// Run body(team) of a lambda.
template <class Body>
static inline void parallel(int threads, Body& body) {
  run_team(threads, [](Team team, void* data) { (*static_cast<Body*>(data))(team); }, &body);
}

}  // namespace cmfast
