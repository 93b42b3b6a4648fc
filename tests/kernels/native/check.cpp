// Compares the kernels of every variant that this CPU runs with nested loops, over many shapes, with arrays between pages
// without access.
//
//   check BEST [VARIANT ...]
//
// BEST: the variant that the CPU must be given. VARIANT: others that it must run. Exit 1 where a result is wrong, 2 where
// a variant is missing.
#include <cstring>
#include <string>
#include <vector>

#include "dispatch.h"
#include "guarded.h"
#include "references.h"

namespace {

using guarded::Array;
using guarded::Place;
using moebius::Kernels;
using reference::Values;

constexpr double kFloat = 2e-6;     // relative L2 error; 6e-7 was measured
constexpr double kWinograd = 1e-5;  // of convolutions by Winograd's transforms, which round more
constexpr double kFlipped = 1e-3;   // of INT8 where a value may round the other way: 6e-4 for one of 7 pixels

void in_order(void*, void (*f)(void*, std::size_t), std::size_t count, void* data) {
  for (std::size_t i = 0; i < count; ++i) f(data, i);
}
void backwards(void*, void (*f)(void*, std::size_t), std::size_t count, void* data) {
  for (std::size_t i = count; i-- > 0;) f(data, i);
}

class Check {
 public:
  // Runs `kernel(kernels, y, threads)` with every variant and compares y. A limit of 0: equal floats.
  template <class F>
  void compare(const std::string& name, const Values& expected, double limit, Place place, F kernel) {
    for (const Kernels* one : moebius::usable_kernels()) {
      Array<float> y(Index(expected.size()), place);
      for (std::size_t i = 0; i < expected.size(); ++i) y[i] = NAN;
      kernel(*one, y, moebius::Threads(place == Place::end ? in_order : backwards, nullptr));
      const double error = difference(y, expected, limit == 0);
      if (error <= limit) {
        ++passed;
      } else {
        ++failed;
        std::printf("FAILED %s: %s: %s %g, at most %g\n", one->name, name.c_str(),
                    limit == 0 ? "numbers that differ:" : "relative error", error, limit);
      }
      if (limit > 0 && error > worst) worst = error;
    }
  }

  static double difference(const float* y, const Values& expected, bool exact) {
    double squares = 0, all = 0, differ = 0;
    for (std::size_t i = 0; i < expected.size(); ++i) {
      squares += (y[i] - expected[i]) * (y[i] - expected[i]);
      all += expected[i] * expected[i];
      differ += !(y[i] == float(expected[i]));
    }
    const double error = exact ? differ : std::sqrt(squares / all);
    return error == error ? error : 1e9;
  }

  Index passed = 0, failed = 0;
  double worst = 0;
};

// Arrays of a case, each filled from a seed of its own.
class Arrays {
 public:
  explicit Arrays(Place place) : place_(place) {}

  const float* floats(Index count, double scale = 1, double mean = 0) {
    Array<float> made(count, place_);
    guarded::Random random(++seed_);
    for (Index i = 0; i < count; ++i) made[i] = float(mean + scale * random.normal());
    floats_.push_back(std::move(made));
    return floats_.back();
  }
  float* filled(Index count, float value) {
    Array<float> made(count, place_);
    for (Index i = 0; i < count; ++i) made[i] = value;
    floats_.push_back(std::move(made));
    return floats_.back();
  }
  std::int8_t* bytes(Index count) {
    Array<std::int8_t> made(count, place_);
    guarded::Random random(++seed_);
    for (Index i = 0; i < count; ++i) made[i] = std::int8_t(random.bits() >> 11);
    bytes_.push_back(std::move(made));
    return bytes_.back();
  }
  // Ranges of about [low, high] by channel.
  moebius::Quantiser quantiser(Index channels, double low, double high) {
    float *inverse = filled(channels, 0), *zero = filled(channels, 0);
    guarded::Random random(++seed_);
    for (Index c = 0; c < channels; ++c) {
      inverse[c] = float(255 / (high - low) / (0.7 + 0.6 * random.unit()));
      zero[c] = std::round(float(-low) * inverse[c]);
    }
    return {inverse, zero};
  }
  moebius::Int8Product product(Index outputs, Index depth, bool packed) {
    const std::int8_t* weight = bytes((packed ? (outputs + 15) / 16 * 16 : outputs) * depth);
    return {weight, floats(outputs, 1 / (74 * 64 * std::sqrt(double(depth)))), floats(outputs, 0.3)};
  }

