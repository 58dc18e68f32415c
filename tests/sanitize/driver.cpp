// Runs every CPU kernel on every instruction set over awkward shapes and compares with plain loops in double
// precision. Built with sanitizers by run.py: arrays have exactly the size the ABI asks for, and what is
// left out by masks is NaN. Prints one line per instruction set; exit status 1 on a wrong number.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "../../csrc/include/action_kernels.h"

namespace {

struct Matrix {
  int64_t rows, dim;
  std::vector<float> values;
  std::vector<uint8_t> mask;  // empty: all rows take part
  std::vector<int64_t> labels = {};

  bool takes_part(int64_t i) const { return mask.empty() || mask[i]; }
  double at(int64_t i, int64_t k) const { return values[i * dim + k]; }
  ak_rows labelled() const { return {values.data(), nullptr, rows, dim, AK_FLOAT32, labels.data()}; }
  ak_rows described() const {
    return {values.data(), mask.empty() ? nullptr : mask.data(), rows, dim, AK_FLOAT32, nullptr};
  }
};

Matrix random_rows(int64_t rows, int64_t dim, bool masked, std::mt19937& random) {
  Matrix matrix{rows, dim, std::vector<float>(rows * dim), {}};
  std::normal_distribution<float> normal;
  if (masked) matrix.mask.resize(rows);
  for (int64_t i = 0; i < rows; ++i) {
    double squares = 0;
    for (int64_t k = 0; k < dim; ++k) {
      matrix.values[i * dim + k] = normal(random);
      squares += matrix.at(i, k) * matrix.at(i, k);
    }
    if (masked) matrix.mask[i] = random() % 3 != 0;
    for (int64_t k = 0; k < dim; ++k) {
      float& value = matrix.values[i * dim + k];
      value = matrix.takes_part(i) ? static_cast<float>(value / std::sqrt(squares)) : NAN;
    }
  }
  return matrix;
}

struct Result {
  std::vector<double> lse, grad_anchors, grad_keys;
};

// Rounded to bfloat16 (by truncation), so that products of bfloat16 start from the same numbers.
Matrix in_bfloat16(Matrix matrix) {
  for (float& value : matrix.values) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    bits &= 0xffff0000u;
    std::memcpy(&value, &bits, sizeof bits);
  }
  return matrix;
}

std::vector<uint16_t> halves_of(const std::vector<float>& values) {
  std::vector<uint16_t> halves(values.size());
  for (size_t i = 0; i < values.size(); ++i) {
    uint32_t bits;
    std::memcpy(&bits, &values[i], sizeof bits);
    halves[i] = static_cast<uint16_t>(bits >> 16);
  }
  return halves;
}

// Upstream gradient of every anchor.
float upstream(int64_t i) { return static_cast<float>(i % 5) - 1.5f; }

Result by_loops(const Matrix& anchors, const Matrix& keys, bool symmetric, double scale) {
  const int64_t n = anchors.rows, m = keys.rows, dim = anchors.dim;
  Result result{std::vector<double>(n), std::vector<double>(n * dim), std::vector<double>(m * dim)};
  std::vector<double> scores(m);
  for (int64_t i = 0; i < n; ++i) {
    if (!anchors.takes_part(i)) continue;
    double maximum = -INFINITY, sum = 0;
    for (int64_t j = 0; j < m; ++j) {
      scores[j] = -INFINITY;
      if (!keys.takes_part(j) || (symmetric && i == j)) continue;
      scores[j] = 0;
      for (int64_t k = 0; k < dim; ++k) scores[j] += scale * anchors.at(i, k) * keys.at(j, k);
      maximum = std::fmax(maximum, scores[j]);
    }
    result.lse[i] = maximum;
    if (maximum == -INFINITY) continue;
    for (int64_t j = 0; j < m; ++j) sum += std::exp(scores[j] - maximum);
    result.lse[i] += std::log(sum);
    for (int64_t j = 0; j < m; ++j) {
      const double weight = scale * upstream(i) * std::exp(scores[j] - result.lse[i]);
      if (weight == 0) continue;
      for (int64_t k = 0; k < dim; ++k) {
        result.grad_anchors[i * dim + k] += weight * keys.at(j, k);
        (symmetric ? result.grad_anchors : result.grad_keys)[j * dim + k] += weight * anchors.at(i, k);
      }
    }
  }
  return result;
}

int failures = 0;

