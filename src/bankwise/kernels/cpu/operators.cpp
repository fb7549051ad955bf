// The operators of namespace `bankwise`, on the stable ABI of LibTorch: checks, scratch memory and threads.
//
// Two parallel sections make one decoded token: the predictor's first product (its code is needed by every bank), then
// all the rest, in which every thread owns a range of banks and a private accumulator. The sums are added in thread
// order, so that a result depends on the number of threads but never on their timing.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#if defined(__linux__)
#include <pthread.h>
#include <sys/mman.h>
#endif

#include "kernels.h"

namespace bankwise {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

std::atomic<const Kernels*> current{nullptr};

// The instruction sets that this machine can run, best first.
std::vector<const Kernels*> available() {
  std::vector<const Kernels*> found;
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
  if (vnni && __builtin_cpu_supports("avx512bf16")) found.push_back(kernels_avx512_bf16());
  if (vnni) found.push_back(kernels_avx512_vnni());
  if (avx512) found.push_back(kernels_avx512());
  if (avx2) found.push_back(kernels_avx2());
#endif
  found.push_back(kernels_baseline());
  return found;
}

const Kernels& kernels() {
  const Kernels* chosen = current.load(std::memory_order_acquire);
  if (chosen == nullptr) {
    chosen = available().front();
    current.store(chosen, std::memory_order_release);
  }
  return *chosen;
}

// Names of the instruction sets that can run here, best first; "" or one of them chooses what runs from now on.
std::string choose_isa(std::string wanted) {
  std::string names;
  bool known = wanted.empty();
  for (const Kernels* set : available()) {
    names += (names.empty() ? "" : " ") + std::string(set->name);
    if (wanted == set->name) {
      current.store(set, std::memory_order_release);
      known = true;
    }
  }
  STD_TORCH_CHECK(known, "instruction set ", wanted, " cannot run here; choose one of: ", names);
  return names;
}

std::string current_isa() { return kernels().name; }

// The worker threads of OpenMP do not survive a fork: a child that waited for them would wait for ever.
std::atomic<bool> forked{false};
#if defined(__linux__)
const int fork_handler = pthread_atfork(nullptr, nullptr, [] { forked.store(true); });
#endif

// Below this many bytes of weights, waking a second thread costs more than it saves.
constexpr int64_t kBytesPerThread = 64 * 1024;

int64_t threads_for(int64_t bytes, int64_t most) {
  if (forked.load(std::memory_order_relaxed)) return 1;
  const int64_t wanted = std::min<int64_t>(torch::stable::get_num_threads(), bytes / kBytesPerThread);
  return std::max<int64_t>(1, std::min(wanted, most));
}

// body(part) for every part, in torch's thread pool.
template <class Body>
void parallel(int64_t parts, const Body& body) {
  if (parts == 1) return body(int64_t{0});
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) body(part);
  });
}

// Memory that one calling thread keeps between calls, handed out in 64-byte aligned pieces.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) {
    static thread_local Buffer buffer;
    if (bytes > buffer.size) {
      std::free(buffer.data);
      buffer.size = (bytes + 4095) / 4096 * 4096;
      buffer.data = static_cast<char*>(std::aligned_alloc(4096, buffer.size));
      STD_TORCH_CHECK(buffer.data != nullptr, "no memory for ", bytes, " bytes of scratch space");
    }
    next_ = buffer.data;
  }

  template <class T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(next_);
    next_ += size_of<T>(count);
    return piece;
  }

  template <class T>
  static int64_t size_of(int64_t count) {
    return (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
  }

 private:
  struct Buffer {
    char* data = nullptr;
    int64_t size = 0;
    ~Buffer() { std::free(data); }
  };
  char* next_;
};

Type type_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return kFloat32;
    case ScalarType::BFloat16: return kBFloat16;
    case ScalarType::Char: return kInt8;
    default: STD_TORCH_CHECK(false, name, " must be float32, bfloat16 or int8");
  }
}

int64_t width(Type type) { return type == kFloat32 ? 4 : type == kBFloat16 ? 2 : 1; }

Matrix matrix(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 2 && (tensor.stride(1) == 1 || tensor.size(1) <= 1), name,
                  " must be a matrix with contiguous rows");
  Matrix result;
  result.data = tensor.const_data_ptr();
  result.type = type_of(tensor, name);
  result.rows = tensor.size(0);
  result.columns = tensor.size(1);
  result.stride = tensor.stride(0);
  return result;
}

Vector vector(const std::optional<Tensor>& tensor, int64_t size, const char* name) {
  if (!tensor.has_value()) return {};
  const Type type = type_of(*tensor, name);
  STD_TORCH_CHECK(tensor->dim() == 1 && tensor->size(0) == size && tensor->is_contiguous() && type != kInt8, name,
                  " must be a contiguous float vector of ", size, " elements");
  return {tensor->const_data_ptr(), type};
}

const float* scales_of(const std::optional<Tensor>& scales, Type type, int64_t count) {
  if (type != kInt8) return nullptr;
  STD_TORCH_CHECK(scales.has_value() && scales->scalar_type() == ScalarType::Float && scales->is_contiguous() &&
                      scales->numel() == count,
                  "int8 weights need ", count, " contiguous float32 scales");
  return static_cast<const float*>(scales->const_data_ptr());
}

