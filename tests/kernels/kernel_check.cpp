// The table of one instruction set (BANKWISE_ISA) against plain loops in double, without torch: also runs where torch
// does not, such as under an emulator of another processor. Prints what is wrong, or how many cases agree.
#include <math.h>
#include <stdio.h>
#include <string.h>

#include <algorithm>
#include <random>
#include <string>
#include <vector>

#include "kernels.h"

#define CONCAT_(a, b) a##b
#define CONCAT(a, b) CONCAT_(a, b)

namespace {

using namespace bankwise;

const Kernels& table = *CONCAT(kernels_, BANKWISE_ISA)();
std::mt19937 generator;
int failures = 0;

void check(bool is_right, const std::string& what) {
  if (is_right) return;
  if (++failures <= 20) printf("%s: %s is wrong\n", table.name, what.c_str());
}

int64_t pick(std::initializer_list<int64_t> choices) { return choices.begin()[generator() % choices.size()]; }

double from_half(uint16_t half) {
  const uint32_t word = (uint32_t)half << 16;
  float value;
  memcpy(&value, &word, 4);
  return value;
}

uint16_t to_half(float value) {
  uint32_t word;
  memcpy(&word, &value, 4);
  return (uint16_t)((word + 0x7fff + ((word >> 16) & 1)) >> 16);
}

// Random numbers stored as one of the three types, on a 64-byte boundary, and what they mean.
struct Numbers {
  Type type;
  std::vector<double> exact;

  Numbers(Type of, int64_t count, double spread = 1.0) : type(of), exact(count), room_(count * 4 + 64) {
    std::normal_distribution<float> normal(0.0f, (float)spread);
    for (int64_t i = 0; i < count; ++i) {
      set(i, type == kInt8 ? (float)((int)(generator() % 255) - 127) : normal(generator));
    }
  }

  char* data() { return room_.data() + (64 - (uintptr_t)room_.data() % 64) % 64; }
  float* floats() { return (float*)data(); }
  Vector vector() { return {data(), type}; }

  void set(int64_t i, float value) {
    if (type == kFloat32) memcpy(data() + 4 * i, &value, 4);
    if (type == kInt8) data()[i] = (char)(int8_t)value;
    const uint16_t half = to_half(value);
    if (type == kBFloat16) memcpy(data() + 2 * i, &half, 2);
    exact[i] = type == kBFloat16 ? from_half(half) : value;
  }

 private:
  std::vector<char> room_;
};

const char* name_of(Type type) { return type == kFloat32 ? "float32" : type == kBFloat16 ? "bfloat16" : "int8"; }

int64_t padded(int64_t columns) { return (columns + 63) / 64 * 64; }

// The input as operators.cpp prepares it.
struct Prepared {
  Input input;
  Numbers lanes, halves;
  std::vector<int8_t> bytes;
  std::vector<int32_t> starts;
  std::vector<float> steps;

