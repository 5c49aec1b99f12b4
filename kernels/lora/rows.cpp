// Row-selecting LoRA on the CPU: the oracle, its mathematics and its shapes are in naive.py beside this file.
//
// One algorithm for every number of rows, so that a row's result never depends on the other rows of the batch:
//   shrink  h[row, k]  = sum_i A[k, i] x[row, i]   dot products along i, 32 elements a step
//   expand  y[row, o] += sum_k B[o, k] h[row, k]   tiles of outputs; B lies rank by rank, so lanes are outputs
// Both sums are float32 and run in one fixed order; y is rounded once. Rows are taken in blocks of at most 8 of one
// slot, so a weight is read once for the block. A call is one parallel region with one barrier, between the halves.
// The vectors are the compiler's (GCC and Clang): one source for AVX-512, AVX2 and NEON. Little-endian machines only.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int kLanes = 16;
constexpr int kRows = 8;  // most rows of a block
typedef float f32v __attribute__((vector_size(64), aligned(4)));
typedef uint32_t u32v __attribute__((vector_size(64), aligned(4)));

using bf16 = uint16_t;  // the bits of a bfloat16

// 32 (bfloat16) or 16 (float32) elements, as the one or two float vectors that their 64 bytes hold.
template <typename T>
struct Chunk;

template <>
struct Chunk<float> {
  static constexpr int parts = 1, size = kLanes;
  f32v part[1];
  explicit Chunk(u32v raw) : part{(f32v)raw} {}
};

template <>
struct Chunk<bf16> {
  static constexpr int parts = 2, size = 2 * kLanes;  // part 0 holds the even elements, part 1 the odd ones
  f32v part[2];
  explicit Chunk(u32v raw) : part{(f32v)(raw << 16), (f32v)(raw & 0xffff0000u)} {}
};

inline u32v load64(const void* from) {
  u32v raw;
  std::memcpy(&raw, from, 64);
  return raw;
}

inline u32v load_some(const void* from, size_t bytes) {
  u32v raw = {};
  std::memcpy(&raw, from, bytes);
  return raw;
}

inline float sum(f32v v) {  // halves onto each other, four times
  v += __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
  v += __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
  v += __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
  v += __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
  return v[0];
}

// y + delta for the chunk of y in `raw`, rounded to y's type.
inline u32v add(Chunk<float> y, const f32v* delta) { return (u32v)(y.part[0] + delta[0]); }

inline u32v rounded(f32v v) {  // a bfloat16 in the upper half: to nearest, ties to even; NaN stays NaN
  const u32v bits = (u32v)v;
  return v == v ? bits + 0x7fffu + ((bits >> 16) & 1u) : bits | 0x400000u;
}

inline u32v add(Chunk<bf16> y, const f32v* delta) {
  return rounded(y.part[0] + delta[0]) >> 16 | (rounded(y.part[1] + delta[1]) & 0xffff0000u);
}

struct Block {  // rows of one slot that are worked on together
  int64_t slot;
  int count;
  int64_t row[kRows];
};

template <typename T>
struct Slice {
  const T *a, *b;          // [slots, rank, in], [slots, rank, out]
  int64_t rank, out;
  int64_t h_at, y_at;      // where this slice begins in a row of h and of y
};

template <typename T>
struct Call {
  T* y;
  const T* x;
  int64_t y_stride, x_stride, in;
  std::vector<Slice<T>> slices;
  std::vector<Block> blocks;
  int64_t h_width = 0;     // floats in a row of h: every slice's rank, rounded up to whole chunks
  std::vector<float> h;    // [blocks, kRows, h_width]
};

// h of K ranks for the R rows of a block.
template <typename T, int R, int K>
void shrink_ranks(const Call<T>& call, const Block& block, const T* a, float* h) {
  using C = Chunk<T>;
  f32v total[K][R] = {};
  const T* x[R];
  for (int r = 0; r < R; ++r) x[r] = call.x + block.row[r] * call.x_stride;
  const auto step = [&](auto load) {
    u32v weight[K];
    for (int k = 0; k < K; ++k) weight[k] = load(a + k * call.in);
    for (int p = 0; p < C::parts; ++p)
      for (int r = 0; r < R; ++r) {
        const f32v input = C(load(x[r])).part[p];
        for (int k = 0; k < K; ++k) total[k][r] += C(weight[k]).part[p] * input;
      }
  };
  const int64_t whole = call.in / C::size * C::size;
  for (int64_t i = 0; i < whole; i += C::size) {  // beside the work on these ranks, the next ones are fetched
    for (int k = 0; k < K; ++k) __builtin_prefetch(a + (K + k) * call.in + i);
    step([i](const T* from) { return load64(from + i); });
  }
  if (const size_t rest = (call.in - whole) * sizeof(T))
    step([whole, rest](const T* from) { return load_some(from + whole, rest); });
  for (int k = 0; k < K; ++k)
    for (int r = 0; r < R; ++r) h[r * call.h_width + k] = sum(total[k][r]);
}

