// Each kernel as nested loops over its definition: sums in double, INT8 sums in 64-bit integers. See kernels.h for the
// arguments; nothing of the kernels' own code is used.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "kernels.h"

namespace reference {

using Values = std::vector<double>;

inline double silu(double x) { return x / (1 + std::exp(-x)); }
inline double relu(double x) { return x > 0 ? x : 0; }

// Rounds to the nearest, ties to even, as the processor's default mode does.
inline int quantised(double x, float inverse, float zero) {
  const double value = std::nearbyint(x * inverse + zero);
  return value < 0 ? 0 : value > 255 ? 255 : int(value);
}

// Weight of an output and an input: in rows [outputs, depth], or packed [outputs / 16][depth / 4][16][4].
inline int weight_of(const moebius::Int8Product& p, Index depth, bool packed, Index output, Index input) {
  return packed ? p.weight[((output / 16 * (depth / 4) + input / 4) * 16 + output % 16) * 4 + input % 4]
                : p.weight[output * depth + input];
}

inline double product(const moebius::Int8Product& p, const std::vector<int>& x, bool packed, Index output) {
  const Index depth = Index(x.size());
  std::int64_t sum = 0;
  for (Index i = 0; i < depth; ++i) sum += x[std::size_t(i)] * weight_of(p, depth, packed, output, i);
  return double(float(sum)) * p.scale[output] + p.offset[output];
}

// Depthwise 3x3 of a picture by channel [channels][height * width].
inline Values depthwise(const Values& x, Index channels, Index height, Index width, const float* taps, const float* bias) {
  Values y(x.size());
  for (Index c = 0; c < channels; ++c)
    for (Index i = 0; i < height; ++i)
      for (Index j = 0; j < width; ++j) {
        double sum = bias[c];
        for (Index dy = -1; dy <= 1; ++dy)
          for (Index dx = -1; dx <= 1; ++dx)
            if (i + dy >= 0 && i + dy < height && j + dx >= 0 && j + dx < width)
              sum += taps[c * 9 + (dy + 1) * 3 + dx + 1] * x[std::size_t((c * height + i + dy) * width + j + dx)];
        y[std::size_t((c * height + i) * width + j)] = sum;
      }
  return y;
}

inline Values normal(const Values& x, Index channels, Index n, Index groups, float epsilon, const float* gain,
                     const float* shift) {
  Values y(x.size());
  const Index each = channels / groups * n;
  for (Index g = 0; g < groups; ++g) {
    double mean = 0, squares = 0;
    for (Index i = g * each; i < (g + 1) * each; ++i) mean += x[std::size_t(i)] / double(each);
    for (Index i = g * each; i < (g + 1) * each; ++i) squares += (x[std::size_t(i)] - mean) * (x[std::size_t(i)] - mean);
    const double scale = 1 / std::sqrt(squares / double(each) + epsilon);
    for (Index i = g * each; i < (g + 1) * each; ++i)
      y[std::size_t(i)] = (x[std::size_t(i)] - mean) * scale * gain[i / n] + shift[i / n];
  }
  return y;
}

inline Values group_norm(const moebius::GroupNorm& f) {
  Values y;
  for (Index b = 0; b < f.batch; ++b) {
    const float* x = f.x + b * f.channels * f.pixels;
    const Values one = normal(Values(x, x + f.channels * f.pixels), f.channels, f.pixels, f.groups, f.epsilon, f.gain, f.shift);
    y.insert(y.end(), one.begin(), one.end());
  }
  return y;
}

// 3x3, padding 1, of x enlarged `scale` times (nearest).
inline Values convolution(const moebius::Conv3x3& f, Index scale) {
  const Index high = f.height * scale, wide = f.width * scale;
  Values y;
  for (Index b = 0; b < f.batch; ++b)
    for (Index o = 0; o < f.outputs; ++o)
      for (Index i = 0; i < high; ++i)
        for (Index j = 0; j < wide; ++j) {
          double sum = f.bias[o];
          for (Index c = 0; c < f.inputs; ++c)
            for (Index t = 0; t < 9; ++t) {
              const Index up = i + t / 3 - 1, left = j + t % 3 - 1;
              if (up < 0 || up >= high || left < 0 || left >= wide) continue;
              sum += double(f.weight[(o * f.inputs + c) * 9 + t]) *
                     f.x[((b * f.inputs + c) * f.height + up / scale) * f.width + left / scale];
            }
          y.push_back(sum);
        }
  return y;
}

inline Values local_lambda(const moebius::LocalLambda& f) {
  const Index n = f.height * f.width, edge = f.reach / 2;
  Values y;
  for (Index b = 0; b < f.batch; ++b)
    for (Index i = 0; i < n; ++i)
      for (Index h = 0; h < f.heads; ++h) {
        const float* q = f.query + ((b * n + i) * f.heads + h) * f.depth;
        for (Index v = 0; v < f.depth; ++v) {
          double sum = 0;
          for (Index k = 0; k < f.depth; ++k) sum += double(q[k]) * f.summary[(b * f.depth + k) * f.depth + v];
          for (Index t = 0; t < f.reach * f.reach; ++t) {
            const Index up = i / f.width + t / f.reach - edge, left = i % f.width + t % f.reach - edge;
            if (up < 0 || up >= f.height || left < 0 || left >= f.width) continue;
            double factor = 0;
            for (Index k = 0; k < f.depth; ++k) factor += double(q[k]) * f.window[k * f.reach * f.reach + t];
            sum += factor * f.values[(b * n + up * f.width + left) * f.depth + v];
          }
          y.push_back(sum);
        }
      }
  return y;
}

inline Values interactive_lambda(const moebius::InteractiveLambda& f) {
  Values y;
  for (Index branch = 0; branch < f.branches; ++branch)
    for (Index b = 0; b < f.batch; ++b)
      for (Index i = 0; i < f.n; ++i)
        for (Index h = 0; h < f.heads; ++h) {
          const float* q = f.query + (((branch * f.batch + b) * f.n + i) * f.heads + h) * f.depth;
          const float* keys = f.keys + (branch * f.n + i) * f.depth * f.tokens;
          for (Index v = 0; v < f.width; ++v) {
            double sum = 0;
            for (Index t = 0; t < f.tokens; ++t) {
              double score = 0;
              for (Index k = 0; k < f.depth; ++k) score += double(q[k]) * keys[k * f.tokens + t];
              sum += score * f.values[(branch * f.tokens + t) * f.width + v];
            }
            y.push_back(sum);
          }
        }
  return y;
}

// Both Mix-FFN: `expand(token, channel)` gives an expanded value, `project(gated [half], channel)` an output.
template <class F, class Expand, class Project>
inline Values feed_forward(const F& f, Expand expand, Project project) {
  const Index n = f.height * f.width, half = f.hidden / 2;
  Values y;
  for (Index b = 0; b < f.batch; ++b) {
    Values wide(std::size_t(f.hidden * n));
    for (Index i = 0; i < n; ++i) {
      const auto values = expand(f.x + (b * n + i) * f.channels);
      for (Index h = 0; h < f.hidden; ++h) wide[std::size_t(h * n + i)] = silu(values[std::size_t(h)]);
    }
    const Values seen = depthwise(wide, f.hidden, f.height, f.width, f.depthwise, f.depthwise_bias);
    for (Index i = 0; i < n; ++i) {
      Values gated;
      for (Index h = 0; h < half; ++h)
        gated.push_back(seen[std::size_t(h * n + i)] * silu(seen[std::size_t((half + h) * n + i)]));
      const Values out = project(gated);
      y.insert(y.end(), out.begin(), out.end());
    }
  }
  return y;
}

inline Values feed_forward(const moebius::FeedForward& f) {
  const auto multiply = [](const auto* x, const float* weight, const float* bias, Index inputs, Index outputs) {
    Values y;
    for (Index o = 0; o < outputs; ++o) {
      double sum = bias == nullptr ? 0 : bias[o];
      for (Index i = 0; i < inputs; ++i) sum += double(x[i]) * weight[o * inputs + i];
      y.push_back(sum);
    }
    return y;
  };
  return feed_forward(
      f, [&](const float* x) { return multiply(x, f.expand, f.expand_bias, f.channels, f.hidden); },
      [&](const Values& x) { return multiply(x.data(), f.project, nullptr, f.hidden / 2, f.channels); });
}

// Outputs of an INT8 product of values [depth].
template <class X>
inline Values int8_outputs(const X* x, Index depth, const moebius::Quantiser& q, const moebius::Int8Product& p, bool packed,
                           Index outputs) {
  std::vector<int> bytes;
  for (Index i = 0; i < depth; ++i) bytes.push_back(quantised(x[i], q.inverse[i], q.zero[i]));
  Values y;
  for (Index o = 0; o < outputs; ++o) y.push_back(product(p, bytes, packed, o));
  return y;
}

// A token [channels], normalised where there is a norm.
inline Values token(const float* x, Index channels, const moebius::TokenNorm& norm) {
  const Values values(x, x + channels);
  return norm.gain == nullptr ? values : normal(values, channels, 1, 1, norm.epsilon, norm.gain, norm.shift);
}

inline Values int8_feed_forward(const moebius::Int8FeedForward& f) {
  Values y = feed_forward(
      f,
      [&](const float* x) {
        return int8_outputs(token(x, f.channels, f.norm).data(), f.channels, f.quantiser, f.expand, true, f.hidden);
      },
      [&](const Values& x) { return int8_outputs(x.data(), f.hidden / 2, f.gated, f.project, true, f.channels); });
  for (std::size_t i = 0; f.norm.gain != nullptr && i < y.size(); ++i) y[i] += f.x[i];
  return y;
}

inline Values int8_linear(const moebius::Int8Linear& f, bool to_picture) {
  const Index each = f.tokens / f.batch;
  Values y(std::size_t(f.tokens * f.outputs));
  for (Index t = 0; t < f.tokens; ++t) {
    const Values x = token(f.x + t * f.inputs, f.inputs, f.norm);
    const Values out = int8_outputs(x.data(), f.inputs, f.quantiser, f.product, !to_picture, f.outputs);
    for (Index o = 0; o < f.outputs; ++o) {
      const auto at = std::size_t(to_picture ? (t / each * f.outputs + o) * each + t % each : t * f.outputs + o);
      y[at] = out[std::size_t(o)] + (f.skip == nullptr ? 0 : f.skip[at]);
    }
  }
  return y;
}

inline Values int8_linear_of_picture(const moebius::Int8LinearOfPicture& f) {
  const std::vector<float> ones(std::size_t(f.inputs), 1.0f), zeros(std::size_t(f.inputs), 0.0f);
  Values y;
  for (Index b = 0; b < f.batch; ++b) {
    const float* from = f.x + b * f.inputs * f.n;
    const Values x = normal(Values(from, from + f.inputs * f.n), f.inputs, f.n, f.groups, f.epsilon, ones.data(), zeros.data());
    for (Index i = 0; i < f.n; ++i) {
      Values pixel;
      for (Index c = 0; c < f.inputs; ++c) pixel.push_back(x[std::size_t(c * f.n + i)]);
      const Values out = int8_outputs(pixel.data(), f.inputs, f.quantiser, f.product, true, f.outputs);
      y.insert(y.end(), out.begin(), out.end());
    }
  }
  return y;
}

inline Values int8_pointwise(const moebius::Int8Pointwise& f) {
  Values y(std::size_t(f.batch * f.outputs * f.pixels));
  for (Index b = 0; b < f.batch; ++b)
    for (Index i = 0; i < f.pixels; ++i) {
      Values pixel;
      for (Index c = 0; c < f.inputs; ++c) pixel.push_back(f.x[(b * f.inputs + c) * f.pixels + i]);
      const Values out = int8_outputs(pixel.data(), f.inputs, f.quantiser, f.product, false, f.outputs);
      for (Index o = 0; o < f.outputs; ++o) y[std::size_t((b * f.outputs + o) * f.pixels + i)] = out[std::size_t(o)];
    }
  return y;
}

// 3x3 with a stride, or 2x2 taps for each of the four output phases of a picture enlarged twice (stride 0).
inline Values int8_convolution(const moebius::Int8Convolution& f, Index stride) {
  const bool enlarged = stride == 0;
  const auto size = [&](Index of) { return enlarged ? 2 * of : (of + f.before - 2) / stride + 1; };
  const Index high = size(f.height), wide = size(f.width);
  const Index reach = enlarged ? 2 : 3, depth = reach * reach * f.inputs, pixels = f.height * f.width;
  Values y;
  for (Index b = 0; b < f.batch; ++b) {
    const float* from = f.x + b * f.inputs * pixels;
    Values x(from, from + f.inputs * pixels);
    if (f.norm.gain != nullptr) {
      x = normal(x, f.inputs, pixels, f.norm.groups, f.norm.epsilon, f.norm.gain, f.norm.shift);
      for (double& value : x) value = silu(value);
    }
    for (Index o = 0; o < f.outputs; ++o)
      for (Index i = 0; i < high; ++i)
        for (Index j = 0; j < wide; ++j) {
          const Index phase = enlarged ? i % 2 * 2 + j % 2 : 0;
          std::vector<int> seen;
          for (Index t = 0; t < reach * reach; ++t)
            for (Index c = 0; c < f.inputs; ++c) {
              const Index up = enlarged ? i / 2 + i % 2 + t / 2 - 1 : stride * i + t / 3 - f.before;
              const Index left = enlarged ? j / 2 + j % 2 + t % 2 - 1 : stride * j + t % 3 - f.before;
              const bool inside = up >= 0 && up < f.height && left >= 0 && left < f.width;
              const double value = inside ? x[std::size_t(c * pixels + up * f.width + left)] : 0;
              seen.push_back(quantised(value, f.quantiser.inverse[c], f.quantiser.zero[c]));
            }
          const moebius::Int8Product p{f.product.weight + phase * f.outputs * depth, f.product.scale + phase * f.outputs,
                                       f.product.offset + phase * f.outputs};
          y.push_back(product(p, seen, false, o));
        }
  }
  return y;
}

// Both residual blocks: `half(separable, positive [channels], pixel)` gives the outputs of a pixel.
template <class F, class Pointwise, class Shortcut>
inline Values residual_block(const F& f, bool projected, Pointwise pointwise, Shortcut shortcut) {
  const Index n = f.height * f.width;
  Values result;
  for (Index b = 0; b < f.batch; ++b) {
    const float* first = f.x + b * f.inputs * n;
    const Values x(first, first + f.inputs * n);
    const auto half = [&](const Values& from, Index channels, const auto& s, bool skip) {
      Values active = normal(from, channels, n, f.groups, f.epsilon, s.gain, s.shift);
      for (double& value : active) value = silu(value);
      const Values seen = depthwise(active, channels, f.height, f.width, s.depthwise, s.depthwise_bias);
      Values y(std::size_t(f.outputs * n));
      for (Index i = 0; i < n; ++i) {
        Values positive;
        for (Index c = 0; c < channels; ++c) positive.push_back(relu(seen[std::size_t(c * n + i)]));
        const Values out = pointwise(s, positive, f.outputs);
        for (Index o = 0; o < f.outputs; ++o)
          y[std::size_t(o * n + i)] = out[std::size_t(o)] + (skip ? active[std::size_t(o * n + i)] : 0);
      }
      return y;
    };
    Values middle = half(x, f.inputs, f.first, !projected);
    for (std::size_t i = 0; i < middle.size(); ++i)
      middle[i] = float(middle[i] + f.time[(f.time_rows == 1 ? 0 : b) * f.outputs + Index(i) / n]);
    Values y = half(middle, f.outputs, f.second, true);
    for (Index i = 0; i < n; ++i) {
      Values pixel;
      for (Index c = 0; c < f.inputs; ++c) pixel.push_back(x[std::size_t(c * n + i)]);
      const Values skipped = projected ? shortcut(pixel) : pixel;
      for (Index o = 0; o < f.outputs; ++o) y[std::size_t(o * n + i)] += skipped[std::size_t(o)];
    }
    result.insert(result.end(), y.begin(), y.end());
  }
  return result;
}

inline Values residual_block(const moebius::ResidualBlock& f) {
  const auto multiply = [](const Values& x, const float* weight, const float* bias, Index outputs) {
    Values y;
    for (Index o = 0; o < outputs; ++o) {
      double sum = bias[o];
      for (std::size_t i = 0; i < x.size(); ++i) sum += x[i] * weight[std::size_t(o) * x.size() + i];
      y.push_back(sum);
    }
    return y;
  };
  return residual_block(
      f, f.shortcut != nullptr,
      [&](const moebius::Separable& s, const Values& x, Index outputs) { return multiply(x, s.pointwise, s.pointwise_bias, outputs); },
      [&](const Values& x) { return multiply(x, f.shortcut, f.shortcut_bias, f.outputs); });
}

inline Values int8_residual_block(const moebius::Int8ResidualBlock& f) {
  return residual_block(
      f, f.shortcut.weight != nullptr,
      [&](const moebius::Int8Separable& s, const Values& x, Index outputs) {
        return int8_outputs(x.data(), Index(x.size()), s.quantiser, s.product, false, outputs);
      },
      [&](const Values& x) { return int8_outputs(x.data(), Index(x.size()), f.shortcut_quantiser, f.shortcut, false, f.outputs); });
}

}  // namespace reference
