// The work of backward in one pass (backward.cuh): runs of keys, block by block of keys, and the tiles of queries that each visits.
#ifndef STF_CUSTOM_OPS_ATTENTION_CUDA_SM90_KEY_BLOCKS_CUH_
#define STF_CUSTOM_OPS_ATTENTION_CUDA_SM90_KEY_BLOCKS_CUH_

#include "custom_ops/attention/cuda/common/scheduler.cuh"
#include "custom_ops/attention/cuda/tiles.h"

namespace stf {
namespace cuda {

// kBackwardKeys keys, and the tiles of queries that they visit.
struct __align__(16) KeyBlock {
  int batch, head, program, sequence;  // batch -1: there are no more
  int start, count, existing;          // of the view; rows of the sequence, in use or not
  int first, end;                      // keys: the first, and behind the last that exists
  int tile_begin, tile_end;            // tiles of queries
  int tile_new;                        // from here on, tiles that the run has not visited before
  int tile_stop;                       // from here on, tiles whose query gradients are another run's
  int16_t keys;                        // whether the keys' gradients are this run's
  int16_t cut;                         // whether documents leave out queries of the keys
  int slot;                            // plus a tile: which of the tiles that the block of threads visits, counted from 0
  int key_head;

  template <bool kDocuments>
  __device__ View ViewOf(const Arguments& args, const Launch& launch) const {
    return {start, launch.stride, count, kDocuments && cut ? DocumentsOf(args, batch) : nullptr};
  }
  __device__ Head HeadOf(const Launch& launch) const { return {launch.components + launch.begin[program], launch.members[program]}; }
};

// The key blocks of a block of threads, one after another.
template <bool kDocuments>
class KeyBlockWalk {
 public:
  __device__ KeyBlockWalk(const Arguments& args, const Launch& launch) : args_(args), launch_(launch), unit_(blockIdx.x) {}

  __device__ bool Next(KeyBlock* block) {
    while (true) {
      while (next_ >= end_) {
        if (unit_ >= launch_.work_tiles) return false;
        NextRun(block);
      }
      const Component& component = launch_.components[launch_.begin[block->program] + component_];
      const int index = next_++, last = min((index + 1) * kBackwardKeys, block->existing) - 1;
      block->cut = 1;
      if (kDocuments)
        block->cut = !KeepsQueries(component, block->template ViewOf<kDocuments>(args_, launch_), index * kBackwardKeys, last);
      const int reached = min(QueriesOf(component, block->template ViewOf<kDocuments>(args_, launch_), last).high, block->count);
      block->first = index * kBackwardKeys;
      block->end = last + 1;
      block->tile_begin = max(index, run_) * (kBackwardKeys / 64);
      block->tile_end = max((reached + 63) / 64, (last + 64) / 64);                // the keys' own positions always: those are written here
      if (index < run_) block->tile_end = min(block->tile_end, block->tile_stop);  // of the run before: nothing else is wanted of it
      if (block->tile_end <= block->tile_begin) continue;
      block->tile_new = seen_;
      block->keys = index >= run_;
      seen_ = max(seen_, block->tile_end);
      return true;
    }
  }

 private:
  __device__ void NextRun(KeyBlock* block) {
    TileIndex work;
    const int tiles = seen_ - run_ * (kBackwardKeys / 64);  // of the run before
    visited_ += tiles;
    seen_ = run_ = next_ = end_ = 0;
    const bool exists = FindTile(args_, launch_, unit_, launch_.sequences, false, &work);
    unit_ += gridDim.x;
    if (!exists) return;
    const View view = FindView(args_, launch_, work.sequence, work.batch);
    block->batch = work.batch;
    block->head = work.head;
    block->key_head = work.key_head;
    block->program = work.program;
    block->sequence = work.sequence;
    block->start = view.start;
    block->count = view.count;
    block->existing = CountBelow(launch_, work.sequence, args_.positions);
    const int run = work.tile * launch_.run;
    if (run * kBackwardKeys >= block->existing) return;
    component_ = __ffsll(launch_.members[work.program]) - 1;
    run_ = run;
    end_ = min(run + launch_.run, (block->existing + kBackwardKeys - 1) / kBackwardKeys);
    const Component& component = work.components.components[component_];
    block->cut = kDocuments && Restarts(component);  // the others' keys begin no earlier within documents
    next_ = min(run, KeysOf(component, block->template ViewOf<kDocuments>(args_, launch_), run * kBackwardKeys).low / kBackwardKeys);
    seen_ = run * (kBackwardKeys / 64);
    block->tile_stop = end_ * (kBackwardKeys / 64);
    block->slot = visited_ - seen_;
  }

  const Arguments& args_;
  const Launch& launch_;
  int unit_;
  int component_ = 0;                 // of the program's
  int run_ = 0, next_ = 0, end_ = 0;  // key blocks: the first of the run, the next to visit, and behind the last
  int seen_ = 0;                      // behind the last tile that the run has visited
  int visited_ = 0;                   // tiles of the runs before
};

}  // namespace cuda
}  // namespace stf

#endif  // STF_CUSTOM_OPS_ATTENTION_CUDA_SM90_KEY_BLOCKS_CUH_
