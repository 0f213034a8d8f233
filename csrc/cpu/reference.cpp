// The normative rung: plain loops, double accumulation. Slow on purpose; every other rung is tested against it.
#include <cmath>
#include <cstring>

#include "../kernels.h"

namespace calora {
namespace {

float from_bf16(uint16_t h) {
  const uint32_t bits = static_cast<uint32_t>(h) << 16;
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}

uint16_t to_bf16(float f) {  // round to nearest even; a NaN stays a NaN
  uint32_t bits;
  std::memcpy(&bits, &f, sizeof f);
  if (std::isnan(f)) return static_cast<uint16_t>((bits >> 16) | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

float from_fp16(uint16_t h) {
  const int sign = h >> 15, exponent = (h >> 10) & 31, mantissa = h & 1023;
  const float magnitude = exponent == 31 ? (mantissa ? NAN : INFINITY)
                        : exponent      ? std::ldexp(static_cast<float>(1024 + mantissa), exponent - 25)
                                        : std::ldexp(static_cast<float>(mantissa), -24);
  return sign ? -magnitude : magnitude;
}

float load(const void* p, DType dtype, int64_t i) {
  return dtype == DType::f32 ? static_cast<const float*>(p)[i] : from_bf16(static_cast<const uint16_t*>(p)[i]);
}

void store(void* p, DType dtype, int64_t i, float v) {
  if (dtype == DType::f32) static_cast<float*>(p)[i] = v;
  else static_cast<uint16_t*>(p)[i] = to_bf16(v);
}

uint16_t load16(const uint8_t* p) {
  uint16_t v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// Code minus zero point (nf4: the code), and scale, of one weight: column k of row n.
struct Element { int code; float scale; };

struct Place {  // of one weight in its tile
  const uint8_t* block;
  int64_t row, column;  // within the tile; within the block
};

Place place(const Weight& w, int64_t n, int64_t k) {
  const int64_t block = k / w.g.block_columns;
  return {w.packed + n / kTileRows * w.g.tile_bytes + block * w.g.block_bytes, n % kTileRows, k % w.g.block_columns};
}

// 2:4: which of the 16 elements of its turn a weight is, or -1 where it is not kept.
int kept_element(const uint8_t* places, const Place& at) {
  const int64_t c = at.column % kTurnColumns, element = c / 4 * 2;
  const uint8_t* pair = places + 4 * at.row + element % 4;
  const int64_t shift = element / 4 * 2;
  const int first = pair[0] >> shift & 3, last = pair[1] >> shift & 3;
  if (first <= last && first == c % 4) return static_cast<int>(element);
  return first < last && last == c % 4 ? static_cast<int>(element) + 1 : -1;
}

int two_four_code(Values v, const Place& at) {
  const uint8_t* turn = at.block + at.column / kTurnColumns * turn_bytes(v);
  const int e = kept_element(turn + turn_bytes(v) - kPlaceBytes, at);
  if (e < 0) return v == Values::nf4 ? kNf4Zero : 0;
  if (v == Values::int8) return static_cast<int8_t>(turn[e / 4 * 128 + 4 * at.row + e % 4]);
  const uint8_t byte = turn[e / 8 * 128 + 4 * at.row + e % 4];
  const int stored = e % 8 < 4 ? byte & 15 : byte >> 4;
  return v == Values::nf4 ? stored ^ kNf4Zero : (stored ^ 8) - 8;
}

// Unstructured: where the code of a weight lies in its chunk, counted in codes, or -1. Codes of 4 bits: bit 0 is the nibble.
int64_t kept_place(const Weight& w, const Place& at) {
  const int64_t c = at.column % kTurnColumns;
  const bool bf16 = w.values == Values::bf16, nibbles = has_groups(w.values);
  const int64_t bit = bf16 ? c / 2 * 64 + 2 * at.row + c % 2 : c / 4 * 128 + 4 * at.row + c % 4;
  const uint8_t* mask = at.block + at.column / kTurnColumns * kMaskBytes;
  if (!(mask[bit / 8] >> bit % 8 & 1)) return -1;
  const int64_t odd = bit / 128 % 2;  // step of nibbles
  int64_t before = __builtin_popcount(mask[bit / 8] & ((1 << bit % 8) - 1));
  for (int64_t i = 0; i < bit / 8; ++i)
    if (!nibbles || i / 16 % 2 == odd) before += __builtin_popcount(mask[i]);
  return nibbles ? 2 * before + odd : before;
}

// Pairs of rows: the byte of a weight's pair is the i-th of its chunk, where i bits before its own are set.
int paired_code(const uint8_t* chunk, const Place& at) {
  const int64_t c = at.column % kTurnColumns, bit = c / 4 * 64 + 4 * (at.row % 16) + c % 4;
  const uint8_t* mask = at.block + at.column / kTurnColumns * kPairMaskBytes;
  if (!(mask[bit / 8] >> bit % 8 & 1)) return 0;
  int64_t before = __builtin_popcount(mask[bit / 8] & ((1 << bit % 8) - 1));
  for (int64_t i = 0; i < bit / 8; ++i) before += __builtin_popcount(mask[i]);
  return (at.row < 16 ? chunk[before] & 15 : chunk[before] >> 4) - kInt4Zero;
}

int bitmask_code(const Weight& w, const uint8_t* chunk, const Place& at) {
  const int64_t place = kept_place(w, at);
  if (place < 0) return w.values == Values::nf4 ? kNf4Zero : 0;
  if (w.values == Values::int8) return chunk[place] - kInt8Zero;
  const int code = place % 2 ? chunk[place / 2] >> 4 : chunk[place / 2] & 15;
  return w.values == Values::nf4 ? code : code - kInt4Zero;
}

float scale_of(const Weight& w, int64_t tile, int64_t block, const Place& at) {
  if (w.values != Values::nf4) return from_fp16(load16(at.block + w.g.block_bytes - kScaleBytes + 2 * at.row));
  return from_fp16(static_cast<uint16_t>(w.scale_codes(tile, block)[at.row] << kScaleShift)) * w.outer_scale(tile);
}

Element element(const Weight& w, int64_t n, int64_t k) {
  const Place at = place(w, n, k);
  const int64_t c = at.column;
  const float scale = scale_of(w, n / kTileRows, k / w.g.block_columns, at);
  if (w.pattern == Pattern::two_four) return {two_four_code(w.values, at), scale};
  if (w.pattern == Pattern::paired) return {paired_code(w.chunk(n / kTileRows, k / kTurnColumns), at), scale};
  if (w.pattern == Pattern::bitmask) return {bitmask_code(w, w.chunk(n / kTileRows, k / kTurnColumns), at), scale};
  if (w.values == Values::int8) return {at.block[c / 4 * 128 + 4 * at.row + c % 4] - kInt8Zero, scale};
  const uint8_t byte = at.block[c / 8 * 128 + 4 * at.row + c % 4];
  int zero = w.values == Values::nf4 ? 0 : kInt4Zero;
  if (w.zeros) {
    const uint8_t z = w.zeros[(n / kTileRows * w.g.blocks + k / w.g.block_columns) * kZeroBytes + at.row % 16];
    zero = at.row < 16 ? z & 15 : z >> 4;
  }
  return {(c % 8 < 4 ? byte & 15 : byte >> 4) - zero, scale};
}

float bf16_value(const Weight& w, int64_t n, int64_t k) {
  const Place at = place(w, n, k);
  if (w.pattern == Pattern::dense) return from_bf16(load16(at.block + at.column / 2 * 128 + 4 * at.row + 2 * (at.column % 2)));
  if (w.pattern == Pattern::bitmask) {
    const int64_t kept = kept_place(w, at);
    return kept < 0 ? 0.0f : from_bf16(load16(w.chunk(n / kTileRows, k / kTurnColumns) + 2 * kept));
  }
  const uint8_t* turn = at.block + at.column / kTurnColumns * turn_bytes(w.values);
  const int e = kept_element(turn + turn_bytes(w.values) - kPlaceBytes, at);
  return e < 0 ? 0.0f : from_bf16(load16(turn + e / 2 * 128 + 4 * at.row + 2 * (e % 2)));
}

float value(const Weight& w, int64_t n, int64_t k) {
  if (w.values == Values::bf16) return bf16_value(w, n, k);
  const Element e = element(w, n, k);
  return e.scale * (w.values == Values::nf4 ? kNf4[e.code] : static_cast<float>(e.code));
}

// int8 activations: per row and block, scale = amax / 127, round half to even. A NaN or an infinity makes the scale NaN.
void prepare(const LinearArgs& a, int64_t begin, int64_t end) {
  const Geometry& g = a.w.g;
  for (int64_t m = begin; m < end; ++m) {
    auto x = [&](int64_t k) { return k < a.w.in_features ? load(a.x, a.x_dtype, m * a.w.in_features + k) : 0.0f; };
    if (a.activations == Activations::exact) {
      for (int64_t k = 0; k < g.columns; ++k) a.xf[m * g.columns + k] = x(k);
      continue;
    }
    for (int64_t b = 0; b < g.blocks; ++b) {
      float amax = 0;
      bool finite = true;
      for (int64_t c = 0; c < g.block_columns; ++c) {
        amax = std::fmax(amax, std::fabs(x(b * g.block_columns + c)));
        finite = finite && std::isfinite(x(b * g.block_columns + c));
      }
      const bool tiny = amax < 1e-30f;  // 127 / amax would overflow
      const float inverse = tiny || !finite ? 0.0f : 127.0f / amax;
      int32_t sum = 0;
      for (int64_t c = 0; c < g.block_columns; ++c) {
        const int64_t k = b * g.block_columns + c;
        const auto q = finite ? static_cast<int8_t>(std::nearbyintf(x(k) * inverse)) : int8_t{0};
        a.xq[m * g.columns + k] = q;
        sum += q;
      }
      a.x_scale[m * g.blocks + b] = !finite ? NAN : tiny ? 0.0f : amax / 127.0f;
      a.x_sum[m * g.blocks + b] = sum;
    }
  }
}

void bank_down(const LinearArgs& a, int64_t row_begin, int64_t row_end, int64_t rank_begin, int64_t rank_end) {
  const int64_t in = a.w.in_features;
  for (int64_t m = row_begin; m < row_end; ++m)
    for (int64_t r = rank_begin; r < rank_end; ++r) {
      double sum = 0;
      for (int64_t k = 0; k < in; ++k)
        sum += static_cast<double>(load(a.x, a.x_dtype, m * in + k)) * load(a.bank.down, a.bank.dtype, r * in + k);
      if (r >= a.bank.identity_rank) sum = 0.5 * sum * (1.0 + std::erf(sum * 0.70710678118654752440));
      a.t[m * a.bank.rank + r] = static_cast<float>(sum);
    }
}

double base_sum(const LinearArgs& a, int64_t m, int64_t n) {
  const Geometry& g = a.w.g;
  double sum = 0;
  if (a.activations == Activations::exact) {
    for (int64_t k = 0; k < a.w.in_features; ++k)
      sum += static_cast<double>(a.xf[m * g.columns + k]) * value(a.w, n, k);
    return sum;
  }
  const bool nf4 = a.w.values == Values::nf4;
  for (int64_t b = 0; b < g.blocks; ++b) {
    int32_t dot = 0;  // |dot| <= 127 * 127 * columns: 2^31 is reached above 133,000 columns, refused by the op
    float scale = 0;
    for (int64_t c = 0; c < g.block_columns; ++c) {
      const Element e = element(a.w, n, b * g.block_columns + c);
      dot += (nf4 ? nf4_part(e.code) : e.code) * a.xq[m * g.columns + b * g.block_columns + c];
      scale = e.scale;
    }
    sum += static_cast<double>(dot) / (nf4 ? kNf4Parts : 1) * a.x_scale[m * g.blocks + b] * scale;
  }
  return sum;
}

void tiles(const LinearArgs& a, int64_t unit_begin, int64_t unit_end) {
  const int64_t out = a.w.out_features, rank = a.bank.rank, tiles = a.w.g.tiles, block_rows = row_panels(a.m).block_rows();
  for (int64_t unit = unit_begin; unit < unit_end; ++unit) {
    const int64_t tile = unit % tiles, block = unit / tiles;
    const int64_t row_end = (block + 1) * block_rows < a.m ? (block + 1) * block_rows : a.m;
    const int64_t n_end = (tile + 1) * kTileRows < out ? (tile + 1) * kTileRows : out;
    for (int64_t m = block * block_rows; m < row_end; ++m)
      for (int64_t n = tile * kTileRows; n < n_end; ++n) {
        double sum = base_sum(a, m, n);
        if (a.bias) sum += load(a.bias, a.bias_dtype, n);
        for (int64_t r = 0; r < rank; ++r) {
          const int64_t at = a.bank.tiled ? (n / kTileRows * rank + r) * kTileRows + n % kTileRows : n * rank + r;
          sum += static_cast<double>(a.t[m * rank + r]) * load(a.bank.up, a.bank.dtype, at);
        }
        store(a.y, a.x_dtype, m * out + n, static_cast<float>(sum));
      }
  }
}

void decode_rows(const Weight& w, int64_t begin, int64_t end, float* out) {
  for (int64_t n = begin; n < end; ++n)
    for (int64_t k = 0; k < w.in_features; ++k) out[(n - begin) * w.in_features + k] = value(w, n, k);
}

void prepare_grad(const BackwardArgs&, int64_t, int64_t) {}  // read where it lies

void backward_units(const BackwardArgs& a, int64_t unit_begin, int64_t unit_end) {
  const int64_t in = a.w.in_features, out = a.w.out_features;
  const int64_t chunks = round_up(in, kColumnAlign) / kColumnAlign, block_rows = row_panels(a.m).block_rows();
  for (int64_t unit = unit_begin; unit < unit_end; ++unit) {
    const int64_t chunk = unit % chunks, block = unit / chunks;
    const int64_t row_end = (block + 1) * block_rows < a.m ? (block + 1) * block_rows : a.m;
    const int64_t k_end = (chunk + 1) * kColumnAlign < in ? (chunk + 1) * kColumnAlign : in;
    for (int64_t m = block * block_rows; m < row_end; ++m)
      for (int64_t k = chunk * kColumnAlign; k < k_end; ++k) {
        double sum = 0;
        for (int64_t n = 0; n < out; ++n) sum += static_cast<double>(load(a.grad, a.dtype, m * out + n)) * value(a.w, n, k);
        store(a.dx, a.dtype, m * in + k, static_cast<float>(sum));
      }
  }
}

uint64_t read(const uint8_t* data, int64_t bytes) {
  uint64_t all = 0;
  for (int64_t i = 0; i + 8 <= bytes; i += 8) {
    uint64_t v;
    std::memcpy(&v, data + i, sizeof v);
    all ^= v;
  }
  return all;
}

}  // namespace

const Kernels kReference = {"reference", [](const LinearArgs& a) { return a.m <= kDecodeRows; }, 0, prepare, bank_down, tiles, decode_rows, prepare_grad, backward_units, read};

}  // namespace calora
