// Attention of extra mask rows on the CPU: the oracle, its mathematics and its shapes are in naive.py beside this file.
//
// A task is one request, one key head and one stretch of the keys: all rows and query heads of it against those keys.
// Keys are taken in strips of 32, turned to float32 once for all rows; scores and outputs are small float32 products
// with an online softmax between them. Stretches are cut at fixed places and joined in order by their log-sum-exp, so
// a row's result never depends on the other requests of the batch, nor on the number of threads.
// The vectors are the compiler's (GCC and Clang): one source for AVX-512, AVX2 and NEON. Little-endian machines only.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace {

constexpr int kLanes = 16;
constexpr int kStrip = 32;       // keys of a strip: two vectors
constexpr int kStretch = 128;    // keys of a task
constexpr int kTile = 6;         // rows of the small product kept in registers
constexpr float kNone = -std::numeric_limits<float>::infinity();
// Vectors are read and written through these types: a memcpy of 64 bytes goes by way of the stack with GCC.
typedef float f32v __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t i32v __attribute__((vector_size(64), aligned(4)));
typedef uint32_t u32v __attribute__((vector_size(64), aligned(4)));
typedef uint16_t u16v __attribute__((vector_size(32), aligned(2), may_alias));

using bf16 = uint16_t;  // the bits of a bfloat16

inline f32v load(const float* from) { return *reinterpret_cast<const f32v*>(from); }

inline f32v load(const bf16* from) {
  return (f32v)(__builtin_convertvector(*reinterpret_cast<const u16v*>(from), u32v) << 16);
}

inline void store(float* to, f32v v) { *reinterpret_cast<f32v*>(to) = v; }

inline void put(float* to, float v) { *to = v; }

inline void put(bf16* to, float v) {  // to the nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  *to = std::isnan(v) ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

// e^x for x <= 0, to about 2 units in the last place; 0 from -87 down (also at -inf).
inline f32v exp_negative(f32v x) {
  const f32v floor_at = f32v{} - 87.0f;
  const i32v dead = x < floor_at;
  x = dead ? floor_at : x;
  const f32v scaled = x * 1.44269504f;
  const i32v whole = __builtin_convertvector(scaled - 0.5f, i32v);  // towards zero: rounds a negative number
  const f32v n = __builtin_convertvector(whole, f32v);
  const f32v r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  f32v p = f32v{} + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const f32v made = p * (f32v)((whole + 127) << 23);
  return dead ? f32v{} : made;
}

// c [R, NV vectors] += a [R, depth] b [depth, NV vectors]
template <int R, int NV>
inline void product(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t depth) {
  f32v acc[R][NV];
  for (int r = 0; r < R; r++)
    for (int v = 0; v < NV; v++) acc[r][v] = load(c + r * ldc + v * kLanes);
  for (int64_t k = 0; k < depth; k++) {
    f32v right[NV];
    for (int v = 0; v < NV; v++) right[v] = load(b + k * ldb + v * kLanes);
    for (int r = 0; r < R; r++)
      for (int v = 0; v < NV; v++) acc[r][v] += a[r * lda + k] * right[v];
  }
  for (int r = 0; r < R; r++)
    for (int v = 0; v < NV; v++) store(c + r * ldc + v * kLanes, acc[r][v]);
}

template <int NV>
void product_rows(int64_t rows, const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc,
                  int64_t depth) {
  int64_t r = 0;
  for (; r + kTile <= rows; r += kTile)
    product<kTile, NV>(a + r * lda, lda, b, ldb, c + r * ldc, ldc, depth);
  a += r * lda;
  c += r * ldc;
  switch (rows - r) {
    case 5: return product<5, NV>(a, lda, b, ldb, c, ldc, depth);
    case 4: return product<4, NV>(a, lda, b, ldb, c, ldc, depth);
    case 3: return product<3, NV>(a, lda, b, ldb, c, ldc, depth);
    case 2: return product<2, NV>(a, lda, b, ldb, c, ldc, depth);
    case 1: return product<1, NV>(a, lda, b, ldb, c, ldc, depth);
  }
}

struct Shape {
  int64_t heads, key_heads, size, block;  // size: of a head
  int64_t key_block, key_head, key_size;  // strides of the key cache; its tokens lie side by side
  int64_t value_block, value_head, value_token;
  int64_t query_row, output_row;
};

struct Rows {  // of one request
  const int32_t *query_row, *visible, *own_first, *own_end;
  int64_t count;
};

// Running softmax of M = rows * group score rows: maximum, sum and weighted values, which follow each other in `state`.
struct State {
  float *maximum, *sum, *out;
  State(float* at, int64_t scores) : maximum(at), sum(at + scores), out(at + 2 * scores) {}
  static int64_t floats(int64_t scores, int64_t size) { return scores * (size + 2); }
};

// Scores of one strip, masked where a row does not see a key: `first` is the strip's first place in the sequence.
inline void hide(float* scores, const Rows& rows, int64_t group, int64_t first) {
  for (int64_t i = 0; i < rows.count; i++) {
    if (rows.visible[i] >= first + kStrip) continue;
    for (int64_t t = 0; t < kStrip; t++) {
      const int64_t place = first + t;
      if (place < rows.visible[i] || (place >= rows.own_first[i] && place < rows.own_end[i])) continue;
      for (int64_t g = 0; g < group; g++) scores[(i * group + g) * kStrip + t] = kNone;
    }
  }
}

// The lanes of a vector joined into one, halves onto each other, four times.
template <typename F>
inline float fold(f32v v, F&& join) {
  v = join(v, __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
  v = join(v, __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));
  v = join(v, __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));
  v = join(v, __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14));
  return v[0];
}

