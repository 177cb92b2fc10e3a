// Sampling: from rows of logits to tokens. kernels/sampling.py has the definition, and lays out SampleRow.
#pragma once

#include "ops.h"

namespace cai {

struct SampleRow {
  uint64_t seed[2];  // low, high: the key of the random number
  uint64_t position;
  double uniform;  // in [0, 1)
  double top_p;    // 1: off
  const int32_t* penalty_token;  // different tokens
  const int32_t* penalty_count;  // how often each was generated; 0: it is in the prompt only
  Int penalties;
  const int32_t* bias_token;  // different tokens
  const float* bias;          // -inf: a ban
  Int biases;
  float inverse_temperature;  // 0: greedy
  float repetition, frequency, presence;
  int32_t top_k;       // 0: off
  int32_t min_weight;  // min_p in units of 2^-30; 0: off
};
static_assert(sizeof(SampleRow) == 112, "written by Python");

enum class SampleStatus : uint8_t { kOk = 0, kNotFinite = 1, kNothingAllowed = 2, kBadToken = 3 };

struct SampleCall {
  const SampleRow* rows;
  Int count, vocabulary;
  float* logits;         // [count, vocabulary]; the mask's bans are written into it
  const uint32_t* mask;  // [count, mask_words], or null
  Int mask_words;
  int32_t* ids;     // -1 where the status is not ok
  uint8_t* status;  // SampleStatus
  Int* saved_begin;  // [count], for sample_tokens
  // Filled in by sample_tokens where few rows are shared by the threads:
  float* saved;
  char* memory;
};
void sample_tokens(SampleCall call);

// Fills in `uniform` by Philox, from seed and position.
void sampling_uniforms(SampleRow* rows, Int count);

struct TopLogitsCall {
  const float* logits;   // [rows, vocabulary]
  const int32_t* which;  // [count] rows
  Int count, vocabulary, k;
  float* greatest;  // [count]
  int64_t* total;   // [count]: sum of the weights at temperature 1; 0: a logit is NaN or +inf, or all are -inf
  int32_t* ids;     // [count, k], by falling logit, equal ones by id; -1 past the vocabulary
};
void top_logits(Team& team, const TopLogitsCall& call);

}  // namespace cai