// y of W chunks of outputs (or of `bytes` of one) from `first` on, for the R rows of a block; `used` ranks count.
template <typename T, int R, int W>
void expand_tile(const Call<T>& call, const Block& block, const Slice<T>& slice, const float* h, int64_t used,
                 int64_t first, size_t bytes = 64) {
  using C = Chunk<T>;
  const auto load = [bytes](const T* from) { return W > 1 || bytes == 64 ? load64(from) : load_some(from, bytes); };
  const T* b = slice.b + block.slot * slice.rank * slice.out + first;
  f32v total[R][W][C::parts] = {};
  for (int64_t k = 0; k < used; ++k, b += slice.out)
    for (int w = 0; w < W; ++w) {
      __builtin_prefetch(b + (W + w) * C::size);
      const C weight(load(b + w * C::size));
      for (int r = 0; r < R; ++r)
        for (int p = 0; p < C::parts; ++p) total[r][w][p] += weight.part[p] * h[r * call.h_width + k];
    }
  for (int r = 0; r < R; ++r)
    for (int w = 0; w < W; ++w) {
      T* y = call.y + block.row[r] * call.y_stride + slice.y_at + first + w * C::size;
      const u32v sum = add(C(load(y)), total[r][w]);
      std::memcpy(y, &sum, bytes);
    }
}

template <typename T, int R>
void shrink_part(Call<T>& call, const Block& block, float* h, int part, int parts) {
  constexpr int K = R <= 4 ? 4 : 2;
  for (const auto& slice : call.slices) {
    const T* a = slice.a + block.slot * slice.rank * call.in;
    const int64_t tiles = (slice.rank + K - 1) / K;
    for (int64_t t = tiles * part / parts; t < tiles * (part + 1) / parts; ++t) {
      int64_t k = t * K;
      float* to = h + slice.h_at;
      if (k + K <= slice.rank)
        shrink_ranks<T, R, K>(call, block, a + k * call.in, to + k);
      else
        for (; k < slice.rank; ++k) shrink_ranks<T, R, 1>(call, block, a + k * call.in, to + k);
    }
  }
}

template <typename T, int R>
int64_t used_ranks(const Call<T>& call, const float* h, int64_t rank) {  // what is padding has rows of zeros in A
  const auto all_zero = [&](int64_t k) {
    for (int r = 0; r < R; ++r)
      if (h[r * call.h_width + k] != 0) return false;
    return true;
  };
  while (rank > 0 && all_zero(rank - 1)) --rank;
  return rank;
}

template <typename T, int R>
void expand_part(const Call<T>& call, const Block& block, const float* h, int part, int parts) {
  constexpr int W = R <= 4 ? 2 : 1, size = Chunk<T>::size;
  for (const auto& slice : call.slices) {
    const float* from = h + slice.h_at;
    const int64_t used = used_ranks<T, R>(call, from, slice.rank);
    const int64_t tiles = (slice.out + W * size - 1) / (W * size);
    for (int64_t t = tiles * part / parts; t < tiles * (part + 1) / parts; ++t) {
      int64_t first = t * W * size;
      const int64_t end = std::min(first + W * size, slice.out);
      if (end - first == W * size)
        expand_tile<T, R, W>(call, block, slice, from, used, first);
      else
        for (; first < end; first += size)
          expand_tile<T, R, 1>(call, block, slice, from, used, first, std::min<int64_t>(end - first, size) * sizeof(T));
    }
  }
}

template <typename F>
void with_rows(int count, F&& f) {  // f(std::integral_constant<int, count>), count in 1 .. kRows
  switch (count) {
#define CASE(N) \
  case N:       \
    return f(std::integral_constant<int, N>());
    CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8)
#undef CASE
  }
}