  Prepared(Numbers& x, int64_t tokens, int64_t columns, Type weights)
      : lanes(kFloat32, tokens * padded(columns)), halves(kBFloat16, tokens * padded(columns), 0.0),
        bytes(tokens * kMaxDigits * padded(columns)), starts(tokens * kMaxDigits * 16), steps(tokens) {
    input.tokens = tokens;
    input.columns = columns;
    input.padded = padded(columns);
    input.lanes = lanes.floats();
    if (weights == kInt8) {
      input.bytes = bytes.data();
      input.starts = starts.data();
      input.steps = steps.data();
    }
    if (x.type == kBFloat16 && weights == kBFloat16) {
      for (int64_t t = 0; t < tokens; ++t) {
        for (int64_t i = 0; i < columns; ++i) halves.set(t * input.padded + i, (float)x.exact[t * columns + i]);
      }
      input.halves = (const uint16_t*)halves.data();
    }
    table.load_input(x.data(), x.type, weights, &input);
  }
};

// What fixed point of 16 bits may be off, relative to the largest element (0 for float32, which is not cut to 16 bits).
double fixed_step(Type weights, Type x) { return weights == kInt8 && x == kBFloat16 ? 0.5 / 32512 : 0.0; }

void check_linear() {
  const Type x_type = pick({0, 1}) ? kBFloat16 : kFloat32, type = (Type)pick({kFloat32, kBFloat16, kInt8});
  const int64_t tokens = 1 + generator() % kMaxTokens, rows = pick({1, 2, 5, 33});
  const int64_t columns = pick({1, 7, 16, 31, 64, 65, 100, 257, 576});
  const int64_t stride = columns + pick({0, 3});
  Numbers x(x_type, tokens * columns), weight(type, rows * stride), bias(kBFloat16, rows);
  Numbers residual(x_type, tokens * rows), scales(kFloat32, rows), y(kFloat32, tokens * rows);
  const Prepared prepared(x, tokens, columns, type);
  Linear problem;
  problem.weight = {weight.data(), type, rows, columns, stride, scales.floats()};
  problem.bias = bias.vector();
  problem.residual = residual.vector();
  problem.input = prepared.input;
  problem.output = y.data();
  table.linear(problem, 0, rows);
  for (int64_t t = 0; t < tokens; ++t) {
    double largest = 0.0;
    for (int64_t i = 0; i < columns; ++i) largest = std::max(largest, fabs(x.exact[t * columns + i]));
    for (int64_t row = 0; row < rows; ++row) {
      const double scale = type == kInt8 ? scales.exact[row] : 1.0;
      double sum = bias.exact[row] + residual.exact[t * rows + row], size = fabs(sum), weights = 0.0;
      for (int64_t i = 0; i < columns; ++i) {
        const double term = weight.exact[row * stride + i] * scale * x.exact[t * columns + i];
        sum += term;
        size += fabs(term);
        weights += fabs(weight.exact[row * stride + i] * scale);
      }
      const double error = fabs(y.floats()[t * rows + row] - sum);
      check(error <= 1e-6 * size + fixed_step(type, x_type) * largest * weights,
            "linear, " + std::string(name_of(type)) + " weights, " + std::to_string(columns) + " columns");
    }
  }
}

// The `active` largest of z, the lower index among equals.
std::vector<bool> top(const float* z, int64_t size, int64_t active) {
  std::vector<int64_t> order(size);
  for (int64_t i = 0; i < size; ++i) order[i] = i;
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return z[a] > z[b]; });
  std::vector<bool> kept(size);
  for (int64_t i = 0; i < active; ++i) kept[order[i]] = true;
  return kept;
}

void check_route() {
  const int64_t size = pick({1, 3, 16, 40, 64, 65, 130}), active = 1 + generator() % size, banks = 1 + generator() % 4;
  Numbers logits(kFloat32, banks * size);
  if (pick({0, 1})) {
    for (int64_t i = 0; i < banks * size; ++i) logits.set(i, roundf(logits.floats()[i]));
  }
  std::vector<uint8_t> mask(banks * size);
  std::vector<float> threshold(banks);
  check(table.route(logits.floats(), 0, banks, size, active, mask.data(), threshold.data()) == 0, "route's count");
  for (int64_t n = 0; n < banks; ++n) {
    const std::vector<bool> kept = top(logits.floats() + n * size, size, active);
    for (int64_t i = 0; i < size; ++i) check(mask[n * size + i] == kept[i], "route's mask");
  }
  logits.set(generator() % (banks * size), NAN);
  check(table.route(logits.floats(), 0, banks, size, active, mask.data(), threshold.data()) == 1, "route of NaN");
}

double silu(double gate) { return gate / (1.0 + exp(-gate)); }

