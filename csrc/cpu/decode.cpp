// A step of a decode, from the tokens to the logits, in one loop over threads; and the two parts of a layer, before and
// after its attention, for few rows whose keys and values are kept elsewhere. The products, whose speed is that of
// reading the weights once, are dealt by outputs; what is small, the norms of a few rows, every thread computes for
// itself, so that the threads wait for each other five times a layer. It is the other kernels of this folder on parts
// of their tensors, so the results are bitwise those of the ops that multiply by gemv, and of each row alone, for every
// number of threads. Derivation: docs/block.md.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

#include "../dispatch.h"
#include "parallel.h"
#include "simd.h"

namespace llama_fast::cpu {
namespace {

// Head dims of the attention, as in llama_fast/ops/table.py.
constexpr int64_t kLeastHeadDim = 16, kMostHeadDim = 256, kHeadDimStep = 8;
constexpr int64_t kGrainElements = 32768;  // of a layer's smallest group of products, a thread's least share
// bfloat16 of x that gemv reads from the first cache again and again, on a Zen 5: a core's 20 GB/s of W for 8 x 768
// beside 13 of oneDNN, 10 beside 17 for 8 x 4096. In float32 it is the faster one throughout.
constexpr int64_t kCached = 8192;
constexpr int64_t kLine = 64;   // bytes of a cache line
constexpr int64_t kGrain = 16;  // outputs of a product, a part's least: a cache line of float32

int64_t item_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

// Contiguous tensors, each on cache lines of its own, from one piece of memory; where there is none, they are counted.
class Arena {
 public:
  explicit Arena(char* memory) : memory_(memory) {}
  Tensor make(DType dtype, std::initializer_list<int64_t> sizes) {
    Tensor t;
    t.data = memory_ == nullptr ? nullptr : memory_ + bytes_;
    t.dtype = dtype;
    for (const int64_t size : sizes) t.size[t.ndim++] = size;
    int64_t count = 1;
    for (int i = t.ndim - 1; i >= 0; --i) {
      t.stride[i] = count;
      count *= t.size[i];
    }
    bytes_ += (count * item_of(dtype) + kLine - 1) / kLine * kLine;
    return t;
  }
  int64_t bytes() const { return bytes_; }

 private:
  char* memory_;
  int64_t bytes_ = 0;
};

// The part [begin, end) of dimension `dim`.
Tensor narrow(const Tensor& a, int dim, int64_t begin, int64_t end) {
  Tensor t = a;
  t.data = a.ptr<char>() + begin * a.stride[dim] * item_of(a.dtype);
  t.size[dim] = end - begin;
  return t;
}

// Heads [begin, end) of row r of [R, heads D] as [1, 1, end - begin, D].
Tensor heads_of(const Tensor& rows, int64_t r, int64_t begin, int64_t end, int64_t D) {
  Tensor t = narrow(narrow(rows, 0, r, r + 1), 1, begin * D, end * D);
  t.ndim = 4;
  t.size[0] = t.size[1] = 1, t.size[2] = end - begin, t.size[3] = D;
  t.stride[0] = t.stride[1] = rows.stride[0], t.stride[2] = D, t.stride[3] = 1;
  return t;
}

void expect(const char* name, const Tensor& t, DType dtype, std::initializer_list<int64_t> sizes) {
  const bool fits = t.data != nullptr && t.dtype == dtype && t.ndim == static_cast<int>(sizes.size()) &&
                    std::equal(sizes.begin(), sizes.end(), t.size) && t.stride[t.ndim - 1] == 1;
  if (!fits) throw std::invalid_argument(std::string("decode: ") + name + " has another shape, dtype or gaps");
}

template <class T>
void add(const T* a, T* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = from_float<T>(to_float(to[i]) + to_float(a[i]));
}

struct Sizes {
  int64_t R, C, HD, GD, F, V, D;
};

// What the threads share: written in one loop, read in later ones.
struct Shared {
  Tensor x, y, q, k, v, out, attended, gate, up, act;
  Shared(Arena& arena, DType dtype, const Sizes& n)
      : x(arena.make(dtype, {n.R, n.C})),
        y(arena.make(dtype, {n.R, n.C})),
        q(arena.make(dtype, {n.R, n.HD})),
        k(arena.make(dtype, {n.R, n.GD})),
        v(arena.make(dtype, {n.R, n.GD})),
        out(arena.make(dtype, {n.R, n.HD})),
        attended(arena.make(dtype, {n.R, n.C})),
        gate(arena.make(dtype, {n.R, n.F})),
        up(arena.make(dtype, {n.R, n.F})),
        act(arena.make(dtype, {n.R, n.F})) {}
};

// What a thread has for itself.
struct Own {
  Tensor normed, h, rstd, turned, lse, scratch;
  Own(Arena& arena, DType dtype, const Sizes& n)
      : normed(arena.make(dtype, {n.R, n.C})),
        h(arena.make(dtype, {n.R, n.C})),
        rstd(arena.make(DType::f32, {std::max(n.R, n.HD / n.GD)})),
        turned(arena.make(dtype, {1, n.HD / n.GD * n.D})),
        lse(arena.make(DType::f32, {1, n.HD / n.GD, 1})),
        scratch(arena.make(DType::f32, {attention_few_scratch(n.D)})) {}
};

// One thread's way through the model. `x` and `y` change roles from layer to layer, so that what one loop reads is not
// written before the next.
class Thread {
 public:
  Thread(const Sizes& sizes, const Shared& shared, const Own& own, const Loops& loops)
      : n_(sizes), s_(shared), own_(own), loops_(loops), x_(shared.x), y_(shared.y) {}