struct Tokens {
  Tensor rows;  // contiguous
  Type type;
  int64_t count;
  int64_t columns;
  int64_t padded;
};

Tokens tokens_of(const Tensor& x, int64_t columns) {
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) == columns, "the input must end in ", columns, " columns");
  Tensor rows = x.is_contiguous() ? x : torch::stable::contiguous(x);
  const Type type = type_of(rows, "the input");
  STD_TORCH_CHECK(type != kInt8, "the input must be float32 or bfloat16");
  const int64_t count = columns == 0 ? 0 : rows.numel() / columns;
  STD_TORCH_CHECK(count <= kMaxTokens, "at most ", kMaxTokens, " tokens at once, not ", count);
  return {rows, type, count, columns, (columns + 63) / 64 * 64};
}

int64_t input_bytes(const Tokens& tokens) {
  return Scratch::size_of<float>(tokens.count * tokens.padded) +
         // Halves or digits, whichever are more.
         Scratch::size_of<int8_t>(tokens.count * kMaxDigits * tokens.padded) +
         Scratch::size_of<int32_t>(tokens.count * kMaxDigits * 16) + Scratch::size_of<float>(tokens.count);
}

Input load(const Kernels& isa, const Tokens& tokens, Type weights, Scratch& scratch) {
  Input input;
  input.tokens = tokens.count;
  input.columns = tokens.columns;
  input.padded = tokens.padded;
  input.lanes = scratch.take<float>(tokens.count * tokens.padded);
  const void* x = tokens.rows.const_data_ptr();
  if (tokens.type == kBFloat16 && weights == kBFloat16) {
    const uint16_t* halves = static_cast<const uint16_t*>(x);
    if (tokens.padded != tokens.columns) {
      uint16_t* copy = scratch.take<uint16_t>(tokens.count * tokens.padded);
      for (int64_t t = 0; t < tokens.count; ++t) {
        std::copy(halves + t * tokens.columns, halves + (t + 1) * tokens.columns, copy + t * tokens.padded);
        std::fill(copy + t * tokens.padded + tokens.columns, copy + (t + 1) * tokens.padded, uint16_t{0});
      }
      halves = copy;
    }
    input.halves = halves;
  }
  if (weights == kInt8) {
    input.bytes = scratch.take<int8_t>(tokens.count * kMaxDigits * tokens.padded);
    input.starts = scratch.take<int32_t>(tokens.count * kMaxDigits * 16);
    input.steps = scratch.take<float>(tokens.count);
  }
  isa.load_input(x, tokens.type, weights, &input);
  return input;
}

Tensor new_like(const Tensor& x, std::vector<int64_t> shape, ScalarType type) {
  return torch::stable::new_empty(x, shape, type);
}

// The tokens after the RMS norm that stands before a layer, where one is given.
Tokens normalised(const Kernels& isa, const Tokens& tokens, const std::optional<Tensor>& norm, double epsilon) {
  if (!norm.has_value()) return tokens;
  Tokens result = tokens;
  result.rows = new_like(tokens.rows, {tokens.count, tokens.columns}, tokens.rows.scalar_type());
  isa.rms_norm(tokens.rows.const_data_ptr(), tokens.type, tokens.count, tokens.columns,
               vector(norm, tokens.columns, "norm"), static_cast<float>(epsilon), result.rows.mutable_data_ptr());
  return result;
}

std::vector<int64_t> shape_with(const Tensor& x, int64_t last) {
  std::vector<int64_t> shape;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) shape.push_back(x.size(i));
  shape.push_back(last);
  return shape;
}

void run_linear(const Kernels& isa, const Linear& problem) {
  const int64_t rows = problem.weight.rows;
  const int64_t parts = threads_for(rows * problem.weight.columns * width(problem.weight.type), rows);
  parallel(parts, [&](int64_t part) { isa.linear(problem, rows * part / parts, rows * (part + 1) / parts); });
}

Tensor linear(Tensor x, Tensor weight, std::optional<Tensor> scales, std::optional<Tensor> bias) {
  const Kernels& isa = kernels();
  Linear problem;
  problem.weight = matrix(weight, "the weight");
  problem.weight.scales = scales_of(scales, problem.weight.type, problem.weight.rows);
  problem.bias = vector(bias, problem.weight.rows, "the bias");
  const Tokens tokens = tokens_of(x, problem.weight.columns);
  Tensor y = new_like(x, shape_with(x, problem.weight.rows), x.scalar_type());
  if (tokens.count == 0) return y;
  Scratch scratch(input_bytes(tokens));
  problem.input = load(isa, tokens, problem.weight.type, scratch);
  problem.output = y.mutable_data_ptr();
  problem.output_type = tokens.type;
  run_linear(isa, problem);
  return y;
}

