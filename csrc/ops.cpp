// The torch operators (schemas and checks), stable ABI: one binary for every torch from 2.10. Every size is checked here,
// once, before a pointer is formed; kernels trust their arguments.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <time.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <optional>
#include <thread>
#include <utility>
#include <vector>

#include "cpu/expand.h"
#include "cpu/forks.h"
#include "kernels.h"

namespace calora {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kMaxFeatures = 131072;  // an int32 sum of 127 * 127 products still fits

int64_t clock_ns(clockid_t clock) {
  timespec t;
  clock_gettime(clock, &t);
  return t.tv_sec * int64_t{1'000'000'000} + t.tv_nsec;
}

void parallel_for(int64_t begin, int64_t end, int64_t grain, Body body, void* context) {
  static Forks forks;  // of the process, as torch's pool is
  if (begin >= end) return;
  if (end - begin <= grain) return body(context, begin, end);
  const int64_t start = clock_ns(CLOCK_MONOTONIC);
  if (!forks.pay(start)) return body(context, begin, end);
  const bool watch = forks.watch();
  const auto caller = std::this_thread::get_id();
  int64_t worked = -1;
  torch::stable::parallel_for(begin, end, grain, [&](int64_t b, int64_t e) {
    if (!watch || std::this_thread::get_id() != caller) return body(context, b, e);
    const int64_t before = clock_ns(CLOCK_THREAD_CPUTIME_ID);
    body(context, b, e);
    worked = clock_ns(CLOCK_THREAD_CPUTIME_ID) - before;  // torch gives a thread one share
  });
  const int64_t finish = clock_ns(CLOCK_MONOTONIC);
  forks.ended(finish, torch::stable::get_num_threads(), finish - start, worked);
}

DType dtype_of(const Tensor& t, const char* what) {
  const ScalarType type = t.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16,
                  "calora: ", what, " must be float32 or bfloat16; convert it with .float() or .bfloat16()");
  return type == ScalarType::Float ? DType::f32 : DType::bf16;
}

Weight weight_of(const std::vector<Tensor>& packed, int64_t format, int64_t in_features, int64_t out_features,
                 int64_t group_size) {
  STD_TORCH_CHECK(format >= 0 && format / 16 <= static_cast<int>(Pattern::paired) && format % 16 <= static_cast<int>(Values::nf4),
                  "calora: unknown weight format ", format, "; this build knows bf16, int8, int4 and nf4, each dense, 2:4 or unstructured");
  const auto pattern = static_cast<Pattern>(format / 16);
  const auto values = static_cast<Values>(format % 16);
  STD_TORCH_CHECK(pattern != Pattern::paired || values == Values::int4, "calora: weights in pairs of rows are int4, not format ", format);
  STD_TORCH_CHECK(in_features >= 1 && in_features <= kMaxFeatures && out_features >= 1 && out_features <= (int64_t{1} << 31),
                  "calora: unsupported layer size ", out_features, " x ", in_features);
  STD_TORCH_CHECK(group_size == -1 || (has_groups(values) && group_size >= kColumnAlign && group_size <= kMaxFeatures &&
                                       group_size % kColumnAlign == 0),
                  "calora: group_size must be -1 or, for int4 and nf4, a multiple of ", kColumnAlign, "; got ", group_size);
  const Geometry g = geometry(pattern, values, in_features, out_features, group_size);
  const bool streams = has_kept(pattern), nf4 = values == Values::nf4;
  const bool zeros = packed.size() == 2 && values == Values::int4 && pattern == Pattern::dense;
  const std::size_t scales = nf4 ? 1 : 0, offsets = 1 + scales, kept = 2 + scales;  // where they are in `packed`
  STD_TORCH_CHECK(zeros || packed.size() == (streams ? kept + 1 : offsets),
                  "calora: expected the packed weight (for nf4 also its scales, for dense int4 optionally its zero points, for "
                  "unstructured weights offsets and kept codes), got ", packed.size(), " tensors");
  for (const Tensor& t : packed)
    STD_TORCH_CHECK(t.scalar_type() == ScalarType::Byte && t.is_cpu() && t.is_contiguous(),
                    "calora: packed tensors must be contiguous uint8 CPU tensors");
  STD_TORCH_CHECK(packed[0].numel() == g.bytes(), "calora: the packed weight has ", packed[0].numel(), " bytes, a ", out_features,
                  " x ", in_features, " layer of this format needs ", g.bytes());
  STD_TORCH_CHECK(!zeros || packed[1].numel() == g.zeros_bytes(), "calora: the zero points have ",
                  zeros ? packed[1].numel() : 0, " bytes, expected ", g.zeros_bytes());
  STD_TORCH_CHECK(!nf4 || packed[scales].numel() == g.scales_bytes(), "calora: the scales have ", packed[scales].numel(),
                  " bytes, expected ", g.scales_bytes());
  STD_TORCH_CHECK(!streams || packed[offsets].numel() == g.offsets_bytes(), "calora: the offsets have ",
                  streams ? packed[offsets].numel() : 0, " bytes, expected ", g.offsets_bytes());
  STD_TORCH_CHECK(!streams || kept_limit(values, packed[kept].numel()) >= 0, "calora: the kept codes have ",
                  streams ? packed[kept].numel() : 0, " bytes, too few for their tail");
  // A file without the 64-byte alignment is loaded by copying; a misaligned pointer never reaches a kernel.
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(packed[0].data_ptr()) % kTileAlign == 0,
                  "calora: the packed weight is not 64-byte aligned; .clone() it");
  Weight w{static_cast<const uint8_t*>(packed[0].data_ptr()),
           zeros ? static_cast<const uint8_t*>(packed[1].data_ptr()) : nullptr, pattern, values, in_features, out_features, g};
  if (streams) {
    w.offsets = static_cast<const uint8_t*>(packed[offsets].data_ptr());
    w.kept = static_cast<const uint8_t*>(packed[kept].data_ptr());
    w.kept_limit = kept_limit(values, packed[kept].numel());
  }
  if (nf4) w.scales = static_cast<const uint8_t*>(packed[scales].data_ptr());
  return w;
}

