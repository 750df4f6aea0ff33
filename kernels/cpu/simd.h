// The vectors of the CPU kernels: GCC's and Clang's vector extensions, with an intrinsic only where
// those have no word for an operation. Everything here is static and always inlined, in a namespace
// of its own for each instruction set: a function compiled for AVX-512 can never be picked by the
// linker for a caller without it.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define ANYFLASH_INLINE static inline __attribute__((always_inline))

namespace anyflash::cpu::ANYFLASH_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
constexpr int kLanes = kVectorBytes / 4;

#if defined(__AVX512BF16__)
constexpr bool kHasBf16Product = true;
#else
constexpr bool kHasBf16Product = false;
#endif

// A Word is what a vector holds per lane: a float or a pair of 16-bit numbers, the first in the low
// half.
using Word = uint32_t;
using Float = float __attribute__((vector_size(kVectorBytes)));
using Int = int32_t __attribute__((vector_size(kVectorBytes)));
using Words = Word __attribute__((vector_size(kVectorBytes)));
using Halves = uint16_t __attribute__((vector_size(kVectorBytes / 2)));

// The same where they lie in memory: any alignment, any type.
using FloatInMemory __attribute__((vector_size(kVectorBytes), aligned(1), may_alias)) = float;
using WordsInMemory __attribute__((vector_size(kVectorBytes), aligned(1), may_alias)) = Word;
using HalvesInMemory __attribute__((vector_size(kVectorBytes / 2), aligned(1), may_alias)) =
    uint16_t;
static_assert(alignof(FloatInMemory) == 1);  // Clang drops the alignment of some other spellings

struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};

// By the names of instances.def.
using fp32 = float;
using bf16 = Bf16;
using fp16 = Fp16;

constexpr float kInfinity = __builtin_inff();

ANYFLASH_INLINE Float broadcast(float x) { return Float{} + x; }
ANYFLASH_INLINE Int broadcast(int32_t x) { return Int{} + x; }
ANYFLASH_INLINE Words broadcast(Word x) { return Words{} + x; }

ANYFLASH_INLINE Words load_words(const void* p) { return *static_cast<const WordsInMemory*>(p); }
ANYFLASH_INLINE void store_words(void* p, Words x) { *static_cast<WordsInMemory*>(p) = x; }
ANYFLASH_INLINE Halves load_halves(const void* p) { return *static_cast<const HalvesInMemory*>(p); }

// kLanes 16-bit numbers, one per lane. GCC 12 has no single instruction for the conversion of a
// whole AVX-512 register.
ANYFLASH_INLINE Words load_widened(const void* p) {
#if defined(__AVX512F__)
  return (Words)_mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
#else
  return __builtin_convertvector(load_halves(p), Words);
#endif
}

// a * b + c, rounded once. A compiler may contract the written sum, but does not where the product
// has another use.
ANYFLASH_INLINE Float multiply_add(Float a, Float b, Float c) {
#if defined(__AVX512F__)
  return (Float)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (Float)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (Float)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#endif
}

ANYFLASH_INLINE Float select(Int condition, Float yes, Float no) { return condition ? yes : no; }

// `b` where either is NaN (x86): a running maximum goes first, so that a NaN is seen by who reads
// it next.
ANYFLASH_INLINE Float maximum(Float a, Float b) {
#if defined(__AVX512F__)
  return (Float)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Float)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__aarch64__)
  return (Float)vmaxq_f32((float32x4_t)a, (float32x4_t)b);
#endif
}

// Lanes of the first `count` bytes that are not 0.
ANYFLASH_INLINE Int nonzero_bytes(const uint8_t* p, int count) {
  using Bytes __attribute__((vector_size(kLanes))) = uint8_t;
  Bytes bytes{};
  memcpy(&bytes, p, static_cast<size_t>(count));
  return __builtin_convertvector(bytes, Int) != 0;
}

// ---- Storage types: kLanes numbers of fp32, bf16 or fp16.

ANYFLASH_INLINE Float load(const float* p) { return *reinterpret_cast<const FloatInMemory*>(p); }
ANYFLASH_INLINE void store(float* p, Float x) { *reinterpret_cast<FloatInMemory*>(p) = x; }

ANYFLASH_INLINE Float load(const Bf16* p) { return (Float)(load_widened(p) << 16); }

// To the nearest, ties to even, in the high half. A NaN made from a bf16 stays one.
ANYFLASH_INLINE Words rounded_to_bf16(Float x) {
  const Words bits = (Words)x;
  return bits + 0x7FFFu + ((bits >> 16) & 1u);
}

ANYFLASH_INLINE void store(Bf16* p, Float x) {
#if defined(__AVX512BF16__)
  *reinterpret_cast<HalvesInMemory*>(p) = (Halves)_mm512_cvtneps_pbh((__m512)x);
#else
  const Words finite = rounded_to_bf16(x) >> 16;
  const Words nan = broadcast(Word{0x7FC0});
  const Words result = (Words)(x == x) ? finite : nan;
  *reinterpret_cast<HalvesInMemory*>(p) = __builtin_convertvector(result, Halves);
#endif
}