// One layer: select_banks, gather and finish. Of logits closer than 1e-4 either may be selected.
void check_decode() {
  const Type x_type = pick({0, 1}) ? kBFloat16 : kFloat32;
  const Type type = pick({0, 1}) ? kInt8 : x_type;
  const Type expand_type = pick({0, 1}) ? kBFloat16 : kFloat32;
  const int64_t tokens = 1 + generator() % kMaxTokens;
  const int64_t size = pick({3, 16, 40, 64, 64, 65}), active = 1 + generator() % size;
  const int64_t banks = 1 + generator() % 3, channels = banks * size, rank = pick({1, 5, 16, 40});
  const bool gated = pick({0, 1});
  const int64_t width = gated ? 2 * rank : rank;
  const int64_t hidden = pick({1, 7, 16, 33, 64, 100, 160});
  const int64_t line = type == kFloat32 ? 16 : type == kBFloat16 ? 32 : 64, P = (hidden + line - 1) / line * line;
  Numbers x(x_type, tokens * hidden), code(kFloat32, tokens * width), expand(expand_type, channels * width, 0.3);
  Numbers bias(kFloat32, channels, 3.0), gate_offset(kFloat32, channels), up_offset(kBFloat16, channels);
  Numbers gate_noise(kFloat32, channels), up_noise(kBFloat16, channels);
  Numbers packed(type, channels * 3 * P, 0.3), scales(kFloat32, channels * 3, 0.02);
  Numbers gate_bias(x_type, channels), up_bias(x_type, channels), down_bias(kFloat32, hidden);
  for (int64_t row = 0; row < channels * 3; ++row) {
    for (int64_t i = hidden; i < P; ++i) packed.set(row * P + i, 0.0f);
  }
  const Prepared prepared(x, tokens, hidden, type);
  Decode problem;
  problem.expand = {expand.data(), expand_type, channels, width, width};
  problem.gated = gated;
  problem.bias = bias.vector();
  if (gated) {
    problem.gate_offset = gate_offset.vector();
    problem.up_offset = up_offset.vector();
    problem.gate_log_noise = gate_noise.vector();
    problem.up_log_noise = up_noise.vector();
  }
  problem.code = code.floats();
  problem.bank_size = size;
  problem.active = active;
  problem.packed = packed.data();
  problem.packed_type = type;
  problem.scales = type == kInt8 ? scales.floats() : nullptr;
  problem.hidden = hidden;
  problem.padded_hidden = P;
  problem.gate_bias = gate_bias.vector();
  problem.up_bias = up_bias.vector();
  problem.input = prepared.input;

  Numbers lanes(kFloat32, tokens * (width + 128)), acc(kFloat32, tokens * P, 0.0), y(kFloat32, tokens * hidden);
  std::vector<Selected> selected(channels + 1);
  int64_t count = 0;
  check(table.select_banks(problem, 0, banks, lanes.floats(), selected.data(), &count) == 0, "select_banks' count");
  std::vector<uint32_t> keeps(channels);
  for (int64_t s = 0; s < count; ++s) keeps[selected[s].channel] = selected[s].tokens;
  for (int64_t t = 0; t < tokens; ++t) {
    std::vector<double> logits(channels);
    for (int64_t c = 0; c < channels; ++c) {
      double parts[2] = {};
      for (int64_t i = 0; i < width; ++i) parts[i / rank] += expand.exact[c * width + i] * code.exact[t * width + i];
      const double gate = parts[0] + gate_offset.exact[c], up = parts[1] + up_offset.exact[c];
      const double energy = log(gate * gate + exp(gate_noise.exact[c])) + log(up * up + exp(up_noise.exact[c])) +
                            2.0 * (gate < 0 ? gate - log1p(exp(gate)) : -log1p(exp(-gate)));
      logits[c] = (gated ? energy : parts[0]) + bias.exact[c];
    }
    for (int64_t n = 0; n < banks; ++n) {
      double lowest = INFINITY, highest = -INFINITY;
      int64_t kept = 0;
      for (int64_t c = n * size; c < (n + 1) * size; ++c) {
        const bool is_kept = (keeps[c] >> t) & 1;
        kept += is_kept;
        if (is_kept) lowest = std::min(lowest, logits[c]);
        if (!is_kept) highest = std::max(highest, logits[c]);
      }
      check(kept == active && lowest > highest - 1e-4, "select_banks' choice");
    }
  }
  table.gather(problem, selected.data(), count, acc.floats());
  table.finish(problem, acc.floats(), 1, down_bias.vector(), x.vector(), y.data(), kFloat32);
  for (int64_t t = 0; t < tokens; ++t) {
    std::vector<double> exact(hidden), sizes(hidden);
    double largest = 0.0, largest_h = 0.0;
    for (int64_t i = 0; i < hidden; ++i) largest = std::max(largest, fabs(x.exact[t * hidden + i]));
    // Error of h, as far as it comes from the digits of x; that of the digits of h itself follows below.
    std::vector<double> h(channels), h_error(channels);
    for (int64_t c = 0; c < channels; ++c) {
      if (((keeps[c] >> t) & 1) == 0) continue;
      double both[2], size_of[2], error[2];
      for (int part = 0; part < 2; ++part) {
        const double scale = type == kInt8 ? scales.exact[3 * c + part] : 1.0;
        both[part] = (part == 0 ? gate_bias : up_bias).exact[c];
        size_of[part] = fabs(both[part]);
        double weights = 0.0;
        for (int64_t i = 0; i < hidden; ++i) {
          const double weight = packed.exact[(3 * c + part) * P + i] * scale;
          both[part] += weight * x.exact[t * hidden + i];
          size_of[part] += fabs(weight * x.exact[t * hidden + i]);
          weights += fabs(weight);
        }
        error[part] = 1e-6 * size_of[part] + fixed_step(type, x_type) * largest * weights;
      }
      const double down_scale = type == kInt8 ? scales.exact[3 * c + 2] : 1.0;
      h[c] = silu(both[0]) * both[1] * down_scale;
      // The slope of SiLU is at most 1.1.
      h_error[c] = fabs(down_scale) * (1.1 * error[0] * fabs(both[1]) + fabs(silu(both[0])) * error[1]);
      h_error[c] += 1e-6 * fabs(h[c]);
      largest_h = std::max(largest_h, fabs(h[c]));
    }
    for (int64_t i = 0; i < hidden; ++i) {
      exact[i] = down_bias.exact[i] + x.exact[t * hidden + i];
      sizes[i] = 1e-6 * fabs(exact[i]);
      for (int64_t c = 0; c < channels; ++c) {
        const double down = packed.exact[(3 * c + 2) * P + i];
        exact[i] += h[c] * down;
        if (h[c] != 0.0) {
          sizes[i] += fabs(down) * (h_error[c] + 1e-6 * fabs(h[c]) + fixed_step(type, x_type) * largest_h);
        }
      }
      check(fabs(y.floats()[t * hidden + i] - exact[i]) <= sizes[i],
            "the layer with " + std::string(name_of(type)) + " weights, hidden " + std::to_string(hidden) + ", " +
                std::to_string(tokens) + " tokens");
    }
  }
}

