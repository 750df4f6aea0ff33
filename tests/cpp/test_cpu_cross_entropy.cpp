// Runs kernels/cpu/cross_entropy.h, every instance of this build that this CPU has, against a
// float64 reference.
#include <cstring>
#include <limits>
#include <vector>

#include "bias_activation_cases.h"  // Matrix, Worst
#include "cpu_instances.h"
#include "kernels/cross_entropy_params.h"

using anyflash::CpuThreads;
using anyflash::CrossEntropyParams;
using anyflash::Direction;
using anyflash::Dtype;
using anyflash::Family;
using anyflash::Instance;
using bias_activation_cases::bf16;
using bias_activation_cases::fp16;
using bias_activation_cases::fp32;
using bias_activation_cases::Matrix;
using bias_activation_cases::relative_error;
using bias_activation_cases::Worst;
namespace cross_entropy = anyflash::cross_entropy;

namespace {

int32_t launch(Dtype dtype, const char* arch, Direction direction, const CrossEntropyParams& p,
               const CpuThreads* threads = nullptr) {
  const Instance* instance = cpu_instance(Family::cross_entropy, direction, dtype, arch);
  return instance ? anyflash_launch(instance, &p, const_cast<CpuThreads*>(threads)) : -1;
}

struct Case {
  int64_t rows, vocab;
  int64_t padding = 0;  // elements between rows
  int64_t offset = 0;   // elements from a 16-byte boundary
  float smoothing = 0, logit_scale = 1, lse_square_scale = 0;
  int64_t class_start = 0, total_classes = 0;  // 0: vocab
  bool given_lse = false;
};

const Case kCases[] = {
    {1, 1},
    {3, 7, 2, 1},
    {5, 16},
    {4, 257, 3, 3, 0.1f},
    {70, 300, 5, 1, 0.2f, 0.7f, 1e-3f},  // several rows per task
    {300, 90, 0, 0, 0, 1.5f},
    {2, cross_entropy::kChunk, 1},
    {2, cross_entropy::kChunk + 1, 0, 1, 0.1f, 2.0f, 1e-2f},
    {3, 2 * cross_entropy::kChunk + 345, 7, 5, 0.3f},
    {6, 50, 0, 0, 0.1f, 1, 1e-3f, 50, 150},
    {6, 50, 0, 0, 0, 0.5f, 0, 0, 100},
    {6, 500, 1, 0, 0, 1, 1e-2f, 0, 0, true},
    {6, cross_entropy::kChunk + 9, 1, 0, 0.2f, 1, 0, 0, 0, true},
};

constexpr int64_t kIgnored = -7;

struct Row {
  double lse, loss, z_loss;
};

template <class T>
Row reference_row(const Matrix<T>& logits, int64_t row, int64_t label, const Case& c,
                  int64_t classes) {
  double largest = -INFINITY, sum = 0, total = 0;
  for (int64_t j = 0; j < c.vocab; ++j) {
    const double x = c.logit_scale * logits.at(row, j);
    largest = std::max(largest, x);
    total += x;
  }
  for (int64_t j = 0; j < c.vocab; ++j) {
    sum += std::exp(c.logit_scale * logits.at(row, j) - largest);
  }
  const double lse = largest + std::log(sum);
  if (label == kIgnored) return {lse, 0, 0};
  const double reference = c.vocab < classes ? 0 : lse;
  const int64_t column = label - c.class_start;
  double loss = c.smoothing * (reference - total / double(classes));
  if (column >= 0 && column < c.vocab) {
    loss += (1 - double(c.smoothing)) * (reference - c.logit_scale * logits.at(row, column));
  }
  const double z_loss = c.lse_square_scale * reference * reference;
  return {lse, loss + z_loss, z_loss};
}

template <class T>
double reference_slope(const Matrix<T>& logits, int64_t row, int64_t column, double lse,
                       int64_t label, const Case& c, int64_t classes) {
  if (label == kIgnored) return 0;
  const double p = std::exp(c.logit_scale * logits.at(row, column) - lse);
  const double hit = label - c.class_start == column ? 1 - double(c.smoothing) : 0;
  return c.logit_scale *
         (p * (1 + 2 * c.lse_square_scale * lse) - c.smoothing / double(classes) - hit);
}

// The label of each row: spread over all classes, every third one ignored.
int64_t label_of(int64_t row, int64_t classes) {
  return row % 3 == 2 ? kIgnored : (row * 7919 + classes - 1) % classes;
}

template <class T>
void check_case(Dtype dtype, const char* arch, const Case& c, bool in_place) {
  CAPTURE(c.rows, c.vocab, c.smoothing, c.total_classes, in_place);
  const int64_t classes = c.total_classes ? c.total_classes : c.vocab;
  std::mt19937 generator(uint32_t(c.rows * 31 + c.vocab));
  const int64_t stride = c.vocab + c.padding;
  Matrix<T> logits(c.rows, c.vocab, stride, c.offset), copy(c.rows, c.vocab, stride, c.offset);
  Matrix<T> dlogits(c.rows, c.vocab, stride, c.offset);
  logits.randomise(generator);
  for (int64_t row = 0; row < c.rows; ++row) {
    std::memcpy(copy.data() + row * stride, logits.data() + row * stride,
                size_t(c.vocab) * sizeof(T));
  }
  Matrix<float> lse(1, c.rows, c.rows, 0), losses(1, c.rows, c.rows, 0),
      z_losses(1, c.rows, c.rows, 0), given(1, c.rows, c.rows, 0), dlosses(c.rows, 1, 2, 0);
  dlosses.randomise(generator);
  std::vector<int64_t> labels;
  std::vector<Row> expected;
  for (int64_t row = 0; row < c.rows; ++row) {
    labels.push_back(label_of(row, classes));
    expected.push_back(reference_row(copy, row, labels.back(), c, classes));
    given.data()[row] = float(expected.back().lse);
  }
  std::vector<float> workspace(size_t(cross_entropy::workspace_floats(c.rows, c.vocab)));

  CrossEntropyParams p{};
  p.logits = logits.data();
  p.labels = labels.data();
  p.given_lse = c.given_lse ? given.data() : nullptr;
  p.lse = lse.data();
  p.losses = losses.data();
  p.z_losses = z_losses.data();
  p.workspace = workspace.empty() ? nullptr : workspace.data();
  p.rows = c.rows;
  p.vocab = c.vocab;
  p.logits_row_stride = p.dlogits_row_stride = stride;
  p.ignore_index = kIgnored;
  p.class_start = c.class_start;
  p.total_classes = classes;
  p.smoothing = c.smoothing;
  p.logit_scale = c.logit_scale;
  p.lse_square_scale = c.lse_square_scale;
  REQUIRE(launch(dtype, arch, Direction::forward, p) == 0);
  Worst worst(2e-6), worst_gradient(2 * relative_error<T>);
  for (int64_t row = 0; row < c.rows; ++row) {
    worst.add(lse.at(0, row), expected[size_t(row)].lse);
    worst.add(losses.at(0, row), expected[size_t(row)].loss);
    worst.add(z_losses.at(0, row), expected[size_t(row)].z_loss);
  }
  CHECK(worst.value() < 1);

  p.given_lse = given.data();
  p.dlosses = dlosses.data();
  p.dlosses_stride = dlosses.row_stride();
  p.dlogits = in_place ? logits.data() : dlogits.data();
  REQUIRE(launch(dtype, arch, Direction::backward, p) == 0);
  const Matrix<T>& written = in_place ? logits : dlogits;
  for (int64_t row = 0; row < c.rows; ++row) {
    const double dloss = dlosses.at(row, 0);
    for (int64_t j = 0; j < c.vocab; ++j) {
      const double slope =
          reference_slope(copy, row, j, expected[size_t(row)].lse, labels[size_t(row)], c, classes);
      worst_gradient.add(written.at(row, j), dloss * slope);
    }
  }
  CHECK(worst_gradient.value() < 1);
  CHECK(logits.written_between_rows() == 0);
  CHECK(dlogits.written_between_rows() == 0);
}

template <class T>
void check_all(Dtype dtype) {
  for (const char* arch : cpu_archs(Family::cross_entropy)) {
    CAPTURE(arch);
    for (const Case& c : kCases) {
      for (const bool in_place : {false, true}) check_case<T>(dtype, arch, c, in_place);
    }
  }
}

// Loss and lse of one row of fp32 logits with label 0.
std::vector<float> loss_and_lse(const char* arch, const std::vector<float>& logits) {
  const int64_t label = 0;
  float loss = 0, z_loss = 0, lse = 0;
  CrossEntropyParams p{};
  p.logits = logits.data();
  p.labels = &label;
  p.losses = &loss;
  p.z_losses = &z_loss;
  p.lse = &lse;
  p.rows = 1;
  p.vocab = p.logits_row_stride = p.total_classes = int64_t(logits.size());
  p.ignore_index = -100;
  p.logit_scale = 1;
  REQUIRE(launch(Dtype::fp32, arch, Direction::forward, p) == 0);
  return {loss, lse};
}

}  // namespace

