// Predictors for Python: made once for each layer, then one call for each prediction.

#include <tvm/ffi/container/map.h>
#include <tvm/ffi/memory.h>
#include <tvm/ffi/object.h>
#include <tvm/ffi/tvm_ffi.h>

#include <algorithm>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <utility>

#include "predictor.h"
#include "tensors.h"

namespace vep {
namespace {

using tvm::ffi::Map;
using tvm::ffi::String;
using tvm::ffi::Tensor;
using tvm::ffi::TensorView;
using Tensors = Map<String, Tensor>;

void check_shape(const TensorView& tensor, std::initializer_list<int64_t> shape, const char* what) {
  const auto found = tensor.shape();
  if (std::equal(shape.begin(), shape.end(), found.begin(), found.end())) return;
  const auto written = [](auto begin, auto end) {
    std::string text;
    for (; begin != end; ++begin) text += (text.empty() ? "" : ", ") + std::to_string(*begin);
    return "(" + text + ")";
  };
  TVM_FFI_THROW(ValueError) << what << " must have shape " << written(shape.begin(), shape.end()) << ", it has "
                            << written(found.begin(), found.end());
}

// Reads tensors by name, each of a shape that follows from those before it.
class Reader {
 public:
  explicit Reader(const Tensors& tensors) : tensors_(tensors) {}

  bool has(const std::string& name) const { return tensors_.count(name) > 0; }

  TensorView matrix(const std::string& name) const {
    TVM_FFI_CHECK(has(name), ValueError) << "there is no " << name;
    const TensorView tensor(tensors_.at(name));
    TVM_FFI_CHECK(tensor.ndim() == 2 && tensor.numel() > 0, ValueError)
        << name << " must have two dimensions and not be empty";
    return tensor;
  }

  const float* floats(const std::string& name, std::initializer_list<int64_t> shape) const {
    TVM_FFI_CHECK(has(name), ValueError) << "there is no " << name;
    const TensorView tensor(tensors_.at(name));
    check_shape(tensor, shape, name.c_str());
    return cpu_data<float>(tensor, 0, name.c_str());
  }

  const float* floats_or_null(const std::string& name, std::initializer_list<int64_t> shape) const {
    return has(name) ? floats(name, shape) : nullptr;
  }

  Linear linear(const std::string& name) const {
    const TensorView weight = matrix(name + ".weight");
    const int64_t rows = weight.size(0), cols = weight.size(1);
    return {floats(name + ".weight", {rows, cols}), floats_or_null(name + ".bias", {rows}), rows, cols};
  }

 private:
  const Tensors& tensors_;
};

void check_link(const Linear& layer, int64_t width, const char* what) {
  TVM_FFI_CHECK(layer.cols == width, ValueError)
      << what << ".weight has " << layer.cols << " columns, what it is applied to has " << width;
}

PredictorWeights read_weights(const Tensors& tensors, double norm_eps, bool norm_is_centered, double estimator_eps) {
  const Reader reader(tensors);
  PredictorWeights weights;
  weights.logits = reader.linear("logits");
  weights.has_estimator = reader.has("reduce.weight");
  if (weights.has_estimator) {
    weights.reduce = reader.linear("reduce");
    weights.widen = reader.linear("widen");
    weights.narrow = reader.linear("narrow");
    const int64_t width = weights.reduce.rows;
    check_link(weights.widen, width, "widen");
    check_link(weights.narrow, weights.widen.rows, "narrow");
    check_link(weights.logits, width, "logits");
    TVM_FFI_CHECK(weights.narrow.rows == width, ValueError)
        << "narrow.weight has " << weights.narrow.rows << " rows, what it is added to has " << width;
    weights.estimator_norm = {reader.floats("norm.weight", {width}), reader.floats("norm.bias", {width}),
                              static_cast<float>(estimator_eps), true};
  }
  weights.has_quasi_hidden = reader.has("factor");
  if (weights.has_quasi_hidden) {
    const int64_t size = weights.hidden_size();
    QuasiHidden& quasi = weights.quasi_hidden;
    quasi.factor = reader.floats("factor", {size});
    quasi.shift = reader.floats_or_null("source_shift", {size});
    quasi.norm = {reader.floats_or_null("target_gain", {size}), reader.floats_or_null("target_shift", {size}),
                  static_cast<float>(norm_eps), norm_is_centered};
    if (reader.has("vectors")) {
      quasi.num_vectors = reader.matrix("vectors").size(0);
      quasi.vectors = reader.floats("vectors", {quasi.num_vectors, size});
      TVM_FFI_CHECK(quasi.norm.gain, ValueError) << "there is no target_gain";
    }
  }
  return weights;
}

class PredictorObj : public tvm::ffi::Object {
 public:
  PredictorObj(Tensors kept, const PredictorWeights& weights, const TopK& routing)
      : kept(std::move(kept)), weights(weights), routing(routing) {}

  const Tensors kept;  // the memory that `weights` points to
  const PredictorWeights weights;
  const TopK routing;