Bank bank_of(const std::optional<Tensor>& down, const std::optional<Tensor>& up, int64_t identity_rank, int64_t in_features,
             int64_t out_features) {
  STD_TORCH_CHECK(down.has_value() == up.has_value(), "calora: down and up belong together, got only one of them");
  if (!down || down->numel() == 0) return {};
  STD_TORCH_CHECK(down->is_cpu() && up->is_cpu() && down->is_contiguous() && up->is_contiguous(),
                  "calora: down and up must be contiguous CPU tensors");
  STD_TORCH_CHECK(down->dim() == 2 && down->size(1) == in_features, "calora: down must be (rank, ", in_features, ")");
  const int64_t rank = down->size(0), tiles = round_up(out_features, kTileRows) / kTileRows;
  const bool tiled = up->dim() == 3;
  STD_TORCH_CHECK(tiled ? up->size(0) == tiles && up->size(1) == rank && up->size(2) == kTileRows
                        : up->dim() == 2 && up->size(0) == out_features && up->size(1) == rank,
                  "calora: up must be (", out_features, ", ", rank, ") or tiled (", tiles, ", ", rank, ", 32)");
  STD_TORCH_CHECK(identity_rank >= 0 && identity_rank <= rank, "calora: identity_rank must lie in 0..", rank, ", got ", identity_rank);
  const DType dtype = dtype_of(*down, "down");
  STD_TORCH_CHECK(dtype_of(*up, "up") == dtype, "calora: down and up must have one dtype");
  return {down->data_ptr(), up->data_ptr(), dtype, tiled, rank, identity_rank};
}

// Scratch of the calling thread: grows, is kept, and is shared with the pool for the duration of one call.
uint8_t* scratch(std::size_t bytes) {
  struct Free { void operator()(uint8_t* p) const { std::free(p); } };
  static thread_local std::unique_ptr<uint8_t, Free> buffer;
  static thread_local std::size_t capacity = 0;
  if (bytes > capacity) {
    const std::size_t wanted = static_cast<std::size_t>(round_up(static_cast<int64_t>(bytes), 4096));
    buffer.reset(static_cast<uint8_t*>(std::aligned_alloc(64, wanted)));
    capacity = buffer ? wanted : 0;
    STD_TORCH_CHECK(buffer != nullptr, "calora: out of memory for ", wanted, " bytes of scratch");
  }
  return buffer.get();
}

