// The driver common to all rungs: lay out the workspace, then two parallel regions.
//   1. rows of x are quantised (or widened) and t = phi(x D^T) is computed
//   2. the packed base streams by; every tile adds bias and t U^T: while its accumulators are live, or, decoding, in a pass
//      over U that follows (bank_tiles in decode.h)
// A region is opened only where its work pays for waking the pool. Partitions never change the order of a sum, so the
// result does not depend on the number of threads. More than kMaxRows rows run in several passes, which bounds the workspace.
#include "../kernels.h"

namespace calora {
namespace {

constexpr int64_t kForkWork = 64 * 1024;  // multiply-adds below which region 1 stays on the calling thread

// [begin, end) of rows of the i-th pass; passes differ by at most one row.
struct Pass { int64_t begin, end; };

int64_t pass_count(int64_t m) { return (m + kMaxRows - 1) / kMaxRows; }

Pass pass_of(int64_t m, int64_t i) {
  const int64_t n = pass_count(m), base = m / n, longer = m % n;
  const int64_t begin = i * base + (i < longer ? i : longer);
  return {begin, begin + base + (i < longer ? 1 : 0)};
}

// Rows of the workspace of every pass.
int64_t workspace_rows(int64_t m) { return row_panels(pass_of(m, 0).end).padded_rows(); }

class Carver {  // cuts a workspace into 64-byte aligned arrays, or only counts
 public:
  explicit Carver(uint8_t* workspace) : workspace_(workspace) {}
  template <class T> T* take(int64_t count) {
    T* at = workspace_ ? reinterpret_cast<T*>(workspace_ + used_) : nullptr;
    used_ += static_cast<std::size_t>(round_up(count * static_cast<int64_t>(sizeof(T)), kTileAlign));
    return at;
  }
  std::size_t used() const { return used_; }

 private:
  uint8_t* workspace_;
  std::size_t used_ = 0;
};

const void* advance(const void* p, DType dtype, int64_t elements) {
  return static_cast<const uint8_t*>(p) + elements * (dtype == DType::f32 ? 4 : 2);
}
void* advance(void* p, DType dtype, int64_t elements) { return static_cast<uint8_t*>(p) + elements * (dtype == DType::f32 ? 4 : 2); }

template <class Args> struct Task { const Args* a; const Kernels* k; };
using LinearTask = Task<LinearArgs>;
using BackwardTask = Task<BackwardArgs>;

int64_t rows_end(int64_t m, int64_t panel) {
  const int64_t end = panel * row_panels(m).rows;
  return end < m ? end : m;
}

void prepare_rows(void* context, int64_t begin, int64_t end) {
  auto* task = static_cast<LinearTask*>(context);
  task->k->prepare(*task->a, begin, end);
  if (task->a->bank.rank) task->k->bank_down(*task->a, begin, end, 0, task->a->bank.rank);
}

void prepare_panels(void* context, int64_t begin, int64_t end) {
  const int64_t m = static_cast<LinearTask*>(context)->a->m;
  prepare_rows(context, rows_end(m, begin), rows_end(m, end));
}

void down_ranks(void* context, int64_t begin, int64_t end) {
  auto* task = static_cast<LinearTask*>(context);
  task->k->bank_down(*task->a, 0, task->a->m, begin, end);
}

void base_units(void* context, int64_t begin, int64_t end) {
  auto* task = static_cast<LinearTask*>(context);
  task->k->tiles(*task->a, begin, end);
}

// Tiles hold what they keep, some many times as much as others. So threads share the bytes of a weight, in units of kOffsetUnit, and a
// tile belongs to the thread in whose share it begins.
int64_t units_before(const Weight& w, int64_t tile) {
  const int64_t kept = tile < w.g.tiles ? w.chunk(tile, 0) - w.kept : w.kept_limit;
  return (tile * w.g.tile_bytes + kept) / kOffsetUnit;
}

int64_t first_tile_from(const Weight& w, int64_t unit) {
  int64_t low = 0, high = w.g.tiles;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (units_before(w, middle) < unit) low = middle + 1;
    else high = middle;
  }
  return low;
}

void kept_units(void* context, int64_t begin, int64_t end) {
  const Weight& w = static_cast<LinearTask*>(context)->a->w;
  const int64_t first = begin ? first_tile_from(w, begin) : 0, last = end < units_before(w, w.g.tiles) ? first_tile_from(w, end) : w.g.tiles;
  if (first < last) base_units(context, first, last);
}

// Whether the tiles are done sooner by the calling thread than by several, who take 4 to 5 us to start and to wait for. From
// memory the time of the base is that of its bytes, whatever the number of rows; in cache it goes with the rows.
bool stays(const LinearArgs& a, const Kernels& k) {
  const int64_t bytes = a.w.g.bytes() + (has_kept(a.w.pattern) ? a.w.kept_limit : 0);
  return a.m <= kDecodeRows && bytes * (3 + a.m) / 4 < k.fork_bytes;
}

void linear_pass(const LinearArgs& a, ParallelFor parallel_for) {
  const Kernels& k = kernels();
  LinearTask task{&a, &k};
  const RowPanels p = row_panels(a.m);
  const int64_t row_work = a.w.in_features * (1 + a.bank.rank);
  if (!k.decodes(a)) {
    parallel_for(0, p.panels, 1 + kForkWork / (1 + p.rows * row_work), prepare_panels, &task);
  } else if (a.m > 1) {
    parallel_for(0, a.m, 1 + kForkWork / (1 + row_work), prepare_rows, &task);
  } else {
    k.prepare(a, 0, a.m);
    if (a.bank.rank) parallel_for(0, a.bank.rank, 1 + kForkWork / (1 + a.w.in_features), down_ranks, &task);
  }
  const int64_t units = (k.decodes(a) ? 1 : p.blocks) * a.w.g.tiles, least = stays(a, k) ? units : 1 + kForkWork / (1 + a.w.in_features * kTileRows);
  if (!k.decodes(a) || !has_kept(a.w.pattern)) return parallel_for(0, units, least, base_units, &task);
  const int64_t size = units_before(a.w, a.w.g.tiles);
  parallel_for(0, size, least * (1 + size / units), kept_units, &task);
}

void prepare_grad(void* context, int64_t begin, int64_t end) {
  auto* task = static_cast<BackwardTask*>(context);
  task->k->prepare_grad(*task->a, rows_end(task->a->m, begin), rows_end(task->a->m, end));
}

void backward_units(void* context, int64_t begin, int64_t end) {
  auto* task = static_cast<BackwardTask*>(context);
  task->k->backward(*task->a, begin, end);
}

void backward_pass(const BackwardArgs& a, ParallelFor parallel_for) {
  BackwardTask task{&a, &kernels()};
  const RowPanels p = row_panels(a.m);
  const int64_t chunks = round_up(a.w.in_features, kColumnAlign) / kColumnAlign;
  parallel_for(0, p.panels, 1 + kForkWork / (1 + p.rows * a.w.out_features), prepare_grad, &task);
  parallel_for(0, p.blocks * chunks, 1 + kForkWork / (1 + p.block_rows() * a.w.out_features * kColumnAlign), backward_units, &task);
}

}  // namespace

