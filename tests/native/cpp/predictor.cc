// Predictions read and write nothing outside the arrays that they are given, whatever their sizes, ids and values;
// every set of vector instructions gives what plain loops in double precision give; and threads may share the weights.
#include "host/predictor.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <set>
#include <stdexcept>
#include <thread>
#include <vector>

#define REQUIRE(condition)                                                 \
  do {                                                                     \
    if (!(condition)) {                                                    \
      std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                        \
    }                                                                      \
  } while (false)

namespace {

using Floats = std::vector<float>;  // each of exactly the size it is read with
using Doubles = std::vector<double>;

struct Sizes {
  int64_t hidden, experts, width, wide, tokens, chosen, count;
};

Floats randoms(int64_t size, std::mt19937& random, float scale = 0.3f) {
  std::normal_distribution<float> normal;
  Floats values(static_cast<size_t>(size));
  for (float& value : values) value = scale * normal(random);
  return values;
}

struct Case {
  Case(const Sizes& sizes, bool with_vectors, bool with_estimator, uint32_t seed) : sizes(sizes) {
    std::mt19937 random(seed);
    const int64_t size = sizes.hidden, width = sizes.width, read = with_estimator ? width : size;
    for (Floats* own : {&factor, &shift, &gain, &target_shift}) *own = randoms(size, random);
    vectors = randoms(sizes.experts * size, random);
    reduce = randoms(width * size, random);
    widen = randoms(sizes.wide * width, random);
    narrow = randoms(width * sizes.wide, random);
    for (Floats* own : {&reduce_bias, &narrow_bias, &norm_gain, &norm_shift}) *own = randoms(width, random);
    widen_bias = randoms(sizes.wide, random);
    logits = randoms(sizes.experts * read, random);
    logits_bias = randoms(sizes.experts, random);
    hidden = randoms(sizes.tokens * size, random, 1);
    topk_weights = randoms(sizes.tokens * sizes.chosen, random);
    for (int64_t i = 0; i < sizes.tokens * sizes.chosen; ++i) {
      topk_ids.push_back(static_cast<int32_t>(random() % static_cast<uint32_t>(sizes.experts + 1)) - 1);
    }
    weights.has_quasi_hidden = true;
    weights.quasi_hidden = {factor.data(),
                            shift.data(),
                            with_vectors ? vectors.data() : nullptr,
                            sizes.experts,
                            {gain.data(), target_shift.data(), 1e-5f, seed % 2 == 0}};
    weights.has_estimator = with_estimator;
    if (with_estimator) {
      weights.reduce = {reduce.data(), reduce_bias.data(), width, size};
      weights.widen = {widen.data(), widen_bias.data(), sizes.wide, width};
      weights.narrow = {narrow.data(), narrow_bias.data(), width, sizes.wide};
      weights.estimator_norm = {norm_gain.data(), norm_shift.data(), 1e-5f, true};
    }
    weights.logits = {logits.data(), logits_bias.data(), sizes.experts, read};
    input.hidden = hidden.data();
    input.topk_ids = topk_ids.data();
    input.topk_weights = topk_weights.data();
    input.num_tokens = sizes.tokens;
    input.num_chosen = sizes.chosen;
  }

