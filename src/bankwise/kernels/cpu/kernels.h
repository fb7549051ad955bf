// What the instruction-set specific kernels offer to the operators (operators.cpp).
//
// kernels.cpp is compiled once per instruction set, each time with other machine flags, and every copy fills one
// `Kernels` table. Nothing here or there may use the standard library's templates: the linker keeps one copy of an
// inline function, and it could be the one compiled for a machine that this one is not.
//
// Shapes: T tokens, D hidden, F channels, N banks, B channels per bank, K active per bank, R predictor rank,
//         P a row of D padded to whole 64-byte lines.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace bankwise {

enum Type : int { kFloat32 = 0, kBFloat16 = 1, kInt8 = 2 };

inline constexpr int kMaxTokens = 8;
inline constexpr int kMaxBank = 1024;
inline constexpr int kMaxDigits = 3;

// A row-major matrix whose rows are `stride` elements apart.
struct Matrix {
  const void* data = nullptr;
  Type type = kFloat32;
  int64_t rows = 0;
  int64_t columns = 0;
  int64_t stride = 0;
  const float* scales = nullptr;  // [rows], int8 only
};

// A vector of `type`, or absent.
struct Vector {
  const void* data = nullptr;
  Type type = kFloat32;
};

// The input of a matrix product in the forms that the inner loops read; filled by `Kernels::load_input`.
struct Input {
  int64_t tokens = 0;
  int64_t columns = 0;
  int64_t padded = 0;               // columns, rounded up to a multiple of 64
  float* lanes = nullptr;           // [T, padded]: float32 in the lane order of the weights' type
  const uint16_t* halves = nullptr; // [T, padded]: bfloat16 in plain order, where input and weights are bfloat16
  // For int8 weights, in the copies that have byte products: x = step * sum of digit[d] * 256^(digits - 1 - d), where
  // every digit is a signed byte. 0 digits: not in use, and `lanes` is filled instead.
  int digits = 0;
  int8_t* bytes = nullptr;          // [T, digits, padded], in plain order
  int32_t* starts = nullptr;        // [T, digits, 16]: what the products with unsigned weights have too much, negated
  float* steps = nullptr;           // [T]
};

// y = x W^T + bias for a range of rows of W.
struct Linear {
  Matrix weight;
  Vector bias;
  Vector residual;  // [T, rows]
  Input input;
  void* output = nullptr;  // [T, rows]
  Type output_type = kFloat32;
};

struct Selected {
  int32_t channel;
  uint32_t tokens;  // bit t: token t keeps the channel
};

struct Decode {
  // Predictor: `gated` splits the rank between a rebuilt gate and a rebuilt up projection.
  Matrix expand;  // [F, R]
  bool gated = false;
  Vector bias, gate_offset, up_offset, gate_log_noise, up_log_noise;  // [F]
  const float* code = nullptr;  // [T, R]
  int64_t bank_size = 0;
  int64_t active = 0;
  // Packed weights: channel c is [gate row | up row | down column], each P elements.
  const void* packed = nullptr;
  Type packed_type = kFloat32;
  const float* scales = nullptr;  // [F, 3], int8 only
  int64_t hidden = 0;
  int64_t padded_hidden = 0;  // P
  Vector gate_bias, up_bias;  // [F]
  Input input;
};

// One new token's attention over the cache: H query heads share the G key and value heads in groups.
struct Attention {
  Type type = kFloat32;
  const void* query = nullptr;  // [H, head]
  const void* keys = nullptr;   // [G, length, head], strides in elements
  const void* values = nullptr;
  int64_t heads = 0, groups = 0, length = 0, head = 0;
  int64_t key_head_stride = 0, key_stride = 0, value_head_stride = 0, value_stride = 0;
  float scale = 1.0f;
  void* output = nullptr;  // [H, head]
};

// Routing logits of the product form from the rebuilt gate and up projections [T, F], and the gradients of all inputs.
// The vectors have `padded` = F rounded up to whole lines elements.
struct Energy {
  int64_t tokens = 0, channels = 0, padded = 0;
  const float *gate = nullptr, *up = nullptr;                      // [T, F], without their offsets
  const float *gate_offset = nullptr, *up_offset = nullptr;
  const float *gate_noise = nullptr, *up_noise = nullptr;          // variances
  const float* bias = nullptr;
  float* logits = nullptr;                                         // [T, F]
  // Backward.
  const float* gradient = nullptr;                                 // of the logits, [T, F]
  Type gradient_type = kFloat32;
  void *gate_gradient = nullptr, *up_gradient = nullptr;           // [T, F] of gradient_type
  float* sums = nullptr;                                           // [chunks, kEnergySums, padded]
};

