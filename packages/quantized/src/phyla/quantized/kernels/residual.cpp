// The float stream of a residual network, channels last, with its signs: how it begins from an image, and the pass behind each packed
// convolution: factor, batch normalisation, shortcut and clamp of the sums. Each value is read once and written once.
#include <phyla/kernel.h>

namespace {

using torch::stable::Tensor;

struct Job {
  int64_t channels, width;
  const int32_t* sums;
  const float *scale, *gain, *shift, *shortcut;
  float low, high;
  float* y;
  uint64_t* words;
};

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

// One position of the image. The product and the sum of the normalisation are rounded once, as in torch's own loop on processors that can;
// the intrinsic keeps the compiler from moving `scale` into it.
PHYLA_CLONES void position(const Job& job, int64_t row) {
  const int32_t* __restrict__ sums = job.sums + row * job.channels;
  const float* __restrict__ around = job.shortcut ? job.shortcut + row * job.channels : nullptr;
  float* __restrict__ y = job.y + row * job.channels;
  const float low = job.low, high = job.high;
  for (int64_t c = 0; c < job.channels; ++c) {
    float value = __builtin_fmaf(float(sums[c]) * job.scale[c], job.gain[c], job.shift[c]);
    if (around) value += around[c];
    value = value < low ? low : value;
    y[c] = value > high ? high : value;
  }
  sign_bits(y, job.channels, job.words + row * job.width);
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

std::tuple<Tensor, Tensor> residual(Tensor sums_, Tensor scale_, Tensor gain_, Tensor shift_, std::optional<Tensor> shortcut_, double low,
                                    double high) {
  const Tensor sums = phyla::dense(sums_), scale = phyla::dense(scale_), gain = phyla::dense(gain_), shift = phyla::dense(shift_);
  const Tensor shortcut = shortcut_ ? phyla::dense(*shortcut_) : sums;
  const std::vector<int64_t> sizes = phyla::sizes_of(sums);
  Tensor y = phyla::empty<float>(sizes);
  Tensor words = empty_words(sizes, sums);
  const int64_t channels = sizes.back(), width = (channels + 63) / 64;
  const Job job{channels,
                width,
                static_cast<const int32_t*>(sums.const_data_ptr()),
                phyla::data<float>(scale),
                phyla::data<float>(gain),
                phyla::data<float>(shift),
                shortcut_ ? phyla::data<float>(shortcut) : nullptr,
                float(low),
                float(high),
                phyla::mutable_data<float>(y),
                static_cast<uint64_t*>(words.mutable_data_ptr())};
  const int64_t rows = channels ? sums.numel() / channels : 0;
  phyla::parallel_for(0, rows, 1 + (1 << 15) / (channels + 1), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) position(job, row);
  });
  return {y, words};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(phyla_quantized, CPU, m) {
  m.impl("residual", TORCH_BOX(&residual));
  m.impl("stream", TORCH_BOX(&stream));
}
