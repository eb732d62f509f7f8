// Products with compact panels: decoded in registers where one tile of whole panels covers the rows, else once, into memory
// that stays in cache. Included by tile.h.
#pragma once

namespace {

// add_pair with the weights of a step that was kept as it is.
template <class S, int M, int V>
inline __attribute__((always_inline)) void add_plain_pair(typename S::Floats (&sums)[M][V], const uint16_t* const* plain,
                                                          int place, const typename S::Bf16Input* const* rows, int at) {
  if constexpr (S::kTakesPairsApart) {
    static_assert(V == 2);
    const typename S::Bf16Weights w[2] = {S::load_pairs(plain[0] + place), S::load_pairs(plain[0] + place + 32)};
    add_pair<2, S>(sums, 0, w, rows, at);
  } else {
#pragma GCC unroll 12
    for (int m = 0; m < M; m++) {
      const typename S::Bf16Pair input = S::broadcast_pair(rows[m] + at);
#pragma GCC unroll 4
      for (int j = 0; j < V; j++)
        sums[m][j] = S::dot(sums[m][j], S::load_pairs(plain[j / 2] + place + (j & 1) * 32), input);
    }
  }
}

// The sums of tile_bf16, of panels that are decoded as they are read; a single panel may be left as a plain one.
template <int M, int V, int kPrefetch>
inline void tile_compact(const Simd::Bf16Input* const* x, const Panels& p, Ahead<kPrefetch> ahead, float* out) {
  static_assert(V > 1, "a panel is decoded as a whole");
  constexpr int kPanels = V > 2 ? 2 : 1;
  const Matrix& matrix = *p.matrix;
  const int num_steps = matrix.num_inputs / kStepInputs, panels[2] = {p.first, V > 2 ? p.second : p.first};
  const uint8_t* bytes[2];
  for (int i = 0; i < 2; i++) bytes[i] = (const uint8_t*)matrix.data + panels[i] * panel_bytes(matrix);
  Exceptions exceptions[2] = {{matrix, panels[0]}, {matrix, panels[1]}};
  typename Simd::Floats sums[M][V];
#pragma GCC unroll 12
  for (int m = 0; m < M; m++)
#pragma GCC unroll 4
    for (int j = 0; j < V; j++) sums[m][j] = Simd::zero();
  const Simd::Bf16Input* rows[M];
  for (int m = 0; m < M; m++) rows[m] = x[m];
  for (int step = 0;; step++) {
    int last = exceptions[0].next(num_steps);
    if (kPanels == 2) last = exceptions[1].next(num_steps) < last ? exceptions[1].next(num_steps) : last;
    const typename Simd::Table tables[2] = {Simd::load_table(matrix.dictionaries[panels[0]].high_bytes),
                                            Simd::load_table(matrix.dictionaries[panels[1]].high_bytes)};
    const uint8_t *a = bytes[0] + (size_t)step * kStepBytes, *b = bytes[1] + (size_t)step * kStepBytes;
    for (; step < last; step++, a += kStepBytes, b += kStepBytes) {
#pragma GCC unroll 3
      for (int line = 0; line < kStepBytes; line += 64) {
        ahead.fetch_a(a + line);
        if (kPanels == 2) ahead.fetch_b(b + line);
      }
#pragma GCC unroll 2
      for (int i = 0; i < kPanels; i++) {
        const uint8_t* at = i ? b : a;
        const typename Simd::Ints codes = Simd::load_bytes(at);
#pragma GCC unroll 2
        for (int pair = 0; pair < 2; pair++) {
          const typename Simd::Ints own = pair ? Simd::high_nibbles(codes) : Simd::low_nibbles(codes);
          typename Simd::Bf16Weights w[2];
          ahead.fetch_next();
          if (kPrefetch == kAhead) {
            Simd::expand(tables[i], own, at + 64 + 64 * pair, w);
          } else {
            uint16_t* plain = p.expanded + (size_t)step * kStepNumbers + 64 * pair;
            Simd::expand_to(tables[i], own, at + 64 + 64 * pair, plain);
            w[0] = Simd::load_pairs(plain);
            w[1] = Simd::load_pairs(plain + 32);
          }
          add_pair<2, Simd>(sums, 2 * i, w, rows, 4 * step + 2 * pair);
        }
      }
    }
    if (step == num_steps) break;
    alignas(64) uint16_t decoded[2][kStepNumbers];
    const uint16_t* plain[2];  // of a panel that has an exception here, and maybe of the other one
    for (int i = 0; i < kPanels; i++) plain[i] = exceptions[i].take(step);
    for (int i = 0; i < kPanels; i++) {
      if (plain[i]) continue;
      const typename Simd::Ints codes = Simd::load_bytes(i ? b : a);
      Simd::expand_to(tables[i], Simd::low_nibbles(codes), (i ? b : a) + 64, decoded[i]);
      Simd::expand_to(tables[i], Simd::high_nibbles(codes), (i ? b : a) + 128, decoded[i] + 64);
      plain[i] = decoded[i];
    }
    if (kPrefetch != kAhead) memcpy(p.expanded + (size_t)step * kStepNumbers, plain[0], sizeof decoded[0]);
    for (int pair = 0; pair < 2; pair++) {
      ahead.fetch_next();
      add_plain_pair<Simd>(sums, plain, pair * 64, rows, 4 * step + 2 * pair);
    }
  }
#pragma GCC unroll 12
  for (int m = 0; m < M; m++)
#pragma GCC unroll 4
    for (int j = 0; j < V; j++) Simd::store(out + (m * V + j) * 16, sums[m][j]);
}

// Steps [first, last) of a panel as those of a plain one. `exceptions`: the panel's, those before `first` taken. `fetch` is
// called with every line that is read.
template <class Fetch>
inline void expand_steps(const Matrix& matrix, int panel, int first, int last, Exceptions& exceptions, uint16_t* to,
                         Fetch fetch) {
  const uint8_t* at = (const uint8_t*)matrix.data + panel * panel_bytes(matrix) + (size_t)first * kStepBytes;
  const typename Simd::Table table = Simd::load_table(matrix.dictionaries[panel].high_bytes);
  for (int step = first; step < last; step++, at += kStepBytes) {
    const typename Simd::Ints codes = Simd::load_bytes(at);
    uint16_t* plain = to + (size_t)(step - first) * kStepNumbers;
#pragma GCC unroll 3
    for (int line = 0; line < kStepBytes; line += 64) fetch(at + line);
    Simd::expand_to(table, Simd::low_nibbles(codes), at + 64, plain);
    Simd::expand_to(table, Simd::high_nibbles(codes), at + 128, plain + 64);
  }
  while (exceptions.next(last) < last) {
    const int step = exceptions.next(last);
    memcpy(to + (size_t)(step - first) * kStepNumbers, exceptions.take(step), kStepNumbers * sizeof(uint16_t));
  }
}

// A whole panel as a plain one.
inline void expand_panel(const Matrix& matrix, int panel, uint16_t* to) {
  Exceptions exceptions = {matrix, panel};
  expand_steps(matrix, panel, 0, matrix.num_inputs / kStepInputs, exceptions, to, [](const void*) {});
}

}  // namespace
