// bfloat16 weights in 12 bits each, without loss. A number's low byte (the exponent's last bit and the mantissa) is kept
// as it is. Its high byte (sign and exponent) is nearly always one of few: four bits say which of the sixteen most
// frequent ones of its panel. Where a number has another, its step of the panel is kept once more, as it was. A product
// decodes in registers what it reads, so that what memory limits takes 3/4 of the time.
//
// The exponents of a model's weights carry under three bits of information: DFloat11 (Zhang et al., 2025) writes them in
// Huffman's code, for GPUs. A code of fixed length takes a bit more and five instructions for 64 numbers.
//
// A panel is [K / 4] steps of four inputs: 64 bytes of codes, of the first pair of inputs in the low nibbles and of the
// second in the high ones, then the 64 low bytes of either pair. Within a pair, byte 16 l + i is number 8 l + i of the
// panel's first vector for i < 8, else number 8 l + i - 8 of its second: what interleaving bytes by lanes of 128 bits
// puts in order.
#pragma once

#include "kernels.h"

enum { kStepInputs = 4, kStepNumbers = kStepInputs * kPanelColumns, kStepBytes = 192 };

struct Dictionary {  // of a panel
  uint8_t high_bytes[16];  // by code
  int32_t first_exception, num_exceptions;
};

struct Exception {
  int32_t step;  // ascending within a panel
  uint16_t numbers[kStepNumbers];  // [2 pairs][32 columns][2], as in a plain panel
};

namespace {

// Where byte i of a pair stands among the pair's numbers in a plain panel.
constexpr int place_in_pair(int i) { return (i % 16 < 8 ? 0 : kPanelColumns) + i / 16 * 8 + i % 8; }

inline const Exception* exceptions_of(const Matrix& m, int panel) {
  const int panels = (m.num_outputs + kPanelColumns - 1) / kPanelColumns;
  return (const Exception*)(m.dictionaries + panels) + m.dictionaries[panel].first_exception;
}

// The steps of a panel that are kept as they were, in their order.
struct Exceptions {
  const Exception *at = nullptr, *end = nullptr;
  Exceptions() = default;
  // From a step on.
  Exceptions(const Matrix& m, int panel, int first_step = 0)
      : at(exceptions_of(m, panel)), end(at + m.dictionaries[panel].num_exceptions) {
    while (at < end && at->step < first_step) at++;
  }
  int next(int none) const { return at < end ? at->step : none; }
  // The numbers of a step that is one; null for others. Steps are asked for in ascending order.
  const uint16_t* take(int step) { return next(-1) == step ? at++->numbers : nullptr; }
};

// The numbers of a pair of inputs as in a plain panel.
inline void expand_pair(const uint8_t* high_bytes, const uint8_t* codes, const uint8_t* low_bytes, uint16_t* to) {
  for (int i = 0; i < 64; i++) to[place_in_pair(i)] = (uint16_t)(high_bytes[codes[i]] << 8 | low_bytes[i]);
}

// The bytes of a step in the order of place_in_pair.
inline void split_step(const uint16_t* numbers, uint8_t* high, uint8_t* low) {
  for (int pair = 0; pair < 2; pair++)
    for (int i = 0; i < 64; i += 8) {
      const uint16_t* eight = numbers + pair * 64 + place_in_pair(i);
      for (int j = 0; j < 8; j++) high[pair * 64 + i + j] = (uint8_t)(eight[j] >> 8);
      for (int j = 0; j < 8; j++) low[pair * 64 + i + j] = (uint8_t)eight[j];
    }
}

// Codes of a step's high bytes; returns whether every one is in the dictionary.
inline bool encode(const uint8_t* high, const uint8_t* high_bytes, uint8_t* codes) {
  uint8_t is_known[kStepNumbers] = {};
  memset(codes, 0, kStepNumbers);
  for (int code = 0; code < 16; code++)
    for (int i = 0; i < kStepNumbers; i++) {
      const uint8_t is_it = high[i] == high_bytes[code] ? 0xff : 0;
      codes[i] |= is_it & (uint8_t)code;
      is_known[i] |= is_it;
    }
  uint8_t all = 0xff;
  for (int i = 0; i < kStepNumbers; i++) all &= is_known[i];
  return all == 0xff;
}

// The sixteen most frequent high bytes of a plain panel, the smaller first where equal, and how many steps have others.
void choose_dictionary(const uint16_t* plain, int num_inputs, Dictionary* to) {
  const int num_steps = num_inputs / kStepInputs;
  uint32_t counts[4][256] = {};  // four, so that equal neighbours do not wait for each other
  for (int step = 0; step < num_steps; step++)
    for (int i = 0; i < kStepNumbers; i += 4)
      for (int j = 0; j < 4; j++) counts[j][plain[(size_t)step * kStepNumbers + i + j] >> 8]++;
  for (int high = 0; high < 256; high++) counts[0][high] += counts[1][high] + counts[2][high] + counts[3][high];
  for (int code = 0; code < 16; code++) {
    int best = 0;
    for (int high = 1; high < 256; high++)
      if (counts[0][high] > counts[0][best]) best = high;
    to->high_bytes[code] = (uint8_t)best;
    counts[0][best] = 0;
  }
  to->num_exceptions = 0;
  uint8_t high[kStepNumbers], low[kStepNumbers], codes[kStepNumbers];
  for (int step = 0; step < num_steps; step++) {
    split_step(plain + (size_t)step * kStepNumbers, high, low);
    to->num_exceptions += !encode(high, to->high_bytes, codes);
  }
}

// Writes a panel and its exceptions, for which its dictionary has the place.
void compact_panel(const uint16_t* plain, int panel, const Matrix* to) {
  const int num_steps = to->num_inputs / kStepInputs;
  uint8_t* bytes = (uint8_t*)to->data + (size_t)panel * num_steps * kStepBytes;
  Exception* exception = (Exception*)exceptions_of(*to, panel);
  uint8_t high[kStepNumbers], low[kStepNumbers], codes[kStepNumbers];
  for (int step = 0; step < num_steps; step++, plain += kStepNumbers, bytes += kStepBytes) {
    split_step(plain, high, low);
    if (!encode(high, to->dictionaries[panel].high_bytes, codes)) {
      exception->step = step;
      memcpy(exception++->numbers, plain, sizeof exception->numbers);
    }
    for (int i = 0; i < 64; i++) bytes[i] = (uint8_t)(codes[i] | codes[64 + i] << 4);
    memcpy(bytes + 64, low, sizeof low);
  }
}

}  // namespace
