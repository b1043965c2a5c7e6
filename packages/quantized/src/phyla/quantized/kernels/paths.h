// The arithmetic on bits that depends on the processor: one table of functions a path, three paths, one of them chosen when the library is
// loaded. Words of 64 bits are read as pairs of 32-bit words, least significant first.
#pragma once

#include <cstdint>

// Before a sum of products whose every operation must be rounded as torch rounds it.
#if defined(__clang__)
#define PHYLA_EACH_ROUNDED _Pragma("clang fp reassociate(off) contract(off)")
#else
#define PHYLA_EACH_ROUNDED  // GCC: `#pragma GCC optimize` at the top of the file
#endif

namespace phyla::quantized {

constexpr int64_t kBlock = 64;  // output channels of a block: their signs fill one word

// What becomes of the sums of a product. Offsets are rows times `channels`, or rows times `width` for words, which must be zero before.
struct Epilogue {
  int64_t channels = 0, width = 0;
  int32_t* sums = nullptr;             // the sums themselves, or
  const int32_t* threshold = nullptr;  // bits of (sum >= threshold) == flip, or
  const uint64_t* flip = nullptr;
  const float *scale = nullptr, *gain = nullptr, *shift = nullptr;  // y = clamp(sum scale gain + shift + shortcut) and its sign bits
  const float* shortcut = nullptr;
  float low = 0, high = 0;
  float* y = nullptr;
  uint64_t* words = nullptr;
};

// Rows `row..row+rows` of the output and channels `first..first+channels` of it; a sum is base[r][channel] - 2 * (different bits).
struct Place {
  int64_t row, rows, first, channels;
  const int32_t* const* base;
};

enum Kind { kHalf, kBfloat16, kFloat, kDouble };

struct Path {
  const char* name;
  int64_t lanes;  // output channels that stand side by side in relaid weights
  // Weights of `channels` rows (row stride in 32-bit words) -> groups of `lanes` channels, each [words][lanes]; missing channels are zero.
  void (*relay)(const uint32_t* rows, int64_t stride, int64_t channels, int64_t words, uint32_t* relaid);
  // different[r * kBlock + j]: bits that differ between row r and channel j < channels <= kBlock. `group` is the distance of lane groups.
  void (*relaid)(const uint32_t* a, int64_t stride, int64_t rows, const uint32_t* relaid, int64_t group, int64_t words, int64_t channels,
                 int32_t* different);
  // The same of weights as they are stored, of the row stride `width` in 64-bit words.
  void (*stored)(const uint64_t* a, int64_t rows, const uint64_t* b, int64_t channels, int64_t width, int32_t* different);
  void (*finish)(const Epilogue& epilogue, const Place& place, const int32_t* different);
  // By Kind: `rows` rows of n elements, the distance of the packed ones in elements, that of the words is ceil(n/64).
  void (*pack[4])(const void* x, int64_t stride, int64_t rows, int64_t n, uint64_t* words);
  void (*unpack[4])(const uint64_t* words, int64_t rows, int64_t n, void* x);
  void (*transpose)(uint64_t* bits);  // a matrix of 64 x 64 bits
};

const Path* avx512_path();  // null where the compiler does not build it
const Path* avx2_path();
const Path* portable_path();
const Path& path();  // the one in use

}  // namespace phyla::quantized
