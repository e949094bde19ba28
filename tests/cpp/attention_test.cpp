// attention and its gradients on the CPU, with every instruction set this machine has.
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "attention_problem.hpp"
#include "check.hpp"
#include "cpu/kernels.hpp"
#include "fastattn/cpu/survey.hpp"
#include "ops/validate.hpp"

using namespace fastattn;

namespace {

struct Kernels {
  const char* name;
  const cpu::AttentionKernels* table;
};

std::vector<Kernels> available_kernels() {
  std::vector<Kernels> list;
  if (std::strcmp(cpu_instruction_set(), "none") != 0) {
    list.push_back({"avx2", &cpu::kAttentionAvx2});
  }
  if (std::strcmp(cpu_instruction_set(), "avx512") == 0) {
    list.push_back({"avx512", &cpu::kAttentionAvx512});
  }
  return list;
}

void run(const Kernels& kernels, AttentionProblem& p, const Threads& threads = StdThreads{2}) {
  const Attention& forward = p.description.forward;
  check(validate(p.description).ok(), validate(p.description).message);
  if (num_rows(forward) > 0) {
    kernels.table->in_bands.forward(forward, bands_of(forward), threads);
  }
  kernels.table->in_bands.backward(p.description, bands_of(forward), threads);
}

std::vector<double> doubles(const std::vector<float>& x) { return {x.begin(), x.end()}; }

// The results, one after the other.
std::vector<double> results(const AttentionProblem& p) {
  std::vector<double> all = doubles(p.lse);
  for (const Tensor* tensor : {&p.out, &p.dq, &p.dk, &p.dv}) {
    const std::vector<double> values = tensor->values();
    all.insert(all.end(), values.begin(), values.end());
  }
  return all;
}

struct Case {
  Shape shape;
  Window window = {};
};

// Errors relative to the norm: half a unit in the last place of the type, with room for accumulated rounding. With few
// keys dP and delta nearly cancel, hence the room that float32 gradients get.
void check_against_formula(const Case& c, DType dtype) {
  const double output_error = dtype == DType::kFloat32 ? 2e-6 : dtype == DType::kFloat16 ? 4e-4 : 3e-3;
  const double gradient_error = dtype == DType::kFloat32 ? 3e-5 : dtype == DType::kFloat16 ? 8e-4 : 6e-3;
  for (const Kernels& kernels : available_kernels()) {
    AttentionProblem p(c.shape, dtype, c.window);
    run(kernels, p);
    const Expected e = expected_of(p);
    const Shape& s = c.shape;
    const std::string where = std::string(kernels.name) + " dtype " + std::to_string(static_cast<int>(dtype)) +
                              " batch " + std::to_string(s.batch) + " seq " + std::to_string(s.seq_q) + "x" +
                              std::to_string(s.seq_k) + " heads " + std::to_string(s.heads) + "/" +
                              std::to_string(s.kv_heads) + " head_dim " + std::to_string(s.head_dim) + " window " +
                              std::to_string(c.window.left) + ", " + std::to_string(c.window.right) + ": ";
    const auto judge = [&](const char* name, const std::vector<double>& got, const std::vector<double>& want,
                           double bound) {
      const double error = relative_error(got, want);
      check(error <= bound, where + name + " is off by " + std::to_string(error * 1e6) + "e-6");
    };
    judge("out", p.out.values(), e.out, output_error);
    judge("lse", doubles(p.lse), e.lse, 1e-6);
    judge("dq", p.dq.values(), e.dq, gradient_error);
    judge("dk", p.dk.values(), e.dk, gradient_error);
    judge("dv", p.dv.values(), e.dv, gradient_error);
  }
}

constexpr Window kCausal{kUnbounded, 0};
constexpr DType kTypes[] = {DType::kFloat32, DType::kFloat16, DType::kBFloat16};

const Test head_dims("attention: every head_dim agrees with the formula", [] {
  for (std::int64_t head_dim = 8; head_dim <= 256; head_dim += 8) {
    for (const DType dtype : kTypes) {
      check_against_formula({{1, 21, 37, 2, 1, head_dim}, kCausal}, dtype);
    }
  }
});

const Test lengths("attention: lengths around tile edges agree with the formula", [] {
  for (const std::int64_t seq_q : {1, 5, 6, 7, 95, 96, 97, 191, 192, 193}) {
    for (const std::int64_t seq_k : {1, 15, 17, 63, 65, 127, 128, 129, 257}) {
      check_against_formula({{1, seq_q, seq_k, 1, 1, 16}}, DType::kFloat32);
      check_against_formula({{1, seq_q, seq_k, 1, 1, 16}, kCausal}, DType::kFloat32);
    }
  }
});

const Test windows("attention: windows agree with the formula", [] {
  for (const Window window : {Window{0, 0}, {5, 0}, {0, 5}, {64, 64}, {130, 0}, {kUnbounded, 40}, {200, kUnbounded}}) {
    for (const auto& [seq_q, seq_k] : {std::pair{300, 300}, {100, 350}, {350, 100}}) {
      check_against_formula({{1, seq_q, seq_k, 1, 1, 16}, window}, DType::kFloat32);
    }
  }
});

const Test groups("attention: grouped heads and batches agree with the formula", [] {
  for (const DType dtype : kTypes) {
    check_against_formula({{2, 130, 70, 6, 6, 40}, kCausal}, dtype);
    check_against_formula({{2, 70, 130, 6, 2, 40}, kCausal}, dtype);
    check_against_formula({{3, 65, 130, 4, 1, 64}}, dtype);
  }
});

const Test empty_rows("attention: rows that keep nothing give 0, -inf and zero gradients, whatever arrives", [] {
  for (const Kernels& kernels : available_kernels()) {
    AttentionProblem p({1, 200, 60, 1, 1, 16}, DType::kFloat32, kCausal);  // the first 140 rows see no key
    for (int i = 0; i < 140; ++i) {
      p.dlse[i] = NAN;
    }
    run(kernels, p);
    bool zero = true;
    for (int i = 0; i < 140; ++i) {
      zero = zero && p.lse[i] == -HUGE_VALF;
      for (int d = 0; d < 16; ++d) {
        zero = zero && p.out.get(0, i, 0, d) == 0.f && p.dq.get(0, i, 0, d) == 0.f;
      }
    }
    check(zero, std::string(kernels.name) + ": empty rows");
    for (int i = 0; i < 140; ++i) {
      p.dlse[i] = 0.f;
    }
    check(relative_error(p.dk.values(), expected_of(p).dk) < 5e-6, std::string(kernels.name) + ": dk of the others");
    p.v.set(0, 0, 0, 0, NAN);
    run(kernels, p);
    for (int i = 0; i < 140; ++i) {
      check(p.out.get(0, i, 0, 0) == 0.f, std::string(kernels.name) + ": a value of NaN");
    }
  }
});

const Test nothing("attention: sizes of zero leave nothing undone", [] {
  for (const Kernels& kernels : available_kernels()) {
    for (const Shape& shape : {Shape{0, 5, 5, 1, 1, 8},
                               {2, 0, 5, 1, 1, 8},
                               {2, 5, 0, 1, 1, 8},
                               {2, 5, 5, 0, 0, 8},
                               {2, 5, 5, 0, 2, 8},
                               {1, 0, 0, 1, 1, 8}}) {
      AttentionProblem p(shape, DType::kFloat32, {});
      run(kernels, p);
      for (const double x : results(p)) {
        check(x == 0. || x == -HUGE_VAL, "zero or -inf");
      }
      check(attention(p.description.forward, StdThreads{}).ok(), "forward succeeds");
      check(attention_backward(p.description, StdThreads{}).ok(), "backward succeeds");
    }
  }
});

const Test nan_row("attention: NaN in one query row reaches that row alone", [] {
  for (const Kernels& kernels : available_kernels()) {
    AttentionProblem clean({1, 200, 150, 2, 1, 24}, DType::kFloat32, kCausal);
    AttentionProblem dirty({1, 200, 150, 2, 1, 24}, DType::kFloat32, kCausal);
    dirty.q.set(0, 120, 1, 3, NAN);
    run(kernels, clean);
    run(kernels, dirty);
    for (int i = 0; i < 200; ++i) {
      for (int h = 0; h < 2; ++h) {
        const bool hit = i == 120 && h == 1;
        check(std::isnan(dirty.lse[h * 200 + i]) == hit, "lse");
        for (int d = 0; d < 24; ++d) {
          const float out = dirty.out.get(0, i, h, d), dq = dirty.dq.get(0, i, h, d);
          check(hit ? std::isnan(out) : out == clean.out.get(0, i, h, d), "out");
          check(hit ? std::isnan(dq) : dq == clean.dq.get(0, i, h, d), "dq");
        }
      }
    }
  }
});

const Test large_scores("attention: scores of 1e6 and a spread of 1e4 overflow nothing", [] {
  for (const Kernels& kernels : available_kernels()) {
    AttentionProblem p({1, 30, 300, 1, 1, 16}, DType::kFloat32, {}, 1e3f);
    p.q.set(0, 7, 0, 0, 1e3f);
    run(kernels, p);
    for (const double x : results(p)) {
      check(std::isfinite(x), std::string(kernels.name) + ": finite");
    }
  }
});

// Runs the tasks last to first.
struct Backwards final : Threads {
  void run(std::int64_t count, Task task, void* context) const override {
    for (std::int64_t i = count - 1; i >= 0; --i) {
      task(context, i);
    }
  }
};

const Test repeatable("attention: the result does not depend on the threads", [] {
  for (const Kernels& kernels : available_kernels()) {
    std::vector<double> first;
    const StdThreads one{1}, three{3};
    const Backwards backwards;
    for (const Threads* threads : {static_cast<const Threads*>(&one), static_cast<const Threads*>(&three),
                                   static_cast<const Threads*>(&backwards)}) {
      AttentionProblem p({2, 250, 300, 4, 2, 16}, DType::kFloat32, kCausal);
      run(kernels, p, *threads);
      first = first.empty() ? results(p) : first;
      check(results(p) == first, std::string(kernels.name) + ": bitwise the same");
    }
  }
});

const Test optional("attention: lse and dlse may be absent", [] {
  AttentionProblem p({1, 40, 40, 1, 1, 16}, DType::kFloat32, kCausal),
      q({1, 40, 40, 1, 1, 16}, DType::kFloat32, kCausal);
  q.dlse.assign(q.dlse.size(), 0.f);
  p.description.dlse = nullptr;
  for (AttentionProblem* problem : {&p, &q}) {
    check(attention(problem->description.forward, StdThreads{}).ok(), "forward");
    check(attention_backward(problem->description, StdThreads{}).ok(), "backward");
  }
  check(results(p) == results(q), "no dlse is a dlse of zero");
  const std::vector<double> out = p.out.values();
  p.description.forward.lse = nullptr;
  check(attention(p.description.forward, StdThreads{}).ok() && p.out.values() == out, "no lse, same output");
});

// Tokens [first, first + count).
TensorView part(const TensorView& view, std::int64_t first, std::int64_t count) {
  TensorView tokens = view;
  tokens.data = view.row<float>(0, first, 0);
  tokens.shape[1] = count;
  return tokens;
}

const Test regions("attention: a segment is a sequence of its own, and a rectangle of all scores leaves no mask", [] {
  constexpr std::int64_t kSeq = 300, kFirst = 130;
  const std::int32_t all[] = {0, kSeq, 0, kSeq};
  std::vector<std::int32_t> ids(kSeq);
  for (std::int64_t i = kFirst; i < kSeq; ++i) {
    ids[static_cast<std::size_t>(i)] = 1;
  }
  for (const Kernels& kernels : available_kernels()) {
    AttentionProblem p({1, kSeq, kSeq, 2, 1, 24}, DType::kFloat32, kCausal);
    Attention whole = p.description.forward;
    whole.segments = {{ids.data()}, {ids.data()}};
    std::vector<std::uint64_t> workspace(attention_workspace(whole, StdThreads{}) / sizeof(std::uint64_t));
    const Regions packed = regions_of(whole, workspace.data());
    cpu::survey_segments(packed, StdThreads{2});
    kernels.table->in_regions.forward(whole, packed, StdThreads{2});
    const std::vector<double> together = p.out.values();
    for (const auto& [first, count] : {std::pair{std::int64_t{0}, kFirst}, {kFirst, kSeq - kFirst}}) {
      Attention alone = p.description.forward;
      for (TensorView* view : {&alone.q, &alone.k, &alone.v, &alone.out}) {
        *view = part(*view, first, count);
      }
      alone.lse = nullptr;
      kernels.table->in_bands.forward(alone, bands_of(alone), StdThreads{2});
    }
    const double error = relative_error(together, p.out.values());
    check(error <= 2e-6, std::string(kernels.name) + ": segments are off by " + std::to_string(error * 1e6) + "e-6");

    Attention dense = p.description.forward;
    dense.window = {};
    kernels.table->in_bands.forward(dense, bands_of(dense), StdThreads{2});
    const std::vector<double> out = p.out.values(), lse = doubles(p.lse);
    dense.window = kCausal;
    dense.rectangles = {all, 1, 1};
    kernels.table->in_regions.forward(dense, regions_of(dense, nullptr), StdThreads{2});
    check(p.out.values() == out && doubles(p.lse) == lse, std::string(kernels.name) + ": bitwise as without a mask");
  }
});

const Test streams("attention: a library without CUDA says so", [] {
  if (!built_with_cuda()) {
    AttentionProblem p({1, 4, 4, 1, 1, 8}, DType::kFloat32, {});
    check(std::strstr(attention(p.description.forward, Stream{}).message, "without CUDA") != nullptr, "forward");
    check(std::strstr(attention_backward(p.description, Stream{}).message, "without CUDA") != nullptr, "backward");
  }
});

}  // namespace
