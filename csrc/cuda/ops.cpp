// The operators on CUDA tensors: checks, and which kernels a call takes. Like csrc/ops.cpp it sees torch only through the stable
// ABI, and no CUDA header: the same binary loads beside a torch without CUDA.
//
// Few rows of x (thresholds.h) in bf16 or fp16: one or two launches of our own, the packed weight read once. More rows, or fp32:
// the weight is decoded to x's dtype and torch's matrix product does the rest. Activations are exact either way.
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <array>
#include <optional>
#include <vector>

#include "api.h"
#include "thresholds.h"

namespace calora::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;

constexpr int64_t kMaxFeatures = 131072;  // of a row, as on the CPU
constexpr int64_t kMaxOutputs = 65535 * kTileRows;  // a grid has as many tiles
constexpr int64_t kXAlign = 16;           // bytes: the kernels copy rows of x in such words

// torch's current stream. Only libtorch_cuda.so can tell it, and a CPU-only torch has none: looked up at the first CUDA call.
void* current_stream(int32_t device) {
  using Function = int32_t (*)(int32_t, void**);
  static const auto function = [] {
    void* const library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return reinterpret_cast<Function>(library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr);
  }();
  STD_TORCH_CHECK(function != nullptr, "calora: this torch was built without CUDA");
  void* stream = nullptr;
  STD_TORCH_CHECK(function(device, &stream) == 0, "calora: torch did not give its current CUDA stream");
  return stream;
}

constexpr int kNoKernelImage = 209;  // cudaErrorNoKernelImageForDevice

void check(int code) {
  STD_TORCH_CHECK(code != kNoKernelImage, "calora: built for other GPU architectures (" CALORA_CUDA_ARCHS
                                          "); build again with CALORA_CUDA_ARCHS set to this GPU's, for example 90");
  STD_TORCH_CHECK(code == 0, "calora: a CUDA kernel was not started: ", calora_cuda_error(code));
}

// A device is current for torch's runtime and for ours, which is another copy of it.
struct OnDevice {
  DeviceGuard guard;
  explicit OnDevice(int32_t device) : guard(device) { check(calora_cuda_set_device(device)); }
};

bool same_device(const Tensor& t, const Tensor& x) { return t.is_cuda() && t.get_device_index() == x.get_device_index(); }

Dtype dtype_of(const Tensor& t, const char* what) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Dtype::f32;
    case ScalarType::BFloat16: return Dtype::bf16;
    case ScalarType::Half: return Dtype::f16;
    default: STD_TORCH_CHECK(false, "calora: ", what, " must be float32, bfloat16 or float16");
  }
  return Dtype::f32;
}