ANYFLASH_INLINE Float load(const Fp16* p) {
#if defined(__AVX512F__)
  return (Float)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
  return (Float)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(__aarch64__)
  return (Float)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&p->bits)));
#endif
}

ANYFLASH_INLINE void store(Fp16* p, Float x) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__AVX2__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__aarch64__)
  vst1_u16(&p->bits, vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)x)));
#endif
}

// The first `count` of kLanes numbers; what lies behind them is neither read nor written.
template <class T>
ANYFLASH_INLINE Float load_some(const T* p, int count) {
  if (count >= kLanes) return load(p);
  alignas(64) T row[kLanes];
  memset(row, 0, sizeof(row));
  memcpy(row, p, static_cast<size_t>(count) * sizeof(T));
  return load(row);
}

template <class T>
ANYFLASH_INLINE void store_some(T* p, Float x, int count) {
  if (count >= kLanes) return store(p, x);
  alignas(64) T row[kLanes];
  store(row, x);
  memcpy(p, row, static_cast<size_t>(count) * sizeof(T));
}

// body(column, count) for every kLanes columns, and for the rest of them.
template <class Body>
ANYFLASH_INLINE void for_columns(int64_t begin, int64_t end, Body body) {
  int64_t column = begin;
  for (; column + kLanes <= end; column += kLanes) body(column, kLanes);
  if (column < end) body(column, static_cast<int>(end - column));
}

// ---- Pairs of bf16.

// (a, b) rounded to the nearest, ties away from zero: two additions, a shift and a blend.
ANYFLASH_INLINE Words bf16_pairs(Float a, Float b) {
  const Words low = ((Words)a + 0x8000u) >> 16, high = (Words)b + 0x8000u;
#if defined(__AVX512F__)
  return (Words)_mm512_mask_mov_epi16((__m512i)low, 0xAAAAAAAAu, (__m512i)high);
#else
  return low | (high & 0xFFFF0000u);
#endif
}

// (a[i], b[i]) as they are.
ANYFLASH_INLINE Words zipped(const Bf16* a, const Bf16* b) {
  return load_widened(a) | (load_widened(b) << 16);
}

#if defined(__AVX512BF16__)
struct WordsPair {
  Words first;
  Words second;
};

// The same of 2 * kLanes columns, in as many instructions as `zipped` takes for half of them.
ANYFLASH_INLINE WordsPair zipped_twice(const Bf16* a, const Bf16* b) {
  const __m512i x = (__m512i)load_words(a), y = (__m512i)load_words(b);
  Words index;
  for (int i = 0; i < kLanes; ++i) index[i] = static_cast<Word>(i | (i + 32) << 16);
  const Words next = index + 0x00100010u;  // columns 16 to 31
  return {(Words)_mm512_permutex2var_epi16(x, (__m512i)index, y),
          (Words)_mm512_permutex2var_epi16(x, (__m512i)next, y)};
}
#endif

// c + a.low * b.low + a.high * b.high
ANYFLASH_INLINE Float bf16_dot(Words a, Words b, Float c) {
#if defined(__AVX512BF16__)
  return (Float)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
#else
  c = multiply_add((Float)(a << 16), (Float)(b << 16), c);
  return multiply_add((Float)(a & 0xFFFF0000u), (Float)(b & 0xFFFF0000u), c);
#endif
}

// ---- Across lanes.

#if defined(__AVX512F__)
#define ANYFLASH_LOW_HALVES 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define ANYFLASH_HIGH_HALVES 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif defined(__AVX2__)
#define ANYFLASH_LOW_HALVES 0, 8, 1, 9, 2, 10, 3, 11
#define ANYFLASH_HIGH_HALVES 4, 12, 5, 13, 6, 14, 7, 15
#else
#define ANYFLASH_LOW_HALVES 0, 4, 1, 5
#define ANYFLASH_HIGH_HALVES 2, 6, 3, 7
#endif

ANYFLASH_INLINE Words interleave_low(Words a, Words b) {
  return __builtin_shufflevector(a, b, ANYFLASH_LOW_HALVES);
}
ANYFLASH_INLINE Words interleave_high(Words a, Words b) {
  return __builtin_shufflevector(a, b, ANYFLASH_HIGH_HALVES);
}

// rows[i] lane j <-> rows[j] lane i
ANYFLASH_INLINE void transpose_in_registers(Words (&rows)[kLanes]) {
  for (int step = 1; step < kLanes; step *= 2) {
    Words next[kLanes];
    for (int i = 0; i < kLanes / 2; ++i) {
      next[2 * i] = interleave_low(rows[i], rows[i + kLanes / 2]);
      next[2 * i + 1] = interleave_high(rows[i], rows[i + kLanes / 2]);
    }
    for (int i = 0; i < kLanes; ++i) rows[i] = next[i];
  }
}