void expect_close(const char* what, const std::string& where, const std::vector<float>& found,
                  const std::vector<double>& expected, double tolerance) {
  double difference = 0, size = 1e-30;
  for (size_t i = 0; i < expected.size(); ++i) {
    if (found[i] == expected[i]) continue;  // also two infinities
    difference += (found[i] - expected[i]) * (found[i] - expected[i]);
    size += expected[i] * expected[i];
  }
  if (std::sqrt(difference) <= tolerance * std::sqrt(size) + 1e-12) return;
  std::printf("FAILED %s of %s: relative error %.2e\n", what, where.c_str(), std::sqrt(difference / size));
  ++failures;
}

void expect_ok(int status, const std::string& where) {
  if (status == AK_OK) return;
  std::printf("FAILED %s: %s\n", where.c_str(), ak_status_message(status));
  ++failures;
}

// Forward and backward on this thread, against loops.
void check_lse(const Matrix& anchors, const Matrix& keys, bool symmetric, double scale, bool allow_bfloat16,
               int threads, const Result& expected, const std::string& where) {
  const ak_rows a = anchors.described(), k = keys.described();
  const ak_rows* key_rows = symmetric ? nullptr : &k;
  std::vector<float> lse(anchors.rows, NAN), grad_anchors(anchors.values.size(), NAN),
      grad_keys(symmetric ? 0 : keys.values.size(), NAN), grad_lse(anchors.rows);
  for (int64_t i = 0; i < anchors.rows; ++i) grad_lse[i] = anchors.takes_part(i) ? upstream(i) : NAN;

  std::vector<char> kept(ak_cpu_pairwise_lse_kept(&a, key_rows, anchors.dim, allow_bfloat16, threads));
  std::vector<char> workspace(ak_cpu_pairwise_lse_workspace(&a, key_rows, anchors.dim, allow_bfloat16, AK_FORWARD,
                                                            threads));
  expect_ok(ak_cpu_pairwise_lse_forward(&a, key_rows, anchors.dim, scale, allow_bfloat16, lse.data(), kept.data(),
                                        kept.size(), threads, workspace.data(), workspace.size()), where);
  const int pass = AK_GRAD_ANCHORS | (symmetric ? 0 : AK_GRAD_KEYS);
  workspace.assign(ak_cpu_pairwise_lse_workspace(&a, key_rows, anchors.dim, allow_bfloat16, pass, threads), -1);
  expect_ok(ak_cpu_pairwise_lse_backward(&a, key_rows, anchors.dim, scale, allow_bfloat16, grad_lse.data(),
                                         lse.data(), kept.data(), kept.size(), grad_anchors.data(), symmetric ? nullptr : grad_keys.data(), threads,
                                         workspace.data(), workspace.size()), where);

  expect_close("lse", where, lse, expected.lse, 2e-6);
  const double tolerance = allow_bfloat16 ? 0x1p-8 : 2e-5;  // weights are rounded by at most 2^-9
  expect_close("gradient of anchors", where, grad_anchors, expected.grad_anchors, tolerance);
  if (!symmetric) expect_close("gradient of keys", where, grad_keys, expected.grad_keys, tolerance);
}

// Labels of `classes` classes; −1 where the mask leaves a row out.
void label(Matrix& matrix, int64_t classes, std::mt19937& random) {
  matrix.labels.resize(matrix.rows);
  for (int64_t i = 0; i < matrix.rows; ++i) {
    matrix.labels[i] = matrix.takes_part(i) ? static_cast<int64_t>(random() % classes) : -1;
  }
}

struct PairResult {
  std::vector<double> lse, lse_anchors, lse_keys, values, anchors, keys, offsets;
};

float offset_of(int64_t i) { return static_cast<float>(i % 7) - 3; }

