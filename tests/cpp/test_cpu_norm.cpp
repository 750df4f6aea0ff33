// Runs kernels/cpu/norm.h, every instance of this build that this CPU has, against a float64
// reference.
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "bias_activation_cases.h"
#include "cpu_instances.h"
#include "kernels/norm_params.h"

using anyflash::bf16;
using anyflash::Direction;
using anyflash::Dtype;
using anyflash::dtype_of;
using anyflash::Family;
using anyflash::fp16;
using anyflash::fp32;
using anyflash::Instance;
using anyflash::NormParams;
using anyflash::NormRows;
using bias_activation_cases::Matrix;
using bias_activation_cases::relative_error;
using bias_activation_cases::Worst;

namespace {

struct Case {
  int64_t rows, cols;
  int64_t padding;  // elements between rows
  int64_t offset;   // elements from a 16-byte boundary
  bool rms, residual, parallel, bias, dropout, rowscale;
  float weight_offset;
};

const Case kCases[] = {
    {1, 1, 0, 0, true, false, false, false, false, false, 0},
    {3, 7, 0, 0, false, true, false, true, false, false, 0},
    {5, 8, 3, 1, false, true, true, true, true, false, 0},
    {17, 16, 0, 3, true, true, false, false, true, true, 1},
    {4, 33, 5, 2, false, false, true, true, false, false, 1},
    {2, 257, 0, 0, true, true, true, true, true, false, 0},
    {40, 100, 4, 0, false, true, false, true, false, true, 0},
    {9, 31, 1, 0, false, false, false, false, false, false, 0},
    {150, 19, 0, 1, false, true, true, true, true, false, 0},
    {2500, 5, 0, 0, true, true, false, true, false, false, 0},  // chunks of more than 16 rows
};

int32_t launch(Dtype dtype, const char* arch, Direction direction, const NormParams& p,
               const anyflash::CpuThreads* threads = nullptr) {
  const Instance* instance = cpu_instance(Family::norm, direction, dtype, arch);
  return instance ? anyflash_launch(instance, &p, const_cast<anyflash::CpuThreads*>(threads)) : -1;
}

// The tensors of one call: x of T, the sum and its gradients of R, y and its gradients of Y.
template <typename T, typename R, typename Y>
class Call {
 public:
  explicit Call(const Case& given) : c(given), keep_scale_(c.dropout ? 1 / 0.75f : 1) {
    std::mt19937 generator(23);
    for (Matrix<T>* input : {&x, &x1}) input->randomise(generator);
    for (Matrix<R>* input : {&residual, &dsum}) input->randomise(generator);
    for (Matrix<Y>* input : {&dy, &dy1}) input->randomise(generator);
    for (Matrix<float>* input : {&weight, &bias, &weight1, &bias1, &rowscale}) {
      input->randomise(generator);
    }
    for (uint8_t& byte : mask) byte = generator() % 4 != 0;
    for (uint8_t& byte : mask1) byte = generator() % 4 != 0;
    p.rows = c.rows;
    p.cols = c.cols;
    p.eps = 1e-3f;
    p.keep_scale = keep_scale_;
    p.weight_offset = c.weight_offset;
    p.is_rms_norm = c.rms;
    p.sum_dtype = dtype_of<R>;
    p.out_dtype = dtype_of<Y>;
    p.weight = weight.data();
    if (c.bias) p.bias = bias.data();
    if (c.parallel) p.weight1 = weight1.data();
    if (c.parallel && c.bias) p.bias1 = bias1.data();
    if (c.rowscale) p.rowscale = rowscale.data();
    if (c.dropout) p.mask = {mask.data(), c.cols};
    if (c.dropout && c.parallel) p.mask1 = {mask1.data(), c.cols};
    if (!c.rms) p.mean = mean.data();
    p.rstd = rstd.data();
  }

