// The inner loops, written once with the vector extensions of GCC and Clang.
//
// Compiled once per instruction set: BANKWISE_ISA names the copy, the machine flags set the vector width (16 bytes
// without flags, which is SSE2 on x86 and NEON on ARM).
//
// Lane order: a 16-bit or 8-bit weight becomes float32 by a shift inside its 32-bit lane, so a block of weights yields
// its 1st, 3rd, ... and then its 2nd, 4th, ... elements (bfloat16), or every 4th (int8). Inputs and accumulators are
// kept in that order, and no weight is shuffled, except where int8 weights are multiplied as bytes (see `dot_bytes`).
#include "kernels.h"

#include <math.h>
#include <string.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define CONCAT_(a, b) a##b
#define CONCAT(a, b) CONCAT_(a, b)

namespace bankwise {
namespace {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX2__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
constexpr int kLanes = kBytes / 4;
constexpr int kPad = 64;

typedef float Floats __attribute__((vector_size(kBytes)));
typedef int32_t Ints __attribute__((vector_size(kBytes)));
typedef uint32_t Words __attribute__((vector_size(kBytes)));

typedef uint16_t Halves __attribute__((vector_size(kBytes / 2)));

#define INLINE inline __attribute__((always_inline))

template <class V>
INLINE V load(const void* p) {
  V v;
  memcpy(&v, p, sizeof(V));
  return v;
}

template <class V>
INLINE void store(void* p, V v) {
  memcpy(p, &v, sizeof(V));
}

INLINE Floats splat(float x) { return Floats{} + x; }
INLINE Floats as_floats(Words w) { return (Floats)w; }
INLINE Floats select(Ints take, Floats a, Floats b) { return (Floats)((take & (Ints)a) | (~take & (Ints)b)); }

template <int... I>
struct Indices {};
template <int N, int... I>
struct MakeIndices : MakeIndices<N - 1, N - 1, I...> {};
template <int... I>
struct MakeIndices<0, I...> {
  using type = Indices<I...>;
};

template <int N>
struct Number {
  static constexpr int value = N;
};

// body(Number<n>, t) for tokens t..t+n-1, at most four at a time.
template <class Body>
INLINE void for_tokens(int tokens, const Body& body) {
  int t = 0;
  for (; t + 4 <= tokens; t += 4) body(Number<4>(), t);
  switch (tokens - t) {
    case 3: return body(Number<3>(), t);
    case 2: return body(Number<2>(), t);
    case 1: return body(Number<1>(), t);
    default: return;
  }
}

// Adds neighbouring groups of G lanes of a, then of b; even groups of the result come from a, odd ones from b.
template <int G, int... I>
INLINE Floats pair_sum(Floats a, Floats b, Indices<I...>) {
  Floats first = __builtin_shufflevector(a, b, ((I / G) % 2 == 0 ? I : I - G + kLanes)...);
  Floats second = __builtin_shufflevector(a, b, ((I / G) % 2 == 0 ? I + G : I + kLanes)...);
  return first + second;
}

// rows[i] summed over its lanes, in lane i.
template <int G = 1>
INLINE Floats sum_rows(Floats* rows) {
  if constexpr (G == kLanes) {
    return rows[0];
  } else {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes / (2 * G); ++i) {
      rows[i] = pair_sum<G>(rows[2 * i], rows[2 * i + 1], typename MakeIndices<kLanes>::type());
    }
    return sum_rows<2 * G>(rows);
  }
}

INLINE float sum(Floats v) {
  float lanes[kLanes];
  store(lanes, v);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}

INLINE float from_bf16(uint16_t half) {
  uint32_t word = (uint32_t)half << 16;
  float value;
  memcpy(&value, &word, 4);
  return value;
}

INLINE uint16_t to_bf16(float value) {
  uint32_t word;
  memcpy(&word, &value, 4);
  if (value != value) return 0x7fc0;
  return (uint16_t)((word + 0x7fff + ((word >> 16) & 1)) >> 16);
}

INLINE float element(Vector vector, int64_t i) {
  return vector.type == kFloat32 ? ((const float*)vector.data)[i] : from_bf16(((const uint16_t*)vector.data)[i]);
}

// kLanes elements from `start` on, in plain order; the last `count` < kLanes of a vector are padded with zeros.
INLINE Floats elements(Vector vector, int64_t start, int count) {
  float lanes[kLanes] = {};
  if (vector.type == kFloat32) {
    if (count == kLanes) return load<Floats>((const float*)vector.data + start);
    memcpy(lanes, (const float*)vector.data + start, count * sizeof(float));
  } else {
    const uint16_t* halves = (const uint16_t*)vector.data + start;
    if (count == kLanes) return (Floats)(__builtin_convertvector(load<Halves>(halves), Words) << 16);
    uint32_t words[kLanes] = {};
    for (int i = 0; i < count; ++i) words[i] = (uint32_t)halves[i] << 16;
    memcpy(lanes, words, sizeof(lanes));
  }
  return load<Floats>(lanes);
}

// The three weight types: a block is one vector of weights, which unpacks into `kParts` vectors of float32.
struct F32 {
  using Element = float;
  static constexpr Type kType = kFloat32;
  static constexpr int kParts = 1;
  static INLINE void unpack(Words w, Floats* out) { out[0] = as_floats(w); }
};
struct BF16 {
  using Element = uint16_t;
  static constexpr Type kType = kBFloat16;
  static constexpr int kParts = 2;
  static INLINE void unpack(Words w, Floats* out) {
    out[0] = as_floats(w << 16);
    out[1] = as_floats(w & 0xffff0000u);
  }
};
struct I8 {
  using Element = int8_t;
  static constexpr Type kType = kInt8;
  static constexpr int kParts = 4;
  static INLINE void unpack(Words w, Floats* out) {
    out[0] = __builtin_convertvector((Ints)(w << 24) >> 24, Floats);
    out[1] = __builtin_convertvector((Ints)(w << 16) >> 24, Floats);
    out[2] = __builtin_convertvector((Ints)(w << 8) >> 24, Floats);
    out[3] = __builtin_convertvector((Ints)w >> 24, Floats);
  }
};

// Where element i of a block of `parts` vectors lies in lane order.
INLINE int64_t lane_of(int64_t i, int parts) {
  int64_t block = i / (parts * kLanes), within = i % (parts * kLanes);
  return block * parts * kLanes + (within % parts) * kLanes + within / parts;
}

#if defined(__AVX512VNNI__)
bool load_digits(const void* x, Type type, Input* input);
#endif

void load_input(const void* x, Type type, Type weights, Input* input) {
#if defined(__AVX512VNNI__)
  if (weights == kInt8 && load_digits(x, type, input)) return;
#endif
  const int parts = weights == kFloat32 ? 1 : weights == kBFloat16 ? 2 : 4;
  Vector values{x, type};
  for (int64_t t = 0; t < input->tokens; ++t) {
    float* lanes = input->lanes + t * input->padded;
    int64_t i = 0;
    if (type == kBFloat16 && parts == 2) {
      const uint16_t* halves = (const uint16_t*)x + t * input->columns;
      for (; i + 2 * kLanes <= input->columns; i += 2 * kLanes) {
        Floats both[2];
        BF16::unpack(load<Words>(halves + i), both);
        store(lanes + i, both[0]);
        store(lanes + i + kLanes, both[1]);
      }
    }
    memset(lanes + i, 0, (input->padded - i) * sizeof(float));
    for (; i < input->columns; ++i) lanes[lane_of(i, parts)] = element(values, t * input->columns + i);
  }
}

// The first `count` elements of a block; the rest are zeros.
template <class W>
INLINE Words load_part(const typename W::Element* p, int64_t count) {
  typename W::Element block[kLanes * W::kParts] = {};
  memcpy(block, p, count * sizeof(typename W::Element));
  return load<Words>(block);
}

#if defined(__AVX512BF16__)
INLINE Floats dot_halves(Floats acc, Words w, const uint16_t* x) {
  return (Floats)_mm512_dpbf16_ps((__m512)acc, (__m512bh)w, (__m512bh)load<Words>(x));
}
#endif

// Dot products of one row of weights with n tokens (their indices in `which`). `ahead` is prefetched line by line.
template <class W, int n, bool use_halves>
INLINE void dot_row(const typename W::Element* w, const Input& input, const int* which, int64_t columns, float* out,
                    const char* ahead) {
  constexpr int kBlock = kLanes * W::kParts;
  constexpr int kChains = n == 1 ? 4 : n == 2 ? 2 : 1;
  Floats acc[n][W::kParts * kChains] = {};
  int64_t i = 0;
  auto step = [&](Words words, int64_t at, int chain) __attribute__((always_inline)) {
#if defined(__AVX512BF16__)
    if constexpr (use_halves) {
      for (int t = 0; t < n; ++t) {
        acc[t][chain] = dot_halves(acc[t][chain], words, input.halves + which[t] * input.padded + at);
      }
      return;
    }
#endif
    Floats parts[W::kParts];
    W::unpack(words, parts);
    for (int t = 0; t < n; ++t) {
      const float* x = input.lanes + which[t] * input.padded + at;
      for (int p = 0; p < W::kParts; ++p) acc[t][chain * W::kParts + p] += parts[p] * load<Floats>(x + p * kLanes);
    }
  };
  for (; i + kChains * kBlock <= columns; i += kChains * kBlock) {
    for (int chain = 0; chain < kChains; ++chain) {
      const int64_t at = i + chain * kBlock;
      if (ahead != nullptr && (chain * kBytes) % 64 == 0) __builtin_prefetch(ahead + at * sizeof(*w));
      step(load<Words>(w + at), at, chain);
    }
  }
  for (; i + kBlock <= columns; i += kBlock) step(load<Words>(w + i), i, 0);
  if (i < columns) step(load_part<W>(w + i, columns - i), i, 0);
  for (int t = 0; t < n; ++t) {
    Floats total = acc[t][0];
    for (int c = 1; c < W::kParts * kChains; ++c) total += acc[t][c];
    out[t] = sum(total);
  }
}

#if defined(__AVX512VNNI__)
// int8 weights times inputs in fixed point: products of bytes, four of them added to each 32-bit lane at once. The
// instruction takes one operand as unsigned, which is the weight plus 128; `Input::starts` takes 128 * x off again, and
// as integers wrap around, the sums are exact. Only the step of the fixed point and the final sums are rounded.
typedef int8_t Digits __attribute__((vector_size(kLanes)));

INLINE Words unsigned_bytes(Words w) { return w ^ 0x80808080u; }

INLINE Ints dot_bytes(Ints acc, Words unsigned_weights, Words digits) {
  return (Ints)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)unsigned_weights, (__m512i)digits);
}

