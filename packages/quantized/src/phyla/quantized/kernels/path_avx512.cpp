// The path of processors with VPOPCNTDQ (Ice Lake, Zen 4 and later): the 16 lanes of lanes16.h are one register, their bits counted at once.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("no-associative-math", "fp-contract=off")
#endif
#include <phyla/kernel.h>

#include "paths.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vpopcntdq,popcnt,bmi,bmi2,prefer-vector-width=512")

namespace phyla::quantized {
namespace {

typedef uint32_t Lanes __attribute__((vector_size(64)));
typedef uint64_t Words __attribute__((vector_size(64)));

constexpr int64_t kRows = 8;

PHYLA_INLINE Lanes popcount(Lanes v) { return Lanes(_mm512_popcnt_epi32(__m512i(v))); }
PHYLA_INLINE Words popcount(Words v) { return Words(_mm512_popcnt_epi64(__m512i(v))); }

PHYLA_INLINE uint64_t signs(const int32_t* values, int64_t n) {
  uint64_t bits = 0;
  for (int64_t j = 0; j < n; j += 16) {
    const __mmask16 present = __mmask16(n - j >= 16 ? 0xffff : (1 << (n - j)) - 1);
    bits |= uint64_t(_mm512_movepi32_mask(_mm512_maskz_loadu_epi32(present, values + j))) << j;
  }
  return bits;
}
template <int N>
PHYLA_INLINE uint64_t signs(const uint8_t* bytes) {
  if constexpr (N == 16) return _mm_movepi8_mask(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
  else return _mm512_movepi8_mask(_mm512_loadu_si512(bytes));
}

#include "lanes16.h"
#include "path_common.h"

constexpr Path kPath = path_of("avx512");

}  // namespace

const Path* avx512_path() { return &kPath; }

}  // namespace phyla::quantized
#pragma GCC pop_options
#else
namespace phyla::quantized {
const Path* avx512_path() { return nullptr; }
}  // namespace phyla::quantized
#endif