PairResult pairs_by_loops(const Matrix& anchors, const Matrix& keys, bool symmetric, double scale, int relation) {
  const int64_t n = anchors.rows, m = keys.rows, dim = anchors.dim;
  const std::vector<double> rows(n), a(n * dim), k(m * dim);
  PairResult result{rows, a, k, rows, a, k, rows};
  const auto add = [&](std::vector<double>& to_anchors, std::vector<double>& to_keys, int64_t i, int64_t j,
                       double weight) {
    for (int64_t c = 0; c < dim; ++c) {
      to_anchors[i * dim + c] += weight * keys.at(j, c);
      (symmetric ? to_anchors : to_keys)[j * dim + c] += weight * anchors.at(i, c);
    }
  };
  const bool same = relation == AK_SAME_CLASS;
  std::vector<double> scores(m);
  for (int64_t i = 0; i < n; ++i) {
    if (anchors.labels[i] < 0) continue;
    double maximum = -INFINITY, sum = 0;
    for (int64_t j = 0; j < m; ++j) {
      scores[j] = -INFINITY;
      if (keys.labels[j] < 0 || (anchors.labels[i] == keys.labels[j]) != same || (symmetric && i == j)) continue;
      scores[j] = 0;
      for (int64_t c = 0; c < dim; ++c) scores[j] += scale * anchors.at(i, c) * keys.at(j, c);
      maximum = std::fmax(maximum, scores[j]);
    }
    for (int64_t j = 0; j < m; ++j) {
      if (scores[j] == -INFINITY) continue;
      sum += std::exp(scores[j] - maximum);
      const double x = offset_of(i) + (same ? -scores[j] : scores[j]);
      const double sigmoid = 1 / (1 + std::exp(-x)) * upstream(i);
      result.values[i] += std::fmax(x, 0) + std::log1p(std::exp(-std::fabs(x)));
      result.offsets[i] += sigmoid;
      add(result.anchors, result.keys, i, j, (same ? -scale : scale) * sigmoid);
    }
    result.lse[i] = maximum + (sum > 0 ? std::log(sum) : 0);
    for (int64_t j = 0; j < m; ++j) {
      if (scores[j] == -INFINITY) continue;
      add(result.lse_anchors, result.lse_keys, i, j, scale * upstream(i) * std::exp(scores[j] - result.lse[i]));
    }
  }
  return result;
}

// labelled_lse and pairwise_softplus, forward and backward, against loops.
void check_pairs(const Matrix& anchors, const Matrix& keys, bool symmetric, double scale, int relation,
                 bool allow_bfloat16, int threads, const std::string& where) {
  const PairResult expected = pairs_by_loops(anchors, symmetric ? anchors : keys, symmetric, scale, relation);
  const ak_rows a = anchors.labelled(), k = keys.labelled();
  const ak_rows* key_rows = symmetric ? nullptr : &k;
  const int64_t n = anchors.rows, dim = anchors.dim;
  const int pass = AK_GRAD_ANCHORS | (symmetric ? 0 : AK_GRAD_KEYS);
  std::vector<float> values(n, NAN), grad(n), offsets(n), grad_offsets(n, NAN), grad_anchors(n * dim, NAN),
      grad_keys(symmetric ? 0 : keys.values.size(), NAN);
  float* to_keys = symmetric ? nullptr : grad_keys.data();
  for (int64_t i = 0; i < n; ++i) {
    grad[i] = anchors.takes_part(i) ? upstream(i) : NAN;
    offsets[i] = anchors.takes_part(i) ? offset_of(i) : NAN;
  }
  const double tolerance = allow_bfloat16 ? 0x1p-8 : 2e-5;  // weights are rounded by at most 2^-9
  std::vector<char> space(ak_cpu_labelled_lse_workspace(&a, key_rows, dim, allow_bfloat16, AK_FORWARD, threads), -1);
  expect_ok(ak_cpu_labelled_lse_forward(&a, key_rows, dim, scale, relation, allow_bfloat16, values.data(), threads,
                                        space.data(), space.size()), where);
  space.assign(ak_cpu_labelled_lse_workspace(&a, key_rows, dim, allow_bfloat16, pass, threads), -1);
  expect_ok(ak_cpu_labelled_lse_backward(&a, key_rows, dim, scale, relation, allow_bfloat16, grad.data(),
                                         values.data(), grad_anchors.data(), to_keys, threads, space.data(),
                                         space.size()), where);
  expect_close("labelled lse", where, values, expected.lse, 2e-6);
  expect_close("its gradient of anchors", where, grad_anchors, expected.lse_anchors, tolerance);
  expect_close("its gradient of keys", where, grad_keys, symmetric ? std::vector<double>() : expected.lse_keys, tolerance);

  space.assign(ak_cpu_pairwise_softplus_workspace(&a, key_rows, dim, allow_bfloat16, AK_FORWARD, threads), -1);
  expect_ok(ak_cpu_pairwise_softplus_forward(&a, key_rows, dim, scale, relation, allow_bfloat16, offsets.data(),
                                             values.data(), threads, space.data(), space.size()), where);
  space.assign(ak_cpu_pairwise_softplus_workspace(&a, key_rows, dim, allow_bfloat16, pass | AK_GRAD_OFFSETS, threads),
               -1);
  expect_ok(ak_cpu_pairwise_softplus_backward(&a, key_rows, dim, scale, relation, allow_bfloat16, offsets.data(),
                                              grad.data(), grad_anchors.data(), to_keys, grad_offsets.data(), threads,
                                              space.data(), space.size()), where);
  expect_close("softplus", where, values, expected.values, 2e-6);
  expect_close("its gradient of anchors", where, grad_anchors, expected.anchors, tolerance);
  expect_close("its gradient of keys", where, grad_keys, symmetric ? std::vector<double>() : expected.keys, tolerance);
  expect_close("its gradient of offsets", where, grad_offsets, expected.offsets, 2e-5);
}

