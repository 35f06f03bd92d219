// ---- Vectors of LANES floats, and the storage types ----

#define INLINE_METHOD inline __attribute__((always_inline))
#define INLINE static INLINE_METHOD

// Lanes of two vectors, those of the second counted on from those of the first.
#if defined(__clang__)
#define SHUFFLE(x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#else
#define SHUFFLE(x, y, ...) __builtin_shuffle(x, y, Ints{__VA_ARGS__})
#endif

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint16_t Shorts __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
typedef float FloatsInMemory __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t WordsInMemory __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t PairsInMemory __attribute__((vector_size(4 * LANES), aligned(2), may_alias));

INLINE Floats splat(float x) { return x - Floats{}; }  // not 0 + x, which would lose the sign of -0
INLINE Words splat(uint32_t x) { return x - Words{}; }
INLINE Floats larger(Floats x, Floats y) { return x > y ? x : y; }

INLINE Floats load(const float* p) { return *(const FloatsInMemory*)p; }
INLINE Words load(const uint32_t* p) { return *(const WordsInMemory*)p; }
INLINE void store(float* p, Floats x) { *(FloatsInMemory*)p = x; }
INLINE void store(uint32_t* p, Words x) { *(WordsInMemory*)p = x; }

// bfloat16 is the upper half of a float.
INLINE Words load_bits(const uint16_t* p) { return __builtin_convertvector(*(const Shorts*)p, Words); }
INLINE Floats load(const Bf16* p) { return (Floats)(load_bits(&p->bits) << 16); }

template <class Wide>
INLINE Wide widen(const Half* p) {
#if defined(__AVX512F__) && defined(INTRINSICS)
  if constexpr (sizeof(Wide) == 64) return (Wide)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#endif
#if defined(__F16C__) && defined(INTRINSICS)
  if constexpr (sizeof(Wide) == 32) return (Wide)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#endif
  // Exponents are biased by 15 instead of 127; the product with 2^112 also normalises subnormal numbers.
  const Words bits = load_bits(&p->bits), magnitude = (bits & 0x7fff) << 13, sign = (bits & 0x8000) << 16;
  const Words number = (Words)((Floats)magnitude * 0x1p112f);
  return (Wide)((magnitude >= 0x0f800000 ? magnitude | 0x7f800000 : number) | sign);
}
INLINE Floats load(const Half* p) { return widen<Floats>(p); }

// The first `count` elements, then zeros: nothing is read past the end of a row.
template <class Stored>
INLINE Floats load_part(const Stored* p, int count) {
  Stored whole[LANES] = {};
  std::memcpy(whole, p, count * sizeof(Stored));
  return load(whole);
}

INLINE uint32_t bits_of(float x) { return __builtin_bit_cast(uint32_t, x); }
INLINE float from_bits(uint32_t x) { return __builtin_bit_cast(float, x); }

INLINE float number(uint8_t x) { return x; }
INLINE float number(float x) { return x; }
INLINE float number(Bf16 x) { return from_bits((uint32_t)x.bits << 16); }
INLINE float number(Half x) {
  const uint32_t magnitude = (x.bits & 0x7fffu) << 13, sign = (x.bits & 0x8000u) << 16;
  const uint32_t scaled = bits_of(from_bits(magnitude) * 0x1p112f);
  return from_bits((magnitude >= 0x0f800000 ? magnitude | 0x7f800000 : scaled) | sign);
}

// Stores round to nearest, ties to even.
INLINE void put(float* p, float x) { *p = x; }
INLINE void put(Bf16* p, float x) {
  const uint32_t bits = bits_of(x);
  p->bits = x != x ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
INLINE void put(Half* p, float x) {
  const uint32_t sign = bits_of(x) & 0x80000000, bits = bits_of(x) ^ sign;
  uint32_t half;
  if (bits >= 143u << 23) half = bits > 0x7f800000 ? 0x7e00 : 0x7c00;  // 2^16 and above: infinite, or not a number
  else if (bits < 113u << 23) half = bits_of(from_bits(bits) + 0.5f) - bits_of(0.5f);  // subnormal: units of 2^-24
  else half = (bits - (112u << 23) + 0xfff + (bits >> 13 & 1)) >> 13;
  p->bits = half | sign >> 16;
}

INLINE Floats add_product(Floats sum, Floats x, Floats y) { return sum + x * y; }

// Pairs of bfloat16: sum + x_low · y_low + x_high · y_high.
INLINE Floats add_product(Floats sum, Words x, Words y) {
#if defined(__AVX512BF16__) && defined(INTRINSICS)
  return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)y);
