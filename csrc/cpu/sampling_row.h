// The passes over one row of logits, and the tokens that may be chosen from it. Used by sampling_ops.cpp alone.
#pragma once

#include <algorithm>
#include <cstring>
#include <functional>
#include <limits>
#include <numeric>

#include "sampling.h"

namespace cai {

constexpr Int kPieceBlocks = 32;  // blocks (4096 tokens) of a piece, the unit of work when threads share a row
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// A logit's bits as an integer of the same order, +0 and -0 the same one.
inline int32_t key_of(float logit) {
  int32_t bits;
  std::memcpy(&bits, &logit, sizeof bits);
  const int32_t sign = bits >> 31;
  return ((bits & 0x7fffffff) ^ sign) - sign;
}

inline Int blocks_in(Int vocabulary) { return (vocabulary + kSampleBlock - 1) / kSampleBlock; }

// Some tokens, ascending by id, each with its weight or its logit's key, in memory of the calling thread.
struct Candidates {
  int32_t *ids, *values, *spare;
  Int count = 0;

  explicit Candidates(Int vocabulary) {
    ids = static_cast<int32_t*>(private_memory(Private::kCandidates, 3 * (vocabulary + 1) * Int(sizeof(int32_t))));
    values = ids + vocabulary + 1;
    spare = values + vocabulary + 1;
  }
  void add(Int id, int32_t value, bool wanted) {  // without a branch, which would be mispredicted
    ids[count] = static_cast<int32_t>(id);
    values[count] = value;
    count += wanted;
  }
  // Of these tokens and their values, the ones of at least `lowest`.
  void add_from(int32_t lowest, const int32_t* tokens, const int32_t* found, Int n) {
    count += kernels().collect(found, tokens, n, lowest, ids + count, values + count);
  }
  // The k-th greatest value.
  int32_t greatest(Int k) {
    std::copy(values, values + count, spare);
    std::nth_element(spare, spare + k - 1, spare + count, std::greater<>());
    return spare[k - 1];
  }
  void keep_from(int32_t lowest) {
    const Int all = count;
    count = 0;
    add_from(lowest, ids, values, all);
  }
};

// The passes over one row of logits, and their results.
class Row {
 public:
  static Int bytes(Int vocabulary) {
    const Int blocks = blocks_in(vocabulary), pieces = (blocks + kPieceBlocks - 1) / kPieceBlocks;
    return (blocks * (kSampleBlock * 8 + 12) + pieces * 9 + 63) / 64 * 64;
  }
  Row(float* logits, Int vocabulary, void* memory)
      : logits_(logits), vocabulary_(vocabulary), blocks_(blocks_in(vocabulary)) {
    ids_ = static_cast<int32_t*>(memory);
    weights_ = ids_ + blocks_ * kSampleBlock;
    sums_ = reinterpret_cast<int64_t*>(weights_ + blocks_ * kSampleBlock);
    peaks_ = reinterpret_cast<float*>(sums_ + blocks_);
    piece_peaks_ = reinterpret_cast<float*>(peaks_ + blocks_);
    piece_found_ = reinterpret_cast<int32_t*>(piece_peaks_ + pieces());
    piece_nan_ = reinterpret_cast<bool*>(piece_found_ + pieces());
  }

  Int pieces() const { return (blocks_ + kPieceBlocks - 1) / kPieceBlocks; }

  // First pass over a piece: bans, peaks.
  void look(Int piece, const uint32_t* mask) {
    const Span s = span(piece);
    if (mask) kernels().mask_logits(logits_ + s.token, s.tokens, mask + s.token / 32);
    piece_nan_[piece] = kernels().logit_peaks(logits_ + s.token, s.tokens, peaks_ + s.block);
    piece_peaks_[piece] = *std::max_element(peaks_ + s.block, peaks_ + s.block + s.blocks);
  }
  // To be called after look() of all pieces:
  float greatest() const { return *std::max_element(piece_peaks_, piece_peaks_ + pieces()); }
  SampleStatus status() const {
    if (std::any_of(piece_nan_, piece_nan_ + pieces(), [](bool nan) { return nan; })) return SampleStatus::kNotFinite;
    if (greatest() == kInfinity) return SampleStatus::kNotFinite;
    return greatest() == -kInfinity ? SampleStatus::kNothingAllowed : SampleStatus::kOk;
  }

  // Second pass over a piece: sums of weights, and for collect_weights() the tokens of weight `lowest` or more (0: none).
  // Returns the sum of all weights of the piece.
  int64_t weigh(Int piece, float inverse_temperature, int32_t lowest) {
    const Span s = span(piece);
    piece_found_[piece] = static_cast<int32_t>(kernels().weight_blocks(
        logits_ + s.token, s.tokens, peaks_ + s.block, greatest(), inverse_temperature, sums_ + s.block, lowest,
        static_cast<int32_t>(s.token), lowest > 0 ? ids_ + s.token : nullptr, weights_ + s.token));
    return std::accumulate(sums_ + s.block, sums_ + s.block + s.blocks, int64_t(0));
  }
  int64_t total() const { return std::accumulate(sums_, sums_ + blocks_, int64_t(0)); }

