// fastattn_bench: times and checks fastattn's core, without torch, on the CPU or on the GPU.
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <fstream>
#include <iostream>
#include <memory>
#include <optional>
#include <regex>
#include <span>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "case.hpp"
#include "device.hpp"
#include "ops.hpp"
#include "problem.hpp"

namespace {

using bench::Case;
using bench::Op;
using fastattn::DType;

constexpr const char* kUsage = R"(usage: fastattn_bench [options]
  --ops                print the ops that have cases for the device in this mode and stop
  --op NAME            (attention)
  --list               print the op's cases for the device and stop
  --small              list small cases with ragged tiles instead
  --device cpu|cuda    where to run (cpu)
  --filter REGEX       run the listed cases whose name matches
  --case NAME          run this case, listed or not; may be repeated
  --mode fwd|bwd       (fwd)
  --dtype fp32|fp16|bf16   (fp32 on the CPU, bf16 on the GPU)
  --seconds S          time spent on each case (1); 0: run it once and do not time it
  --check              compare sampled rows with the plain formula in double; exit 1 if the error is too large
  --json FILE          write the records there
)";

struct Options {
  bool list_ops = false, list = false, small = false, cuda = false, backward = false, check = false;
  std::string op = "attention";
  std::string filter;
  std::vector<std::string> cases;
  std::optional<DType> dtype;
  double seconds = 1;
  std::string json;
};

constexpr const char* name_of(DType dtype) {
  return dtype == DType::kFloat32 ? "fp32" : (dtype == DType::kFloat16 ? "fp16" : "bf16");
}

// Well above what rounding the operands and the weights to the type costs, well below any mistake.
constexpr double allowed_error(DType dtype) {
  return dtype == DType::kFloat32 ? 1e-5 : (dtype == DType::kFloat16 ? 3e-3 : 2e-2);
}

[[noreturn]] void refuse(std::string_view option, std::string_view got, std::string_view allowed) {
  throw std::invalid_argument(std::string(option) + " got '" + std::string(got) +
                              "'; allowed: " + std::string(allowed));
}

DType parse_dtype(std::string_view text) {
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    if (text == name_of(dtype)) {
      return dtype;
    }
  }
  refuse("--dtype", text, "fp32, fp16, bf16");
}

// Is `text` the second of two choices? Anything but the two is refused.
bool is_second(std::string_view option, std::string_view text, std::string_view first, std::string_view second) {
  if (text != first && text != second) {
    refuse(option, text, std::string(first) + ", " + std::string(second));
  }
  return text == second;
}

Options parse_options(std::span<char*> arguments) {
  Options options;
  for (std::size_t i = 0; i < arguments.size(); ++i) {
    const std::string_view option = arguments[i];
    const auto value = [&]() -> std::string {
      if (++i == arguments.size()) {
        refuse(option, "", "a value after it");
      }
      return arguments[i];
    };
    if (option == "--ops") {
      options.list_ops = true;
    } else if (option == "--op") {
      options.op = value();
    } else if (option == "--list") {
      options.list = true;
    } else if (option == "--small") {
      options.small = true;
    } else if (option == "--check") {
      options.check = true;
    } else if (option == "--device") {
      options.cuda = is_second(option, value(), "cpu", "cuda");
    } else if (option == "--mode") {
      options.backward = is_second(option, value(), "fwd", "bwd");
    } else if (option == "--filter") {
      options.filter = value();
    } else if (option == "--case") {
      options.cases.push_back(value());
    } else if (option == "--dtype") {
      options.dtype = parse_dtype(value());
    } else if (option == "--seconds") {
      options.seconds = std::stod(value());
    } else if (option == "--json") {
      options.json = value();
    } else {
      throw std::invalid_argument("unknown option '" + std::string(option) + "'\n" + kUsage);
    }
  }
  return options;
}

const Op& chosen_op(const Options& options) {
  const auto found = bench::ops().find(options.op);
  if (found == bench::ops().end()) {
    std::string names;
    for (const auto& [name, op] : bench::ops()) {
      names += (names.empty() ? "" : ", ") + name;
    }
    refuse("--op", options.op, names);
  }
  return found->second;
}

std::vector<std::unique_ptr<Case>> chosen_cases(const Op& op, const Options& options) {
  std::vector<std::unique_ptr<Case>> chosen;
  for (const std::string& name : options.cases) {
    chosen.push_back(op.parse(name));
  }
  if (chosen.empty()) {
    const std::regex filter(options.filter);
    for (const char* name : options.small ? op.small_cases : (options.cuda ? op.cuda_cases : op.cpu_cases)) {
      if (std::regex_search(name, filter)) {
        auto shape = op.parse(name);
        if (!options.backward || shape->has_backward()) {
          chosen.push_back(std::move(shape));
        }
      }
    }
  }
  if (chosen.empty()) {
    refuse("--filter", options.filter, "a regular expression that matches a case of --list");
  }
  return chosen;
}

struct Result {
  std::optional<double> time_us, tflops, error;
};