// The largest magnitude becomes 127 in the first of the digits.
INLINE float largest_fixed(int digits) { return digits == 2 ? 127.0f * 256 : 127.0f * 256 * 256; }

// Lane i of x / step, rounded, as signed bytes: x = step * sum of out[d] * 256^(digits - 1 - d).
template <int digits>
INLINE void split_digits(Floats x, float per_step, Digits* out) {
  // The plain conversion would truncate; its form without a mask makes GCC 12 warn of its own header.
  const Words rounded = (Words)_mm512_maskz_cvtps_epi32(0xffff, (__m512)(x * per_step));
  // Adding 128 to every digit makes the signed digits the plain bytes of an unsigned number.
  const Words biased = rounded + (digits == 2 ? 0x8080u : 0x808080u);
  for (int d = 0; d < digits; ++d) {
    out[d] = __builtin_convertvector((biased >> (8 * (digits - 1 - d))) ^ 0x80u, Digits);
  }
}

// 1 / step for a largest magnitude, and whether fixed point can hold it: not infinity, NaN or what is next to 0.
template <int digits>
INLINE bool fixed_point(float largest, float* per_step) {
  *per_step = largest == 0.0f ? 0.0f : largest_fixed(digits) / largest;
  return largest - largest == 0.0f && *per_step < INFINITY;
}

// The largest magnitude of all lanes; NaN if there is one, or an infinity.
INLINE float largest_of(Floats magnitudes, Floats not_finite) {
  float largest = 0.0f;
  for (int lane = 0; lane < kLanes; ++lane) largest = magnitudes[lane] > largest ? magnitudes[lane] : largest;
  return largest + sum(not_finite);
}

INLINE Floats magnitude(Floats v) { return (Floats)((Ints)v & 0x7fffffff); }

template <int digits>
INLINE void store_digits(const Vector& x, Input* input) {
  const int64_t columns = input->columns, padded = input->padded;
  for (int64_t t = 0; t < input->tokens; ++t) {
    float per_step;
    fixed_point<digits>(input->steps[t], &per_step);
    input->steps[t] /= largest_fixed(digits);
    int8_t* bytes = input->bytes + t * digits * padded;
    for (int64_t i = 0; i < padded; i += kLanes) {
      const int64_t left = columns - i < kLanes ? columns - i : kLanes;
      Digits split[digits];
      split_digits<digits>(left > 0 ? elements(x, t * columns + i, (int)left) : Floats{}, per_step, split);
      for (int d = 0; d < digits; ++d) store(bytes + d * padded + i, split[d]);
    }
    for (int d = 0; d < digits; ++d) {
      Ints total = {};
      for (int64_t i = 0; i < padded; i += kBytes) {
        total = dot_bytes(total, Words{} + 0x80808080u, load<Words>(bytes + d * padded + i));
      }
      store(input->starts + (t * digits + d) * kLanes, -total);
    }
  }
  input->digits = digits;
}

// False where that cannot hold the input. Two digits (16 bits) are off by 1.6e-5 of a row's largest element at most,
// which is less than the rounding of bfloat16 unless that element stands out; then, and for float32, there are three.
bool load_digits(const void* x, Type type, Input* input) {
  const Vector values{x, type};
  const int64_t columns = input->columns;
  // A lane of a sum holds padded / 16 products of at most 128 * 128.
  if (input->padded > (1 << 20)) return false;
  bool wide = type == kFloat32;
  for (int64_t t = 0; t < input->tokens; ++t) {
    Floats largest = {}, total = {}, not_finite = {};
    for (int64_t i = 0; i < columns; i += kLanes) {
      const Floats v = elements(values, t * columns + i, (int)(columns - i < kLanes ? columns - i : kLanes));
      largest = select(magnitude(v) > largest, magnitude(v), largest);
      total += magnitude(v);
      not_finite += v - v;
    }
    const float top = largest_of(largest, not_finite);
    float per_step;
    if (!fixed_point<3>(top, &per_step)) return false;
    input->steps[t] = top;
    wide |= top * (float)columns > 32.0f * sum(total);
  }
  if (wide) {
    store_digits<3>(values, input);
  } else {
    store_digits<2>(values, input);
  }
  return true;
}

// `rows` rows of weights times n tokens; the sums over the lanes of out[row][token] are the dot products. `ahead` is
// told every line that is reached.
template <int digits, int rows, int n, class Ahead>
INLINE void dot_digits(const int8_t* const* w, const Input& input, const int* which, int64_t columns, Floats (*out)[n],
                       const Ahead& ahead) {
  constexpr int kChains = rows * n == 1 ? 4 : 1;
  Ints acc[rows][n][digits][kChains] = {};
  for (int r = 0; r < rows; ++r) {
    for (int t = 0; t < n; ++t) {
      for (int d = 0; d < digits; ++d) acc[r][t][d][0] = load<Ints>(input.starts + (which[t] * digits + d) * kLanes);
    }
  }
  auto step = [&](int64_t i, const Words* words, int chain) __attribute__((always_inline)) {
    for (int t = 0; t < n; ++t) {
      for (int d = 0; d < digits; ++d) {
        const Words x = load<Words>(input.bytes + (which[t] * digits + d) * input.padded + i);
        for (int r = 0; r < rows; ++r) {
          acc[r][t][d][chain] = dot_bytes(acc[r][t][d][chain], unsigned_bytes(words[r]), x);
        }
      }
    }
  };
  auto whole = [&](int64_t i, int chain) __attribute__((always_inline)) {
    ahead(i);
    Words words[rows];
    for (int r = 0; r < rows; ++r) words[r] = load<Words>(w[r] + i);
    step(i, words, chain);
  };
  int64_t i = 0;
  for (; i + kChains * kBytes <= columns; i += kChains * kBytes) {
    for (int chain = 0; chain < kChains; ++chain) whole(i + chain * kBytes, chain);
  }
  for (; i + kBytes <= columns; i += kBytes) whole(i, 0);
  if (i < columns) {  // past the end the digits are zeros, so the weights may be anything
    Words words[rows];
    for (int r = 0; r < rows; ++r) words[r] = load_part<I8>(w[r] + i, columns - i);
    step(i, words, 0);
  }
  for (int r = 0; r < rows; ++r) {
    for (int t = 0; t < n; ++t) {
      Floats total = {};
      for (int d = 0; d < digits; ++d) {
        Ints sums = acc[r][t][d][0];
        for (int chain = 1; chain < kChains; ++chain) sums += acc[r][t][d][chain];
        total = total * 256.0f + __builtin_convertvector(sums, Floats);
      }
      out[r][t] = total * input.steps[which[t]];
    }
  }
}
#endif

// What is left to do for one row of `linear`: `out` holds its dot products with all tokens.
INLINE void finish_row(const Linear& problem, int64_t row, const float* out) {
  const float bias = problem.bias.data == nullptr ? 0.0f : element(problem.bias, row);
  const float scale = problem.weight.type == kInt8 ? problem.weight.scales[row] : 1.0f;
  for (int64_t t = 0; t < problem.input.tokens; ++t) {
    const int64_t at = t * problem.weight.rows + row;
    float value = out[t] * scale + bias;
    if (problem.residual.data != nullptr) value += element(problem.residual, at);
    if (problem.output_type == kFloat32) {
      ((float*)problem.output)[at] = value;
    } else {
      ((uint16_t*)problem.output)[at] = to_bf16(value);
    }
  }
}

#if defined(__AVX512VNNI__)
template <int digits>
void linear_digits(const Linear& problem, int64_t begin, int64_t end) {
  const Matrix& weight = problem.weight;
  const int which[kMaxTokens] = {0, 1, 2, 3, 4, 5, 6, 7};
  float out[kMaxTokens];
  for (int64_t row = begin; row < end; ++row) {
    const int8_t* w = (const int8_t*)weight.data + row * weight.stride;
    const int64_t later = row + 3 < end ? 2 * weight.stride : 0;  // as in `linear_rows`
    auto ahead = [&](int64_t i) __attribute__((always_inline)) { __builtin_prefetch(w + later + i); };
    for_tokens((int)problem.input.tokens, [&](auto number, int t) __attribute__((always_inline)) {
      constexpr int n = decltype(number)::value;
      Floats lanes[1][n];
      dot_digits<digits, 1, n>(&w, problem.input, which + t, weight.columns, lanes, ahead);
      for (int k = 0; k < n; ++k) out[t + k] = sum(lanes[0][k]);
    });
    finish_row(problem, row, out);
  }
}
#endif

template <class W, bool use_halves>
void linear_rows(const Linear& problem, int64_t begin, int64_t end) {
  using Element = typename W::Element;
  const Matrix& weight = problem.weight;
  const int tokens = (int)problem.input.tokens;
  const int which[kMaxTokens] = {0, 1, 2, 3, 4, 5, 6, 7};
  float out[kMaxTokens];
  for (int64_t row = begin; row < end; ++row) {
    const Element* w = (const Element*)weight.data + row * weight.stride;
    // Three rows ahead: the hardware prefetcher follows the stream, but not across pages at its start.
    const char* ahead = row + 3 < end ? (const char*)(w + 2 * weight.stride) : nullptr;
    for_tokens(tokens, [&](auto count, int t) __attribute__((always_inline)) {
      dot_row<W, decltype(count)::value, use_halves>(w, problem.input, which + t, weight.columns, out + t, ahead);
    });
    finish_row(problem, row, out);
  }
}

void linear(const Linear& problem, int64_t begin, int64_t end) {
  switch (problem.weight.type) {
    case kFloat32: return linear_rows<F32, false>(problem, begin, end);
    case kInt8:
#if defined(__AVX512VNNI__)
      if (problem.input.digits == 2) return linear_digits<2>(problem, begin, end);
      if (problem.input.digits == 3) return linear_digits<3>(problem, begin, end);
#endif
      return linear_rows<I8, false>(problem, begin, end);
    case kBFloat16:
#if defined(__AVX512BF16__)
      if (problem.input.halves != nullptr) return linear_rows<BF16, true>(problem, begin, end);
#endif
      return linear_rows<BF16, false>(problem, begin, end);
  }
}

// e^(x - whole * ln 2), for a whole number that leaves at most half of ln 2.
INLINE Floats exp_rest(Floats x, Floats whole) {
  // ln 2 in two pieces (Cody and Waite), then the polynomial of Cephes' expf.
  const Floats r = (x - whole * 0.693359375f) - whole * -2.12194440e-4f;
  Floats p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return p * r * r + r + 1.0f;
}

