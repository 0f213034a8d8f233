// Every CPU kernel over formats, shapes, densities, rows and ranks, on buffers of exactly the sizes that layouts.h and plan()
// give, each allocated on its own: AddressSanitizer notices whatever reads or writes beside one. Twice: on packed weights that
// are valid, where results are compared with float64 so that nothing is run in vain, and on random bytes, as of a damaged file.
// No torch: the pool is a loop here, that cuts a range unevenly and takes the last piece first.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "../cpu/expand.h"
#include "../kernels.h"

using namespace calora;

namespace {

uint64_t next_random() {  // splitmix64
  static uint64_t state = 1;
  uint64_t z = state += 0x9e3779b97f4a7c15;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
  z = (z ^ z >> 27) * 0x94d049bb133111eb;
  return z ^ z >> 31;
}
int64_t below(int64_t n) { return static_cast<int64_t>(next_random() % static_cast<uint64_t>(n)); }
double uniform() { return static_cast<double>(next_random() >> 11) * 0x1p-53; }

[[noreturn]] void fail(const std::string& what) {
  std::fprintf(stderr, "%s\n", what.c_str());
  std::exit(1);
}

// `bytes` bytes, no more: at a multiple of 64, or `shift` bytes behind one, for what may lie anywhere.
class Buffer {
 public:
  explicit Buffer(int64_t bytes, int64_t shift = 0) : bytes_(bytes) {
    void* p = nullptr;
    if (posix_memalign(&p, kTileAlign, static_cast<std::size_t>(bytes + shift))) fail("out of memory");
    memory_.reset(p);
    data_ = static_cast<uint8_t*>(p) + shift;
    std::memset(p, 0xff, static_cast<std::size_t>(bytes + shift));  // NaN: who reads what nobody wrote is noticed
  }
  uint8_t* data() const { return data_; }
  int64_t bytes() const { return bytes_; }
  Buffer& randomise() {
    for (int64_t i = 0; i < bytes_; ++i) data_[i] = static_cast<uint8_t>(next_random());
    return *this;
  }

 private:
  struct Free { void operator()(void* p) const { std::free(p); } };
  std::unique_ptr<void, Free> memory_;
  uint8_t* data_;
  int64_t bytes_;
};

template <class T> void put(uint8_t* at, T v) { std::memcpy(at, &v, sizeof v); }
uint16_t to_bf16(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, sizeof bits);
  return static_cast<uint16_t>((bits + 0x8000) >> 16);
}
float from_bf16(uint16_t h) {
  const uint32_t bits = static_cast<uint32_t>(h) << 16;
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}

// n numbers in [-1, 1), fp32 or bf16, one element behind a multiple of 64.
Buffer numbers(DType dtype, int64_t n) {
  const int64_t size = dtype == DType::f32 ? 4 : 2;
  Buffer b(n * size, size);
  for (int64_t i = 0; i < n; ++i) {
    const auto v = static_cast<float>(2 * uniform() - 1);
    if (dtype == DType::f32) put(b.data() + 4 * i, v);
    else put(b.data() + 2 * i, to_bf16(v));
  }
  return b;
}
double number(const void* p, DType dtype, int64_t i) {
  if (dtype == DType::bf16) {
    uint16_t h;
    std::memcpy(&h, static_cast<const uint8_t*>(p) + 2 * i, 2);
    return from_bf16(h);
  }
  float f;
  std::memcpy(&f, static_cast<const uint8_t*>(p) + 4 * i, 4);
  return f;
}

// ---- packed weights -----------------------------------------------------------------------------------------------------

struct Format {
  Pattern pattern;
  Values values;
  int64_t group_size;
  bool zeros;
  std::string name() const {
    static const char* const patterns[] = {"dense", "2:4", "unstructured", "paired"};
    static const char* const types[] = {"bf16", "int8", "int4", "nf4"};
    return std::string(patterns[static_cast<int>(pattern)]) + " " + types[static_cast<int>(values)] + " g" + std::to_string(group_size) + (zeros ? " with zero points" : "");
  }
};

