// One call of an operator: its inputs and attributes, checked, its output, and the runtime's threads.
#pragma once

#include <stdexcept>
#include <string>
#include <vector>

#include "ort_abi.h"
#include "work.h"

namespace {

using ort::Api;
using Sizes = std::vector<int64_t>;

struct Refusal : std::runtime_error {
  using std::runtime_error::runtime_error;
};

inline std::string text(const Sizes& sizes) {
  std::string out = "[";
  for (size_t i = 0; i < sizes.size(); ++i) out += (i ? ", " : "") + std::to_string(sizes[i]);
  return out + "]";
}

inline void check(const Api& api, ort::Status* status, const char* what) {
  if (status == nullptr) return;
  api.release(status);
  throw Refusal(std::string("ONNX Runtime refused: ") + what);
}

// An input: its numbers and sizes; `data` is null where an optional input was left out.
struct Tensor {
  const float* data = nullptr;
  Sizes sizes;
};

// One call of an operator.
class Call {
 public:
  Call(const Api& api, ort::KernelContext* context) : api_(api), context_(context) {}

  Tensor input(size_t index) const {
    size_t count = 0;
    check(api_, api_.input_count(context_, &count), "to count inputs");
    if (index >= count) return {};
    const ort::Value* value = nullptr;
    check(api_, api_.input(context_, index, &value), "an input");
    if (value == nullptr) return {};
    ort::Shape* shape = nullptr;
    check(api_, api_.shape(value, &shape), "a shape");
    Tensor tensor;
    size_t rank = 0;
    ort::Status* status = api_.rank(shape, &rank);
    if (status == nullptr) {
      tensor.sizes.resize(rank);
      status = api_.sizes(shape, tensor.sizes.data(), rank);
    }
    api_.release(shape);
    check(api_, status, "a shape's sizes");
    void* data = nullptr;
    check(api_, api_.data(const_cast<ort::Value*>(value), &data), "an input's data");
    tensor.data = static_cast<const float*>(data);
    return tensor;
  }

  // The input, which must be of these sizes.
  const float* input(size_t index, const char* name, const Sizes& sizes) const {
    const Tensor tensor = input(index);
    if (tensor.data == nullptr || tensor.sizes != sizes)
      throw Refusal(std::string(name) + " is " + (tensor.data ? text(tensor.sizes) : "missing") + "; expected " +
                    text(sizes));
    return tensor.data;
  }

  // The same for an INT8 input; ONNX Runtime checks its type.
  const std::int8_t* bytes(size_t index, const char* name, const Sizes& sizes) const {
    return reinterpret_cast<const std::int8_t*>(input(index, name, sizes));
  }

  float* output(const Sizes& sizes) const {
    ort::Value* value = nullptr;
    check(api_, api_.output(context_, 0, sizes.data(), sizes.size(), &value), "an output");
    void* data = nullptr;
    check(api_, api_.data(value, &data), "an output's data");
    return static_cast<float*>(data);
  }

  moebius::Threads threads() const { return {run, const_cast<Call*>(this)}; }

 private:
  static void run(void* self, void (*f)(void*, size_t), size_t count, void* data) {
    const Call& call = *static_cast<Call*>(self);
    check(call.api_, call.api_.parallel(call.context_, f, count, 0, data), "to run in parallel");
  }

  const Api& api_;
  ort::KernelContext* context_;
};

inline void expect(bool fits, const char* name, const Sizes& sizes, const char* wanted) {
  if (!fits) throw Refusal(std::string(name) + " is " + text(sizes) + "; expected " + wanted);
}

// The attributes of all operators. A missing one has a value that every operator refuses.
struct Attributes {
  Sizes size;  // height, width
  Sizes pads = {1, 1, 1, 1};
  int64_t heads = 0, groups = 0;
  float epsilon = -1;
};

// Whether size = one * other, without computing the product, which may overflow.
inline bool is_product(int64_t size, int64_t one, int64_t other) { return one > 0 && size % one == 0 && size / one == other; }

inline Attributes read(const Api& api, const ort::KernelInfo* info) {
  Attributes found;
  const auto optional = [&](ort::Status* status) {
    if (status != nullptr) api.release(status);
    return status == nullptr;
  };
  size_t count = 2;
  found.size.resize(2);
  if (!optional(api.attribute(info, "size", found.size.data(), &count)) || count != 2 || found.size[0] < 1 ||
      found.size[1] < 1)
    found.size = {0, 0};
  count = 4;
  if (!optional(api.attribute(info, "pads", found.pads.data(), &count)) || count != 4) found.pads = {1, 1, 1, 1};
  if (!optional(api.attribute(info, "heads", &found.heads))) found.heads = 0;
  if (!optional(api.attribute(info, "groups", &found.groups))) found.groups = 0;
  if (!optional(api.attribute(info, "epsilon", &found.epsilon))) found.epsilon = -1;
  return found;
}

}  // namespace