void check_prepare(int64_t batch, int64_t dim, int64_t pixels, float norm, int threads, std::mt19937& random,
                   const std::string& where) {
  const Matrix x = random_rows(batch * pixels, dim, true, random);  // by pixel
  const Matrix g = random_rows(batch * pixels, dim, false, random);
  std::vector<float> map(x.values.size()), rows(map.size(), NAN), factors(x.rows, NAN), gradient(map.size(), NAN);
  const auto place = [&](int64_t row, int64_t k) { return (row / pixels * dim + k) * pixels + row % pixels; };
  for (int64_t i = 0; i < x.rows; ++i)
    for (int64_t k = 0; k < dim; ++k) map[place(i, k)] = norm * x.values[i * dim + k];
  const ak_map described = {map.data(), batch, dim, pixels, AK_FLOAT32};
  expect_ok(ak_cpu_prepare_rows_forward(&described, x.mask.data(), 1, rows.data(), AK_FLOAT32, factors.data(),
                                        threads), where);
  expect_ok(ak_cpu_prepare_rows_backward(&described, g.values.data(), AK_FLOAT32, factors.data(), 1,
                                         gradient.data(), threads), where);
  std::vector<double> expected_rows(map.size()), expected_gradient(map.size());
  for (int64_t i = 0; i < x.rows; ++i) {
    if (!x.takes_part(i)) continue;
    double along = 0;
    for (int64_t k = 0; k < dim; ++k) along += x.at(i, k) * g.at(i, k);
    for (int64_t k = 0; k < dim; ++k) {
      expected_rows[i * dim + k] = x.at(i, k);
      expected_gradient[place(i, k)] = g.at(i, k) - x.at(i, k) * along;
    }
  }
  for (float& value : gradient) value *= norm;
  expect_close("rows", where, rows, expected_rows, 1e-6);
  expect_close("gradient of rows", where, gradient, expected_gradient, 1e-5);
}

// center_lse of rows in float32, or in bfloat16.
void check_centers(int64_t n, int64_t dim, int64_t count, double scale, bool bfloat16, int threads,
                   std::mt19937& random, const std::string& where) {
  const Matrix rows = in_bfloat16(random_rows(n, dim, true, random)), centers = random_rows(count, dim, false, random);
  const std::vector<float> grad = random_rows(n, 1, false, random).values;
  std::vector<float> lse(n, NAN), probabilities(n * count, NAN), gradient(n * dim, NAN);
  const std::vector<uint16_t> halves = halves_of(rows.values);
  ak_rows described = rows.described();
  if (bfloat16) described.data = halves.data(), described.dtype = AK_BFLOAT16;
  std::vector<char> workspace(ak_cpu_center_lse_workspace(dim, count, threads), -1);
  expect_ok(ak_cpu_center_lse_forward(&described, dim, centers.values.data(), count, scale, lse.data(),
                                      probabilities.data(), threads, workspace.data(), workspace.size()), where);
  workspace.assign(workspace.size(), -1);
  expect_ok(ak_cpu_center_lse_backward(n, dim, described.mask, centers.values.data(), count, scale, grad.data(),
                                       probabilities.data(), gradient.data(), AK_FLOAT32, threads, workspace.data(),
                                       workspace.size()), where);
  std::vector<double> expected(n), shares(n * count), pulls(n * dim);
  for (int64_t i = 0; i < n; ++i) {
    if (!rows.takes_part(i)) continue;
    double sum = 0;
    for (int64_t c = 0; c < count; ++c) {
      double product = 0;
      for (int64_t k = 0; k < dim; ++k) product += rows.at(i, k) * centers.at(c, k);
      sum += shares[i * count + c] = std::exp(scale * product);
    }
    expected[i] = std::log(sum);
    for (int64_t c = 0; c < count; ++c) {
      shares[i * count + c] /= sum;
      for (int64_t k = 0; k < dim; ++k) pulls[i * dim + k] += scale * grad[i] * shares[i * count + c] * centers.at(c, k);
    }
  }
  expect_close("log-sum-exp over centres", where, lse, expected, 2e-6);
  expect_close("probabilities of centres", where, probabilities, shares, 2e-5);
  expect_close("gradient by way of centres", where, gradient, pulls, 2e-5);
}