PackedWeight weight_of(const std::vector<Tensor>& packed, int64_t format, int64_t in_features, int64_t out_features, int64_t group_size) {
  STD_TORCH_CHECK(format >= 0 && format / 16 <= static_cast<int64_t>(Pattern::bitmask) && format % 16 <= static_cast<int64_t>(Values::nf4),
                  "calora: weight format ", format, " has no CUDA kernels; keep the layer on the CPU");
  const auto pattern = static_cast<Pattern>(format / 16);
  const auto values = static_cast<Values>(format % 16);
  STD_TORCH_CHECK(in_features >= 1 && in_features <= kMaxFeatures && out_features >= 1 && out_features <= kMaxOutputs,
                  "calora: unsupported layer size ", out_features, " x ", in_features, "; on a GPU a layer has at most ", kMaxFeatures, " inputs and ",
                  kMaxOutputs, " outputs");
  STD_TORCH_CHECK(group_size == -1 || (has_groups(values) && group_size >= kColumnAlign && group_size <= kMaxFeatures &&
                                       group_size % kColumnAlign == 0),
                  "calora: group_size must be -1 or, for int4 and nf4, a multiple of ", kColumnAlign, "; got ", group_size);
  const bool bitmask = pattern == Pattern::bitmask, scales = values == Values::nf4;
  const bool zeros = packed.size() == 2 && values == Values::int4 && pattern == Pattern::dense;
  const std::size_t offsets = scales ? 2 : 1, kept = offsets + 1;  // where they are, of an unstructured weight
  STD_TORCH_CHECK(packed.size() == (bitmask ? kept + 1 : offsets) || zeros,
                  "calora: expected the packed weight (for dense int4 optionally its zero points, for nf4 its scales, for unstructured "
                  "weights offsets and kept codes), got ", packed.size(), " tensors");
  for (const Tensor& t : packed)
    STD_TORCH_CHECK(t.scalar_type() == ScalarType::Byte && t.is_contiguous() && same_device(t, packed[0]),
                    "calora: packed tensors must be contiguous uint8 tensors on one CUDA device");
  const Geometry g = geometry(pattern, values, in_features, out_features, group_size);
  STD_TORCH_CHECK(packed[0].dim() == 3 && packed[0].size(2) == 16 && ((!zeros && !scales) || packed[1].dim() == 2) && (!bitmask || packed[kept].dim() == 2),
                  "calora: the packed weight on the GPU is in the CPU's order; move the module with .to(\"cuda\"), which reorders it");
  STD_TORCH_CHECK(packed[0].numel() == g.bytes(), "calora: the packed weight has ", packed[0].numel(), " bytes, a ", out_features,
                  " x ", in_features, " layer of this format needs ", g.bytes());
  STD_TORCH_CHECK(!zeros || packed[1].numel() == g.zeros_bytes(), "calora: the zero points have ", zeros ? packed[1].numel() : 0,
                  " bytes, expected ", g.zeros_bytes());
  STD_TORCH_CHECK(!scales || packed[1].numel() == g.scales_bytes(), "calora: the scales have ", scales ? packed[1].numel() : 0,
                  " bytes, expected ", g.scales_bytes());
  STD_TORCH_CHECK(!bitmask || packed[offsets].numel() == g.offsets_bytes(), "calora: the offsets have ",
                  bitmask ? packed[offsets].numel() : 0, " bytes, expected ", g.offsets_bytes());
  STD_TORCH_CHECK(!bitmask || kept_limit(values, packed[kept].numel()) >= 0, "calora: the kept codes have ",
                  bitmask ? packed[kept].numel() : 0, " bytes, too few for their tail");
  for (const Tensor& t : packed)
    STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0, "calora: a packed tensor is not 16-byte aligned; .clone() it");
  const auto data = [&](std::size_t i) { return static_cast<const uint8_t*>(packed[i].data_ptr()); };
  PackedWeight w{data(0), zeros ? data(1) : nullptr, scales ? data(1) : nullptr, nullptr, nullptr, 0, static_cast<int64_t>(pattern),
                 static_cast<int64_t>(values), in_features, out_features, group_size};
  if (bitmask) w.offsets = data(offsets), w.kept = data(kept), w.kept_limit = kept_limit(values, packed[kept].numel());
  return w;
}

// Checks the bank's tensors; t is left for the caller. With row_adapter they are stacks: one dimension more, in front.
LowRank bank_of(const Tensor& x, const std::optional<Tensor>& down, const std::optional<Tensor>& up, int64_t identity_rank,
                const std::optional<Tensor>& row_adapter, int64_t in_features, int64_t out_features) {
  STD_TORCH_CHECK(down.has_value() == up.has_value(), "calora: down and up belong together, got only one of them");
  STD_TORCH_CHECK(!row_adapter || down, "calora: row_adapter chooses among stacked banks; pass down and up too");
  if (!down || down->numel() == 0) return {};
  const int64_t stacked = row_adapter ? 1 : 0;
  if (row_adapter)
    STD_TORCH_CHECK(same_device(*row_adapter, x) && row_adapter->is_contiguous() && row_adapter->scalar_type() == ScalarType::Long &&
                        row_adapter->numel() == x.numel() / in_features,
                    "calora: row_adapter must be a contiguous int64 tensor on the device of x with one number for each of its ",
                    x.numel() / in_features, " rows");
  STD_TORCH_CHECK(same_device(*down, x) && same_device(*up, x) && down->is_contiguous() && up->is_contiguous(),
                  "calora: down and up must be contiguous and on the device of x");
  const char* const front = stacked ? "(adapters, " : "(";
  STD_TORCH_CHECK(down->dim() == 2 + stacked && down->size(1 + stacked) == in_features, "calora: down must be ", front, "rank, ", in_features, ")");
  const int64_t rank = down->size(stacked), tiles = round_up(out_features, kTileRows) / kTileRows, adapters = stacked ? down->size(0) : 1;
  const bool tiled = up->dim() == 3 + stacked;
  const auto size = [&](int64_t d) { return up->size(d + stacked); };
  STD_TORCH_CHECK((tiled ? size(0) == tiles && size(1) == rank && size(2) == kTileRows
                         : up->dim() == 2 + stacked && size(0) == out_features && size(1) == rank) && (!stacked || up->size(0) == adapters),
                  "calora: up must be ", front, out_features, ", ", rank, ") or tiled ", front, tiles, ", ", rank, ", 32)");
  STD_TORCH_CHECK(identity_rank >= 0 && identity_rank <= rank, "calora: identity_rank must lie in 0..", rank, ", got ", identity_rank);
  const Dtype dtype = dtype_of(*down, "down");
  STD_TORCH_CHECK(dtype_of(*up, "up") == dtype, "calora: down and up must have one dtype");
  LowRank b{};
  b.down = down->data_ptr(), b.up = up->data_ptr(), b.dtype = static_cast<int64_t>(dtype);
  b.rank = rank, b.identity_rank = identity_rank;
  b.row_adapter = row_adapter ? static_cast<const int64_t*>(row_adapter->data_ptr()) : nullptr;
  b.adapters = adapters, b.up_adapter = up->numel() / adapters;
  b.up_tile = kTileRows * rank, b.up_row = tiled ? 1 : rank, b.up_rank = tiled ? kTileRows : 1;
  return b;
}

