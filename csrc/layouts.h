// The packed weight layouts: the single truth of the bits, shared by every kernel and checked
// against calora_ext/formats/layout.py by a test. Torch-free and ISA-free.
//
// A weight W (out_features x in_features, y = x W^T) is stored as uint8 bytes, identical on disk and in RAM.
// Rows are cut into tiles of 32, columns into blocks; missing rows and columns are padding that decodes to 0.
//
//   packed  =  tile 0 | tile 1 | ...                 tile  =  block 0 | block 1 | ...   (one stream, front to back)
//
//   block (int4, G = group_size columns, or every column when there is one scale per row):
//     G/8 steps of 128 bytes, then 32 fp16 scales (64 bytes)
//        step s, byte 4 r + b:   low nibble  = code of (row r, column 8 s + b)        r = 0..31, b = 0..3
//                                high nibble = code of (row r, column 8 s + 4 + b)
//        +----------------+----------------+-- ... --+----------------+
//        | row 0: 4 bytes | row 1: 4 bytes |         | row 31: 4 bytes|   = 128 bytes = 2 zmm = 4 ymm
//        +----------------+----------------+-- ... --+----------------+
//     weight = scale[row] * (code - zero);  zero = 8, or a nibble of the separate `zeros` tensor:
//        zeros: per (tile, block) 16 bytes; byte i: low nibble = row i, high nibble = row 16 + i; padded to 64 at the end
//
//   block (int8, always every column): K/4 steps of 128 bytes, byte 4 r + b = 128 + code of (row r, column 4 s + b),
//     code in [-127, 127]; then 32 fp16 scales. Stored with the offset so that it is the unsigned side of vpdpbusd.
//
//   block (nf4): the steps of int4 alone. Its scales, quantised themselves, lie in the tensor `scales`:
//        +------------------+------------------+-- ... --+---------------+-- ... --+
//        | tile 0, block 0: | tile 0, block 1  |         | outer scales: |         |   one byte per row of every block, then an
//        | 32 bytes         |                  |         | fp32 a tile   | padding |   fp32 per tile; padded to 64 at the end
//        +------------------+------------------+-- ... --+---------------+-- ... --+
//     weight = book[code] * scale,  scale = outer * s;  book[7] = 0. G = 64: 4 + 8 / 64 + 1 / in_features bits a weight.
//        s of scale code c: the fp16 number with the bits c << 5, that is 3 bits of exponent, 5 of mantissa:
//        15 14 13 | 12 11 10 | 9 8 7 6 5 | 4 3 2 1 0
//         0  0  0 | exponent | mantissa  | 0 0 0 0 0      0 for c = 0, steps of 2^-19 up to c = 63, 63 / 8192 for c = 255
//     Why a float of 8 bits and not 8 bits of a whole: rows of a tile differ, and it is one shift and the fp16 conversion.
//     Why apart: blocks of 1056 bytes would put every second one astride cache lines, which costs a third of the speed.
//
//   block (bf16, always every column): K/2 steps of 128 bytes, 16-bit lane 2 r + b = (row r, column 2 s + b). No scales.
//
// A sparse pattern replaces the steps of a block and leaves scales, tiles and padding as they are.
//
//   2:4: of every 4 columns (a group) at most 2 are kept. A block is turns of 32 columns (8 groups), a turn is the kept values
//     (kept e = 0, 1 of group q of a row is element 2 q + e = 4 i + j of 16) and their places:
//
//     int4, nf4: 2 lines of 128 bytes: byte 4 r + j of line l:  low nibble = element 8 l + j, high nibble = element 8 l + 4 + j
//     int8   4 lines of 128 bytes: byte 4 r + j of line l = element 4 l + j
//     bf16   8 lines of 128 bytes: 16-bit lane 2 r + e of line q = kept e of group q
//     then 1 line of places: byte 4 r + j, bits 2 i and 2 i + 1 = place of element 4 i + j within its group
//        +-------------------+-- ... --+-------------------+-------------------+
//        | columns 0..       |         | ..31              | places            |   int4 384, int8 640, bf16 1152 bytes
//        +-------------------+-- ... --+-------------------+-------------------+
//
//     int4 and int8 are two's complement: value = scale * element; nf4 is as int4, of code ^ 7. The places p0, p1 of a group also say how many are kept:
//     p0 < p1 both, p0 == p1 the first, p0 > p1 none; an element that is not kept is 0. No 2-bit place leads outside its group.
//     Why places and not a mask of equal size: one byte shuffle by the places picks the activations that meet the kept
//     weights, which then need no expanding; why 8 columns share a 32-bit lane: a broadcast of 8 int8 activations is one load.
//
//   unstructured (bitmask): a block holds a bit per weight, then its scales; what is kept lies in two tensors of its own.
//     A chunk is 32 columns of a tile. Bits of a chunk, 128 bytes, in the order in which registers take codes:
//       all but bf16: bit 128 s + 4 r + b = (row r, column 4 s + b)    bf16: bit 64 s + 2 r + b = (row r, column 2 s + b)
//     kept:  chunk 0 | chunk 1 | ... (of tile 0, then tile 1 ...), each padded to a multiple of 8 bytes, then a tail
//       int8, bf16: the dense code of each bit that is set, one after the other
//       int4, nf4: byte i: low nibble = the i-th set bit of the even steps s, high nibble = the i-th of the odd steps
//     offsets: 4 bytes a chunk: where it starts in kept, in units of 8 bytes; padded to 64 at the end
//        bits    +--------+--------+--------+   128 bytes each          kept   +----+------+---+-----+------+-- ... --+
//                | 0      | 1      | 2      |                                  | 0  | 1    | 2 | ... |      | tail    |
//                +--------+--------+--------+                                  +----+------+---+-----+------+-- ... --+
//     The tail is as long as the longest chunk and 64 bytes: a kernel that starts a chunk no later than kept_limit()
//     and then follows the bits, whatever they are, cannot leave the tensor. So nothing in a damaged file leads outside.
//     Why the bits apart from the codes: masks stay aligned words at a fixed stride, and a chunk's codes need no alignment.
//
//   paired (int4): what an unstructured weight runs as (ops.runs_as) where there is vpexpandb. Made at load, never in a file.
//     As the bitmask, but a bit stands for the weights of two rows in one column and is set unless both are 0, so that a chunk has
//     64 bytes of bits; and what is kept is a byte for each bit that is set, one after the other.
//       bit 64 s + 4 r + b = (rows r and 16 + r, column 4 s + b), r = 0..15      byte: low nibble = code of row r, high = of row 16 + r
//     Why pairs: placing codes by bits takes as long for a byte of two as for a byte of one, and is what the bitmask waits for.
//     Why rows: both meet the same x, so that a product of whole bytes gives both sums at once (decode_bitmask.h).
//
// Why 32 rows and 4-byte column groups: broadcasting 4 activations against 16 rows per zmm needs no horizontal sum,
// one AND and one shift unpack 128 weights, and a single stream is what hardware prefetchers like best.
// Every block is a multiple of 64 bytes, so every vector load is aligned when the tensor is.
#pragma once
#include <cstdint>

