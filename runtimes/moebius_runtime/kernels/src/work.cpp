// Compiled once, for any CPU: code that all variants share must not contain instructions of one of them.
#include "work.h"

#include <atomic>
#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#elif defined(_WIN32)
#include <malloc.h>
#endif

namespace moebius {
namespace {

constexpr std::size_t kPage = 4096, kHugePage = std::size_t(1) << 21, kSmall = 1 << 16;
constexpr std::size_t kSlack = 64;  // a vector load at the last float may read beyond it

#if defined(_WIN32)
void* pages(std::size_t size) { return _aligned_malloc(size, kPage); }
void release(void* at) { _aligned_free(at); }
#else
void* pages(std::size_t size) { return std::aligned_alloc(kPage, size); }
void release(void* at) { std::free(at); }
#endif

struct Block {
  void* at;
  std::size_t size;
};

class Pool {
 public:
  void* take(std::size_t bytes) {
    {
      std::lock_guard<std::mutex> hold(lock_);
      std::size_t best = free_.size();
      for (std::size_t i = 0; i < free_.size(); ++i)
        if (free_[i].size >= bytes && (best == free_.size() || free_[i].size < free_[best].size)) best = i;
      if (best < free_.size() && free_[best].size <= 2 * bytes + kSmall) {  // much larger ones are left for larger requests
        const Block block = free_[best];
        free_.erase(free_.begin() + Index(best));
        used_.push_back(block);
        return block.at;
      }
    }
    const std::size_t size = (bytes + kPage - 1) / kPage * kPage;
    void* at = pages(size);
    if (at == nullptr) throw std::bad_alloc();
#if defined(__linux__)
    if (size >= kHugePage) madvise(at, size, MADV_HUGEPAGE);
#endif
    std::lock_guard<std::mutex> hold(lock_);
    used_.push_back({at, size});
    return at;
  }

  void give(void* at) {
    std::lock_guard<std::mutex> hold(lock_);
    for (std::size_t i = 0; i < used_.size(); ++i) {
      if (used_[i].at != at) continue;
      free_.push_back(used_[i]);
      used_.erase(used_.begin() + Index(i));
      return;
    }
  }

  void count(Index change) {
    std::lock_guard<std::mutex> hold(lock_);
    kernels_ += change;
    if (kernels_ > 0) return;
    for (const Block& block : free_) release(block.at);
    free_.clear();
  }

 private:
  std::mutex lock_;
  std::vector<Block> free_, used_;
  Index kernels_ = 0;
};

Pool& pool() {
  static Pool one;
  return one;
}

struct Job {
  void (*f)(void*, std::size_t);
  void* data;
  std::atomic<bool> failed{false};
};

}  // namespace

void Threads::run(Index count, void (*f)(void*, std::size_t), void* data) const {
  if (count <= 0) return;
  Job job{f, data};
  run_(
      context_,
      [](void* at, std::size_t i) {
        Job& whole = *static_cast<Job*>(at);
        try {
          if (!whole.failed) whole.f(whole.data, i);
        } catch (...) {  // no exception may reach the runtime's threads
          whole.failed = true;
        }
      },
      std::size_t(count), &job);
  if (job.failed) throw std::bad_alloc();  // tasks throw nothing else
}

void kernel_made() { pool().count(1); }
void kernel_gone() { pool().count(-1); }

Scratch::Scratch(Index floats) : at_(static_cast<float*>(pool().take((std::size_t(floats) + kSlack) * sizeof(float)))) {}
Scratch::~Scratch() { pool().give(at_); }

}  // namespace moebius
