// Arrays between pages without access, and numbers to fill them with.
#pragma once

#if defined(_WIN32)
#include <windows.h>
#else
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <utility>

namespace guarded {

// Where an array touches a page without access: behind its last byte, or before its first one.
enum class Place { end, begin };

// Fresh pages, of which the first and the last allow no access; null where there are none.
#if defined(_WIN32)
inline Index page_size() {
  SYSTEM_INFO info;
  GetSystemInfo(&info);
  return Index(info.dwPageSize);
}
inline char* take(std::size_t size, std::size_t page) {
  char* at = static_cast<char*>(VirtualAlloc(nullptr, size, MEM_RESERVE | MEM_COMMIT, PAGE_READWRITE));
  DWORD before;
  return at != nullptr && VirtualProtect(at, page, PAGE_NOACCESS, &before) &&
                 VirtualProtect(at + size - page, page, PAGE_NOACCESS, &before)
             ? at
             : nullptr;
}
inline void give_back(char* at, std::size_t) { VirtualFree(at, 0, MEM_RELEASE); }
#else
inline Index page_size() { return sysconf(_SC_PAGESIZE); }
inline char* take(std::size_t size, std::size_t page) {
  void* at = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (at == MAP_FAILED) return nullptr;
  char* first = static_cast<char*>(at);
  return mprotect(first, page, PROT_NONE) == 0 && mprotect(first + size - page, page, PROT_NONE) == 0 ? first : nullptr;
}
inline void give_back(char* at, std::size_t size) { munmap(at, size); }
#endif

// `count` values; a read or write beyond them ends the process (on the other side after at most a page).
template <class T>
class Array {
 public:
  Array(Index count, Place place) : count_(count) {
    const Index page = page_size(), bytes = count * Index(sizeof(T)), inner = (bytes + page - 1) / page * page;
    size_ = std::size_t(inner + 2 * page);
    memory_ = take(size_, std::size_t(page));
    if (memory_ == nullptr) {
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
    if (memory_ != nullptr) give_back(memory_, size_);
  }
  operator T*() const { return at_; }
  Index count() const { return count_; }

 private:
  char* memory_;
  std::size_t size_;
  Index count_;
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
