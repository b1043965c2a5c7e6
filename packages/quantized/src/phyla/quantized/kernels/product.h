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

// Output channels of one group that are computed together.
struct Block {
  int64_t group, first, channels;
};

struct Weights {
  const uint64_t* rows;  // (channels, width)
  int64_t channels, groups, length;
  int64_t width() const { return words_of(length); }
  int64_t halves() const { return (length + 31) / 32; }  // 32-bit words that hold bits

  std::vector<Block> blocks() const {
    std::vector<Block> all;
    const int64_t each = channels / groups;
    for (int64_t g = 0; g < groups; ++g)
      for (int64_t c = 0; c < each; c += kBlock) all.push_back({g, g * each + c, std::min(kBlock, each - c)});
    return all;
  }
  // 32-bit words that the relaid weights of a block take.
  int64_t relaid(const Path& path, const Block& block) const { return (block.channels + path.lanes - 1) / path.lanes * path.lanes * halves(); }
  void relay(const Path& path, const Block& block, uint32_t* to) const {
    path.relay(reinterpret_cast<const uint32_t*>(rows + block.first * width()), 2 * width(), block.channels, halves(), to);
  }
};

constexpr int64_t kRelaidBytes = 4 << 20, kTileBytes = 16 << 10, kFewBytes = 128 << 10, kTileRows = 64, kTaskProducts = 1 << 20;

// Units of `products` each that make a task worth a thread's while.
inline int64_t grain(int64_t products) { return std::max<int64_t>(1, kTaskProducts / std::max<int64_t>(products, 1)); }

// One block of the output channels of the rows row..row+rows, `a` the first of them.
template <class Source>
void tile_product(const Path& path, const Source& source, const Weights& weights, const Epilogue& epilogue, const Block& block, const uint32_t* relaid,
                  const uint32_t* a, int64_t row, int64_t rows) {
  const int32_t* bases[kTileRows];
  int32_t different[kTileRows * kBlock];
  source.bases(row, rows, bases);
  path.relaid(a, 2 * weights.width(), rows, relaid, weights.halves() * path.lanes, weights.halves(), block.channels, different);
  path.finish(epilogue, {row, rows, block.first, block.channels, bases}, different);
}

// Few rows: all of them are gathered at once, then each block of weights is laid out and used up while it is in the cache.
template <class Source>
void few_tiles(const Path& path, Source& source, int64_t rows, int64_t tile, const Weights& weights, const Epilogue& epilogue) {
  static thread_local Scratch<uint32_t> kept;
  const int64_t width = weights.width();
  const uint32_t* a = source.direct();
  if (a == nullptr) {
    uint32_t* memory = kept.of(2 * rows * width);
    parallel_units((rows + tile - 1) / tile, [&](int64_t t) {
      source.gather(t * tile, std::min(tile, rows - t * tile), 0, memory + 2 * t * tile * width);
    }, grain(64 * tile * weights.length));
    a = memory;
  }
  const std::vector<Block> blocks = weights.blocks();
  parallel_units(int64_t(blocks.size()), [&](int64_t b) {
    static thread_local Scratch<uint32_t> laid;
    uint32_t* relaid = laid.of(weights.relaid(path, blocks[b]));
    weights.relay(path, blocks[b], relaid);
    source.prepare(path, blocks[b], relaid);
    for (int64_t row = 0; row < rows; row += tile)
      tile_product(path, source, weights, epilogue, blocks[b], relaid, a + 2 * row * width, row, std::min(tile, rows - row));
  }, grain(rows * kBlock * weights.length));
}

// Many rows: some MiB of weights are laid out, then each tile of rows is gathered and meets all of them.
template <class Source>
void many_tiles(const Path& path, Source& source, int64_t rows, int64_t tile, const Weights& weights, const Epilogue& epilogue) {
  static thread_local Scratch<uint32_t> kept;
  const int64_t width = weights.width();
  const std::vector<Block> blocks = weights.blocks();
  for (size_t begin = 0, end = 0; begin < blocks.size(); begin = end) {
    std::vector<int64_t> places{0};
    for (; end < blocks.size() && (end == begin || 4 * places.back() < kRelaidBytes); ++end)
      places.push_back(places.back() + weights.relaid(path, blocks[end]));
    const Block* some = blocks.data() + begin;
    const int64_t count = int64_t(end - begin);
    uint32_t* relaid = kept.of(places.back());
    parallel_units(count, [&](int64_t b) {
      weights.relay(path, some[b], relaid + places[b]);
      source.prepare(path, some[b], relaid + places[b]);
    }, grain(64 * kBlock * weights.length));
    parallel_units((rows + tile - 1) / tile, [&](int64_t t) {
      static thread_local Scratch<uint32_t> gathered;
      const int64_t row = t * tile, here = std::min(tile, rows - row);
      const uint32_t* a = source.direct() == nullptr ? nullptr : source.direct() + 2 * row * width;
      for (int64_t b = 0, held = -1; b < count; ++b) {
        if (source.direct() == nullptr && some[b].group != held) {
          uint32_t* memory = gathered.of(2 * tile * width);
          source.gather(row, here, held = some[b].group, memory);
          a = memory;
        }
        tile_product(path, source, weights, epilogue, some[b], relaid + places[b], a, row, here);
      }
    }, grain(tile * kBlock * count * weights.length));
  }
}

// Source: `direct()`, the rows if they lie in memory one after another, else null and `gather(row, rows, group, to)` writes them; both with
// `width` words of 64 bits a row. `prepare(path, block, relaid)` is called once a block; then `bases(row, rows, to)` tells where sums begin.
template <class Source>
void product(const Path& path, Source& source, int64_t rows, const Weights& weights, const Epilogue& epilogue) {
  const int64_t bytes = 8 * std::max<int64_t>(weights.width(), 1), tile = std::clamp<int64_t>(kTileBytes / bytes / 8 * 8, 8, kTileRows);
  if (weights.groups == 1 && rows * bytes <= kFewBytes) few_tiles(path, source, rows, tile, weights, epilogue);
  else many_tiles(path, source, rows, tile, weights, epilogue);
}

}  // namespace phyla::quantized
