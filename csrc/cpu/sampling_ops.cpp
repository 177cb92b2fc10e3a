// Sampling over the threads: rows of logits to tokens, and the logarithms of the greatest probabilities. The definition is
// kernels/sampling.py's. Sums are of integers, so neither threads nor pieces move a token.
#include "sampling.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>

namespace cai {
namespace {

constexpr Int kPieceBlocks = 64;  // blocks that a thread looks at together where a row is shared: 4096 tokens

// ------------------------------------------------------------------------------------------------- random numbers

struct Product {
  uint64_t high, low;
};
Product multiply(uint64_t a, uint64_t b) {
  __extension__ typedef unsigned __int128 Wide;
  const Wide p = static_cast<Wide>(a) * b;
  return {static_cast<uint64_t>(p >> 64), static_cast<uint64_t>(p)};
}

// The first of the four words that Philox4x64-10 (Salmon et al. 2011) makes of a key and the counter `position` + 1, which is
// what numpy.random.Philox(key=seed, counter=position) gives first.
uint64_t philox(uint64_t key0, uint64_t key1, uint64_t position) {
  uint64_t c0 = position + 1, c1 = c0 == 0, c2 = 0, c3 = 0;
  for (int round = 0; round < 10; ++round) {
    const Product a = multiply(0xD2E7470EE14C6C93u, c0), b = multiply(0xCA5A826395121157u, c2);
    c0 = b.high ^ c1 ^ key0;
    c1 = b.low;
    c2 = a.high ^ c3 ^ key1;
    c3 = a.low;
    key0 += 0x9E3779B97F4A7C15u;
    key1 += 0xBB67AE8584CAA73Bu;
  }
  return c0;
}

// -------------------------------------------------------------------------------------------------------- one row

// A logit's bits as an integer of the same order, +0 and -0 the same one.
int32_t key_of(float logit) {
  int32_t bits;
  std::memcpy(&bits, &logit, sizeof bits);
  const int32_t sign = bits >> 31;
  return ((bits & 0x7fffffff) ^ sign) - sign;
}

constexpr float kInfinity = std::numeric_limits<float>::infinity();

Int blocks_in(Int vocabulary) { return (vocabulary + kSampleBlock - 1) / kSampleBlock; }

// Some tokens, ascending by id, each with its weight or its logit's key, in memory of the calling thread.
struct Candidates {
  int32_t *ids, *values, *spare;
  Int count = 0;

  explicit Candidates(Int vocabulary) {
    ids = static_cast<int32_t*>(private_memory(Private::kCandidates, 3 * (vocabulary + 1) * Int(sizeof(int32_t))));
    values = ids + vocabulary + 1;
    spare = values + vocabulary + 1;
  }
  void add(Int id, int32_t value, bool wanted) {  // without a branch: `wanted` is seldom foreseeable
    ids[count] = static_cast<int32_t>(id);
    values[count] = value;
    count += wanted;
  }
  // Of values of consecutive tokens, the ones of at least `lowest`.
  void add_from(int32_t lowest, Int first_id, const int32_t* found, Int n) {
    count += kernels().collect(found, n, lowest, static_cast<int32_t>(first_id), ids + count, values + count);
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
    for (Int i = 0; i < all; ++i) add(ids[i], values[i], values[i] >= lowest);
  }
};

// The passes over one row of logits and what they leave behind.
class Row {
 public:
  static Int bytes(Int vocabulary) {
    const Int blocks = blocks_in(vocabulary), pieces = (blocks + kPieceBlocks - 1) / kPieceBlocks;
    return (blocks * (kSampleBlock * 4 + 16) + pieces * 5 + 63) / 64 * 64;
  }
  Row(float* logits, Int vocabulary, void* memory)
      : logits_(logits), vocabulary_(vocabulary), blocks_(blocks_in(vocabulary)) {
    weights_ = static_cast<int32_t*>(memory);
    sums_ = reinterpret_cast<int64_t*>(weights_ + blocks_ * kSampleBlock);
    peaks_ = reinterpret_cast<float*>(sums_ + blocks_);
    heaviest_ = reinterpret_cast<int32_t*>(peaks_ + blocks_);
    piece_peaks_ = reinterpret_cast<float*>(heaviest_ + blocks_);
    piece_nan_ = reinterpret_cast<bool*>(piece_peaks_ + pieces());
  }

