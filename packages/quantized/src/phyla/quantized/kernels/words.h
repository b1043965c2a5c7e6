// Tensors of words, and the checks that every op on them repeats.
#pragma once

#include <phyla/kernel.h>

#include "paths.h"

namespace phyla::quantized {

using torch::headeronly::ScalarType;

inline int64_t words_of(int64_t length) { return (length + 63) / 64; }

inline Tensor make(const std::vector<int64_t>& sizes, ScalarType type) {
  return torch::stable::empty(sizes, type, std::nullopt, torch::stable::Device(torch::headeronly::DeviceType::CPU));
}
inline Tensor zero_words(const std::vector<int64_t>& sizes) {
  Tensor t = make(sizes, ScalarType::Long);
  std::fill_n(static_cast<int64_t*>(t.mutable_data_ptr()), t.numel(), int64_t(0));
  return t;
}
inline const uint64_t* words(const Tensor& t) { return static_cast<const uint64_t*>(t.const_data_ptr()); }
inline uint64_t* mutable_words(const Tensor& t) { return static_cast<uint64_t*>(t.mutable_data_ptr()); }

inline void expect_words(const Tensor& t, int64_t dims, int64_t width, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Long, name, ": expected int64 words");
  STD_TORCH_CHECK(t.dim() >= dims && t.size(t.dim() - 1) == width, name, ": expected ", width, " words in the last dimension");
}

// Thresholds and flips of an op's channels, in the form that the epilogue reads.
class Threshold {
 public:
  Threshold(const Tensor& threshold, const Tensor& flip, int64_t channels) : bounds_(dense(threshold)), flip_(words_of(channels)) {
    STD_TORCH_CHECK(bounds_.scalar_type() == ScalarType::Int && bounds_.numel() == channels, "threshold: expected int32 of ", channels, " channels");
    const Tensor mask = dense(flip);
    STD_TORCH_CHECK(mask.scalar_type() == ScalarType::Bool && mask.numel() == channels, "flip: expected bool of ", channels, " channels");
    const uint8_t* bits = static_cast<const uint8_t*>(mask.const_data_ptr());
    for (int64_t j = 0; j < channels; ++j) flip_[j / 64] |= uint64_t(bits[j] != 0) << j % 64;
  }
  Epilogue epilogue() const {
    const int64_t channels = bounds_.numel();
    return {.channels = channels, .width = words_of(channels), .threshold = static_cast<const int32_t*>(bounds_.const_data_ptr()), .flip = flip_.data()};
  }

 private:
  Tensor bounds_;
  std::vector<uint64_t> flip_;
};

}  // namespace phyla::quantized
