// What all paths share, written once and compiled for each instruction set. The file that includes it defines before, in its anonymous
// namespace and under its `#pragma GCC target`:
//   Lanes, kLanes                      a vector of 32-bit words, one an output channel
//   low(x, y), high(x, y)              x0 y0 x1 y1 .. of the lower and of the upper halves
//   kRows, count_rows<R>(a, stride, w, words, different)   bits that differ between R rows and kLanes channels
//   count_stored(a, b, width)          bits that differ between two rows of 64-bit words
//   signs(const int32_t*, n), signs<N>(const uint8_t*)     sign bits of n <= 64 integers, of N = 16 or 64 bytes, as one word
// No function of the standard library here: its inline code would be compiled for this instruction set and linked into the others.

constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// kLanes words of kLanes channels: the transpose is log2(kLanes) perfect shuffles of the rows. Unrolled, so that rows are registers.
template <int kSize>
PHYLA_INLINE void shuffle_rows(Lanes (&x)[kLanes]) {
  Lanes mixed[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes / 2; ++i) mixed[2 * i] = low(x[i], x[i + kLanes / 2]), mixed[2 * i + 1] = high(x[i], x[i + kLanes / 2]);
  if constexpr (2 * kSize < kLanes) shuffle_rows<2 * kSize>(mixed);
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) x[i] = mixed[i];
}
PHYLA_INLINE void relay_square(const uint32_t* rows, int64_t stride, uint32_t* out) {
  Lanes x[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) __builtin_memcpy(&x[i], rows + i * stride, sizeof(Lanes));
  shuffle_rows<1>(x);
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) __builtin_memcpy(out + i * kLanes, &x[i], sizeof(Lanes));
}

void relay(const uint32_t* rows, int64_t stride, int64_t channels, int64_t words, uint32_t* out) {
  for (int64_t c = 0; c < channels; c += kLanes, rows += kLanes * stride, out += kLanes * words) {
    const int64_t present = smaller(kLanes, channels - c);
    int64_t k = 0;
    if (present == kLanes)
      for (; k + kLanes <= words; k += kLanes) relay_square(rows + k, stride, out + k * kLanes);
    for (; k < words; ++k)
      for (int64_t i = 0; i < kLanes; ++i) out[k * kLanes + i] = i < present ? rows[i * stride + k] : 0;
  }
}

void relaid(const uint32_t* a, int64_t stride, int64_t rows, const uint32_t* w, int64_t group, int64_t words, int64_t channels, int32_t* different) {
  for (int64_t c = 0; c < channels; c += kLanes, w += group) {
    int64_t r = 0;
    for (; r + kRows <= rows; r += kRows) count_rows<kRows>(a + r * stride, stride, w, words, different + r * kBlock + c);
    for (; r < rows; ++r) count_rows<1>(a + r * stride, stride, w, words, different + r * kBlock + c);
  }
}

void stored(const uint64_t* a, int64_t rows, const uint64_t* b, int64_t channels, int64_t width, int32_t* different) {
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t r = 0; r < rows; ++r) different[r * kBlock + c] = count_stored(a + r * width, b + c * width, width);
}

// Bits at..at+n of the words, and back; n <= 64.
PHYLA_INLINE uint64_t bits_at(const uint64_t* words, int64_t at, int64_t n) {
  const int64_t shift = at % 64;
  uint64_t bits = words[at / 64] >> shift;
  if (shift + n > 64) bits |= words[at / 64 + 1] << (64 - shift);
  return n == 64 ? bits : bits & ((uint64_t(1) << n) - 1);
}
PHYLA_INLINE void put_bits(uint64_t* words, int64_t at, uint64_t bits, int64_t n) {
  const int64_t shift = at % 64;
  words[at / 64] |= bits << shift;
  if (shift + n > 64) words[at / 64 + 1] |= bits >> (64 - shift);
}

// The sum of channel j; unsigned, since twice the difference of a long row exceeds int32.
PHYLA_INLINE int32_t sum(int32_t base, int32_t different) { return int32_t(uint32_t(base) - 2 * uint32_t(different)); }

// Each step is rounded as the modules round it: factor, batch normalisation, addition, hardtanh. The product and the sum of the normalisation
// are rounded once, as in torch's own loop on processors that can.
PHYLA_INLINE void finish_residual(const Epilogue& e, const int32_t* base, const int32_t* different, int64_t at, int64_t first, int64_t n, uint64_t* words) {
  PHYLA_EACH_ROUNDED
  const float *scale = e.scale + first, *gain = e.gain + first, *shift = e.shift + first;
  const float* shortcut = e.shortcut == nullptr ? nullptr : e.shortcut + at + first;
  float* y = e.y + at + first;
  int32_t negative[kBlock];
  for (int64_t j = 0; j < n; ++j) {
    float v = __builtin_fmaf(float(sum(base[j], different[j])) * scale[j], gain[j], shift[j]);
    if (shortcut != nullptr) v = v + shortcut[j];
    v = v < e.low ? e.low : v;
    v = v > e.high ? e.high : v;
    y[j] = v;
    negative[j] = v < 0 ? -1 : 0;
  }
  put_bits(words, first, signs(negative, n), n);
}