// e^x, at most 2 units in the last place off; arguments below -87 give 0 and above 88 infinity, NaN stays.
INLINE Floats exp_of(Floats x) {
  const Floats clamped = select(x < -88.0f, splat(-88.0f), select(x > 89.0f, splat(89.0f), x));
  const Floats scaled = clamped * 1.44269504088896341f;
  const Floats whole = __builtin_convertvector(
      __builtin_convertvector(scaled + select(scaled < 0.0f, splat(-0.5f), splat(0.5f)), Ints), Floats);
  const Floats p = exp_rest(clamped, whole);
  // 2^whole in two factors, so that neither end of the range overflows the exponent field.
  const Ints exponent = __builtin_convertvector(whole, Ints);
  const Ints half = exponent >> 1;
  const Floats value = p * (Floats)((half + 127) << 23) * (Floats)((exponent - half + 127) << 23);
  const Floats ended = select(x < -87.33655f, splat(0.0f), select(x > 88.72284f, splat(INFINITY), value));
  return select(x != x, x, ended);
}

// e^x for x <= 0, as good as exp_of; below the smallest normal number it is 0.
INLINE Floats exp_of_negative(Floats x) {
  const Floats clamped = select(x < -88.0f, splat(-88.0f), x);
  const Floats whole = __builtin_convertvector(
      __builtin_convertvector(clamped * 1.44269504088896341f - 0.5f, Ints), Floats);
  const Floats value = exp_rest(clamped, whole) * (Floats)((__builtin_convertvector(whole, Ints) + 127) << 23);
  return select(x < -87.33655f, splat(0.0f), value);
}

// Mantissa in [sqrt(1/2), sqrt(2)) and binary exponent of a positive float; denormals are scaled first.
INLINE Floats split(Floats x, Floats* exponent) {
  const Ints tiny = x < 1.17549435e-38f;
  x = select(tiny, x * 16777216.0f, x);
  const Ints bits = (Ints)x - 0x3f3504f3;
  *exponent = __builtin_convertvector(bits >> 23, Floats) - select(tiny, splat(24.0f), splat(0.0f));
  return (Floats)((bits & 0x007fffff) + 0x3f3504f3);
}

// ln of the mantissa: Cephes' logf.
INLINE Floats log_mantissa(Floats m) {
  const Floats r = m - 1.0f;
  Floats p = splat(7.0376836292e-2f);
  p = p * r - 1.1514610310e-1f;
  p = p * r + 1.1676998740e-1f;
  p = p * r - 1.2420140846e-1f;
  p = p * r + 1.4249322787e-1f;
  p = p * r - 1.6668057665e-1f;
  p = p * r + 2.0000714765e-1f;
  p = p * r - 2.4999993993e-1f;
  p = p * r + 3.3333331174e-1f;
  return p * r * r * r - 0.5f * r * r + r;
}

INLINE Floats log_of(Floats x) {
  Floats exponent;
  const Floats m = split(x, &exponent);
  const Floats value = log_mantissa(m) + exponent * 0.693147180559945f;
  const Floats ended = select(x == INFINITY, x, select(x == 0.0f, splat(-INFINITY), value));
  return select(x != x, x, ended);
}

// ffn/predictor.py: log(g^2 + var_g) + 2 logsigmoid(g) + log(u^2 + var_u). One logarithm of the product of the three
// mantissas; the exponents are added apart, so that no product leaves the range.
INLINE Floats expected_energy(Floats gate, Floats up, Floats gate_noise, Floats up_noise) {
  const Floats closed = select(gate < 0.0f, gate, splat(0.0f));
  const Floats open = 1.0f + exp_of(select(gate < 0.0f, gate, -gate));
  const Floats gate_square = gate * gate + gate_noise, up_square = up * up + up_noise;
  Floats gate_exponent, up_exponent, exponent;
  const Floats product = split(gate_square, &gate_exponent) * split(up_square, &up_exponent) / (open * open);
  const Floats mantissa = split(product, &exponent);
  exponent += gate_exponent + up_exponent;
  const Floats value = log_mantissa(mantissa) + exponent * 0.693147180559945f + 2.0f * closed;
  const Floats ended = select((gate_square == 0.0f) | (up_square == 0.0f), splat(-INFINITY), value);
  return ended + ((gate_square - gate_square) + (up_square - up_square));  // NaN where a square is not finite
}

// `rows` <= kLanes rows times the code of one token, from column `first` on; the sum of row i is in lane i.
template <class W>
__attribute__((noinline)) Floats dot_some_rows(const typename W::Element* w, int64_t stride, int rows, const float* code,
                                               int64_t first, int64_t columns) {
  constexpr int kBlock = kLanes * W::kParts;
  Floats acc[kLanes] = {};
  for (int64_t i = first; i < columns; i += kBlock) {
    const int64_t count = columns - i < kBlock ? columns - i : kBlock;
    for (int row = 0; row < rows; ++row) {
      Floats parts[W::kParts];
      W::unpack(load_part<W>(w + row * stride + i, count), parts);
      for (int p = 0; p < W::kParts; ++p) acc[row] += parts[p] * load<Floats>(code + i + p * kLanes);
    }
  }
  return sum_rows(acc);
}

template <class W>
INLINE Floats dot_rows(const typename W::Element* w, int64_t stride, int rows, const float* code, int64_t columns) {
  constexpr int kBlock = kLanes * W::kParts;
  if (rows < kLanes) return dot_some_rows<W>(w, stride, rows, code, 0, columns);
  Floats acc[kLanes];  // unrolled, so that it stays in registers
#pragma GCC unroll 16
  for (int row = 0; row < kLanes; ++row) acc[row] = Floats{};
  int64_t i = 0;
  for (; i + kBlock <= columns; i += kBlock) {
    Floats c[W::kParts];
    for (int p = 0; p < W::kParts; ++p) c[p] = load<Floats>(code + i + p * kLanes);
#pragma GCC unroll 16
    for (int row = 0; row < kLanes; ++row) {
      // The same place of the rows that come next; past the last row nothing is read.
      __builtin_prefetch(w + (row + kLanes) * stride + i);
      Floats parts[W::kParts];
      W::unpack(load<Words>(w + row * stride + i), parts);
      for (int p = 0; p < W::kParts; ++p) acc[row] += parts[p] * c[p];
    }
  }
  const Floats total = sum_rows(acc);
  return i < columns ? total + dot_some_rows<W>(w, stride, rows, code, i, columns) : total;
}

// One bit per channel of a bank.
struct Kept {
  uint64_t words[kMaxBank / 64];
};

INLINE int count_bits(uint64_t word) { return __builtin_popcountll(word); }

// Bit i: lane i of v is at least `bound`.
INLINE uint64_t lanes_from(Floats v, float bound) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)v, _mm512_set1_ps(bound), _CMP_GE_OQ);
#elif defined(__AVX2__)
  return (uint32_t)_mm256_movemask_ps(_mm256_cmp_ps((__m256)v, _mm256_set1_ps(bound), _CMP_GE_OQ));
#else
  const Ints reached = v >= bound;
  uint64_t bits = 0;
  for (int lane = 0; lane < kLanes; ++lane) bits |= (uint64_t)(reached[lane] & 1) << lane;
  return bits;
#endif
}

// The reverse: all ones in lane i where bit i is set.
INLINE Ints lanes_of(uint64_t bits) {
#if defined(__AVX512F__)
  return (Ints)_mm512_movm_epi32((__mmask16)bits);
#else
  Ints taken = {};
  for (int lane = 0; lane < kLanes; ++lane) taken[lane] = -(int32_t)((bits >> lane) & 1);
  return taken;
#endif
}

// bytes[i] = bit i, for the first `count` <= 64 bits.
INLINE void store_bytes(uint8_t* bytes, uint64_t bits, int64_t count) {
#if defined(__AVX512BW__)
  if (count == 64) return _mm512_storeu_si512(bytes, _mm512_maskz_set1_epi8(bits, 1));
#endif
  for (int64_t i = 0; i < count; ++i) bytes[i] = (uint8_t)((bits >> i) & 1);
}

// The channels whose logit is at least `bound`, and how many they are. z is padded to whole vectors with -infinity.
INLINE int64_t keep_from(const float* z, int64_t size, float bound, Kept* kept) {
  int64_t count = 0;
  for (int64_t word = 0; word * 64 < size; ++word) {
    uint64_t bits = 0;
    if (size - word * 64 >= 64) {
      for (int i = 0; i < 64; i += kLanes) bits |= lanes_from(load<Floats>(z + word * 64 + i), bound) << i;
    } else {
      for (int i = 0; word * 64 + i < size; i += kLanes) {
        bits |= lanes_from(load<Floats>(z + word * 64 + i), bound) << i;
      }
    }
    kept->words[word] = bits;
    count += count_bits(bits);
  }
  return count;
}

// Integers in the order of the floats; both zeros have one key, as they are equal.
INLINE int32_t key_of(float value) {
  int32_t bits;
  value += 0.0f;
  memcpy(&bits, &value, 4);
  return bits < 0 ? bits ^ 0x7fffffff : bits;
}

