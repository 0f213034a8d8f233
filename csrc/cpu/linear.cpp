// The driver common to all rungs: lay out the workspace, then two parallel regions.
//   1. rows of x are quantised (or widened) and t = phi(x D^T) is computed
//   2. the packed base streams by; every tile adds bias and t U^T while its accumulators are live
// A region is opened only where its work pays for waking the pool. Partitions never change the order of a sum, so the
// result does not depend on the number of threads.
#include "../kernels.h"

namespace calora {
namespace {

constexpr int64_t kForkWork = 64 * 1024;  // multiply-adds below which region 1 stays on the calling thread

struct RowTask { const LinearArgs* a; const Kernels* k; };

void prepare_rows(void* context, int64_t begin, int64_t end) {
  auto* task = static_cast<RowTask*>(context);
  task->k->prepare(*task->a, begin, end);
  if (task->a->bank.rank) task->k->bank_down(*task->a, begin, end, 0, task->a->bank.rank);
}

void down_ranks(void* context, int64_t begin, int64_t end) {
  auto* task = static_cast<RowTask*>(context);
  task->k->bank_down(*task->a, 0, task->a->m, begin, end);
}

void base_tiles(void* context, int64_t begin, int64_t end) {
  auto* task = static_cast<RowTask*>(context);
  task->k->tiles(*task->a, begin, end);
}

}  // namespace

std::size_t plan(LinearArgs& a, uint8_t* workspace) {
  std::size_t used = 0;
  auto take = [&](int64_t count, std::size_t size) -> uint8_t* {
    uint8_t* at = workspace ? workspace + used : nullptr;
    used += static_cast<std::size_t>(round_up(count * static_cast<int64_t>(size), kTileAlign));
    return at;
  };
  const Geometry& g = a.w.g;
  const bool int8 = a.activations == Activations::int8;
  a.xq = int8 ? reinterpret_cast<int8_t*>(take(a.m * g.columns, 1)) : nullptr;
  a.x_scale = int8 ? reinterpret_cast<float*>(take(a.m * g.blocks, sizeof(float))) : nullptr;
  a.x_sum = int8 ? reinterpret_cast<int32_t*>(take(a.m * g.blocks, sizeof(int32_t))) : nullptr;
  a.xf = int8 ? nullptr : reinterpret_cast<float*>(take(a.m * g.columns, sizeof(float)));
  a.xb = int8 || a.x_dtype != DType::bf16 ? nullptr : reinterpret_cast<uint16_t*>(take(a.m * g.columns, sizeof(uint16_t)));
  a.t = a.bank.rank ? reinterpret_cast<float*>(take(a.m * a.bank.rank, sizeof(float))) : nullptr;
  return used;
}

void linear(LinearArgs& a, ParallelFor parallel_for) {
  const Kernels& k = kernels();
  RowTask task{&a, &k};
  if (a.m > 1) {
    const int64_t row_work = a.w.in_features * (1 + a.bank.rank);
    parallel_for(0, a.m, 1 + kForkWork / (1 + row_work), prepare_rows, &task);
  } else {
    k.prepare(a, 0, a.m);
    if (a.bank.rank) parallel_for(0, a.bank.rank, 1 + kForkWork / (1 + a.w.in_features), down_ranks, &task);
  }
  parallel_for(0, a.w.g.tiles, 1 + kForkWork / (1 + a.w.in_features * kTileRows), base_tiles, &task);
}

namespace {
struct BackwardTask { const BackwardArgs* a; const Kernels* k; };
void backward_chunks(void* context, int64_t begin, int64_t end) {
  auto* task = static_cast<BackwardTask*>(context);
  task->k->backward(*task->a, begin, end);
}
}  // namespace

void backward(const BackwardArgs& a, ParallelFor parallel_for) {
  BackwardTask task{&a, &kernels()};
  const int64_t chunks = round_up(a.w.in_features, kColumnAlign) / kColumnAlign;
  parallel_for(0, chunks, 1 + kForkWork / (1 + a.m * a.w.out_features * kColumnAlign), backward_chunks, &task);
}

}  // namespace calora
