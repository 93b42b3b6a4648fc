// Chooses the kernels of this CPU. Compiled once, for any CPU.
#include "dispatch.h"

#include <cstdlib>
#include <cstring>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

// The build lists the variants that it compiled, the best one last: V(generic) V(avx2) ...
#define V(name) namespace name { extern const moebius::Kernels kernels; }
MOEBIUS_VARIANTS
#undef V

namespace moebius {
namespace {

#if defined(__x86_64__)

bool has_avx_vnni() {  // which older compilers' __builtin_cpu_supports does not know
#if defined(MOEBIUS_TEST_AVXVNNI)  // the variant is compiled with AVX-512's form of the instruction, see tests/kernels/native
  return __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
#endif
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}

// Whether this CPU and its system have the instructions of a variant.
bool runs(const char* name) {
  const auto is = [&](const char* other) { return std::strcmp(name, other) == 0; };
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (is("avx2")) return avx2;
  if (is("avxvnni")) return avx2 && has_avx_vnni();
  if (is("avx512")) return avx512;
  if (is("avx512vnni")) return avx512 && __builtin_cpu_supports("avx512vnni");
  return is("generic");
}

#elif defined(__aarch64__)

#if defined(__APPLE__)
bool feature(const char* name) {
  int value = 0;
  std::size_t size = sizeof value;
  return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value == 1;
}
bool has_dot_products() { return feature("hw.optional.arm.FEAT_DotProd"); }
bool has_matrix_products() { return feature("hw.optional.arm.FEAT_I8MM"); }
#elif defined(__linux__)
// Bits of the kernel's interface, which older headers do not name: HWCAP_ASIMDDP, HWCAP2_I8MM.
bool has_dot_products() { return getauxval(AT_HWCAP) >> 20 & 1; }
bool has_matrix_products() { return getauxval(AT_HWCAP2) >> 13 & 1; }
#else
bool has_dot_products() { return false; }
bool has_matrix_products() { return false; }
#endif

bool runs(const char* name) {
  const auto is = [&](const char* other) { return std::strcmp(name, other) == 0; };
  if (is("dotprod")) return has_dot_products();
  if (is("i8mm")) return has_matrix_products();
  return is("generic") || is("neon");
}

#else

bool runs(const char* name) { return std::strcmp(name, "generic") == 0; }

#endif

}  // namespace

const std::vector<const Kernels*>& usable_kernels() {
  static const std::vector<const Kernels*> found = [] {
    std::vector<const Kernels*> usable;
#define V(name) if (runs(#name)) usable.push_back(&name::kernels);
    MOEBIUS_VARIANTS
#undef V
    return usable;
  }();
  return found;
}

const Kernels& kernels() {
  static const Kernels* chosen = [] {
    if (const char* wanted = std::getenv("MOEBIUS_KERNELS"))
      for (const Kernels* one : usable_kernels())
        if (std::strcmp(one->name, wanted) == 0) return one;
    return usable_kernels().back();
  }();
  return *chosen;
}

}  // namespace moebius
