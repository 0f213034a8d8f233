// Up to how many rows of x the linear kernels are taken. With more of them, and in fp32, the weight is decoded to the dtype of x
// and torch's matrix product does the rest.
#pragma once
#include "../layouts.h"

namespace calora::cuda {

struct FusedRows {
  int architecture;  // 10 x compute capability
  Pattern pattern;
  Values values;
  int64_t rows;
};

constexpr int64_t kFusedRows = 64;    // of what is not in the table
constexpr int64_t kAlwaysFused = 16;  // of everything, at least: the architecture is not asked for

// From benchmarks/gpu_check.sh (results/gpu_check.json, H200), us, without a bank:
//
//                            8192 x 8192                 28672 x 8192
//                            16 rows  64 rows  decoded   16 rows  64 rows  decoded
//   int4 g128                     18       42       89        63      165      374
//   nf4 g64                       29       49      104        95      174      367
//   int8                          23       41      137        83      190      461
//   bf16                          33       49      120       115      190      458
//   int4 g128 2:4                 16       46       86        63      164      320
//   bf16 2:4                      23       57       60        80      179      238
//   int4 g128 unstructured        30       81       88       102      278      341
//   bf16 unstructured             44      153       71       155      528      263
//
// decoded: cuBLAS bf16 with 64 rows, and what 2048 rows take more than cuBLAS with so many, which is decoding: what more than 64 rows
// take at least. Kernels take 64 rows of x (2:4 and unstructured: 32) at a time, so 128 rows take at most twice the time of 64: 82 of
// 137 us for int8, with a bank 112 of 166. Between 64 and 128 rows nothing was timed: int4 and nf4, 6 and 13 % better by this count
// without a bank and none with one, stay at 64.
constexpr FusedRows kByArchitecture[] = {
    {90, Pattern::dense, Values::int8, 128}, {90, Pattern::dense, Values::bf16, 128},
    {90, Pattern::two_four, Values::int4, 96}, {90, Pattern::bitmask, Values::bf16, kAlwaysFused},
};

constexpr int64_t fused_rows(int architecture, Pattern pattern, Values values) {
  for (const FusedRows& row : kByArchitecture)
    if (row.architecture == architecture && row.pattern == pattern && row.values == values) return row.rows;
  return kFusedRows;
}

static_assert([] {
  for (const FusedRows& row : kByArchitecture)
    if (row.rows < kAlwaysFused) return false;
  return kFusedRows >= kAlwaysFused;
}());

}  // namespace calora::cuda