INLINE float value_of(int32_t key) {
  const int32_t bits = key < 0 ? key ^ 0x7fffffff : key;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

// Marks the `active` largest of z[0..size), the lower index among equals. Returns how many are not finite (nothing is
// marked then). z must be padded to whole vectors with -infinity.
INLINE int64_t select_bank_of(const float* z, int64_t size, int64_t active, Kept* kept) {
  Floats high = splat(-INFINITY), low = splat(INFINITY);
  Ints finite = {};
  for (int64_t i = 0; i < size; i += kLanes) {
    const Floats values = load<Floats>(z + i);
    finite -= (values - values) == 0.0f;
    high = select(values > high, values, high);
    low = select((values < low) & (values != -INFINITY), values, low);  // the padding is no logit
  }
  float lowest = INFINITY, highest = -INFINITY;
  int64_t num_finite = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    lowest = low[lane] < lowest ? low[lane] : lowest;
    highest = high[lane] > highest ? high[lane] : highest;
    num_finite += finite[lane];
  }
  if (num_finite != size) return size - num_finite;
  if (active == size) {
    keep_from(z, size, -3.4028235e38f, kept);
    return 0;
  }
  // A bound that exactly `active` logits reach. `above` is reached by too many, `below` by too few: false position,
  // which takes four steps on normal logits where bisection takes twelve.
  float above = lowest, below = highest;
  int64_t count_above = size, count_below = 0;
  for (int step = 0; step < 12; ++step) {
    const float share = ((float)(count_above - active) + 0.5f) / (float)(count_above - count_below + 1);
    const float bound = above + (below - above) * share;
    if (!(bound > above && bound < below)) break;
    const int64_t count = keep_from(z, size, bound, kept);
    if (count == active) return 0;
    if (count > active) {
      above = bound;
      count_above = count;
    } else {
      below = bound;
      count_below = count;
    }
  }
  // Ties at the cut, or a distribution that false position does not like: bisection over the floats themselves.
  int64_t too_low = key_of(above), too_high = (int64_t)key_of(below) + 1;
  while (too_high - too_low > 1) {
    const int64_t middle = too_low + (too_high - too_low) / 2;
    const int64_t count = keep_from(z, size, value_of((int32_t)middle), kept);
    if (count == active) return 0;
    (count > active ? too_low : too_high) = middle;
  }
  // More logits equal the cut than there is room for: the lowest indices among them.
  Kept equal;
  keep_from(z, size, value_of((int32_t)too_low), &equal);
  int64_t room = active - keep_from(z, size, value_of((int32_t)too_high), kept);
  for (int64_t word = 0; word * 64 < size; ++word) {
    uint64_t tied = equal.words[word] & ~kept->words[word];
    for (; tied != 0 && room > 0; --room) {
      kept->words[word] |= tied & -tied;
      tied &= tied - 1;
    }
  }
  return 0;
}

int64_t select_bank(const float* z, int64_t size, int64_t active, Kept* kept) {
  // A constant size lets the compiler keep the usual bank in registers.
  return size == 64 ? select_bank_of(z, 64, active, kept) : select_bank_of(z, size, active, kept);
}

template <class W>
int64_t select_banks_of(const Decode& problem, int64_t begin, int64_t end, float* code_lanes, Selected* selected,
                        int64_t* num_selected) {
  using Element = typename W::Element;
  const int64_t tokens = problem.input.tokens, size = problem.bank_size;
  const int64_t halves = problem.gated ? 2 : 1, rank = problem.expand.columns / halves;
  const int64_t padded = (rank + kPad - 1) / kPad * kPad;
  for (int64_t part = 0; part < tokens * halves; ++part) {
    float* lanes = code_lanes + part * padded;
    memset(lanes, 0, padded * sizeof(float));
    for (int64_t i = 0; i < rank; ++i) lanes[lane_of(i, W::kParts)] = problem.code[part * rank + i];
  }
  alignas(64) float logits[kMaxTokens][kMaxBank + kLanes];
  Kept kept[kMaxTokens];
  int64_t count = 0, not_finite = 0;
  for (int64_t n = begin; n < end; ++n) {
    for (int64_t row = 0; row < size; row += kLanes) {
      const int rows = (int)(size - row < kLanes ? size - row : kLanes);
      const int64_t channel = n * size + row;
      const Element* w = (const Element*)problem.expand.data + channel * problem.expand.stride;
      const Floats bias = elements(problem.bias, channel, rows);
      if (!problem.gated) {
        for (int64_t t = 0; t < tokens; ++t) {
          const Floats z = dot_rows<W>(w, problem.expand.stride, rows, code_lanes + t * padded, rank);
          store(&logits[t][row], z + bias);
        }
        continue;
      }
      const Floats gate_offset = elements(problem.gate_offset, channel, rows);
      const Floats up_offset = elements(problem.up_offset, channel, rows);
      const Floats gate_noise = exp_of(elements(problem.gate_log_noise, channel, rows));
      const Floats up_noise = exp_of(elements(problem.up_log_noise, channel, rows));
      for (int64_t t = 0; t < tokens; ++t) {
        const float* code = code_lanes + t * 2 * padded;
        const Floats gate = dot_rows<W>(w, problem.expand.stride, rows, code, rank) + gate_offset;
        const Floats up = dot_rows<W>(w + rank, problem.expand.stride, rows, code + padded, rank) + up_offset;
        store(&logits[t][row], expected_energy(gate, up, gate_noise, up_noise) + bias);
      }
    }
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t i = size; i % kLanes != 0; ++i) logits[t][i] = -INFINITY;
      not_finite += select_bank(logits[t], size, problem.active, &kept[t]);
    }
    if (not_finite != 0) continue;
    for (int64_t word = 0; word * 64 < size; ++word) {
      uint64_t any = 0;
      for (int64_t t = 0; t < tokens; ++t) any |= kept[t].words[word];
      for (; any != 0; any &= any - 1) {
        const int bit = __builtin_ctzll(any);
        uint32_t who = 0;
        for (int64_t t = 0; t < tokens; ++t) who |= (uint32_t)((kept[t].words[word] >> bit) & 1) << t;
        selected[count++] = {(int32_t)(n * size + word * 64 + bit), who};
      }
    }
  }
  *num_selected = not_finite != 0 ? 0 : count;
  return not_finite;
}

int64_t select_banks(const Decode& problem, int64_t begin, int64_t end, float* code_lanes, Selected* selected,
                     int64_t* num_selected) {
  return problem.expand.type == kFloat32
             ? select_banks_of<F32>(problem, begin, end, code_lanes, selected, num_selected)
             : select_banks_of<BF16>(problem, begin, end, code_lanes, selected, num_selected);
}

// Gate and up rows of one channel times n tokens, while the down column that comes next is fetched.
template <class W, int n, bool use_halves>
INLINE void dot_pair(const typename W::Element* gate, const Decode& problem, const int* which, float* gate_out,
                     float* up_out) {
  constexpr int kBlock = kLanes * W::kParts;
  constexpr int kChains = n == 1 ? 2 : 1;
  const int64_t P = problem.padded_hidden;
  const typename W::Element *up = gate + P, *down = gate + 2 * P;
  const Input& input = problem.input;
  Floats gate_acc[n][W::kParts * kChains] = {}, up_acc[n][W::kParts * kChains] = {};
  auto step = [&](int64_t i, int chain) __attribute__((always_inline)) {
    const Words gate_words = load<Words>(gate + i), up_words = load<Words>(up + i);
#if defined(__AVX512BF16__)
    if constexpr (use_halves) {
      for (int t = 0; t < n; ++t) {
        const uint16_t* x = input.halves + which[t] * input.padded + i;
        gate_acc[t][chain] = dot_halves(gate_acc[t][chain], gate_words, x);
        up_acc[t][chain] = dot_halves(up_acc[t][chain], up_words, x);
      }
      return;
    }
#endif
    Floats gate_parts[W::kParts], up_parts[W::kParts];
    W::unpack(gate_words, gate_parts);
    W::unpack(up_words, up_parts);
    for (int t = 0; t < n; ++t) {
      const float* x = input.lanes + which[t] * input.padded + i;
      for (int p = 0; p < W::kParts; ++p) {
        const Floats value = load<Floats>(x + p * kLanes);
        gate_acc[t][chain * W::kParts + p] += gate_parts[p] * value;
        up_acc[t][chain * W::kParts + p] += up_parts[p] * value;
      }
    }
  };
  int64_t i = 0;
  for (; i + kChains * kBlock <= P; i += kChains * kBlock) {
    for (int chain = 0; chain < kChains; ++chain) {
      const int64_t at = i + chain * kBlock;
      if ((chain * kBytes) % 64 == 0) __builtin_prefetch(down + at);
      step(at, chain);
    }
  }
  for (; i < P; i += kBlock) step(i, 0);
  for (int t = 0; t < n; ++t) {
    Floats gate_total = gate_acc[t][0], up_total = up_acc[t][0];
    for (int c = 1; c < W::kParts * kChains; ++c) {
      gate_total += gate_acc[t][c];
      up_total += up_acc[t][c];
    }
    gate_out[t] = sum(gate_total);
    up_out[t] = sum(up_total);
  }
}

// acc of n tokens += h * down column, while gate and up of the next channel are fetched.
template <class W, int n>
INLINE void add_down(const typename W::Element* down, int64_t P, const float* h, float* const* acc,
                     const typename W::Element* next) {
  constexpr int kBlock = kLanes * W::kParts;
  for (int64_t i = 0; i < P; i += kBlock) {
    if ((i * (int64_t)sizeof(*down)) % 64 == 0) {
      __builtin_prefetch(next + i);
      __builtin_prefetch(next + P + i);
    }
    Floats parts[W::kParts];
    W::unpack(load<Words>(down + i), parts);
    for (int t = 0; t < n; ++t) {
      for (int p = 0; p < W::kParts; ++p) {
        float* at = acc[t] + i + p * kLanes;
        store(at, load<Floats>(at) + h[t] * parts[p]);
      }
    }
  }
}

template <class W, int n, bool use_halves>
INLINE void gather_channel(const Decode& problem, int64_t channel, const int* which, float* acc,
                           const typename W::Element* next) {
  const int64_t P = problem.padded_hidden;
  const typename W::Element* record = (const typename W::Element*)problem.packed + channel * 3 * P;
  float gate[n], up[n], h[n];
  float* rows[n];
  dot_pair<W, n, use_halves>(record, problem, which, gate, up);
  const float* scales = W::kType == kInt8 ? problem.scales + 3 * channel : nullptr;
  for (int t = 0; t < n; ++t) {
    if (scales != nullptr) {
      gate[t] *= scales[0];
      up[t] *= scales[1];
    }
    if (problem.gate_bias.data != nullptr) gate[t] += element(problem.gate_bias, channel);
    if (problem.up_bias.data != nullptr) up[t] += element(problem.up_bias, channel);
    h[t] = gate[t] / (1.0f + expf(-gate[t])) * up[t];
    if (scales != nullptr) h[t] *= scales[2];
    rows[t] = acc + which[t] * P;
  }
  add_down<W, n>(record + 2 * P, P, h, rows, next);
}