Tensor ffn_decode(Tensor x, Tensor packed, std::optional<Tensor> scales, Tensor reduce, Tensor expand,
                  Tensor expand_bias, std::optional<Tensor> gate_offset, std::optional<Tensor> up_offset,
                  std::optional<Tensor> gate_log_noise, std::optional<Tensor> up_log_noise,
                  std::optional<Tensor> gate_bias, std::optional<Tensor> up_bias, std::optional<Tensor> down_bias,
                  int64_t bank_size, int64_t active, std::optional<Tensor> norm, double epsilon) {
  const Kernels& isa = kernels();
  const Matrix reduce_matrix = matrix(reduce, "reduce");
  const int64_t hidden = reduce_matrix.columns, rank = reduce_matrix.rows;

  Decode problem;
  problem.expand = matrix(expand, "expand");
  const int64_t channels = problem.expand.rows;
  STD_TORCH_CHECK(reduce_matrix.type != kInt8 && problem.expand.type != kInt8 && problem.expand.columns == rank,
                  "reduce [R, D] and expand [F, R] must be float matrices of one rank");
  STD_TORCH_CHECK(bank_size >= 1 && bank_size <= kMaxBank && channels % bank_size == 0 && active >= 1 &&
                      active <= bank_size,
                  "cannot keep ", active, " of every ", bank_size, " in ", channels, " channels");
  problem.bias = vector(expand_bias, channels, "expand_bias");
  problem.gated = gate_offset.has_value();
  if (problem.gated) {
    STD_TORCH_CHECK(up_offset.has_value() && gate_log_noise.has_value() && up_log_noise.has_value() && rank % 2 == 0,
                    "the gated predictor needs both offsets, both noises and an even rank");
    problem.gate_offset = vector(gate_offset, channels, "gate_offset");
    problem.up_offset = vector(up_offset, channels, "up_offset");
    problem.gate_log_noise = vector(gate_log_noise, channels, "gate_log_noise");
    problem.up_log_noise = vector(up_log_noise, channels, "up_log_noise");
  }
  problem.bank_size = bank_size;
  problem.active = active;
  problem.packed_type = type_of(packed, "packed");
  STD_TORCH_CHECK(packed.dim() == 3 && packed.is_contiguous() && packed.size(0) == channels && packed.size(1) == 3 &&
                      packed.size(2) >= hidden && packed.size(2) * width(problem.packed_type) % 64 == 0 &&
                      packed.size(2) <= (hidden + 63) / 64 * 64,
                  "packed must be contiguous [F, 3, P], P the hidden size padded to whole 64-byte lines");
  problem.packed = packed.const_data_ptr();
  problem.scales = scales_of(scales, problem.packed_type, channels * 3);
  problem.hidden = hidden;
  problem.padded_hidden = packed.size(2);
  problem.gate_bias = vector(gate_bias, channels, "gate_bias");
  problem.up_bias = vector(up_bias, channels, "up_bias");
  const Vector output_bias = vector(down_bias, hidden, "down_bias");

  const Tokens stream = tokens_of(x, hidden);
  Tensor y = new_like(x, shape_with(x, hidden), x.scalar_type());
  if (stream.count == 0) return y;
  const Tokens tokens = normalised(isa, stream, norm, epsilon);
  const Vector residual = norm.has_value() ? Vector{stream.rows.const_data_ptr(), stream.type} : Vector{};

  const int64_t banks = channels / bank_size;
  const int64_t record = 3 * problem.padded_hidden * width(problem.packed_type);
  const int64_t parts = threads_for(banks * active * record, banks);
  const int64_t code_lanes = tokens.count * (rank + 128), acc_size = tokens.count * problem.padded_hidden;
  Scratch scratch(2 * input_bytes(tokens) + Scratch::size_of<float>(tokens.count * rank) +
                  Scratch::size_of<Selected>(channels + 1) + parts * Scratch::size_of<float>(code_lanes) +
                  parts * Scratch::size_of<float>(acc_size));

  Linear first;
  first.weight = reduce_matrix;
  first.input = load(isa, tokens, reduce_matrix.type, scratch);
  float* code = scratch.take<float>(tokens.count * rank);
  first.output = code;
  first.output_type = kFloat32;
  problem.input = problem.packed_type == reduce_matrix.type ? first.input
                                                            : load(isa, tokens, problem.packed_type, scratch);
  run_linear(isa, first);
  problem.code = code;

  Selected* selected = scratch.take<Selected>(channels + 1);
  float* lanes = scratch.take<float>(parts * (Scratch::size_of<float>(code_lanes) / 4));
  float* acc = scratch.take<float>(parts * acc_size);
  std::atomic<int64_t> not_finite{0};
  parallel(parts, [&](int64_t part) {
    const int64_t begin = banks * part / parts, end = banks * (part + 1) / parts;
    Selected* own = selected + begin * bank_size;
    int64_t count = 0;
    not_finite += isa.select_banks(problem, begin, end, lanes + part * (Scratch::size_of<float>(code_lanes) / 4), own,
                                   &count);
    float* own_acc = acc + part * acc_size;
    std::fill(own_acc, own_acc + acc_size, 0.0f);
    isa.gather(problem, own, count, own_acc);
  });
  STD_TORCH_CHECK(not_finite == 0, "bankwise: ", not_finite.load(), " of ", tokens.count * channels,
                  " router logits are not finite");
  isa.finish(problem, acc, parts, output_bias, residual, y.mutable_data_ptr(), tokens.type);
  return y;
}