  void forward_params() {
    p.x = {x.data(), x.row_stride()};
    if (c.parallel) p.x1 = {x1.data(), x1.row_stride()};
    if (c.residual) p.residual = {residual.data(), residual.row_stride()};
    p.y = {y.data(), y.row_stride()};
    if (c.parallel) p.y1 = {y1.data(), y1.row_stride()};
    p.residual_out = {total.data(), total.row_stride()};
  }

  void backward_params() {
    p.x = {};
    if (c.rowscale) p.x = {x.data(), x.row_stride()};
    p.z = {total.data(), total.row_stride()};
    p.dy = {dy.data(), dy.row_stride()};
    if (c.parallel) p.dy1 = {dy1.data(), dy1.row_stride()};
    if (c.residual) p.dresidual_out = {dsum.data(), dsum.row_stride()};
    p.dx = {dx.data(), dx.row_stride()};
    if (c.parallel) p.dx1 = {dx1.data(), dx1.row_stride()};
    if (c.residual) p.dresidual = {dresidual.data(), dresidual.row_stride()};
    p.dweight = dweight.data();
    if (c.bias) p.dbias = dbias.data();
    if (c.parallel) p.dweight1 = dweight1.data();
    if (c.parallel && c.bias) p.dbias1 = dbias1.data();
    if (c.rowscale) p.drowscale = drowscale.data();
    workspace = std::make_unique<Matrix<float>>(1, anyflash::norm_workspace_floats(p), 0, 0);
    p.workspace = workspace->data();
  }

  double factor(int64_t row) const { return c.rowscale ? rowscale.at(0, row) : 1.0; }
  double kept(const std::vector<uint8_t>& bytes, int64_t row, int64_t col) const {
    return !c.dropout ? 1.0 : bytes[size_t(row * c.cols + col)] ? double(keep_scale_) : 0.0;
  }

  void check_forward() const {
    Worst sum_error(relative_error<R>), y_error(relative_error<Y>), statistics(1e-5);
    for (int64_t row = 0; row < c.rows; ++row) {
      std::vector<double> z(static_cast<size_t>(c.cols));
      double first = 0, second = 0;
      for (int64_t col = 0; col < c.cols; ++col) {
        double& here = z[size_t(col)];
        here = x.at(row, col) * factor(row) * kept(mask, row, col);
        if (c.parallel) here += x1.at(row, col) * kept(mask1, row, col);
        if (c.residual) here += residual.at(row, col);
        sum_error.add(total.at(row, col), here, 10);
        first += here / double(c.cols);
      }
      if (c.rms) first = 0;
      for (const double here : z) second += (here - first) * (here - first) / double(c.cols);
      const double scale = 1 / std::sqrt(second + double(p.eps));
      if (!c.rms) statistics.add(mean.at(0, row), first, 10);
      statistics.add(rstd.at(0, row), scale, 10);
      for (int64_t col = 0; col < c.cols; ++col) {
        const double unit = (z[size_t(col)] - first) * scale;
        const auto affine = [&](const Matrix<float>& w, const Matrix<float>& b) {
          return unit * (w.at(0, col) + c.weight_offset) + (c.bias ? b.at(0, col) : 0);
        };
        y_error.add(y.at(row, col), affine(weight, bias), 30);
        if (c.parallel) y_error.add(y1.at(row, col), affine(weight1, bias1), 30);
      }
    }
    CHECK(sum_error.value() <= 1);
    CHECK(y_error.value() <= 1);
    CHECK(statistics.value() <= 1);
  }