// One token. Its channels go in batches of kLanes: first gate and up of each, then SiLU of all at once, then the down
// columns four at a time, so that the accumulator is read and written a quarter as often. Every loop fetches the rows
// that the next one reads, so that the memory never waits between two short rows.
template <class W, bool use_halves>
INLINE void dot_pair_alone(const typename W::Element* gate, const Decode& problem, Floats* gate_out, Floats* up_out,
                           const typename W::Element* const* ahead) {
  constexpr int kBlock = kLanes * W::kParts;
  const int64_t P = problem.padded_hidden;
  const typename W::Element* up = gate + P;
  const Input& input = problem.input;
  Floats gate_acc[2 * W::kParts] = {}, up_acc[2 * W::kParts] = {};
  auto step = [&](int64_t i, int chain) __attribute__((always_inline)) {
    if ((i * (int64_t)sizeof(*gate)) % 64 == 0) {
      __builtin_prefetch(ahead[0] + i);
      __builtin_prefetch(ahead[1] + i);
    }
    const Words gate_words = load<Words>(gate + i), up_words = load<Words>(up + i);
#if defined(__AVX512BF16__)
    if constexpr (use_halves) {
      gate_acc[chain] = dot_halves(gate_acc[chain], gate_words, input.halves + i);
      up_acc[chain] = dot_halves(up_acc[chain], up_words, input.halves + i);
      return;
    }
#endif
    Floats gate_parts[W::kParts], up_parts[W::kParts];
    W::unpack(gate_words, gate_parts);
    W::unpack(up_words, up_parts);
    for (int p = 0; p < W::kParts; ++p) {
      const Floats x = load<Floats>(input.lanes + i + p * kLanes);
      gate_acc[chain * W::kParts + p] += gate_parts[p] * x;
      up_acc[chain * W::kParts + p] += up_parts[p] * x;
    }
  };
  int64_t i = 0;
  for (; i + 2 * kBlock <= P; i += 2 * kBlock) {
    step(i, 0);
    step(i + kBlock, 1);
  }
  for (; i < P; i += kBlock) step(i, 0);
  *gate_out = gate_acc[0];
  *up_out = up_acc[0];
  for (int c = 1; c < 2 * W::kParts; ++c) {
    *gate_out += gate_acc[c];
    *up_out += up_acc[c];
  }
}

template <class W, int n>
INLINE void add_columns(const typename W::Element* const* down, int64_t P, const float* h, float* acc,
                        const typename W::Element* const* ahead) {
  constexpr int kBlock = kLanes * W::kParts;
  for (int64_t i = 0; i < P; i += kBlock) {
    Floats total[W::kParts];
    for (int p = 0; p < W::kParts; ++p) total[p] = load<Floats>(acc + i + p * kLanes);
    for (int c = 0; c < n; ++c) {
      if ((i * (int64_t)sizeof(**down)) % 64 == 0) __builtin_prefetch(ahead[c] + i);
      Floats parts[W::kParts];
      W::unpack(load<Words>(down[c] + i), parts);
      for (int p = 0; p < W::kParts; ++p) total[p] += h[c] * parts[p];
    }
    for (int p = 0; p < W::kParts; ++p) store(acc + i + p * kLanes, total[p]);
  }
}

template <class W, bool use_halves>
void gather_alone(const Decode& problem, const Selected* selected, int64_t num_selected, float* acc) {
  using Element = typename W::Element;
  const int64_t P = problem.padded_hidden;
  // Past the end the last channel is fetched again, which costs nothing.
  auto record = [&](int64_t s) __attribute__((always_inline)) {
    return (const Element*)problem.packed + selected[s < num_selected ? s : num_selected - 1].channel * 3 * P;
  };
  for (int64_t first = 0; first < num_selected; first += kLanes) {
    const int count = (int)(num_selected - first < kLanes ? num_selected - first : kLanes);
    Floats gate_rows[kLanes] = {}, up_rows[kLanes] = {};
    for (int c = 0; c < count; ++c) {
      const Element* next = record(first + c + 1);
      const Element* ahead[2] = {next, next + P};
      if (c + 1 == count) {
        ahead[0] = record(first) + 2 * P;
        ahead[1] = record(first + 1) + 2 * P;
      }
      dot_pair_alone<W, use_halves>(record(first + c), problem, &gate_rows[c], &up_rows[c], ahead);
    }
    Floats gate = sum_rows(gate_rows), up = sum_rows(up_rows), down_scale = splat(1.0f);
    if (W::kType == kInt8) {
      for (int c = 0; c < count; ++c) {
        const float* scales = problem.scales + 3 * (int64_t)selected[first + c].channel;
        gate[c] *= scales[0];
        up[c] *= scales[1];
        down_scale[c] = scales[2];
      }
    }
    if (problem.gate_bias.data != nullptr) {
      for (int c = 0; c < count; ++c) gate[c] += element(problem.gate_bias, selected[first + c].channel);
    }
    if (problem.up_bias.data != nullptr) {
      for (int c = 0; c < count; ++c) up[c] += element(problem.up_bias, selected[first + c].channel);
    }
    float h[kLanes];
    store(h, gate / (1.0f + exp_of(-gate)) * up * down_scale);
    for (int c = 0; c < count; c += 4) {
      const Element *down[4], *ahead[4];
      for (int i = 0; i < 4; ++i) {
        down[i] = record(first + c + i) + 2 * P;
        ahead[i] = c + 4 < count ? record(first + c + 4 + i) + 2 * P : record(first + count + i / 2) + (i % 2) * P;
      }
      switch (count - c) {
        case 1: add_columns<W, 1>(down, P, h + c, acc, ahead); break;
        case 2: add_columns<W, 2>(down, P, h + c, acc, ahead); break;
        case 3: add_columns<W, 3>(down, P, h + c, acc, ahead); break;
        default: add_columns<W, 4>(down, P, h + c, acc, ahead); break;
      }
    }
  }
}

template <class W, bool use_halves>
void gather_of(const Decode& problem, const Selected* selected, int64_t num_selected, float* acc) {
  if (problem.input.tokens == 1) return gather_alone<W, use_halves>(problem, selected, num_selected, acc);
  const int64_t P = problem.padded_hidden;
  const typename W::Element* packed = (const typename W::Element*)problem.packed;
  for (int64_t s = 0; s < num_selected; ++s) {
    const int64_t channel = selected[s].channel;
    // The last channel fetches itself again, which costs nothing.
    const typename W::Element* next = packed + selected[s + 1 < num_selected ? s + 1 : s].channel * 3 * P;
    int which[kMaxTokens], count = 0;
    for (int t = 0; t < (int)problem.input.tokens; ++t) {
      which[count] = t;
      count += (selected[s].tokens >> t) & 1;
    }
    for_tokens(count, [&](auto number, int done) __attribute__((always_inline)) {
      gather_channel<W, decltype(number)::value, use_halves>(problem, channel, which + done, acc, next);
    });
  }
}

#if defined(__AVX512VNNI__)
// What one token multiplies the down columns of a batch of channels with, in fixed point relative to the largest.
template <int digits>
struct Coefficients {
  Words quads[digits][kLanes / 4];  // the digits of channels 4q..4q+3, repeated in every lane
  int32_t starts[digits];
  float step;  // 0: nothing to add
};

template <int digits>
INLINE bool split_coefficients(Floats h, Coefficients<digits>* out) {
  float per_step;
  const Floats size = magnitude(h);
  const float top = largest_of(size, h - h);
  if (!fixed_point<digits>(top, &per_step)) return false;
  out->step = top / largest_fixed(digits);
  Digits split[digits];
  split_digits<digits>(h, per_step, split);
  for (int d = 0; d < digits; ++d) {
    uint32_t quads[kLanes / 4];
    int8_t bytes[kLanes];
    store(quads, split[d]);
    store(bytes, split[d]);
    for (int q = 0; q < kLanes / 4; ++q) out->quads[d][q] = Words{} + quads[q];
    int32_t total = 0;
    for (int c = 0; c < kLanes; ++c) total += bytes[c];
    out->starts[d] = -128 * total;
  }
  return true;
}

// Bytes of four rows, so that each 32-bit lane holds one column: 16-byte group k, place m of out[j] is column
// 16 k + 4 j + m.
INLINE void interleave(const Words* rows, Words* out) {
  const __m512i low01 = _mm512_unpacklo_epi8((__m512i)rows[0], (__m512i)rows[1]);
  const __m512i high01 = _mm512_unpackhi_epi8((__m512i)rows[0], (__m512i)rows[1]);
  const __m512i low23 = _mm512_unpacklo_epi8((__m512i)rows[2], (__m512i)rows[3]);
  const __m512i high23 = _mm512_unpackhi_epi8((__m512i)rows[2], (__m512i)rows[3]);
  out[0] = (Words)_mm512_unpacklo_epi16(low01, low23);
  out[1] = (Words)_mm512_unpackhi_epi16(low01, low23);
  out[2] = (Words)_mm512_unpacklo_epi16(high01, high23);
  out[3] = (Words)_mm512_unpackhi_epi16(high01, high23);
}

// Groups of G lanes of a and b in turns, from the lower or upper half of every 16-byte group.
template <int G, bool upper, int... I>
INLINE Floats unpack_lanes(Floats a, Floats b, Indices<I...>) {
  return __builtin_shufflevector(
      a, b, (I / 4 * 4 + (upper ? 2 : 0) + I % 4 / (2 * G) * G + I % G + ((I / G) % 2 == 0 ? 0 : kLanes))...);
}

// Place m of vector j and place j of vector m change places in every 16-byte group: from the order of `interleave` to
// that of the accumulators, in which lane l of vector p is column 4 l + p.
INLINE void transpose(Floats* v) {
  typename MakeIndices<kLanes>::type every;
  const Floats low01 = unpack_lanes<1, false>(v[0], v[1], every), high01 = unpack_lanes<1, true>(v[0], v[1], every);
  const Floats low23 = unpack_lanes<1, false>(v[2], v[3], every), high23 = unpack_lanes<1, true>(v[2], v[3], every);
  v[0] = unpack_lanes<2, false>(low01, low23, every);
  v[1] = unpack_lanes<2, true>(low01, low23, every);
  v[2] = unpack_lanes<2, false>(high01, high23, every);
  v[3] = unpack_lanes<2, true>(high01, high23, every);
}

// acc of every token += the down columns of kLanes channels times its coefficients.
template <int digits>
INLINE void add_batch(const int8_t* const* down, int64_t P, const Coefficients<digits>* coefficients, int64_t tokens,
                      float* acc, const int8_t* const* ahead) {
  constexpr int kQuads = kLanes / 4;
  for (int64_t i = 0; i < P; i += kBytes) {
    Words mixed[kQuads][4];
#pragma GCC unroll 4
    for (int q = 0; q < kQuads; ++q) {
      Words rows[4];
      for (int c = 0; c < 4; ++c) {
        __builtin_prefetch(ahead[4 * q + c] + i);
        rows[c] = unsigned_bytes(load<Words>(down[4 * q + c] + i));
      }
      interleave(rows, mixed[q]);
    }
    for (int64_t t = 0; t < tokens; ++t) {
      const Coefficients<digits>& own = coefficients[t];
      if (own.step == 0.0f) continue;
      Ints total[digits][4];
#pragma GCC unroll 3
      for (int d = 0; d < digits; ++d) {
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
          total[d][j] = Ints{} + own.starts[d];
#pragma GCC unroll 4
          for (int q = 0; q < kQuads; ++q) total[d][j] = dot_bytes(total[d][j], mixed[q][j], own.quads[d][q]);
        }
      }
      Floats sums[4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        // Two digits of kLanes products are below 2^27.
        sums[j] = __builtin_convertvector(total[0][j] * 256 + total[1][j], Floats);
        if constexpr (digits == 3) sums[j] = sums[j] * 256.0f + __builtin_convertvector(total[2][j], Floats);
      }
      transpose(sums);
      float* to = acc + t * P + i;
#pragma GCC unroll 4
      for (int p = 0; p < 4; ++p) store(to + p * kLanes, load<Floats>(to + p * kLanes) + own.step * sums[p]);
    }
  }
}

