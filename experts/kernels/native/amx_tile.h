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
constexpr size_t kCachedBytes = 5 << 18;  // of a tile's rows, beside panels and sums in 2 MiB
constexpr int kAmxRows = 288;  // of a tile: 1.2 MB with 2,048 inputs of bfloat16
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

// rows, to: of the tile.
inline void amx_pack_block(const void* const* rows, int block, int height, size_t row_bytes, uint8_t* to) {
  const int first = block * kTileRows, count = amx_block_rows(block, height);
  const size_t step = (size_t)count * kTileBytes;
  for (int m = 0; m < count; m++) {
    const uint8_t* from = (const uint8_t*)rows[m];
    uint8_t* row = to + amx_place(first + m, height, row_bytes, 0);
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
  // From byte `first` of the rows on.
  AmxBlock(const void* x, int block, int height, size_t row_bytes, size_t first = 0)
      : at((const uint8_t*)x + amx_place(block * kTileRows, height, row_bytes, first)),
        step((size_t)amx_block_rows(block, height) * kTileBytes) {}
};

// A block's rows, which may be in register 6 already, times the half of a panel in register 7; then some of what is wanted
// soon is asked for.
template <class Dot, int kSum, bool kLoads = true>
inline void amx_add_block(const AmxBlock& x, SoonLines& soon) {
  if constexpr (kLoads) Amx::load<6>(x.at, kTileBytes);
  Dot::template add<kSum, 6, 7>();
  soon.fetch();
}

// Sums 2 b and 2 b + 1 of each block b += steps of its rows times the halves of a plain panel. For the second half the rows
// are loaded again, from the first-level cache, but for the last block's, which are in the register still.
template <class Dot, int kBlocks>
inline void amx_add_panel(AmxBlock* blocks, const uint8_t* w, int num_steps, SoonLines& soon) {
  static_assert(kBlocks <= kMostBlocks);
  for (int step = 0; step < num_steps; step++, w += kStepPanelBytes) {
    Amx::load<7>(w, 2 * kTileBytes);
    amx_add_block<Dot, 0>(blocks[0], soon);
    if constexpr (kBlocks > 1) amx_add_block<Dot, 2>(blocks[1], soon);
    if constexpr (kBlocks > 2) amx_add_block<Dot, 4>(blocks[2], soon);
    Amx::load<7>(w + kTileBytes, 2 * kTileBytes);
    if constexpr (kBlocks > 2) amx_add_block<Dot, 5, false>(blocks[2], soon);
    if constexpr (kBlocks > 1) amx_add_block<Dot, 3, kBlocks != 2>(blocks[1], soon);
    amx_add_block<Dot, 1, kBlocks != 1>(blocks[0], soon);
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

struct AmxTileBlock {  // a block of a tile
  int32_t first, height, block;  // first row and rows of the tile
};

template <class T>
struct ArrangeWork {
  typename T::Row* rows;
  const AmxTileBlock* blocks;
  uint8_t* packed;
  int k;
};

template <class T>
inline void amx_arrange_task(void* context, int task, int) {
  const ArrangeWork<T>& work = *(const ArrangeWork<T>*)context;
  const AmxTileBlock tile = work.blocks[task];
  T::pack_block(work.rows + tile.first, tile.block, tile.height, work.k, work.packed + tile.first * T::row_bytes(work.k));
}

// Packs the tiles of each part of the rows. starts: [num_parts + 1], the first row's first.
template <class T>
inline void amx_arrange(typename T::Row* rows, const int32_t* starts, int num_parts, int k) {
  const int num_rows = starts[num_parts] - starts[0], most = num_rows / kTileRows + num_parts;
  const size_t row_bytes = T::row_bytes(k), bytes = num_rows * row_bytes + kBytesBehind;
  uint8_t* packed = (uint8_t*)scratch(kTilesSlot, bytes + sizeof(AmxTileBlock) * most);
  AmxTileBlock* blocks = (AmxTileBlock*)(packed + bytes);
  int num_blocks = 0;
  const auto for_all_tiles = [&](auto body) {
    for (int part = 0; part < num_parts; part++)
      for_tiles<T>(starts[part + 1] - starts[part],
                   [&](int, int, int first, int height) { body(starts[part] - starts[0] + first, height); });
  };
  for_all_tiles([&](int first, int height) {
    for (int block = 0; block * kTileRows < height && height > 1; block++) blocks[num_blocks++] = {first, height, block};
  });
  ArrangeWork<T> work = {rows, blocks, packed, k};
  if ((size_t)num_rows * k < 65536)
    for (int i = 0; i < num_blocks; i++) amx_arrange_task<T>(&work, i, 0);
  else
    parallel_for(num_blocks, amx_arrange_task<T>, &work);
  for_all_tiles([&](int first, int height) { T::set_packed(rows + first, height, packed + first * row_bytes); });
}

// Up to kMostBlocks blocks of a tile's rows that meet a panel.
template <class Row>
struct AmxTask {
  const Row* x;
  int block, num_rows, pass, num_passes, panel_number;
  const Matrix& matrix;
  InputRange inputs;
  AmxPanel* panel;  // maybe the first of two
  float* out;
  int stride;
  void next_panel(int number) {
    panel_number = number;
    panel++;
    out += kPanelColumns;
  }
  // What a pass asks for between its products. A tile of one block has no time for that: it asks while it decodes.
  template <int kBlocks>
  SoonLines soon(int num_steps) const {
    if (num_rows <= kTileRows) return {};
    return panel->share_of_next(pass, num_passes, num_steps * 2 * kBlocks);
  }
};

template <int kFormat>
struct AmxTiles;

// What formats have in common. T says how many inputs a slab has and how blocks meet a panel.
template <class T, class Row_>
struct AmxTilesOf {
  using Row = Row_;
  static constexpr bool kUsesAmx = true;

  static void pack_block(Row* rows, int block, int height, int k, uint8_t* to) {
    const void* numbers[kTileRows];
    const int count = amx_block_rows(block, height);
    for (int m = 0; m < count; m++) numbers[m] = T::numbers(rows[block * kTileRows + m]);
    amx_pack_block(numbers, block, height, T::row_bytes(k), to);
  }
  // A tile's first row says where all are; one alone stays where it is.
  static void set_packed(Row* rows, int height, const uint8_t* packed) {
    if (height > 1) T::numbers(rows[0]) = (decltype(T::numbers(rows[0]) + 0))packed;
  }
  static void arrange_tile(Row* rows, int height, int k, uint8_t* to) {
    for (int block = 0; block * kTileRows < height && height > 1; block++) pack_block(rows, block, height, k, to);
    set_packed(rows, height, to);
  }
  static void arrange(Row* rows, const int32_t* starts, int num_parts, int k) {
    amx_arrange<T>(rows, starts, num_parts, k);
  }

  // Of the fewest tiles for so many rows, one at least: of whole passes, for those of two blocks are slower, unless little
  // would be left for the last one.
  static int tile_height(int num_rows) {
    constexpr int kPassRows = kMostBlocks * kTileRows;
    const int tiles = (num_rows + kAmxRows - 1) / kAmxRows, equal = (num_rows + tiles - 1) / tiles;
    const int whole = (equal + kPassRows - 1) / kPassRows * kPassRows;
    return num_rows - (tiles - 1) * whole >= kPassRows ? whole : (equal + kTileRows - 1) / kTileRows * kTileRows;
  }

  // So many that a tile's numbers stay in the second-level cache while every panel passes by.
  static int inputs_at_once(const Matrix& matrix, int num_rows) {
    const int k = matrix.num_inputs, slab = T::slab_inputs(matrix);
    const int times = (int)((num_rows * T::row_bytes(k) + kCachedBytes - 1) / kCachedBytes);
    return times < 2 ? k : (k + times * slab - 1) / (times * slab) * slab;
  }

  // x: a tile's rows, their numbers at the first one's. sums, done: as in multiply_tile.
  template <class Done>
  static void multiply(const Row* x, int num_rows, const Panels& p, int count, InputRange inputs, float* sums, const Done& done) {
    const Matrix& matrix = *p.matrix;
    const int num_blocks = (num_rows + kTileRows - 1) / kTileRows, num_passes = (num_blocks + kMostBlocks - 1) / kMostBlocks;
    const bool keeps_all = num_passes > 1;
    const int kept = keeps_all ? inputs.end - inputs.first : kSlabsKept * T::slab_inputs(matrix);
    const size_t decoded_bytes = is_decoded(matrix) ? T::row_bytes(kept) * kPanelColumns : 0;
    uint8_t* decoded = (uint8_t*)own_scratch(2 * decoded_bytes);
    // Each of two panels asks for its next one; but where they are read in turn in a single pass, the first asks for the
    // second, and that one for the next call's first, if that is the next: so the first asks for itself too.
    const bool is_pair = T::kTakesPairs && count == 2 && num_blocks == 1, is_chain = count == 2 && num_passes == 1 && !is_pair;
    AmxPanel panels[2] = {
        {matrix, p.first, inputs, is_chain ? panel_data(matrix, p.second) : p.next_first, decoded, keeps_all, true},
        {matrix, count == 2 ? p.second : p.first, inputs, is_chain ? p.next_first : p.next_second,
         decoded + decoded_bytes, keeps_all, !is_chain || num_blocks == 1}};
    const Amx amx(AmxShape(smaller(num_rows, kTileRows)));
    const int width = count * kPanelColumns;
    alignas(64) float own_sums[kMostBlocks * kTileRows * 2 * kPanelColumns];
    for (int block = 0, pass = 0; pass < num_passes; pass++) {
      const int first_row = block * kTileRows, left = num_blocks - block;
      const int taken = left == 4 ? 2 : smaller(left, kMostBlocks);  // not three and a slow one
      float* out = sums ? sums + (size_t)first_row * width : own_sums;
      AmxTask<Row> task = {x, block, num_rows, pass, num_passes, p.first, matrix, inputs, panels, out, width};
      if (is_pair)
        multiply_both(task);
      else
        for (int i = 0; i < count; i++) {
          if (i) task.next_panel(p.second);
          multiply_some(task, taken);
        }
      if (inputs.end == matrix.num_inputs) done(first_row, smaller(taken * kTileRows, num_rows - first_row), out);
      block += taken;
    }
  }

 private:
  static void multiply_both(const AmxTask<Row>& task) {
    if constexpr (T::kTakesPairs) T::multiply_pair(task);
  }

  static void multiply_some(const AmxTask<Row>& task, int num_blocks) {
    switch (num_blocks) {
      case 1: return T::template multiply_blocks<1>(task);
      case 2: return T::template multiply_blocks<2>(task);
      default: return T::template multiply_blocks<3>(task);
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
  static __attribute__((noinline)) void multiply_pair(const AmxTask<Row>& t) {
    const InputRange inputs = t.inputs;
    AmxPanel first = t.panel[0], second = t.panel[1];  // copies, whose fields stay in registers
    AmxBlock block(t.x[0], 0, t.num_rows, row_bytes(t.matrix.num_inputs), row_bytes(inputs.first));
    if (inputs.first) {
      amx_load<1>(t.out, t.stride);
      Amx::load<2>(t.out + 32, t.stride * 4);
      Amx::load<3>(t.out + 48, t.stride * 4);
    }
    const uint8_t *a = first.slab(inputs.first, kBf16Slab), *b = second.slab(inputs.first, kBf16Slab);
    for (int input = inputs.first + kBf16Slab; a; input += kBf16Slab) {
      Amx::load<6>(block.at, kTileBytes);
      block.at += block.step;
      const uint8_t* next_a = first.slab(input, kBf16Slab);
      amx_add_step<Bf16Dot, 0>(a);
      const uint8_t* next_b = second.slab(input, kBf16Slab);
      amx_add_step<Bf16Dot, 2>(b);
      a = next_a;
      b = next_b;
    }
    amx_store<1>(t.out, t.stride);
    Amx::store<2>(t.out + 32, t.stride * 4);
    Amx::store<3>(t.out + 48, t.stride * 4);
  }

  template <int kBlocks>
  static void multiply_blocks(const AmxTask<Row>& t) {
    const InputRange inputs = t.inputs;
    const int num_steps = (inputs.end - inputs.first) / kBf16Slab;
    AmxBlock blocks[kMostBlocks];
    for (int i = 0; i < kBlocks; i++)
      blocks[i] = {t.x[0], t.block + i, t.num_rows, row_bytes(t.matrix.num_inputs), row_bytes(inputs.first)};
    SoonLines soon = t.template soon<kBlocks>(num_steps);
    if (inputs.first)
      amx_load<kBlocks>(t.out, t.stride);
    else
      amx_zero();
    if (t.block == 0) {
      const uint8_t* w = t.panel->slab(inputs.first, kBf16Slab);
      for (int input = inputs.first + kBf16Slab; w; input += kBf16Slab) {
        const uint8_t* next = t.panel->slab(input, kBf16Slab);
        amx_add_panel<Bf16Dot, kBlocks>(blocks, w, 1, soon);
        w = next;
      }
    } else {
      amx_add_panel<Bf16Dot, kBlocks>(blocks, t.panel->plain(inputs.first), num_steps, soon);
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
    const int steps = group_size / kTileBytes, first_group = t.inputs.first / group_size;
    AmxBlock blocks[kMostBlocks];
    for (int i = 0; i < kBlocks; i++)
      blocks[i] = {t.x[0].numbers, t.block + i, t.num_rows, row_bytes(k), row_bytes(t.inputs.first)};
    SoonLines soon = t.template soon<kBlocks>((t.inputs.end - t.inputs.first) / kTileBytes);
    const float* scales = t.matrix.scales + ((size_t)t.panel_number * num_groups + first_group) * kPanelColumns;
    for (int group = first_group; group < t.inputs.end / group_size; group++, scales += kPanelColumns) {
      const int input = group * group_size;
      const uint8_t* w = t.block ? t.panel->plain(input) : t.panel->slab(input, group_size);
      alignas(64) int32_t sums[kBlocks * kTileRows * kPanelColumns];
      amx_zero();
      amx_add_panel<BytesDot, kBlocks>(blocks, w, steps, soon);
      amx_store<kBlocks>(sums, kPanelColumns);
      add_group<kBlocks>(t, sums, group, scales);
    }
  }

 private:
  template <int kBlocks>
  static void add_group(const AmxTask<Row>& t, const int32_t* sums, int group, const float* scales) {
    const int row = t.block * kTileRows, height = smaller(kBlocks * kTileRows, t.num_rows - row);
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