  // From the sum and the statistics that the forward left, which other tests look at.
  void check_backward() const {
    std::vector<double> sums[4];
    for (auto& row : sums) row.assign(static_cast<size_t>(c.cols), 0.0);
    Worst x_error(relative_error<T>), sum_error(relative_error<R>), weights(1e-5), scales(1e-5);
    for (int64_t row = 0; row < c.rows; ++row) {
      const double centre = c.rms ? 0 : mean.at(0, row), scale = rstd.at(0, row);
      std::vector<double> units, gradients;
      double average = 0, projection = 0, dscale = 0;
      for (int64_t col = 0; col < c.cols; ++col) {
        const double unit = (total.at(row, col) - centre) * scale;
        double gradient = dy.at(row, col) * (weight.at(0, col) + c.weight_offset);
        if (c.parallel) gradient += dy1.at(row, col) * (weight1.at(0, col) + c.weight_offset);
        units.push_back(unit);
        gradients.push_back(gradient);
        average += c.rms ? 0 : gradient / double(c.cols);
        projection += gradient * unit / double(c.cols);
        sums[0][size_t(col)] += dy.at(row, col) * unit;
        sums[1][size_t(col)] += dy.at(row, col);
        sums[2][size_t(col)] += dy1.at(row, col) * unit;
        sums[3][size_t(col)] += dy1.at(row, col);
      }
      for (int64_t col = 0; col < c.cols; ++col) {
        double dz = (gradients[size_t(col)] - average - units[size_t(col)] * projection) * scale;
        if (c.residual) dz += dsum.at(row, col);
        const double size = 30 * (1 + scale);
        if (c.residual) sum_error.add(dresidual.at(row, col), dz, size);
        if (c.parallel) x_error.add(dx1.at(row, col), dz * kept(mask1, row, col), size);
        const double here = dz * kept(mask, row, col);
        x_error.add(dx.at(row, col), here * factor(row), size);
        dscale += here * x.at(row, col);
      }
      if (c.rowscale) scales.add(drowscale.at(0, row), dscale, 3000 * (1 + scale));
    }
    const auto check = [&](bool there, const Matrix<float>& found, const std::vector<double>& sum) {
      for (int64_t col = 0; there && col < c.cols; ++col) {
        weights.add(found.at(0, col), sum[size_t(col)], 10 * double(c.rows));
      }
    };
    check(true, dweight, sums[0]);
    check(c.bias, dbias, sums[1]);
    check(c.parallel, dweight1, sums[2]);
    check(c.parallel && c.bias, dbias1, sums[3]);
    CHECK(x_error.value() <= 1);
    CHECK(sum_error.value() <= 1);
    CHECK(weights.value() <= 1);
    CHECK(scales.value() <= 1);
  }

  void check_gaps() const {
    for (const Matrix<T>* written : {&dx, &dx1}) CHECK(written->written_between_rows() == 0);
    for (const Matrix<R>* written : {&total, &dresidual}) {
      CHECK(written->written_between_rows() == 0);
    }
    for (const Matrix<Y>* written : {&y, &y1}) CHECK(written->written_between_rows() == 0);
  }

  const Case c;
  NormParams p{};
  Matrix<T> x = matrix<T>(), x1 = matrix<T>(), dx = matrix<T>(), dx1 = matrix<T>();
  Matrix<R> residual = matrix<R>(), total = matrix<R>(), dsum = matrix<R>(),
            dresidual = matrix<R>();
  Matrix<Y> y = matrix<Y>(), y1 = matrix<Y>(), dy = matrix<Y>(), dy1 = matrix<Y>();
  Matrix<float> weight = vector(c.cols), bias = vector(c.cols), weight1 = vector(c.cols),
                bias1 = vector(c.cols), dweight = vector(c.cols), dbias = vector(c.cols),
                dweight1 = vector(c.cols), dbias1 = vector(c.cols);
  Matrix<float> rowscale = vector(c.rows), drowscale = vector(c.rows), mean = vector(c.rows),
                rstd = vector(c.rows);
  std::vector<uint8_t> mask = std::vector<uint8_t>(size_t(c.rows * c.cols));
  std::vector<uint8_t> mask1 = std::vector<uint8_t>(size_t(c.rows * c.cols));
  std::unique_ptr<Matrix<float>> workspace;

