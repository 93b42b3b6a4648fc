// The library that ONNX Runtime loads: checks the arguments of operators of domain `moebius` and calls the kernels of this
// CPU. Each operator is a faster implementation of the model's function of the same domain and name.
#include <mutex>
#include <string>
#include <vector>

#include "call.h"
#include "dispatch.h"
#include "int8_operators.h"

#if defined(_WIN32)
#define MOEBIUS_API extern "C" __declspec(dllexport)
#else
#define MOEBIUS_API extern "C" __attribute__((visibility("default")))
#endif

namespace {

using moebius::kernels;

void feed_forward(const Attributes& attributes, const Call& call) {
  const Tensor x = call.input(0), expand = call.input(1);
  const int64_t height = attributes.size[0], width = attributes.size[1];
  expect(x.sizes.size() == 3 && is_product(x.sizes[1], height, width) && x.sizes[2] > 0, "x", x.sizes,
         "[batch, height*width, channels]");
  const int64_t channels = x.sizes[2];
  expect(expand.sizes.size() == 4 && expand.sizes[0] > 0 && expand.sizes[0] % 2 == 0, "expand", expand.sizes,
         "[hidden, channels, 1, 1] with an even hidden");
  const int64_t hidden = expand.sizes[0];
  moebius::FeedForward f{};
  f.batch = x.sizes[0], f.height = height, f.width = width, f.channels = channels, f.hidden = hidden;
  f.x = x.data;
  f.expand = call.input(1, "expand", {hidden, channels, 1, 1});
  f.expand_bias = call.input(2, "expand_bias", {hidden});
  f.depthwise = call.input(3, "depthwise", {hidden, 1, 3, 3});
  f.depthwise_bias = call.input(4, "depthwise_bias", {hidden});
  f.project = call.input(5, "project", {channels, hidden / 2, 1, 1});
  f.y = call.output(x.sizes);
  if (f.batch == 0) return;  // no values to read, so the other sizes are not bounded
  kernels().feed_forward(f, call.threads());
}

void local_lambda(const Attributes& attributes, const Call& call) {
  const Tensor query = call.input(0), window = call.input(3);
  const int64_t height = attributes.size[0], width = attributes.size[1], heads = attributes.heads;
  expect(window.sizes.size() == 3 && window.sizes[0] > 0 && window.sizes[1] == window.sizes[2] &&
             window.sizes[1] % 2 == 1,
         "window", window.sizes, "[depth, reach, reach] with an odd reach");
  const int64_t depth = window.sizes[0], reach = window.sizes[1];
  expect(query.sizes.size() == 3 && is_product(query.sizes[1], height, width) && heads > 0 &&
             is_product(query.sizes[2], depth, heads),
         "query", query.sizes, "[batch, height*width, heads*depth]");
  moebius::LocalLambda f{};
  f.batch = query.sizes[0], f.height = height, f.width = width, f.heads = heads, f.depth = depth, f.reach = reach;
  f.query = query.data;
  f.values = call.input(1, "values", {f.batch, height * width, depth});
  f.summary = call.input(2, "summary", {f.batch, depth, depth});
  f.window = window.data;
  f.y = call.output(query.sizes);
  if (f.batch == 0) return;
  kernels().local_lambda(f, call.threads());
}

void interactive_lambda(const Attributes& attributes, const Call& call) {
  const Tensor query = call.input(0), keys = call.input(1), values = call.input(2);
  const int64_t heads = attributes.heads;
  expect(keys.sizes.size() == 4 && keys.sizes[1] > 0 && keys.sizes[2] > 0 && keys.sizes[3] > 0, "keys", keys.sizes,
         "[branches, positions, depth, tokens]");
  const int64_t branches = keys.sizes[0], n = keys.sizes[1], depth = keys.sizes[2], tokens = keys.sizes[3];
  expect(query.sizes.size() == 4 && query.sizes[0] == branches && query.sizes[2] == n && heads > 0 &&
             is_product(query.sizes[3], depth, heads),
         "query", query.sizes, "[branches, batch, positions, heads*depth]");
  expect(values.sizes.size() == 3 && values.sizes[0] == branches && values.sizes[1] == tokens && values.sizes[2] > 0,
         "values", values.sizes, "[branches, tokens, width]");
  moebius::InteractiveLambda f{branches,   query.sizes[1], n,           heads,    depth, tokens, values.sizes[2],
                               query.data, keys.data,      values.data, nullptr};
  f.y = call.output({branches, f.batch, n, heads * f.width});
  if (branches == 0 || f.batch == 0) return;
  kernels().interactive_lambda(f, call.threads());
}

// Six of a block's inputs: gain, shift, depthwise, its bias, pointwise, its bias.
moebius::Separable separable(const Call& call, size_t first, const std::string& name, int64_t inputs, int64_t outputs) {
  moebius::Separable s{};
  s.gain = call.input(first, (name + "_gain").c_str(), {inputs});
  s.shift = call.input(first + 1, (name + "_shift").c_str(), {inputs});
  s.depthwise = call.input(first + 2, (name + "_depthwise").c_str(), {inputs, 1, 3, 3});
  s.depthwise_bias = call.input(first + 3, (name + "_depthwise_bias").c_str(), {inputs});
  s.pointwise = call.input(first + 4, (name + "_pointwise").c_str(), {outputs, inputs, 1, 1});
  s.pointwise_bias = call.input(first + 5, (name + "_pointwise_bias").c_str(), {outputs});
  return s;
}

template <bool Projected>
void residual_block(const Attributes& attributes, const Call& call) {
  moebius::ResidualBlock f{};
  read_block(f, attributes, call, Projected);
  f.first = separable(call, 2, "first", f.inputs, f.outputs);
  f.second = separable(call, 8, "second", f.outputs, f.outputs);
  if (Projected) {
    f.shortcut = call.input(14, "shortcut", {f.outputs, f.inputs, 1, 1});
    f.shortcut_bias = call.input(15, "shortcut_bias", {f.outputs});
  }
  f.y = call.output({f.batch, f.outputs, f.height, f.width});
  if (f.batch == 0) return;
  kernels().residual_block(f, call.threads());
}

// 3x3, padding 1, of a picture that is `scale` times as high and wide as x.
void convolve(const Call& call, int64_t scale, void (*kernel)(const moebius::Conv3x3&, const moebius::Threads&)) {
  const Tensor x = call.input(0), weight = call.input(1);
  const auto positive = [](const Sizes& sizes) {
    for (int64_t size : sizes)
      if (size < 1) return false;
    return sizes.size() == 4;
  };
  expect(positive(x.sizes), "x", x.sizes, "[batch, inputs, height, width]");
  expect(positive(weight.sizes), "weight", weight.sizes, "[outputs, inputs, 3, 3]");
  moebius::Conv3x3 f{};
  f.batch = x.sizes[0], f.inputs = x.sizes[1], f.height = x.sizes[2], f.width = x.sizes[3];
  f.outputs = weight.sizes[0];
  f.x = x.data;
  f.weight = call.input(1, "weight", {f.outputs, f.inputs, 3, 3});
  f.bias = call.input(2, "bias", {f.outputs});
  f.y = call.output({f.batch, f.outputs, f.height * scale, f.width * scale});
  kernel(f, call.threads());
}

void conv3x3(const Attributes&, const Call& call) { convolve(call, 1, kernels().conv3x3); }

void upsample_conv3x3(const Attributes&, const Call& call) { convolve(call, 2, kernels().upsample_conv3x3); }

void group_norm(const Attributes& attributes, const Call& call) {
  const Tensor x = call.input(0);
  expect(x.sizes.size() >= 3 && x.sizes[1] > 0, "x", x.sizes, "[batch, channels, ...]");
  moebius::GroupNorm f{};
  f.batch = x.sizes[0], f.channels = x.sizes[1], f.groups = attributes.groups, f.epsilon = attributes.epsilon;
  f.pixels = 1;
  for (size_t i = 2; i < x.sizes.size(); ++i) f.pixels *= x.sizes[i];
  check_groups(attributes, f.channels, f.channels);
  f.x = x.data;
  f.gain = call.input(1, "gain", {f.channels});
  f.shift = call.input(2, "shift", {f.channels});
  f.y = call.output(x.sizes);
  if (f.batch == 0 || f.pixels == 0) return;
  kernels().group_norm(f, call.threads());
}

template <Linear Kind>
void int8_linear(const Attributes& attributes, const Call& call) {
  const moebius::Int8Linear f = int8_linear_of(attributes, call, Kind);
  const bool to_tokens = Kind == Linear::tokens || Kind == Linear::normed;
  if (f.tokens > 0) (to_tokens ? kernels().int8_linear : kernels().int8_linear_to_picture)(f, call.threads());
}

void int8_linear_of_picture(const Attributes& attributes, const Call& call) {
  const moebius::Int8LinearOfPicture f = int8_linear_of_picture_of(attributes, call);
  if (f.batch > 0) kernels().int8_linear_of_picture(f, call.threads());
}

template <bool Normed>
void int8_feed_forward(const Attributes& attributes, const Call& call) {
  const moebius::Int8FeedForward f = int8_feed_forward_of(attributes, call, Normed);
  if (f.batch > 0) kernels().int8_feed_forward(f, call.threads());
}

template <bool Projected>
void int8_residual_block(const Attributes& attributes, const Call& call) {
  const moebius::Int8ResidualBlock f = int8_residual_block_of(attributes, call, Projected);
  if (f.batch > 0) kernels().int8_residual_block(f, call.threads());
}

template <Resized Size, bool Normed>
void int8_convolution(const Attributes& attributes, const Call& call) {
  const moebius::Int8Convolution f = int8_convolution_of(attributes, call, Size, Normed);
  if (f.batch == 0) return;
  (Size == Resized::no     ? kernels().int8_conv3x3
   : Size == Resized::half ? kernels().int8_downsample_conv3x3
                           : kernels().int8_upsample_conv3x3)(f, call.threads());
}

void int8_conv1x1(const Attributes&, const Call& call) {
  const moebius::Int8Pointwise f = int8_pointwise_of(call);
  if (f.batch > 0) kernels().int8_conv1x1(f, call.threads());
}

struct Input {
  int type, kind;
};

struct Operator : ort::CustomOp {
  Operator(const char* operator_name, std::vector<Input> takes, void (*computes)(const Attributes&, const Call&));
  const char* text;
  std::vector<Input> arguments;
  void (*run)(const Attributes&, const Call&);
};

struct Kernel {
  Kernel(Api a, const Operator* o, Attributes found) : api(a), op(o), attributes(std::move(found)) {
    moebius::kernel_made();
  }
  ~Kernel() { moebius::kernel_gone(); }
  Api api;
  const Operator* op;
  Attributes attributes;
};

const Operator* self(const ort::CustomOp* op) { return static_cast<const Operator*>(op); }

Operator::Operator(const char* operator_name, std::vector<Input> takes,
                   void (*computes)(const Attributes&, const Call&))
    : ort::CustomOp{}, text(operator_name), arguments(std::move(takes)), run(computes) {
  version = 17;
  CustomOp::name = [](const ort::CustomOp* op) { return self(op)->text; };
  provider = [](const ort::CustomOp*) -> const char* { return nullptr; };
  input_type = [](const ort::CustomOp* op, size_t i) { return self(op)->arguments[i].type; };
  inputs = [](const ort::CustomOp* op) { return self(op)->arguments.size(); };
  output_type = [](const ort::CustomOp*, size_t) { return ort::kFloat; };
  outputs = [](const ort::CustomOp*) { return size_t(1); };
  input_kind = [](const ort::CustomOp* op, size_t i) { return self(op)->arguments[i].kind; };
  output_kind = [](const ort::CustomOp*, size_t) { return ort::kRequired; };
  input_memory = [](const ort::CustomOp*, size_t) { return 0; };
  variadic_input_minimum = variadic_output_minimum = [](const ort::CustomOp*) { return 1; };
  variadic_input_alike = variadic_output_alike = [](const ort::CustomOp*) { return 1; };
  start_version = [](const ort::CustomOp*) { return 1; };
  end_version = [](const ort::CustomOp*) { return 1; };
  create = [](const ort::CustomOp* op, Api::Table table, const ort::KernelInfo* info, void** out) -> ort::Status* {
    const Api api(table);
    try {
      *out = new Kernel(api, self(op), read(api, info));
      return nullptr;
    } catch (const std::exception& error) {
      return api.failure(error.what());
    }
  };
  compute = [](void* state, ort::KernelContext* context) -> ort::Status* {
    const Kernel& kernel = *static_cast<Kernel*>(state);
    try {
      kernel.op->run(kernel.attributes, Call(kernel.api, context));
      return nullptr;
    } catch (const std::exception& error) {
      return kernel.api.failure((std::string("moebius::") + kernel.op->text + ": " + error.what()).c_str());
    }
  };
  destroy = [](void* state) { delete static_cast<Kernel*>(state); };
}

std::vector<Input> floats(int count) { return std::vector<Input>(size_t(count), {ort::kFloat, ort::kRequired}); }

std::vector<Input> with_bytes(std::vector<Input> inputs, std::initializer_list<size_t> places) {
  for (size_t place : places) inputs[place].type = ort::kInt8;
  return inputs;
}

std::vector<Input> with_optional(std::vector<Input> inputs, int type, int count) {
  inputs.insert(inputs.end(), size_t(count), {type, ort::kOptional});
  return inputs;
}

const std::vector<Operator>& operators() {
  static const std::vector<Operator> all{
      {"FeedForward", floats(6), feed_forward},
      {"LocalLambda", with_optional(floats(4), ort::kInt64, 2), local_lambda},
      {"InteractiveLambda", floats(3), interactive_lambda},
      {"ResidualBlock", floats(14), residual_block<false>},
      {"ProjectedResidualBlock", floats(16), residual_block<true>},
      {"Conv3x3", floats(3), conv3x3},
      {"UpsampleConv3x3", floats(3), upsample_conv3x3},
      {"GroupNorm", floats(3), group_norm},
      {"Int8Linear", with_bytes(floats(6), {3}), int8_linear<Linear::tokens>},
      {"Int8NormLinear", with_bytes(floats(8), {5}), int8_linear<Linear::normed>},
      {"Int8LinearToPicture", with_bytes(floats(6), {3}), int8_linear<Linear::to_picture>},
      {"Int8LinearAddedToPicture", with_bytes(floats(7), {3}), int8_linear<Linear::added_to_picture>},
      {"Int8LinearOfPicture", with_bytes(floats(6), {3}), int8_linear_of_picture},
      {"Int8Conv3x3", with_bytes(floats(6), {3}), int8_convolution<Resized::no, false>},
      {"Int8NormConv3x3", with_bytes(floats(8), {5}), int8_convolution<Resized::no, true>},
      {"Int8DownsampleConv3x3", with_bytes(floats(6), {3}), int8_convolution<Resized::half, false>},
      {"Int8UpsampleConv3x3", with_bytes(floats(6), {3}), int8_convolution<Resized::twice, false>},
      {"Int8Conv1x1", with_bytes(floats(6), {3}), int8_conv1x1},
      {"Int8FeedForward", with_bytes(floats(13), {3, 10}), int8_feed_forward<false>},
      {"Int8NormFeedForward", with_bytes(floats(15), {5, 12}), int8_feed_forward<true>},
      {"Int8ResidualBlock", with_bytes(floats(20), {8, 17}), int8_residual_block<false>},
      {"Int8ProjectedResidualBlock", with_bytes(floats(25), {8, 17, 22}), int8_residual_block<true>},
  };
  return all;
}

}  // namespace

// The instruction set that the kernels use here.
MOEBIUS_API const char* moebius_kernels_variant() { return kernels().name; }

MOEBIUS_API ort::Status* RegisterCustomOps(ort::SessionOptions* options, const ort::ApiBase* base) {
  const Api::Table table = base->get(ort::kApiVersion);
  if (table == nullptr) return Api(base->get(1)).failure("moebius kernels need ONNX Runtime 1.19 or newer");
  const Api api(table);
  static std::mutex lock;
  std::lock_guard<std::mutex> hold(lock);
  static ort::Domain* domain = nullptr;  // never released, because sessions may outlive it
  if (domain == nullptr) {
    ort::Domain* made = nullptr;
    if (ort::Status* status = api.create_domain("moebius", &made)) return status;
    for (const Operator& op : operators())
      if (ort::Status* status = api.add_operator(made, &op)) return status;
    domain = made;
  }
  return api.add_domain(options, domain);
}