// Random labels and logits: the draws of a class are candidates of it, and so many as a loop counts.
void check_sampling(int64_t batch, int64_t pixels, int64_t classes, int64_t samples, bool hard, int threads,
                    std::mt19937& random, const std::string& where) {
  const int64_t total = batch * pixels;
  std::vector<int16_t> labels(total);
  std::vector<uint8_t> mask(total);
  std::vector<float> logits(total * classes);
  std::normal_distribution<float> normal;
  for (float& logit : logits) logit = normal(random);
  for (int64_t p = 0; p < total; ++p) {
    labels[p] = static_cast<int16_t>(random() % (classes + 2)) - 1;
    mask[p] = random() % 3 != 0;
  }
  std::vector<int64_t> expected(classes), counts(classes, -7), index(classes * samples, -7);
  std::vector<int64_t> class_of(total, -1);
  for (int64_t p = 0; p < total; ++p) {
    if (labels[p] < 0 || labels[p] >= classes || !mask[p]) continue;
    const auto logit = [&](int64_t c) { return double{logits[(p / pixels * classes + c) * pixels + p % pixels]}; };
    double sum = 0;
    for (int64_t c = 0; c < classes; ++c) sum += std::exp(logit(c) - logit(labels[p]));
    if (hard && 1 / sum >= 0.5) continue;
    class_of[p] = labels[p];
    ++expected[labels[p]];
  }
  ak_sampling sampling = {};
  sampling.scores = hard ? logits.data() : nullptr;
  sampling.labels = labels.data();
  sampling.mask = mask.data();
  sampling.batch = batch;
  sampling.pixels = pixels;
  sampling.classes = classes;
  sampling.samples = samples;
  sampling.seed = 0x123456789abcdefull;
  sampling.threshold = 0.5;
  sampling.scores_dtype = AK_FLOAT32;
  sampling.labels_dtype = AK_INT16;
  sampling.from_logits = 1;
  std::vector<char> workspace(ak_cpu_sample_pixels_workspace(&sampling), -1);
  expect_ok(ak_cpu_sample_pixels(&sampling, index.data(), counts.data(), threads, workspace.data(), workspace.size()),
            where);
  bool right = counts == expected;
  for (int64_t d = 0; d < classes * samples; ++d) {
    const int64_t c = d / samples;
    right = right && (expected[c] ? index[d] >= 0 && index[d] < total && class_of[index[d]] == c : index[d] == -1);
  }
  if (right) return;
  std::printf("FAILED sampling of %s\n", where.c_str());
  ++failures;
}