  Sizes sizes;
  Floats factor, shift, gain, target_shift, vectors, reduce, reduce_bias, widen, widen_bias, narrow, narrow_bias,
      norm_gain, norm_shift, logits, logits_bias, hidden, topk_weights;
  std::vector<int32_t> topk_ids;
  vep::PredictorWeights weights;
  vep::PredictorInput input;
};

Doubles linear(const vep::Linear& layer, const Doubles& x) {
  Doubles y(static_cast<size_t>(layer.rows));
  for (int64_t row = 0; row < layer.rows; ++row) {
    y[row] = layer.bias[row];
    for (int64_t i = 0; i < layer.cols; ++i) y[row] += double{layer.weight[row * layer.cols + i]} * x[i];
  }
  return y;
}

void normalise(const vep::NormWeights& norm, Doubles& x) {
  const double size = static_cast<double>(x.size());
  double mean = 0, square = 0;
  for (const double value : x) mean += norm.centered ? value / size : 0;
  for (const double value : x) square += (value - mean) * (value - mean) / size;
  for (size_t i = 0; i < x.size(); ++i) {
    x[i] = (x[i] - mean) / std::sqrt(square + norm.eps) * norm.gain[i] + norm.shift[i];
  }
}

Doubles expected_logits(const Case& given, int64_t token) {
  const vep::QuasiHidden& quasi = given.weights.quasi_hidden;
  const int64_t size = given.sizes.hidden;
  Doubles x(static_cast<size_t>(size));
  for (int64_t i = 0; i < size; ++i) {
    x[i] = (double{given.hidden[token * size + i]} - quasi.shift[i]) * quasi.factor[i];
    if (!quasi.vectors) x[i] += quasi.norm.shift[i];
  }
  if (quasi.vectors) {
    for (int64_t k = token * given.sizes.chosen; k < (token + 1) * given.sizes.chosen; ++k) {
      if (given.topk_ids[k] < 0) continue;
      for (int64_t i = 0; i < size; ++i) {
        x[i] += double{given.topk_weights[k]} * quasi.vectors[given.topk_ids[k] * size + i];
      }
    }
    normalise(quasi.norm, x);
  }
  if (given.weights.has_estimator) {
    const Doubles reduced = linear(given.weights.reduce, x);
    Doubles wide = linear(given.weights.widen, reduced);
    for (double& value : wide) value /= 1 + std::exp(-value);
    x = linear(given.weights.narrow, wide);
    for (size_t i = 0; i < x.size(); ++i) x[i] += reduced[i];
    normalise(given.weights.estimator_norm, x);
  }
  return linear(given.weights.logits, x);
}

struct Answer {
  std::vector<int64_t> ids;
  Floats weights;
};

Answer predict(const Case& given, const vep::TopK& routing, vep::PredictorScratch& scratch, vep::Simd simd) {
  const auto size = static_cast<size_t>(given.sizes.tokens * given.sizes.count);
  Answer answer{std::vector<int64_t>(size), Floats(size)};
  vep::predict(given.weights, routing, given.input, given.sizes.count, answer.ids.data(), answer.weights.data(),
               scratch, simd);
  return answer;
}

void check(const Case& given, const vep::TopK& routing, vep::PredictorScratch& scratch, vep::Simd simd) {
  const Answer answer = predict(given, routing, scratch, simd);
  for (int64_t token = 0; token < given.sizes.tokens; ++token) {
    const Doubles logits = expected_logits(given, token);
    Doubles sorted = logits;
    std::sort(sorted.rbegin(), sorted.rend());
    const int64_t num_over = routing.renormalize ? std::min(routing.top_k, given.sizes.count) : given.sizes.experts;
    double sum = 0;
    for (int64_t i = 0; i < num_over; ++i) sum += std::exp(sorted[i]);
    std::set<int64_t> distinct;
    for (int64_t place = 0; place < given.sizes.count; ++place) {
      const int64_t id = answer.ids[token * given.sizes.count + place];
      REQUIRE(id >= 0 && id < given.sizes.experts);
      REQUIRE(distinct.insert(id).second);
      REQUIRE(std::abs(logits[id] - sorted[place]) < 1e-4);  // near ties may change places
      const double weight = routing.scaling * std::exp(logits[id]) / sum;
      REQUIRE(std::abs(answer.weights[token * given.sizes.count + place] - weight) < 1e-4 * (1 + weight));
    }
  }
}

std::vector<vep::Simd> kinds() {
  std::vector<vep::Simd> found;
  for (const vep::Simd simd : {vep::Simd::kPortable, vep::Simd::kAvx2, vep::Simd::kAvx512}) {
    if (simd <= vep::best_simd()) found.push_back(simd);
  }
  return found;
}

void check_sizes() {
  // Whole vectors and none, rows and tokens that fill blocks and leave some over.
  const Sizes all[] = {{64, 16, 32, 64, 4, 2, 4},
                       {37, 7, 19, 23, 3, 2, 7},
                       {1, 1, 1, 1, 1, 1, 1},
                       {130, 9, 5, 70, 7, 8, 2},
                       {15, 33, 17, 31, 17, 3, 33}};
  vep::PredictorScratch scratch;
  uint32_t seed = 0;
  for (const Sizes& sizes : all) {
    for (int kind = 0; kind < 16; ++kind) {
      const Case given(sizes, kind & 1, kind & 2, ++seed);
      const vep::TopK routing{std::min<int64_t>(2, sizes.experts), (kind & 4) != 0, kind & 8 ? 2.5f : 1.0f};
      for (const vep::Simd simd : kinds()) check(given, routing, scratch, simd);
    }
  }
}

void check_wrong_ids() {
  const Sizes sizes{20, 6, 8, 8, 3, 2, 3};
  for (const int32_t wrong : {6, 1000000, -2, std::numeric_limits<int32_t>::min()}) {
    for (const bool with_vectors : {false, true}) {
      Case given(sizes, with_vectors, false, 1);
      given.topk_ids[3] = wrong;
      vep::PredictorScratch scratch;
      bool refused = false;
      try {
        predict(given, {2, true, 1}, scratch, vep::best_simd());
      } catch (const std::invalid_argument&) {
        refused = true;
      }
      REQUIRE(refused == with_vectors);  // without vectors nobody reads them
    }
  }
}

void check_wild_values() {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  for (const float wild : {std::nanf(""), kInfinity, -kInfinity, 3e38f, -3e38f, 1e-40f}) {
    for (int kind = 0; kind < 8; ++kind) {
      Case given({24, 9, 10, 12, 5, 2, 6}, kind & 1, kind & 2, 3);
      for (size_t i = 0; i < given.hidden.size(); i += 1 + (kind & 4) * 5) given.hidden[i] = wild;
      for (const vep::Simd simd : kinds()) {
        vep::PredictorScratch scratch;
        const Answer answer = predict(given, {2, true, 1}, scratch, simd);
        for (int64_t token = 0; token < given.sizes.tokens; ++token) {
          const auto begin = answer.ids.begin() + token * given.sizes.count;
          const std::set<int64_t> distinct(begin, begin + given.sizes.count);
          REQUIRE(static_cast<int64_t>(distinct.size()) == given.sizes.count);
          REQUIRE(*distinct.begin() >= 0 && *distinct.rbegin() < given.sizes.experts);
        }
      }
    }
  }
}

void check_threads() {
  const Case given({64, 16, 32, 64, 3, 2, 4}, true, true, 5);
  std::vector<std::thread> threads;
  for (int number = 0; number < 3; ++number) {
    threads.emplace_back([&] {
      vep::PredictorScratch scratch;
      for (int round = 0; round < 50; ++round) check(given, {2, true, 1}, scratch, vep::best_simd());
    });
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace

int main() {
  check_sizes();
  check_wrong_ids();
  check_wild_values();
  check_threads();
  return 0;
}
