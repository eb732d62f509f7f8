// How high a product's tiles are, which each instruction set says for each number format.
#pragma once

namespace {

// Rows whose sums stay in registers, by the columns of a tile; 0 where a tile is never so wide.
struct TileRows {
  int half, panel, pair;  // 16, 32 and 64 columns
  int many = 0;           // in each of several tiles, where that is not what follows from the others
  constexpr int of(int vectors) const { return vectors == 1 ? half : vectors == 2 ? panel : pair; }
  constexpr int highest() const { return half > panel ? half : panel; }
  constexpr int of_many() const { return many ? many : pair ? pair : highest(); }  // where one tile is not enough
};

}  // namespace