// Norm, the three projections and the rotary embedding of one token: what comes before its cache is extended.
std::tuple<Tensor, Tensor, Tensor> attention_input(Tensor x, Tensor norm, double epsilon, Tensor q, Tensor k, Tensor v,
                                                   std::optional<Tensor> q_bias, std::optional<Tensor> k_bias,
                                                   std::optional<Tensor> v_bias, std::optional<Tensor> q_norm,
                                                   std::optional<Tensor> k_norm, Tensor cos, Tensor sin,
                                                   std::optional<Tensor> q_scales, std::optional<Tensor> k_scales,
                                                   std::optional<Tensor> v_scales) {
  const Kernels& isa = kernels();
  const int64_t head = cos.size(cos.dim() - 1);
  STD_TORCH_CHECK(head >= 2 && head % 2 == 0 && cos.numel() == head && sin.numel() == head,
                  "cos and sin must be those of one token");
  const Vector cosines = vector(torch::stable::view(cos, {head}), head, "cos");
  const Vector sines = vector(torch::stable::view(sin, {head}), head, "sin");
  Linear problems[3];
  const Tensor* weights[3] = {&q, &k, &v};
  const std::optional<Tensor>* biases[3] = {&q_bias, &k_bias, &v_bias};
  const std::optional<Tensor>* scales[3] = {&q_scales, &k_scales, &v_scales};
  std::vector<Tensor> outputs;
  int64_t first_row[4] = {};
  for (int i = 0; i < 3; ++i) {
    problems[i].weight = matrix(*weights[i], "a projection");
    const int64_t rows = problems[i].weight.rows;
    STD_TORCH_CHECK(problems[i].weight.type == problems[0].weight.type &&
                        problems[i].weight.columns == problems[0].weight.columns && rows % head == 0 &&
                        rows == (i == 2 ? problems[1].weight.rows : rows),
                    "the projections must be matrices of one type that end in whole heads of ", head);
    problems[i].weight.scales = scales_of(*scales[i], problems[i].weight.type, rows);
    problems[i].bias = vector(*biases[i], rows, "a projection's bias");
    first_row[i + 1] = first_row[i] + rows;
  }
  const Tokens stream = tokens_of(x, problems[0].weight.columns);
  STD_TORCH_CHECK(stream.count == 1, "one token at a time, not ", stream.count);
  const Tokens tokens = normalised(isa, stream, norm, epsilon);
  Scratch scratch(input_bytes(tokens));
  const Input input = load(isa, tokens, problems[0].weight.type, scratch);
  for (int i = 0; i < 3; ++i) {
    outputs.push_back(new_like(x, {1, problems[i].weight.rows / head, 1, head}, x.scalar_type()));
    problems[i].input = input;
    problems[i].output = outputs[i].mutable_data_ptr();
    problems[i].output_type = tokens.type;
  }
  const int64_t rows = first_row[3];
  const int64_t parts = threads_for(rows * tokens.columns * width(problems[0].weight.type), rows);
  parallel(parts, [&](int64_t part) {
    const int64_t begin = rows * part / parts, end = rows * (part + 1) / parts;
    for (int i = 0; i < 3; ++i) {
      const int64_t from = std::max(begin, first_row[i]), to = std::min(end, first_row[i + 1]);
      if (from < to) isa.linear(problems[i], from - first_row[i], to - first_row[i]);
    }
  });
  const std::optional<Tensor>* norms[2] = {&q_norm, &k_norm};
  for (int i = 0; i < 2; ++i) {
    const int64_t heads = problems[i].weight.rows / head;
    if (norms[i]->has_value()) {
      isa.rms_norm(problems[i].output, tokens.type, heads, head, vector(*norms[i], head, "a head's norm"),
                   static_cast<float>(epsilon), problems[i].output);
    }
    isa.rotate(problems[i].output, tokens.type, heads, head, cosines, sines);
  }
  return {outputs[0], outputs[1], outputs[2]};
}

