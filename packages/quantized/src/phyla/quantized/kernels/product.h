// The loops around the micro-kernel: output channels in blocks of 64, rows in tiles that stay in the first-level cache, weights laid out for
// the path a few MiB at a time. What a row is (a row of a matrix, the patch of an output pixel) is the business of `Source`.
#pragma once

#include <memory>

#include "words.h"

namespace phyla::quantized {

// 64-byte aligned memory without initial values.
template <class T>
class Scratch {
 public:
  T* of(int64_t count) {
    if (count > size_) {
      memory_.reset(new (std::align_val_t(64)) T[size_t(count)]);
      size_ = count;
    }
    return memory_.get();
  }

 private:
  struct Delete {
    void operator()(T* p) const { ::operator delete[](p, std::align_val_t(64)); }
  };
  std::unique_ptr<T[], Delete> memory_;
  int64_t size_ = 0;
};

// Output channels of one group that are computed together, and where their relaid weights begin.
struct Block {
  int64_t group, first, channels, offset;
};

struct Weights {
  const uint64_t* rows;  // (channels, width)
  int64_t channels, groups, length;
  int64_t width() const { return words_of(length); }
  int64_t halves() const { return (length + 31) / 32; }  // 32-bit words that hold bits
};

// Relaid weights of some blocks.
struct Relaid {
  const uint32_t* memory;
  int64_t group;  // from one group of lanes to the next
  const uint32_t* of(const Block& block) const { return memory + block.offset; }
};

constexpr int64_t kRelaidBytes = 4 << 20, kTileBytes = 16 << 10, kTileRows = 64, kTaskProducts = 1 << 20;

inline std::vector<Block> blocks_of(const Weights& weights, int64_t lanes) {
  std::vector<Block> blocks;
  const int64_t each = weights.channels / weights.groups;
  for (int64_t g = 0; g < weights.groups; ++g)
    for (int64_t c = 0; c < each; c += kBlock) blocks.push_back({g, g * each + c, std::min(kBlock, each - c), 0});
  return blocks;
}

// Source: `const uint32_t* tile(row, rows, group, memory)`, rows with the stride 2 * width; `prepare(path, blocks, relaid)`, called when the
// weights of these blocks lie ready; `bases(row, rows, pointers)`, where each row's sums begin.
template <class Source>
void product(const Path& path, Source& source, int64_t rows, const Weights& weights, const Epilogue& epilogue) {
  static thread_local Scratch<uint32_t> kept;
  const int64_t width = weights.width(), halves = weights.halves(), group = halves * path.lanes;
  std::vector<Block> blocks = blocks_of(weights, path.lanes);
  const int64_t tile = std::clamp<int64_t>(kTileBytes / (8 * std::max<int64_t>(width, 1)) / 8 * 8, 8, kTileRows);
  const int64_t tiles = (rows + tile - 1) / tile;
  for (size_t begin = 0, end = 0; begin < blocks.size(); begin = end) {
    int64_t size = 0;
    for (; end < blocks.size() && (end == begin || 4 * size < kRelaidBytes); ++end) {
      blocks[end].offset = size;
      size += (blocks[end].channels + path.lanes - 1) / path.lanes * group;
    }
    const Block* some = blocks.data() + begin;
    const int64_t count = int64_t(end - begin);
    uint32_t* memory = kept.of(size);
    parallel_units(count, [&](int64_t b) {
      path.relay(reinterpret_cast<const uint32_t*>(weights.rows + some[b].first * width), 2 * width, some[b].channels, halves, memory + some[b].offset);
    }, std::max<int64_t>(1, kTaskProducts / (64 * kBlock * std::max<int64_t>(width, 1))));
    const Relaid relaid{memory, group};
    source.prepare(path, some, count, relaid);
    // Few tiles: the blocks are shared out too, at bounds that fall between words.
    const int64_t parts = weights.groups > 1 ? 1 : std::min(count, std::max<int64_t>(1, 8 / tiles));
    const int64_t work = tile * (kBlock * count / parts) * std::max<int64_t>(weights.length, 1);
    parallel_units(tiles * parts, [&](int64_t unit) {
      static thread_local Scratch<uint32_t> gathered;
      const int64_t row = unit / parts * tile, here = std::min(tile, rows - row), part = unit % parts;
      const int32_t* bases[kTileRows];
      int32_t different[kTileRows * kBlock];
      source.bases(row, here, bases);
      const uint32_t* a = nullptr;
      int64_t held = -1;
      for (int64_t b = count * part / parts; b < count * (part + 1) / parts; ++b) {
        if (some[b].group != held) a = source.tile(row, here, held = some[b].group, gathered.of(2 * tile * width));
        path.relaid(a, 2 * width, here, relaid.of(some[b]), group, halves, some[b].channels, different);
        path.finish(epilogue, {row, here, some[b].first, some[b].channels, bases}, different);
      }
    }, std::max<int64_t>(1, kTaskProducts / work));
  }
}

}  // namespace phyla::quantized