// Channels go in batches of kLanes, as in `gather_alone`, for any number of tokens: a token that does not keep one has
// the coefficient 0. Every loop fetches the rows that come `rows_ahead` rows later.
template <int digits>
void gather_digits(const Decode& problem, const Selected* selected, int64_t num_selected, float* acc) {
  const int64_t P = problem.padded_hidden, tokens = problem.input.tokens;
  // Past the end the last channel is read again, with coefficients of 0.
  auto record = [&](int64_t s) __attribute__((always_inline)) {
    return (const int8_t*)problem.packed + selected[s < num_selected ? s : num_selected - 1].channel * 3 * P;
  };
  // Rows in the order in which they are read: gate and up of every channel of a batch, then its down columns.
  auto row_at = [&](int64_t first, int place) __attribute__((always_inline)) {
    const int64_t start = first + place / (3 * kLanes) * kLanes;
    const int within = place % (3 * kLanes);
    return within < 2 * kLanes ? record(start + within / 2) + within % 2 * P
                               : record(start + within - 2 * kLanes) + 2 * P;
  };
  const int rows_ahead = P <= 2048 ? 8 : 2;  // measured at 1536 and at 3584: long rows push each other out of the cache
  Floats gate_rows[kMaxTokens][kLanes], up_rows[kMaxTokens][kLanes];
  Coefficients<digits> coefficients[kMaxTokens];
  for (int64_t first = 0; first < num_selected; first += kLanes) {
    const int count = (int)(num_selected - first < kLanes ? num_selected - first : kLanes);
    memset(gate_rows, 0, tokens * sizeof(gate_rows[0]));
    memset(up_rows, 0, tokens * sizeof(up_rows[0]));
    uint32_t keeps[kMaxTokens] = {};
    Floats scales[3] = {}, gate_bias = {}, up_bias = {};
    for (int c = 0; c < count; ++c) {
      const Selected& one = selected[first + c];
      for (int i = 0; i < 3; ++i) scales[i][c] = problem.scales[3 * (int64_t)one.channel + i];
      if (problem.gate_bias.data != nullptr) gate_bias[c] = element(problem.gate_bias, one.channel);
      if (problem.up_bias.data != nullptr) up_bias[c] = element(problem.up_bias, one.channel);
      int which[kMaxTokens], kept = 0;
      for (int t = 0; t < (int)tokens; ++t) {
        which[kept] = t;
        kept += (one.tokens >> t) & 1;
        keeps[t] |= ((one.tokens >> t) & 1) << c;
      }
      const int8_t* rows[2] = {record(first + c), record(first + c) + P};
      const int8_t* later[2] = {row_at(first, 2 * c + rows_ahead), row_at(first, 2 * c + 1 + rows_ahead)};
      auto ahead = [&](int64_t i) __attribute__((always_inline)) {
        __builtin_prefetch(later[0] + i);
        __builtin_prefetch(later[1] + i);
      };
      for_tokens(kept, [&](auto number, int done) __attribute__((always_inline)) {
        constexpr int n = decltype(number)::value;
        Floats lanes[2][n];
        dot_digits<digits, 2, n>(rows, problem.input, which + done, P, lanes, ahead);
        for (int t = 0; t < n; ++t) {
          gate_rows[which[done + t]][c] = lanes[0][t];
          up_rows[which[done + t]][c] = lanes[1][t];
        }
      });
    }
    const int8_t *down[kLanes], *ahead[kLanes];
    for (int c = 0; c < kLanes; ++c) {
      down[c] = record(first + c) + 2 * P;
      ahead[c] = row_at(first, 2 * kLanes + c + rows_ahead);
    }
    for (int64_t t = 0; t < tokens; ++t) {
      const Floats gate = sum_rows(gate_rows[t]) * scales[0] + gate_bias;
      const Floats up = sum_rows(up_rows[t]) * scales[1] + up_bias;
      const Floats all = gate / (1.0f + exp_of(-gate)) * up * scales[2];
      const Floats h = select(lanes_of(keeps[t]), all, splat(0.0f));
      if (split_coefficients(h, &coefficients[t])) continue;
      // Not finite, or next to 0: in floating point, alone.
      coefficients[t].step = 0.0f;
      for (int c = 0; c < count; ++c) {
        const float one = h[c];
        if ((keeps[t] >> c) & 1) add_columns<I8, 1>(&down[c], P, &one, acc + t * P, &down[c]);
      }
    }
    add_batch<digits>(down, P, coefficients, tokens, acc, ahead);
  }
}
#endif

void gather(const Decode& problem, const Selected* selected, int64_t num_selected, float* acc) {
  switch (problem.packed_type) {
    case kFloat32: return gather_of<F32, false>(problem, selected, num_selected, acc);
    case kInt8:
#if defined(__AVX512VNNI__)
      if (problem.input.digits == 2) return gather_digits<2>(problem, selected, num_selected, acc);
      if (problem.input.digits == 3) return gather_digits<3>(problem, selected, num_selected, acc);
#endif
      return gather_of<I8, false>(problem, selected, num_selected, acc);
    case kBFloat16:
#if defined(__AVX512BF16__)
      if (problem.input.halves != nullptr) return gather_of<BF16, true>(problem, selected, num_selected, acc);
#endif
      return gather_of<BF16, false>(problem, selected, num_selected, acc);
  }
}

void finish(const Decode& problem, const float* acc, int64_t count, Vector bias, Vector residual, void* y, Type type) {
  const int64_t P = problem.padded_hidden, tokens = problem.input.tokens;
  const int parts = problem.packed_type == kFloat32 ? 1 : problem.packed_type == kBFloat16 ? 2 : 4;
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t block = 0; block < problem.hidden; block += parts * kLanes) {
      float sums[4 * kLanes];
      for (int p = 0; p < parts; ++p) {
        Floats total = {};
        for (int64_t c = 0; c < count; ++c) total += load<Floats>(acc + (c * tokens + t) * P + block + p * kLanes);
        store(sums + p * kLanes, total);
      }
      const int64_t left = problem.hidden - block < parts * kLanes ? problem.hidden - block : parts * kLanes;
      for (int64_t i = 0; i < left; ++i) {
        float value = sums[(i % parts) * kLanes + i / parts];
        if (bias.data != nullptr) value += element(bias, block + i);
        const int64_t at = t * problem.hidden + block + i;
        if (residual.data != nullptr) value += element(residual, at);
        if (type == kFloat32) {
          ((float*)y)[at] = value;
        } else {
          ((uint16_t*)y)[at] = to_bf16(value);
        }
      }
    }
  }
}

INLINE float rounded(float value, Type type) { return type == kFloat32 ? value : from_bf16(to_bf16(value)); }

INLINE void put(void* out, Type type, int64_t i, float value) {
  if (type == kFloat32) {
    ((float*)out)[i] = value;
  } else {
    ((uint16_t*)out)[i] = to_bf16(value);
  }
}

void rms_norm(const void* x, Type type, int64_t rows, int64_t columns, Vector weight, float epsilon, void* out) {
  const Vector input{x, type};
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t start = row * columns;
    Floats squares = {};
    int64_t i = 0;
    for (; i + kLanes <= columns; i += kLanes) {
      const Floats values = elements(input, start + i, kLanes);
      squares += values * values;
    }
    float total = sum(squares);
    for (; i < columns; ++i) total += element(input, start + i) * element(input, start + i);
    const float scale = 1.0f / sqrtf(total / (float)columns + epsilon);
    for (i = 0; i < columns; ++i) {
      put(out, type, start + i, rounded(element(input, start + i) * scale, type) * element(weight, i));
    }
  }
}

void rotate(void* x, Type type, int64_t heads, int64_t head, Vector cos, Vector sin) {
  const Vector input{x, type};
  const int64_t half = head / 2;
  for (int64_t h = 0; h < heads; ++h) {
    for (int64_t i = 0; i < half; ++i) {
      const int64_t low = h * head + i, high = low + half;
      const float a = element(input, low), b = element(input, high);
      put(x, type, low, a * element(cos, i) - b * element(sin, i));
      put(x, type, high, b * element(cos, half + i) + a * element(sin, half + i));
    }
  }
}