// Attention of one token over its cache, the output projection, and the sum with the residual stream.
Tensor attention_output(Tensor query, Tensor keys, Tensor values, double scale, Tensor weight,
                        std::optional<Tensor> bias, Tensor residual, std::optional<Tensor> scales) {
  const Kernels& isa = kernels();
  Attention problem;
  problem.type = type_of(query, "the query");
  STD_TORCH_CHECK(query.dim() == 4 && keys.dim() == 4 && values.dim() == 4 && query.size(0) == 1 && keys.size(0) == 1 &&
                      values.size(0) == 1 && query.size(2) == 1 && query.is_contiguous(),
                  "attention_output takes one query [1, H, 1, head] and keys and values [1, G, length, head]");
  problem.heads = query.size(1);
  problem.head = query.size(3);
  problem.groups = keys.size(1);
  problem.length = keys.size(2);
  STD_TORCH_CHECK(problem.type != kInt8 && keys.scalar_type() == query.scalar_type() &&
                      values.scalar_type() == query.scalar_type() && problem.groups > 0 &&
                      problem.heads % problem.groups == 0 && keys.size(3) == problem.head && keys.stride(3) == 1 &&
                      values.stride(3) == 1 && values.size(1) == problem.groups && values.size(2) == problem.length &&
                      values.size(3) == problem.head && problem.length > 0,
                  "keys and values must have the query's type and head size, and heads that divide its heads");
  problem.query = query.const_data_ptr();
  problem.keys = keys.const_data_ptr();
  problem.values = values.const_data_ptr();
  problem.key_head_stride = keys.stride(1);
  problem.key_stride = keys.stride(2);
  problem.value_head_stride = values.stride(1);
  problem.value_stride = values.stride(2);
  problem.scale = static_cast<float>(scale);

  const int64_t width_in = problem.heads * problem.head;
  Linear projection;
  projection.weight = matrix(weight, "the output projection");
  projection.weight.scales = scales_of(scales, projection.weight.type, projection.weight.rows);
  STD_TORCH_CHECK(projection.weight.columns == width_in &&
                      residual.numel() == projection.weight.rows && residual.is_contiguous() &&
                      residual.scalar_type() == query.scalar_type(),
                  "the output projection must take all heads and give one residual row");
  projection.bias = vector(bias, projection.weight.rows, "the bias");
  Tensor heads = new_like(query, {1, width_in}, query.scalar_type());
  Tensor y = new_like(residual, shape_with(residual, projection.weight.rows), residual.scalar_type());
  const Tokens tokens = tokens_of(heads, width_in);
  const int64_t shared = problem.heads / problem.groups;
  const int64_t parts = threads_for(2 * problem.groups * problem.length * problem.head * width(problem.type),
                                    problem.groups);
  const int64_t own = Scratch::size_of<float>(shared * (problem.length + 2 * (problem.head + 64))) / 4;
  Scratch scratch(input_bytes(tokens) + parts * own * 4);
  float* pieces = scratch.take<float>(parts * own);
  problem.output = heads.mutable_data_ptr();
  parallel(parts, [&](int64_t part) {
    isa.attend(problem, problem.groups * part / parts, problem.groups * (part + 1) / parts, pieces + part * own);
  });
  projection.input = load(isa, tokens, projection.weight.type, scratch);
  projection.residual = {residual.const_data_ptr(), problem.type};
  projection.output = y.mutable_data_ptr();
  projection.output_type = problem.type;
  run_linear(isa, projection);
  return y;
}

std::tuple<Tensor, Tensor> route(Tensor logits, int64_t bank_size, int64_t active) {
  const Kernels& isa = kernels();
  const int64_t dims = logits.dim();
  const int64_t channels = dims == 0 ? 0 : logits.size(dims - 1);
  STD_TORCH_CHECK(bank_size >= 1 && bank_size <= kMaxBank && dims > 0 && channels % bank_size == 0 && active >= 1 &&
                      active <= bank_size,
                  "cannot keep ", active, " of every ", bank_size, " in ", channels, " channels");
  STD_TORCH_CHECK(logits.scalar_type() == ScalarType::Float, "router logits must be float32");
  const Tensor z = logits.is_contiguous() ? logits : torch::stable::contiguous(logits);
  Tensor mask = new_like(z, shape_with(z, channels), ScalarType::Bool);
  std::vector<int64_t> shape = shape_with(z, channels / bank_size);
  shape.push_back(active < bank_size);
  Tensor threshold = new_like(z, shape, ScalarType::Float);
  const int64_t banks = z.numel() / bank_size;
  const int64_t parts = threads_for(4 * z.numel(), banks);
  std::atomic<int64_t> not_finite{0};
  parallel(parts, [&](int64_t part) {
    not_finite += isa.route(static_cast<const float*>(z.const_data_ptr()), banks * part / parts,
                            banks * (part + 1) / parts, bank_size, active,
                            static_cast<uint8_t*>(mask.mutable_data_ptr()),
                            static_cast<float*>(threshold.mutable_data_ptr()));
  });
  STD_TORCH_CHECK(not_finite == 0, "bankwise: ", not_finite.load(), " of ", z.numel(),
                  " router logits are not finite");
  return {mask, threshold};
}

// A contiguous float32 tensor's data.
const float* floats(const Tensor& tensor, int64_t count, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float && tensor.is_contiguous() && tensor.numel() == count, name,
                  " must be contiguous float32 of ", count, " elements");
  return static_cast<const float*>(tensor.const_data_ptr());
}

// The vectors of the product form in whole lines; the noises as variances.
class EnergyVectors {
 public:
  EnergyVectors(const Kernels& isa, Energy* problem, const Tensor& gate, const Tensor& gate_offset,
                const Tensor& up_offset, const Tensor& gate_log_noise, const Tensor& up_log_noise,
                const std::optional<Tensor>& bias) {
    STD_TORCH_CHECK(gate.dim() == 2, "gate and up must be [T, F]");
    problem->tokens = gate.size(0);
    problem->channels = gate.size(1);
    problem->padded = (problem->channels + 63) / 64 * 64;
    values_.assign(5 * problem->padded, 0.0f);
    problem->gate_offset = copy(*problem, gate_offset, "gate_offset");
    problem->up_offset = copy(*problem, up_offset, "up_offset");
    float* gate_noise = copy(*problem, gate_log_noise, "gate_log_noise");
    float* up_noise = copy(*problem, up_log_noise, "up_log_noise");
    isa.exponential(gate_noise, problem->padded, gate_noise);
    isa.exponential(up_noise, problem->padded, up_noise);
    problem->gate_noise = gate_noise;
    problem->up_noise = up_noise;
    if (bias.has_value()) problem->bias = copy(*problem, *bias, "bias");
  }

