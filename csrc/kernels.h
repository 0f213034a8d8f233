// What a CPU rung is: a table of plain function pointers over plain structs. Torch-free and ISA-free; each rung
// (reference, avx2, avx2-vnni, avx512, avx512-vnni) is one translation unit that fills one Kernels.
//
//   y = x W^T + bias + phi(x D^T) U^T          phi = identity on the first identity_rank rows of D, GELU(erf) on the rest
#pragma once
#include <cstddef>
#include <cstdint>

#include "layouts.h"

namespace calora {

enum class DType : int { f32 = 0, bf16 = 1 };
enum class Activations : int { exact = 0, int8 = 1 };

// Few rows stream the packed weight once ("decode": up to 4 to 8 of them, by format and rung); above it is a blocked GEMM ("prefill") or, of some
// sparse weights, still a decode: each tile by eight rows after the other.
constexpr int64_t kDecodeRows = 8;

// How prefill cuts the rows of x: panels of equal height (what the registers of a micro-kernel hold; the last is padded),
// and blocks of panels that pass by each tile together. The unit of work is a (block, tile) pair.
constexpr int64_t kMinPanelRows = 7, kMaxPanelRows = 12, kMaxBlockPanels = 22;
constexpr int64_t kMaxRows = 4 * kMaxBlockPanels * kMaxPanelRows;  // of one pass: bounds the workspace

struct RowPanels {
  int64_t rows, panels;          // rows of one panel; panels in all
  int64_t block_panels, blocks;  // panels of one block (the last may have fewer); blocks in all
  constexpr int64_t padded_rows() const { return panels * rows; }
  constexpr int64_t block_rows() const { return block_panels * rows; }
};

constexpr RowPanels row_panels(int64_t m) {
  auto share = [](int64_t n, int64_t parts) { return (n + parts - 1) / parts; };
  RowPanels p{};
  p.panels = share(m, kMaxPanelRows);
  p.rows = share(m, p.panels) < kMinPanelRows ? kMinPanelRows : share(m, p.panels);
  p.blocks = share(p.panels, kMaxBlockPanels);
  p.block_panels = share(p.panels, p.blocks);
  return p;
}
static_assert(row_panels(9).rows == 9 && row_panels(13).rows == 7 && row_panels(512).padded_rows() == 516);

struct Weight {
  const uint8_t* packed;  // geometry(...).bytes(), see layouts.h
  const uint8_t* zeros;   // geometry(...).zeros_bytes(), or null: the zero point is the middle code
  Pattern pattern;
  Values values;
  int64_t in_features, out_features;
  Geometry g;
  const uint8_t* kept = nullptr;     // of an unstructured weight, see layouts.h; the last chunk may start at kept_limit
  const uint8_t* offsets = nullptr;
  int64_t kept_limit = 0;
  const uint8_t* scales = nullptr;  // of nf4: geometry(...).scales_bytes()

  const uint8_t* scale_codes(int64_t tile, int64_t block) const { return scales + (tile * g.blocks + block) * kTileRows; }
  float outer_scale(int64_t tile) const {
    float scale;
    __builtin_memcpy(&scale, scales + g.scale_codes_bytes() + 4 * tile, sizeof scale);
    return scale;
  }