  TVM_FFI_DECLARE_OBJECT_INFO_FINAL("vep.Predictor", PredictorObj, tvm::ffi::Object);
};

class PredictorRef : public tvm::ffi::ObjectRef {
 public:
  PredictorRef(Tensors kept, const PredictorWeights& weights, const TopK& routing)
      : ObjectRef(tvm::ffi::make_object<PredictorObj>(std::move(kept), weights, routing)) {}
  TVM_FFI_DEFINE_OBJECT_REF_METHODS_NOTNULLABLE(PredictorRef, tvm::ffi::ObjectRef, PredictorObj);
};

// `tensors`: float32, contiguous, named as vllm_expert_prefetch/prediction/compiled.py says; they are kept, not
// copied, and must not change.
PredictorRef Create(Tensors tensors, int64_t top_k, bool renormalize, double scaling, double norm_eps,
                    bool norm_is_centered, double estimator_eps) {
  TVM_FFI_CHECK(top_k > 0, ValueError) << "top_k " << top_k << " must be at least 1";
  const PredictorWeights weights = read_weights(tensors, norm_eps, norm_is_centered, estimator_eps);
  return PredictorRef(std::move(tensors), weights, {top_k, renormalize, static_cast<float>(scaling)});
}

FloatType float_type_of(const TensorView& tensor, const char* what) {
  const DLDataType type = tensor.dtype();
  if (type.lanes == 1 && type.code == kDLBfloat && type.bits == 16) return FloatType::kBFloat16;
  if (type.lanes == 1 && type.code == kDLFloat && type.bits == 16) return FloatType::kFloat16;
  TVM_FFI_CHECK(type.lanes == 1 && type.code == kDLFloat && type.bits == 32, TypeError)
      << what << " must be float32, bfloat16 or float16, its type is " << static_cast<int>(type.code) << "/"
      << static_cast<int>(type.bits);
  return FloatType::kFloat32;
}

// The routing of T tokens, which only default vectors read.
void read_routing(const TensorView& topk_ids, const TensorView& topk_weights, PredictorInput& input) {
  TVM_FFI_CHECK(topk_ids.ndim() == 2, ValueError) << "topk_ids must have two dimensions, has " << topk_ids.ndim();
  input.num_chosen = topk_ids.size(1);
  check_shape(topk_ids, {input.num_tokens, input.num_chosen}, "topk_ids");
  check_shape(topk_weights, {input.num_tokens, input.num_chosen}, "topk_weights");
  input.ids_are_64_bit = is_int64(topk_ids);
  input.topk_ids = input.ids_are_64_bit ? static_cast<const void*>(cpu_data<int64_t>(topk_ids, 0, "topk_ids"))
                                        : cpu_data<int32_t>(topk_ids, 0, "topk_ids");
  input.topk_weights = cpu_data<float>(topk_weights, 0, "topk_weights");
}

// `hidden` (T, H) float32, bfloat16 or float16, `topk_ids` (T, K) int32 or int64, `topk_weights` (T, K) float32;
// `out_ids` (T, count) int64 and `out_weights` (T, count) float32 are written.
void Predict(PredictorRef ref, TensorView hidden, TensorView topk_ids, TensorView topk_weights, TensorView out_ids,
             TensorView out_weights) {
  const PredictorWeights& weights = ref->weights;
  PredictorInput input;
  TVM_FFI_CHECK(hidden.ndim() == 2, ValueError) << "hidden must have two dimensions, has " << hidden.ndim();
  TVM_FFI_CHECK(hidden.device().device_type == kDLCPU, ValueError) << "hidden must lie on the CPU";
  TVM_FFI_CHECK(hidden.IsContiguous(), ValueError) << "hidden must be contiguous";
  input.num_tokens = hidden.size(0);
  check_shape(hidden, {input.num_tokens, weights.hidden_size()}, "hidden");
  input.hidden = hidden.data_ptr();
  input.hidden_type = float_type_of(hidden, "hidden");
  if (weights.quasi_hidden.vectors) read_routing(topk_ids, topk_weights, input);
  const int64_t count = out_ids.ndim() == 2 ? out_ids.size(1) : 0;
  TVM_FFI_CHECK(count > 0 && count <= weights.logits.rows && out_ids.size(0) == input.num_tokens, ValueError)
      << "out_ids must have shape (" << input.num_tokens << ", 1 to " << weights.logits.rows << ")";
  int64_t* ids = cpu_data<int64_t>(out_ids, 0, "out_ids");
  float* chosen = cpu_data<float>(out_weights, input.num_tokens * count, "out_weights");
  thread_local PredictorScratch scratch;
  try {
    predict(weights, ref->routing, input, count, ids, chosen, scratch);
  } catch (const std::invalid_argument& error) {
    TVM_FFI_THROW(ValueError) << error.what();
  }
}

}  // namespace
}  // namespace vep

TVM_FFI_DLL_EXPORT_TYPED_FUNC(predictor_create, vep::Create);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(predictor_predict, vep::Predict);