 private:
  float* copy(const Energy& problem, const Tensor& vector, const char* name) {
    const float* from = floats(vector, problem.channels, name);
    float* to = values_.data() + problem.padded * taken_++;
    std::copy(from, from + problem.channels, to);
    return to;
  }

  std::vector<float> values_;
  int64_t taken_ = 0;
};

Tensor energy_logits(Tensor gate, Tensor up, Tensor gate_offset, Tensor up_offset, Tensor gate_log_noise,
                     Tensor up_log_noise, Tensor bias) {
  const Kernels& isa = kernels();
  Energy problem;
  const EnergyVectors vectors(isa, &problem, gate, gate_offset, up_offset, gate_log_noise, up_log_noise, bias);
  const int64_t count = problem.tokens * problem.channels;
  problem.gate = floats(gate, count, "gate");
  problem.up = floats(up, count, "up");
  Tensor logits = new_like(gate, {problem.tokens, problem.channels}, ScalarType::Float);
  problem.logits = static_cast<float*>(logits.mutable_data_ptr());
  const int64_t parts = threads_for(4 * count, problem.tokens);
  parallel(parts, [&](int64_t part) {
    isa.energy(problem, problem.tokens * part / parts, problem.tokens * (part + 1) / parts);
  });
  return logits;
}

// Gradients of gate and up [T, F] (float32 or rounded to bfloat16), gate_offset, up_offset, gate_log_noise, up_log_noise and bias [F].
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> energy_logits_backward(
    Tensor gradient, Tensor gate, Tensor up, Tensor gate_offset, Tensor up_offset, Tensor gate_log_noise,
    Tensor up_log_noise, bool rounded) {
  const Kernels& isa = kernels();
  Energy problem;
  const EnergyVectors vectors(isa, &problem, gate, gate_offset, up_offset, gate_log_noise, up_log_noise, std::nullopt);
  const int64_t count = problem.tokens * problem.channels;
  problem.gate = floats(gate, count, "gate");
  problem.up = floats(up, count, "up");
  problem.gradient = floats(gradient, count, "the gradient of the logits");
  const ScalarType type = rounded ? ScalarType::BFloat16 : ScalarType::Float;
  Tensor gate_gradient = new_like(gate, {problem.tokens, problem.channels}, type);
  Tensor up_gradient = new_like(gate, {problem.tokens, problem.channels}, type);
  problem.gradient_type = rounded ? kBFloat16 : kFloat32;
  problem.gate_gradient = gate_gradient.mutable_data_ptr();
  problem.up_gradient = up_gradient.mutable_data_ptr();
  const int64_t chunks = (problem.tokens + kSumTokens - 1) / kSumTokens;
  const int64_t num_sums = std::max<int64_t>(chunks, 1) * kEnergySums * problem.padded;
  Scratch scratch(Scratch::size_of<float>(num_sums));
  problem.sums = scratch.take<float>(num_sums);
  const int64_t parts = threads_for(4 * count, chunks);
  parallel(parts, [&](int64_t part) {
    isa.energy_backward(problem, chunks * part / parts, chunks * (part + 1) / parts);
  });
  std::vector<Tensor> sums;
  for (int64_t which = 0; which < kEnergySums; ++which) {
    sums.push_back(new_like(gate, {problem.channels}, ScalarType::Float));
    isa.add_chunks(problem, chunks, which, static_cast<float*>(sums.back().mutable_data_ptr()));
  }
  return {gate_gradient, up_gradient, sums[2], sums[3], sums[0], sums[1], sums[4]};
}

// The parts of a gate problem that both directions share; returns the number of rows (banks of tokens).
int64_t gate_rows(UnitGate* problem, const Tensor& h, const Tensor& logits, int64_t bank_size) {
  const int64_t channels = h.dim() == 0 ? 0 : h.size(h.dim() - 1);
  STD_TORCH_CHECK(bank_size >= 1 && bank_size <= kMaxBank && channels % bank_size == 0, "cannot cut ", channels,
                  " channels into banks of ", bank_size);
  problem->type = type_of(h, "h");
  STD_TORCH_CHECK(problem->type != kInt8 && h.is_contiguous(), "h must be contiguous float32 or bfloat16");
  problem->bank_size = bank_size;
  problem->h = h.const_data_ptr();
  problem->logits = floats(logits, h.numel(), "the logits");
  return h.numel() / bank_size;
}

std::vector<int64_t> shape_of(const Tensor& x) { return shape_with(x, x.size(x.dim() - 1)); }

