// A block of the context as absorbed attention multiplies with it, and the next block on its way to the cache.
#pragma once

#include "mla_product.h"

namespace {

constexpr int kBlockTokens = Simd::kHasAmx ? 128 : 64;
constexpr int kSlabUnits = kBlockTokens * kSlab;

// A block of tokens, staged. keys: [slabs][token][64 units]; values: the same memory for floats, for pairs
// [slabs of 64 columns][pair of tokens][64].
template <class U>
struct Stage {
  typename U::Unit *keys, *values;
  int num_key_slabs, num_value_slabs, latent_dim, format;
  const void* tokens[kBlockTokens];
  int num_tokens;

  void open(const LatentRows& rows, int start, int end) {
    num_tokens = end - start < kBlockTokens ? end - start : kBlockTokens;
    for (int token = 0; token < num_tokens; token++) tokens[token] = rows.at(start + token);
  }

  void fill_keys(int slab) {
    constexpr int kNumbers = kSlab * U::kNumbers;
    const int first = slab * kNumbers, count = latent_dim - first;
    typename U::Unit* to = keys + (size_t)slab * kSlabUnits;
    for (int token = 0; token < num_tokens; token++, to += kSlab) {
      if (count < kNumbers) {
        memset(to, 0, kSlab * 4);
        convert_row(tokens[token], format, first, to, U::kNumbers == 2 ? kBfloat16 : kFloat32, 0, count);
      } else if constexpr (U::kNumbers == 2) {
        memcpy(to, (const uint16_t*)tokens[token] + first, kSlab * 4);
      } else {
#pragma GCC unroll 4
        for (int i = 0; i < kSlab; i += 16) Simd::store(to + i, load_as_floats(tokens[token], format, first + i));
      }
    }
  }

  // Only for pairs. Behind an odd last token stands a zero: nothing that lies there may matter.
  void fill_values(int slab) {
    alignas(64) static const uint16_t zeros[kSlab] = {};
    const int first = slab * kSlab, count = latent_dim - first < kSlab ? latent_dim - first : kSlab;
    uint32_t* to = (uint32_t*)values + (size_t)slab * (kSlabUnits / 2);
    for (int token = 0; token < num_tokens; token += 2, to += kSlab) {
      const uint16_t* even = (const uint16_t*)tokens[token] + first;
      const uint16_t* odd = token + 1 < num_tokens ? (const uint16_t*)tokens[token + 1] + first : zeros;
      if (count == kSlab)
        interleave<Simd>(even, odd, to, kSlab);
      else
        interleave<Simd>(even, odd, to, count);
    }
  }
};

// Asks for the next block token by token, so that it arrives while this one is computed with.
struct Fetcher {
  const LatentRows* rows;
  int next, end;
  bool has_pairs;   // then a product takes half as long and asks for more
  int lines;        // of a token
  Fetch last;       // asked for again at the end, which costs nothing

  // For a product that asks for `room` lines, half of them from either pointer.
  Fetch take(int room) {
    if (next >= end) return last;
    last.first = last.second = (const char*)rows->at(next++);
    if (has_pairs && room >= 2 * lines - 4 && next < end)
      last.second = (const char*)rows->at(next++);
    else if (lines > room / 2)
      last.second += (lines - room / 2) * 64;
    return last;
  }
};

}  // namespace