// Uninitialised, contiguous, x's dtype and shape but for the last dimension. Not aten::new_empty: its way through the
// dispatcher costs 1 us of a call that should cost 3.
Tensor like_with_last(const Tensor& x, int64_t last) {
  const int64_t dims = x.dim();
  std::vector<int64_t> layout(2 * static_cast<std::size_t>(dims));
  int64_t *sizes = layout.data(), *strides = sizes + dims, stride = 1;
  for (int64_t d = dims - 1; d >= 0; --d) {
    sizes[d] = d == dims - 1 ? last : x.size(d);
    strides[d] = stride;
    stride *= sizes[d];
  }
  int32_t dtype;
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dims, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

Tensor linear_cpu(Tensor x, std::vector<Tensor> packed, int64_t format, int64_t in_features, int64_t out_features,
                  int64_t group_size, std::optional<Tensor> bias, std::optional<Tensor> down, std::optional<Tensor> up,
                  int64_t identity_rank, std::optional<Tensor> row_adapter, int64_t activations) {
  STD_TORCH_CHECK(!row_adapter, "calora: one adapter per row runs on a GPU only; pass row_adapter=None");
  STD_TORCH_CHECK(activations == 0 || activations == 1, "calora: activations must be 0 (exact) or 1 (int8), got ", activations);
  LinearArgs a{};
  a.x_dtype = dtype_of(x, "x");
  a.w = weight_of(packed, format, in_features, out_features, group_size);
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) == in_features, "calora: the last dimension of x must be ", in_features);
  if (!x.is_contiguous()) x = torch::stable::contiguous(x);
  if (bias) {
    STD_TORCH_CHECK(bias->is_cpu() && bias->is_contiguous() && bias->dim() == 1 && bias->size(0) == out_features,
                    "calora: bias must be a contiguous CPU tensor of ", out_features, " values");
    a.bias = bias->data_ptr();
    a.bias_dtype = dtype_of(*bias, "bias");
  }
  a.bank = bank_of(down, up, identity_rank, in_features, out_features);
  // bf16 weights have no codes to multiply with integers: they always run exactly.
  a.activations = a.w.values == Values::bf16 ? Activations::exact : static_cast<Activations>(activations);
  Tensor y = like_with_last(x, out_features);
  a.x = x.data_ptr();
  a.y = y.data_ptr();
  a.m = x.numel() / in_features;
  if (a.m == 0) return y;
  plan(a, scratch(plan(a, nullptr)));
  linear(a, parallel_for);
  return y;
}

Tensor linear_dx_cpu(Tensor grad, std::vector<Tensor> packed, int64_t format, int64_t in_features, int64_t out_features,
                     int64_t group_size) {
  BackwardArgs a{};
  a.dtype = dtype_of(grad, "grad");
  a.w = weight_of(packed, format, in_features, out_features, group_size);
  STD_TORCH_CHECK(grad.dim() >= 1 && grad.size(grad.dim() - 1) == out_features, "calora: the last dimension of grad must be ", out_features);
  if (!grad.is_contiguous()) grad = torch::stable::contiguous(grad);
  Tensor dx = like_with_last(grad, in_features);
  a.grad = grad.data_ptr();
  a.dx = dx.data_ptr();
  a.m = grad.numel() / out_features;
  if (a.m == 0) return dx;
  plan(a, scratch(plan(a, nullptr)));
  backward(a, parallel_for);
  return dx;
}

Tensor decode_cpu(std::vector<Tensor> packed, int64_t format, int64_t in_features, int64_t out_features, int64_t group_size,
                  int64_t row_begin, int64_t row_end) {
  STD_TORCH_CHECK(!packed.empty(), "calora: no packed tensor given");
  const Weight w = weight_of(packed, format, in_features, out_features, group_size);
  STD_TORCH_CHECK(0 <= row_begin && row_begin <= row_end && row_end <= out_features, "calora: rows ", row_begin, "..", row_end,
                  " are not within 0..", out_features);
  Tensor out = torch::stable::new_empty(packed[0], {row_end - row_begin, in_features}, ScalarType::Float);
  auto* data = static_cast<float*>(out.data_ptr());
  struct Task { const Weight& w; float* data; int64_t row_begin; } task{w, data, row_begin};
  parallel_for(row_begin, row_end, kTileRows, [](void* context, int64_t begin, int64_t end) {
    auto* t = static_cast<Task*>(context);
    kernels().decode_rows(t->w, begin, end, t->data + (begin - t->row_begin) * t->w.in_features);
  }, &task);
  return out;
}

// Asks for large pages below what was just allocated and not written yet: in 4 KB pages, which is all that a mapped file gets, a
// stream waits for translations (6 to 14 % of a layer's time in a virtual machine).
Tensor in_large_pages(Tensor t) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kLargePage = uintptr_t{2} << 20;
  const auto begin = reinterpret_cast<uintptr_t>(t.data_ptr()), end = begin + static_cast<uintptr_t>(t.numel());
  const uintptr_t first = (begin + kLargePage - 1) / kLargePage * kLargePage, last = end / kLargePage * kLargePage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // refused, it changes nothing