// gated = h * mask; the mask in bits, the threshold and 1 / width of every bank.
std::tuple<Tensor, Tensor, Tensor, Tensor> unit_gate_cpu(Tensor h, Tensor logits, int64_t bank_size, int64_t active,
                                                         double tau) {
  const Kernels& isa = kernels();
  UnitGate problem;
  const int64_t rows = gate_rows(&problem, h, logits, bank_size);
  STD_TORCH_CHECK(active >= 1 && active < bank_size, "cannot cut ", active, " of every ", bank_size);
  problem.active = active;
  problem.tau = static_cast<float>(tau);
  Tensor gated = new_like(h, shape_of(h), h.scalar_type());
  Tensor bits = new_like(h, {rows, (bank_size + 7) / 8}, ScalarType::Byte);
  Tensor threshold = new_like(h, {rows}, ScalarType::Float);
  Tensor scale = new_like(h, {rows}, ScalarType::Float);
  problem.gated = gated.mutable_data_ptr();
  problem.bits = static_cast<uint8_t*>(bits.mutable_data_ptr());
  problem.threshold = static_cast<float*>(threshold.mutable_data_ptr());
  problem.scale = static_cast<float*>(scale.mutable_data_ptr());
  const int64_t parts = threads_for(4 * h.numel(), rows);
  std::atomic<int64_t> not_finite{0};
  parallel(parts, [&](int64_t part) {
    not_finite += isa.unit_gate(problem, rows * part / parts, rows * (part + 1) / parts);
  });
  STD_TORCH_CHECK(not_finite == 0, "bankwise: ", not_finite.load(), " of ", h.numel(),
                  " router logits are not finite");
  return {gated, bits, threshold, scale};
}

// Gradients of h and of the logits; one that is not wanted is empty.
std::tuple<Tensor, Tensor> unit_gate_cpu_backward(Tensor dy, Tensor h, Tensor logits, Tensor bits, Tensor threshold,
                                                  Tensor scale, int64_t bank_size, double alpha, bool with_dh,
                                                  bool with_dz) {
  const Kernels& isa = kernels();
  UnitGate problem;
  const int64_t rows = gate_rows(&problem, h, logits, bank_size);
  STD_TORCH_CHECK(dy.is_contiguous() && dy.numel() == h.numel() && dy.scalar_type() == h.scalar_type(),
                  "dy must be contiguous and of the shape and type of h");
  STD_TORCH_CHECK(bits.scalar_type() == ScalarType::Byte && bits.is_contiguous() &&
                      bits.numel() == rows * ((bank_size + 7) / 8),
                  "bits must be those of the forward");
  problem.alpha = static_cast<float>(alpha);
  problem.dy = dy.const_data_ptr();
  problem.bits = static_cast<uint8_t*>(const_cast<void*>(bits.const_data_ptr()));
  problem.threshold = const_cast<float*>(floats(threshold, rows, "threshold"));
  problem.scale = const_cast<float*>(floats(scale, rows, "scale"));
  Tensor dh = new_like(h, with_dh ? shape_of(h) : std::vector<int64_t>{0}, h.scalar_type());
  Tensor dz = new_like(h, with_dz ? shape_of(h) : std::vector<int64_t>{0}, ScalarType::Float);
  if (with_dh) problem.dh = dh.mutable_data_ptr();
  if (with_dz) problem.dz = static_cast<float*>(dz.mutable_data_ptr());
  const int64_t parts = threads_for(4 * h.numel(), rows);
  parallel(parts, [&](int64_t part) {
    isa.unit_gate_backward(problem, rows * part / parts, rows * (part + 1) / parts);
  });
  return {dh, dz};
}

// [rows, 2]: cross entropy and KL(teacher || student) of every row; with_gradient, `logits` become the gradient.
Tensor logit_loss(Tensor logits, std::optional<Tensor> teacher, Tensor labels, double ce_weight, double kd_weight,
                  bool with_gradient) {
  const Kernels& isa = kernels();
  LogitLoss problem;
  problem.type = type_of(logits, "logits");
  STD_TORCH_CHECK(problem.type != kInt8 && logits.dim() == 2 && logits.is_contiguous(),
                  "logits must be contiguous float32 or bfloat16 [rows, vocabulary]");
  const int64_t rows = logits.size(0);
  problem.vocabulary = logits.size(1);
  if (teacher.has_value()) {
    STD_TORCH_CHECK(teacher->is_contiguous() && teacher->scalar_type() == logits.scalar_type() && teacher->dim() == 2 &&
                        teacher->size(0) == rows && teacher->size(1) == problem.vocabulary,
                    "the teacher's logits must be contiguous and of the shape and type of the student's");
    problem.teacher = teacher->const_data_ptr();
  }
  STD_TORCH_CHECK(labels.scalar_type() == ScalarType::Long && labels.is_contiguous() && labels.numel() == rows,
                  "labels must be contiguous int64, one for each row of logits");
  problem.labels = static_cast<const int64_t*>(labels.const_data_ptr());
  for (int64_t r = 0; r < rows; ++r) {
    STD_TORCH_CHECK(problem.labels[r] >= 0 && problem.labels[r] < problem.vocabulary, "label ", problem.labels[r],
                    " is outside the vocabulary of ", problem.vocabulary);
  }
  problem.ce_weight = static_cast<float>(ce_weight);
  problem.kd_weight = static_cast<float>(kd_weight);
  problem.with_gradient = with_gradient;
  problem.student = with_gradient ? logits.mutable_data_ptr() : const_cast<void*>(logits.const_data_ptr());
  Tensor losses = new_like(logits, {rows, 2}, ScalarType::Float);
  problem.losses = static_cast<float*>(losses.mutable_data_ptr());
  const int64_t parts = threads_for(logits.numel() * logits.element_size(), rows);
  parallel(parts,
           [&](int64_t part) { isa.logit_loss(problem, rows * part / parts, rows * (part + 1) / parts); });
  return losses;
}

