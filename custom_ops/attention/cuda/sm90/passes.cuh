// The passes of Hopper's kernels: what each loads, its mainloop and its epilogue.
#ifndef STF_CUSTOM_OPS_ATTENTION_CUDA_SM90_PASSES_CUH_
#define STF_CUSTOM_OPS_ATTENTION_CUDA_SM90_PASSES_CUH_

#include "custom_ops/attention/cuda/common/epilogue.cuh"
#include "custom_ops/attention/cuda/sm90/kernel.cuh"
#include "custom_ops/attention/cuda/sm90/mainloop.cuh"

namespace stf {
namespace cuda {

// Which of a map's two variants has a sequence of this launch.
__device__ inline int Variant(const Maps& maps, int sequence) { return sequence < maps.longer ? 1 : 0; }

// The first key of a component whose keys lie together.
__device__ inline int FirstColumn(const Component& c) { return c.kind == STF_SUMMARY ? c.b : 0; }

// The producer warp of a launch by queries: own rows are the queries' (kGrads: and the output gradients'); keys and
// values stream.
template <typename Tile, int kKeyDepth, int kValueDepth, bool kGrads, bool kGeneral, bool kDocuments>
__device__ inline void ProduceByQuery(const Pipeline<Tile>& pipeline, const Arguments& args, const Launch& launch, const Maps& maps) {
  auto copy_own = [&](const WorkTile& work_tile, uint32_t tile, uint32_t full) {
    const int sequence = work_tile.sequence, variant = Variant(maps, sequence);
    auto index = [&](int row) { return work_tile.first + row; };
    CopyRows<kKeyDepth, Tile::kRows>(tile, maps.own[0][variant], 64, full, work_tile.batch, work_tile.head, sequence, index);
    if constexpr (kGrads) {
      CopyRows<kValueDepth, Tile::kRows>(tile + Tile::kOwnKeyBytes, maps.own[1][variant], 64, full, work_tile.batch, work_tile.head,
                                         sequence, index);
    }
  };
  auto copy = [&](const WorkTile& work_tile, const WarpgroupSegment& segment, uint32_t tile, uint32_t full) {
    if (IsScattered(*segment.component, args.positions)) {
      auto index = [&](int row) { return KeyPosition(*segment.component, work_tile.ViewOf(launch), segment.begin + row); };
      CopyRows<kKeyDepth, kStageRows>(tile, maps.summary[0], maps.summary_rows, full, work_tile.batch, work_tile.key_head, 0, index);
      CopyRows<kValueDepth, kStageRows>(tile + Tile::kStageKeyBytes, maps.summary[1], maps.summary_rows, full, work_tile.batch,
                                        work_tile.key_head, 0, index);
      return;
    }
    const int sequence = work_tile.sequence, variant = Variant(maps, sequence);
    auto index = [&](int row) { return FirstColumn(*segment.component) + segment.begin + row; };
    CopyRows<kKeyDepth, kStageRows>(tile, maps.streamed[0][variant], 64, full, work_tile.batch, work_tile.key_head, sequence, index);
    CopyRows<kValueDepth, kStageRows>(tile + Tile::kStageKeyBytes, maps.streamed[1][variant], 64, full, work_tile.batch, work_tile.key_head,
                                      sequence, index);
  };
  Produce<Tile, false, kGeneral, kDocuments>(pipeline, args, launch, copy_own, copy,
                                             [](const WorkTile&, const WarpgroupSegment&, uint32_t, uint32_t) {});
}

// Output and log-sum-exp of a tile of queries. kPartial: see OutputRows.
template <typename T, int kKey, int kValue, bool kGeneralMask, bool kWithDocuments, bool kPartial>
struct Forward {
  using Tile = KernelTile<kForward, kKey, kValue>;
  static constexpr int kKeyDepth = kKey, kValueDepth = kValue, kOwnValueDepth = 0, kStageArrivals = 1;
  static constexpr bool kByKey = false, kGeneral = kGeneralMask, kDocuments = kWithDocuments;

  Softmax<T, kKey, kValue> softmax;
  bool settled = false;

  __device__ static void Load(const Pipeline<Tile>& pipeline, const Arguments& args, const Launch& launch, const Maps& maps) {
    ProduceByQuery<Tile, kKey, kValue, false, kGeneral, kDocuments>(pipeline, args, launch, maps);
  }