std::size_t plan(LinearArgs& a, uint8_t* workspace) {
  Carver carve(workspace);
  const Geometry& g = a.w.g;
  LinearArgs pass = a;
  pass.m = pass_of(a.m, 0).end;
  const bool int8 = a.activations == Activations::int8, decodes = kernels().decodes(pass);
  const int64_t rows = decodes ? round_up(pass.m, kDecodeRows) : workspace_rows(a.m);  // decoding may compute on rows beyond m
  a.xq = int8 ? carve.take<int8_t>(rows * g.columns) : nullptr;
  a.x_scale = int8 ? carve.take<float>(rows * g.blocks) : nullptr;
  a.x_sum = int8 ? carve.take<int32_t>(rows * g.blocks) : nullptr;
  a.xf = int8 || (decodes && pass.m > kDecodeRows) ? nullptr : carve.take<float>(rows * g.columns);  // exact, that many rows are decoded in bf16 only
  const bool eights = !int8 && decodes && a.w.pattern == Pattern::dense && a.w.values == Values::int4;
  a.x_eights = eights ? carve.take<float>(rows * g.columns / 8) : nullptr;
  a.xb = int8 || a.x_dtype != DType::bf16 || !decodes ? nullptr : carve.take<uint16_t>(rows * g.columns);
  a.t = a.bank.rank ? carve.take<float>(rows * a.bank.rank) : nullptr;
  a.sums = a.bank.rank && decodes ? carve.take<float>(pass.m * g.tiles * kTileRows) : nullptr;
  return carve.used();
}

std::size_t plan(BackwardArgs& a, uint8_t* workspace) {
  Carver carve(workspace);
  a.panels = carve.take<float>(workspace_rows(a.m) * a.w.g.tiles * kTileRows);
  return carve.used();
}

void linear(const LinearArgs& a, ParallelFor parallel_for) {
  for (int64_t i = 0; i < pass_count(a.m); ++i) {
    const Pass rows = pass_of(a.m, i);
    LinearArgs pass = a;
    pass.m = rows.end - rows.begin;
    pass.x = advance(a.x, a.x_dtype, rows.begin * a.w.in_features);
    pass.y = advance(a.y, a.x_dtype, rows.begin * a.w.out_features);
    linear_pass(pass, parallel_for);
  }
}

void backward(const BackwardArgs& a, ParallelFor parallel_for) {
  for (int64_t i = 0; i < pass_count(a.m); ++i) {
    const Pass rows = pass_of(a.m, i);
    BackwardArgs pass = a;
    pass.m = rows.end - rows.begin;
    pass.grad = advance(a.grad, a.dtype, rows.begin * a.w.out_features);
    pass.dx = advance(a.dx, a.dtype, rows.begin * a.w.in_features);
    backward_pass(pass, parallel_for);
  }
}

}  // namespace calora
