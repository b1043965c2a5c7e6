// Factor, batch normalisation, shortcut and clamp of the sums of a packed convolution, and the signs of the result: one pass over memory.
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
  for (int64_t w = 0; w < job.width; ++w) {
    const int64_t count = std::min<int64_t>(64, job.channels - 64 * w);
    uint32_t halves[2] = {0, 0};
    for (int64_t half = 0; 32 * half < count; ++half) {
      const float* __restrict__ from = y + 64 * w + 32 * half;
      uint32_t bits = 0;
      if (count - 32 * half >= 32) {
        for (int c = 0; c < 32; ++c) bits |= uint32_t(from[c] < 0.0f) << c;
      } else {
        for (int c = 0; c < count - 32 * half; ++c) bits |= uint32_t(from[c] < 0.0f) << c;
      }
      halves[half] = bits;
    }
    job.words[row * job.width + w] = uint64_t(halves[1]) << 32 | halves[0];
  }
}

std::tuple<Tensor, Tensor> residual(Tensor sums_, Tensor scale_, Tensor gain_, Tensor shift_, std::optional<Tensor> shortcut_, double low,
                                    double high) {
  const Tensor sums = phyla::dense(sums_), scale = phyla::dense(scale_), gain = phyla::dense(gain_), shift = phyla::dense(shift_);
  const Tensor shortcut = shortcut_ ? phyla::dense(*shortcut_) : sums;
  std::vector<int64_t> sizes = phyla::sizes_of(sums);
  Tensor y = phyla::empty<float>(sizes);
  const int64_t channels = sizes.back(), width = (channels + 63) / 64;
  sizes.back() = width;
  Tensor words = torch::stable::empty(sizes, torch::headeronly::ScalarType::Long, std::nullopt, sums.device());
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

STABLE_TORCH_LIBRARY_IMPL(phyla_quantized, CPU, m) { m.impl("residual", TORCH_BOX(&residual)); }