// Sums over tokens of the gradients of gate_log_noise and up_log_noise (both per unit of variance), gate_offset,
// up_offset and bias.
inline constexpr int kEnergySums = 5;
// Tokens are added up in chunks of this many, and the chunks in order: the result is that of any number of threads.
inline constexpr int64_t kSumTokens = 128;

// The gate `ste_unit` for rows of one bank of one token each.
struct UnitGate {
  Type type = kFloat32;  // of h, gated, dy and dh
  int64_t bank_size = 0, active = 0;
  float alpha = 1.0f, tau = 1.0f;
  const void* h = nullptr;          // [rows, B]
  const float* logits = nullptr;    // [rows, B]
  void* gated = nullptr;            // [rows, B]
  uint8_t* bits = nullptr;          // [rows, ceil(B / 8)], channel i of the bank in bit i % 8 of byte i / 8
  float* threshold = nullptr;       // [rows]
  float* scale = nullptr;           // [rows], 1 / (tau * standard deviation of the bank's logits)
  // Backward; a gradient that is not wanted is null.
  const void* dy = nullptr;
  void* dh = nullptr;
  float* dz = nullptr;
};

// Cross entropy and KL(teacher || student) of rows of logits, and the gradient of their weighted sum in the student's
// place. Softmax and sums are float32 or better whatever the type.
struct LogitLoss {
  Type type = kFloat32;  // of student and teacher
  int64_t vocabulary = 0;
  void* student = nullptr;        // [rows, V]
  const void* teacher = nullptr;  // [rows, V], or null
  const int64_t* labels = nullptr;
  float ce_weight = 1.0f, kd_weight = 0.0f;
  bool with_gradient = false;
  float* losses = nullptr;        // [rows, 2]: cross entropy and KL, in nats
};

struct Kernels {
  const char* name;
  // Fills `lanes` from x [T, columns] (row-major, float32 or bfloat16) in the lane order of `weights`, or the digits.
  void (*load_input)(const void* x, Type type, Type weights, Input* input);
  void (*linear)(const Linear& problem, int64_t begin, int64_t end);
  // Logits and selection of banks begin..end. `selected` has room for every channel of those banks; `code_lanes` for
  // T * (R + 128) floats. Returns the number of non-finite logits (nothing is selected then).
  int64_t (*select_banks)(const Decode& problem, int64_t begin, int64_t end, float* code_lanes, Selected* selected,
                          int64_t* num_selected);
  // acc [T, P] (in lane order) += the contribution of the selected channels.
  void (*gather)(const Decode& problem, const Selected* selected, int64_t num_selected, float* acc);
  // y [T, hidden] = the sum of `count` accumulators + bias + residual [T, hidden].
  void (*finish)(const Decode& problem, const float* acc, int64_t count, Vector bias, Vector residual, void* y,
                 Type type);
  // Rows of x over their root mean square, times weight; rounded to `type` after each of the two, as transformers does.
  void (*rms_norm)(const void* x, Type type, int64_t rows, int64_t columns, Vector weight, float epsilon, void* out);
  // Rotary position embedding of `heads` rows of one token, in place; cos and sin [head].
  void (*rotate)(void* x, Type type, int64_t heads, int64_t head, Vector cos, Vector sin);
  // Heads of groups begin..end; `scratch` has room for H / G * (length + head) floats.
  void (*attend)(const Attention& problem, int64_t begin, int64_t end, float* scratch);
  // Mask of banks begin..end of float32 logits, and the midpoint of the K-th and (K+1)-th largest of each.
  int64_t (*route)(const float* logits, int64_t begin, int64_t end, int64_t bank_size, int64_t active, uint8_t* mask,
                   float* threshold);
  // out = e^x.
  void (*exponential)(const float* x, int64_t count, float* out);
  // Logits of tokens begin..end.
  void (*energy)(const Energy& problem, int64_t begin, int64_t end);
  // Gradients and sums of chunks begin..end.
  void (*energy_backward)(const Energy& problem, int64_t begin, int64_t end);
  // out [padded] = the sums of number `which` over all chunks.
  void (*add_chunks)(const Energy& problem, int64_t chunks, int64_t which, float* out);
  // Rows begin..end; the forward returns the number of logits that are not finite.
  int64_t (*unit_gate)(const UnitGate& problem, int64_t begin, int64_t end);
  void (*unit_gate_backward)(const UnitGate& problem, int64_t begin, int64_t end);
  // Rows begin..end.
  void (*logit_loss)(const LogitLoss& problem, int64_t begin, int64_t end);
  // A plain read of `bytes` bytes (a multiple of 256), for the streaming rate.
  uint32_t (*stream)(const void* data, int64_t bytes);
};

const Kernels* kernels_baseline();
const Kernels* kernels_avx2();
const Kernels* kernels_avx512();
const Kernels* kernels_avx512_vnni();
const Kernels* kernels_avx512_bf16();

}  // namespace bankwise
