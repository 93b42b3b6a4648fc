// Resources of the kernels: threads of the runtime, and scratch memory that outlives a call.
#pragma once

#include <cstddef>

// Counts and places of values: 64 bits everywhere, where `long` has 32 bits on Windows.
using Index = std::ptrdiff_t;

namespace moebius {

// Runs f(0) .. f(count - 1) on the runtime's threads, in any order. An exception of one of them is rethrown here.
class Threads {
 public:
  using Run = void (*)(void* context, void (*f)(void*, std::size_t), std::size_t count, void* data);
  Threads(Run run, void* context) : run_(run), context_(context) {}

  template <class F>
  void each(Index count, F f) const {
    run(count, [](void* data, std::size_t i) { (*static_cast<F*>(data))(Index(i)); }, &f);
  }

 private:
  void run(Index count, void (*f)(void*, std::size_t), void* data) const;
  Run run_;
  void* context_;
};

// Scratch memory that calls reuse, so that its pages are faulted in once. Freed with the last kernel.
void kernel_made();
void kernel_gone();

// Floats from it, uninitialised, for as long as this lives. Throws std::bad_alloc.
class Scratch {
 public:
  explicit Scratch(Index floats);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  operator float*() const { return at_; }

 private:
  float* at_;
};

}  // namespace moebius