void finish(const Epilogue& e, const Place& place, const int32_t* different) {
  const int64_t n = place.channels, first = place.first;
  for (int64_t r = 0; r < place.rows; ++r, different += kBlock) {
    const int64_t at = (place.row + r) * e.channels;
    const int32_t* base = place.base[r] + first;
    uint64_t* words = e.words + (place.row + r) * e.width;
    if (e.sums != nullptr) {
      int32_t* out = e.sums + at + first;
      for (int64_t j = 0; j < n; ++j) out[j] = sum(base[j], different[j]);
    } else if (e.threshold != nullptr) {
      const int32_t* threshold = e.threshold + first;
      int32_t below[kBlock];
      for (int64_t j = 0; j < n; ++j) below[j] = sum(base[j], different[j]) < threshold[j] ? -1 : 0;
      put_bits(words, first, signs(below, n) ^ bits_at(e.flip, first, n), n);
    } else {
      finish_residual(e, base, different, at, first, n, words);
    }
  }
}

// Negative values of each dtype, as integers where the compiler has no such float: between the least and the largest negative magnitude.
struct Half {
  typedef uint16_t type;
  static PHYLA_INLINE bool negative(uint16_t x) { return uint16_t(x - 0x8001) < 0x7c00; }
  static constexpr uint16_t one = 0x3c00;
};
struct Bfloat16 {
  typedef uint16_t type;
  static PHYLA_INLINE bool negative(uint16_t x) { return uint16_t(x - 0x8001) < 0x7f80; }
  static constexpr uint16_t one = 0x3f80;
};
struct Float {
  typedef uint32_t type;
  static PHYLA_INLINE bool negative(uint32_t x) { return x - 0x80000001u < 0x7f800000u; }
  static constexpr uint32_t one = 0x3f800000u;
};
struct Double {
  typedef uint64_t type;
  static PHYLA_INLINE bool negative(uint64_t x) { return x - 0x8000000000000001u < 0x7ff0000000000000u; }
  static constexpr uint64_t one = 0x3ff0000000000000u;
};

template <class Real, int N>
PHYLA_INLINE uint64_t negatives(const typename Real::type* x) {
  uint8_t negative[N];
#pragma omp simd  // or GCC unrolls the short loop to scalar code
  for (int j = 0; j < N; ++j) negative[j] = Real::negative(x[j]) ? 255 : 0;
  return signs<N>(negative);
}

template <class Real>
void pack(const void* values, int64_t stride, int64_t rows, int64_t n, uint64_t* words) {
  for (int64_t r = 0; r < rows; ++r) {
    const typename Real::type* x = static_cast<const typename Real::type*>(values) + r * stride;
    int64_t j = 0;
    for (; j + 64 <= n; j += 64) *words++ = negatives<Real, 64>(x + j);
    if (j == n) continue;
    uint64_t bits = 0;
    int64_t place = 0;
    for (; j + 16 <= n; j += 16, place += 16) bits |= negatives<Real, 16>(x + j) << place;
    for (; j < n; ++j, ++place) bits |= uint64_t(Real::negative(x[j])) << place;
    *words++ = bits;
  }
}

template <class Real>
void unpack(const uint64_t* words, int64_t rows, int64_t n, void* values) {
  typedef typename Real::type type;
  type* x = static_cast<type*>(values);
  constexpr int top = 8 * sizeof(type) - 1;
  for (int64_t r = 0; r < rows; ++r) {
    int64_t left = n;
    for (; left >= kBlock; left -= kBlock, x += kBlock, ++words) {
      const uint32_t low = uint32_t(*words), high = uint32_t(*words >> 32);
      for (int j = 0; j < 32; ++j) x[j] = Real::one | type(low >> j) << top;
      for (int j = 0; j < 32; ++j) x[j + 32] = Real::one | type(high >> j) << top;
    }
    if (left == 0) continue;
    for (int64_t j = 0; j < left; ++j) x[j] = Real::one | type(*words >> j) << top;
    x += left, ++words;
  }
}

// Six rounds of exchanging off-diagonal blocks: "Hacker's Delight", section 7-3.
void transpose(uint64_t* bits) {
  uint64_t mask = 0x00000000ffffffffu;
  for (int j = 32; j > 0; j /= 2, mask ^= mask << j)
    for (int k = 0; k < 64; k += 2 * j)
      for (int i = k; i < k + j; ++i) {
        const uint64_t swap = (bits[i] >> j ^ bits[i + j]) & mask;
        bits[i] ^= swap << j, bits[i + j] ^= swap;
      }
}

constexpr Path path_of(const char* name) {
  return {name, kLanes, relay, relaid, stored, finish, {pack<Half>, pack<Bfloat16>, pack<Float>, pack<Double>},
          {unpack<Half>, unpack<Bfloat16>, unpack<Float>, unpack<Double>}, transpose};
}