void check_unit_gate() {
  const Type type = pick({0, 1}) ? kBFloat16 : kFloat32;
  const int64_t size = pick({2, 3, 16, 20, 40, 64, 65, 100}), active = 1 + generator() % (size - 1);
  const int64_t rows = 1 + generator() % 4;
  Numbers h(type, rows * size), dy(type, rows * size), logits(kFloat32, rows * size);
  Numbers gated(type, rows * size), dh(type, rows * size), dz(kFloat32, rows * size);
  const int64_t bytes = (size + 7) / 8;
  std::vector<uint8_t> bits(rows * bytes);
  std::vector<float> threshold(rows), scale(rows);
  UnitGate problem;
  problem.type = type;
  problem.bank_size = size;
  problem.active = active;
  problem.alpha = 0.5f;
  problem.tau = 0.7f;
  problem.h = h.data();
  problem.logits = logits.floats();
  problem.gated = gated.data();
  problem.bits = bits.data();
  problem.threshold = threshold.data();
  problem.scale = scale.data();
  problem.dy = dy.data();
  problem.dh = dh.data();
  problem.dz = dz.floats();
  check(table.unit_gate(problem, 0, rows) == 0, "unit_gate's count");
  table.unit_gate_backward(problem, 0, rows);
  auto value = [&](Numbers& numbers, int64_t i) {
    return type == kFloat32 ? (double)numbers.floats()[i] : from_half(((uint16_t*)numbers.data())[i]);
  };
  for (int64_t n = 0; n < rows; ++n) {
    const float* z = logits.floats() + n * size;
    const std::vector<bool> kept = top(z, size, active);
    double lowest = INFINITY, highest = -INFINITY, mean = 0.0, variance = 0.0;
    for (int64_t i = 0; i < size; ++i) {
      if (kept[i]) lowest = std::min(lowest, (double)z[i]);
      if (!kept[i]) highest = std::max(highest, (double)z[i]);
      mean += z[i] / (double)size;
    }
    for (int64_t i = 0; i < size; ++i) variance += (z[i] - mean) * (z[i] - mean) / (double)size;
    const double cut = (lowest + highest) / 2, per_width = 1.0 / (0.7 * sqrt(std::max(variance, 1e-12)));
    for (int64_t i = 0; i < size; ++i) {
      const int64_t at = n * size + i;
      check(((bits[n * bytes + i / 8] >> (i % 8)) & 1) == kept[i], "unit_gate's bits");
      check(value(gated, at) == (kept[i] ? h.exact[at] : 0.0), "unit_gate's product");
      check(value(dh, at) == (kept[i] ? dy.exact[at] : 0.0), "unit_gate's gradient of h");
      const double sigmoid = 1.0 / (1.0 + exp(-(z[i] - cut) * per_width));
      const double exact = 0.5 * per_width * sigmoid * (1.0 - sigmoid) * h.exact[at] * dy.exact[at];
      check(fabs(dz.floats()[at] - exact) <= 1e-6 * 0.5 * per_width * fabs(h.exact[at] * dy.exact[at]),
            "unit_gate's gradient of the logits");
    }
  }
}