  void embed(const Tensor& table, const int64_t* tokens) {
    loops_.run(
        n_.R, n_.R, [] {},
        [&](int64_t, int64_t) {
          const auto bytes = static_cast<size_t>(n_.C * item_of(table.dtype));
          for (int64_t r = 0; r < n_.R; ++r)
            std::memcpy(narrow(x_, 0, r, r + 1).data, narrow(table, 0, tokens[r], tokens[r] + 1).data, bytes);
        });
  }

  void layer(const DecodeLayer& w, const Tensor& cos, const Tensor& sin, int64_t used, const int64_t* starts) {
    project(w, x_, s_.v);
    const int64_t groups = n_.GD / n_.D;
    loops_.run(
        n_.R * groups, 1, [] {},
        [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i)
            attend(w, cos, sin, used, i / groups, i % groups, starts == nullptr ? 0 : starts[i / groups]);
        });
    finish(w, x_, s_.out, y_);
    std::swap(x_, y_);
  }

  // q and k of x, before their norms and rotary, and v.
  void project(const DecodeLayer& w, const Tensor& x, const Tensor& v) {
    const Tensor in[] = {w.wq, w.wk, w.wv}, bias[] = {w.bq, w.bk, w.bv}, qkv[] = {s_.q, s_.k, v};
    loops_.run(
        n_.HD + 2 * n_.GD, kGrain, [&] { rms_norm_fwd(x, w.norm1, w.eps, own_.normed, own_.rstd); },
        [&](int64_t begin, int64_t end) {
          for (int i = 0; i < 3; begin -= in[i].size[0], end -= in[i].size[0], ++i) {
            const int64_t from = std::max<int64_t>(begin, 0), to = std::min(end, in[i].size[0]);
            if (from < to) multiply(own_.normed, in[i], qkv[i], from, to);
            if (from < to && bias[i].data != nullptr) add_to_rows(bias[i], qkv[i], from, to);
          }
        });
  }

  // q and k after rotary; cos, sin: [1 or B, T, D/2] for R = B T rows.
  void turn(const DecodeLayer& w, const Tensor& cos, const Tensor& sin, const Tensor& q, const Tensor& k) {
    const int64_t D = n_.D, groups = n_.GD / D, rep = n_.HD / n_.GD, T = cos.size[1];
    loops_.run(
        n_.R * groups, 1, [] {},
        [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i) {
            const int64_t r = i / groups, g = i % groups;
            const auto angles = [&](const Tensor& table) {
              const int64_t row = cos.size[0] == 1 ? 0 : r / T;
              return narrow(narrow(table, 0, row, row + 1), 1, r % T, r % T + 1);
            };
            norm_heads(w, r, g);
            rope_fwd(heads_of(s_.q, r, g * rep, (g + 1) * rep, D), heads_of(s_.k, r, g, g + 1, D), angles(cos),
                     angles(sin), w.interleaved, heads_of(q, r, g * rep, (g + 1) * rep, D),
                     heads_of(k, r, g, g + 1, D));
          }
        });
  }