// Whether this call is one for the linear kernels.
bool fused(const LinearArgs& a, int32_t device) {
  if (static_cast<Dtype>(a.x_dtype) == Dtype::f32) return false;
  if (a.m <= kAlwaysFused) return true;
  int architecture = 0;
  check(calora_cuda_architecture(device, &architecture));
  return a.m <= fused_rows(architecture, static_cast<Pattern>(a.w.pattern), static_cast<Values>(a.w.values));
}

int launch_linear(const LinearArgs& a, void* stream) {
  switch (static_cast<Pattern>(a.w.pattern)) {
    case Pattern::dense: return calora_cuda_linear_dense(&a, stream);
    case Pattern::two_four: return calora_cuda_linear_two_four(&a, stream);
    case Pattern::bitmask: return calora_cuda_linear_bitmask(&a, stream);
  }
  return kInvalidValue;
}

int launch_decode(const PackedWeight& w, int64_t row_begin, int64_t row_end, void* out, Dtype dtype, void* stream) {
  const auto type = static_cast<int64_t>(dtype);
  switch (static_cast<Pattern>(w.pattern)) {
    case Pattern::dense: return calora_cuda_decode_dense(&w, row_begin, row_end, out, type, stream);
    case Pattern::two_four: return calora_cuda_decode_two_four(&w, row_begin, row_end, out, type, stream);
    case Pattern::bitmask: return calora_cuda_decode_bitmask(&w, row_begin, row_end, out, type, stream);
  }
  return kInvalidValue;
}

Tensor decode_to(const Tensor& like, const PackedWeight& w, int64_t row_begin, int64_t row_end, ScalarType type, Dtype dtype) {
  Tensor out = torch::stable::new_empty(like, {row_end - row_begin, w.in_features}, type);
  if (row_end > row_begin)
    check(launch_decode(w, row_begin, row_end, out.data_ptr(), dtype, current_stream(like.get_device_index())));
  return out;
}

std::vector<int64_t> with_last(const Tensor& x, int64_t last) {
  std::vector<int64_t> shape(static_cast<std::size_t>(x.dim()));
  for (int64_t d = 0; d + 1 < x.dim(); ++d) shape[d] = x.size(d);
  shape.back() = last;
  return shape;
}

