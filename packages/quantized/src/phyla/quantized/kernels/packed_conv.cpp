// Convolution of packed channels-last images: the bits of one tile of patches at a time are gathered, densely, and multiplied.
// Padding by zero: the added pixels are gathered as +1, and a row near the border begins its sums without what its outer taps will add. The
// inner taps of a row are an interval by an interval, of which an image has a few kinds.
#include "product.h"

namespace phyla::quantized {
namespace {

struct Geometry {
  int64_t channels, kh, kw, sh, sw, ph, pw, dh, dw, groups, padding_value;
  int64_t images, height, width, out_height, out_width;

  Geometry(const Tensor& x, int64_t channels, const std::vector<int64_t>& kernel, const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
           const std::vector<int64_t>& dilation, int64_t groups, int64_t padding_value)
      : channels(channels), kh(kernel.at(0)), kw(kernel.at(1)), sh(stride.at(0)), sw(stride.at(1)), ph(padding.at(0)), pw(padding.at(1)),
        dh(dilation.at(0)), dw(dilation.at(1)), groups(groups), padding_value(padding_value) {
    STD_TORCH_CHECK(channels >= 1 && kh >= 1 && kw >= 1 && sh >= 1 && sw >= 1 && ph >= 0 && pw >= 0 && dh >= 1 && dw >= 1 && groups >= 1,
                    "packed_conv2d: sizes must be positive");
    STD_TORCH_CHECK(channels % groups == 0, "groups must divide channels");
    STD_TORCH_CHECK(x.dim() == 4, "x: expected 4 dimensions");
    expect_words(x, 4, words_of(channels), "x");
    images = x.size(0), height = x.size(1), width = x.size(2);
    STD_TORCH_CHECK(height + 2 * ph >= dh * (kh - 1) + 1 && width + 2 * pw >= dw * (kw - 1) + 1, "x: the kernel does not fit in the image");
    out_height = (height + 2 * ph - dh * (kh - 1) - 1) / sh + 1, out_width = (width + 2 * pw - dw * (kw - 1) - 1) / sw + 1;
  }
  int64_t depth() const { return channels / groups; }
  int64_t taps() const { return kh * kw; }
  int64_t length() const { return taps() * depth(); }
  int64_t rows() const { return images * out_height * out_width; }
  bool plain() const { return taps() == 1 && sh == 1 && sw == 1 && ph == 0 && pw == 0 && groups == 1; }
  bool corrected() const { return padding_value == 0 && (ph > 0 || pw > 0); }
};

// The taps begin..end of one axis that fall inside of the image.
struct Inside {
  int64_t begin, end;
  bool operator==(const Inside&) const = default;
};

// One axis: the kinds of positions of the output, and each position's kind.
struct Axis {
  std::vector<Inside> kinds;
  std::vector<int64_t> kind;

  Axis(int64_t outputs, int64_t size, int64_t taps, int64_t stride, int64_t padding, int64_t dilation, bool corrected) {
    for (int64_t o = 0; o < outputs; ++o) {
      const int64_t first = o * stride - padding;
      const auto reached = [&](int64_t bound) { return std::clamp<int64_t>((bound - first + dilation - 1) / dilation, 0, taps); };
      const int64_t begin = first >= 0 ? 0 : reached(0), end = size - first <= 0 ? 0 : reached(size);
      const Inside inside = corrected ? Inside{begin, std::max(begin, end)} : Inside{0, taps};
      const auto found = std::find(kinds.begin(), kinds.end(), inside);
      kind.push_back(found - kinds.begin());
      if (found == kinds.end()) kinds.push_back(inside);
    }
  }
};

// Bits appended one after another to words.
class Writer {
 public:
  explicit Writer(uint64_t* out) : out_(out) {}
  void append(uint64_t bits, int64_t n) {
    held_ |= bits << fill_;
    if (fill_ + n >= 64) {
      *out_++ = held_;
      held_ = fill_ == 0 ? 0 : bits >> (64 - fill_);
      fill_ -= 64;
    }
    fill_ += n;
  }
  void finish() {
    if (fill_ > 0) *out_ = held_;
  }

 private:
  uint64_t *out_, held_ = 0;
  int64_t fill_ = 0;
};

uint64_t low_bits(int64_t n) { return n == 64 ? ~uint64_t(0) : (uint64_t(1) << n) - 1; }

class Patches {
 public:
  Patches(const Geometry& g, const uint64_t* x, int64_t out_channels)
      : g_(g), x_(x), pixel_(words_of(g.channels)), channels_(out_channels), rows_(g.out_height, g.height, g.kh, g.sh, g.ph, g.dh, g.corrected()),
        cols_(g.out_width, g.width, g.kw, g.sw, g.pw, g.dw, g.corrected()), sums_(rows_.kinds.size() * cols_.kinds.size() * out_channels, int32_t(g.length())) {}