inline f32v larger(f32v a, f32v b) { return a > b ? a : b; }

// Scores become weights under the new maximum; what was summed under the old one is scaled.
inline void weigh(float* scores, State& state, int64_t count, int64_t size) {
  for (int64_t m = 0; m < count; m++) {
    float* row = scores + m * kStrip;
    const float most = std::max(state.maximum[m], fold(larger(load(row), load(row + kLanes)), larger));
    if (most == kNone) {
      std::fill(row, row + kStrip, 0.0f);
      continue;
    }
    if (most != state.maximum[m]) {
      const float scale = std::exp(state.maximum[m] - most);
      state.maximum[m] = most;
      state.sum[m] *= scale;
      for (int64_t d = 0; d < size; d++) state.out[m * size + d] *= scale;
    }
    f32v sum = {};
    for (int v = 0; v < kStrip; v += kLanes) {
      const f32v weight = exp_negative(load(row + v) - most);
      store(row + v, weight);
      sum += weight;
    }
    state.sum[m] += fold(sum, [](f32v a, f32v b) { return a + b; });
  }
}

template <typename T>
void stretch(const Shape& s, const T* key, const T* value, const int32_t* table, const Rows& rows, const float* query,
             int64_t first, int64_t end, State& state, std::vector<float>& room) {
  const int64_t group = s.heads / s.key_heads, count = rows.count * group;
  room.resize(2 * s.size * kStrip + count * kStrip);
  float *keys = room.data(), *values = keys + s.size * kStrip, *scores = values + s.size * kStrip;
  std::fill(state.maximum, state.maximum + count, kNone);
  std::fill(state.sum, state.sum + count * (s.size + 1), 0.0f);
  for (int64_t place = first; place < end; place += kStrip) {
    const int64_t block = table[place / s.block], token = place % s.block;
    const T* k = key + block * s.key_block + token;
    const T* v = value + block * s.value_block + token * s.value_token;
    for (int64_t d = 0; d < s.size; d++)
      for (int t = 0; t < kStrip; t += kLanes) store(keys + d * kStrip + t, load(k + d * s.key_size + t));
    // Behind the last key the cache holds anything, also NaN, which a weight of 0 would not silence.
    const int64_t real = std::min<int64_t>(kStrip, end - place);
    for (int64_t t = 0; t < real; t++)
      for (int64_t d = 0; d < s.size; d += kLanes) store(values + t * s.size + d, load(v + t * s.value_token + d));
    std::fill(values + real * s.size, values + kStrip * s.size, 0.0f);
    std::fill(scores, scores + count * kStrip, 0.0f);
    product_rows<kStrip / kLanes>(count, query, s.size, keys, kStrip, scores, kStrip, s.size);
    hide(scores, rows, group, place);
    weigh(scores, state, count, s.size);
    int64_t d = 0;
    for (; d + 2 * kLanes <= s.size; d += 2 * kLanes)
      product_rows<2>(count, scores, kStrip, values + d, s.size, state.out + d, s.size, kStrip);
    if (d < s.size) product_rows<1>(count, scores, kStrip, values + d, s.size, state.out + d, s.size, kStrip);
  }
}

