// The C interface between the CUDA kernels (no torch in them) and the operators (no CUDA headers in them). Every launcher
// returns a cudaError_t as an int, allocates nothing, waits for nothing and uses one stream: all of them can be captured
// into a graph. Sizes and alignments are checked by the caller.
//
// A packed weight on the GPU has the bytes of the canonical layout (layouts.h) in another order, chosen so that each lane of
// a warp finds what it multiplies in whole 16-byte words. The order is private to a (tile, 32 columns) chunk:
//
//   chunk = 32 rows x 32 columns: 512 bytes (int4), 1024 (int8) or 2048 (bf16), as 16-byte words, one per lane, lane by lane:
//     lane l = 4 g + c holds rows g, g + 8, g + 16, g + 24 and columns 8 c .. 8 c + 7 of the chunk. So it reads 16
//     consecutive bytes of x as the other operand: an mma sums over columns in any order, if both operands agree on it.
//     row = 16 rt + 8 j + g      column = 8 c + 4 s + 2 h + e        rt, j, s, h, e in {0, 1}
//     (rt: which m16 tile; s: which k16 step; j + 2 h: which register of the A fragment; e: which half of that register)
//   int4: one 16-byte word; 32-bit word 2 s + rt has the code of (j, h, e) at bit 4 (j + 2 h) + 16 e
//   nf4:  the same with the place of the code (kNf4Code) at bit 4 (e + 2 j) + 16 h
//   int8: two (s); 32-bit word 2 rt + h has the code of (j, e) in byte 2 j + e
//   bf16: four (2 s + rt); 32-bit word j + 2 h has the value of e in half e
//   scales of a block (where the canonical block has them): fp16 at 4 g + 2 rt + j
//   scale codes of nf4, 32 bytes a (tile, block): at 4 g + 2 rt + j; the outer scales behind them stay as they are
//   zero points of a (tile, block), 16 bytes: nibble 2 rt + j of 16-bit word g
//
// 2:4: a unit is two turns (64 columns) of a block, or the last one alone where they are odd. What is kept of turn t takes the
// place of the dense columns of k16 step s = t: lane (g, c) has the kept weights e of groups c and c + 4 (h = 0, 1) of its rows.
//   int4, nf4   one 16-byte word; a single turn: 8 bytes      int8   one 16-byte word a turn      bf16   two a turn
//   then the places, 4 bytes a turn: lane (g, 2 rt + h) has those of groups 4 h .. 4 h + 3: those of (j, group 4 h + q) at
//   bit 16 j + 4 q, as one of 16 numbers, of which four operations make the two places that mma.sp takes, in rising order
//   (two_four.cu). Canonical p0 + 4 p1 -> number:
//     both kept   4 -> 13   8 -> 1   12 -> 5   9 -> 0   13 -> 4   14 -> 7
//     one kept    0 -> 9 (then taken for 0 2)   5 -> 2 (1 2)   10 -> 15 (2 3)   15 -> 6 (1 3, and the two values are exchanged)
//     none kept   1 -> 14 (1 3)
//   What is not kept has the code of 0. int4 and int8 are codes around 8 and 128, nf4 is places of codes, as in the dense order.
//
// unstructured: a unit of two chunks is two 32-bit words a lane, one chunk's after the other's; a chunk alone is one word. A bit
// for each weight of the lane, in the dense order: element k of 32-bit word `step`, as bitmask.cu takes them:
//   int4   word 2 s + rt, element j + 2 e + 4 h, bit step + 4 k          int8   word 4 s + 2 rt + h, element 2 j + e,
//   nf4    the same, element e + 2 j + 4 h                                      bit 16 (step / 4) + 4 k + step % 4
//   bf16   word 8 s + 4 rt + 2 h + j, element e,
//          bit 16 (step / 8) + 8 k + step % 8
//   kept: chunks start where the canonical offsets say; the codes of a chunk follow one another lane by lane, word by word,
//   element by element: int4 two a byte, as two's complement; nf4 two a byte, as places. Offsets are the canonical ones.
//
// calora_ext/formats/cuda_order.py converts both ways.
#pragma once
#include <cstdint>

#include "../layouts.h"

