// Predictions of one layer on the host, in one call: the arithmetic of vllm_expert_prefetch/prediction, in float32.
// Free of tvm_ffi.
#pragma once

#include <cstdint>
#include <vector>

namespace vep {

// y = W x + b. `weight` (rows, cols) row by row, `bias` (rows) or null.
struct Linear {
  const float* weight = nullptr;
  const float* bias = nullptr;
  int64_t rows = 0;
  int64_t cols = 0;
};

// gain * (x - mean(x) if centered else x) / sqrt(mean(square) + eps) + shift; `shift` may be null.
struct NormWeights {
  const float* gain = nullptr;
  const float* shift = nullptr;
  float eps = 0;
  bool centered = false;
};

// q = norm((x - shift) * factor + sum of weight * vector over the executed experts), or without `vectors`
// q = (x - shift) * factor + norm.shift.
struct QuasiHidden {
  const float* factor = nullptr;   // (H)
  const float* shift = nullptr;    // (H) or null
  const float* vectors = nullptr;  // (num_vectors, H) or null
  int64_t num_vectors = 0;
  NormWeights norm;
};

// Where a prediction comes from. The memory must stay; nothing in it is written.
struct PredictorWeights {
  bool has_quasi_hidden = false;  // otherwise q is what the router reads
  QuasiHidden quasi_hidden;
  bool has_estimator = false;  // otherwise the logits are those of q
  Linear reduce, widen, narrow;
  NormWeights estimator_norm;
  Linear logits;

  int64_t hidden_size() const { return has_estimator ? reduce.cols : logits.cols; }
};

// Plain softmax top-k.
struct TopK {
  int64_t top_k = 1;
  bool renormalize = true;
  float scaling = 1;
};

enum class FloatType { kFloat32, kBFloat16, kFloat16 };

// One step of T tokens: `hidden` (T, H), and the true routing (T, K), read only where there are default vectors.
struct PredictorInput {
  const void* hidden = nullptr;
  FloatType hidden_type = FloatType::kFloat32;
  const void* topk_ids = nullptr;
  bool ids_are_64_bit = false;
  const float* topk_weights = nullptr;
  int64_t num_tokens = 0;
  int64_t num_chosen = 0;
};

// Vector instructions, worst first.
enum class Simd { kPortable, kAvx2, kAvx512 };

// The best that this machine has.
Simd best_simd();

// Buffers of one thread, reused from call to call.
struct PredictorScratch {
  std::vector<float> x, reduced, wide, logits;
};

// The `count` best experts of each token in falling order of their logits, of equal ones the lower first: `out_ids` and
// `out_weights` (T, count). 0 < count <= E. Throws std::invalid_argument for an executed expert that has no default
// vector; -1 is padding and adds nothing.
void predict(const PredictorWeights& weights, const TopK& routing, const PredictorInput& input, int64_t count,
             int64_t* out_ids, float* out_weights, PredictorScratch& scratch, Simd simd = best_simd());

}  // namespace vep