  const uint32_t* direct() const { return g_.plain() ? reinterpret_cast<const uint32_t*>(x_) : nullptr; }

  void gather(int64_t row, int64_t rows, int64_t group, uint32_t* memory) const {
    const int64_t width = words_of(g_.length());
    uint64_t* out = reinterpret_cast<uint64_t*>(memory);
    each(row, rows, [&](int64_t n, int64_t y, int64_t x) {
      const uint64_t* image = x_ + n * g_.height * g_.width * pixel_;
      if (g_.depth() % 64 == 0) copy_words(image, y * g_.sh - g_.ph, x * g_.sw - g_.pw, group, out);
      else append_bits(image, y * g_.sh - g_.ph, x * g_.sw - g_.pw, group, out);
      out += width;
    });
  }

  void bases(int64_t row, int64_t rows, const int32_t** out) const {
    each(row, rows, [&](int64_t, int64_t y, int64_t x) { *out++ = sums_.data() + (rows_.kind[y] * int64_t(cols_.kinds.size()) + cols_.kind[x]) * channels_; });
  }

  void prepare(const Path& path, const Block& block, const uint32_t* relaid) {
    if (g_.corrected()) begin_sums(path, block, relaid);
  }

 private:
  // fn(image, y, x) of each output pixel row..row+rows.
  template <class Fn>
  void each(int64_t row, int64_t rows, const Fn& fn) const {
    const int64_t area = g_.out_height * g_.out_width;
    int64_t n = row / area, y = row % area / g_.out_width, x = row % g_.out_width;
    for (int64_t r = 0; r < rows; ++r) {
      fn(n, y, x);
      if (++x == g_.out_width) x = 0, ++y;
      if (y == g_.out_height) y = 0, ++n;
    }
  }

  bool inside(int64_t y, int64_t x) const { return y >= 0 && y < g_.height && x >= 0 && x < g_.width; }

  void copy_words(const uint64_t* image, int64_t top, int64_t left, int64_t group, uint64_t* out) const {
    const int64_t depth = g_.depth() / 64;
    const uint64_t pad = g_.padding_value < 0 ? ~uint64_t(0) : 0;
    const bool whole = g_.dw == 1 && g_.groups == 1 && left >= 0 && left + g_.kw <= g_.width;
    for (int64_t i = 0; i < g_.kh; ++i) {
      const int64_t y = top + i * g_.dh;
      if (whole && y >= 0 && y < g_.height) {
        out = std::copy_n(image + (y * g_.width + left) * pixel_, g_.kw * depth, out);
        continue;
      }
      for (int64_t j = 0; j < g_.kw; ++j) {
        const int64_t x = left + j * g_.dw;
        out = inside(y, x) ? std::copy_n(image + (y * g_.width + x) * pixel_ + group * depth, depth, out) : std::fill_n(out, depth, pad);
      }
    }
  }

  void append_bits(const uint64_t* image, int64_t top, int64_t left, int64_t group, uint64_t* out) const {
    const int64_t depth = g_.depth(), start = group * depth;
    const uint64_t pad = g_.padding_value < 0 ? ~uint64_t(0) : 0;
    Writer writer(out);
    if (pixel_ == 1 && inside(top, left) && inside(top + (g_.kh - 1) * g_.dh, left + (g_.kw - 1) * g_.dw)) {  // most pixels of narrow images
      const uint64_t mask = low_bits(depth);
      for (int64_t i = 0; i < g_.kh; ++i) {
        const uint64_t* line = image + (top + i * g_.dh) * g_.width + left;
        for (int64_t j = 0; j < g_.kw; ++j) writer.append(line[j * g_.dw] >> start & mask, depth);
      }
      return writer.finish();
    }
    for (int64_t i = 0; i < g_.kh; ++i)
      for (int64_t j = 0; j < g_.kw; ++j) {
        const int64_t y = top + i * g_.dh, x = left + j * g_.dw;
        const uint64_t* pixel = inside(y, x) ? image + (y * g_.width + x) * pixel_ : nullptr;
        for (int64_t at = start; at < start + depth; at += 64) {
          const int64_t n = std::min<int64_t>(64, start + depth - at), shift = at % 64;
          uint64_t bits = pad;
          if (pixel != nullptr) {
            bits = pixel[at / 64] >> shift;
            if (shift + n > 64) bits |= pixel[at / 64 + 1] << (64 - shift);
          }
          writer.append(bits & low_bits(n), n);
        }
      }
    writer.finish();
  }

