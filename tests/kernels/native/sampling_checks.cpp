// logit_peaks, mask_logits, token_weights, weight_blocks, sum_from and collect. Weights are compared with the generic
// table's, exactly: no instruction set may move a token.
#include <algorithm>
#include <cmath>
#include <limits>

#include "checks.h"

namespace cai::check {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int64_t kCounts[] = {1, 3, 16, 17, 65, 127, 128, 129, 200, 321, 512, 777};

int64_t blocks_of_tokens(int64_t count) { return (count + kSampleBlock - 1) / kSampleBlock; }
float greatest_of(const Buffer<float>& logits, int64_t begin, int64_t end) {
  float greatest = -kInfinity;
  for (int64_t i = begin; i < end; ++i) greatest = std::fmax(greatest, logits[i]);
  return greatest;
}
Buffer<float> random_logits(Random& random, int64_t count) {
  Buffer<float> logits = random.floats(count, -30, 10);
  for (float& l : logits) l = random.between(0, 9) == 0 ? -kInfinity : l;
  logits[random.between(0, count - 1)] = 3;
  return logits;
}

void check_peaks(const KernelTable& table, Report& report) {
  Random random(11);
  for (const int64_t count : kCounts) {
    Buffer<float> logits = random_logits(random, count), peaks(blocks_of_tokens(count), kUntouched);
    report.expect(!table.logit_peaks(logits.data(), count, peaks.data()), "logit_peaks", "found a NaN that is not there");
    for (int64_t b = 0; b < blocks_of_tokens(count); ++b)
      report.expect(peaks[b] == greatest_of(logits, b * kSampleBlock, std::min(count, (b + 1) * kSampleBlock)),
                    "logit_peaks", "a peak is not the greatest");
    const int64_t place = random.between(0, count - 1);
    logits[place] = kInfinity;  // with -inf its sum is NaN, but no logit is
    report.expect(!table.logit_peaks(logits.data(), count, peaks.data()), "logit_peaks", "took infinity for NaN");
    report.expect(peaks[place / kSampleBlock] == kInfinity, "logit_peaks", "lost infinity");
    for (const float nan : {std::nanf(""), -std::nanf("")}) {
      logits[place] = nan;
      report.expect(table.logit_peaks(logits.data(), count, peaks.data()), "logit_peaks", "overlooked a NaN");
    }
  }
}

void check_mask(const KernelTable& table, Report& report) {
  Random random(12);
  for (const int64_t count : kCounts) {
    const Buffer<float> logits = random.floats(count);
    Buffer<float> masked = logits, want = logits;
    Buffer<uint32_t> mask((count + 31) / 32);
    for (uint32_t& word : mask) word = random.between(0, 2) ? static_cast<uint32_t>(random.next()) : 0xffffffffu;
    for (int64_t i = 0; i < count; ++i)
      if (!(mask[i / 32] >> i % 32 & 1)) want[i] = -kInfinity;
    table.mask_logits(masked.data(), count, mask.data());
    report.same(masked, want, "mask_logits", "bits and bans differ");
  }
}

void check_weights(const KernelTable& table, Report& report) {
  Random random(13);
  for (const int64_t count : kCounts) {
    const int64_t blocks = blocks_of_tokens(count);
    const Buffer<float> logits = random_logits(random, count);
    const float greatest = greatest_of(logits, 0, count), scale = random.uniform(0.2f, 3.0f);
    Buffer<float> peaks(blocks);
    table.logit_peaks(logits.data(), count, peaks.data());
    Buffer<int64_t> sums(blocks), sums_alone(blocks);
    Buffer<int32_t> ids(blocks * kSampleBlock), kept(blocks * kSampleBlock), want_ids, want_kept;
    const auto lowest = static_cast<int32_t>(random.between(1, 1000));
    const int64_t found = table.weight_blocks(logits.data(), count, peaks.data(), greatest, scale, sums.data(), lowest, 7,
                                              ids.data(), kept.data());
    table.weight_blocks(logits.data(), count, peaks.data(), greatest, scale, sums_alone.data(), 0, 0, nullptr, nullptr);
    int64_t above = 0;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t begin = b * kSampleBlock, n = std::min(kSampleBlock, count - begin);
      const Buffer<float> part(logits.begin() + begin, logits.begin() + begin + n);  // ends where its memory does
      Buffer<int32_t> weights(kSampleBlock), generic(kSampleBlock);
      table.token_weights(part.data(), n, greatest, scale, weights.data());
      kernels_generic()->token_weights(part.data(), n, greatest, scale, generic.data());
      int64_t sum = 0;
      for (int64_t i = 0; i < kSampleBlock; ++i) {
        report.expect(weights[i] == generic[i], "token_weights", "another weight than the generic table's");
        sum += weights[i];
        if (i >= n) {
          report.expect(weights[i] == 0, "token_weights", "a weight beyond the last token");
          continue;
        }
        if (weights[i] >= lowest) {
          want_ids.push_back(static_cast<int32_t>(7 + begin + i));
          want_kept.push_back(weights[i]);
        }
        above += weights[i] >= 1000 ? weights[i] : 0;
        const double want = std::ldexp(std::exp((double(part[i]) - greatest) * scale), 30);
        report.value("token_weights", weights[i], want, want + 2e6, 5e-7);  // half a unit, beside 5e-7 of itself
      }
      report.expect(sums[b] == sum && sums_alone[b] == sum, "weight_blocks", "a wrong sum");
    }
    report.expect(found == static_cast<int64_t>(want_ids.size()) &&
                      std::equal(want_ids.begin(), want_ids.end(), ids.begin()) &&
                      std::equal(want_kept.begin(), want_kept.end(), kept.begin()),
                  "weight_blocks", "not the tokens from the lowest weight on, or other weights than token_weights'");
    report.expect(table.sum_from(kept.data(), found, 1000) == above, "sum_from", "a wrong sum");
  }
}

void check_collect(const KernelTable& table, Report& report) {
  Random random(14);
  for (const int64_t count : kCounts) {
    Buffer<int32_t> values(count), numbers(count), want_ids, want;
    for (int32_t& v : values) v = static_cast<int32_t>(random.between(-50, 50));
    for (int32_t& n : numbers) n = static_cast<int32_t>(random.next());
    const auto lowest = static_cast<int32_t>(random.between(-60, 60));
    for (int64_t i = 0; i < count; ++i) {
      if (values[i] < lowest) continue;
      want_ids.push_back(numbers[i]);
      want.push_back(values[i]);
    }
    Buffer<int32_t> ids(count), kept(count);
    const auto expect = [&](int64_t found) {
      report.expect(found == static_cast<int64_t>(want.size()) && std::equal(want.begin(), want.end(), kept.begin()) &&
                        std::equal(want_ids.begin(), want_ids.end(), ids.begin()),
                    "collect", "not the values from the lowest on");
    };
    expect(table.collect(values.data(), numbers.data(), count, lowest, ids.data(), kept.data()));
    kept = values;
    ids = numbers;
    expect(table.collect(kept.data(), ids.data(), count, lowest, ids.data(), kept.data()));
  }
}

}  // namespace

void check_sampling(const KernelTable& table, Report& report) {
  check_peaks(table, report);
  check_mask(table, report);
  check_weights(table, report);
  check_collect(table, report);
}

}  // namespace cai::check
