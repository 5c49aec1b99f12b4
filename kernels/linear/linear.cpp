// Products of a few rows with a weight on the CPU: the oracle and its shapes are in naive.py beside this file.
//
// A forward of a few rows is bound by reading the weights, if arithmetic keeps out of the way. So a block of outputs is
// read from memory once for all rows, which go by up to eight a pass; while the one block is worked on, the next is
// fetched, a share of it with each pass. Weights lie as the checkpoint has them, so there is no second copy.
//
// One algorithm for every number of rows: a row's sums are float32, in one fixed order (along the input, in 16 lanes,
// folded at the end), and rounded once. So a row's result never depends on the other rows of the batch.
// The vectors are the compiler's (GCC and Clang): one source for all instruction sets. Little-endian machines only.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <utility>
#include <vector>

namespace {

constexpr int kLanes = 16;
constexpr int64_t kRows = 8;    // of a pass at most
constexpr int64_t kBlock = 24;  // outputs that are worked on together: whole tiles of 3 and of 4
constexpr int64_t kGrain = 3;   // blocks of a task at least
constexpr int64_t kMost = 128;  // rows that share one reading of the weights; more would need too much room
constexpr int outs_of(int rows) { return rows > 6 ? 3 : 4; }  // of a tile: rows * outs accumulators, of 32 registers
typedef float f32v __attribute__((vector_size(64), aligned(4)));
typedef uint32_t u32v __attribute__((vector_size(64), aligned(4)));

using bf16 = uint16_t;  // the bits of a bfloat16

inline u32v load64(const void* from) {
  u32v raw;
  std::memcpy(&raw, from, 64);
  return raw;
}

// 64 bytes of weights as the float vectors they hold; of bfloat16, part 0 has the even elements, part 1 the odd ones.
template <typename T>
struct Chunk;

template <>
struct Chunk<float> {
  static constexpr int parts = 1, size = kLanes;
  f32v part[1];
  explicit Chunk(const float* from) : part{(f32v)load64(from)} {}
};

template <>
struct Chunk<bf16> {
  static constexpr int parts = 2, size = 2 * kLanes;
  f32v part[2];
  explicit Chunk(const bf16* from) {
    const u32v raw = load64(from);
    part[0] = (f32v)(raw << 16);
    part[1] = (f32v)(raw & 0xffff0000u);
  }
};

// Of the lanes of a and b in blocks of H: the first (Part 0) or the second (Part 1) of each two blocks.
template <int H, int Part, int... I>
inline f32v blocks(f32v a, f32v b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, (I / H * 2 * H + I % H + Part * H)...);
}

// The sum of the lanes of each of N vectors, at most 16: lane i is vector i's. Halves onto each other, four times, of
// two vectors at once, which changes nothing of a vector's own order.
template <int N, int H = kLanes / 2>
inline f32v sums(f32v* v) {
  constexpr auto lanes = std::make_integer_sequence<int, kLanes>();
  for (int i = 0; i < (N + 1) / 2; ++i) {
    const f32v a = v[2 * i], b = v[std::min(2 * i + 1, N - 1)];
    v[i] = blocks<H, 0>(a, b, lanes) + blocks<H, 1>(a, b, lanes);
  }
  if constexpr (H == 1) return v[0];
  else return sums<(N + 1) / 2, H / 2>(v);
}

inline float widened(float v) { return v; }

inline float widened(bf16 bits) {
  const uint32_t wide = uint32_t(bits) << 16;
  float v;
  std::memcpy(&v, &wide, 4);
  return v;
}

inline f32v rounded(f32v v, float*) { return v; }

inline u32v rounded(f32v v, bf16*) {  // to nearest, ties to even; NaN stays NaN
  const u32v bits = (u32v)v;
  return (v == v ? bits + 0x7fffu + ((bits >> 16) & 1u) : bits | 0x400000u) >> 16;
}

template <typename T>
struct Call {
  const T *weight, *bias;  // [out, in], [out] or null
  const float* x;          // of each pass [in / 16, rows of the pass, 16], the inputs in the order of a chunk's parts
  T* y;                    // [rows, out]
  int64_t rows, in, out;

  int64_t passes() const { return (rows + kRows - 1) / kRows; }
  int64_t first(int64_t pass) const { return rows * pass / passes(); }  // row of a pass: all have equally many, or one more
};

// Sums of rows and outputs, from number `Done` of the tile on, to where they belong.
template <typename T, int R, int O, int Done = 0>
inline void store(const Call<T>& c, f32v (&total)[R * O], int64_t row, int64_t out) {
  constexpr int count = std::min(R * O - Done, kLanes);
  f32v found = sums<count>(total + Done);
  if (c.bias)
    for (int i = 0; i < count; ++i) found[i] += widened(c.bias[out + (Done + i) % O]);
  const auto values = rounded(found, static_cast<T*>(nullptr));
  for (int i = 0; i < count; ++i) c.y[(row + (Done + i) / O) * c.out + out + (Done + i) % O] = T(values[i]);
  if constexpr (Done + count < R * O) store<T, R, O, Done + count>(c, total, row, out);
}