// calora::dense_linear, in calora_ext/ops.py: matrix products of torch, for which the stable ABI has no words (scalars).
Tensor dense_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const std::optional<Tensor>& down,
                    const std::optional<Tensor>& up, int64_t identity_rank, const std::optional<Tensor>& row_adapter) {
  using torch::stable::detail::from;
  std::array<StableIValue, 7> stack{from(x), from(weight), from(bias), from(down), from(up), from(identity_rank), from(row_adapter)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("calora::dense_linear", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor linear(Tensor x, std::vector<Tensor> packed, int64_t format, int64_t in_features, int64_t out_features, int64_t group_size,
              std::optional<Tensor> bias, std::optional<Tensor> down, std::optional<Tensor> up, int64_t identity_rank,
              std::optional<Tensor> row_adapter, int64_t activations) {
  STD_TORCH_CHECK(activations == 0 || activations == 1, "calora: activations must be 0 (exact) or 1 (int8), got ", activations);
  LinearArgs a{};
  const Dtype dtype = dtype_of(x, "x");
  a.x_dtype = static_cast<int64_t>(dtype);
  a.w = weight_of(packed, format, in_features, out_features, group_size);
  STD_TORCH_CHECK(same_device(packed[0], x), "calora: x and the packed weight are on different devices");
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) == in_features, "calora: the last dimension of x must be ", in_features);
  if (bias) {
    STD_TORCH_CHECK(same_device(*bias, x) && bias->is_contiguous() && bias->dim() == 1 && bias->size(0) == out_features,
                    "calora: bias must be a contiguous tensor of ", out_features, " values on the device of x");
    a.bias = bias->data_ptr();
    a.bias_dtype = static_cast<int64_t>(dtype_of(*bias, "bias"));
  }
  a.bank = bank_of(x, down, up, identity_rank, row_adapter, in_features, out_features);
  a.m = x.numel() / in_features;
  const OnDevice guard(x.get_device_index());
  if (a.m == 0) return torch::stable::new_empty(x, with_last(x, out_features));
  if (!fused(a, x.get_device_index())) {
    const Tensor weight = decode_to(x, a.w, 0, out_features, x.scalar_type(), dtype);
    if (a.bank.rank == 0) return dense_linear(x, weight, bias, std::nullopt, std::nullopt, 0, std::nullopt);
    return dense_linear(x, weight, bias, down, up, identity_rank, row_adapter);
  }
  void* const stream = current_stream(x.get_device_index());
  if (!x.is_contiguous()) x = torch::stable::contiguous(x);
  a.x = x.data_ptr();
  a.x_stride = in_features;
  Tensor padded = x;  // lives until the kernels are queued; torch's allocator keeps the memory for this stream
  const int64_t columns = geometry(static_cast<Pattern>(a.w.pattern), static_cast<Values>(a.w.values), in_features, out_features, group_size).columns;
  if (in_features != columns || reinterpret_cast<uintptr_t>(a.x) % kXAlign) {  // a multiple of 32: rows stay aligned
    a.x_stride = columns;
    padded = torch::stable::new_empty(x, {a.m, a.x_stride});
    check(calora_cuda_copy_rows(padded.data_ptr(), 2 * a.x_stride, a.x, 2 * in_features, a.m, stream));
    a.x = padded.data_ptr();
  }
  Tensor y = torch::stable::new_empty(x, with_last(x, out_features));
  a.y = y.data_ptr();
  std::optional<Tensor> t;
  if (a.bank.rank) {
    t = torch::stable::new_empty(x, {a.bank.rank, round_up(a.m, kBatchAlign)}, ScalarType::Float);
    a.bank.t = static_cast<float*>(t->data_ptr());
    check(calora_cuda_bank_down(&a, stream));
  }
  check(launch_linear(a, stream));
  return y;
}

Tensor linear_dx(Tensor grad, std::vector<Tensor> packed, int64_t format, int64_t in_features, int64_t out_features, int64_t group_size) {
  const Dtype dtype = dtype_of(grad, "grad");
  const PackedWeight w = weight_of(packed, format, in_features, out_features, group_size);
  STD_TORCH_CHECK(same_device(packed[0], grad), "calora: grad and the packed weight are on different devices");
  STD_TORCH_CHECK(grad.dim() >= 1 && grad.size(grad.dim() - 1) == out_features, "calora: the last dimension of grad must be ", out_features);
  const OnDevice guard(grad.get_device_index());
  return torch::stable::matmul(grad, decode_to(grad, w, 0, out_features, grad.scalar_type(), dtype));
}

Tensor decode(std::vector<Tensor> packed, int64_t format, int64_t in_features, int64_t out_features, int64_t group_size, int64_t row_begin,
              int64_t row_end) {
  STD_TORCH_CHECK(!packed.empty(), "calora: no packed tensor given");
  const PackedWeight w = weight_of(packed, format, in_features, out_features, group_size);
  STD_TORCH_CHECK(0 <= row_begin && row_begin <= row_end && row_end <= out_features, "calora: rows ", row_begin, "..", row_end,
                  " are not within 0..", out_features);
  const OnDevice guard(packed[0].get_device_index());
  return decode_to(packed[0], w, row_begin, row_end, ScalarType::Float, Dtype::f32);
}

int64_t read(Tensor data) {
  STD_TORCH_CHECK(data.is_contiguous() && data.scalar_type() == ScalarType::Byte, "calora: read takes a contiguous uint8 tensor");
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(data.data_ptr()) % 16 == 0, "calora: read takes a 16-byte aligned tensor");
  const OnDevice guard(data.get_device_index());
  Tensor partial = torch::stable::new_empty(data, {kReadBlocks}, ScalarType::Long);
  uint64_t result = 0;
  check(calora_cuda_read(data.data_ptr(), data.numel(), partial.data_ptr(), &result, current_stream(data.get_device_index())));
  return static_cast<int64_t>(result);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(calora, CUDA, m) {
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("linear_inference", TORCH_BOX(&linear));
  m.impl("linear_dx", TORCH_BOX(&linear_dx));
  m.impl("decode", TORCH_BOX(&decode));
  m.impl("read", TORCH_BOX(&read));
}

}  // namespace calora::cuda