#else
  sum += (Floats)(x << 16) * (Floats)(y << 16);
  return sum + (Floats)(x & 0xffff0000) * (Floats)(y & 0xffff0000);
#endif
}

// 2^f - 1 for |f| <= 1/2, error 4e-9 of 2^f before rounding.
INLINE Floats power_less_one(Floats f) {
  Floats p = splat(1.54614475e-4f);
  p = p * f + 1.33908674e-3f;
  p = p * f + 9.61805667e-3f;
  p = p * f + 5.55035710e-2f;
  p = p * f + 2.40226509e-1f;
  p = p * f + 6.93147188e-1f;
  return p * f;
}

struct Split {
  Floats power, fraction;  // x = log2(power) + fraction
};

// The sum with 1.5 · 2^23 has the nearest integer in its low bits; an exponent field of 0 (x near -127) makes 0.
INLINE Split split(Floats x) {
  const Floats shifted = x + 0x1.8p23f;
  return {(Floats)(((Ints)shifted + (127 - 0x4b400000)) << 23), x - (shifted - 0x1.8p23f)};
}

// 2^x for x <= 127; 0 from -127 down, so that a score of -inf has no weight. NaN stays NaN.
INLINE Floats power_of_two(Floats x) {
  const Split s = split(x < -127.f ? splat(-127.f) : x);
  return s.power + s.power * power_less_one(s.fraction);
}

// tanh(x) = (e^2x - 1) / (e^2x + 1). Without forming e^2x first the numerator is exact near 0.
INLINE Floats tanh_of(Floats x) {
  Floats y = x * (2 * LOG2E);
  y = y > 60.f ? splat(60.f) : y < -60.f ? splat(-60.f) : y;
  const Split s = split(y);
  const Floats less_one = s.power * power_less_one(s.fraction) + (s.power - 1.f);
  return less_one / (less_one + 2.f);
}

// ---- Vectors of operands: floats, or pairs of bfloat16 as they lie in memory ----

constexpr int UNIT = LANES * STEP;  // elements of a vector of operands
using Loaded = std::conditional_t<BF16_DOT, Words, Floats>;

// A vector of operands, as they lie in memory or widened to floats.
INLINE Loaded loaded(const Element* p) {
  if constexpr (BF16_DOT) return (Loaded)*(const PairsInMemory*)p;
  else return (Loaded)load(p);
}
INLINE Loaded loaded(const Element* p, int count) {  // of them the first elements, then zeros
  Element whole[UNIT] = {};
  std::memcpy(whole, p, count * sizeof(Element));
  return loaded(whole);
}

// LANES vectors, the rows of a square, become its columns: in step HALF rows i and i + HALF exchange lanes.
template <int HALF, class Vector, int... L>
INLINE void exchange(Vector& x, Vector& y, std::integer_sequence<int, L...>) {
  const Vector a = SHUFFLE(x, y, (L & HALF ? LANES + L - HALF : L)...);
  y = SHUFFLE(x, y, (L & HALF ? LANES + L : L + HALF)...);
  x = a;
}
template <int HALF = 1, class Vector>
INLINE void transpose(Vector* x) {
  if constexpr (HALF < LANES) {
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++)
      if (!(i & HALF)) exchange<HALF>(x[i], x[i + HALF], std::make_integer_sequence<int, LANES>{});
    transpose<2 * HALF>(x);
  }
}

// One step of a transposing sum: lane L gets x[L] + x[L + HALF] where bit HALF of L is clear, else y[L - HALF] + y[L].
template <int HALF, int... L>
INLINE Floats fold(Floats x, Floats y, std::integer_sequence<int, L...>) {
  return SHUFFLE(x, y, (L & HALF ? LANES + L : L)...) + SHUFFLE(x, y, (L & HALF ? LANES + L - HALF : L + HALF)...);
}

// Lane i of the result is the sum over the lanes of x[i].
template <int HALF = 1>
INLINE Floats sums_of(Floats* x) {
  if constexpr (HALF == LANES) return x[0];
  else {
#pragma GCC unroll 16
    for (int i = 0; i < LANES / HALF / 2; i++)
      x[i] = fold<HALF>(x[2 * i], x[2 * i + 1], std::make_integer_sequence<int, LANES>{});
    return sums_of<2 * HALF>(x);
  }
}
