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

struct Kernels {
  const char* name;
  // Fills `lanes` from x [T, columns] (row-major, float32 or bfloat16) in the lane order of `weights`.
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
  // A plain read of `bytes` bytes (a multiple of 256), for the streaming rate.
  uint32_t (*stream)(const void* data, int64_t bytes);
};

const Kernels* kernels_baseline();
const Kernels* kernels_avx2();
const Kernels* kernels_avx512();
const Kernels* kernels_avx512_bf16();

}  // namespace bankwise