 private:
  template <typename Element>
  Matrix<Element> matrix() const {
    return Matrix<Element>(c.rows, c.cols, c.cols + c.padding, c.offset);
  }
  static Matrix<float> vector(int64_t size) { return Matrix<float>(1, size, size, 0); }

  float keep_scale_;
};

template <typename T, typename R, typename Y>
void check_case(const char* arch, const Case& c) {
  CAPTURE(c.rows, c.cols, c.rms, c.residual, c.parallel, c.bias, c.dropout, c.rowscale);
  Call<T, R, Y> call(c);
  call.forward_params();
  REQUIRE(launch(dtype_of<T>, arch, Direction::forward, call.p) == 0);
  call.check_forward();
  call.backward_params();
  REQUIRE(launch(dtype_of<T>, arch, Direction::backward, call.p) == 0);
  call.check_backward();
  call.check_gaps();
}

template <typename T>
void check_all() {
  for (const char* arch : cpu_archs(Family::norm)) {
    CAPTURE(arch);
    for (const Case& c : kCases) {
      check_case<T, T, T>(arch, c);
      check_case<T, fp32, T>(arch, c);
      check_case<T, bf16, fp16>(arch, c);
    }
  }
}

}  // namespace

TEST_CASE("cpu norm: fp16", "[cpu][norm]") { check_all<fp16>(); }
TEST_CASE("cpu norm: bf16", "[cpu][norm]") { check_all<bf16>(); }
TEST_CASE("cpu norm: fp32", "[cpu][norm]") { check_all<fp32>(); }

TEST_CASE("cpu norm: the same bits for any number of threads", "[cpu][norm]") {
  const Case c{700, 300, 0, 0, false, true, true, true, true, false, 0};
  for (const char* arch : cpu_archs(Family::norm)) {
    CAPTURE(arch);
    std::vector<std::vector<float>> results;
    for (const int32_t num_threads : {1, 2, 3, 7}) {
      const anyflash::CpuThreads threads{&parallel_for, num_threads};
      Call<fp32, fp32, fp32> call(c);
      call.forward_params();
      REQUIRE(launch(Dtype::fp32, arch, Direction::forward, call.p, &threads) == 0);
      call.backward_params();
      REQUIRE(launch(Dtype::fp32, arch, Direction::backward, call.p, &threads) == 0);
      std::vector<float> result;
      for (const float* row :
           {call.dweight.data(), call.dbias.data(), call.dweight1.data(), call.dbias1.data()}) {
        result.insert(result.end(), row, row + c.cols);
      }
      for (const float* all : {call.y.data(), call.y1.data(), call.dx.data(), call.dx1.data()}) {
        result.insert(result.end(), all, all + c.rows * c.cols);
      }
      results.push_back(result);
    }
    for (const std::vector<float>& result : results) {
      CHECK(std::memcmp(result.data(), results[0].data(), sizeof(float) * result.size()) == 0);
    }
  }
}

TEST_CASE("cpu norm: no rows, and a failing parallel-for", "[cpu][norm]") {
  const anyflash::CpuThreads failing{
      [](int64_t, int64_t, int64_t, anyflash::RangeBody, void*) { return int32_t{1}; }, 4};
  for (const char* arch : cpu_archs(Family::norm)) {
    Call<fp32, fp32, fp32> none({0, 8, 0, 0, false, false, false, false, false, false, 0});
    Call<fp32, fp32, fp32> large({600, 200, 0, 0, false, false, false, false, false, false, 0});
    for (const Direction direction : {Direction::forward, Direction::backward}) {
      for (auto* call : {&none, &large}) {
        direction == Direction::forward ? call->forward_params() : call->backward_params();
      }
      CHECK(launch(Dtype::fp32, arch, direction, none.p, &failing) == 0);
      CHECK(launch(Dtype::fp32, arch, direction, large.p, &failing) == anyflash::kErrorParallelFor);
    }
  }
}