// Outputs out .. out + O - 1 of R rows; fetches the weights of the outputs kBlock + fetch .. kBlock + fetch_end - 1 on.
template <typename T, int R, int O>
inline void tile(const Call<T>& c, int64_t row, int64_t out, int fetch, int fetch_end) {
  f32v total[R * O] = {};
  const T* weight = c.weight + out * c.in;
  const float* x = c.x + row * c.in;
  for (int64_t i = 0; i < c.in; i += Chunk<T>::size) {
    for (int o = fetch; o < fetch_end; ++o) __builtin_prefetch(weight + (kBlock + o) * c.in + i, 0, 2);
    for (int p = 0; p < Chunk<T>::parts; ++p, x += R * kLanes) {
      f32v w[O];
      for (int o = 0; o < O; ++o) w[o] = Chunk<T>(weight + o * c.in + i).part[p];
      for (int r = 0; r < R; ++r) {
        const f32v own = (f32v)load64(x + r * kLanes);
        for (int o = 0; o < O; ++o) total[r * O + o] += own * w[o];
      }
    }
  }
  store<T, R, O>(c, total, row, out);
}

template <typename T, int R>
inline void outputs(const Call<T>& c, int64_t pass, int64_t first, int64_t last) {
  constexpr int outs = outs_of(R);
  const int fetch = pass * outs / c.passes(), fetch_end = (pass + 1) * outs / c.passes();
  const int64_t row = c.first(pass);
  int64_t out = first;
  for (; out + outs <= last; out += outs) tile<T, R, outs>(c, row, out, fetch, fetch_end);
  for (; out < last; ++out) tile<T, R, 1>(c, row, out, 0, 0);
}

template <typename T>
inline void block(const Call<T>& c, int64_t first, int64_t last) {
  for (int64_t pass = 0; pass < c.passes(); ++pass) switch (c.first(pass + 1) - c.first(pass)) {
      case 1: outputs<T, 1>(c, pass, first, last); break;
      case 2: outputs<T, 2>(c, pass, first, last); break;
      case 3: outputs<T, 3>(c, pass, first, last); break;
      case 4: outputs<T, 4>(c, pass, first, last); break;
      case 5: outputs<T, 5>(c, pass, first, last); break;
      case 6: outputs<T, 6>(c, pass, first, last); break;
      case 7: outputs<T, 7>(c, pass, first, last); break;
      case 8: outputs<T, 8>(c, pass, first, last); break;
    }
}

template <typename T>
void spread(const Call<T>& c, const T* from, int64_t stride, float* to, int64_t pass) {  // rows to where Call::x has them
  const int64_t first = c.first(pass), rows = c.first(pass + 1) - first;
  for (int64_t r = 0; r < rows; ++r) {
    float* own = to + first * c.in + r * kLanes;
    for (int64_t i = 0; i < c.in; i += Chunk<T>::size) {
      const Chunk<T> chunk(from + (first + r) * stride + i);
      for (int p = 0; p < Chunk<T>::parts; ++p, own += rows * kLanes) std::memcpy(own, &chunk.part[p], 64);
    }
  }
}

template <typename T>
void run(const at::Tensor& y, const at::Tensor& x, const at::Tensor& weight, const at::Tensor* bias) {
  static thread_local std::vector<float> room;
  const int64_t in = x.size(1), out = weight.size(0), stride = x.stride(0);
  room.resize(std::min(x.size(0), kMost) * in + kLanes);
  float* wide = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(room.data()) + 63) & ~uintptr_t(63));
  for (int64_t first = 0; first < x.size(0); first += kMost) {
    const int64_t rows = std::min(kMost, x.size(0) - first);
    const T* from = static_cast<const T*>(x.const_data_ptr()) + first * stride;
    const Call<T> call{static_cast<const T*>(weight.const_data_ptr()),
                       bias ? static_cast<const T*>(bias->const_data_ptr()) : nullptr, wide,
                       static_cast<T*>(y.data_ptr()) + first * out, rows, in, out};
    at::parallel_for(0, call.passes(), 4, [&](int64_t begin, int64_t end) {
      for (int64_t pass = begin; pass < end; ++pass) spread(call, from, stride, wide, pass);
    });
    at::parallel_for(0, (out + kBlock - 1) / kBlock, kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) block(call, b * kBlock, std::min(out, (b + 1) * kBlock));
    });
  }
}

at::Tensor linear(const at::Tensor& given, const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
  const auto dtype = weight.scalar_type();
  TORCH_CHECK(dtype == at::kFloat || dtype == at::kBFloat16, "linear: the weight is ", dtype,
              ", allowed are float32 and bfloat16");
  const int64_t whole = 64 / weight.element_size();
  TORCH_CHECK(weight.dim() == 2 && weight.is_contiguous() && weight.size(1) % whole == 0 && given.dim() >= 1 &&
                  given.size(-1) == weight.size(1) && given.scalar_type() == dtype,
              "linear: want x [.., in] and a contiguous weight [out, in] of one dtype, in a multiple of ", whole,
              "; got ", given.sizes(), " ", given.scalar_type(), " and ", weight.sizes(), " ", dtype);
  TORCH_CHECK(!bias || (bias->scalar_type() == dtype && bias->is_contiguous() && bias->numel() == weight.size(0)),
              "linear: want a contiguous bias of ", weight.size(0), " ", dtype);
  at::Tensor x = given.reshape({-1, given.size(-1)});
  if (x.stride(1) != 1) x = x.contiguous();
  at::Tensor y = at::empty({x.size(0), weight.size(0)}, x.options());
  const at::Tensor* added = bias ? &*bias : nullptr;
  dtype == at::kFloat ? run<float>(y, x, weight, added) : run<bf16>(y, x, weight, added);
  auto shape = given.sizes().vec();
  shape.back() = weight.size(0);
  return y.reshape(shape);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(vllm_idlm, library) { library.def("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor"); }

TORCH_LIBRARY_IMPL(vllm_idlm, CPU, library) { library.impl("linear", &linear); }