 private:
  Place place_;
  std::uint64_t seed_ = 0;
  std::vector<Array<float>> floats_;
  std::vector<Array<std::int8_t>> bytes_;
};

std::string text(const char* name, std::initializer_list<Index> sizes) {
  std::string made = name;
  for (Index size : sizes) made += " " + std::to_string(size);
  return made;
}

// Four activations and weights that come together in a lane. vpmaddubsw saturates in all but the first and the last.
struct Pattern {
  const char* name;
  int activations[4], weights[4];
};
const Pattern kPatterns[] = {{"random", {}, {}},
                             {"all positive", {255, 255, 255, 255}, {127, 127, 127, 127}},
                             {"all negative", {255, 255, 255, 255}, {-128, -128, -128, -128}},
                             {"pairs that cancel", {255, 255, 255, 255}, {127, 127, -128, -128}},
                             {"every second", {255, 0, 255, 0}, {127, -128, 127, -128}}};

// Whole numbers 0 to 255 as activations, whose channel is index / inner % channels, and weights, the channel innermost.
void fill(const Pattern& pattern, float* x, Index count, Index inner, Index channels, std::int8_t* weight, Index weights) {
  const bool random = pattern.activations[0] == 0;
  guarded::Random numbers(7);
  for (Index i = 0; i < count; ++i)
    x[i] = float(random ? int(numbers.bits() >> 24) : pattern.activations[i / inner % channels % 4]);
  if (!random)
    for (Index i = 0; i < weights; ++i) weight[i] = std::int8_t(pattern.weights[i % 4]);
}

moebius::Quantiser unchanged(Arrays& a, Index channels) { return {a.filled(channels, 1), a.filled(channels, 0)}; }

const char* const kLinears[] = {"int8_linear", "int8_linear with a norm", "int8_linear_to_picture", "int8_linear_to_picture with a sum"};

void linear(Check& check, Place place, Index batch, Index each, Index inputs, Index outputs) {
  for (int kind = 0; kind < 4; ++kind)
    for (int i = kind % 2 ? 5 : 0; i < 6; ++i) {  // the patterns with numbers that must be equal, then floats
      const bool to_picture = kind > 1;
      Arrays a(place);
      moebius::Int8Linear f{};
      f.batch = batch, f.tokens = batch * each, f.inputs = inputs, f.outputs = outputs;
      f.product = a.product(outputs, inputs, !to_picture);
      const Index weights = (to_picture ? outputs : (outputs + 15) / 16 * 16) * inputs;
      if (i < 5) {
        float* x = a.filled(f.tokens * inputs, 0);
        fill(kPatterns[i], x, f.tokens * inputs, 1, inputs, const_cast<std::int8_t*>(f.product.weight), weights);
        f.x = x, f.quantiser = unchanged(a, inputs);
        f.product.scale = a.filled(outputs, 1), f.product.offset = a.filled(outputs, 0);
      } else {
        f.x = a.floats(f.tokens * inputs, kind == 1 ? 3 : 1, kind == 1 ? 0.7 : 0), f.quantiser = a.quantiser(inputs, -2.5, 2.5);
        if (kind == 1) f.norm = {1e-2f, a.floats(inputs, 0.1, 1), a.floats(inputs, 0.1)};
        if (kind == 3) f.skip = a.floats(f.tokens * outputs);
      }
      const std::string name = text(kLinears[kind], {batch, each, inputs, outputs});
      check.compare(name + (i < 5 ? std::string(", ") + kPatterns[i].name : ""), reference::int8_linear(f, to_picture),
                    i < 5 ? 0 : kFlipped, place, [&](const Kernels& k, float* y, const moebius::Threads& threads) {
                      f.y = y;
                      (to_picture ? k.int8_linear_to_picture : k.int8_linear)(f, threads);
                    });
    }
  if (inputs % 4) return;
  Arrays a(place);
  moebius::Int8LinearOfPicture g{batch, each, inputs, outputs, inputs % 3 ? 2 : 3, 1e-2f, a.floats(batch * each * inputs, 3, 0.7),
                                 a.quantiser(inputs, -2.5, 2.5), a.product(outputs, inputs, true), nullptr};
  check.compare(text("int8_linear_of_picture", {batch, each, inputs, outputs}), reference::int8_linear_of_picture(g), kFlipped, place,
                [&](const Kernels& k, float* y, const moebius::Threads& threads) { g.y = y, k.int8_linear_of_picture(g, threads); });
}

struct Kind {
  const char* name;
  Index stride, before;
  bool normed;
};
const Kind kConvolutions[] = {{"int8_upsample_conv3x3", 0, 1, false}, {"int8_downsample_conv3x3", 2, 1, false},
                              {"int8_downsample_conv3x3 below", 2, 0, false}, {"int8_conv3x3", 1, 1, false},
                              {"int8_conv3x3 with a norm", 1, 1, true}};

void int8_convolution(Check& check, Place place, Index batch, Index height, Index width, Index inputs, Index outputs) {
  const Index size = height * width;
  for (const Kind& kind : kConvolutions)
    for (int i = kind.normed ? 5 : 0; i < 6; ++i) {
      if (kind.before == 0 && (height < 2 || width < 2)) continue;
      Arrays a(place);
      moebius::Int8Convolution f{};
      f.batch = batch, f.height = height, f.width = width, f.inputs = inputs, f.outputs = outputs, f.before = kind.before;
      const Index phases = kind.stride == 0 ? 4 : 1, depth = (kind.stride == 0 ? 4 : 9) * inputs;
      f.product = a.product(phases * outputs, depth, false);
      if (i < 5) {
        float* x = a.filled(batch * inputs * size, 0);
        fill(kPatterns[i], x, batch * inputs * size, size, inputs, const_cast<std::int8_t*>(f.product.weight),
             phases * outputs * depth);
        f.x = x, f.quantiser = unchanged(a, inputs);
        f.product.scale = a.filled(phases * outputs, 1), f.product.offset = a.filled(phases * outputs, 0);
      } else {
        f.x = a.floats(batch * inputs * size, 1, kind.normed ? 0.5 : 0), f.quantiser = a.quantiser(inputs, kind.normed ? -0.3 : -2.5, 3);
        if (kind.normed) f.norm = {inputs % 3 ? 2 : 3, 1e-3f, a.floats(inputs, 0.1, 1), a.floats(inputs, 0.1)};
      }
      const std::string name = text(kind.name, {batch, height, width, inputs, outputs});
      check.compare(name + (i < 5 ? std::string(", ") + kPatterns[i].name : ""), reference::int8_convolution(f, kind.stride),
                    i < 5 ? 0 : kFlipped, place, [&](const Kernels& k, float* y, const moebius::Threads& threads) {
                      f.y = y;
                      (kind.stride == 0   ? k.int8_upsample_conv3x3
                       : kind.stride == 2 ? k.int8_downsample_conv3x3
                                          : k.int8_conv3x3)(f, threads);
                    });
    }
  Arrays a(place);
  moebius::Int8Pointwise g{batch, inputs, outputs, size, a.floats(batch * inputs * size), a.quantiser(inputs, -2.5, 3),
                           a.product(outputs, inputs, false), nullptr};
  check.compare(text("int8_conv1x1", {batch, height, width, inputs, outputs}), reference::int8_pointwise(g), kFlipped, place,
                [&](const Kernels& k, float* y, const moebius::Threads& threads) { g.y = y, k.int8_conv1x1(g, threads); });
}

void feed_forward(Check& check, Place place, Index batch, Index height, Index width, Index channels, Index hidden) {
  Arrays a(place);
  moebius::FeedForward f{};
  f.batch = batch, f.height = height, f.width = width, f.channels = channels, f.hidden = hidden;
  f.x = a.floats(batch * height * width * channels);
  f.expand = a.floats(hidden * channels, 1 / std::sqrt(double(channels))), f.expand_bias = a.floats(hidden, 0.1);
  f.depthwise = a.floats(hidden * 9, 1.0 / 3), f.depthwise_bias = a.floats(hidden, 0.1);
  f.project = a.floats(channels * hidden / 2, 1 / std::sqrt(double(hidden)));
  check.compare(text("feed_forward", {batch, height, width, channels, hidden}), reference::feed_forward(f), kFloat, place,
                [&](const Kernels& k, float* y, const moebius::Threads& threads) { f.y = y, k.feed_forward(f, threads); });
  if (channels % 4 || hidden % 32) return;
  moebius::Int8FeedForward g{};
  g.batch = batch, g.height = height, g.width = width, g.channels = channels, g.hidden = hidden, g.x = f.x;
  g.quantiser = a.quantiser(channels, -2.5, 2.5), g.expand = a.product(hidden, channels, true);
  g.depthwise = f.depthwise, g.depthwise_bias = f.depthwise_bias, g.gated = a.quantiser(hidden / 2, -0.4, 0.6);
  g.project = a.product(channels, hidden / 2, true);
  check.compare(text("int8_feed_forward", {batch, height, width, channels, hidden}), reference::int8_feed_forward(g),
                kFlipped, place,
                [&](const Kernels& k, float* y, const moebius::Threads& threads) { g.y = y, k.int8_feed_forward(g, threads); });
  g.norm = {1e-2f, a.floats(channels, 0.1, 1), a.floats(channels, 0.1)};
  check.compare(text("int8_feed_forward with a norm", {batch, height, width, channels, hidden}), reference::int8_feed_forward(g),
                kFlipped, place,
                [&](const Kernels& k, float* y, const moebius::Threads& threads) { g.y = y, k.int8_feed_forward(g, threads); });
}

void residual_block(Check& check, Place place, Index batch, Index height, Index width, Index inputs, Index outputs, Index groups) {
  Arrays a(place);
  moebius::ResidualBlock f{};
  f.batch = batch, f.height = height, f.width = width, f.inputs = inputs, f.outputs = outputs, f.groups = groups;
  f.time_rows = batch > 1 && height % 2 ? batch : 1, f.epsilon = 1e-5f;
  f.x = a.floats(batch * inputs * height * width, 1, 0.5), f.time = a.floats(f.time_rows * outputs);
  const auto separable = [&](auto& s, Index channels) {
    s.gain = a.floats(channels, 0.1, 1), s.shift = a.floats(channels, 0.1);
    s.depthwise = a.floats(channels * 9, 1.0 / 3), s.depthwise_bias = a.floats(channels, 0.1);
  };
  separable(f.first, inputs), separable(f.second, outputs);
  f.first.pointwise = a.floats(outputs * inputs, 2 / std::sqrt(double(inputs))), f.first.pointwise_bias = a.floats(outputs, 0.1);
  f.second.pointwise = a.floats(outputs * outputs, 2 / std::sqrt(double(outputs))), f.second.pointwise_bias = a.floats(outputs, 0.1);
  if (inputs != outputs) f.shortcut = a.floats(outputs * inputs, 1 / std::sqrt(double(inputs))), f.shortcut_bias = a.floats(outputs, 0.1);
  check.compare(text("residual_block", {batch, height, width, inputs, outputs, groups}), reference::residual_block(f), kFloat,
                place, [&](const Kernels& k, float* y, const moebius::Threads& threads) { f.y = y, k.residual_block(f, threads); });
  if (inputs % 4 || outputs % 4) return;
  moebius::Int8ResidualBlock g{};
  g.batch = batch, g.height = height, g.width = width, g.inputs = inputs, g.outputs = outputs, g.groups = groups;
  g.time_rows = f.time_rows, g.epsilon = f.epsilon, g.x = f.x, g.time = f.time;
  separable(g.first, inputs), separable(g.second, outputs);
  g.first.quantiser = a.quantiser(inputs, 0, 1.5), g.first.product = a.product(outputs, inputs, false);
  g.second.quantiser = a.quantiser(outputs, 0, 1.5), g.second.product = a.product(outputs, outputs, false);
  if (inputs != outputs) g.shortcut_quantiser = a.quantiser(inputs, -2.5, 3.5), g.shortcut = a.product(outputs, inputs, false);
  check.compare(text("int8_residual_block", {batch, height, width, inputs, outputs, groups}), reference::int8_residual_block(g),
                kFlipped, place,
                [&](const Kernels& k, float* y, const moebius::Threads& threads) { g.y = y, k.int8_residual_block(g, threads); });
}

void convolution(Check& check, Place place, Index batch, Index height, Index width, Index inputs, Index outputs) {
  Arrays a(place);
  moebius::Conv3x3 f{batch, inputs, outputs, height, width, a.floats(batch * inputs * height * width),
                     a.floats(outputs * inputs * 9, 1 / std::sqrt(9.0 * double(inputs))), a.floats(outputs, 0.1), nullptr};
  for (const Index scale : {1, 2})
    check.compare(text(scale == 1 ? "conv3x3" : "upsample_conv3x3", {batch, height, width, inputs, outputs}),
                  reference::convolution(f, scale), kWinograd, place,
                  [&](const Kernels& k, float* y, const moebius::Threads& threads) {
                    f.y = y, (scale == 1 ? k.conv3x3 : k.upsample_conv3x3)(f, threads);
                  });
}

void group_norm(Check& check, Place place, Index batch, Index channels, Index pixels, Index groups) {
  Arrays a(place);
  moebius::GroupNorm f{batch, channels, pixels, groups, 1e-3f, a.floats(batch * channels * pixels, 1, 0.5),
                       a.floats(channels, 0.1, 1), a.floats(channels, 0.1), nullptr};
  check.compare(text("group_norm", {batch, channels, pixels, groups}), reference::group_norm(f), kFloat, place,
                [&](const Kernels& k, float* y, const moebius::Threads& threads) { f.y = y, k.group_norm(f, threads); });
}

void local_lambda(Check& check, Place place, Index batch, Index height, Index width, Index depth, Index heads, Index reach) {
  Arrays a(place);
  const Index n = height * width;
  moebius::LocalLambda f{batch, height, width, heads, depth, reach, a.floats(batch * n * heads * depth), a.floats(batch * n * depth),
                         a.floats(batch * depth * depth), a.floats(depth * reach * reach, 1 / double(reach)), nullptr};
  check.compare(text("local_lambda", {batch, height, width, depth, heads, reach}), reference::local_lambda(f), kFloat, place,
                [&](const Kernels& k, float* y, const moebius::Threads& threads) { f.y = y, k.local_lambda(f, threads); });
}

void interactive_lambda(Check& check, Place place, Index branches, Index batch, Index n, Index heads, Index depth, Index tokens, Index width) {
  Arrays a(place);
  moebius::InteractiveLambda f{branches, batch, n, heads, depth, tokens, width, a.floats(branches * batch * n * heads * depth),
                               a.floats(branches * n * depth * tokens, 1 / std::sqrt(double(depth))), a.floats(branches * tokens * width), nullptr};
  check.compare(text("interactive_lambda", {branches, batch, n, heads, depth, tokens, width}), reference::interactive_lambda(f), kFloat,
                place, [&](const Kernels& k, float* y, const moebius::Threads& threads) { f.y = y, k.interactive_lambda(f, threads); });
}

// Sizes that fill no register, tile or block evenly, single rows and columns, and one as in the network.
void all(Check& check, Place place) {
  const Index depths[] = {4, 8, 12, 16, 20, 36, 64, 68, 132}, outputs[] = {1, 3, 7, 8, 9, 15, 16, 17, 31, 33, 40};
  Index next = 0;
  for (const Index tokens : {1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 13, 14, 15, 16, 17, 23, 31, 33, 49, 97, 115, 131})
    for (int i = 0; i < 3; ++i, ++next)
      linear(check, place, 1 + next % 5 / 4, tokens, depths[next % 9], outputs[next % 11]);
  linear(check, place, 1, 13, 2560, 33);
  for (const auto& s : {std::vector<Index>{1, 1, 1, 4, 3}, {2, 5, 7, 12, 17}, {1, 1, 37, 8, 5}, {1, 9, 1, 4, 9}, {1, 6, 11, 20, 33}})
    int8_convolution(check, place, s[0], s[1], s[2], s[3], s[4]);
  for (const auto& s : {std::vector<Index>{1, 1, 1, 4, 32}, {1, 1, 9, 3, 4}, {3, 7, 1, 12, 96}, {2, 5, 7, 24, 160}, {1, 3, 67, 17, 34},
                        {1, 5, 67, 20, 96}, {1, 8, 8, 40, 320}, {1, 13, 5, 36, 32}})
    feed_forward(check, place, s[0], s[1], s[2], s[3], s[4]);
  for (const auto& s : {std::vector<Index>{1, 1, 1, 8, 8, 1}, {1, 1, 9, 4, 4, 2}, {3, 7, 1, 20, 20, 5}, {2, 5, 7, 24, 24, 3}, {1, 3, 67, 17, 17, 1},
                        {1, 1, 1, 4, 8, 1}, {2, 1, 13, 8, 12, 4}, {2, 5, 7, 24, 36, 3}, {2, 9, 11, 20, 8, 4}, {1, 3, 67, 17, 34, 17}, {1, 8, 8, 96, 64, 32}})
    residual_block(check, place, s[0], s[1], s[2], s[3], s[4], s[5]);
  for (const auto& s : {std::vector<Index>{1, 1, 1, 1, 1}, {2, 5, 7, 3, 17}, {1, 1, 37, 2, 5}, {1, 19, 1, 4, 9}, {1, 10, 23, 21, 30}, {1, 16, 16, 130, 8}})
    convolution(check, place, s[0], s[1], s[2], s[3], s[4]);
  for (const auto& s : {std::vector<Index>{1, 6, 1, 2}, {3, 5, 9, 5}, {2, 24, 35, 3}, {1, 17, 201, 1}})
    group_norm(check, place, s[0], s[1], s[2], s[3]);
  for (const auto& s : {std::vector<Index>{1, 1, 1, 1, 1, 1}, {2, 1, 13, 4, 3, 5}, {1, 11, 1, 3, 2, 7}, {1, 9, 11, 13, 3, 5}, {1, 6, 6, 5, 4, 15}, {1, 8, 8, 20, 9, 7}, {1, 3, 5, 8, 2, 3}, {1, 3, 5, 35, 9, 3}, {1, 3, 5, 56, 8, 3}})
    local_lambda(check, place, s[0], s[1], s[2], s[3], s[4], s[5]);
  for (const auto& s : {std::vector<Index>{1, 1, 1, 1, 1, 1, 1}, {2, 3, 7, 3, 5, 11, 13}, {1, 1, 67, 9, 20, 37, 20}, {2, 1, 9, 8, 40, 10, 40}})
    interactive_lambda(check, place, s[0], s[1], s[2], s[3], s[4], s[5], s[6]);
}

// A comparison that would accept anything proves nothing: one wrong number in the reference has to be reported.
bool finds_a_wrong_number() {
  const float y[3] = {1, 2, 3};
  return Check::difference(y, {1, 2, 3}, true) == 0 && Check::difference(y, {1, 2, 4}, true) == 1 &&
         Check::difference(y, {1, 2, 3.003}, false) > kFlipped / 2 && Check::difference(y, {1, NAN, 3}, false) > 1;
}

}  // namespace

int main(int count, char** arguments) {
  std::string usable;
  for (const Kernels* one : moebius::usable_kernels()) usable += std::string(" ") + one->name;
  std::printf("variants that run here:%s; the best: %s\n", usable.c_str(), moebius::kernels().name);
  for (int i = 1; i < count; ++i)
    if ((usable + " ").find(" " + std::string(arguments[i]) + " ") == std::string::npos ||
        (i == 1 && std::strcmp(moebius::kernels().name, arguments[1]) != 0)) {
      std::fprintf(stderr, "error: expected %s%s\n", arguments[i], i == 1 ? " as the best" : "");
      return 2;
    }
  moebius::kernel_made();
  Check check;
  all(check, Place::end);
  all(check, Place::begin);
  if (!finds_a_wrong_number()) ++check.failed;
  moebius::kernel_gone();
  std::printf("largest relative error of floats: %.2g\n%td passed, %td failed\n", check.worst, check.passed, check.failed);
  return check.failed ? 1 : 0;
}