void check_logit_loss() {
  const Type type = pick({0, 1}) ? kBFloat16 : kFloat32;
  const int64_t rows = 1 + generator() % 3, size = pick({1, 2, 15, 64, 333, 2049, 5000});
  const bool is_taught = pick({0, 1});
  Numbers student(type, rows * size, 4.0), teacher(type, rows * size, 4.0);
  std::vector<int64_t> labels(rows);
  for (int64_t& label : labels) label = generator() % size;
  std::vector<float> losses(2 * rows);
  LogitLoss problem;
  problem.type = type;
  problem.vocabulary = size;
  problem.student = student.data();
  problem.teacher = is_taught ? teacher.data() : nullptr;
  problem.labels = labels.data();
  problem.ce_weight = 0.1f;
  problem.kd_weight = is_taught ? 0.7f : 0.0f;
  problem.with_gradient = true;
  problem.losses = losses.data();
  table.logit_loss(problem, 0, rows);
  for (int64_t r = 0; r < rows; ++r) {
    double totals[2] = {0.0, 0.0};
    for (int64_t i = r * size; i < (r + 1) * size; ++i) {
      totals[0] += exp(student.exact[i]);
      totals[1] += exp(teacher.exact[i]);
    }
    double divergence = 0.0;
    for (int64_t i = 0; i < size; ++i) {
      const int64_t at = r * size + i;
      const double log_p = student.exact[at] - log(totals[0]), log_q = teacher.exact[at] - log(totals[1]);
      if (is_taught) divergence += exp(log_q) * (log_q - log_p);
      double gradient = (0.1 + problem.kd_weight) * exp(log_p) - problem.kd_weight * exp(log_q);
      if (i == labels[r]) gradient -= 0.1;
      const double found = type == kFloat32 ? student.floats()[at] : from_half(((uint16_t*)student.data())[at]);
      const double rounding = type == kFloat32 ? 0.0 : 1.0 / 256;
      check(fabs(found - gradient) <= 1e-5 + rounding * fabs(gradient), "logit_loss's gradient");
    }
    const double cross_entropy = log(totals[0]) - student.exact[r * size + labels[r]];
    check(fabs(losses[2 * r] - cross_entropy) <= 1e-5, "logit_loss's cross entropy");
    check(fabs(losses[2 * r + 1] - divergence) <= 1e-5 * (1 + divergence), "logit_loss's divergence");
  }
}

}  // namespace

int main() {
  constexpr int kCases = 60;
  for (int seed = 0; seed < kCases; ++seed) {
    generator.seed(seed);
    check_linear();
    check_route();
    check_decode();
    check_unit_gate();
    check_logit_loss();
  }
  if (failures != 0) {
    printf("%s: %d checks failed\n", table.name, failures);
    return 1;
  }
  printf("%s: %d cases agree\n", table.name, 5 * kCases);
  return 0;
}