  __device__ Forward(const Arguments& args, const Launch& launch, const WorkTile& work_tile, const View& view, int row) {
    if (launch.first) {
      softmax.Start(args.sinks, work_tile.head);
    } else {
      FindRows(args, work_tile, view, row).Continue(&softmax, args, true);
    }
  }

  template <typename Mask>
  __device__ void Mainloop(const Context& context, const Mask& mask, const WarpgroupSegment& segment, int begin, int end, uint32_t query,
                           uint32_t, uint32_t key, const float*) {
    WarpgroupAttend<T, kKey, kValue, Tile::kRows, kStageRows>(softmax, &settled, context, mask, segment, begin, end, query, key,
                                                              key + Tile::kStageKeyBytes);
  }

  __device__ void Epilogue(const Arguments& args, const Launch& launch, const WorkTile& work_tile, const View& view, int row) {
    softmax.Finish();
    FindRows(args, work_tile, view, row).Store(&softmax, args, launch, true);
  }

 private:
  // Found anew where they are needed: registers are few in the mainloop.
  __device__ static OutputRows<T, kValue, kPartial> FindRows(const Arguments& args, const WorkTile& work_tile, const View& view, int row) {
    auto position = [&](int row) { return row < work_tile.existing ? view.Position(row) : -1; };
    return OutputRows<T, kValue, kPartial>(args, work_tile.batch, work_tile.head, {position(row), position(row + 8)});
  }
};

// Query gradients of a tile of queries. The first launch of a call leaves delta for the others.
template <typename T, int kKey, int kValue, bool kGeneralMask, bool kWithDocuments>
struct QueryGrad {
  using Tile = KernelTile<kQueryGrad, kKey, kValue>;
  static constexpr int kKeyDepth = kKey, kValueDepth = kValue, kOwnValueDepth = kValue, kStageArrivals = 1;
  static constexpr bool kByKey = false, kGeneral = kGeneralMask, kDocuments = kWithDocuments;

  float sum[kKey / 8][4], log_sum_exp[2], delta[2];

  __device__ static void Load(const Pipeline<Tile>& pipeline, const Arguments& args, const Launch& launch, const Maps& maps) {
    ProduceByQuery<Tile, kKey, kValue, true, kGeneral, kDocuments>(pipeline, args, launch, maps);
  }

  __device__ QueryGrad(const Arguments& args, const Launch& launch, const WorkTile& work_tile, const View& view, int first_row) {
    const int64_t statistics = StatisticsBase(args, work_tile.batch, work_tile.head);
    if (launch.first) {
      const T* const output = Base<const T>(args.output, work_tile.batch, work_tile.head);
      const T* const grad = Base<const T>(args.output_grad, work_tile.batch, work_tile.head);
      WarpgroupSumProducts<T, kValue>(delta, output, args.output.position_stride, grad, args.output_grad.position_stride, args.value_depth,
                                      [&](int r) {
                                        const int row = first_row + 8 * r;
                                        return row < work_tile.end ? view.Position(row) : -1;
                                      });
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const int row = first_row + 8 * r, position = view.Position(row);
      log_sum_exp[r] = row < work_tile.end ? args.log_sum_exp[statistics + position] : 0;
      if (launch.first) {
        if (row < work_tile.end && args.log_sum_exp_grad) delta[r] -= args.log_sum_exp_grad[statistics + position];
        if (row < work_tile.existing && threadIdx.x % 4 == 0) args.delta[statistics + position] = delta[r];
      } else {
        delta[r] = row < work_tile.end ? args.delta[statistics + position] : 0;
      }
    }
    Clear(sum);
  }

  template <typename Mask>
  __device__ void Mainloop(const Context& context, const Mask& mask, const WarpgroupSegment& segment, int begin, int end, uint32_t query,
                           uint32_t grad, uint32_t key, const float*) {
    WarpgroupAddQueryGrad<T, kKey, kValue, Tile::kRows, kStageRows>(context, mask, segment, begin, end, query, grad, key,
                                                                    key + Tile::kStageKeyBytes, log_sum_exp, delta, sum);
  }

  __device__ void Epilogue(const Arguments& args, const Launch& launch, const WorkTile& work_tile, const View& view, int first_row) {
    const auto position = [&](int row) { return row < work_tile.existing ? view.Position(row) : -1; };
    StoreQueryGradients<T, kKey>(sum, args, launch, work_tile.batch, work_tile.head, {position(first_row), position(first_row + 8)});
  }
};

// Key and value gradients of a tile of keys.
template <typename T, int kKey, int kValue, bool kGeneralMask, bool kWithDocuments>
struct KeyGrad {
  using Tile = KernelTile<kKeyGrad, kKey, kValue>;
  static constexpr int kKeyDepth = kKey, kValueDepth = kValue, kOwnValueDepth = kValue;
  static constexpr int kStageArrivals = 1 + 32;  // each lane's copies of statistics arrive, too
  static constexpr bool kByKey = true, kGeneral = kGeneralMask, kDocuments = kWithDocuments;

