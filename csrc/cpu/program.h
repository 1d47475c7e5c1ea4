// A program: calls of kernels that are recorded once, with the addresses of their tensors, and run many times.
#pragma once

#include <chrono>
#include <functional>
#include <vector>

#include "isa.h"

namespace cmfast {

class Program {
 public:
  template <class Arguments>
  void add(const char* (*Kernels::*kernel)(const Arguments&), const Arguments& arguments) {
    calls_.push_back([kernel, arguments](const Kernels& kernels, int threads) {
      Arguments now = arguments;
      set_threads(now, threads, 0);
      return (kernels.*kernel)(now);
    });
  }

  size_t size() const { return calls_.size(); }

  // Run all calls in order; null, or what was wrong with the one at which it stopped. `seconds` takes the time of each.
  const char* run(const Kernels& kernels, int threads, std::vector<double>* seconds = nullptr) const {
    using Clock = std::chrono::steady_clock;
    for (const Call& call : calls_) {
      Clock::time_point begin = seconds ? Clock::now() : Clock::time_point();
      if (const char* error = call(kernels, threads)) return error;
      if (seconds) seconds->push_back(std::chrono::duration<double>(Clock::now() - begin).count());
    }
    return nullptr;
  }

 private:
  using Call = std::function<const char*(const Kernels&, int)>;
  std::vector<Call> calls_;

  template <class Arguments>
  static auto set_threads(Arguments& p, int threads, int) -> decltype(p.threads = threads, void()) {
    p.threads = threads;
  }
  template <class Arguments>
  static void set_threads(Arguments&, int, long) {}  // of kernels that one thread runs
};

}  // namespace cmfast