struct Packed {
  Weight w;
  std::vector<Buffer> own;
  uint8_t* keep(Buffer b) {
    own.push_back(std::move(b));
    return own.back().data();
  }
};

// A code that a valid file holds: any bits, but a finite bf16 and no -128.
void random_codes(Values v, bool offset, uint8_t* at, int64_t bytes) {
  for (int64_t i = 0; i < bytes; ++i) {
    at[i] = static_cast<uint8_t>(next_random());
    if (v == Values::int8 && at[i] == (offset ? 0 : 0x80)) at[i] = 1;
  }
  for (int64_t i = 0; v == Values::bf16 && i < bytes; i += 2) put(at + i, to_bf16(static_cast<float>(2 * uniform() - 1)));
}

// A turn of 2:4 (layouts.h): which of its elements are kept, and 0 where one is not.
void place_two_four(Values v, double density, uint8_t* turn) {
  uint8_t* places = turn + turn_bytes(v) - kPlaceBytes;
  std::memset(places, 0, kPlaceBytes);
  for (int64_t r = 0; r < kTileRows; ++r)
    for (int64_t e = 0; e < kTurnColumns / 2; e += 2) {
      int64_t at[2], kept = 0;
      for (int64_t c = 0; c < 4; ++c)
        if (kept < 2 && uniform() < density) at[kept++] = c;
      const int64_t first = kept ? at[0] : 1, last = kept == 2 ? at[1] : kept ? at[0] : 0;
      for (int64_t i = 0; i < 2; ++i) {
        const int64_t element = e + i;
        places[4 * r + element % 4] = static_cast<uint8_t>(places[4 * r + element % 4] | (i ? last : first) << element / 4 * 2);
        if (i < kept) continue;
        if (v == Values::bf16) put<uint16_t>(turn + element / 2 * 128 + 4 * r + 2 * i, 0);
        else if (v == Values::int8) turn[element / 4 * 128 + 4 * r + element % 4] = 0;
        else turn[element / 8 * 128 + 4 * r + element % 4] &= element % 8 < 4 ? 0xf0 : 0x0f;
      }
    }
}

// The bits of a chunk -> bytes of its codes.
int64_t mask_chunk(Pattern p, Values v, double density, uint8_t* bits) {
  int64_t counts[2] = {};  // of even and of odd steps
  for (int64_t i = 0; i < code_bytes(p, v, kTurnColumns); ++i) {
    bits[i] = 0;
    for (int bit = 0; bit < 8; ++bit) bits[i] = static_cast<uint8_t>(bits[i] | (uniform() < density) << bit);
    counts[i / 16 % 2] += __builtin_popcount(bits[i]);
  }
  if (p == Pattern::paired) return counts[0] + counts[1];
  if (has_groups(v)) return counts[0] > counts[1] ? counts[0] : counts[1];
  return (counts[0] + counts[1]) * (v == Values::bf16 ? 2 : 1);
}

