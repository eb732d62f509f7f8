// Products of rows with packed matrices by AMX: blocks of 16 rows times the halves of panels. Included by rows.h.
//
// Row-invariance: the processor sums 32 inputs of bfloat16, even and odd ones apart and in ascending order, before it adds
// them to a sum, for each row alone; so every number of rows goes this way. Bytes are summed exactly, as without AMX.
#pragma once

#include "amx.h"
#include "amx_panel.h"

namespace {

constexpr int kStepPanelBytes = kTileRows * 2 * kTileBytes;  // what 64 bytes of a row meet of a panel
constexpr int kBf16Slab = kTileBytes / 2;  // inputs whose weights are decoded at a time: a step's
constexpr int kMostBlocks = 3;  // of rows that meet a panel at once: six of eight registers hold sums

// A tile's rows lie in blocks of up to 16, of which each has 64 bytes of every row, then the next 64, and so on.
inline int amx_block_rows(int block, int height) {
  const int left = height - block * kTileRows;
  return left < kTileRows ? left : kTileRows;
}

// Where byte `at` of row m of a tile lies.
inline size_t amx_place(int m, int height, size_t row_bytes, size_t at) {
  const int block = m / kTileRows;
  return block * kTileRows * row_bytes + at / kTileBytes * amx_block_rows(block, height) * kTileBytes +
         m % kTileRows * kTileBytes + at % kTileBytes;
}

inline void amx_pack_tile(const void* const* rows, int height, size_t row_bytes, uint8_t* to) {
  for (int m = 0; m < height; m++) {
    const uint8_t* from = (const uint8_t*)rows[m];
    uint8_t* row = to + amx_place(m, height, row_bytes, 0);
    const size_t step = (size_t)amx_block_rows(m / kTileRows, height) * kTileBytes;
    for (size_t at = 0; at < row_bytes; at += kTileBytes, row += step) memcpy(row, from + at, kTileBytes);
  }
}

struct Bf16Dot {
  template <int kSum, int kX, int kW>
  static void add() {
    Amx::dot_bf16<kSum, kX, kW>();
  }
};
struct BytesDot {
  template <int kSum, int kX, int kW>
  static void add() {
    Amx::dot_bytes<kSum, kX, kW>();
  }
};

// A block of a tile's rows as it is read step by step.
struct AmxBlock {
  const uint8_t* at = nullptr;
  size_t step = 0;
  AmxBlock() = default;
  AmxBlock(const void* x, int block, int height, size_t row_bytes)
      : at((const uint8_t*)x + block * kTileRows * row_bytes), step((size_t)amx_block_rows(block, height) * kTileBytes) {}
};

// A block's rows times the half of a panel in register 7; then some of what is wanted soon is asked for.
template <class Dot, int kSum>
inline void amx_add_block(const AmxBlock& x, SoonLines& soon) {
  Amx::load<6>(x.at, kTileBytes);
  Dot::template add<kSum, 6, 7>();
  soon.fetch();
}

// Sums 2 b and 2 b + 1 of each block b += steps of its rows times the halves of a plain panel. For the second half the rows
// are loaded again, from the first-level cache.
template <class Dot, int kBlocks>
inline void amx_add_panel(AmxBlock* blocks, const uint8_t* w, int num_steps, SoonLines& soon) {
  static_assert(kBlocks <= kMostBlocks);
  for (int step = 0; step < num_steps; step++, w += kStepPanelBytes) {
    Amx::load<7>(w, 2 * kTileBytes);
    amx_add_block<Dot, 0>(blocks[0], soon);
    if constexpr (kBlocks > 1) amx_add_block<Dot, 2>(blocks[1], soon);
    if constexpr (kBlocks > 2) amx_add_block<Dot, 4>(blocks[2], soon);
    Amx::load<7>(w + kTileBytes, 2 * kTileBytes);
    amx_add_block<Dot, 1>(blocks[0], soon);
    if constexpr (kBlocks > 1) amx_add_block<Dot, 3>(blocks[1], soon);
    if constexpr (kBlocks > 2) amx_add_block<Dot, 5>(blocks[2], soon);
    for (int b = 0; b < kBlocks; b++) blocks[b].at += blocks[b].step;
  }
}

// Sums kSum and kSum + 1 += the rows in register 6 times a step of a plain panel.
template <class Dot, int kSum>
inline void amx_add_step(const uint8_t* w) {
  Amx::load<7>(w, 2 * kTileBytes);
  Dot::template add<kSum, 6, 7>();
  Amx::load<7>(w + kTileBytes, 2 * kTileBytes);
  Dot::template add<kSum + 1, 6, 7>();
}

struct AmxTile {
  int32_t first, height;
};

template <class T>
struct ArrangeWork {
  typename T::Row* rows;
  const AmxTile* tiles;
  uint8_t* packed;
  int k;
};

template <class T>
inline void amx_arrange_task(void* context, int task, int) {
  const ArrangeWork<T>& work = *(const ArrangeWork<T>*)context;
  const AmxTile tile = work.tiles[task];
  T::arrange_tile(work.rows + tile.first, tile.height, work.k, work.packed + tile.first * T::row_bytes(work.k));
}

// Packs the tiles of each part of the rows. starts: [num_parts + 1].
template <class T>
inline void amx_arrange(typename T::Row* rows, const int32_t* starts, int num_parts, int k) {
  const int num_rows = starts[num_parts], most = num_rows / T::kRows.highest() + num_parts;
  const size_t bytes = num_rows * T::row_bytes(k) + kBytesBehind;
  uint8_t* packed = (uint8_t*)scratch(kTilesSlot, bytes + sizeof(AmxTile) * most);
  AmxTile* tiles = (AmxTile*)(packed + bytes);
  int num_tiles = 0;
  for (int part = 0; part < num_parts; part++)
    for_tiles<T>(starts[part + 1] - starts[part],
                 [&](int, int, int first, int height) { tiles[num_tiles++] = {starts[part] + first, height}; });
  ArrangeWork<T> work = {rows, tiles, packed, k};
  if ((size_t)num_rows * k < 65536)
    for (int i = 0; i < num_tiles; i++) amx_arrange_task<T>(&work, i, 0);
  else
    parallel_for(num_tiles, amx_arrange_task<T>, &work);
}

// Up to kMostBlocks blocks of a tile's rows that meet a panel.
template <class Row>
struct AmxTask {
  const Row* x;
  int block, num_rows, panel_number;
  const Matrix& matrix;
  AmxPanel& panel;
  float* out;
  int stride;
  AmxBlock rows(const void* packed, size_t row_bytes, int index) const {
    return AmxBlock(packed, block + index, num_rows, row_bytes);
  }
  // What a pass asks for between its products. A tile of one block has no time for that: it asks while it decodes.
  template <int kBlocks>
  SoonLines soon(int num_steps) const {
    constexpr int kRows = kMostBlocks * kTileRows;
    if (num_rows <= kTileRows) return {};
    return panel.share_of_next(block / kMostBlocks, (num_rows + kRows - 1) / kRows, num_steps * 2 * kBlocks);
  }
};

template <int kFormat>
struct AmxTiles;

// What formats have in common. T says how many inputs a slab has and how blocks meet a panel.
template <class T, class Row_>
struct AmxTilesOf {
  using Row = Row_;
  static constexpr bool kUsesAmx = true;
  static constexpr TileRows kRows = {0, kMaxRows, 0};

