// The micro-kernel of processors that count bits in vectors, and of no processor in particular: 16 output channels in the lanes of one vector,
// int32 sums, words of the activations broadcast. The file that includes it defines kRows and popcount(v) of both vectors, Lanes and
// Words, before.

constexpr int kLanes = 16;

PHYLA_INLINE Lanes low(Lanes x, Lanes y) { return __builtin_shufflevector(x, y, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23); }
PHYLA_INLINE Lanes high(Lanes x, Lanes y) { return __builtin_shufflevector(x, y, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31); }

template <int R>
PHYLA_INLINE void count_rows(const uint32_t* a, int64_t stride, const uint32_t* w, int64_t words, int32_t* different) {
  Lanes counts[R] = {};
  for (int64_t k = 0; k < words; ++k) {
    Lanes weights;
    __builtin_memcpy(&weights, w + k * kLanes, sizeof(Lanes));
    for (int r = 0; r < R; ++r) counts[r] += popcount(weights ^ a[r * stride + k]);
  }
  for (int r = 0; r < R; ++r) __builtin_memcpy(different + r * kBlock, &counts[r], sizeof(Lanes));
}

PHYLA_INLINE int32_t count_stored(const uint64_t* a, const uint64_t* b, int64_t width) {
  Words counts = {};
  int64_t k = 0;
  for (; k + 8 <= width; k += 8) {
    Words x, y;
    __builtin_memcpy(&x, a + k, sizeof(Words));
    __builtin_memcpy(&y, b + k, sizeof(Words));
    counts += popcount(x ^ y);
  }
  uint64_t total = 0;
  for (int i = 0; i < 8; ++i) total += counts[i];
  for (; k < width; ++k) total += uint64_t(__builtin_popcountll(a[k] ^ b[k]));
  return int32_t(total);
}