// A weight that keeps about `density`; damaged: of random bytes.
Packed make_weight(const Format& f, int64_t in, int64_t out, double density, bool damaged) {
  Packed p{};
  const Geometry g = geometry(f.pattern, f.values, in, out, f.group_size);
  const Values v = f.values;
  p.w = {nullptr, nullptr, f.pattern, v, in, out, g};
  Buffer packed(g.bytes());
  packed.randomise();
  if (f.zeros) p.w.zeros = p.keep(std::move(Buffer(g.zeros_bytes(), 1).randomise()));
  if (v == Values::nf4) {
    Buffer scales(g.scales_bytes(), 1);
    scales.randomise();
    for (int64_t t = 0; t < g.tiles && !damaged; ++t) put(scales.data() + g.scale_codes_bytes() + 4 * t, static_cast<float>(64 * (1 + uniform())));
    p.w.scales = p.keep(std::move(scales));
  }
  int64_t kept = 0, last = 0;
  Buffer offsets(has_kept(f.pattern) ? g.offsets_bytes() : 0, 1);
  offsets.randomise();
  for (int64_t block = 0; block < g.tiles * g.blocks && !damaged; ++block) {
    uint8_t* at = packed.data() + block * g.block_bytes;
    const int64_t codes = code_bytes(f.pattern, v, g.block_columns), chunks = g.block_columns / kTurnColumns;
    if (f.pattern == Pattern::dense) random_codes(v, true, at, codes);
    for (int64_t i = 0; i < chunks && f.pattern == Pattern::two_four; ++i) {
      random_codes(v, false, at + i * turn_bytes(v), turn_bytes(v) - kPlaceBytes);
      place_two_four(v, density, at + i * turn_bytes(v));
    }
    for (int64_t i = 0; i < chunks && has_kept(f.pattern); ++i) {
      put(offsets.data() + 4 * (block * chunks + i), static_cast<uint32_t>(kept / kOffsetUnit));
      last = kept;
      kept += round_up(mask_chunk(f.pattern, v, density, at + i * code_bytes(f.pattern, v, kTurnColumns)), kOffsetUnit);
    }
    for (int64_t i = 0; i < scale_bytes(v); i += 2)  // fp16 of magnitude 2^-8 to 2^-6
      put(at + codes + i, static_cast<uint16_t>((next_random() & 0x87ff) + 0x1c00));
  }
  if (has_kept(f.pattern)) {  // as short as the op accepts: the last chunk starts at kept_limit
    Buffer codes(last + code_bytes(v, kTurnColumns) + kTileAlign, 1);
    if (damaged) codes.randomise();
    else random_codes(v, true, codes.data(), codes.bytes());
    p.w.kept_limit = kept_limit(v, codes.bytes());
    p.w.kept = p.keep(std::move(codes));
    p.w.offsets = p.keep(std::move(offsets));
  }
  p.w.packed = p.keep(std::move(packed));
  return p;
}

// ---- calls --------------------------------------------------------------------------------------------------------------

int64_t calls = 0;

void pool(int64_t begin, int64_t end, int64_t, Body body, void* context) {  // whatever the grain: kernels may be cut anywhere
  while (begin < end) {  // the last piece first
    const int64_t start = end - 1 - below(end - begin);
    body(context, start, end);
    end = start;
  }
}

// Gives every array of the workspace that plan() laid out memory of its own.
template <class... Arrays>
std::vector<Buffer> apart(const uint8_t* workspace, int64_t bytes, Arrays*&... arrays) {
  std::vector<int64_t> ends;
  auto note = [&](const auto* p) {
    if (p) ends.push_back(reinterpret_cast<const uint8_t*>(p) - workspace);
  };
  (note(arrays), ...);
  ends.push_back(bytes);
  std::vector<Buffer> own;
  auto move = [&]<class T>(T*& p) {
    if (!p) return;
    own.emplace_back(ends[own.size() + 1] - ends[own.size()]);
    p = reinterpret_cast<T*>(own.back().data());
  };
  (move(arrays), ...);
  return own;
}

struct Case {
  DType x_dtype, bank_dtype;
  Activations activations;
  int64_t m, rank, identity_rank;
  bool tiled, bias;
};

double norm(const std::vector<double>& v) {
  double sum = 0;
  for (const double x : v) sum += x * x;
  return std::sqrt(sum);
}

void expect_near(const Buffer& got, DType dtype, const std::vector<double>& want, double size, double tolerance, const std::string& what) {
  double error = 0;
  for (std::size_t i = 0; i < want.size(); ++i) {
    const double e = number(got.data(), dtype, static_cast<int64_t>(i)) - want[i];
    error += e * e;
  }
  if (!(std::sqrt(error) <= tolerance * (norm(want) + size) + 1e-6)) fail(what + ": off by " + std::to_string(std::sqrt(error)) + " of " + std::to_string(norm(want)));
}