  static void arrange_tile(Row* rows, int height, int k, uint8_t* to) {
    if (height == 1) return;
    const void* numbers[kMaxRows];
    for (int m = 0; m < height; m++) numbers[m] = T::numbers(rows[m]);
    amx_pack_tile(numbers, height, T::row_bytes(k), to);
    T::numbers(rows[0]) = (decltype(T::numbers(rows[0]) + 0))to;
  }
  static void arrange(Row* rows, const int32_t* starts, int num_parts, int k) {
    amx_arrange<T>(rows, starts, num_parts, k);
  }

  // x: a tile's rows, their numbers at the first one's. out: [num_rows, rounded up to 16][32 * count].
  static void multiply(const Row* x, int, int, int num_rows, const Panels& p, int count, float* out) {
    const Matrix& matrix = *p.matrix;
    const int k = matrix.num_inputs, num_blocks = (num_rows + kTileRows - 1) / kTileRows, slab = T::slab_inputs(matrix);
    const bool keeps_all = num_blocks > kMostBlocks;
    const size_t decoded_bytes = is_decoded(matrix) ? T::row_bytes(keeps_all ? k : kSlabsKept * slab) * kPanelColumns : 0;
    uint8_t* decoded = (uint8_t*)own_scratch(2 * decoded_bytes);
    // A pair is read side by side; else one panel asks for the other, and that one for the first of the next call, if that is
    // the next: so the first asks for itself too.
    const bool is_pair = T::kTakesPairs && num_blocks == 1 && count == 2;
    const void* after_first = count == 2 && !is_pair ? panel_data(matrix, p.second) : p.next_first;
    AmxPanel first(matrix, p.first, after_first, slab, decoded, keeps_all, true);
    AmxPanel second(matrix, count == 2 ? p.second : p.first, is_pair ? p.next_second : p.next_first, slab,
                    decoded + decoded_bytes, keeps_all, num_blocks == 1);
    const Amx amx(AmxShape(num_rows < kTileRows ? num_rows : kTileRows));
    if constexpr (T::kTakesPairs)
      if (is_pair) return T::multiply_pair(x, num_rows, matrix, first, second, out);
    for (int i = 0; i < count; i++)
      for (int block = 0; block < num_blocks; block += kMostBlocks) {
        const AmxTask<Row> task = {x, block, num_rows, i ? p.second : p.first, matrix, i ? second : first,
                                   out + ((size_t)block * kTileRows * count + i) * kPanelColumns, count * kPanelColumns};
        switch (num_blocks - block) {
          case 1: T::template multiply_blocks<1>(task); break;
          case 2: T::template multiply_blocks<2>(task); break;
          default: T::template multiply_blocks<3>(task);
        }
      }
  }
};

template <>
struct AmxTiles<kBfloat16> : AmxTilesOf<AmxTiles<kBfloat16>, const uint16_t*> {
  static constexpr bool kTakesPairs = true;
  static constexpr int kFewestRows = 1;
  static size_t row_bytes(int k) { return (size_t)k * 2; }
  static bool takes(const Matrix& matrix) { return matrix.num_inputs % kBf16Slab == 0; }
  static int slab_inputs(const Matrix&) { return kBf16Slab; }
  static const uint16_t*& numbers(Row& row) { return row; }