  // y, the layer's result for x, whose attention gave `out`.
  void finish(const DecodeLayer& w, const Tensor& x, const Tensor& out, const Tensor& y) {
    loops_.run(n_.C, kGrain, [] {}, [&](int64_t begin, int64_t end) { multiply(out, w.wo, s_.attended, begin, end); });
    bool normed = false;
    const auto norm = [&] {
      if (!normed) add_rms_norm_fwd(s_.attended, x, w.norm2, w.eps, own_.normed, own_.h, own_.rstd);
      normed = true;
    };
    loops_.run(n_.F, kGrain, norm, [&](int64_t begin, int64_t end) {
      multiply(own_.normed, w.wgate, s_.gate, begin, end);
      multiply(own_.normed, w.wup, s_.up, begin, end);
      swiglu_fwd(narrow(s_.gate, 1, begin, end), narrow(s_.up, 1, begin, end), narrow(s_.act, 1, begin, end));
    });
    loops_.run(n_.C, kGrain, norm, [&](int64_t begin, int64_t end) {
      multiply(s_.act, w.wdown, y, begin, end);
      with_dtype(y.dtype, [&](auto tag) {
        using T = decltype(tag);
        for (int64_t r = 0; r < n_.R; ++r)
          add(own_.h.ptr<T>() + r * n_.C + begin, y.ptr<T>() + r * n_.C + begin, end - begin);
      });
    });
  }

  void logits(const Tensor& norm, double eps, const Tensor& head, const Tensor& logits) {
    loops_.run(
        n_.V, kGrain, [&] { rms_norm_fwd(x_, norm, eps, own_.normed, own_.rstd); },
        [&](int64_t begin, int64_t end) { multiply(own_.normed, head, logits, begin, end); });
  }

 private:
  // Outputs [begin, end) of x W^T.
  static void multiply(const Tensor& x, const Tensor& weight, const Tensor& y, int64_t begin, int64_t end) {
    gemv(x, narrow(weight, 0, begin, end), narrow(y, 1, begin, end));
  }

  // Outputs [begin, end) of every row of y, plus the bias.
  void add_to_rows(const Tensor& bias, const Tensor& y, int64_t begin, int64_t end) const {
    with_dtype(y.dtype, [&](auto tag) {
      using T = decltype(tag);
      for (int64_t r = 0; r < n_.R; ++r) add(bias.ptr<T>() + begin, y.ptr<T>() + r * y.stride[0] + begin, end - begin);
    });
  }

  // The norms, if there are any, of key head g of row r and its query heads, in place.
  void norm_heads(const DecodeLayer& w, int64_t r, int64_t g) const {
    if (w.normq.data == nullptr) return;
    const int64_t D = n_.D, rep = n_.HD / n_.GD;
    for (const auto& [heads, gain, first, count] :
         {std::tuple{s_.q, w.normq, g * rep, rep}, std::tuple{s_.k, w.normk, g, int64_t{1}}}) {
      Tensor rows = narrow(narrow(heads, 0, r, r + 1), 1, first * D, (first + count) * D);
      rows.size[0] = count, rows.size[1] = D, rows.stride[0] = D;
      rms_norm_fwd(rows, gain, w.eps, rows, own_.rstd);
    }
  }

  // Key/value head g of row r, and its query heads.
  void attend(const DecodeLayer& w, const Tensor& cos, const Tensor& sin, int64_t used, int64_t r, int64_t g,
              int64_t start) const {
    const int64_t D = n_.D, rep = n_.HD / n_.GD, end = used + 1;
    const auto cached = [&](const Tensor& cache, int64_t begin) {
      return narrow(narrow(narrow(cache, 0, r, r + 1), 1, begin, end), 2, g, g + 1);
    };
    const Tensor turned = heads_of(own_.turned, 0, 0, rep, D), out = heads_of(s_.out, r, g * rep, (g + 1) * rep, D);
    norm_heads(w, r, g);
    rope_fwd(heads_of(s_.q, r, g * rep, (g + 1) * rep, D), heads_of(s_.k, r, g, g + 1, D), cos, sin, w.interleaved,
             turned, cached(w.k_cache, used));
    const auto bytes = static_cast<size_t>(D * item_of(out.dtype));
    std::memcpy(cached(w.v_cache, used).data, heads_of(s_.v, r, g, g + 1, D).data, bytes);
    if (start < end)
      attention_few(turned, cached(w.k_cache, start), cached(w.v_cache, start), 1.0 / std::sqrt(static_cast<double>(D)),
                    w.window, out, own_.lse, own_.scratch.ptr<float>());
    else
      std::memset(out.data, 0, bytes * static_cast<size_t>(rep));
  }

  const Sizes& n_;
  const Shared& s_;
  const Own& own_;
  Loops loops_;
  Tensor x_, y_;
};