template <typename T>
void run(Call<T>& call) {
  const auto each_block = [&](auto&& work) {
    for (size_t i = 0; i < call.blocks.size(); ++i) {
      float* h = call.h.data() + i * kRows * call.h_width;
      with_rows(call.blocks[i].count, [&](auto rows) { work(rows, call.blocks[i], h); });
    }
  };
#pragma omp parallel
  {
#ifdef _OPENMP
    const int part = omp_get_thread_num(), parts = omp_get_num_threads();
#else
    const int part = 0, parts = 1;
#endif
    each_block([&](auto rows, auto& block, float* h) { shrink_part<T, rows.value>(call, block, h, part, parts); });
#pragma omp barrier
    each_block([&](auto rows, auto& block, float* h) { expand_part<T, rows.value>(call, block, h, part, parts); });
  }
}

// Rows with a slot, in blocks of one slot each.
void find_blocks(const int64_t* slots, int64_t rows, int64_t num_slots, std::vector<Block>& blocks) {
  blocks.clear();
  std::vector<int64_t> open(num_slots, -1);  // the slot's block that still has room
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t slot = slots[row];
    if (slot < 0) continue;
    TORCH_CHECK(slot < num_slots, "add_lora_rows_: slots[", row, "] is ", slot, ", allowed is -1 to ", num_slots - 1);
    if (open[slot] < 0 || blocks[open[slot]].count == kRows) {
      open[slot] = blocks.size();
      blocks.push_back({slot, 0, {}});
    }
    Block& block = blocks[open[slot]];
    block.row[block.count++] = row;
  }
}

// What a call works on besides y and x. A row of a table of layers: these fields, then one `Weights` a slice, as int64.
struct Layer {
  int64_t dtype, slots, in, slices;
};

struct Weights {
  int64_t a, b;  // addresses
  int64_t rank, out, y_at;
};

template <typename T>
void add_rows(const at::Tensor& y, const at::Tensor& x, const at::Tensor& slots, const Layer& layer,
              const Weights* weights) {
  static thread_local Call<T> call;
  find_blocks(slots.const_data_ptr<int64_t>(), x.size(0), layer.slots, call.blocks);
  if (call.blocks.empty()) return;
  call.slices.clear();
  call.h_width = 0;
  for (int64_t s = 0; s < layer.slices; ++s) {
    const Weights& w = weights[s];
    const auto *a = reinterpret_cast<const T*>(w.a), *b = reinterpret_cast<const T*>(w.b);
    call.slices.push_back({a, b, w.rank, w.out, call.h_width, w.y_at});
    call.h_width += (w.rank + Chunk<T>::size - 1) / Chunk<T>::size * Chunk<T>::size;
  }
  call.y = static_cast<T*>(y.data_ptr());
  call.x = static_cast<const T*>(x.const_data_ptr());
  call.y_stride = y.stride(0);
  call.x_stride = x.stride(0);
  call.in = layer.in;
  call.h.assign(call.blocks.size() * kRows * call.h_width, 0.f);
  run(call);
}

void add(const at::Tensor& y, const at::Tensor& x, const at::Tensor& slots, const Layer& layer,
         const Weights* weights) {
  const Weights& last = weights[layer.slices - 1];
  TORCH_CHECK(int64_t(x.scalar_type()) == layer.dtype && y.scalar_type() == x.scalar_type() &&
                  slots.dtype() == at::kLong,
              "add_lora_rows_: x and y must have the weights' dtype ", at::ScalarType(layer.dtype),
              ", and slots be int64; they are ", x.scalar_type(), ", ", y.scalar_type(), " and ", slots.scalar_type());
  TORCH_CHECK(x.dim() == 2 && y.dim() == 2 && slots.dim() == 1 && y.size(0) == x.size(0) &&
                  slots.size(0) >= x.size(0) && x.size(1) == layer.in && y.size(1) >= last.y_at + last.out,
              "add_lora_rows_: want x [n, ", layer.in, "], y [n, >= ", last.y_at + last.out, "], slots [>= n]; got ",
              x.sizes(), y.sizes(), slots.sizes());
  TORCH_CHECK((x.size(1) < 2 || x.stride(1) == 1) && (y.size(1) < 2 || y.stride(1) == 1) && slots.is_contiguous(),
              "add_lora_rows_: the rows of x and y, and slots, must be contiguous; strides are ", x.strides(), ", ",
              y.strides(), " and ", slots.strides());
  if (x.scalar_type() == at::kFloat)
    add_rows<float>(y, x, slots, layer, weights);
  else
    add_rows<bf16>(y, x, slots, layer, weights);
}