  // The sums over the channels of each tap of a block's weights, (taps, kBlock).
  std::vector<int32_t> tap_sums(const Path& path, const Block& block, const uint32_t* relaid) const {
    const int64_t taps = g_.taps(), depth = g_.depth(), halves = (g_.length() + 31) / 32, width = words_of(g_.length());
    std::vector<int32_t> sums(size_t(taps * kBlock));
    if (depth % 32 == 0) {  // a tap is whole words: its ones are what differs from +1
      const std::vector<uint32_t> plus(size_t(depth / 32));
      for (int64_t t = 0; t < taps; ++t)
        path.relaid(plus.data(), 0, 1, relaid + t * (depth / 32) * path.lanes, halves * path.lanes, depth / 32, block.channels, sums.data() + t * kBlock);
      for (int32_t& s : sums) s = int32_t(depth) - 2 * s;
      return sums;
    }
    // A row that is -1 at one tap and +1 elsewhere differs by that tap's sum from a row of +1.
    std::vector<uint64_t> rows(size_t((taps + 1) * width));
    std::vector<int32_t> different(size_t((taps + 1) * kBlock));
    for (int64_t t = 0; t < taps; ++t)
      for (int64_t i = t * depth; i < (t + 1) * depth; ++i) rows[t * width + i / 64] |= uint64_t(1) << i % 64;
    path.relaid(reinterpret_cast<const uint32_t*>(rows.data()), 2 * width, taps + 1, relaid, halves * path.lanes, halves, block.channels, different.data());
    for (int64_t t = 0; t < taps; ++t)
      for (int64_t j = 0; j < block.channels; ++j) sums[t * kBlock + j] = different[t * kBlock + j] - different[taps * kBlock + j];
    return sums;
  }

  // The sums of a block begin with `length`, less the taps outside: the sum over intervals of rows, then over intervals of columns.
  void begin_sums(const Path& path, const Block& block, const uint32_t* relaid) {
    const std::vector<int32_t> taps = tap_sums(path, block, relaid);
    std::vector<int32_t> column(size_t(g_.kw * kBlock));
    int32_t total[kBlock] = {};
    for (int64_t t = 0; t < g_.taps(); ++t)
      for (int64_t j = 0; j < block.channels; ++j) total[j] += taps[t * kBlock + j];
    for (size_t r = 0; r < rows_.kinds.size(); ++r) {
      std::fill(column.begin(), column.end(), 0);
      for (int64_t i = rows_.kinds[r].begin; i < rows_.kinds[r].end; ++i)
        for (int64_t k = 0; k < g_.kw * kBlock; ++k) column[k] += taps[i * g_.kw * kBlock + k];
      for (size_t c = 0; c < cols_.kinds.size(); ++c) {
        int32_t* sums = sums_.data() + (r * cols_.kinds.size() + c) * channels_ + block.first;
        for (int64_t j = 0; j < block.channels; ++j) sums[j] = int32_t(g_.length()) - total[j];
        for (int64_t k = cols_.kinds[c].begin; k < cols_.kinds[c].end; ++k)
          for (int64_t j = 0; j < block.channels; ++j) sums[j] += column[k * kBlock + j];
      }
    }
  }

