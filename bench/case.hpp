// A benchmark case is its name: b<batch>_<tokens>_h<heads>[_kv<kv_heads>]_d<head_dim>[v<value_dim>]<mask>. How
// tokens and mask are written depends on the kind of case. `python -m bench` reads the same names.
#pragma once

#include <cstdint>
#include <limits>
#include <regex>
#include <stdexcept>
#include <string>

namespace bench {

inline std::int64_t number(const std::ssub_match& digits, std::int64_t otherwise = 0) {
  return digits.matched ? std::stoll(digits) : otherwise;
}

// A name taken apart: `tokens` and `mask` are the matches of a kind's regular expressions.
class CaseName {
 public:
  // `form` is an example for the message to whom the name is none.
  CaseName(const std::string& name, const char* form, const char* tokens_grammar, const char* mask_grammar)
      : name(name) {
    const std::regex grammar(R"(b(\d+)_([^_]+)_h(\d+)(?:_kv(\d+))?_d(\d+)(?:v(\d+))?(.*))");
    std::smatch parts;
    if (std::regex_match(this->name, parts, grammar)) {
      batch = number(parts[1]);
      heads = number(parts[3]);
      kv_heads = number(parts[4], heads);
      head_dim = number(parts[5]);
      value_dim = number(parts[6], head_dim);
      tokens_text_ = parts[2];
      mask_text_ = parts[7];
    }
    if (!std::regex_match(tokens_text_, tokens, std::regex(tokens_grammar)) ||
        !std::regex_match(mask_text_, mask, std::regex(mask_grammar))) {
      throw std::invalid_argument("case '" + name + "' is not of the form " + form);
    }
  }
  CaseName(const CaseName&) = delete;  // the matches point into the texts
  CaseName& operator=(const CaseName&) = delete;

  const std::string name;
  std::int64_t batch = 0, heads = 0, kv_heads = 0, head_dim = 0, value_dim = 0;
  std::smatch tokens, mask;

 private:
  std::string tokens_text_, mask_text_;
};

struct Case {
  virtual ~Case() = default;

  // Does this query of this (query) head see this key?
  virtual bool keeps(std::int64_t batch, std::int64_t head, std::int64_t q, std::int64_t k) const = 0;
  virtual double density() const = 0;  // the kept share of scores
  // What becomes of a score of a key that is kept, −∞ if it is hidden after all; and a logit in the sum of each row.
  virtual double modified(double score, std::int64_t) const { return score; }
  virtual double sink() const { return -std::numeric_limits<double>::infinity(); }
  virtual bool has_backward() const { return true; }
  virtual double rounding() const { return 0.; }  // the error that an op of its own format may add to that of the dtype

  // Two matrix products forward, five backward.
  double flops(bool backward) const {
    const std::int64_t per_score = backward ? 3 * head_dim + 2 * value_dim : head_dim + value_dim;
    return 2. * static_cast<double>(batch * heads * per_score) * static_cast<double>(seq_q * seq_k) * density();
  }

  std::string name;
  std::int64_t batch, seq_q, seq_k, heads, kv_heads, head_dim, value_dim;

 protected:
  Case(const CaseName& parts, std::int64_t seq_q, std::int64_t seq_k)
      : name(parts.name),
        batch(parts.batch),
        seq_q(seq_q),
        seq_k(seq_k),
        heads(parts.heads),
        kv_heads(parts.kv_heads),
        head_dim(parts.head_dim),
        value_dim(parts.value_dim) {}
};

}  // namespace bench