int64_t stream_read(Tensor data) {
  const Kernels& isa = kernels();
  STD_TORCH_CHECK(data.is_contiguous(), "the data to read must be contiguous");
  const int64_t blocks = data.numel() * data.element_size() / 256;
  const int64_t parts = threads_for(blocks * 256, std::max<int64_t>(blocks, 1));
  const char* bytes = static_cast<const char*>(data.const_data_ptr());
  std::atomic<int64_t> total{0};
  parallel(parts, [&](int64_t part) {
    const int64_t begin = blocks * part / parts, end = blocks * (part + 1) / parts;
    total += isa.stream(bytes + begin * 256, (end - begin) * 256);
  });
  return total;
}

// Asks the kernel for 2 MB pages under a tensor that nothing was written to yet.
void advise_huge_pages(Tensor tensor) {
#if defined(__linux__)
  constexpr uintptr_t kPage = 2 * 1024 * 1024;
  const uintptr_t start = reinterpret_cast<uintptr_t>(tensor.mutable_data_ptr());
  const uintptr_t end = start + tensor.numel() * tensor.element_size();
  const uintptr_t first = (start + kPage - 1) / kPage * kPage, last = end / kPage * kPage;
  // Only advice: where it is refused, the memory works as before.
  if (first < last) (void)madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)tensor;
#endif
}

}  // namespace
}  // namespace bankwise

STABLE_TORCH_LIBRARY(bankwise, m) {
  m.def(
      "ffn_decode(Tensor x, Tensor packed, Tensor? scales, Tensor reduce, Tensor expand, Tensor expand_bias, "
      "Tensor? gate_offset, Tensor? up_offset, Tensor? gate_log_noise, Tensor? up_log_noise, Tensor? gate_bias, "
      "Tensor? up_bias, Tensor? down_bias, int bank_size, int active, Tensor? norm=None, float epsilon=0.) -> Tensor");
  m.def(
      "attention_input(Tensor x, Tensor norm, float epsilon, Tensor q, Tensor k, Tensor v, Tensor? q_bias, "
      "Tensor? k_bias, Tensor? v_bias, Tensor? q_norm, Tensor? k_norm, Tensor cos, Tensor sin, "
      "Tensor? q_scales=None, Tensor? k_scales=None, Tensor? v_scales=None) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "attention_output(Tensor query, Tensor keys, Tensor values, float scale, Tensor weight, Tensor? bias, "
      "Tensor residual, Tensor? scales=None) -> Tensor");
  m.def("linear(Tensor x, Tensor weight, Tensor? scales, Tensor? bias) -> Tensor");
  m.def("route(Tensor logits, int bank_size, int active) -> (Tensor, Tensor)");
  m.def(
      "energy_logits(Tensor gate, Tensor up, Tensor gate_offset, Tensor up_offset, Tensor gate_log_noise, "
      "Tensor up_log_noise, Tensor bias) -> Tensor");
  m.def(
      "energy_logits_backward(Tensor gradient, Tensor gate, Tensor up, Tensor gate_offset, Tensor up_offset, "
      "Tensor gate_log_noise, Tensor up_log_noise, bool rounded) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "unit_gate_cpu(Tensor h, Tensor logits, int bank_size, int active, float tau) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "unit_gate_cpu_backward(Tensor dy, Tensor h, Tensor logits, Tensor bits, Tensor threshold, Tensor scale, "
      "int bank_size, float alpha, bool with_dh, bool with_dz) -> (Tensor, Tensor)");
  m.def(
      "logit_loss(Tensor(a!) logits, Tensor? teacher, Tensor labels, float ce_weight, float kd_weight, "
      "bool with_gradient) -> Tensor");
  m.def("stream_read(Tensor data) -> int");
  m.def("advise_huge_pages(Tensor(a!) data) -> ()");
  m.def("choose_isa(str wanted) -> str");
  m.def("current_isa() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(bankwise, CPU, m) {
  m.impl("ffn_decode", TORCH_BOX(&bankwise::ffn_decode));
  m.impl("attention_input", TORCH_BOX(&bankwise::attention_input));
  m.impl("attention_output", TORCH_BOX(&bankwise::attention_output));
  m.impl("linear", TORCH_BOX(&bankwise::linear));
  m.impl("route", TORCH_BOX(&bankwise::route));
  m.impl("energy_logits", TORCH_BOX(&bankwise::energy_logits));
  m.impl("energy_logits_backward", TORCH_BOX(&bankwise::energy_logits_backward));
  m.impl("unit_gate_cpu", TORCH_BOX(&bankwise::unit_gate_cpu));
  m.impl("unit_gate_cpu_backward", TORCH_BOX(&bankwise::unit_gate_cpu_backward));
  m.impl("logit_loss", TORCH_BOX(&bankwise::logit_loss));
  m.impl("stream_read", TORCH_BOX(&bankwise::stream_read));
  m.impl("advise_huge_pages", TORCH_BOX(&bankwise::advise_huge_pages));
}

STABLE_TORCH_LIBRARY_IMPL(bankwise, CompositeExplicitAutograd, m) {
  m.impl("choose_isa", TORCH_BOX(&bankwise::choose_isa));
  m.impl("current_isa", TORCH_BOX(&bankwise::current_isa));
}
