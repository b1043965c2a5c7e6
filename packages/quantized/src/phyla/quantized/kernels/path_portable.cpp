// The path of every processor: vectors of GCC and clang, bits counted by additions within the words.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("no-associative-math", "fp-contract=off")
#endif
#include <phyla/kernel.h>

#include "paths.h"

namespace phyla::quantized {
namespace {

typedef uint32_t Lanes __attribute__((vector_size(64)));
typedef uint64_t Words __attribute__((vector_size(64)));

constexpr int64_t kRows = 2;

PHYLA_INLINE Lanes popcount(Lanes v) {
  v -= v >> 1 & 0x55555555u;
  v = (v & 0x33333333u) + (v >> 2 & 0x33333333u);
  v = (v + (v >> 4)) & 0x0f0f0f0fu;
  v += v >> 8;
  return (v + (v >> 16)) & 63u;
}
PHYLA_INLINE Words popcount(Words v) {
  v -= v >> 1 & 0x5555555555555555u;
  v = (v & 0x3333333333333333u) + (v >> 2 & 0x3333333333333333u);
  v = (v + (v >> 4)) & 0x0f0f0f0f0f0f0f0fu;
  v += v >> 8;
  v += v >> 16;
  return (v + (v >> 32)) & 127u;
}

PHYLA_INLINE uint64_t signs(const int32_t* values, int64_t n) {
  uint64_t bits = 0;
  for (int64_t j = 0; j < n; ++j) bits |= uint64_t(uint32_t(values[j]) >> 31) << j;
  return bits;
}
template <int N>
PHYLA_INLINE uint64_t signs(const uint8_t* bytes) {
  uint64_t bits = 0;
  for (int j = 0; j < N / 8; ++j) {
    uint64_t octet = 0;  // byte i of it is all ones or zero; the product gathers bit i of byte i in the top byte
    for (int i = 0; i < 8; ++i) octet |= uint64_t(bytes[8 * j + i]) << 8 * i;
    bits |= ((octet & 0x8040201008040201u) * 0x0101010101010101u >> 56) << 8 * j;
  }
  return bits;
}

#include "lanes16.h"
#include "path_common.h"

constexpr Path kPath = path_of("portable");

}  // namespace

const Path* portable_path() { return &kPath; }

}  // namespace phyla::quantized