namespace calora {

constexpr int64_t kLayoutVersion = 1;
constexpr int64_t kTileRows = 32;      // rows in a tile
constexpr int64_t kColumnAlign = 32;   // columns are padded to a multiple of this (or of the group)
constexpr int64_t kTileAlign = 64;     // bytes; packed tensors are multiples of it
constexpr int64_t kScaleBytes = 2 * kTileRows;  // fp16 scales that end a quantised block
constexpr int64_t kZeroBytes = kTileRows / 2;   // zero points of a block, two nibbles a byte
constexpr int kInt4Zero = 8;
constexpr int kInt8Zero = 128;
constexpr int kNf4Zero = 7;

// NF4 (Dettmers et al., arXiv 2305.14314), the book of bitsandbytes. Against int8 activations its values are whole multiples of
// 1 / kNf4Parts: of all divisors up to 127 the one that moves normal weights least, by 4.8e-3 of their norm.
constexpr float kNf4[16] = {-1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f,
                            -0.18477343022823334f, -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f,
                            0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f,
                            0.7229568362236023f, 1.0f};
constexpr int kNf4Parts = 124;
constexpr int nf4_part(int code) {
  const float v = kNf4[code] * kNf4Parts;
  return static_cast<int>(v < 0 ? v - 0.5f : v + 0.5f);
}
static_assert(kNf4[kNf4Zero] == 0 && nf4_part(0) == -kNf4Parts && nf4_part(10) == 31 && nf4_part(15) == kNf4Parts);
constexpr int kScaleShift = 5;  // a scale code of nf4, shifted by this, is an fp16 number

// A format is a pair; its number is 16 * pattern + values (calora_ext/formats/layout.py holds the same table).
enum class Pattern : int { dense = 0, two_four = 1, bitmask = 2, paired = 3 };
enum class Values : int { bf16 = 0, int8 = 1, int4 = 2, nf4 = 3 };

constexpr bool has_groups(Values v) { return v == Values::int4 || v == Values::nf4; }  // and codes of 4 bits
constexpr bool has_kept(Pattern p) { return p == Pattern::bitmask || p == Pattern::paired; }
constexpr bool has_scales(Values v) { return v != Values::bf16; }
// What a weight of 0 is stored as, where no zero point is.
constexpr int zero_code(Values v) { return v == Values::int4 ? kInt4Zero : v == Values::nf4 ? kNf4Zero : v == Values::int8 ? kInt8Zero : 0; }
// Bytes that end a block.
constexpr int64_t scale_bytes(Values v) { return v == Values::int4 || v == Values::int8 ? kScaleBytes : 0; }

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Bytes of the codes of `columns` columns of one dense tile.
constexpr int64_t code_bytes(Values v, int64_t columns) {
  return v == Values::bf16 ? 2 * kTileRows * columns : v == Values::int8 ? kTileRows * columns : kTileRows * columns / 2;
}

// 2:4: bytes and columns of a turn; its places lie in its last kPlaceBytes.
constexpr int64_t kTurnColumns = 32, kPlaceBytes = 4 * kTileRows;
constexpr int64_t turn_bytes(Values v) { return code_bytes(v, kTurnColumns) / 2 + kPlaceBytes; }

// Unstructured: the chunk, 32 columns of a tile, and where the last one may start in `bytes` bytes of kept codes.
constexpr int64_t kChunkBits = kTurnColumns * kTileRows, kMaskBytes = kChunkBits / 8, kPairMaskBytes = kMaskBytes / 2, kOffsetUnit = 8;
constexpr int64_t kept_limit(Values v, int64_t bytes) { return bytes - code_bytes(v, kTurnColumns) - kTileAlign; }

// Bytes of `columns` columns of a block in any pattern, scales apart.
constexpr int64_t code_bytes(Pattern p, Values v, int64_t columns) {
  if (p == Pattern::two_four) return columns / kTurnColumns * turn_bytes(v);
  if (p == Pattern::paired) return columns / kTurnColumns * kPairMaskBytes;
  return p == Pattern::bitmask ? columns / kTurnColumns * kMaskBytes : code_bytes(v, columns);
}

// Where everything of one packed weight lies. group_size: columns that share a scale, or -1 for all of them.
struct Geometry {
  int64_t tiles, columns, block_columns, blocks, block_bytes, tile_bytes;
  constexpr int64_t bytes() const { return tiles * tile_bytes; }
  constexpr int64_t zeros_bytes() const { return round_up(tiles * blocks * kZeroBytes, kTileAlign); }
  constexpr int64_t scale_codes_bytes() const { return tiles * blocks * kTileRows; }                    // of nf4; outer scales follow
  constexpr int64_t scales_bytes() const { return round_up(scale_codes_bytes() + 4 * tiles, kTileAlign); }
  constexpr int64_t chunks() const { return columns / kTurnColumns; }  // of a tile
  constexpr int64_t offsets_bytes() const { return round_up(tiles * chunks() * 4, kTileAlign); }
};

constexpr Geometry geometry(Pattern p, Values v, int64_t in_features, int64_t out_features, int64_t group_size) {
  Geometry g{};
  g.tiles = round_up(out_features, kTileRows) / kTileRows;
  g.columns = round_up(in_features, group_size > 0 ? group_size : kColumnAlign);
  g.block_columns = group_size > 0 ? group_size : g.columns;
  g.blocks = g.block_columns ? g.columns / g.block_columns : 0;
  g.block_bytes = code_bytes(p, v, g.block_columns) + scale_bytes(v);
  g.tile_bytes = g.blocks * g.block_bytes;
  return g;
}

static_assert(code_bytes(Values::int4, 128) + kScaleBytes == 33 * kTileAlign, "int4 g128 block is 33 cache lines");
static_assert(kTurnColumns == kColumnAlign && turn_bytes(Values::int4) == 6 * kTileAlign, "blocks are whole turns of whole cache lines");
constexpr int64_t milli_bits(Pattern p, Values v, int64_t group) {  // of a weight, in thousandths
  return geometry(p, v, 4096, 4096, group).bytes() * 8000 / (4096 * 4096);
}
static_assert(milli_bits(Pattern::dense, Values::int4, 128) == 4125 && milli_bits(Pattern::dense, Values::int4, 64) == 4250);
static_assert(milli_bits(Pattern::dense, Values::nf4, 64) == 4000 && geometry(Pattern::dense, Values::nf4, 4096, 4096, 64).scales_bytes() == 4096 * 64 + 512);
static_assert(milli_bits(Pattern::two_four, Values::int4, 128) == 3125 && milli_bits(Pattern::two_four, Values::int4, 64) == 3250);
static_assert(milli_bits(Pattern::two_four, Values::int8, -1) == 5003 && milli_bits(Pattern::two_four, Values::bf16, -1) == 9000);
static_assert(milli_bits(Pattern::bitmask, Values::int4, 128) == 1125 && milli_bits(Pattern::paired, Values::int4, 128) == 625 && milli_bits(Pattern::bitmask, Values::bf16, -1) == 1000);
static_assert(geometry(Pattern::dense, Values::int8, 97, 33, -1).block_bytes % kTileAlign == 0, "every block is whole cache lines");
static_assert(geometry(Pattern::two_four, Values::bf16, 1, 1, -1).block_bytes % kTileAlign == 0, "every block is whole cache lines");

}  // namespace calora