// The upsampled neighbourhoods of every pixel of a map and of absent ones, and their adjoint, by their definition.
void check_features(int64_t batch, int64_t channels, const std::vector<int64_t>& coarse,
                    const std::vector<int64_t>& fine, bool channels_last, int threads, std::mt19937& random,
                    const std::string& where) {
  const int64_t axes = coarse[0] == 1 && fine[0] == 1 ? 2 : 3, taps = axes == 2 ? 9 : 27;
  const int64_t cells = coarse[0] * coarse[1] * coarse[2], pixels = fine[0] * fine[1] * fine[2];
  std::vector<int64_t> index;
  const int64_t every = pixels > 1000 ? 101 : 1;  // the loops below are slow
  for (int64_t p = 0; p < batch * pixels + 3; p += every) index.push_back(p % 7 == 3 ? -p : p);
  const int64_t count = static_cast<int64_t>(index.size());
  std::normal_distribution<float> normal;
  std::vector<float> map(batch * channels * cells), out(count * taps * channels, NAN), grad(out.size()),
      gradient(map.size(), NAN);
  for (float& x : map) x = normal(random);
  for (float& g : grad) g = normal(random);
  const auto place = [&](int64_t b, int64_t c, int64_t cell) {
    return channels_last ? (b * cells + cell) * channels + c : (b * channels + c) * cells + cell;
  };
  std::vector<double> expected(out.size()), expected_gradient(map.size());
  for (int64_t i = 0; i < count; ++i) {
    if (index[i] < 0 || index[i] >= batch * pixels) continue;
    const int64_t b = index[i] / pixels, p[3] = {index[i] % pixels / fine[2] / fine[1], index[i] / fine[2] % fine[1],
                                                 index[i] % fine[2]};
    for (int64_t tap = 0; tap < taps; ++tap) {
      const int64_t t[3] = {axes == 2 ? 1 : tap / 9, tap / 3 % 3, tap % 3};
      for (int64_t cell = 0; cell < cells; ++cell) {
        const int64_t at[3] = {cell / coarse[2] / coarse[1], cell / coarse[2] % coarse[1], cell % coarse[2]};
        double weight = 1;
        for (int axis = 0; axis < 3; ++axis) {
          const int64_t q = p[axis] + t[axis] - 1;
          const double reads = double(q) * double(coarse[axis] - 1) / double(fine[axis] > 1 ? fine[axis] - 1 : 1);
          weight *= q < 0 || q >= fine[axis] ? 0 : std::fmax(0.0, 1 - std::fabs(reads - double(at[axis])));
        }
        for (int64_t c = 0; weight > 0 && c < channels; ++c) {
          expected[(i * taps + tap) * channels + c] += weight * map[place(b, c, cell)];
          expected_gradient[place(b, c, cell)] += weight * grad[(i * taps + tap) * channels + c];
        }
      }
    }
  }
  const ak_neighbourhoods what = {index.data(), count,         batch, channels, coarse.data(), fine.data(),
                                  static_cast<int32_t>(axes), AK_FLOAT32};
  const int64_t rows = coarse[2], planes = coarse[1] * coarse[2], step = channels_last ? channels : 1;
  const int64_t strides[5] = {channels * cells, channels_last ? 1 : cells, planes * step, rows * step, step};
  expect_ok(ak_cpu_sampled_features_forward(&what, map.data(), strides, out.data(), threads), where);
  std::vector<char> workspace(ak_cpu_sampled_features_workspace(&what, threads), -1);
  expect_ok(ak_cpu_sampled_features_backward(&what, grad.data(), channels_last, gradient.data(), threads,
                                             workspace.data(), workspace.size()), where);
  expect_close("neighbourhoods", where, out, expected, 1e-6);
  expect_close("gradient of features", where, gradient, expected_gradient, 1e-6);
}

// Sums of the neighbourhoods of the pixels of each class, from the kernel that `check_features` compares.
void check_class_sums(int64_t batch, int64_t channels, const std::vector<int64_t>& coarse,
                      const std::vector<int64_t>& fine, bool channels_last, int threads, std::mt19937& random,
                      const std::string& where) {
  const int64_t axes = coarse[0] == 1 && fine[0] == 1 ? 2 : 3, taps = axes == 2 ? 9 : 27, classes = 3;
  const int64_t cells = coarse[0] * coarse[1] * coarse[2], pixels = batch * fine[0] * fine[1] * fine[2];
  std::normal_distribution<float> normal;
  std::vector<float> map(batch * channels * cells), rows(pixels * taps * channels), sums(classes * channels * taps, NAN);
  std::vector<int64_t> labels(pixels), index(pixels);
  for (float& x : map) x = normal(random) + 1;
  for (int64_t p = 0; p < pixels; ++p) labels[p] = static_cast<int64_t>(random() % 5) - 1, index[p] = p;
  const int64_t step = channels_last ? channels : 1;
  const int64_t strides[5] = {channels * cells, channels_last ? 1 : cells, coarse[1] * coarse[2] * step,
                              coarse[2] * step, step};
  const ak_neighbourhoods asked = {index.data(), pixels,        batch, channels, coarse.data(), fine.data(),
                                   static_cast<int32_t>(axes), AK_FLOAT32};
  expect_ok(ak_cpu_sampled_features_forward(&asked, map.data(), strides, rows.data(), 1), where);
  std::vector<double> expected(sums.size());
  for (int64_t p = 0; p < pixels; ++p) {
    if (labels[p] < 0 || labels[p] >= classes) continue;
    for (int64_t tap = 0; tap < taps; ++tap)
      for (int64_t c = 0; c < channels; ++c)
        expected[(labels[p] * channels + c) * taps + tap] += rows[(p * taps + tap) * channels + c];
  }
  const ak_class_maps what = {labels.data(), batch, channels, classes, coarse.data(), fine.data(),
                              static_cast<int32_t>(axes), AK_FLOAT32};
  std::vector<char> workspace(ak_cpu_class_sums_workspace(&what, threads), -1);
  expect_ok(ak_cpu_class_sums(&what, map.data(), strides, sums.data(), threads, workspace.data(), workspace.size()),
            where);
  expect_close("class sums", where, sums, expected, 1e-6);
}