  // Of two panels, step by step: the next step is decoded, which waits for memory, before this one's products are asked for,
  // which then wait for nothing. 0 and 1 are the first panel's sums, 2 and 3 the second one's.
  static void multiply_pair(const Row* x, int num_rows, const Matrix& matrix, AmxPanel& first, AmxPanel& second, float* out) {
    AmxBlock block(x[0], 0, num_rows, row_bytes(matrix.num_inputs));
    const uint8_t *a = first.slab(0), *b = second.slab(0);
    for (int input = kBf16Slab; a; input += kBf16Slab) {
      Amx::load<6>(block.at, kTileBytes);
      block.at += block.step;
      const uint8_t* next_a = first.slab(input);
      amx_add_step<Bf16Dot, 0>(a);
      const uint8_t* next_b = second.slab(input);
      amx_add_step<Bf16Dot, 2>(b);
      a = next_a;
      b = next_b;
    }
    Amx::store<0>(out, 256);
    Amx::store<1>(out + 16, 256);
    Amx::store<2>(out + 32, 256);
    Amx::store<3>(out + 48, 256);
  }

  template <int kBlocks>
  static void multiply_blocks(const AmxTask<Row>& t) {
    const int k = t.matrix.num_inputs;
    const size_t bytes = row_bytes(k);
    AmxBlock blocks[kMostBlocks];
    for (int i = 0; i < kBlocks; i++) blocks[i] = t.rows(t.x[0], bytes, i);
    SoonLines soon = t.template soon<kBlocks>(k / kBf16Slab);
    amx_zero();
    if (t.block == 0) {
      const uint8_t* w = t.panel.slab(0);
      for (int input = kBf16Slab; w; input += kBf16Slab) {
        const uint8_t* next = t.panel.slab(input);
        amx_add_panel<Bf16Dot, kBlocks>(blocks, w, 1, soon);
        w = next;
      }
    } else {
      amx_add_panel<Bf16Dot, kBlocks>(blocks, t.panel.plain(0), k / kBf16Slab, soon);
    }
    amx_store<kBlocks>(t.out, t.stride);
  }
};

// The integers of a group of inputs, then fp32 over groups, in the order of tile_bytes.
template <bool kIsInt4>
struct AmxByteTiles : AmxTilesOf<AmxByteTiles<kIsInt4>, QuantizedRow> {
  using Row = QuantizedRow;
  static constexpr bool kTakesPairs = false;
  static constexpr int kFewestRows = Tiles<kInt8>::kRows.highest() + 1;  // the bits are those of Tiles, which are faster below
  static constexpr int kZeroPoint = kIsInt4 ? 8 : 128;
  static size_t row_bytes(int k) { return k; }
  static bool takes(const Matrix& matrix) { return matrix.group_size % kTileBytes == 0; }
  static int slab_inputs(const Matrix& matrix) { return matrix.group_size; }
  static const int8_t*& numbers(Row& row) { return row.numbers; }