#endif
  return t;
}

// The dense weight of the same codes and scales, (tiles, bytes of a tile): what is not kept gets the code of 0. (nf4: codes
// alone; its scales are the same tensor in every pattern.)
Tensor expand_cpu(std::vector<Tensor> packed, int64_t format, int64_t in_features, int64_t out_features, int64_t group_size) {
  STD_TORCH_CHECK(!packed.empty(), "calora: no packed tensor given");
  const Weight w = weight_of(packed, format, in_features, out_features, group_size);
  STD_TORCH_CHECK(w.pattern != Pattern::dense, "calora: the weight is dense already");
#ifdef CALORA_X86
  STD_TORCH_CHECK(std::strcmp(kernels().isa, kReference.isa) != 0, "calora: the reference rung expands no weights; choose another rung");
  const Geometry dense = geometry(Pattern::dense, w.values, in_features, out_features, group_size);
  Tensor out = in_large_pages(torch::stable::new_empty(packed[0], {dense.tiles, dense.tile_bytes}));
  struct Task { const Weight& w; const Geometry& dense; uint8_t* out; } task{w, dense, static_cast<uint8_t*>(out.data_ptr())};
  parallel_for(0, dense.tiles, 1, [](void* context, int64_t begin, int64_t end) {
    auto* t = static_cast<Task*>(context);
    const int64_t columns = t->dense.block_columns, codes = code_bytes(t->w.values, columns);
    for (int64_t tile = begin; tile < end; ++tile)
      for (int64_t block = 0; block < t->dense.blocks; ++block) {
        const uint8_t* from = t->w.packed + tile * t->w.g.tile_bytes + block * t->w.g.block_bytes;
        uint8_t* to = t->out + tile * t->dense.tile_bytes + block * t->dense.block_bytes;
        expand(t->w, tile, block, 0, columns, to);
        std::memcpy(to + codes, from + t->w.g.block_bytes - scale_bytes(t->w.values), static_cast<std::size_t>(t->dense.block_bytes - codes));
      }
  }, &task);
  return out;
#else
  STD_TORCH_CHECK(false, "calora: the reference rung expands no weights, and this build has no other");
#endif
}

// An int4 weight -> packed, offsets and kept of the same weight in pairs of rows.
std::vector<Tensor> pair_cpu(std::vector<Tensor> packed, int64_t format, int64_t in_features, int64_t out_features, int64_t group_size) {
  STD_TORCH_CHECK(!packed.empty(), "calora: no packed tensor given");
  const Weight w = weight_of(packed, format, in_features, out_features, group_size);
  STD_TORCH_CHECK(w.values == Values::int4 && w.pattern == Pattern::bitmask, "calora: only unstructured int4 weights are put in pairs of rows");
#ifdef CALORA_X86
  STD_TORCH_CHECK(std::strcmp(kernels().isa, kReference.isa) != 0, "calora: the reference rung pairs no rows; choose another rung");
  const Geometry g = geometry(Pattern::paired, w.values, in_features, out_features, group_size);
  const int64_t chunks = g.tiles * g.chunks();
  Tensor out = in_large_pages(torch::stable::new_empty(packed[0], {g.tiles, g.tile_bytes})), offsets = torch::stable::new_zeros(packed[0], {g.offsets_bytes()});
  std::vector<int64_t> starts(static_cast<std::size_t>(chunks));
  struct Task { const Weight& w; const Geometry& g; uint8_t* out; int64_t* starts; uint8_t* kept; };
  Task task{w, g, static_cast<uint8_t*>(out.data_ptr()), starts.data(), nullptr};
  const Body tiles = [](void* context, int64_t begin, int64_t end) {  // bits, scales and the bytes of each chunk; then what is kept
    auto* t = static_cast<Task*>(context);
    alignas(64) uint8_t codes[kTurnColumns * kTileRows / 2];
    const int64_t block_chunks = t->g.block_columns / kTurnColumns;
    for (int64_t tile = begin; tile < end; ++tile)
      for (int64_t c = 0; c < t->g.chunks(); ++c) {
        const int64_t block = c / block_chunks, in_block = c % block_chunks;
        uint8_t* to = t->out + tile * t->g.tile_bytes + block * t->g.block_bytes;
        int64_t* start = t->starts + tile * t->g.chunks() + c;
        expand(t->w, tile, block, in_block * kTurnColumns, kTurnColumns, codes);
        if (t->kept) {
          pair_rows(codes, to + in_block * kPairMaskBytes, t->kept + *start);
          continue;
        }
        *start = round_up(pair_rows(codes, to + in_block * kPairMaskBytes, nullptr), kOffsetUnit);
        const uint8_t* from = t->w.packed + tile * t->w.g.tile_bytes + (block + 1) * t->w.g.block_bytes;
        if (!in_block) std::memcpy(to + t->g.block_bytes - kScaleBytes, from - kScaleBytes, kScaleBytes);
      }
  };
  parallel_for(0, g.tiles, 1, tiles, &task);
  int64_t total = 0;
  for (int64_t c = 0; c < chunks; ++c) {
    const auto unit = static_cast<uint32_t>(total / kOffsetUnit);
    std::memcpy(static_cast<uint8_t*>(offsets.data_ptr()) + 4 * c, &unit, sizeof unit);
    total += std::exchange(starts[static_cast<std::size_t>(c)], total);
  }
  STD_TORCH_CHECK(total / kOffsetUnit < int64_t{1} << 32, "calora: the layer keeps more than 32 GB, which its offsets cannot count");
  Tensor kept = in_large_pages(torch::stable::new_empty(packed[0], {round_up(total + code_bytes(w.values, kTurnColumns) + kTileAlign, kTileAlign)}));
  std::memset(kept.data_ptr(), 0, static_cast<std::size_t>(kept.numel()));
  task.kept = static_cast<uint8_t*>(kept.data_ptr());
  parallel_for(0, g.tiles, 1, tiles, &task);
  return {out, offsets, kept};
#else
  STD_TORCH_CHECK(false, "calora: the reference rung pairs no rows, and this build has no other");
#endif
}