  // The first token with the greatest logit.
  int32_t best() const {
    const float peak = greatest();
    Int token = (std::find(peaks_, peaks_ + blocks_, peak) - peaks_) * kSampleBlock;
    while (logits_[token] != peak) ++token;
    return static_cast<int32_t>(token);
  }

  // The tokens of the k greatest logits and all that tie with the k-th, with the logits' keys as values.
  void collect_top_k(Int k, Candidates& found) const {
    int32_t lowest = std::numeric_limits<int32_t>::min();
    if (blocks_ > k) {  // the k-th greatest of the blocks' peaks is no greater than the k-th greatest logit
      std::transform(peaks_, peaks_ + blocks_, found.spare, key_of);
      std::nth_element(found.spare, found.spare + k - 1, found.spare + blocks_, std::greater<>());
      lowest = found.spare[k - 1];
    }
    for (Int b = 0; b < blocks_; ++b) {
      if (key_of(peaks_[b]) < lowest) continue;
      int32_t keys[kSampleBlock], tokens[kSampleBlock];
      const Int begin = b * kSampleBlock, end = end_of(b);
      std::transform(logits_ + begin, logits_ + end, keys, key_of);
      std::iota(tokens, tokens + (end - begin), static_cast<int32_t>(begin));
      found.add_from(lowest, tokens, keys, end - begin);
    }
    found.keep_from(found.greatest(k));
  }
  // Replaces the candidates' keys by their weights.
  void weigh(Candidates& c, float inverse_temperature) const {
    const float peak = greatest();
    for (Int begin = 0; begin < c.count; begin += kSampleBlock) {
      float logits[kSampleBlock];
      int32_t weights[kSampleBlock];
      const Int n = std::min(kSampleBlock, c.count - begin);
      for (Int i = 0; i < n; ++i) logits[i] = logits_[c.ids[begin + i]];
      kernels().token_weights(logits, n, peak, inverse_temperature, weights);
      std::copy(weights, weights + n, c.values + begin);
    }
  }
  // A weight such that all lighter tokens together weigh at most `spare`: at least `low`, and near the greatest such weight,
  // so that few candidates remain. Returns `low` if the tokens lighter than it weigh more. weigh() must have had the same
  // `low`.
  int64_t light(int64_t low, int64_t total, int64_t spare) const {
    int64_t high = Int(1) << 30;
    for (int shift = 1; (low << 1) < high; shift = 1) {
      while ((low << (2 * shift + 2)) <= high) ++shift;  // halves the number of octaves between them
      const int64_t middle = low << shift;
      int64_t kept = 0;
      for (Int p = 0; p < pieces(); ++p)
        kept += kernels().sum_from(weights_ + span(p).token, piece_found_[p], static_cast<int32_t>(middle));
      (total - kept <= spare ? low : high) = middle;
    }
    return low;
  }
  // The tokens of weight `lowest` or more. weigh() must have had no higher one.
  void collect_weights(int64_t lowest, Candidates& found) const {
    for (Int p = 0; p < pieces(); ++p) {
      const Int token = span(p).token;
      found.add_from(static_cast<int32_t>(lowest), ids_ + token, weights_ + token, piece_found_[p]);
    }
  }
  // The token where the running sum of weights first exceeds `target`, which is below the total.
  int32_t token_at(int64_t target, float inverse_temperature) const {
    Int b = 0;
    while (sums_[b] <= target) target -= sums_[b++];
    int32_t weights[kSampleBlock];
    kernels().token_weights(logits_ + b * kSampleBlock, end_of(b) - b * kSampleBlock, greatest(),
                            inverse_temperature, weights);
    Int i = 0;
    while (weights[i] <= target) target -= weights[i++];
    return static_cast<int32_t>(b * kSampleBlock + i);
  }

 private:
  struct Span {
    Int block, blocks, token, tokens;
  };
  Span span(Int piece) const {
    const Int block = piece * kPieceBlocks, blocks = std::min(kPieceBlocks, blocks_ - block);
    const Int token = block * kSampleBlock;
    return {block, blocks, token, std::min(blocks * kSampleBlock, vocabulary_ - token)};
  }
  Int end_of(Int block) const { return std::min((block + 1) * kSampleBlock, vocabulary_); }

  float* logits_;
  Int vocabulary_, blocks_;
  int32_t *ids_, *weights_;  // tokens that weigh() kept, each piece's at the index of its first token
  int64_t* sums_;
  float *peaks_, *piece_peaks_;
  int32_t* piece_found_;
  bool* piece_nan_;
};

}  // namespace cai
