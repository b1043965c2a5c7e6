// The path of x86 processors without a vector population count: 8 output channels in the lanes of a register. Carry-save adders count eight
// words into one of ones, twos, fours and eights (5 operations an adder), so that the nibble table is read once for eight words:
// 6.25 operations for 256 products where the table alone takes 8. "Faster Population Counts Using AVX2 Instructions", section 3.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("no-associative-math", "fp-contract=off")
#endif
#include <phyla/kernel.h>

#include "paths.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>
#pragma GCC push_options
#pragma GCC target("avx2,fma,popcnt,bmi,bmi2")

namespace phyla::quantized {
namespace {

typedef uint32_t Lanes __attribute__((vector_size(32)));
constexpr int kLanes = 8;
constexpr int64_t kRows = 1;  // the adders fill the registers

PHYLA_INLINE Lanes low(Lanes x, Lanes y) {
  return Lanes(_mm256_permute2x128_si256(_mm256_unpacklo_epi32(__m256i(x), __m256i(y)), _mm256_unpackhi_epi32(__m256i(x), __m256i(y)), 0x20));
}
PHYLA_INLINE Lanes high(Lanes x, Lanes y) {
  return Lanes(_mm256_permute2x128_si256(_mm256_unpacklo_epi32(__m256i(x), __m256i(y)), _mm256_unpackhi_epi32(__m256i(x), __m256i(y)), 0x31));
}

// The bits of each byte, times `weight`.
PHYLA_INLINE __m256i bytes_of(__m256i v, char weight = 1) {
  const char w = weight, d = char(2 * w), t = char(3 * w), q = char(4 * w);
  const __m256i table = _mm256_setr_epi8(0, w, w, d, w, d, d, t, w, d, d, t, d, t, t, q, 0, w, w, d, w, d, d, t, w, d, d, t, d, t, t, q);
  const __m256i nibble = _mm256_set1_epi8(15);
  return _mm256_add_epi8(_mm256_shuffle_epi8(table, _mm256_and_si256(v, nibble)),
                         _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(v, 4), nibble)));
}

// sum + a + b = 2 result + sum, bit by bit.
PHYLA_INLINE __m256i carry(__m256i& sum, __m256i a, __m256i b) {
  const __m256i half = _mm256_xor_si256(a, b), carried = _mm256_or_si256(_mm256_and_si256(a, b), _mm256_and_si256(half, sum));
  sum = _mm256_xor_si256(half, sum);
  return carried;
}

// Bits of the vectors x(0)..x(n-1), summed over the bytes of each 32-bit lane.
template <class Vectors>
PHYLA_INLINE __m256i count(int64_t n, const Vectors& x) {
  __m256i total = _mm256_setzero_si256();
  for (int64_t begin = 0; begin < n; begin += 8 * 31) {  // 31 times eight bits fit a byte
    const int64_t end = n - begin < 8 * 31 ? n : begin + 8 * 31;
    __m256i ones = _mm256_setzero_si256(), twos = ones, fours = ones, eights = ones;
    int64_t k = begin;
    for (; k + 8 <= end; k += 8) {
      const __m256i a = carry(ones, x(k), x(k + 1)), b = carry(ones, x(k + 2), x(k + 3)), first = carry(twos, a, b);
      const __m256i c = carry(ones, x(k + 4), x(k + 5)), d = carry(ones, x(k + 6), x(k + 7)), second = carry(twos, c, d);
      eights = _mm256_add_epi8(eights, bytes_of(carry(fours, first, second)));
    }
    __m256i rest = _mm256_setzero_si256();
    if (k > begin) rest = _mm256_add_epi8(bytes_of(ones), _mm256_add_epi8(bytes_of(twos, 2), bytes_of(fours, 4)));
    for (; k < end; ++k) rest = _mm256_add_epi8(rest, bytes_of(x(k)));
    const __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16(eights, _mm256_set1_epi8(8)), _mm256_maddubs_epi16(rest, _mm256_set1_epi8(1)));
    total = _mm256_add_epi32(total, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  return total;
}

PHYLA_INLINE __m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

template <int R>
PHYLA_INLINE void count_rows(const uint32_t* a, int64_t, const uint32_t* w, int64_t words, int32_t* different) {
  static_assert(R == 1);
  const __m256i counts = count(words, [&](int64_t k) __attribute__((always_inline)) {
    return _mm256_xor_si256(_mm256_set1_epi32(int32_t(a[k])), load(w + k * kLanes));
  });
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(different), counts);
}

PHYLA_INLINE int32_t count_stored(const uint64_t* a, const uint64_t* b, int64_t width) {
  const __m256i counts = count(width / 4, [&](int64_t k) __attribute__((always_inline)) { return _mm256_xor_si256(load(a + 4 * k), load(b + 4 * k)); });
  const __m128i halves = _mm_add_epi32(_mm256_castsi256_si128(counts), _mm256_extracti128_si256(counts, 1));
  const __m128i pairs = _mm_add_epi32(halves, _mm_shuffle_epi32(halves, 0x4e));
  int32_t total = _mm_cvtsi128_si32(pairs) + _mm_extract_epi32(pairs, 1);
  for (int64_t k = width / 4 * 4; k < width; ++k) total += int32_t(_mm_popcnt_u64(a[k] ^ b[k]));
  return total;
}

PHYLA_INLINE uint64_t signs(const int32_t* values, int64_t n) {
  uint64_t bits = 0;
  int64_t j = 0;
  for (; j + 8 <= n; j += 8) bits |= uint64_t(uint32_t(_mm256_movemask_ps(_mm256_loadu_ps(reinterpret_cast<const float*>(values + j))))) << j;
  for (; j < n; ++j) bits |= uint64_t(uint32_t(values[j]) >> 31) << j;
  return bits;
}
template <int N>
PHYLA_INLINE uint64_t signs(const uint8_t* bytes) {
  if constexpr (N == 16) return uint32_t(_mm_movemask_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes))));
  else return uint64_t(uint32_t(_mm256_movemask_epi8(load(bytes)))) | uint64_t(uint32_t(_mm256_movemask_epi8(load(bytes + 32)))) << 32;
}

#include "path_common.h"

constexpr Path kPath = path_of("avx2");

}  // namespace

const Path* avx2_path() { return &kPath; }

}  // namespace phyla::quantized
#pragma GCC pop_options
#else
namespace phyla::quantized {
const Path* avx2_path() { return nullptr; }
}  // namespace phyla::quantized
#endif