  template <int kBlocks>
  static void multiply_blocks(const AmxTask<Row>& t) {
    const int k = t.matrix.num_inputs, group_size = t.matrix.group_size, num_groups = k / group_size;
    const int steps = group_size / kTileBytes;
    const void* numbers = t.x[0].numbers;
    AmxBlock blocks[kMostBlocks];
    for (int i = 0; i < kBlocks; i++) blocks[i] = t.rows(numbers, k, i);
    SoonLines soon = t.template soon<kBlocks>(k / kTileBytes);
    const float* scales = t.matrix.scales + (size_t)t.panel_number * num_groups * kPanelColumns;
    for (int group = 0; group < num_groups; group++, scales += kPanelColumns) {
      const int input = group * group_size;
      const uint8_t* w = t.block ? t.panel.plain(input) : t.panel.slab(input);
      alignas(64) int32_t sums[kBlocks * kTileRows * kPanelColumns];
      amx_zero();
      amx_add_panel<BytesDot, kBlocks>(blocks, w, steps, soon);
      amx_store<kBlocks>(sums, kPanelColumns);
      add_group(t, sums, group, scales);
    }
  }

 private:
  static void add_group(const AmxTask<Row>& t, const int32_t* sums, int group, const float* scales) {
    constexpr int kMostRows = kMostBlocks * kTileRows;
    const int row = t.block * kTileRows, left = t.num_rows - row, height = left < kMostRows ? left : kMostRows;
    const Simd::Floats weight_scales[2] = {Simd::load(scales), Simd::load(scales + 16)};
    for (int m = 0; m < height; m++) {
      const Row& x = t.x[row + m];
      const Simd::Ints start = Simd::set1_int(-kZeroPoint * x.sums[group]);
      const Simd::Floats row_scale = Simd::set1(x.scales[group]);
#pragma GCC unroll 2
      for (int j = 0; j < 2; j++) {
        float* to = t.out + (size_t)m * t.stride + j * 16;
        const Simd::Ints sum = Simd::load_bytes((const uint8_t*)(sums + m * kPanelColumns + j * 16));
        const Simd::Floats before = group ? Simd::load(to) : Simd::zero();
        Simd::store(to, Simd::fma(Simd::to_floats(Simd::add_ints(sum, start)), Simd::mul(weight_scales[j], row_scale), before));
      }
    }
  }
};
template <>
struct AmxTiles<kInt8> : AmxByteTiles<false> {};
template <>
struct AmxTiles<kInt4> : AmxByteTiles<true> {};

// Operations of one thread's registers over operands in its first-level cache; numbers of any kind, for zeros are faster.
template <class Dot>
double amx_peak(long iterations, int inputs_a_step) {
  constexpr int kSteps = 8;
  alignas(64) static thread_local uint32_t operands[kSteps * (kStepPanelBytes + 2 * kTileRows * kTileBytes) / 4];
  uint32_t random = 1;
  for (uint32_t& each : operands) each = (random = random * 1664525u + 1013904223u) & 0xbfffbfffu;  // no NaN, no infinity
  const uint8_t *w = (const uint8_t*)operands, *x = w + kSteps * kStepPanelBytes;
  const Amx amx{AmxShape(kTileRows)};
  amx_zero();
  SoonLines nothing;
  for (long i = 0; i < iterations; i++) {
    AmxBlock blocks[2] = {{x, 0, 2 * kTileRows, kSteps * kTileBytes}, {x, 1, 2 * kTileRows, kSteps * kTileBytes}};
    amx_add_panel<Dot, 2>(blocks, w, kSteps, nothing);
  }
  return 2.0 * iterations * kSteps * inputs_a_step * 2 * kTileRows * kPanelColumns;
}

template <int kFormat>
struct RowReader<AmxTiles<kFormat>> : RowReader<Tiles<kFormat>> {};

}  // namespace