// x (m, in) by dense (out, in), or where `turned` by (in, out): float64, and how large a sum of random signs would be.
std::vector<double> product(const Buffer& x, DType dtype, int64_t m, int64_t in, int64_t out, const std::vector<float>& dense, bool turned, double& size) {
  std::vector<double> y(static_cast<std::size_t>(m * out)), values(static_cast<std::size_t>(m * in));
  for (int64_t i = 0; i < m * in; ++i) values[static_cast<std::size_t>(i)] = number(x.data(), dtype, i);
  for (int64_t i = 0; i < m; ++i)
    for (int64_t n = 0; n < out; ++n) {
      const double* row = values.data() + i * in;
      const float* w = dense.data() + (turned ? n : n * in);
      double sum = 0;
      for (int64_t k = 0; k < in; ++k) sum += row[k] * w[turned ? k * out : k];
      y[static_cast<std::size_t>(i * out + n)] = sum;
    }
  double weights = 0;
  for (const float w : dense) weights += static_cast<double>(w) * w;
  size = norm(values) * std::sqrt(weights / static_cast<double>(in));
  return y;
}

// The fused layer and its backward on every rung; dense: the decoded weight, or empty where nothing is compared.
void run(const Packed& p, const std::vector<const Kernels*>& rungs, const std::vector<float>& dense, const Case& c, const std::string& name) {
  const Weight& w = p.w;
  const int64_t in = w.in_features, out = w.out_features, size = c.x_dtype == DType::f32 ? 4 : 2;
  Buffer x = numbers(c.x_dtype, c.m * in), grad = numbers(c.x_dtype, c.m * out);
  if (dense.empty()) x.randomise(), grad.randomise();
  const Buffer bias = numbers(c.x_dtype, out), down = numbers(c.bank_dtype, c.rank * in), up = numbers(c.bank_dtype, c.tiled ? w.g.tiles * c.rank * kTileRows : out * c.rank);
  std::vector<double> want, want_dx;
  double y_size = 0, dx_size = 0;
  if (!dense.empty()) {
    want = product(x, c.x_dtype, c.m, in, out, dense, false, y_size);
    want_dx = product(grad, c.x_dtype, c.m, out, in, dense, true, dx_size);
    for (int64_t m = 0; m < c.m; ++m) {
      std::vector<double> t(static_cast<std::size_t>(c.rank));
      for (int64_t r = 0; r < c.rank; ++r) {
        double sum = 0;
        for (int64_t k = 0; k < in; ++k) sum += number(x.data(), c.x_dtype, m * in + k) * number(down.data(), c.bank_dtype, r * in + k);
        t[static_cast<std::size_t>(r)] = r < c.identity_rank ? sum : 0.5 * sum * (1 + std::erf(sum * std::sqrt(0.5)));
      }
      for (int64_t n = 0; n < out; ++n) {
        double& y = want[static_cast<std::size_t>(m * out + n)];
        if (c.bias) y += number(bias.data(), c.x_dtype, n);
        for (int64_t r = 0; r < c.rank; ++r)
          y += t[static_cast<std::size_t>(r)] * number(up.data(), c.bank_dtype, c.tiled ? (n / kTileRows * c.rank + r) * kTileRows + n % kTileRows : n * c.rank + r);
      }
    }
  }
  for (const Kernels* k : rungs) {
    if (k == &kReference && c.m * in * out > 10000) continue;  // slow on purpose
    select_rung(k->isa);
    const std::string what = std::string(k->isa) + " " + name + ", M = " + std::to_string(c.m) + ", " + std::to_string(out) + " x " + std::to_string(in) + ", rank " + std::to_string(c.rank) +
                             (c.activations == Activations::int8 ? ", int8" : ", exact") + (c.x_dtype == DType::f32 ? ", fp32" : ", bf16");
    Buffer y(c.m * out * size, size);
    LinearArgs a{};
    a.x = x.data(), a.y = y.data(), a.x_dtype = c.x_dtype, a.m = c.m, a.w = w;
    if (c.bias) a.bias = bias.data(), a.bias_dtype = c.x_dtype;
    if (c.rank) a.bank = {down.data(), up.data(), c.bank_dtype, c.tiled, c.rank, c.identity_rank};
    a.activations = c.activations;
    const Buffer workspace(static_cast<int64_t>(plan(a, nullptr)));
    plan(a, workspace.data());
    const auto own = apart(workspace.data(), workspace.bytes(), a.xq, a.x_scale, a.x_sum, a.xf, a.x_eights, a.xb, a.t, a.sums);
    linear(a, pool);
    // bf16 rounds the result and, on the rungs with vdpbf16ps, the book of nf4; int8 rounds x, and that book to 124ths.
    const double tolerance = c.activations == Activations::int8 ? 3e-2 : c.x_dtype == DType::bf16 ? 1e-2 : 1e-4;
    if (!want.empty()) expect_near(y, c.x_dtype, want, y_size, tolerance, what);

    Buffer dx(c.m * in * size, size);
    BackwardArgs b{};
    b.grad = grad.data(), b.dx = dx.data(), b.dtype = c.x_dtype, b.m = c.m, b.w = w;
    const Buffer panels(static_cast<int64_t>(plan(b, nullptr)));
    plan(b, panels.data());
    backward(b, pool);
    if (!want.empty()) expect_near(dx, c.x_dtype, want_dx, dx_size, c.x_dtype == DType::bf16 ? 1e-2 : 1e-4, what + ", backward");
    calls += 2;
  }
}