namespace calora::cuda {

enum class Dtype : int32_t { f32 = 0, bf16 = 1, f16 = 2 };

constexpr int64_t kChunkColumns = 32;
constexpr int64_t kBatchAlign = 8;      // t is padded to a multiple of this many rows of x: the n8 of the mma
constexpr int kInvalidValue = 1;        // cudaErrorInvalidValue

// nf4: the code that each place of the GPU's table stands for. Place 0 is the weight 0; why the others lie as they do: values.cuh.
constexpr int kNf4Code[16] = {7, 0, 1, 2, 8, 9, 10, 11, 6, 5, 4, 3, 15, 12, 14, 13};

struct PackedWeight {
  const uint8_t* packed;  // in GPU order, 16-byte aligned
  const uint8_t* zeros;   // or null
  const uint8_t* scales;  // of nf4
  const uint8_t *offsets, *kept;  // of an unstructured weight
  int64_t kept_limit;             // see kept_limit() in layouts.h
  int64_t pattern, values;  // calora::Pattern, calora::Values
  int64_t in_features, out_features, group_size;
};

// phi(x D^T) U^T. U is (out_features, rank) or tiled (tiles, rank, 32): element (n, r) lies at
// n / 32 * up_tile + n % 32 * up_row + r * up_rank.
// With row_adapter D and U are stacks of `adapters` of them: row m of x takes number row_adapter[m], no bank where that is -1, and
// becomes NaN where it is any other number that is not one of theirs (a kernel cannot raise).
struct LowRank {
  const void* down;  // (rank, in_features)
  const void* up;
  const int64_t* row_adapter;    // (m) or null
  int64_t adapters, up_adapter;  // up_adapter: elements from one U to the next
  float* t;          // (rank, round_up(m, 8)): phi(x D^T), written by bank_down and read by the linear kernels
  int64_t dtype;     // of down and up, a Dtype
  int64_t rank, identity_rank;
  int64_t up_tile, up_row, up_rank;
};

struct LinearArgs {
  const void* x;     // (m, x_stride), 16-byte aligned rows, 0 behind in_features, at least the columns of the packed weight
  void* y;           // (m, out_features)
  const void* bias;  // (out_features) or null
  int64_t x_dtype;   // bf16 or f16, of x and y
  int64_t bias_dtype;
  int64_t m, x_stride;
  PackedWeight w;
  LowRank bank;      // rank 0: none
};

}  // namespace calora::cuda

extern "C" {
int calora_cuda_bank_down(const calora::cuda::LinearArgs* args, void* stream);     // t
// y, bank included when t is there. With a bank, bank_down must be what was launched last on the stream: from sm_90 on the two overlap.
int calora_cuda_linear_dense(const calora::cuda::LinearArgs* args, void* stream);
int calora_cuda_linear_two_four(const calora::cuda::LinearArgs* args, void* stream);
int calora_cuda_linear_bitmask(const calora::cuda::LinearArgs* args, void* stream);
// Rows [row_begin, row_end) of the dense weight, (rows, in_features) row-major in out_dtype.
int calora_cuda_decode_dense(const calora::cuda::PackedWeight* w, int64_t row_begin, int64_t row_end, void* out, int64_t out_dtype,
                             void* stream);
int calora_cuda_decode_two_four(const calora::cuda::PackedWeight* w, int64_t row_begin, int64_t row_end, void* out, int64_t out_dtype,
                                void* stream);
int calora_cuda_decode_bitmask(const calora::cuda::PackedWeight* w, int64_t row_begin, int64_t row_end, void* out, int64_t out_dtype,
                               void* stream);
// Copy rows of row_bytes to rows of target_stride bytes, the rest of which becomes 0: gives x the alignment that the linear kernels need.
int calora_cuda_copy_rows(void* target, int64_t target_stride, const void* source, int64_t row_bytes, int64_t rows, void* stream);
// The xor of all 16-byte words of data, in 8-byte halves xored together; partial: kReadBlocks words. Waits for the result.
int calora_cuda_read(const void* data, int64_t bytes, void* partial, uint64_t* result, void* stream);
// Makes `device` this runtime's current one: it is linked statically and knows nothing of what torch's runtime has set.
int calora_cuda_set_device(int device);
// 10 x the compute capability of a device.
int calora_cuda_architecture(int device, int* architecture);
const char* calora_cuda_error(int code);
}

namespace calora::cuda {
constexpr int64_t kReadBlocks = 1056;
}