  // The kept codes of chunk c of a tile. A damaged offset gives other codes, never an address outside.
  const uint8_t* chunk(int64_t tile, int64_t c) const {
    uint32_t unit;
    __builtin_memcpy(&unit, offsets + 4 * (tile * g.chunks() + c), sizeof unit);
    const int64_t start = kOffsetUnit * static_cast<int64_t>(unit);
    return kept + (start < kept_limit ? start : kept_limit);
  }
};

struct Bank {
  const void* down;       // (rank, in_features) row-major
  const void* up;         // (out_features, rank) row-major, or tiled: (tiles, rank, 32)
  DType dtype;            // of both
  bool tiled;
  int64_t rank, identity_rank;
};

// One call. x and y share x_dtype. The workspace is laid out by plan() and written by prepare() and bank_down(). Its arrays
// are row-major as noted; for prefill the rungs write panels instead (gemm_panels.h), of row_panels(m).padded_rows() rows.
struct LinearArgs {
  const void* x;          // (m, in_features) row-major
  void* y;                // (m, out_features) row-major
  DType x_dtype;
  int64_t m;
  Weight w;
  const void* bias;       // (out_features) or null
  DType bias_dtype;
  Bank bank;              // rank 0: none
  Activations activations;
  // workspace, all 64-byte aligned; g = w.g
  int8_t* xq;             // int8: (m, g.columns) quantised activations, padding 0
  float* x_scale;         // int8: (m, g.blocks) amax / 127
  int32_t* x_sum;         // int8: (m, g.blocks) sum of xq over the block
  float* xf;              // exact: (m, g.columns) x in fp32, padding 0
  float* x_eights;        // exact decode of dense int4: (m, g.columns / 8) what the middle adds to eight columns (prepare.h)
  uint16_t* xb;           // exact decode with bf16 x: (m, g.columns) x as bf16, padding 0
  float* t;               // (m, rank) phi(x D^T), when rank > 0
  float* sums;            // decode, when rank > 0: (tiles, m, 32) x W^T, which wait for the bank; of each eight rows
};

// dx = grad W, for training: (m, out_features) x W -> (m, in_features). Both fp32 or both bf16, fp32 accumulation.
struct BackwardArgs {
  const void* grad;
  void* dx;
  DType dtype;
  int64_t m;
  Weight w;
  float* panels;          // workspace, 64-byte aligned: grad in panels (gemm_panels.h) of tiles * 32 columns, fp32 or bf16
};

// body(context, begin, end) over [begin, end) in chunks of at least grain. No barrier: never wait inside a body.
using Body = void (*)(void* context, int64_t begin, int64_t end);
using ParallelFor = void (*)(int64_t begin, int64_t end, int64_t grain, Body body, void* context);

struct Kernels {
  const char* isa;
  bool (*decodes)(const LinearArgs&);  // rather than prefill: all calls of up to 4 rows; of w, x_dtype, m and activations only
  int64_t fork_bytes;  // of packed weights: one row is decoded against fewer of them sooner by one thread (linear.cpp)
  void (*prepare)(const LinearArgs&, int64_t row_begin, int64_t row_end);            // x -> xq, x_scale, x_sum | xf | xb; prefill: whole panels
  void (*bank_down)(const LinearArgs&, int64_t row_begin, int64_t row_end, int64_t rank_begin, int64_t rank_end);  // x -> t
  // y, bias and bank included; unit = block * tiles + tile, where decode has one block
  void (*tiles)(const LinearArgs&, int64_t unit_begin, int64_t unit_end);
  void (*decode_rows)(const Weight&, int64_t row_begin, int64_t row_end, float* out);  // (rows, in_features) fp32
  void (*prepare_grad)(const BackwardArgs&, int64_t row_begin, int64_t row_end);     // grad -> panels; whole panels of rows
  // dx; unit = block * chunks + chunk of kColumnAlign columns
  void (*backward)(const BackwardArgs&, int64_t unit_begin, int64_t unit_end);
  uint64_t (*read)(const uint8_t* data, int64_t bytes);  // xor of every 8 bytes, as fast as memory allows: the bandwidth probe
};

extern const Kernels kReference;
#ifdef CALORA_X86
extern const Kernels kAvx2, kAvx2Vnni, kAvx2VnniEvex, kAvx512, kAvx512Vnni;  // the two Vnni: see avx2_vnni.cpp
#endif

// dispatch.cpp: rungs this processor can run, slowest first; the one in use (CALORA_ISA caps it at load).
int available_rungs(const Kernels** out, int capacity);
const Kernels& kernels();
bool select_rung(const char* isa);  // for tests and `calora bench --isa`; false if unknown or not runnable here

// linear.cpp: workspace size and the two parallel regions, common to all rungs.
std::size_t plan(LinearArgs& args, uint8_t* workspace);  // sets the pointers when workspace != null; returns the bytes needed
std::size_t plan(BackwardArgs& args, uint8_t* workspace);
void linear(const LinearArgs& args, ParallelFor parallel_for);
void backward(const BackwardArgs& args, ParallelFor parallel_for);

}  // namespace calora
