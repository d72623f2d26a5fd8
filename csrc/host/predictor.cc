#include "predictor.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>

// Everything between input and logits is inlined into one function for each set of vector instructions, so that the
// compiler may use them all: the library itself is built for the oldest processors.
#define VEP_INLINE [[gnu::always_inline]] inline

namespace vep {
namespace {

template <int kBytes>
struct Lanes {
  static constexpr int kCount = kBytes / sizeof(float);
  typedef float Vector __attribute__((vector_size(kBytes)));
  typedef float Anywhere __attribute__((vector_size(kBytes), aligned(alignof(float)), may_alias));
};

template <int kBytes>
VEP_INLINE float sum_of(const typename Lanes<kBytes>::Vector& vector) {
  typedef float Quad __attribute__((vector_size(16)));
  Quad parts[kBytes / 16];
  std::memcpy(parts, &vector, kBytes);
#pragma GCC unroll 4
  for (int i = 1; i < kBytes / 16; ++i) parts[0] += parts[i];
  return (parts[0][0] + parts[0][1]) + (parts[0][2] + parts[0][3]);
}

// Dot products of kRows rows of `weight` with kTokens rows of `x`, both `cols` long.
template <int kBytes, int kRows, int kTokens>
VEP_INLINE void dot_block(const float* weight, const float* x, int64_t cols, float (&dots)[kRows][kTokens]) {
  using Vector = typename Lanes<kBytes>::Vector;
  using Anywhere = typename Lanes<kBytes>::Anywhere;
  constexpr int kLanes = Lanes<kBytes>::kCount;
  Vector sums[kRows][kTokens] = {};
  int64_t done = 0;
  for (; done + kLanes <= cols; done += kLanes) {
    Vector own[kTokens];
    for (int t = 0; t < kTokens; ++t) own[t] = *reinterpret_cast<const Anywhere*>(x + t * cols + done);
    for (int r = 0; r < kRows; ++r) {
      const Vector row = *reinterpret_cast<const Anywhere*>(weight + r * cols + done);
      for (int t = 0; t < kTokens; ++t) sums[r][t] += row * own[t];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t) dots[r][t] = sum_of<kBytes>(sums[r][t]);
  }
  for (; done < cols; ++done) {
    for (int r = 0; r < kRows; ++r) {
      for (int t = 0; t < kTokens; ++t) dots[r][t] += weight[r * cols + done] * x[t * cols + done];
    }
  }
}

template <int kBytes, int kRows, int kTokens>
VEP_INLINE void linear_block(const Linear& layer, const float* x, int64_t row, int64_t token, float* y) {
  float dots[kRows][kTokens];
  dot_block<kBytes, kRows, kTokens>(layer.weight + row * layer.cols, x + token * layer.cols, layer.cols, dots);
  for (int r = 0; r < kRows; ++r) {
    const float bias = layer.bias ? layer.bias[row + r] : 0;
    for (int t = 0; t < kTokens; ++t) y[(token + t) * layer.rows + row + r] = dots[r][t] + bias;
  }
}

// `x` (T, cols), `y` (T, rows). Several tokens share what is read of the weights, as many as there are registers for.
template <int kBytes>
VEP_INLINE void apply_linear(const Linear& layer, const float* x, int64_t num_tokens, float* y) {
  constexpr int kRows = 4;
  int64_t row = 0;
  for (; row + kRows <= layer.rows; row += kRows) {
    int64_t token = 0;
    if constexpr (kBytes == 64) {
      for (; token + 4 <= num_tokens; token += 4) linear_block<kBytes, kRows, 4>(layer, x, row, token, y);
    }
    for (; token + 2 <= num_tokens; token += 2) linear_block<kBytes, kRows, 2>(layer, x, row, token, y);
    if (token < num_tokens) linear_block<kBytes, kRows, 1>(layer, x, row, token, y);
  }
  for (; row < layer.rows; ++row) {
    for (int64_t token = 0; token < num_tokens; ++token) linear_block<kBytes, 1, 1>(layer, x, row, token, y);
  }
}

// The sum of (x - offset)^kPower.
template <int kBytes, int kPower>
VEP_INLINE float sum_of_powers(const float* x, float offset, int64_t size) {
  using Vector = typename Lanes<kBytes>::Vector;
  using Anywhere = typename Lanes<kBytes>::Anywhere;
  Vector sums = {};
  int64_t i = 0;
  for (; i + Lanes<kBytes>::kCount <= size; i += Lanes<kBytes>::kCount) {
    const Vector own = *reinterpret_cast<const Anywhere*>(x + i) - offset;
    sums += kPower == 2 ? own * own : own;
  }
  float sum = sum_of<kBytes>(sums);
  for (; i < size; ++i) sum += kPower == 2 ? (x[i] - offset) * (x[i] - offset) : x[i] - offset;
  return sum;
}

template <int kBytes>
VEP_INLINE void apply_norm(const NormWeights& norm, int64_t size, float* x) {
  const float count = static_cast<float>(size);
  const float mean = norm.centered ? sum_of_powers<kBytes, 1>(x, 0, size) / count : 0;
  const float scale = 1 / std::sqrt(sum_of_powers<kBytes, 2>(x, mean, size) / count + norm.eps);
  for (int64_t i = 0; i < size; ++i) x[i] = (x[i] - mean) * scale * norm.gain[i];
  if (norm.shift) {
    for (int64_t i = 0; i < size; ++i) x[i] += norm.shift[i];
  }
}

VEP_INLINE float from_float16(uint16_t half) {
  // Shifted into a float32's fields, a half is too small by 2^112; multiplying also gives its subnormals their value.
  const uint32_t magnitude = (half & 0x7fffu) << 13;
  const float value = std::bit_cast<float>(magnitude) * 0x1p112f;
  const uint32_t special = magnitude >= 0x7c00u << 13 ? 0x7f800000u : 0;  // infinity and NaN keep the largest exponent
  return std::bit_cast<float>(std::bit_cast<uint32_t>(value) | special | (half & 0x8000u) << 16);
}

VEP_INLINE void to_float32(const PredictorInput& input, int64_t size, float* out) {
  const auto* halves = static_cast<const uint16_t*>(input.hidden);
  if (input.hidden_type == FloatType::kFloat32) {
    std::memcpy(out, input.hidden, static_cast<size_t>(size) * sizeof(float));
  } else if (input.hidden_type == FloatType::kBFloat16) {
    for (int64_t i = 0; i < size; ++i) out[i] = std::bit_cast<float>(uint32_t{halves[i]} << 16);
  } else {
    for (int64_t i = 0; i < size; ++i) out[i] = from_float16(halves[i]);
  }
}

VEP_INLINE int64_t id_at(const PredictorInput& input, int64_t index) {
  return input.ids_are_64_bit ? static_cast<const int64_t*>(input.topk_ids)[index]
                              : static_cast<const int32_t*>(input.topk_ids)[index];
}

// What the router reads of `token`, turned into q in place.
template <int kBytes>
VEP_INLINE void apply_quasi_hidden(const QuasiHidden& quasi, const PredictorInput& input, int64_t token, int64_t size,
                                   float* x) {
  if (quasi.shift) {
    for (int64_t i = 0; i < size; ++i) x[i] -= quasi.shift[i];
  }
  for (int64_t i = 0; i < size; ++i) x[i] *= quasi.factor[i];
  if (!quasi.vectors) {
    if (!quasi.norm.shift) return;
    for (int64_t i = 0; i < size; ++i) x[i] += quasi.norm.shift[i];
    return;
  }
  for (int64_t k = token * input.num_chosen; k < (token + 1) * input.num_chosen; ++k) {
    const int64_t expert = id_at(input, k);
    if (expert < 0) continue;
    const float weight = input.topk_weights[k];
    const float* vector = quasi.vectors + expert * size;
    for (int64_t i = 0; i < size; ++i) x[i] += weight * vector[i];
  }
  apply_norm<kBytes>(quasi.norm, size, x);
}

// e^x for x <= 87, within 2e-7 of it, in operations that loops are vectorised with. The polynomial is that of Cephes.
VEP_INLINE float exp_of(float x) {
  constexpr float kRounds = 0x1.8p23f;  // added, it leaves the nearest integer in the lowest bits
  const float bounded = x < -87.0f ? -87.0f : x;
  const float shifted = bounded * 1.44269504f + kRounds;
  const float power = shifted - kRounds;
  const float r = bounded - power * 0.693359375f + power * 2.12194440e-4f;
  float sum = 1.9875691500e-4f;
  sum = sum * r + 1.3981999507e-3f;
  sum = sum * r + 8.3334519073e-3f;
  sum = sum * r + 4.1665795894e-2f;
  sum = sum * r + 1.6666665459e-1f;
  sum = sum * r + 5.0000001201e-1f;
  sum = sum * r * r + r + 1;
  return sum * std::bit_cast<float>((std::bit_cast<uint32_t>(shifted) + 127u) << 23);
}

VEP_INLINE void apply_silu(int64_t size, float* x) {
  for (int64_t i = 0; i < size; ++i) x[i] /= 1 + exp_of(x[i] < -87.0f ? 87.0f : -x[i]);
}

float* fit(std::vector<float>& buffer, int64_t size) {
  if (static_cast<int64_t>(buffer.size()) < size) buffer.resize(static_cast<size_t>(size));
  return buffer.data();
}

// Logits (T, E) in `scratch.logits`.
template <int kBytes>
VEP_INLINE void compute_logits(const PredictorWeights& weights, const PredictorInput& input,
                               PredictorScratch& scratch) {
  const int64_t num_tokens = input.num_tokens, hidden_size = weights.hidden_size();
  float* x = fit(scratch.x, num_tokens * hidden_size);
  to_float32(input, num_tokens * hidden_size, x);
  if (weights.has_quasi_hidden) {
    for (int64_t token = 0; token < num_tokens; ++token) {
      apply_quasi_hidden<kBytes>(weights.quasi_hidden, input, token, hidden_size, x + token * hidden_size);
    }
  }
  if (weights.has_estimator) {
    const int64_t width = weights.reduce.rows;
    float* reduced = fit(scratch.reduced, num_tokens * width);
    float* wide = fit(scratch.wide, num_tokens * weights.widen.rows);
    apply_linear<kBytes>(weights.reduce, x, num_tokens, reduced);
    apply_linear<kBytes>(weights.widen, reduced, num_tokens, wide);
    apply_silu(num_tokens * weights.widen.rows, wide);
    x = fit(scratch.x, num_tokens * width);
    apply_linear<kBytes>(weights.narrow, wide, num_tokens, x);
    for (int64_t i = 0; i < num_tokens * width; ++i) x[i] += reduced[i];
    for (int64_t token = 0; token < num_tokens; ++token) {
      apply_norm<kBytes>(weights.estimator_norm, width, x + token * width);
    }
  }
  apply_linear<kBytes>(weights.logits, x, num_tokens, fit(scratch.logits, num_tokens * weights.logits.rows));
}

void compute_portable(const PredictorWeights& weights, const PredictorInput& input, PredictorScratch& scratch) {
  compute_logits<16>(weights, input, scratch);
}

#if defined(__x86_64__)
__attribute__((target("avx2,fma"))) void compute_avx2(const PredictorWeights& weights, const PredictorInput& input,
                                                      PredictorScratch& scratch) {
  compute_logits<32>(weights, input, scratch);
}

__attribute__((target("avx512f,avx512bw,avx512vl,avx2,fma"))) void compute_avx512(const PredictorWeights& weights,
                                                                                  const PredictorInput& input,
                                                                                  PredictorScratch& scratch) {
  compute_logits<64>(weights, input, scratch);
}
#endif

void compute(const PredictorWeights& weights, const PredictorInput& input, PredictorScratch& scratch, Simd simd) {
#if defined(__x86_64__)
  if (simd == Simd::kAvx512) return compute_avx512(weights, input, scratch);
  if (simd == Simd::kAvx2) return compute_avx2(weights, input, scratch);
#endif
  (void)simd;
  compute_portable(weights, input, scratch);
}

// One token. Whatever the logits are, NaN included, the ids are distinct and within range.
void choose(const float* logits, int64_t num_experts, const TopK& routing, int64_t count, int64_t* ids,
            float* weights) {
  for (int64_t expert = 0; expert < num_experts; ++expert) {
    const float logit = logits[expert];
    int64_t place = std::min(expert, count);
    if (place == count && !(logit > weights[count - 1])) continue;
    if (place == count) --place;
    for (; place > 0 && logit > weights[place - 1]; --place) {
      weights[place] = weights[place - 1];
      ids[place] = ids[place - 1];
    }
    weights[place] = logit;
    ids[place] = expert;
  }
  const float* over = routing.renormalize ? weights : logits;
  const int64_t num_over = routing.renormalize ? std::min(count, routing.top_k) : num_experts;
  const float highest = weights[0];
  float sum = 0;
  for (int64_t i = 0; i < num_over; ++i) sum += std::exp(over[i] - highest);
  const float scale = routing.scaling / sum;
  for (int64_t i = 0; i < count; ++i) weights[i] = std::exp(weights[i] - highest) * scale;
}

void check_ids(const QuasiHidden& quasi, const PredictorInput& input) {
  for (int64_t i = 0; i < input.num_tokens * input.num_chosen; ++i) {
    const int64_t expert = id_at(input, i);
    if (expert < -1 || expert >= quasi.num_vectors)
      throw std::invalid_argument("topk_ids has expert " + std::to_string(expert) + " at token " +
                                  std::to_string(i / input.num_chosen) + ", there are " +
                                  std::to_string(quasi.num_vectors) + " experts");
  }
}

}  // namespace

Simd best_simd() {
#if defined(__x86_64__)
  static const Simd best = [] {
    const bool has_fma = __builtin_cpu_supports("fma") && __builtin_cpu_supports("avx2");
    const bool has_512 =
        __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
    return has_fma && has_512 ? Simd::kAvx512 : has_fma ? Simd::kAvx2 : Simd::kPortable;
  }();
  return best;
#else
  return Simd::kPortable;
#endif
}

void predict(const PredictorWeights& weights, const TopK& routing, const PredictorInput& input, int64_t count,
             int64_t* out_ids, float* out_weights, PredictorScratch& scratch, Simd simd) {
  if (weights.has_quasi_hidden && weights.quasi_hidden.vectors) check_ids(weights.quasi_hidden, input);
  compute(weights, input, scratch, simd);
  const int64_t num_experts = weights.logits.rows;
  for (int64_t token = 0; token < input.num_tokens; ++token) {
    choose(scratch.logits.data() + token * num_experts, num_experts, routing, count, out_ids + token * count,
           out_weights + token * count);
  }
}

}  // namespace vep
