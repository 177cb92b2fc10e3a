// Sampling over the threads: rows of logits to tokens, and the logarithms of the greatest probabilities. kernels/sampling.py
// has the definition. Sums are of integers, so neither the threads nor the pieces change a token.
#include "sampling.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "sampling_row.h"

namespace cai {
namespace {

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
// Selects by digits of the weight, from the highest, without sorting. If all candidates together don't reach the target,
// takes all.
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
constexpr int64_t kOne = Int(1) << 30;  // the weight of the greatest logit
// The least weight of a token that may be chosen, if all weights sum to `total` or more. 0: any token may be chosen.
int32_t least_weight(const SampleRow& row, Int vocabulary, int64_t total) {
  int64_t lowest = row.min_weight;
  if (row.top_p < 1.0) {
    // top_p excludes the lightest tokens up to a sum of `spare` (4 less, for the rounding of the products). All tokens that
    // weigh no more than spare / vocabulary are among them: their sum is at most `spare`.
    total = std::max(total, kOne);
    const int64_t spare = std::max<int64_t>(total - nucleus_target(row.top_p, total) - 4, 0);
    lowest = std::max(lowest, spare / vocabulary + 1);
  }
  return static_cast<int32_t>(lowest);
}
bool weighs_all(const SampleRow& row, Int vocabulary) {
  return row.inverse_temperature > 0 && !limits_top_k(row, vocabulary);
}

// Called after look(), and if weighs_all() also after weigh().
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
  int64_t lowest = least_weight(row, vocabulary, total);
  if (lowest == 0) return looked.token_at(share(row.uniform, total), row.inverse_temperature);
  Candidates c(vocabulary);
  int64_t target = 0;
  if (nucleus) {
    target = nucleus_target(row.top_p, total);
    lowest = looked.light(lowest, total, total - target);
  }
  looked.collect_weights(lowest, c);
  return choose_of(c, row, target);
}

// Applies a row's penalties, bias and bans to its logits; `saved` gets the logits that change. False for a token outside the
// vocabulary.
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
      int64_t total = 0;
      for (Int p = 0; weighs_all(row, c.vocabulary) && p < passes.pieces(); ++p)
        total += passes.weigh(p, row.inverse_temperature, least_weight(row, c.vocabulary, total));
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
      passes(r).weigh(i % pieces, c.rows[r].inverse_temperature,
                      least_weight(c.rows[r], c.vocabulary, kOne));
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
    // Without a mask, look() does not write to the logits.
    Row passes(const_cast<float*>(c.logits) + c.which[r] * c.vocabulary, c.vocabulary,
               private_memory(Private::kSampling, Row::bytes(c.vocabulary)));
    for (Int p = 0; p < passes.pieces(); ++p) passes.look(p, nullptr);
    std::fill(c.ids + r * c.k, c.ids + (r + 1) * c.k, -1);
    c.total[r] = 0;
    if (passes.status() != SampleStatus::kOk) return;
    for (Int p = 0; p < passes.pieces(); ++p) passes.weigh(p, 1.0f, 0);
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