TEST_CASE("cpu cross_entropy: fp16", "[cpu][cross_entropy]") { check_all<fp16>(Dtype::fp16); }
TEST_CASE("cpu cross_entropy: bf16", "[cpu][cross_entropy]") { check_all<bf16>(Dtype::bf16); }
TEST_CASE("cpu cross_entropy: fp32", "[cpu][cross_entropy]") { check_all<fp32>(Dtype::fp32); }

TEST_CASE("cpu cross_entropy: extreme logits", "[cpu][cross_entropy]") {
  constexpr float kInf = std::numeric_limits<float>::infinity();
  for (const char* arch : cpu_archs(Family::cross_entropy)) {
    for (const size_t vocab : {size_t(3), size_t(17), size_t(700)}) {
      CAPTURE(arch, vocab);
      std::vector<float> masked(vocab, -kInf);  // all classes but one are masked
      masked[0] = 3;
      CHECK(loss_and_lse(arch, masked) == std::vector<float>{0, 3});
      masked[0] = -kInf;
      masked[vocab - 1] = -5;
      CHECK(loss_and_lse(arch, masked) == std::vector<float>{kInf, -5});
      masked[vocab - 1] = -kInf;
      CHECK(loss_and_lse(arch, masked)[1] == -kInf);
      std::vector<float> high(vocab, 3e38f);
      CHECK(loss_and_lse(arch, high)[1] == Approx(3e38f));
      for (const size_t at : {size_t(0), vocab / 2, vocab - 1}) {
        std::vector<float> poisoned(vocab, 1.f);
        poisoned[at] = NAN;
        CHECK(std::isnan(loss_and_lse(arch, poisoned)[0]));
      }
    }
  }
}

