// How the float stream of a residual network begins: an image turned to channels-last order, with its signs. Each value is read once and
// written once.
#include <phyla/kernel.h>

namespace {

using torch::stable::Tensor;

// The signs of one row, as `pack` gives them.
PHYLA_INLINE void sign_bits(const float* __restrict__ y, int64_t channels, uint64_t* words) {
  for (int64_t w = 0; 64 * w < channels; ++w) {
    uint32_t halves[2] = {0, 0};
    for (int64_t half = 0; half < 2; ++half) {
      const float* __restrict__ from = y + 64 * w + 32 * half;
      const int64_t count = std::min<int64_t>(32, channels - 64 * w - 32 * half);
      uint32_t bits = 0;
      if (count == 32) {
        for (int c = 0; c < 32; ++c) bits |= uint32_t(from[c] < 0.0f) << c;
      } else {
        for (int c = 0; c < count; ++c) bits |= uint32_t(from[c] < 0.0f) << c;
      }
      halves[half] = bits;
    }
    words[w] = uint64_t(halves[1]) << 32 | halves[0];
  }
}

// Pixels first..first+count of one image, (channels, pixels) -> (pixels, channels), in squares that stay in the first-level cache.
PHYLA_CLONES void turn(const float* __restrict__ image, int64_t channels, int64_t pixels, int64_t first, int64_t count, float* __restrict__ y,
                       uint64_t* words) {
  constexpr int64_t kSide = 16;
  for (int64_t p = first; p < first + count; p += kSide)
    for (int64_t c = 0; c < channels; c += kSide) {
      const int64_t rows = std::min(kSide, first + count - p), cols = std::min(kSide, channels - c);
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < cols; ++j) y[(p + i) * channels + c + j] = image[(c + j) * pixels + p + i];
    }
  const int64_t width = (channels + 63) / 64;
  for (int64_t p = first; p < first + count; ++p) sign_bits(y + p * channels, channels, words + p * width);
}

Tensor empty_words(std::vector<int64_t> sizes, const Tensor& like) {
  sizes.back() = (sizes.back() + 63) / 64;
  return torch::stable::empty(sizes, torch::headeronly::ScalarType::Long, std::nullopt, like.device());
}

std::tuple<Tensor, Tensor> stream(Tensor x_) {
  const Tensor x = phyla::dense(x_);
  STD_TORCH_CHECK(x.dim() == 4 && x.scalar_type() == torch::headeronly::ScalarType::Float, "x: expected float32 (N, C, H, W)");
  const int64_t images = x.size(0), channels = x.size(1), pixels = x.size(2) * x.size(3);
  const std::vector<int64_t> sizes{images, x.size(2), x.size(3), channels};
  Tensor y = phyla::empty<float>(sizes), words = empty_words(sizes, x);
  const float* from = phyla::data<float>(x);
  float* to = phyla::mutable_data<float>(y);
  uint64_t* bits = static_cast<uint64_t*>(words.mutable_data_ptr());
  constexpr int64_t kPixels = 64;
  const int64_t tiles = (pixels + kPixels - 1) / kPixels, width = (channels + 63) / 64;
  phyla::parallel_units(images * tiles, [&](int64_t unit) {
    const int64_t n = unit / tiles, first = unit % tiles * kPixels;
    turn(from + n * channels * pixels, channels, pixels, first, std::min(kPixels, pixels - first), to + n * pixels * channels,
         bits + n * pixels * width);
  }, 1 + 1024 / (channels + 1));
  return {y, words};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(phyla_quantized, CPU, m) {
  m.impl("stream", TORCH_BOX(&stream));
}
