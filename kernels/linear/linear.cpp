// Products of a few rows with a weight on the CPU: the oracle and its shapes are in naive.py beside this file.
//
// A forward of a few rows is bound by reading the weights, if arithmetic keeps out of the way. So a block of outputs is
// read from memory once for all rows, which go by four at a time; while the one block is worked on, the next is fetched,
// a share of it with each four rows. Weights lie as the checkpoint has them, so there is no second copy.
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
#include <vector>

namespace {

constexpr int kLanes = 16;
constexpr int kRows = 4, kOuts = 4;  // of a tile: kRows * kOuts accumulators, of 32 registers
constexpr int64_t kBlock = 16;       // outputs that are worked on together
constexpr int64_t kGrain = 4;        // blocks of a task at least
constexpr int64_t kMost = 128;       // rows that share one reading of the weights; more would need too much room
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

inline float sum(f32v v) {  // halves onto each other, four times
  v += __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
  v += __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
  v += __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
  v += __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
  return v[0];
}

inline float widened(float v) { return v; }

inline float widened(bf16 bits) {
  const uint32_t wide = uint32_t(bits) << 16;
  float v;
  std::memcpy(&v, &wide, 4);
  return v;
}

inline void store(float* to, float v) { *to = v; }

inline void store(bf16* to, float v) {  // to nearest, ties to even; NaN stays NaN
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  *to = bf16((v == v ? bits + 0x7fffu + ((bits >> 16) & 1u) : bits | 0x400000u) >> 16);
}

template <typename T>
struct Call {
  const T *weight, *bias;  // [out, in], [out] or null
  const float* x;          // [rows, in] in the order of a chunk's parts
  T* y;                    // [rows, out]
  int64_t rows, in, out;
};

// Outputs out .. out + O - 1 of R rows; fetches the weights of the outputs kBlock + fetch .. kBlock + fetch_end - 1 on.
template <typename T, int R, int O>
inline void tile(const Call<T>& c, int64_t row, int64_t out, int fetch, int fetch_end) {
  f32v total[R][O] = {};
  const T* weight = c.weight + out * c.in;
  const float* x = c.x + row * c.in;
  for (int64_t i = 0; i < c.in; i += Chunk<T>::size) {
    for (int o = fetch; o < fetch_end; ++o) __builtin_prefetch(weight + (kBlock + o) * c.in + i, 0, 2);
    for (int p = 0; p < Chunk<T>::parts; ++p) {
      f32v own[R];
      for (int r = 0; r < R; ++r) own[r] = (f32v)load64(x + r * c.in + i + p * kLanes);
      for (int o = 0; o < O; ++o) {
        const f32v w = Chunk<T>(weight + o * c.in + i).part[p];
        for (int r = 0; r < R; ++r) total[r][o] += own[r] * w;
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int o = 0; o < O; ++o) {
      const float bias = c.bias ? widened(c.bias[out + o]) : 0.f;
      store(c.y + (row + r) * c.out + out + o, sum(total[r][o]) + bias);
    }
}

template <typename T, int R>
inline void outputs(const Call<T>& c, int64_t row, int64_t first, int64_t last) {
  const int64_t passes = (c.rows + kRows - 1) / kRows, pass = row / kRows;
  const int fetch = pass * kOuts / passes, fetch_end = (pass + 1) * kOuts / passes;
  int64_t out = first;
  for (; out + kOuts <= last; out += kOuts) tile<T, R, kOuts>(c, row, out, fetch, fetch_end);
  for (; out < last; ++out) tile<T, R, 1>(c, row, out, 0, 0);
}

template <typename T>
inline void block(const Call<T>& c, int64_t first, int64_t last) {
  int64_t row = 0;
  for (; row + kRows <= c.rows; row += kRows) outputs<T, kRows>(c, row, first, last);
  switch (c.rows - row) {
    case 3: return outputs<T, 3>(c, row, first, last);
    case 2: return outputs<T, 2>(c, row, first, last);
    case 1: return outputs<T, 1>(c, row, first, last);
  }
}

template <typename T>
void spread(const T* from, float* to, int64_t in) {  // a row of x in the order of a chunk's parts
  for (int64_t i = 0; i < in; i += Chunk<T>::size) {
    const Chunk<T> chunk(from + i);
    for (int p = 0; p < Chunk<T>::parts; ++p) std::memcpy(to + i + p * kLanes, &chunk.part[p], 64);
  }
}

template <typename T>
void run(const at::Tensor& y, const at::Tensor& x, const at::Tensor& weight, const at::Tensor* bias) {
  static thread_local std::vector<float> room;
  const int64_t in = x.size(1), out = weight.size(0), stride = x.stride(0);
  room.resize(std::min(x.size(0), kMost) * in);
  float* wide = room.data();
  for (int64_t first = 0; first < x.size(0); first += kMost) {
    const int64_t rows = std::min(kMost, x.size(0) - first);
    const T* from = static_cast<const T*>(x.const_data_ptr()) + first * stride;
    at::parallel_for(0, rows, 32, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) spread(from + r * stride, wide + r * in, in);
    });
    const Call<T> call{static_cast<const T*>(weight.const_data_ptr()),
                       bias ? static_cast<const T*>(bias->const_data_ptr()) : nullptr, wide,
                       static_cast<T*>(y.data_ptr()) + first * out, rows, in, out};
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