  Int pieces() const { return (blocks_ + kPieceBlocks - 1) / kPieceBlocks; }

  // First pass over a piece: bans, peaks.
  void look(Int piece, const uint32_t* mask) {
    const Span s = span(piece);
    if (mask) kernels().mask_logits(logits_ + s.token, s.tokens, mask + s.token / 32);
    piece_nan_[piece] = kernels().logit_peaks(logits_ + s.token, s.tokens, peaks_ + s.block);
    piece_peaks_[piece] = *std::max_element(peaks_ + s.block, peaks_ + s.block + s.blocks);
  }
  // Afterwards:
  float greatest() const { return *std::max_element(piece_peaks_, piece_peaks_ + pieces()); }
  SampleStatus status() const {
    if (std::any_of(piece_nan_, piece_nan_ + pieces(), [](bool nan) { return nan; })) return SampleStatus::kNotFinite;
    if (greatest() == kInfinity) return SampleStatus::kNotFinite;
    return greatest() == -kInfinity ? SampleStatus::kNothingAllowed : SampleStatus::kOk;
  }

  // Second pass over a piece: sums of weights, and the weights themselves for collect_weights().
  void weigh(Int piece, float inverse_temperature, bool keep) {
    const Span s = span(piece);
    kernels().weight_blocks(logits_ + s.token, s.tokens, peaks_ + s.block, greatest(), inverse_temperature,
                            sums_ + s.block, heaviest_ + s.block, keep ? weights_ + s.token : nullptr);
  }
  int64_t total() const {
    int64_t sum = 0;
    for (Int b = 0; b < blocks_; ++b) sum += sums_[b];
    return sum;
  }

  // The first token of the greatest logit.
  int32_t best() const {
    const float peak = greatest();
    Int token = (std::find(peaks_, peaks_ + blocks_, peak) - peaks_) * kSampleBlock;
    while (logits_[token] != peak) ++token;
    return static_cast<int32_t>(token);
  }