// The xor of all 8-byte words of a tensor, read by every thread of the pool: timed by the caller, it probes the read bandwidth.
int64_t read_cpu(Tensor data) {
  STD_TORCH_CHECK(data.is_cpu() && data.is_contiguous() && data.scalar_type() == ScalarType::Byte,
                  "calora: read takes a contiguous uint8 CPU tensor");
  constexpr int64_t kPage = 4096;
  struct Task { const uint8_t* data; int64_t bytes; std::atomic<uint64_t> all; } task{static_cast<const uint8_t*>(data.data_ptr()), data.numel(), 0};
  parallel_for(0, (task.bytes + kPage - 1) / kPage, 64, [](void* context, int64_t begin, int64_t end) {
    auto* t = static_cast<Task*>(context);
    const int64_t last = end * kPage < t->bytes ? end * kPage : t->bytes;
    t->all ^= kernels().read(t->data + begin * kPage, last - begin * kPage);
  }, &task);
  return static_cast<int64_t>(task.all.load());
}

}  // namespace

STABLE_TORCH_LIBRARY(calora, m) {
#define LINEAR_ARGUMENTS                                                                                                   \
  "(Tensor x, Tensor[] packed, int format, int in_features, int out_features, int group_size, Tensor? bias, Tensor? down, " \
  "Tensor? up, int identity_rank, Tensor? row_adapter, int activations) -> Tensor"
  m.def("linear" LINEAR_ARGUMENTS);
  m.def("linear_inference" LINEAR_ARGUMENTS);  // the same without a derivative, whose Python wrapper costs 5 us a call
  m.def("linear_dx(Tensor grad, Tensor[] packed, int format, int in_features, int out_features, int group_size) -> Tensor");
  m.def("decode(Tensor[] packed, int format, int in_features, int out_features, int group_size, int row_begin, int row_end) -> Tensor");
  m.def("expand(Tensor[] packed, int format, int in_features, int out_features, int group_size) -> Tensor");
  m.def("pair(Tensor[] packed, int format, int in_features, int out_features, int group_size) -> Tensor[]");
  m.def("read(Tensor data) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(calora, CPU, m) {
  m.impl("linear", TORCH_BOX(&linear_cpu));
  m.impl("linear_inference", TORCH_BOX(&linear_cpu));
  m.impl("linear_dx", TORCH_BOX(&linear_dx_cpu));
  m.impl("decode", TORCH_BOX(&decode_cpu));
  m.impl("expand", TORCH_BOX(&expand_cpu));
  m.impl("pair", TORCH_BOX(&pair_cpu));
  m.impl("read", TORCH_BOX(&read_cpu));
}

}  // namespace calora