// Calls body(thread) on each thread of a team that has room, in `memory`, for `loops` loops over layers of this size.
template <class Body>
void in_room(const Sizes& sizes, DType dtype, int64_t loops, std::vector<char>& memory, const Body& body) {
  const int64_t least = std::min(sizes.HD + 2 * sizes.GD, 2 * sizes.F) * sizes.C;
  const int64_t threads = std::clamp<int64_t>(least / kGrainElements, 1, max_threads());
  Arena for_all(nullptr), for_one(nullptr);
  static_cast<void>(Shared(for_all, dtype, sizes)), static_cast<void>(Own(for_one, dtype, sizes));
  const int64_t of_counts = loops * static_cast<int64_t>(sizeof(Loops::Counts));
  memory.resize(static_cast<size_t>(of_counts + for_all.bytes() + threads * for_one.bytes() + kLine));
  char* const begin = memory.data() + (kLine - reinterpret_cast<uintptr_t>(memory.data()) % kLine) % kLine;
  auto* const counts = reinterpret_cast<Loops::Counts*>(begin);
  Arena arena(begin + of_counts);
  const Shared shared(arena, dtype, sizes);
  std::vector<Own> owns;
  for (int64_t i = 0; i < threads; ++i) owns.emplace_back(arena, dtype, sizes);
  for (int64_t i = 0; i < loops; ++i) new (counts + i) Loops::Counts;
  in_team(threads, [&](int64_t index, int64_t count) {
    Thread thread(sizes, shared, owns[static_cast<size_t>(index)], Loops(counts, count));
    body(thread);
  });
}

// Of a layer's weights and R rows in one dtype; throws where they do not fit each other, or the kernels.
Sizes sizes_of(const DecodeLayer& w, DType dtype, int64_t R, int64_t D) {
  if (dtype != DType::f32 && dtype != DType::bf16 && dtype != DType::f16)
    throw std::invalid_argument("decode: not float32, bfloat16 or float16");
  const int64_t C = w.norm1.size[0], HD = w.wq.size[0], GD = w.wk.size[0], F = w.wgate.size[0];
  if (R < 1 || R > kGemvRows || (R > 4 && dtype == DType::bf16 && R * C > kCached))
    throw std::invalid_argument("decode: more rows than gemv is made for");
  if (D < kLeastHeadDim || D > kMostHeadDim || D % kHeadDimStep != 0 || GD < D || GD % D != 0 || HD % GD != 0 ||
      HD < GD || C < 1 || F < 1)
    throw std::invalid_argument("decode: heads or sizes that the ops one by one must take");
  for (const Tensor* gain : {&w.norm1, &w.norm2}) expect("norm1 or norm2", *gain, dtype, {C});
  expect("wq", w.wq, dtype, {HD, C});
  expect("wk", w.wk, dtype, {GD, C});
  expect("wv", w.wv, dtype, {GD, C});
  expect("wo", w.wo, dtype, {C, HD});
  expect("wgate", w.wgate, dtype, {F, C});
  expect("wup", w.wup, dtype, {F, C});
  expect("wdown", w.wdown, dtype, {C, F});
  if (w.bq.data != nullptr) expect("bq", w.bq, dtype, {HD});
  for (const Tensor* bias : {&w.bk, &w.bv})
    if (bias->data != nullptr) expect("bk or bv", *bias, dtype, {GD});
  if (w.normq.data != nullptr || w.normk.data != nullptr)
    for (const Tensor* gain : {&w.normq, &w.normk}) expect("normq or normk", *gain, dtype, {D});
  return {R, C, HD, GD, F, 0, D};
}

}  // namespace

void block_before(const Tensor& x, const DecodeLayer& w, const Tensor& cos, const Tensor& sin, const Tensor& q,
                  const Tensor& k, const Tensor& v) {
  const Sizes sizes = sizes_of(w, x.dtype, x.size[0], 2 * cos.size[2]);
  const int64_t R = sizes.R;
  expect("x", x, x.dtype, {R, sizes.C});
  expect("q", q, x.dtype, {R, sizes.HD});
  for (const Tensor* t : {&k, &v}) expect("k or v", *t, x.dtype, {R, sizes.GD});
  const int64_t tables = cos.size[0], T = cos.size[1];
  if (T < 1 || R % T != 0 || (tables != 1 && tables != R / T))
    throw std::invalid_argument("decode: cos is for other rows");
  for (const Tensor* t : {&cos, &sin}) expect("cos or sin", *t, DType::f32, {tables, T, sizes.D / 2});
  std::vector<char> memory;
  in_room(sizes, x.dtype, 2, memory, [&](Thread& thread) {
    thread.project(w, x, v);
    thread.turn(w, cos, sin, q, k);
  });
}