TEST_CASE("cpu cross_entropy: the same bits for any number of threads", "[cpu][cross_entropy]") {
  constexpr int64_t kRows = 3, kVocab = 5 * cross_entropy::kChunk / 2;
  std::mt19937 generator(3);
  std::normal_distribution<float> normal;
  std::vector<float> logits(kRows * kVocab), dlosses(kRows, 0.3f);
  for (float& value : logits) value = normal(generator);
  const std::vector<int64_t> labels = {5, kVocab - 1, cross_entropy::kChunk};
  for (const char* arch : cpu_archs(Family::cross_entropy)) {
    std::vector<std::vector<float>> results;
    for (const int32_t num_threads : {1, 2, 3, 7}) {
      std::vector<float> lse(kRows), losses(kRows), z_losses(kRows), dlogits(logits.size());
      std::vector<float> workspace(size_t(cross_entropy::workspace_floats(kRows, kVocab)));
      CrossEntropyParams p{};
      p.logits = logits.data();
      p.labels = labels.data();
      p.lse = lse.data();
      p.losses = losses.data();
      p.z_losses = z_losses.data();
      p.workspace = workspace.data();
      p.dlosses = dlosses.data();
      p.dlosses_stride = 1;
      p.dlogits = dlogits.data();
      p.rows = kRows;
      p.vocab = p.logits_row_stride = p.dlogits_row_stride = p.total_classes = kVocab;
      p.ignore_index = kIgnored;
      p.smoothing = 0.1f;
      p.logit_scale = 1;
      const CpuThreads threads{&parallel_for, num_threads};
      REQUIRE(launch(Dtype::fp32, arch, Direction::forward, p, &threads) == 0);
      p.given_lse = lse.data();
      REQUIRE(launch(Dtype::fp32, arch, Direction::backward, p, &threads) == 0);
      losses.insert(losses.end(), lse.begin(), lse.end());
      losses.insert(losses.end(), dlogits.begin(), dlogits.end());
      results.push_back(losses);
    }
    for (const std::vector<float>& result : results) {
      CHECK(std::memcmp(result.data(), results[0].data(), sizeof(float) * result.size()) == 0);
    }
  }
}

TEST_CASE("cpu cross_entropy: a failing parallel-for is an error", "[cpu][cross_entropy]") {
  std::vector<float> numbers(1 << 16);
  const std::vector<int64_t> labels(256);
  CrossEntropyParams p{};
  p.logits = p.dlosses = p.given_lse = numbers.data();
  p.dlogits = p.lse = p.losses = p.z_losses = numbers.data();
  p.labels = labels.data();
  p.rows = p.vocab = p.total_classes = p.logits_row_stride = p.dlogits_row_stride = 256;
  p.logit_scale = 1;
  p.smoothing = 0.1f;
  const CpuThreads failing{
      [](int64_t, int64_t, int64_t, anyflash::RangeBody, void*) { return int32_t{1}; }, 4};
  for (const char* arch : cpu_archs(Family::cross_entropy)) {
    for (const Direction direction : {Direction::forward, Direction::backward}) {
      CHECK(launch(Dtype::fp32, arch, direction, p, &failing) == anyflash::kErrorParallelFor);
    }
  }
}