// indexed_lse and the mean of the bank rows, against loops.
void check_indexed(int64_t runs, int64_t of_run, int64_t bank_rows, int64_t columns, int64_t dim, double scale,
                   int threads, std::mt19937& random, const std::string& where) {
  Matrix queries = random_rows(runs * of_run, dim, false, random), bank = random_rows(bank_rows, dim, false, random);
  for (int64_t k = 0; k < dim; ++k) bank.values[k] = NAN;  // row 0: never named
  std::vector<int64_t> index(runs * columns);
  for (int64_t& row : index) row = static_cast<int64_t>(random() % (bank_rows + 1));
  for (int64_t& row : index) row = row == 0 ? -1 : row;  // bank_rows is one too many: left out
  std::vector<float> lse(queries.rows, NAN), mean(queries.values.size(), NAN);
  std::vector<double> expected(queries.rows, -INFINITY), expected_mean(mean.size());
  for (int64_t i = 0; i < queries.rows; ++i) {
    double sum = 0;
    for (int64_t j = 0; j < columns; ++j) {
      const int64_t row = index[i / of_run * columns + j];
      if (row < 0 || row >= bank_rows) continue;
      double score = 0;
      for (int64_t k = 0; k < dim; ++k) score += scale * queries.at(i, k) * bank.at(row, k);
      sum += std::exp(score - scale);
      for (int64_t k = 0; k < dim; ++k) expected_mean[i * dim + k] += std::exp(score - scale) * bank.at(row, k);
    }
    if (sum == 0) continue;
    expected[i] = scale + std::log(sum);
    for (int64_t k = 0; k < dim; ++k) expected_mean[i * dim + k] /= sum;
  }
  const ak_rows q = queries.described(), b = bank.described();
  std::vector<char> workspace(ak_cpu_indexed_lse_workspace(&q, &b, dim, runs, columns, threads), -1);
  expect_ok(ak_cpu_indexed_lse(&q, &b, dim, index.data(), runs, columns, scale, lse.data(), mean.data(), threads,
                               workspace.data(), workspace.size()), where);
  expect_close("indexed lse", where, lse, expected, 2e-6);
  expect_close("mean of bank rows", where, mean, expected_mean, 2e-5);
}

void check_gathering(int threads, std::mt19937& random, const std::string& where) {
  const std::vector<int64_t> maps[][2] = {
      {{1, 1, 1}, {1, 4, 3}}, {{1, 3, 4}, {1, 5, 9}}, {{1, 5, 5}, {1, 5, 5}}, {{2, 3, 2}, {3, 4, 5}},
      {{1, 21, 180}, {1, 21, 180}},  // several slabs of the widest group
  };
  for (const auto& [coarse, fine] : maps)
    for (int64_t channels : {1, 66})
      for (bool channels_last : {false, true}) {
        if (coarse[1] == 21 && channels == 1) continue;
        const std::string here = where + " map of " + std::to_string(fine[1]) + " rows, " + std::to_string(channels) +
                                 (channels_last ? " channels last" : " channels");
        check_features(2, channels, coarse, fine, channels_last, threads, random, here);
        check_class_sums(2, channels, coarse, fine, channels_last, threads, random, here);
      }
  const int64_t sizes[][5] = {{1, 1, 2, 1, 1}, {9, 1, 5, 70, 33}, {3, 2, 5, 0, 4}, {2, 30, 9, 40, 17},
                              {2, 99, 300, 200, 70}};
  for (const auto& [runs, of_run, bank, columns, dim] : sizes)
    check_indexed(runs, of_run, bank, columns, dim, 20, threads, random,
                  where + " runs " + std::to_string(runs) + " of " + std::to_string(of_run));
}