// Rows one by one (an embedding), all of them, and, of a sparse weight, the dense codes.
void decode(const Packed& p, const std::vector<const Kernels*>& rungs, const std::vector<float>& dense, const std::string& name) {
  const Weight& w = p.w;
  for (const Kernels* k : rungs) {
    const int64_t n = below(w.out_features);
    const Buffer one(4 * w.in_features, 4), all(4 * w.in_features * w.out_features, 4);
    k->decode_rows(w, n, n + 1, reinterpret_cast<float*>(one.data()));
    k->decode_rows(w, 0, w.out_features, reinterpret_cast<float*>(all.data()));
    calls += 2;
    if (dense.empty()) continue;
    const std::vector<double> want(dense.begin(), dense.end()), row(want.begin() + n * w.in_features, want.begin() + (n + 1) * w.in_features);
    expect_near(all, DType::f32, want, 0, 1e-6, std::string(k->isa) + " " + name + ", decode");
    expect_near(one, DType::f32, row, 0, 1e-6, std::string(k->isa) + " " + name + ", decode of a row");
  }
#ifdef CALORA_X86
  if (w.pattern == Pattern::dense || rungs.size() == 1) return;
  Packed plain{};
  plain.w = w;
  plain.w.pattern = Pattern::dense;
  const Geometry& g = plain.w.g = geometry(Pattern::dense, w.values, w.in_features, w.out_features, w.g.blocks == 1 ? -1 : w.g.block_columns);
  const Buffer packed(g.bytes());
  for (int64_t tile = 0; tile < g.tiles; ++tile)
    for (int64_t block = 0; block < g.blocks; ++block) {
      const int64_t codes = code_bytes(w.values, g.block_columns);
      const Buffer out(codes);
      expand(w, tile, block, 0, g.block_columns, out.data());
      ++calls;
      uint8_t* to = packed.data() + tile * g.tile_bytes + block * g.block_bytes;
      std::memcpy(to, out.data(), static_cast<std::size_t>(codes));
      std::memcpy(to + codes, w.packed + tile * w.g.tile_bytes + (block + 1) * w.g.block_bytes - scale_bytes(w.values), static_cast<std::size_t>(scale_bytes(w.values)));
    }
  plain.w.packed = packed.data();
  if (!dense.empty()) decode(plain, {&kReference}, dense, name + " expanded");
#endif
}

// ---- the grid -----------------------------------------------------------------------------------------------------------

constexpr int64_t kShapes[][2] = {{1, 1}, {33, 31}, {100, 70}, {64, 96}, {257, 129}, {70, 300}};  // in, out
constexpr int64_t kRows[] = {1, 2, 3, 4, 5, 8, 9, 13, 40};
constexpr int64_t kRanks[] = {0, 1, 16, 37};

