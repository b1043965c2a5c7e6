// Signs to bits and back. A channels-first image that is read as channels-last is not copied first: 64 pixels of 64 channels are packed along
// the pixels, where they are contiguous, and the square of bits is transposed.
#include "words.h"

namespace phyla::quantized {
namespace {

constexpr int64_t kGrain = 1 << 14;  // elements a task

Kind kind_of(ScalarType type) {
  if (type == ScalarType::Half) return kHalf;
  if (type == ScalarType::BFloat16) return kBfloat16;
  if (type == ScalarType::Float) return kFloat;
  STD_TORCH_CHECK(type == ScalarType::Double, "pack, unpack: expected float16, bfloat16, float32 or float64");
  return kDouble;
}
constexpr int64_t size_of(Kind kind) { return kind == kHalf || kind == kBfloat16 ? 2 : kind == kFloat ? 4 : 8; }

// x (images, pixels, n) with contiguous pixels; row stride `column` from one element of the packed dimension to the next.
struct Columns {
  int64_t images, pixels, image, column;
};

// The layout of `x` (..., n) if it can be read so: the dimension before the last is contiguous and those before it merge into it or into one.
std::optional<Columns> columns_of(const Tensor& x) {
  const int64_t last = x.dim() - 1;
  if (last < 1 || x.size(last) < 2 || x.stride(last) == 1 || x.stride(last - 1) != 1) return std::nullopt;
  int64_t pixels = x.size(last - 1), d = last - 2;
  while (d >= 0 && x.stride(d) == pixels) pixels *= x.size(d--);
  int64_t images = 1, image = 0;
  for (int64_t outer = d; outer >= 0; --outer) {
    if (outer == d) image = x.stride(d);
    else if (x.stride(outer) != image * images) return std::nullopt;
    images *= x.size(outer);
  }
  return Columns{images, pixels, image, x.stride(last)};
}

constexpr int64_t kStrip = 4;  // words of pixels that are packed at once: long enough reads of one channel

void pack_columns(const Path& path, const char* x, Kind kind, const Columns& c, int64_t n, uint64_t* out) {
  const int64_t size = size_of(kind), width = words_of(n), strips = (c.pixels + 64 * kStrip - 1) / (64 * kStrip);
  parallel_units(c.images * strips, [&](int64_t unit) {
    const int64_t image = unit / strips, first = unit % strips * 64 * kStrip, pixels = std::min(64 * kStrip, c.pixels - first), parts = words_of(pixels);
    for (int64_t w = 0; w < width; ++w) {
      uint64_t packed[64 * kStrip], square[64];
      const int64_t channels = std::min<int64_t>(64, n - 64 * w);
      path.pack[kind](x + (image * c.image + 64 * w * c.column + first) * size, c.column, channels, pixels, packed);
      for (int64_t p = 0; p < parts; ++p) {
        for (int64_t j = 0; j < 64; ++j) square[j] = j < channels ? packed[j * parts + p] : 0;
        path.transpose(square);
        uint64_t* to = out + (image * c.pixels + first + 64 * p) * width + w;
        for (int64_t i = 0; i < std::min<int64_t>(64, pixels - 64 * p); ++i) to[i * width] = square[i];
      }
    }
  }, std::max<int64_t>(1, kGrain / (64 * kStrip * n)));
}

Tensor pack(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() >= 1, "pack: expected at least 1 dimension");
  const Kind kind = kind_of(x.scalar_type());
  const int64_t n = x.size(x.dim() - 1), width = words_of(n);
  std::vector<int64_t> sizes = sizes_of(x);
  sizes.back() = width;
  Tensor out = make(sizes, ScalarType::Long);
  uint64_t* to = mutable_words(out);
  if (out.numel() == 0) return out;
  const Path& use = path();
  if (const auto columns = columns_of(x)) {
    pack_columns(use, static_cast<const char*>(x.const_data_ptr()), kind, *columns, n, to);
    return out;
  }
  const Tensor held = dense(x);
  const char* from = static_cast<const char*>(held.const_data_ptr());
  const int64_t row = n % 64 == 0 ? 64 : n;  // rows of whole words are rows of one word
  parallel_for(0, held.numel() / row, std::max<int64_t>(1, kGrain / row), [&](int64_t begin, int64_t end) {
    use.pack[kind](from + begin * row * size_of(kind), row, end - begin, row, to + begin * words_of(row));
  });
  return out;
}

Tensor unpack(const Tensor& packed, int64_t length, ScalarType type) {
  expect_words(packed, 1, words_of(length), "words");
  const Kind kind = kind_of(type);
  const Tensor held = dense(packed);
  std::vector<int64_t> sizes = sizes_of(packed);
  sizes.back() = length;
  Tensor out = make(sizes, type);
  if (out.numel() == 0) return out;
  const Path& use = path();
  const uint64_t* from = words(held);
  char* to = static_cast<char*>(out.mutable_data_ptr());
  const int64_t width = words_of(length);
  parallel_for(0, out.numel() / length, std::max<int64_t>(1, kGrain / length), [&](int64_t begin, int64_t end) {
    use.unpack[kind](from + begin * width, end - begin, length, to + begin * length * size_of(kind));
  });
  return out;
}

}  // namespace
}  // namespace phyla::quantized

STABLE_TORCH_LIBRARY_IMPL(phyla_quantized, CPU, m) {
  m.impl("pack", TORCH_BOX(&phyla::quantized::pack));
  m.impl("unpack", TORCH_BOX(&phyla::quantized::unpack));
}