  // Tokens of the k greatest logits and all that tie with the k-th, with their keys.
  void collect_top_k(Int k, Candidates& found) const {
    int32_t lowest = std::numeric_limits<int32_t>::min();
    if (blocks_ > k) {  // the k-th greatest of the blocks' peaks is no greater than the k-th greatest logit
      std::transform(peaks_, peaks_ + blocks_, found.spare, key_of);
      std::nth_element(found.spare, found.spare + k - 1, found.spare + blocks_, std::greater<>());
      lowest = found.spare[k - 1];
    }
    for (Int b = 0; b < blocks_; ++b) {
      if (key_of(peaks_[b]) < lowest) continue;
      int32_t keys[kSampleBlock];
      const Int begin = b * kSampleBlock, end = end_of(b);
      std::transform(logits_ + begin, logits_ + end, keys, key_of);
      found.add_from(lowest, begin, keys, end - begin);
    }
    found.keep_from(found.greatest(k));
  }
  // Their weights in place of their keys.
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
  // A weight such that all lighter tokens together weigh no more than `spare`, and not far below the greatest such weight:
  // the fewer candidates are collected.
  int64_t light(int64_t total, int64_t spare) const {
    int64_t low = spare / vocabulary_ + 1, high = Int(1) << 30;
    for (int shift = 1; (low << 1) < high; shift = 1) {
      while ((low << (2 * shift + 2)) <= high) ++shift;  // halves the number of octaves between them
      const int64_t middle = low << shift;
      int64_t kept = 0;
      for (Int b = 0; b < blocks_; ++b)
        if (heaviest_[b] >= middle)
          kept += kernels().sum_from(weights_ + b * kSampleBlock, kSampleBlock, static_cast<int32_t>(middle));
      (total - kept <= spare ? low : high) = middle;
    }
    return low;
  }
  // Tokens of at least this weight, which is above 0.
  void collect_weights(int64_t lowest, Candidates& found) const {
    for (Int b = 0; b < blocks_; ++b) {
      const Int begin = b * kSampleBlock;
      if (heaviest_[b] >= lowest) found.add_from(static_cast<int32_t>(lowest), begin, weights_ + begin, end_of(b) - begin);
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
  int32_t* weights_;
  int64_t* sums_;
  float *peaks_, *piece_peaks_;
  int32_t* heaviest_;
  bool* piece_nan_;
};

// ------------------------------------------------------------------------------------------------------- choosing

int64_t share(double fraction, int64_t total) {  // floor(fraction x total), less than total
  return std::min(static_cast<int64_t>(fraction * static_cast<double>(total)), total - 1);
}
int64_t nucleus_target(double top_p, int64_t total) {  // ceil(top_p x total), 1 to total
  const auto target = static_cast<int64_t>(std::ceil(top_p * static_cast<double>(total)));
  return std::min(std::max<int64_t>(target, 1), total);
}

// The smallest set of greatest weights whose sum reaches a target: all above `weight`, and the first `ties` equal to it.
struct Cut {
  int32_t weight = 0;
  int64_t ties = std::numeric_limits<int64_t>::max();
};
// By digits of the weight, from the highest, without sorting. All of the candidates where they don't reach the target.
Cut find_cut(const Candidates& c, int64_t target) {
  constexpr int kDigit = 10, kBins = (1 << kDigit) + 1;  // 2^30 has the first digit 1024
  int64_t sums[kBins];
  int64_t prefix = 0;
  for (int shift = 2 * kDigit; shift >= 0; shift -= kDigit) {
    std::fill(sums, sums + kBins, 0);
    const int64_t low = prefix << kDigit;  // of weights that agree so far, the least shifted one
    for (Int i = 0; i < c.count; ++i) {
      const int64_t bin = (c.values[i] >> shift) - low;
      if (bin >= 0 && bin < kBins - (shift < 2 * kDigit)) sums[bin] += c.values[i];
    }
    int64_t bin = kBins - 1;
    while (bin >= 0 && sums[bin] < target) target -= sums[bin--];
    if (bin < 0) return {};
    prefix = low + bin;
  }
  return {static_cast<int32_t>(prefix), prefix > 0 ? (target + prefix - 1) / prefix : 0};
}

int32_t choose_of(Candidates& c, const SampleRow& row, int64_t target) {
  if (target > 0) {
    Cut cut = find_cut(c, target);
    const Int all = c.count;
    c.count = 0;
    for (Int i = 0; i < all; ++i) {
      const bool tie = c.values[i] == cut.weight;
      c.add(c.ids[i], c.values[i], c.values[i] > cut.weight || (tie && cut.ties > 0));
      cut.ties -= tie;
    }
  }
  c.keep_from(row.min_weight);
  int64_t total = 0;
  for (Int i = 0; i < c.count; ++i) total += c.values[i];
  int64_t left = share(row.uniform, total);
  Int i = 0;
  while (c.values[i] <= left) left -= c.values[i++];
  return c.ids[i];
}

bool limits_top_k(const SampleRow& row, Int vocabulary) { return 0 < row.top_k && row.top_k < vocabulary; }
bool keeps_weights(const SampleRow& row) { return row.top_p < 1.0 || row.min_weight > 0; }
bool weighs_all(const SampleRow& row, Int vocabulary) {
  return row.inverse_temperature > 0 && !limits_top_k(row, vocabulary);
}

// After look(), and after weigh() where weighs_all().
int32_t choose(const Row& looked, const SampleRow& row, Int vocabulary) {
  if (!(row.inverse_temperature > 0)) return looked.best();
  const bool nucleus = row.top_p < 1.0;
  if (limits_top_k(row, vocabulary)) {
    Candidates c(vocabulary);
    looked.collect_top_k(row.top_k, c);
    looked.weigh(c, row.inverse_temperature);
    int64_t total = 0;
    for (Int i = 0; i < c.count; ++i) total += c.values[i];
    return choose_of(c, row, nucleus ? nucleus_target(row.top_p, total) : 0);
  }
  const int64_t total = looked.total();
  if (!keeps_weights(row)) return looked.token_at(share(row.uniform, total), row.inverse_temperature);
  Candidates c(vocabulary);
  int64_t target = 0, lowest = row.min_weight;
  if (nucleus) {
    target = nucleus_target(row.top_p, total);
    lowest = std::max(lowest, looked.light(total, total - target));
  }
  looked.collect_weights(lowest, c);
  return choose_of(c, row, target);
}

// Penalties, bias and bans of a row, put in place; `saved` keeps what they change. False for a token outside the vocabulary.
bool apply_tables(const SampleRow& row, float* logits, Int vocabulary, float* saved) {
  const auto outside = [&](int32_t token) { return token < 0 || token >= vocabulary; };
  if (std::any_of(row.penalty_token, row.penalty_token + row.penalties, outside) ||
      std::any_of(row.bias_token, row.bias_token + row.biases, outside))
    return false;
  for (Int i = 0; i < row.penalties; ++i) {
    float& logit = logits[row.penalty_token[i]];
    *saved++ = logit;
    logit = logit > 0 ? logit / row.repetition : logit * row.repetition;
    const auto count = static_cast<float>(row.penalty_count[i]);
    if (count > 0) logit -= count * row.frequency + row.presence;
  }
  for (Int i = 0; i < row.biases; ++i) {
    float& logit = logits[row.bias_token[i]];
    *saved++ = logit;
    logit = row.bias[i] == -std::numeric_limits<float>::infinity() ? row.bias[i] : logit + row.bias[i];
  }
  return true;
}
void take_back(const SampleRow& row, float* logits, const float* saved) {
  saved += row.penalties + row.biases;
  for (Int i = row.biases; i-- > 0;) logits[row.bias_token[i]] = *--saved;
  for (Int i = row.penalties; i-- > 0;) logits[row.penalty_token[i]] = *--saved;
}
Int saved_bytes(const SampleRow& row) { return (row.penalties + row.biases) * Int(sizeof(float)); }

}  // namespace

void sampling_uniforms(SampleRow* rows, Int count) {
  for (SampleRow* row = rows; row < rows + count; ++row)
    row->uniform = static_cast<double>(philox(row->seed[0], row->seed[1], row->position) >> 11) * 0x1p-53;
}

void sample_whole_rows(Team& team, const SampleCall& c) {
  team.deal(c.count, [&](Int r) {
    const SampleRow& row = c.rows[r];
    float* logits = c.logits + r * c.vocabulary;
    auto* saved = static_cast<float*>(private_memory(Private::kSaved, saved_bytes(row)));
    c.ids[r] = -1;
    if (!apply_tables(row, logits, c.vocabulary, saved)) {
      c.status[r] = static_cast<uint8_t>(SampleStatus::kBadToken);
      return;
    }
    Row passes(logits, c.vocabulary, private_memory(Private::kSampling, Row::bytes(c.vocabulary)));
    for (Int p = 0; p < passes.pieces(); ++p) passes.look(p, c.mask ? c.mask + r * c.mask_words : nullptr);
    const SampleStatus status = passes.status();
    c.status[r] = static_cast<uint8_t>(status);
    if (status == SampleStatus::kOk) {
      if (weighs_all(row, c.vocabulary))
        for (Int p = 0; p < passes.pieces(); ++p) passes.weigh(p, row.inverse_temperature, keeps_weights(row));
      c.ids[r] = choose(passes, row, c.vocabulary);
    }
    take_back(row, logits, saved);
  });
}

void sample_shared_rows(Team& team, const SampleCall& c) {
  const Int pieces = Row(nullptr, c.vocabulary, c.memory).pieces(), row_bytes = Row::bytes(c.vocabulary);
  const auto passes = [&](Int r) { return Row(c.logits + r * c.vocabulary, c.vocabulary, c.memory + r * row_bytes); };
  const auto saved = [&](Int r) { return c.saved + c.saved_begin[r]; };
  team.deal(c.count, [&](Int r) {
    const bool good = apply_tables(c.rows[r], c.logits + r * c.vocabulary, c.vocabulary, saved(r));
    c.status[r] = static_cast<uint8_t>(good ? SampleStatus::kOk : SampleStatus::kBadToken);
    c.ids[r] = -1;
  });
  team.sync();
  team.deal(c.count * pieces, [&](Int i) {
    const Int r = i / pieces;
    passes(r).look(i % pieces, c.mask ? c.mask + r * c.mask_words : nullptr);
  });
  team.sync();
  team.deal(c.count * pieces, [&](Int i) {
    const Int r = i / pieces;
    const Row looked = passes(r);
    if (weighs_all(c.rows[r], c.vocabulary) && looked.status() == SampleStatus::kOk)
      passes(r).weigh(i % pieces, c.rows[r].inverse_temperature, keeps_weights(c.rows[r]));
  });
  team.sync();
  team.deal(c.count, [&](Int r) {
    if (c.status[r] == static_cast<uint8_t>(SampleStatus::kBadToken)) return;
    const Row looked = passes(r);
    const SampleStatus status = looked.status();
    c.status[r] = static_cast<uint8_t>(status);
    if (status == SampleStatus::kOk) c.ids[r] = choose(looked, c.rows[r], c.vocabulary);
    take_back(c.rows[r], c.logits + r * c.vocabulary, saved(r));
  });
}

void sample_tokens(SampleCall c) {
  if (c.count == 0) return;
  const int threads = c.count * c.vocabulary < (Int(1) << 15) ? 1 : num_threads();
  if (threads == 1 || c.count >= 2 * threads) {
    parallel(threads, 1, [&](Team& team) { sample_whole_rows(team, c); });
    return;
  }
  Int entries = 0;
  for (Int r = 0; r < c.count; ++r) {
    c.saved_begin[r] = entries;
    entries += c.rows[r].penalties + c.rows[r].biases;
  }
  c.saved = static_cast<float*>(private_memory(Private::kSaved, entries * Int(sizeof(float))));
  c.memory = static_cast<char*>(private_memory(Private::kSampling, c.count * Row::bytes(c.vocabulary)));
  parallel(threads, 4, [&](Team& team) { sample_shared_rows(team, c); });
}

void top_logits(Team& team, const TopLogitsCall& c) {
  team.deal(c.count, [&](Int r) {
    // Nothing is written to the logits: there is no mask.
    Row passes(const_cast<float*>(c.logits) + c.which[r] * c.vocabulary, c.vocabulary,
               private_memory(Private::kSampling, Row::bytes(c.vocabulary)));
    for (Int p = 0; p < passes.pieces(); ++p) passes.look(p, nullptr);
    std::fill(c.ids + r * c.k, c.ids + (r + 1) * c.k, -1);
    c.total[r] = 0;
    if (passes.status() != SampleStatus::kOk) return;
    for (Int p = 0; p < passes.pieces(); ++p) passes.weigh(p, 1.0f, false);
    c.greatest[r] = passes.greatest();
    c.total[r] = passes.total();
    const Int k = std::min(c.k, c.vocabulary);
    if (k == 0) return;
    Candidates found(c.vocabulary);
    passes.collect_top_k(k, found);
    int32_t* order = found.spare;
    for (Int i = 0; i < found.count; ++i) order[i] = static_cast<int32_t>(i);
    std::partial_sort(order, order + k, order + found.count, [&](int32_t a, int32_t b) {
      return found.values[a] != found.values[b] ? found.values[a] > found.values[b] : a < b;
    });
    for (Int i = 0; i < k; ++i) c.ids[r * c.k + i] = found.ids[order[i]];
  });
}

}  // namespace cai