// Lane i of the result: the sum of x[i] over its lanes.
ANYFLASH_INLINE Float sums(Float (&x)[kLanes]) {
  for (int half = kLanes / 2; half >= 1; half /= 2) {
    for (int i = 0; i < half; ++i) {
      const Words a = (Words)x[i], b = (Words)x[i + half];
      x[i] = (Float)interleave_low(a, b) + (Float)interleave_high(a, b);
    }
  }
  return x[0];
}

ANYFLASH_INLINE float sum(Float x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)x);
#else
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += x[i];
  return total;
#endif
}

ANYFLASH_INLINE float largest_lane(Float x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)x);
#else
  float largest = x[0];
  for (int i = 1; i < kLanes; ++i) largest = x[i] > largest ? x[i] : largest;
  return largest;
#endif
}

// ---- Functions.

// The largest integers that are not above x.
ANYFLASH_INLINE Float floor(Float x) {
#if defined(__AVX512F__)
  return (Float)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
  return (Float)_mm256_floor_ps((__m256)x);
#elif defined(__aarch64__)
  return (Float)vrndmq_f32((float32x4_t)x);
#endif
}

// 2^x for x < 128, relative error 7e-8 (kDegree 6), 1.5e-7 (5) or 3e-6 (4); below 2^-126 less than
// that, 0 for -inf, NaN for NaN.
//
// A polynomial in what x is above its floor: least maximal relative error of the rounded
// coefficients with the constant term held at 1, so that exp2(0) is 1 exactly and a block without a
// new maximum rescales by nothing.
template <int kDegree>
ANYFLASH_INLINE Float exp2(Float x) {
  static_assert(4 <= kDegree && kDegree <= 6);
#if defined(__AVX512F__)
  const Float f = (Float)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
#else
  x = maximum(broadcast(-127.0f), x);  // from where the exponent below makes 0 of 1
  const Float whole = floor(x);
  const Float f = x - whole;
#endif
  Float p;
  if (kDegree == 6) {
    p = multiply_add(broadcast(2.156586706e-04f), f, broadcast(1.248230925e-03f));
    p = multiply_add(p, f, broadcast(9.673774242e-03f));
    p = multiply_add(p, f, broadcast(5.548618361e-02f));
    p = multiply_add(p, f, broadcast(2.402290851e-01f));
    p = multiply_add(p, f, broadcast(6.931470633e-01f));
  } else if (kDegree == 5) {
    p = multiply_add(broadcast(1.866951585e-03f), f, broadcast(9.017481469e-03f));
    p = multiply_add(p, f, broadcast(5.579951406e-02f));
    p = multiply_add(p, f, broadcast(2.401645929e-01f));
    p = multiply_add(p, f, broadcast(6.931512952e-01f));
  } else {
    p = multiply_add(broadcast(1.342670340e-02f), f, broadcast(5.224243551e-02f));
    p = multiply_add(p, f, broadcast(2.412802279e-01f));
    p = multiply_add(p, f, broadcast(6.930448413e-01f));
  }
  p = multiply_add(p, f, broadcast(1.0f));
#if defined(__AVX512F__)
  return (Float)_mm512_scalef_ps((__m512)p, (__m512)x);  // takes the floor itself
#else
  return (Float)((Int)p + (__builtin_convertvector(whole, Int)
                           << 23));  // of a NaN: nothing but its sign's bit
#endif
}

// log2(x) for normal x > 0, error 1e-7 of the result or of 1; NaN for NaN.
ANYFLASH_INLINE Float log2(Float x) {
  // x = 2^exponent * mantissa, mantissa in [sqrt(1/2), sqrt(2))
  const Int bits = (Int)x;
  const Int exponent = (bits - 0x3F3504F3) >> 23;
  const Float mantissa = (Float)(bits - (exponent << 23));
  // log(m) = 2 atanh(t) with t = (m - 1) / (m + 1), |t| < 0.172
  const Float t = (mantissa - 1.0f) / (mantissa + 1.0f), t2 = t * t;
  Float series = multiply_add(broadcast(2.0f / 9), t2, broadcast(2.0f / 7));
  series = multiply_add(series, t2, broadcast(2.0f / 5));
  series = multiply_add(series, t2, broadcast(2.0f / 3));
  series = multiply_add(series, t2, broadcast(2.0f));
  const Float whole = __builtin_convertvector(exponent, Float);
  return multiply_add(series * t, broadcast(1.44269504f), whole) + (x - x);
}

// tanh(x), relative error 3e-7.
ANYFLASH_INLINE Float tanh(Float x) {
  const Float size = maximum(x, -x);
  const Float e = exp2<6>(size * broadcast(-2.88539008f));
  const Float far = (1.0f - e) / (1.0f + e);
  const Float x2 = x * x;  // near 0 the difference above cancels: Taylor's series instead
  Float series = multiply_add(broadcast(62.0f / 2835), x2, broadcast(-17.0f / 315));
  series = multiply_add(series, x2, broadcast(2.0f / 15));
  series = multiply_add(series, x2, broadcast(-1.0f / 3));
  const Float near = multiply_add(series * x2, x, x);
  return select(size < broadcast(0.25f), near, select(x < Float{}, -far, far));
}

}  // namespace anyflash::cpu::ANYFLASH_ISA
