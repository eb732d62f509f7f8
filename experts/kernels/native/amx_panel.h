// A panel of weights as AMX multiplies with it: compact and int4 ones are decoded slab by slab, and memory is asked for what
// follows. Included by amx_tile.h.
#pragma once

#include "rows.h"

namespace {

constexpr int kSlabsKept = 2;  // where a panel is not kept as a whole: one is decoded while the one before is still to be read

// Lines that are wanted soon, of which each call asks for a few.
struct SoonLines {
  const char* at = nullptr;
  int a_call = 0, left = 0;
  void fetch() {
    for (int i = 0; i < a_call && left > 0; i++, left--, at += 64) Simd::prefetch_later(at);
  }
};

// Int4 numbers as bytes, in the order of an int8 panel.
template <class Fetch>
inline void expand_nibbles(const uint8_t* from, size_t num_bytes, uint8_t* to, Fetch fetch) {
  for (size_t i = 0; i < num_bytes; i += 64) {
    fetch(from + i);
    const Simd::Ints both = Simd::load_bytes(from + i);
    Simd::store_bytes(to + 2 * i, Simd::low_nibbles(both));
    Simd::store_bytes(to + 2 * i + 64, Simd::high_nibbles(both));
  }
}

// Whether products read something else than what is kept.
inline bool is_decoded(const Matrix& matrix) { return matrix.format == kCompact || matrix.format == kInt4; }

// Some inputs of a panel handed out slab by slab, in ascending order, as bfloat16 numbers or bytes.
class AmxPanel {
 public:
  // next: the panel whose inputs are wanted next, which is only asked for. decoded: memory for all inputs, or for kSlabsKept
  // slabs. asks_itself: it asks for itself on the way, and at its end for the next one; else another panel has asked for it.
  AmxPanel(const Matrix& matrix, int panel, InputRange inputs, const void* next, uint8_t* decoded, bool keeps_all,
           bool asks_itself)
      : matrix_(matrix), inputs_(inputs), panel_(panel),
        input_bytes_(matrix.format == kCompact || matrix.format == kBfloat16 ? kPanelColumns * 2 : kPanelColumns),
        data_((const uint8_t*)panel_data(matrix, panel)),
        next_(next ? (const char*)next + panel_bytes(matrix, inputs.first) : nullptr),
        own_((const char*)data_ + panel_bytes(matrix, inputs.end), next_), decoded_(decoded), keeps_all_(keeps_all),
        asks_itself_(asks_itself) {
    if (matrix.format == kCompact) exceptions_ = Exceptions(matrix, panel, inputs.first / kStepInputs);
  }

  // Of num_inputs from `input` on; null behind the last one. Inlined: where num_inputs is a constant, as for
  // bfloat16, nothing is divided.
  __attribute__((always_inline)) const uint8_t* slab(int input, int num_inputs) {
    if (input == inputs_.end) return nullptr;
    const auto fetch = [&](const void* line) {
      if (asks_itself_) own_.fetch(line);
    };
    const int place = keeps_all_ ? input - inputs_.first : input / num_inputs % kSlabsKept * num_inputs;
    uint8_t* to = decoded_ + (size_t)place * input_bytes_;
    if (matrix_.format == kCompact) {
      expand_steps(matrix_, panel_, input / kStepInputs, (input + num_inputs) / kStepInputs, exceptions_, (uint16_t*)to, fetch);
      return to;
    }
    if (matrix_.format == kInt4) {
      const size_t half = input_bytes_ / 2;
      expand_nibbles(data_ + input * half, num_inputs * half, to, fetch);
      return to;
    }
    const uint8_t* from = data_ + (size_t)input * input_bytes_;
    for (int i = 0; i < num_inputs * input_bytes_; i += 64) fetch(from + i);
    return from;
  }

  // From an input on, once every slab was handed out.
  const uint8_t* plain(int input) const {
    return is_decoded(matrix_) ? decoded_ + (size_t)(input - inputs_.first) * input_bytes_ : data_ + (size_t)input * input_bytes_;
  }

  // A part of the panel that is wanted next, over so many calls.
  SoonLines share_of_next(int part, int num_parts, int num_calls) const {
    if (!next_) return {};
    const int lines = (int)(panel_bytes(matrix_, inputs_.end - inputs_.first) / 64), share = (lines + num_parts - 1) / num_parts;
    const int first = part * share;
    return {next_ + (size_t)first * 64, (share + num_calls - 1) / num_calls, lines - first < share ? lines - first : share};
  }

 private:
  const Matrix& matrix_;
  const InputRange inputs_;
  const int panel_, input_bytes_;
  const uint8_t* data_;
  const char* next_;
  const OwnPanel own_;
  uint8_t* decoded_;
  const bool keeps_all_, asks_itself_;
  Exceptions exceptions_;
};

}  // namespace
