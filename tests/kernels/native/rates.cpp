// Rates of the matmuls of one variant on one core, in GMAC/s of processor time: float32, INT8 with tokens as rows, INT8
// with weights as rows. Compiled with the flags of a variant, see rates.py.
#include <algorithm>
#include <cstdio>
#include <ctime>
#include <vector>

#include "int8_residual_block.h"

namespace {

double now() {
  timespec t;
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
  return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
}

// GMAC/s of the fastest of some runs.
template <class F>
double rate(double macs, F&& f) {
  f();
  double best = 1e9;
  for (double begin = now(), end = begin; end - begin < 0.4;) {
    const double from = end;
    f();
    end = now();
    best = std::min(best, end - from);
  }
  return macs / best * 1e-9;
}

void sequential(void*, void (*f)(void*, std::size_t), std::size_t count, void* data) {
  for (std::size_t i = 0; i < count; ++i) f(data, i);
}

}  // namespace

using namespace MOEBIUS_VARIANT;

int main() {
  moebius::kernel_made();
  const moebius::Threads threads(sequential, nullptr);
  for (const auto& size : {std::pair<Index, Index>{320, 320}, {640, 640}, {1280, 640}, {2560, 640}}) {
    const Index tokens = 1024, depth = size.first, outputs = size.second, count = panels(tokens);
    std::vector<float> x(tokens * depth), weight(outputs * depth), y(tokens * outputs), packed(count * depth * kWide);
    std::vector<std::int8_t> bytes(outputs * depth);
    for (std::size_t i = 0; i < x.size(); ++i) x[i] = float(i * 2654435761u % 256);
    for (std::size_t i = 0; i < packed.size(); ++i) packed[i] = float(i * 2654435761u % 256);
    for (std::size_t i = 0; i < bytes.size(); ++i) bytes[i] = std::int8_t(i * 2654435761u >> 8), weight[i] = bytes[i];
    const std::vector<float> ones(std::max(depth, outputs), 1.0f), zeros(std::max(depth, outputs), 0.0f);
    const moebius::Int8Linear linear{1, tokens, depth, outputs, x.data(), {ones.data(), zeros.data()},
                                     {bytes.data(), ones.data(), zeros.data()}, y.data()};
    const double macs = double(tokens) * double(depth) * double(outputs);
    const double single = rate(macs, [&] {
      each_tile(threads, outputs, count, depth, [&](auto rows, Index row, Index p) {
        constexpr int R = decltype(rows)::value;
        Tile<R> tile = {};
        multiply<R>(tile, weight.data() + row * depth, depth, packed.data() + p * depth * kWide, depth);
        each_vector<R>(tokens, p, [&](int i, int j, Index t, int lanes) {
          store(y.data() + (row + i) * tokens + t, tile[i][j], lanes);
        });
      });
    });
    const double by_token = rate(macs, [&] { int8_linear(linear, threads); });
    const double by_weight = rate(macs, [&] { int8_linear_to_picture(linear, threads); });
    std::printf("{\"depth\": %ld, \"outputs\": %ld, \"float32\": %.1f, \"int8\": %.1f, \"int8_to_picture\": %.1f}\n", depth,
                outputs, single, by_token, by_weight);
  }
  moebius::kernel_gone();
}