template <class W>
void attend_of(const Attention& problem, int64_t begin, int64_t end, float* scratch) {
  using Element = typename W::Element;
  constexpr int kBlock = kLanes * W::kParts;
  const int64_t shared = problem.heads / problem.groups, head = problem.head, length = problem.length;
  const int64_t blocks = (head + kBlock - 1) / kBlock * kBlock;
  float* scores = scratch;                    // [shared, length]
  float* query = scratch + shared * length;   // [shared, blocks], in lane order
  float* output = query + shared * blocks;    // the same
  auto block = [&](const Element* p, int64_t i) __attribute__((always_inline)) {
    return i + kBlock <= head ? load<Words>(p + i) : load_part<W>(p + i, head - i);
  };
  for (int64_t group = begin; group < end; ++group) {
    const Vector queries{problem.query, W::kType};
    memset(query, 0, 2 * shared * blocks * sizeof(float));
    for (int64_t h = 0; h < shared; ++h) {
      for (int64_t i = 0; i < head; ++i) {
        query[h * blocks + lane_of(i, W::kParts)] = element(queries, (group * shared + h) * head + i) * problem.scale;
      }
    }
    const Element* keys = (const Element*)problem.keys + group * problem.key_head_stride;
    for (int64_t l = 0; l < length; ++l) {
      for (int64_t h = 0; h < shared; ++h) {
        Floats total = {};
        for (int64_t i = 0; i < head; i += kBlock) {
          Floats parts[W::kParts];
          W::unpack(block(keys + l * problem.key_stride, i), parts);
          for (int p = 0; p < W::kParts; ++p) total += parts[p] * load<Floats>(query + h * blocks + i + p * kLanes);
        }
        scores[h * length + l] = sum(total);
      }
    }
    for (int64_t h = 0; h < shared; ++h) {
      float* row = scores + h * length;
      float highest = -INFINITY, total = 0.0f;
      for (int64_t l = 0; l < length; ++l) highest = row[l] > highest ? row[l] : highest;
      int64_t l = 0;
      Floats totals = {};
      for (; l + kLanes <= length; l += kLanes) {
        const Floats weight = exp_of(load<Floats>(row + l) - highest);
        store(row + l, weight);
        totals += weight;
      }
      for (; l < length; ++l) total += row[l] = expf(row[l] - highest);
      const float scale = 1.0f / (total + sum(totals));
      for (l = 0; l < length; ++l) row[l] *= scale;
    }
    const Element* values = (const Element*)problem.values + group * problem.value_head_stride;
    for (int64_t l = 0; l < length; ++l) {
      for (int64_t i = 0; i < head; i += kBlock) {
        Floats parts[W::kParts];
        W::unpack(block(values + l * problem.value_stride, i), parts);
        for (int64_t h = 0; h < shared; ++h) {
          for (int p = 0; p < W::kParts; ++p) {
            float* at = output + h * blocks + i + p * kLanes;
            store(at, load<Floats>(at) + scores[h * length + l] * parts[p]);
          }
        }
      }
    }
    for (int64_t h = 0; h < shared; ++h) {
      for (int64_t i = 0; i < head; ++i) {
        put(problem.output, W::kType, (group * shared + h) * head + i, output[h * blocks + lane_of(i, W::kParts)]);
      }
    }
  }
}

void attend(const Attention& problem, int64_t begin, int64_t end, float* scratch) {
  return problem.type == kFloat32 ? attend_of<F32>(problem, begin, end, scratch)
                                  : attend_of<BF16>(problem, begin, end, scratch);
}

// The midpoint of the smallest kept and the largest dropped logit; both must exist.
INLINE float threshold_of(const float* z, int64_t size, const Kept& kept) {
  Floats last = splat(INFINITY), next = splat(-INFINITY);
  for (int64_t i = 0; i < size; i += kLanes) {
    const Ints take = lanes_of(kept.words[i / 64] >> (i % 64));
    const Floats values = load<Floats>(z + i);
    last = select(take & (values < last), values, last);
    next = select(~take & (values > next), values, next);
  }
  float smallest = INFINITY, largest = -INFINITY;
  for (int lane = 0; lane < kLanes; ++lane) {
    smallest = last[lane] < smallest ? last[lane] : smallest;
    largest = next[lane] > largest ? next[lane] : largest;
  }
  return (smallest + largest) / 2;
}

// A bank's logits, padded with -infinity to whole vectors in `padded` where they do not fill them.
INLINE const float* whole_bank(const float* z, int64_t size, float* padded) {
  if (size % kLanes == 0) return z;
  memcpy(padded, z, size * sizeof(float));
  for (int64_t i = size; i % kLanes != 0; ++i) padded[i] = -INFINITY;
  return padded;
}

int64_t route(const float* logits, int64_t begin, int64_t end, int64_t bank_size, int64_t active, uint8_t* mask,
              float* threshold) {
  alignas(64) float padded[kMaxBank + kLanes];
  Kept kept;
  int64_t not_finite = 0;
  for (int64_t n = begin; n < end; ++n) {
    const float* z = whole_bank(logits + n * bank_size, bank_size, padded);
    const int64_t bad = select_bank(z, bank_size, active, &kept);
    not_finite += bad;
    if (bad != 0) continue;
    for (int64_t i = 0; i < bank_size; i += 64) {
      store_bytes(mask + n * bank_size + i, kept.words[i / 64], bank_size - i < 64 ? bank_size - i : 64);
    }
    if (active < bank_size) threshold[n] = threshold_of(z, bank_size, kept);
  }
  return not_finite;
}

INLINE Floats load_floats(const float* p, int count) {
  if (count == kLanes) return load<Floats>(p);
  float lanes[kLanes] = {};
  memcpy(lanes, p, count * sizeof(float));
  return load<Floats>(lanes);
}

INLINE void store_floats(float* p, Floats v, int count) {
  if (count == kLanes) return store(p, v);
  float lanes[kLanes];
  store(lanes, v);
  memcpy(p, lanes, count * sizeof(float));
}

// Rounded to the nearest bfloat16, ties to even.
INLINE void store_halves(uint16_t* p, Floats v, int count) {
  const Words words = (Words)v;
  const Words nearest = (words + 0x7fff + ((words >> 16) & 1)) >> 16;
  const Ints is_nan = v != v;
  const Halves halves = __builtin_convertvector((nearest & ~(Words)is_nan) | (0x7fc0 & (Words)is_nan), Halves);
  memcpy(p, &halves, count * sizeof(uint16_t));
}

INLINE int lanes_left(int64_t i, int64_t size) { return (int)(size - i < kLanes ? size - i : kLanes); }

void exponential(const float* x, int64_t count, float* out) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const int lanes = lanes_left(i, count);
    store_floats(out + i, exp_of(load_floats(x + i, lanes)), lanes);
  }
}

void energy(const Energy& problem, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t) {
    const int64_t row = t * problem.channels;
    for (int64_t i = 0; i < problem.channels; i += kLanes) {
      const int count = lanes_left(i, problem.channels);
      const Floats gate = load_floats(problem.gate + row + i, count) + load<Floats>(problem.gate_offset + i);
      const Floats up = load_floats(problem.up + row + i, count) + load<Floats>(problem.up_offset + i);
      const Floats value =
          expected_energy(gate, up, load<Floats>(problem.gate_noise + i), load<Floats>(problem.up_noise + i));
      store_floats(problem.logits + row + i, value + load<Floats>(problem.bias + i), count);
    }
  }
}

// Gradients of one vector of channels for `n` tokens, added to the chunk's sums.
template <int n, bool is_half>
INLINE void energy_gradients(const Energy& problem, int64_t t, int64_t i, int count, float* sums) {
  const Floats gate_offset = load<Floats>(problem.gate_offset + i), up_offset = load<Floats>(problem.up_offset + i);
  const Floats gate_noise = load<Floats>(problem.gate_noise + i), up_noise = load<Floats>(problem.up_noise + i);
  Floats total[kEnergySums];
  for (int s = 0; s < kEnergySums; ++s) total[s] = load<Floats>(sums + s * problem.padded + i);
  for (int k = 0; k < n; ++k) {
    const int64_t at = (t + k) * problem.channels + i;
    const Floats gate = load_floats(problem.gate + at, count) + gate_offset;
    const Floats up = load_floats(problem.up + at, count) + up_offset;
    const Floats dz = load_floats(problem.gradient + at, count);
    const Floats per_gate = dz / (gate * gate + gate_noise), per_up = dz / (up * up + up_noise);
    const Floats small = exp_of(select(gate < 0.0f, gate, -gate));
    const Floats closed = select(gate < 0.0f, splat(1.0f), small) / (1.0f + small);  // sigmoid(-gate)
    const Floats dgate = 2.0f * (per_gate * gate + closed * dz), dup = 2.0f * (per_up * up);
    if constexpr (is_half) {
      store_halves((uint16_t*)problem.gate_gradient + at, dgate, count);
      store_halves((uint16_t*)problem.up_gradient + at, dup, count);
    } else {
      store_floats((float*)problem.gate_gradient + at, dgate, count);
      store_floats((float*)problem.up_gradient + at, dup, count);
    }
    const Floats terms[kEnergySums] = {per_gate, per_up, dgate, dup, dz};
    for (int s = 0; s < kEnergySums; ++s) total[s] += terms[s];
  }
  for (int s = 0; s < kEnergySums; ++s) store(sums + s * problem.padded + i, total[s]);
}

template <bool is_half>
void energy_backward_of(const Energy& problem, int64_t begin, int64_t end) {
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    float* sums = problem.sums + chunk * kEnergySums * problem.padded;
    memset(sums, 0, kEnergySums * problem.padded * sizeof(float));
    const int64_t last = (chunk + 1) * kSumTokens < problem.tokens ? (chunk + 1) * kSumTokens : problem.tokens;
    int64_t t = chunk * kSumTokens;
    for (; t + 4 <= last; t += 4) {
      for (int64_t i = 0; i < problem.channels; i += kLanes) {
        energy_gradients<4, is_half>(problem, t, i, lanes_left(i, problem.channels), sums);
      }
    }
    for (; t < last; ++t) {
      for (int64_t i = 0; i < problem.channels; i += kLanes) {
        energy_gradients<1, is_half>(problem, t, i, lanes_left(i, problem.channels), sums);
      }
    }
  }
}

void energy_backward(const Energy& problem, int64_t begin, int64_t end) {
  return problem.gradient_type == kFloat32 ? energy_backward_of<false>(problem, begin, end)
                                           : energy_backward_of<true>(problem, begin, end);
}

void add_chunks(const Energy& problem, int64_t chunks, int64_t which, float* out) {
  const float* sums = problem.sums + which * problem.padded;
  const float* variance = which == 0 ? problem.gate_noise : which == 1 ? problem.up_noise : nullptr;
  for (int64_t i = 0; i < problem.channels; i += kLanes) {
    Floats total = {};
    for (int64_t c = 0; c < chunks; ++c) total += load<Floats>(sums + c * kEnergySums * problem.padded + i);
    if (variance != nullptr) total *= load<Floats>(variance + i);
    store_floats(out + i, total, lanes_left(i, problem.channels));
  }
}

typedef int16_t Shorts __attribute__((vector_size(kBytes / 2)));

// to[i] = from[i] where bit i is set, else 0.
template <class W>
INLINE void keep_elements(const typename W::Element* from, typename W::Element* to, uint64_t bits, int count) {
  if (count < kLanes) {
    for (int i = 0; i < count; ++i) to[i] = (bits >> i) & 1 ? from[i] : typename W::Element{0};
  } else if constexpr (W::kType == kFloat32) {
    store(to, (Ints)load<Ints>(from) & lanes_of(bits));
  } else {
    store(to, load<Shorts>(from) & __builtin_convertvector(lanes_of(bits), Shorts));
  }
}

INLINE Ints first_lanes(int count) {
  Ints lanes;
  for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = lane < count ? -1 : 0;
  return lanes;
}