// One row of a table of layers, for B that lies rank by rank (a transposed view). The caller keeps the tensors alive
// for as long as it uses the row, and pads rows to the same length.
std::vector<int64_t> lora_layer(at::TensorList a, at::TensorList b, at::IntArrayRef output_slices) {
  TORCH_CHECK(!a.empty() && a.size() == b.size() && a.size() == output_slices.size(),
              "add_lora_rows_: lora_a, lora_b and output_slices must have one entry a slice, and at least one");
  const auto dtype = a[0].scalar_type();
  TORCH_CHECK(dtype == at::kFloat || dtype == at::kBFloat16, "add_lora_rows_: lora_a is ", dtype,
              ", allowed are float32 and bfloat16");
  const int64_t slots = a[0].size(0), in = a[0].size(-1);
  std::vector<int64_t> entry{int64_t(dtype), slots, in, int64_t(a.size())};
  int64_t y_at = 0;
  for (size_t s = 0; s < a.size(); ++s) {
    const int64_t rank = a[s].size(-2), out = b[s].size(-2);
    TORCH_CHECK(a[s].scalar_type() == dtype && b[s].scalar_type() == dtype && a[s].is_contiguous() &&
                    b[s].transpose(-2, -1).is_contiguous() && a[s].size(0) == slots && b[s].size(0) == slots &&
                    a[s].size(-1) == in &&
                    b[s].size(-1) == rank && a[s].numel() == slots * rank * in && b[s].numel() == slots * out * rank &&
                    out <= output_slices[s],
                "add_lora_rows_: slice ", s, ": want ", dtype, " A [", slots, ", 1, rank, ", in,
                "], contiguous, and B [", slots, ", 1, <= ", output_slices[s],
                ", rank], contiguous if transposed; got ",
                a[s].scalar_type(), a[s].sizes(), a[s].strides(), " and ", b[s].scalar_type(), b[s].sizes(),
                b[s].strides());
    for (int64_t field : {int64_t(a[s].const_data_ptr()), int64_t(b[s].const_data_ptr()), rank, out, y_at})
      entry.push_back(field);
    y_at += output_slices[s];
  }
  return entry;
}

const Weights* slices_of(const int64_t* entry) { return reinterpret_cast<const Weights*>(entry + sizeof(Layer) / 8); }

void add_lora_rows_(at::Tensor y, const at::Tensor& x, const at::Tensor& slots, at::TensorList lora_a,
                    at::TensorList lora_b, at::IntArrayRef output_slices) {
  std::vector<at::Tensor> by_rank;
  for (const auto& b : lora_b) by_rank.push_back(b.transpose(-2, -1).contiguous().transpose(-2, -1));
  const auto entry = lora_layer(lora_a, by_rank, output_slices);
  add(y, x, slots, *reinterpret_cast<const Layer*>(entry.data()), slices_of(entry.data()));
}

void add_lora_layer_(at::Tensor y, const at::Tensor& x, const at::Tensor& slots, const at::Tensor& layers,
                     int64_t index) {
  TORCH_CHECK(layers.dim() == 2 && layers.is_contiguous() && index >= 0 && index < layers.size(0),
              "add_lora_layer_: want a table [layers, fields] and an index into it; got ", layers.sizes(), ", ", index);
  const int64_t* entry = layers.const_data_ptr<int64_t>() + index * layers.size(1);
  add(y, x, slots, *reinterpret_cast<const Layer*>(entry), slices_of(entry));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(vllm_idlm, library) {
  library.def(
      "add_lora_rows_(Tensor(a!) y, Tensor x, Tensor slots, Tensor[] lora_a, Tensor[] lora_b, int[] output_slices)"
      " -> ()");
  library.def("add_lora_layer_(Tensor(a!) y, Tensor x, Tensor slots, Tensor layers, int index) -> ()");
  library.def("lora_layer(Tensor[] lora_a, Tensor[] lora_b, int[] output_slices) -> int[]", &lora_layer);
}

TORCH_LIBRARY_IMPL(vllm_idlm, CPU, library) {
  library.impl("add_lora_rows_", &add_lora_rows_);
  library.impl("add_lora_layer_", &add_lora_layer_);
}
