// Sparse weights -> the codes of the dense layout of the same value type. Backward, the exact kernels and prefill, but for what meets int8
// activations faster as it is kept (gemm_24.h, gemm_kept.h), then need to know nothing of patterns.
#pragma once
#include "../kernels.h"

namespace calora {

// Columns [k, k + columns) of a block of a tile, both multiples of kColumnAlign, as steps of 128 bytes (layouts.h); what is
// not kept gets the middle code. AVX2 on every SIMD rung.
void expand(const Weight& w, int64_t tile, int64_t block, int64_t k, int64_t columns, uint8_t* codes);

// A chunk of dense int4 codes -> its bits and its kept bytes in pairs of rows (layouts.h). Returns how many bytes are kept; kept:
// kTurnColumns * kTileRows / 2 bytes, or null to count.
int64_t pair_rows(const uint8_t* codes, uint8_t* mask, uint8_t* kept);

// 64-byte aligned memory of the calling thread for the codes of one block; valid until it is asked for again.
uint8_t* expanded_block(int64_t bytes);

}  // namespace calora