void run_grid(const Format& f, const std::vector<const Kernels*>& rungs, double density, bool damaged) {
  static uint64_t turn = 0;  // which of dtypes, activations and kinds of bank is next
  for (const auto& shape : kShapes) {
    const Packed p = make_weight(f, shape[0], shape[1], density, damaged);
    std::vector<float> dense;
    if (!damaged) {
      dense.resize(static_cast<std::size_t>(shape[0] * shape[1]));
      kReference.decode_rows(p.w, 0, shape[1], dense.data());
    }
    decode(p, rungs, dense, f.name());
    for (const int64_t m : kRows)
      for (int i = 0; i < (damaged ? 1 : 2); ++i) {
        const uint64_t bits = turn++ * 5;  // steps through all combinations of the low five bits
        const int64_t rank = kRanks[(turn / 2) % 4];
        const bool int8 = f.values != Values::bf16 && (bits & 1);
        run(p, rungs, dense, {bits & 2 ? DType::bf16 : DType::f32, bits & 4 ? DType::bf16 : DType::f32, int8 ? Activations::int8 : Activations::exact,
                              m, rank, rank / 2, (bits & 8) != 0, (bits & 16) != 0}, f.name());
      }
  }
}

}  // namespace

int main() {
  std::vector<const Kernels*> rungs(8);
  rungs.resize(static_cast<std::size_t>(available_rungs(rungs.data(), 8)));
  std::vector<Format> formats;
  for (const auto pattern : {Pattern::dense, Pattern::two_four, Pattern::bitmask}) {
    for (const auto values : {Values::int4, Values::nf4})
      for (const int64_t group : {32, 64, 128, -1}) formats.push_back({pattern, values, group, false});
    for (const auto values : {Values::int8, Values::bf16}) formats.push_back({pattern, values, -1, false});
  }
  for (const int64_t group : {32, 128, -1}) formats.push_back({Pattern::dense, Values::int4, group, true}), formats.push_back({Pattern::paired, Values::int4, group, false});
  for (const Format& f : formats) {
    for (const double density : {0.5, 0.0, 0.3, 0.7, 0.9, 1.0})
      if (density == 0.5 || f.pattern != Pattern::dense) run_grid(f, rungs, density, false);
    run_grid(f, rungs, 0, true);
    // More rows than one pass takes, several panels and blocks of them.
    const Packed p = make_weight(f, 40, 34, 0.5, false);
    std::vector<float> dense(40 * 34);
    kReference.decode_rows(p.w, 0, 34, dense.data());
    run(p, rungs, dense, {DType::bf16, DType::bf16, f.values == Values::bf16 ? Activations::exact : Activations::int8, kMaxRows + 45, 5, 2, true, true}, f.name());
    run(p, rungs, dense, {DType::f32, DType::f32, Activations::exact, 300, 5, 2, false, true}, f.name());
    // Rows longer than the pieces in which they are expanded, or taken apart.
    for (const bool damaged : {false, true}) {
      const Packed longer = make_weight(f, 1060, 33, 0.6, damaged);
      std::vector<float> weights(damaged ? 0 : 1060 * 33);
      if (!damaged) kReference.decode_rows(longer.w, 0, 33, weights.data());
      run(longer, rungs, weights, {DType::f32, DType::f32, f.values == Values::bf16 ? Activations::exact : Activations::int8, 70, 0, 0, false, true}, f.name());
      run(longer, rungs, weights, {DType::bf16, DType::bf16, Activations::exact, 20, 0, 0, false, true}, f.name());
    }
  }
  for (const Kernels* k : rungs)
    for (const int64_t bytes : {0, 8, 64, 4096, 5000}) {
      Buffer data(bytes);
      data.randomise();
      uint64_t want = 0;
      for (int64_t i = 0; i + 8 <= bytes; i += 8) {
        uint64_t word;
        std::memcpy(&word, data.data() + i, sizeof word);
        want ^= word;
      }
      if (k->read(data.data(), bytes) != want) fail(std::string(k->isa) + " read");
      ++calls;
    }
  std::string names;
  for (const Kernels* k : rungs) names += (names.empty() ? "" : ", ") + std::string(k->isa);
  std::printf("%lld calls on %zu formats and the rungs %s: clean\n", static_cast<long long>(calls), formats.size(), names.c_str());
}