// 1 / (tau * population standard deviation); deviations from the mean, so that nothing cancels.
INLINE float scale_of(const float* z, int64_t size, float threshold, float tau) {
  Floats total = {}, squares = {};
  const Ints tail = first_lanes((int)(size % kLanes));
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) total += load<Floats>(z + i) - threshold;
  if (i < size) total += select(tail, load<Floats>(z + i) - threshold, splat(0.0f));
  const float mean = sum(total) / (float)size;
  for (i = 0; i + kLanes <= size; i += kLanes) {
    const Floats from_mean = load<Floats>(z + i) - threshold - mean;
    squares += from_mean * from_mean;
  }
  if (i < size) {
    const Floats from_mean = select(tail, load<Floats>(z + i) - threshold - mean, splat(0.0f));
    squares += from_mean * from_mean;
  }
  const float variance = sum(squares) / (float)size;
  return 1.0f / (tau * sqrtf(variance > 1e-12f ? variance : 1e-12f));
}

template <class W>
INLINE int64_t unit_gate_rows(const UnitGate& problem, int64_t begin, int64_t end, int64_t size) {
  using Element = typename W::Element;
  alignas(64) float padded[kMaxBank + kLanes];
  Kept kept;
  int64_t not_finite = 0;
  const int64_t bytes = (size + 7) / 8;
  for (int64_t n = begin; n < end; ++n) {
    const float* z = whole_bank(problem.logits + n * size, size, padded);
    const int64_t bad = select_bank_of(z, size, problem.active, &kept);
    not_finite += bad;
    if (bad != 0) continue;
    for (int64_t i = 0; i < bytes; ++i) problem.bits[n * bytes + i] = (uint8_t)(kept.words[i / 8] >> (i % 8 * 8));
    problem.threshold[n] = threshold_of(z, size, kept);
    problem.scale[n] = scale_of(z, size, problem.threshold[n], problem.tau);
    const Element* h = (const Element*)problem.h + n * size;
    Element* gated = (Element*)problem.gated + n * size;
    for (int64_t i = 0; i < size; i += kLanes) {
      keep_elements<W>(h + i, gated + i, kept.words[i / 64] >> (i % 64), lanes_left(i, size));
    }
  }
  return not_finite;
}

template <class W>
INLINE void unit_gate_backward_rows(const UnitGate& problem, int64_t begin, int64_t end, int64_t size) {
  using Element = typename W::Element;
  const int64_t bytes = (size + 7) / 8;
  const Vector h{problem.h, problem.type}, dy{problem.dy, problem.type};
  for (int64_t n = begin; n < end; ++n) {
    const int64_t row = n * size;
    if (problem.dh != nullptr) {
      const Element* from = (const Element*)problem.dy + row;
      Element* to = (Element*)problem.dh + row;
      for (int64_t i = 0; i < size; i += kLanes) {
        // Whole vectors begin on a byte or, where a vector has 4 lanes, in the middle of one.
        uint64_t bits = problem.bits[n * bytes + i / 8] >> (i % 8);
        if (i + 8 < size && kLanes > 8) bits |= (uint64_t)problem.bits[n * bytes + i / 8 + 1] << 8;
        keep_elements<W>(from + i, to + i, bits, lanes_left(i, size));
      }
    }
    if (problem.dz == nullptr) continue;
    const float threshold = problem.threshold[n], scale = problem.scale[n];
    for (int64_t i = 0; i < size; i += kLanes) {
      const int count = lanes_left(i, size);
      const Floats from_cut = (load_floats(problem.logits + row + i, count) - threshold) * scale;
      const Floats small = exp_of(select(from_cut < 0.0f, from_cut, -from_cut));
      const Floats slope = small / ((1.0f + small) * (1.0f + small)) * (problem.alpha * scale);
      store_floats(problem.dz + row + i, slope * (elements(h, row + i, count) * elements(dy, row + i, count)), count);
    }
  }
}

// A constant size lets the compiler keep the usual bank in registers.
template <class W>
int64_t unit_gate_of(const UnitGate& problem, int64_t begin, int64_t end) {
  return problem.bank_size == 64 ? unit_gate_rows<W>(problem, begin, end, 64)
                                 : unit_gate_rows<W>(problem, begin, end, problem.bank_size);
}

int64_t unit_gate(const UnitGate& problem, int64_t begin, int64_t end) {
  return problem.type == kFloat32 ? unit_gate_of<F32>(problem, begin, end) : unit_gate_of<BF16>(problem, begin, end);
}

template <class W>
void unit_gate_backward_of(const UnitGate& problem, int64_t begin, int64_t end) {
  return problem.bank_size == 64 ? unit_gate_backward_rows<W>(problem, begin, end, 64)
                                 : unit_gate_backward_rows<W>(problem, begin, end, problem.bank_size);
}

void unit_gate_backward(const UnitGate& problem, int64_t begin, int64_t end) {
  return problem.type == kFloat32 ? unit_gate_backward_of<F32>(problem, begin, end)
                                  : unit_gate_backward_of<BF16>(problem, begin, end);
}

// kLanes logits from `i` on; those beyond the vocabulary have probability 0.
template <class W>
INLINE Floats logits_at(const void* row, int64_t i, int64_t vocabulary) {
  const int count = lanes_left(i, vocabulary);
  const Floats values = elements(Vector{row, W::kType}, i, count);
  return count == kLanes ? values : select(first_lanes(count), values, splat(-INFINITY));
}

// Sums over a row are kept in double, and those of this many logits in lanes of float32: a vocabulary is long.
constexpr int64_t kSumLogits = 2048;

// sum of body(i) over the vectors of a row.
template <class Body>
INLINE double sum_row(int64_t vocabulary, const Body& body) {
  double total = 0.0;
  for (int64_t start = 0; start < vocabulary; start += kSumLogits) {
    const int64_t end = start + kSumLogits < vocabulary ? start + kSumLogits : vocabulary;
    Floats part = {};
    for (int64_t i = start; i < end; i += kLanes) part += body(i);
    total += sum(part);
  }
  return total;
}

// log softmax(x) = x - top - log_total. Kept apart: their sum in float32 would lose what is added to a large top.
struct Normaliser {
  float top, log_total;
};

template <class W>
INLINE Normaliser normaliser_of(const void* row, int64_t vocabulary) {
  Floats highest = splat(-INFINITY);
  for (int64_t i = 0; i < vocabulary; i += kLanes) {
    const Floats values = logits_at<W>(row, i, vocabulary);
    highest = select(values > highest, values, highest);
  }
  float top = highest[0];
  for (int lane = 1; lane < kLanes; ++lane) top = highest[lane] > top ? highest[lane] : top;
  const double total = sum_row(vocabulary, [&](int64_t i) __attribute__((always_inline)) {
    return exp_of_negative(logits_at<W>(row, i, vocabulary) - top);
  });
  return {top, (float)log(total)};
}

template <class W>
void logit_loss_of(const LogitLoss& problem, int64_t begin, int64_t end) {
  using Element = typename W::Element;
  const int64_t vocabulary = problem.vocabulary;
  const float both = problem.ce_weight + problem.kd_weight;
  const bool is_taught = problem.teacher != nullptr;
  for (int64_t r = begin; r < end; ++r) {
    Element* student = (Element*)problem.student + r * vocabulary;
    const Element* teacher = is_taught ? (const Element*)problem.teacher + r * vocabulary : nullptr;
    const int64_t label = problem.labels[r];
    const Normaliser own = normaliser_of<W>(student, vocabulary);
    const Normaliser taught = is_taught ? normaliser_of<W>(teacher, vocabulary) : Normaliser{};
    const float label_log_p = element(Vector{student, W::kType}, label) - own.top - own.log_total;
    float label_gradient = both * expf(label_log_p) - problem.ce_weight;
    if (is_taught) {
      const float log_q = element(Vector{teacher, W::kType}, label) - taught.top - taught.log_total;
      label_gradient -= problem.kd_weight * expf(log_q);
    }
    problem.losses[2 * r] = -label_log_p;
    problem.losses[2 * r + 1] = 0.0f;
    if (!is_taught && !problem.with_gradient) continue;
    const double divergence = sum_row(vocabulary, [&](int64_t i) __attribute__((always_inline)) {
      const int count = lanes_left(i, vocabulary);
      const Floats log_p = logits_at<W>(student, i, vocabulary) - own.top - own.log_total;
      Floats gradient = both * exp_of_negative(log_p), term = {};
      if (is_taught) {
        const Floats log_q = logits_at<W>(teacher, i, vocabulary) - taught.top - taught.log_total;
        const Floats q = exp_of_negative(log_q);
        term = q * (log_q - log_p);
        if (count < kLanes) term = select(first_lanes(count), term, splat(0.0f));  // else infinity minus infinity
        gradient -= problem.kd_weight * q;
      }
      if (problem.with_gradient) {
        if constexpr (W::kType == kFloat32) {
          store_floats(student + i, gradient, count);
        } else {
          store_halves(student + i, gradient, count);
        }
      }
      return term;
    });
    if (is_taught) problem.losses[2 * r + 1] = (float)divergence;
    if (!problem.with_gradient) continue;
    if constexpr (W::kType == kFloat32) {
      student[label] = label_gradient;
    } else {
      student[label] = to_bf16(label_gradient);
    }
  }
}

void logit_loss(const LogitLoss& problem, int64_t begin, int64_t end) {
  return problem.type == kFloat32 ? logit_loss_of<F32>(problem, begin, end) : logit_loss_of<BF16>(problem, begin, end);
}

uint32_t stream(const void* data, int64_t bytes) {
  const char* p = (const char*)data;
  Words acc[4] = {};
  for (int64_t i = 0; i + 4 * kBytes <= bytes; i += 4 * kBytes) {
    for (int chain = 0; chain < 4; ++chain) acc[chain] += load<Words>(p + i + chain * kBytes);
  }
  const Words total = (acc[0] + acc[1]) + (acc[2] + acc[3]);
  uint32_t result = 0;
  for (int lane = 0; lane < kLanes; ++lane) result += total[lane];
  return result;
}

}  // namespace

#define NAME_(x) #x
#define NAME(x) NAME_(x)

const Kernels* CONCAT(kernels_, BANKWISE_ISA)() {
  static constexpr Kernels table = {NAME(BANKWISE_ISA),
                                    load_input,
                                    linear,
                                    select_banks,
                                    gather,
                                    finish,
                                    rms_norm,
                                    rotate,
                                    attend,
                                    route,
                                    exponential,
                                    energy,
                                    energy_backward,
                                    add_chunks,
                                    unit_gate,
                                    unit_gate_backward,
                                    logit_loss,
                                    stream};
  return &table;
}

}  // namespace bankwise
