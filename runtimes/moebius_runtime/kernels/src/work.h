// What kernels are given to work with: threads of the runtime, and scratch memory that outlives a call.
#pragma once

#include <cstddef>

namespace moebius {

// Runs f(0) .. f(count - 1) on the runtime's threads, in any order. What one of them throws is thrown again here.
class Threads {
 public:
  using Run = void (*)(void* context, void (*f)(void*, std::size_t), std::size_t count, void* data);
  Threads(Run run, void* context) : run_(run), context_(context) {}

  template <class F>
  void each(long count, F f) const {
    run(count, [](void* data, std::size_t i) { (*static_cast<F*>(data))(long(i)); }, &f);
  }

 private:
  void run(long count, void (*f)(void*, std::size_t), void* data) const;
  Run run_;
  void* context_;
};

// Scratch memory that goes from one call to the next, so that its pages are touched for the first time once. Freed when
// the last kernel goes.
void kernel_made();
void kernel_gone();

// Floats from it, uninitialised, for as long as this lives. Throws std::bad_alloc.
class Scratch {
 public:
  explicit Scratch(long floats);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  operator float*() const { return at_; }

 private:
  float* at_;
};

}  // namespace moebius
