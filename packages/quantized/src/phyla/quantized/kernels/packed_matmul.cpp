// Products of packed matrices. A product of a few rows reads the weights once, as they are stored; one of many rows lays them out first.
#include "product.h"

namespace phyla::quantized {
namespace {

constexpr int64_t kFewRows = 8;

struct Rows {
  const uint64_t* a;
  std::vector<int32_t> base;

  const uint32_t* direct() const { return reinterpret_cast<const uint32_t*>(a); }
  void gather(int64_t, int64_t, int64_t, uint32_t*) const {}
  void prepare(const Path&, const Block&, const uint32_t*) {}
  void bases(int64_t, int64_t rows, const int32_t** out) const { std::fill_n(out, rows, base.data()); }
};

void few_rows(const Path& path, const Rows& source, int64_t rows, const Weights& weights, const Epilogue& epilogue) {
  parallel_units((weights.channels + kBlock - 1) / kBlock, [&](int64_t block) {
    const int64_t first = block * kBlock, channels = std::min(kBlock, weights.channels - first);
    int32_t different[kFewRows * kBlock];
    const int32_t* bases[kFewRows];
    source.bases(0, rows, bases);
    path.stored(source.a, rows, weights.rows + first * weights.width(), channels, weights.width(), different);
    path.finish(epilogue, {0, rows, first, channels, bases}, different);
  }, grain(rows * kBlock * weights.length));
}

void multiply(const Tensor& a, const Tensor& b, int64_t length, const Epilogue& epilogue) {
  const Tensor left = dense(a), right = dense(b);
  const Weights weights{words(right), right.size(0), 1, length};
  int64_t rows = 1;
  for (int64_t d = 0; d + 1 < left.dim(); ++d) rows *= left.size(d);
  if (rows == 0 || weights.channels == 0) return;
  Rows source{words(left), std::vector<int32_t>(size_t(weights.channels), int32_t(length))};
  if (rows <= kFewRows) few_rows(path(), source, rows, weights, epilogue);
  else product(path(), source, rows, weights, epilogue);
}

std::vector<int64_t> checked_sizes(const Tensor& a, const Tensor& b, int64_t length, int64_t last) {
  expect_words(a, 1, words_of(length), "a");
  expect_words(b, 2, words_of(length), "b");
  std::vector<int64_t> sizes = sizes_of(a);
  sizes.back() = last;
  return sizes;
}

Tensor packed_matmul(const Tensor& a, const Tensor& b, int64_t length) {
  Tensor out = make(checked_sizes(a, b, length, b.size(0)), ScalarType::Int);
  Epilogue epilogue{.channels = b.size(0)};
  epilogue.sums = static_cast<int32_t*>(out.mutable_data_ptr());
  multiply(a, b, length, epilogue);
  return out;
}

Tensor packed_matmul_threshold(const Tensor& a, const Tensor& b, int64_t length, const Tensor& threshold, const Tensor& flip) {
  const Tensor out = zero_words(checked_sizes(a, b, length, words_of(b.size(0))));
  const Threshold bounds(threshold, flip, b.size(0));
  Epilogue epilogue = bounds.epilogue();
  epilogue.words = mutable_words(out);
  multiply(a, b, length, epilogue);
  return out;
}

}  // namespace
}  // namespace phyla::quantized

STABLE_TORCH_LIBRARY_IMPL(phyla_quantized, CPU, m) {
  m.impl("packed_matmul", TORCH_BOX(&phyla::quantized::packed_matmul));
  m.impl("packed_matmul_threshold", TORCH_BOX(&phyla::quantized::packed_matmul_threshold));
}
