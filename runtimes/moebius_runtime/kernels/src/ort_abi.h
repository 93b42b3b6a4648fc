// The part of ONNX Runtime's C interface that a custom-operator library needs.
//
// That interface is a table of functions whose order never changes (new ones are added at its end), so an index
// identifies an entry. Indices and signatures: ONNX Runtime's documentation of OrtApi and OrtCustomOp; version 17 of the latter.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ort {

struct Status;
struct Value;
struct Shape;
struct KernelInfo;
struct KernelContext;
struct Domain;
struct SessionOptions;

constexpr uint32_t kApiVersion = 19;  // of ONNX Runtime 1.19, the oldest that the package takes
constexpr int kInvalidArgument = 2, kFloat = 1, kInt8 = 3, kInt64 = 7, kRequired = 0, kOptional = 1;

class Api {
 public:
  using Table = const void* const*;
  explicit Api(Table table = nullptr) : table_(table) {}

  Status* failure(const char* text) const { return call<0, Status*>(kInvalidArgument, text); }
  Status* create_domain(const char* name, Domain** out) const { return call<26, Status*>(name, out); }
  Status* add_operator(Domain* domain, const struct CustomOp* op) const { return call<27, Status*>(domain, op); }
  Status* add_domain(SessionOptions* options, Domain* domain) const { return call<28, Status*>(options, domain); }
  Status* data(Value* value, void** out) const { return call<51, Status*>(value, out); }
  Status* rank(const Shape* shape, size_t* out) const { return call<61, Status*>(shape, out); }
  Status* sizes(const Shape* shape, int64_t* out, size_t count) const { return call<62, Status*>(shape, out, count); }
  Status* shape(const Value* value, Shape** out) const { return call<65, Status*>(value, out); }
  Status* attribute(const KernelInfo* info, const char* name, float* out) const {
    return call<85, Status*>(info, name, out);
  }
  Status* attribute(const KernelInfo* info, const char* name, int64_t* out) const {
    return call<86, Status*>(info, name, out);
  }
  Status* input_count(const KernelContext* context, size_t* out) const { return call<88, Status*>(context, out); }
  Status* input(const KernelContext* context, size_t index, const Value** out) const {
    return call<90, Status*>(context, index, out);
  }
  Status* output(KernelContext* context, size_t index, const int64_t* sizes, size_t rank, Value** out) const {
    return call<91, Status*>(context, index, sizes, rank, out);
  }
  void release(Status* status) const { call<93, void>(status); }
  void release(Shape* shape) const { call<99, void>(shape); }
  Status* attribute(const KernelInfo* info, const char* name, int64_t* out, size_t* count) const {
    return call<163, Status*>(info, name, out, count);
  }
  Status* parallel(const KernelContext* context, void (*f)(void*, size_t), size_t count, size_t batches,
                   void* data) const {
    return call<274, Status*>(context, f, count, batches, data);
  }

 private:
  template <int Place, class Result, class... Arguments>
  Result call(Arguments... arguments) const {
    return reinterpret_cast<Result (*)(Arguments...)>(const_cast<void*>(table_[Place]))(arguments...);
  }
  Table table_;
};

struct ApiBase {
  Api::Table (*get)(uint32_t version);
  const char* (*version)();
};

struct CustomOp {
  uint32_t version;
  void* (*create_v1)(const CustomOp*, Api::Table, const KernelInfo*);
  const char* (*name)(const CustomOp*);
  const char* (*provider)(const CustomOp*);
  int (*input_type)(const CustomOp*, size_t);
  size_t (*inputs)(const CustomOp*);
  int (*output_type)(const CustomOp*, size_t);
  size_t (*outputs)(const CustomOp*);
  void (*compute_v1)(void*, KernelContext*);
  void (*destroy)(void*);
  int (*input_kind)(const CustomOp*, size_t);
  int (*output_kind)(const CustomOp*, size_t);
  int (*input_memory)(const CustomOp*, size_t);
  int (*variadic_input_minimum)(const CustomOp*);
  int (*variadic_input_alike)(const CustomOp*);
  int (*variadic_output_minimum)(const CustomOp*);
  int (*variadic_output_alike)(const CustomOp*);
  Status* (*create)(const CustomOp*, Api::Table, const KernelInfo*, void**);
  Status* (*compute)(void*, KernelContext*);
  Status* (*infer_shapes)(const CustomOp*, void*);
  int (*start_version)(const CustomOp*);
  int (*end_version)(const CustomOp*);
};

}  // namespace ort