void check_all(const std::string& isa) {
  std::mt19937 random(1);
  const bool bfloat16 = isa.find("bf16") != std::string::npos || isa.find("amx") != std::string::npos;
  const int64_t shapes[][3] = {
      {0, 3, 4},      {1, 1, 1},     {2, 5, 3},      // nothing, one, ragged
      {24, 23, 16},   {25, 49, 17},                  // a panel of keys, one more
      {193, 95, 70},  {200, 1, 130},                 // a tile, one more; more than a slice
      {20, 500, 33},  {500, 20, 64},                 // one side much longer
      {230, 30, 100},                                // powers are kept for the backward pass
  };
  for (const auto& [n, m, dim] : shapes)
    for (double scale : {10.0, 200.0})  // bounded scores, running maximum
      for (bool masked : {false, true})
        for (bool symmetric : {false, true}) {
          Matrix anchors = random_rows(n, dim, masked, random), keys = random_rows(m, dim, masked, random);
          if (bfloat16) anchors = in_bfloat16(anchors), keys = in_bfloat16(keys);
          const Result expected = by_loops(anchors, symmetric ? anchors : keys, symmetric, scale);
          for (int threads : {1, 3}) {
            check_lse(anchors, keys, symmetric, scale, bfloat16, threads, expected,
                      isa + " n " + std::to_string(n) + " m " + std::to_string(m) + " d " + std::to_string(dim) +
                          " scale " + std::to_string(scale) + " threads " + std::to_string(threads) +
                          (masked ? " masked" : "") + (symmetric ? " symmetric" : ""));
          }
        }
  for (const auto& [n, m, dim] : shapes)
    for (int64_t classes : {1, 4, 1000})
      for (bool symmetric : {false, true})
        for (double scale : {10.0, 200.0})
          for (int relation : {AK_SAME_CLASS, AK_DIFFERENT_CLASS}) {
            const bool masked = classes == 4;
            Matrix anchors = random_rows(n, dim, masked, random), keys = random_rows(m, dim, masked, random);
            if (bfloat16) anchors = in_bfloat16(anchors), keys = in_bfloat16(keys);
            label(anchors, classes, random), label(keys, classes, random);
            for (int threads : {1, 3}) {
              check_pairs(anchors, keys, symmetric, scale, relation, bfloat16, threads,
                          isa + " n " + std::to_string(n) + " m " + std::to_string(m) + " d " + std::to_string(dim) +
                              " scale " + std::to_string(scale) + " threads " + std::to_string(threads) +
                              " classes " + std::to_string(classes) + " relation " + std::to_string(relation) +
                              (symmetric ? " symmetric" : ""));
            }
          }
  for (int threads : {1, 3}) {
    for (float norm : {3.0f, 3e30f}) {  // its square overflows
      check_prepare(67, 5, 1, norm, threads, random, isa + " matrix of norm " + std::to_string(norm));
      check_prepare(67, 48, 1, norm, threads, random, isa + " whole chunks of norm " + std::to_string(norm));
      check_prepare(2, 33, 130, norm, threads, random, isa + " map of norm " + std::to_string(norm));
    }
    for (bool halves : {false, true}) {
      const std::string kind = isa + (halves ? " rows of bfloat16" : " rows of float32");
      check_centers(70, 37, 1, 10, halves, threads, random, kind + " to one centre");
      check_centers(200, 128, 4, 10, halves, threads, random, kind + " in whole vectors to centres");
      check_centers(65, 600, 43, 100, halves, threads, random, kind + " in parts to many centres");
    }
    check_gathering(threads, random, isa + " threads " + std::to_string(threads));
  }
  const int64_t scenes[][4] = {{2, 0, 3, 5}, {3, 1, 2, 4}, {1, 64, 1, 70}, {3, 63, 5, 300}, {2, 4999, 7, 20}};
  for (const auto& [batch, pixels, classes, samples] : scenes)
    for (bool hard : {false, true})
      for (int threads : {1, 3})
        check_sampling(batch, pixels, classes, samples, hard, threads, random,
                       isa + " pixels " + std::to_string(pixels) + " threads " + std::to_string(threads) +
                           (hard ? " hard" : ""));
  // Two callers at once, each with threads of its own.
  Matrix anchors = random_rows(260, 40, true, random);
  if (bfloat16) anchors = in_bfloat16(anchors);
  const Result expected = by_loops(anchors, anchors, true, 10);
  std::thread other([&] { check_lse(anchors, anchors, true, 10, bfloat16, 2, expected, isa + " first caller"); });
  check_lse(anchors, anchors, true, 10, bfloat16, 2, expected, isa + " second caller");
  other.join();
}

}  // namespace

int main() {
  std::string names = ak_cpu_supported_isas();
  for (size_t start = 0; start < names.size();) {
    const size_t end = std::min(names.find(", ", start), names.size());
    const std::string isa = names.substr(start, end - start);
    expect_ok(ak_cpu_set_isa(isa.c_str()), isa);
    const int before = failures;
    check_all(isa);
    std::printf("%s: %s\n", isa.c_str(), failures == before ? "passed" : "failed");
    start = end + 2;
  }
  return failures ? 1 : 0;
}