  const Geometry& g_;
  const uint64_t* x_;
  int64_t pixel_, channels_;
  Axis rows_, cols_;
  std::vector<int32_t> sums_;  // (kinds of rows, kinds of columns, output channels)
};

using Sizes = std::vector<int64_t>;

void convolve(const Geometry& g, const Tensor& x, const Tensor& weight, const Epilogue& epilogue) {
  const Tensor images = dense(x), filters = dense(weight);
  const Weights weights{words(filters), filters.size(0), g.groups, g.length()};
  if (g.rows() == 0 || weights.channels == 0) return;
  Patches patches(g, words(images), weights.channels);
  product(path(), patches, g.rows(), weights, epilogue);
}

Sizes checked_sizes(const Geometry& g, const Tensor& weight, int64_t last) {
  STD_TORCH_CHECK(weight.dim() == 2 && weight.size(0) % g.groups == 0, "weight: expected (channels, words), channels a multiple of groups");
  expect_words(weight, 2, words_of(g.length()), "weight");
  return {g.images, g.out_height, g.out_width, last};
}

Tensor packed_conv2d(const Tensor& x, const Tensor& weight, int64_t channels, Sizes kernel, Sizes stride, Sizes padding, Sizes dilation, int64_t groups,
                     int64_t padding_value) {
  const Geometry g(x, channels, kernel, stride, padding, dilation, groups, padding_value);
  Tensor out = make(checked_sizes(g, weight, weight.size(0)), ScalarType::Int);
  Epilogue epilogue{.channels = weight.size(0)};
  epilogue.sums = static_cast<int32_t*>(out.mutable_data_ptr());
  convolve(g, x, weight, epilogue);
  return out;
}

Tensor packed_conv2d_threshold(const Tensor& x, const Tensor& weight, const Tensor& threshold, const Tensor& flip, int64_t channels, Sizes kernel,
                               Sizes stride, Sizes padding, Sizes dilation, int64_t groups, int64_t padding_value) {
  const Geometry g(x, channels, kernel, stride, padding, dilation, groups, padding_value);
  Tensor out = zero_words(checked_sizes(g, weight, words_of(weight.size(0))));
  const Threshold bounds(threshold, flip, weight.size(0));
  Epilogue epilogue = bounds.epilogue();
  epilogue.words = mutable_words(out);
  convolve(g, x, weight, epilogue);
  return out;
}

std::tuple<Tensor, Tensor> packed_conv2d_residual(const Tensor& x, const Tensor& weight, const Tensor& scale, const Tensor& gain,
                                                  const Tensor& shift, const std::optional<Tensor>& shortcut, double low, double high, int64_t channels,
                                                  Sizes kernel, Sizes stride, Sizes padding, Sizes dilation, int64_t groups, int64_t padding_value) {
  const Geometry g(x, channels, kernel, stride, padding, dilation, groups, padding_value);
  const int64_t out_channels = weight.size(0);
  Tensor y = make(checked_sizes(g, weight, out_channels), ScalarType::Float), out = zero_words(checked_sizes(g, weight, words_of(out_channels)));
  const auto floats = [](const Tensor& t, int64_t count, const char* name) {
    STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && t.numel() == count, name, ": expected float32 of ", count, " elements");
    return dense(t);
  };
  const Tensor s = floats(scale, out_channels, "scale"), p = floats(gain, out_channels, "gain"), q = floats(shift, out_channels, "shift");
  std::optional<Tensor> added;
  if (shortcut) added = floats(*shortcut, y.numel(), "shortcut");
  const Epilogue epilogue{.channels = out_channels, .width = words_of(out_channels), .scale = data<float>(s), .gain = data<float>(p),
                          .shift = data<float>(q), .shortcut = added ? data<float>(*added) : nullptr, .low = float(low), .high = float(high),
                          .y = mutable_data<float>(y), .words = mutable_words(out)};
  convolve(g, x, weight, epilogue);
  return {y, out};
}

// The windows' common ones; of a flipped channel, the common ones of the complement.
Tensor packed_max_pool2d(const Tensor& x, Sizes kernel, Sizes stride, const std::optional<Tensor>& flip) {
  const Tensor held = dense(x);
  STD_TORCH_CHECK(held.dim() == 4 && held.scalar_type() == ScalarType::Long, "x: expected int64 words of 4 dimensions");
  const int64_t kh = kernel.at(0), kw = kernel.at(1), sh = stride.at(0), sw = stride.at(1);
  const int64_t images = held.size(0), height = held.size(1), width = held.size(2), n = held.size(3);
  STD_TORCH_CHECK(kh >= 1 && kw >= 1 && sh >= 1 && sw >= 1 && height >= kh && width >= kw, "kernel_size, stride: the window does not fit");
  const int64_t rows = (height - kh) / sh + 1, cols = (width - kw) / sw + 1;
  std::vector<uint64_t> mask(size_t(n), 0);
  if (flip) {
    STD_TORCH_CHECK(flip->numel() == n && flip->scalar_type() == ScalarType::Long, "flip: expected the words of a pixel");
    const Tensor given = dense(*flip);
    std::copy_n(words(given), n, mask.data());
  }
  Tensor out = make({images, rows, cols, n}, ScalarType::Long);
  const uint64_t* from = words(held);
  uint64_t* to = mutable_words(out);
  parallel_units(images * rows, [&](int64_t unit) {
    const uint64_t* top = from + (unit / rows * height + unit % rows * sh) * width * n;
    for (int64_t c = 0; c < cols; ++c)
      for (int64_t w = 0; w < n; ++w) {
        uint64_t common = ~uint64_t(0);
        for (int64_t i = 0; i < kh; ++i)
          for (int64_t j = 0; j < kw; ++j) common &= top[(i * width + c * sw + j) * n + w] ^ mask[w];
        to[(unit * cols + c) * n + w] = common ^ mask[w];
      }
  }, std::max<int64_t>(1, 4096 / (cols * std::max<int64_t>(n, 1) * kh * kw)));
  return out;
}

}  // namespace
}  // namespace phyla::quantized

STABLE_TORCH_LIBRARY_IMPL(phyla_quantized, CPU, m) {
  m.impl("packed_conv2d", TORCH_BOX(&phyla::quantized::packed_conv2d));
  m.impl("packed_conv2d_threshold", TORCH_BOX(&phyla::quantized::packed_conv2d_threshold));
  m.impl("packed_conv2d_residual", TORCH_BOX(&phyla::quantized::packed_conv2d_residual));
  m.impl("packed_max_pool2d", TORCH_BOX(&phyla::quantized::packed_max_pool2d));
}