Result run(const Op& op, const bench::Device& device, const Case& shape, DType dtype, const Options& options) {
  Result result;
  const std::unique_ptr<bench::Problem> problem = op.problem(device, shape, dtype);
  if (options.backward) {
    problem->prepare_backward();
  }
  const auto call = [&] { options.backward ? problem->backward() : problem->forward(); };
  if (options.check) {
    result.error = options.backward ? problem->backward_error() : problem->forward_error();
  } else {
    call();
  }
  if (options.seconds > 0) {
    result.time_us = device.time_us(call, options.seconds);
    result.tflops = shape.flops(options.backward) / *result.time_us * 1e-6;
  }
  return result;
}

std::string number(const std::optional<double>& value) {
  if (!value) {
    return "null";
  }
  char text[32];
  std::snprintf(text, sizeof text, "%.5g", *value);
  return text;
}

std::string record(const Case& shape, DType dtype, const Options& options, const Result& result,
                   const bench::Machine& machine) {
  const char* commit = std::getenv("FASTATTN_COMMIT");
  std::ostringstream json;
  json << R"({"op": ")" << options.op << R"(", "case": ")" << shape.name << R"(", "mode": ")"
       << (options.backward ? "bwd" : "fwd") << R"(", "dtype": ")" << name_of(dtype) << R"(", "shape": {"batch": )"
       << shape.batch << R"(, "seq_q": )" << shape.seq_q << R"(, "seq_k": )" << shape.seq_k << R"(, "heads": )"
       << shape.heads << R"(, "kv_heads": )" << shape.kv_heads << R"(, "head_dim": )" << shape.head_dim
       << R"(}, "density": )" << number(shape.density()) << R"(, "time_us": )" << number(result.time_us)
       << R"(, "tflops": )" << number(result.tflops) << R"(, "percent_of_roofline": null, "error": )"
       << number(result.error) << R"(, "against": {}, "bound_speedup": null, "commit": ")"
       << (commit ? commit : "unknown") << R"(", "machine": {)";
  if (options.cuda) {
    json << R"("gpu": ")" << machine.processor << R"(", "driver": ")" << machine.driver << R"(", "cuda": ")"
         << machine.toolkit << '"';
  } else {
    json << R"("cpu": ")" << machine.processor << R"(", "instruction_set": ")" << fastattn::cpu_instruction_set()
         << '"';
  }
  json << R"(, "torch": null, "gemm_tflops": null}})";
  return json.str();
}

void write_records(const std::string& path, const std::vector<std::string>& records) {
  std::ofstream file(path);
  for (std::size_t i = 0; i < records.size(); ++i) {
    file << (i == 0 ? "[\n" : ",\n") << records[i];
  }
  file << "\n]\n";
  if (!file.flush()) {
    throw std::runtime_error("--json: cannot write " + path);
  }
}

// Returns whether every case ran, and ran right.
bool run_all(const Options& options) {
  if (options.list_ops) {
    for (const auto& [name, op] : bench::ops()) {
      if (!(options.cuda ? op.cuda_cases : op.cpu_cases).empty() && (op.has_backward || !options.backward)) {
        std::puts(name.c_str());
      }
    }
    return true;
  }
  const Op& op = chosen_op(options);
  if (options.backward && !op.has_backward) {
    refuse("--mode", "bwd", "fwd: " + options.op + " has no backward of its own");
  }
  const std::vector<std::unique_ptr<Case>> cases = chosen_cases(op, options);
  if (options.list) {
    for (const auto& shape : cases) {
      std::puts(shape->name.c_str());
    }
    return true;
  }
  const DType dtype = options.dtype.value_or(options.cuda ? DType::kBFloat16 : DType::kFloat32);
  const auto device = options.cuda ? bench::cuda_device() : bench::cpu_device();
  const bench::Machine machine = device->machine();
  std::printf("%s %s %s on %s\n", options.op.c_str(), options.backward ? "bwd" : "fwd", name_of(dtype),
              machine.processor.c_str());
  std::printf("%-68s %12s %10s %10s\n", "case", "time, us", "TFLOP/s", "error");
  bool good = true;
  std::vector<std::string> records;
  for (const auto& shape : cases) {
    try {
      const Result result = run(op, *device, *shape, dtype, options);
      const bool right = !result.error || *result.error <= allowed_error(dtype) + shape->rounding();
      good = good && right;
      std::printf("%-68s %12s %10s %10s%s\n", shape->name.c_str(), number(result.time_us).c_str(),
                  number(result.tflops).c_str(), number(result.error).c_str(), right ? "" : "  too large");
      records.push_back(record(*shape, dtype, options, result, machine));
    } catch (const std::runtime_error& error) {
      good = false;
      std::printf("%-68s failed: %s\n", shape->name.c_str(), error.what());
    }
    std::fflush(stdout);
  }
  if (!options.json.empty()) {
    write_records(options.json, records);
  }
  return good;
}

}  // namespace

int main(int count, char** arguments) {
  const std::span<char*> all(arguments, static_cast<std::size_t>(count));
  if (count == 2 && std::string_view(arguments[1]) == "--help") {
    std::fputs(kUsage, stdout);
    return 0;
  }
  try {
    return run_all(parse_options(all.subspan(1))) ? 0 : 1;
  } catch (const std::exception& error) {
    std::cerr << "fastattn_bench: " << error.what() << '\n';
    return 2;
  }
}