  float key_sum[kKey / 8][4], value_sum[kValue / 8][4];

  __device__ static void Load(const Pipeline<Tile>& pipeline, const Arguments& args, const Launch& launch, const Maps& maps) {
    auto copy_own = [&](const WorkTile& work_tile, uint32_t tile, uint32_t full) {
      const Component numbering = work_tile.Numbering(launch);
      const bool scattered = IsScattered(numbering, args.positions);
      const int sequence = scattered ? 0 : work_tile.sequence, variant = scattered ? 0 : Variant(maps, sequence);
      auto index = [&](int row) {
        return scattered ? KeyPosition(numbering, work_tile.ViewOf(launch), work_tile.first + row)
                         : FirstColumn(numbering) + work_tile.first + row;
      };
      CopyRows<kKey, Tile::kRows>(tile, maps.own[0][variant], maps.own_rows, full, work_tile.batch, work_tile.key_head, sequence, index);
      CopyRows<kValue, Tile::kRows>(tile + Tile::kOwnKeyBytes, maps.own[1][variant], maps.own_rows, full, work_tile.batch,
                                    work_tile.key_head, sequence, index);
    };
    auto copy = [&](const WorkTile& work_tile, const WarpgroupSegment& segment, uint32_t tile, uint32_t full) {
      const int sequence = work_tile.sequence, variant = Variant(maps, sequence);
      auto index = [&](int row) { return segment.begin + row; };
      CopyRows<kKey, kStageRows>(tile, maps.streamed[0][variant], 64, full, work_tile.batch, work_tile.head, sequence, index);
      CopyRows<kValue, kStageRows>(tile + Tile::kStageKeyBytes, maps.streamed[1][variant], 64, full, work_tile.batch, work_tile.head,
                                   sequence, index);
    };
    auto copy_statistics = [&](const WorkTile& work_tile, const WarpgroupSegment& segment, uint32_t stage, uint32_t full) {
      const int64_t base = StatisticsBase(args, work_tile.batch, work_tile.head);
#pragma unroll
      for (int i = threadIdx.x % 32; i < 2 * kStageRows; i += 32) {
        const int row = i % kStageRows;
        const float* const from = i < kStageRows ? args.log_sum_exp : args.delta;
        CopyAsync<4>(pipeline.Statistics(stage) + i,
                     from + base + (row < segment.count ? work_tile.ViewOf(launch).Position(segment.begin + row) : 0), row < segment.count);
      }
      ArriveAfterCopies(full);
    };
    Produce<Tile, true, kGeneral, kDocuments>(pipeline, args, launch, copy_own, copy, copy_statistics);
  }

  __device__ KeyGrad(const Arguments&, const Launch&, const WorkTile&, const View&, int) {
    Clear(key_sum);
    Clear(value_sum);
  }

  template <typename Mask>
  __device__ void Mainloop(const Context& context, const Mask& mask, const WarpgroupSegment& segment, int begin, int end, uint32_t key,
                           uint32_t value, uint32_t query, const float* statistics) {
    WarpgroupAddKeyGrads<T, kKey, kValue, Tile::kRows, kStageRows>(
        context, mask, segment, begin, end, key, value, query, query + Tile::kStageKeyBytes, statistics, statistics + kStageRows, key_sum,
        value_sum, [] {}, [] {}, [](const auto&) {});
  }

  __device__ void Epilogue(const Arguments& args, const Launch& launch, const WorkTile& work_tile, const View& view, int first_row) {
    const Component numbering = work_tile.Numbering(launch);
    const auto position = [&](int row) { return row < work_tile.end ? KeyPosition(numbering, view, row) : -1; };
    StoreKeyGradients<T, kKey, kValue>(key_sum, value_sum, args, launch, work_tile.batch, work_tile.head,
                                       {position(first_row), position(first_row + 8)});
  }
};

}  // namespace cuda
}  // namespace stf

#endif  // STF_CUSTOM_OPS_ATTENTION_CUDA_SM90_PASSES_CUH_