// The output of one request and key head: its stretches joined, in order.
template <typename T>
void join(const Shape& s, const Rows& rows, int64_t head, const float* parts, int64_t stretches, T* output) {
  const int64_t group = s.heads / s.key_heads, count = rows.count * group, floats = State::floats(count, s.size);
  std::vector<float> scale(stretches);
  for (int64_t m = 0; m < count; m++) {
    if (rows.query_row[m / group] < 0) continue;
    float most = kNone, sum = 0;
    for (int64_t p = 0; p < stretches; p++) most = std::max(most, parts[p * floats + m]);
    for (int64_t p = 0; p < stretches; p++) {
      scale[p] = std::exp(parts[p * floats + m] - most);
      sum += scale[p] * parts[p * floats + count + m];
    }
    T* to = output + rows.query_row[m / group] * s.output_row + (head * group + m % group) * s.size;
    for (int64_t d = 0; d < s.size; d++) {
      float total = 0;
      for (int64_t p = 0; p < stretches; p++)
        if (scale[p] > 0) total += scale[p] * parts[p * floats + 2 * count + m * s.size + d];
      put(to + d, total / sum);
    }
  }
}

struct Task {
  int64_t request, head, first, end, at;  // at: of its state in the workspace
};

template <typename T>
void run(T* output, const T* query, const T* key, const T* value, const int32_t* table, int64_t table_width,
         const int32_t* starts, int64_t requests, const int32_t* fields, int64_t total, const Shape& s, float scale) {
  const int64_t group = s.heads / s.key_heads;
  const auto rows_of = [&](int64_t r) {
    const int64_t first = starts[r];
    return Rows{fields + first, fields + total + first, fields + 2 * total + first, fields + 3 * total + first,
                starts[r + 1] - first};
  };
  std::vector<Task> tasks;
  std::vector<int64_t> outputs;  // the first task of each request and head
  int64_t floats = 0;
  for (int64_t r = 0; r < requests; r++) {
    const Rows rows = rows_of(r);
    if (rows.count == 0) continue;
    int64_t end = 0;
    for (int64_t i = 0; i < rows.count; i++) end = std::max<int64_t>({end, rows.visible[i], rows.own_end[i]});
    for (int64_t head = 0; head < s.key_heads; head++) {
      outputs.push_back(tasks.size());
      for (int64_t first = 0; first < end; first += kStretch) {
        tasks.push_back({r, head, first, std::min(end, first + kStretch), floats});
        floats += State::floats(rows.count * group, s.size);
      }
    }
  }
  outputs.push_back(tasks.size());
  std::vector<float> states(floats);
  at::parallel_for(0, tasks.size(), 1, [&](int64_t begin, int64_t end) {
    std::vector<float> room, own;
    for (int64_t i = begin; i < end; i++) {
      const Task& task = tasks[i];
      const Rows rows = rows_of(task.request);
      own.assign(rows.count * group * s.size, 0.0f);
      for (int64_t m = 0; m < rows.count * group; m++) {
        if (rows.query_row[m / group] < 0) continue;  // its scores are hidden, whatever they are
        const T* from = query + rows.query_row[m / group] * s.query_row + (task.head * group + m % group) * s.size;
        for (int64_t d = 0; d < s.size; d += kLanes) store(own.data() + m * s.size + d, load(from + d) * scale);
      }
      State state(states.data() + task.at, rows.count * group);
      stretch(s, key + task.head * s.key_head, value + task.head * s.value_head, table + task.request * table_width,
              rows, own.data(), task.first, task.end, state, room);
    }
  });
  at::parallel_for(0, outputs.size() - 1, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      if (outputs[i] == outputs[i + 1]) continue;
      const Task& task = tasks[outputs[i]];
      join(s, rows_of(task.request), task.head, states.data() + task.at, outputs[i + 1] - outputs[i], output);
    }
  });
}