void block_after(const Tensor& out, const Tensor& x, const DecodeLayer& w, int64_t head_dim, const Tensor& y) {
  const Sizes sizes = sizes_of(w, x.dtype, x.size[0], head_dim);
  expect("out", out, x.dtype, {sizes.R, sizes.HD});
  for (const Tensor* t : {&x, &y}) expect("x or y", *t, x.dtype, {sizes.R, sizes.C});
  std::vector<char> memory;
  in_room(sizes, x.dtype, 3, memory, [&](Thread& thread) { thread.finish(w, x, out, y); });
}

DecodePlan::DecodePlan(const Tensor& embed, const Tensor& cos, const Tensor& sin, std::vector<DecodeLayer> layers,
                       const Tensor& norm, double eps, const Tensor& head)
    : embed_(embed), cos_(cos), sin_(sin), norm_(norm), head_(head), eps_(eps), layers_(std::move(layers)) {
  const DType dtype = embed.dtype;
  if (layers_.empty()) throw std::invalid_argument("decode: no layers");
  const DecodeLayer& first = layers_[0];
  const int64_t V = embed.size[0], R = first.k_cache.size[0], S = first.k_cache.size[1], D = first.k_cache.size[3];
  const Sizes sizes = sizes_of(first, dtype, R, D);
  if (V < 1) throw std::invalid_argument("decode: no vocabulary");
  if (sizes.HD / sizes.GD > kFewRows) throw std::invalid_argument("decode: more query heads of a key head than few");
  expect("embed", embed, dtype, {V, sizes.C});
  expect("head", head, dtype, {V, sizes.C});
  expect("norm", norm, dtype, {sizes.C});
  for (const Tensor* table : {&cos, &sin}) expect("cos or sin", *table, DType::f32, {cos.size[0], D / 2});
  for (const DecodeLayer& w : layers_) {
    const Sizes own = sizes_of(w, dtype, R, D);
    if (own.C != sizes.C || own.HD != sizes.HD || own.GD != sizes.GD || own.F != sizes.F)
      throw std::invalid_argument("decode: layers of different sizes");
    for (const Tensor* cache : {&w.k_cache, &w.v_cache})
      expect("k_cache or v_cache", *cache, dtype, {R, S, sizes.GD / D, D});
  }
}

bool DecodePlan::step(const Tensor& tokens, int64_t used, const std::vector<int64_t>& starts, const Tensor& logits) {
  const DecodeLayer& w = layers_[0];
  const int64_t R = w.k_cache.size[0], S = w.k_cache.size[1], D = w.k_cache.size[3];
  const Sizes sizes = {R, embed_.size[1], w.wq.size[0], w.wk.size[0], w.wgate.size[0], embed_.size[0], D};
  if (tokens.dtype != DType::i64 || tokens.ndim != 1 || tokens.size[0] != R || used < 0 ||
      used >= std::min(S, cos_.size[0]) || logits.dtype != embed_.dtype || logits.ndim != 2 || logits.size[0] != R ||
      logits.size[1] != sizes.V || logits.stride[1] != 1)
    return false;
  int64_t ids[kGemvRows];
  for (int64_t r = 0; r < R; ++r) {
    ids[r] = tokens.ptr<int64_t>()[r * tokens.stride[0]];
    if (ids[r] < 0 || ids[r] >= sizes.V) return false;
  }
  if (!starts.empty() && (static_cast<int64_t>(starts.size()) != R ||
                          std::any_of(starts.begin(), starts.end(), [](int64_t start) { return start < 0; })))
    return false;

  // position `used` of the tables as [1, 1, D/2]
  const auto angles = [used](const Tensor& table) {
    Tensor t = narrow(table, 0, used, used + 1);
    t.ndim = 3;
    t.size[2] = t.size[1], t.size[1] = 1;
    t.stride[2] = 1, t.stride[1] = t.stride[0];
    return t;
  };
  const Tensor cos = angles(cos_), sin = angles(sin_);
  const int64_t loops = 5 * static_cast<int64_t>(layers_.size()) + 2;
  in_room(sizes, embed_.dtype, loops, memory_, [&](Thread& thread) {
    thread.embed(embed_, ids);
    for (const DecodeLayer& layer : layers_)
      thread.layer(layer, cos, sin, used, starts.empty() ? nullptr : starts.data());
    thread.logits(norm_, eps_, head_, logits);
  });
  return true;
}

}  // namespace llama_fast::cpu
