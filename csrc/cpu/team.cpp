#include "team.h"

#include "faults.h"

#ifdef CMFAST_OWN_THREADS
#include <pthread.h>

#include <thread>
#include <vector>
#else
extern "C" {
void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned flags);
void GOMP_barrier();
int omp_get_thread_num();
int omp_get_num_threads();
}
#endif

namespace cmfast {

#ifdef CMFAST_OWN_THREADS

// For the thread sanitizer, which cannot see into libgomp.
static thread_local pthread_barrier_t* meeting = nullptr;

void Team::barrier() const {
  if (size > 1 && !FAULT(barrier_missed)) pthread_barrier_wait(meeting);
}

void run_team(int threads, void (*body)(Team, void*), void* data) {
  if (threads <= 1) return body({0, 1}, data);
  pthread_barrier_t barrier;
  pthread_barrier_init(&barrier, nullptr, threads);
  std::vector<std::thread> others;
  auto run = [&](int rank) {
    meeting = &barrier;
    body({rank, threads}, data);
  };
  for (int rank = 1; rank < threads; ++rank) others.emplace_back(run, rank);
  run(0);
  for (std::thread& thread : others) thread.join();
  pthread_barrier_destroy(&barrier);
}

#else

namespace {
struct Job {
  void (*body)(Team, void*);
  void* data;
};
}  // namespace

void Team::barrier() const {
  if (size > 1) GOMP_barrier();
}

void run_team(int threads, void (*body)(Team, void*), void* data) {
  if (threads <= 1) return body({0, 1}, data);
  Job job{body, data};
  auto run = [](void* p) {
    const Job& job = *static_cast<Job*>(p);
    job.body({omp_get_thread_num(), omp_get_num_threads()}, job.data);
  };
  GOMP_parallel(run, &job, static_cast<unsigned>(threads), 0);
}

#endif

}  // namespace cmfast