void tail_attention_(at::Tensor output, const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                     const at::Tensor& block_table, const at::Tensor& starts, const at::Tensor& rows, double scale) {
  const auto rows_whole = [](const at::Tensor& t) {
    return t.dim() == 3 && t.stride(2) == 1 && t.stride(1) == t.size(2);
  };
  TORCH_CHECK(rows_whole(query) && rows_whole(output) && output.sizes() == query.sizes(),
              "tail_attention_: query and output must be [T, heads, size], each row in one piece; got ", query.sizes(),
              query.strides(), " and ", output.sizes(), output.strides());
  TORCH_CHECK(key.dim() == 4 && value.dim() == 4 && key.sizes() == value.sizes(),
              "tail_attention_: key and value must be [blocks, heads, tokens, size]; got ", key.sizes(), value.sizes());
  const Shape s{query.size(1), key.size(1),   key.size(3),     key.size(2),     key.stride(0),
                key.stride(1), key.stride(3), value.stride(0), value.stride(1), value.stride(2),
                query.stride(0), output.stride(0)};
  TORCH_CHECK(s.heads % s.key_heads == 0 && s.size == query.size(2) && s.size % kLanes == 0 && s.block % kStrip == 0 &&
                  key.stride(2) == 1 && value.stride(3) == 1,
              "tail_attention_: want whole groups of heads, head sizes in multiples of 16, blocks in multiples of 32, "
              "a key cache with its tokens and a value cache with its elements side by side; got query ",
              query.sizes(), ", key ", key.sizes(), key.strides(), ", value ", value.strides());
  TORCH_CHECK(rows.dim() == 2 && rows.size(0) == 4 && rows.is_contiguous() && starts.is_contiguous() &&
                  block_table.dim() == 2 && block_table.stride(1) == 1 && starts.size(0) == block_table.size(0) + 1,
              "tail_attention_: want rows [4, E], starts [R + 1] and block_table [R, blocks]; got ", rows.sizes(),
              starts.sizes(), block_table.sizes());
  const auto call = [&](auto* out, const auto* q, const auto* k, const auto* v) {
    run(out, q, k, v, block_table.const_data_ptr<int32_t>(), block_table.stride(0), starts.const_data_ptr<int32_t>(),
        block_table.size(0), rows.const_data_ptr<int32_t>(), rows.size(1), s, static_cast<float>(scale));
  };
  if (query.scalar_type() == at::kFloat && key.scalar_type() == at::kFloat) {
    call(output.mutable_data_ptr<float>(), query.const_data_ptr<float>(), key.const_data_ptr<float>(),
         value.const_data_ptr<float>());
  } else {
    TORCH_CHECK(query.scalar_type() == at::kBFloat16 && key.scalar_type() == at::kBFloat16,
                "tail_attention_: float32 or bfloat16, the same for queries and cache; got ", query.scalar_type(),
                " and ", key.scalar_type());
    const auto bits = [](const at::Tensor& t) { return static_cast<const bf16*>(t.const_data_ptr()); };
    call(static_cast<bf16*>(output.mutable_data_ptr()), bits(query), bits(key), bits(value));
  }
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(vllm_idlm, library) {
  library.def(
      "tail_attention_(Tensor(a!) output, Tensor query, Tensor key, Tensor value, Tensor block_table, Tensor starts,"
      " Tensor rows, float scale) -> ()");
}

TORCH_LIBRARY_IMPL(vllm_idlm, CPU, library) { library.impl("tail_attention_", &tail_attention_); }
