// Arrays between pages without access, and numbers to fill them with.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <utility>

namespace guarded {

// Where an array touches a page without access: behind its last byte, or before its first one.
enum class Place { end, begin };

// `count` values; a read or write beyond them ends the process (on the other side after at most a page).
template <class T>
class Array {
 public:
  Array(long count, Place place) : count_(count) {
    const long page = sysconf(_SC_PAGESIZE), bytes = count * long(sizeof(T)), inner = (bytes + page - 1) / page * page;
    size_ = std::size_t(inner + 2 * page);
    memory_ = static_cast<char*>(mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (memory_ == MAP_FAILED || mprotect(memory_, std::size_t(page), PROT_NONE) != 0 ||
        mprotect(memory_ + page + inner, std::size_t(page), PROT_NONE) != 0) {
      std::fprintf(stderr, "error: no memory without access to be had\n");
      std::exit(2);
    }
    at_ = reinterpret_cast<T*>(memory_ + page + (place == Place::end ? inner - bytes : 0));
  }
  Array(Array&& other) noexcept
      : memory_(std::exchange(other.memory_, nullptr)), size_(other.size_), count_(other.count_), at_(other.at_) {}
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  ~Array() {
    if (memory_ != nullptr) munmap(memory_, size_);
  }
  operator T*() const { return at_; }
  long count() const { return count_; }

 private:
  char* memory_;
  std::size_t size_;
  long count_;
  T* at_;
};

// Numbers that are the same on every machine.
class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed * 0x9E3779B97F4A7C15u + 1) {}

  std::uint32_t bits() {
    state_ ^= state_ << 13, state_ ^= state_ >> 7, state_ ^= state_ << 17;
    return std::uint32_t(state_ >> 32);
  }
  double unit() { return bits() / 4294967296.0; }
  double normal() {  // of a sum of twelve
    double sum = -6;
    for (int i = 0; i < 12; ++i) sum += unit();
    return sum;
  }

 private:
  std::uint64_t state_;
};

}  // namespace guarded
