// The native ops: what each one takes and gives. This header knows pointers, sizes, strides and a dtype tag; no torch.
//
// One function a primitive, the name and the order of arguments as in llama_fast/ops/table.py: gradients, tensors,
// saved statistics, scalars, then the outputs, which the caller has allocated. Strides are in elements; the last
// dimension of every tensor is contiguous (stride 1). Callers have checked shapes and dtypes; a launcher does not check
// again. A tensor that is absent has `data == nullptr`.
#pragma once

#include <cstdint>
#include <vector>

namespace llama_fast {

// Raised, with INTERFACE of llama_fast/ops/library.py, by every change of a name or a signature that Python calls.
constexpr int kInterface = 6;

enum class DType : int8_t { f32, bf16, f16, i32, i64 };

constexpr int kMaxDims = 4;

// A borrowed view of a tensor that Python owns.
struct Tensor {
  void* data = nullptr;
  DType dtype = DType::f32;
  int ndim = 0;
  int64_t size[kMaxDims] = {};
  int64_t stride[kMaxDims] = {};

  template <class T>
  T* ptr() const {
    return static_cast<T*>(data);
  }
};

namespace cpu {

// Names of the instruction sets that this processor runs, best first; the last is always "portable".
int isa_count();
const char* isa_name(int i);
// The one in use: the best, unless `set_isa` chose another of the above ("" goes back to the best).
const char* isa();
void set_isa(const char* name);
// Family of an AMD processor (25: Zen 3 and 4, 26: Zen 5), 0 for any other maker's.
int amd_family();

// y[r,c] = x[r,c] rstd[r] weight[c];  x, y: [R, C] T; weight: [C] T; rstd: [R] f32
void rms_norm_fwd(const Tensor& x, const Tensor& weight, double eps, const Tensor& y, const Tensor& rstd);
void rms_norm_bwd(const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& rstd, const Tensor& dx,
                  const Tensor& dweight);

// sum = x + residual (rounded to T), y = rms_norm(sum); bwd: dx is the gradient of x and of residual alike
void add_rms_norm_fwd(const Tensor& x, const Tensor& residual, const Tensor& weight, double eps, const Tensor& y,
                      const Tensor& sum, const Tensor& rstd);
void add_rms_norm_bwd(const Tensor& dy, const Tensor& dsum, const Tensor& sum, const Tensor& weight, const Tensor& rstd,
                      const Tensor& dx, const Tensor& dweight);

// y = silu(gate) up;  all [R, F] T
void swiglu_fwd(const Tensor& gate, const Tensor& up, const Tensor& y);
void swiglu_bwd(const Tensor& dy, const Tensor& gate, const Tensor& up, const Tensor& dgate, const Tensor& dup);

// q: [B, T, H, D], k: [B, T, G, D] T; cos, sin: [1 or B, T, D/2] f32. bwd turns the other way.
void rope_fwd(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin, bool interleaved,
              const Tensor& q_out, const Tensor& k_out);
void rope_bwd(const Tensor& dq_out, const Tensor& dk_out, const Tensor& cos, const Tensor& sin, bool interleaved,
              const Tensor& dq, const Tensor& dk);

// q, out: [B, T, H, D], k, v: [B, S, G, D] T; lse: [B, H, T] f32, natural logarithm, -inf for a row that sees no key.
// cu_seqlens: absent, or [N+1] i32 with B = 1 and T = S: sequence n owns rows cu_seqlens[n] to cu_seqlens[n+1].
// window <= 0: none.
void attention_fwd(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens, double scale,
                   bool causal, int64_t window, const Tensor& out, const Tensor& lse);
void attention_bwd(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                   const Tensor& lse, const Tensor& cu_seqlens, double scale, bool causal, int64_t window,
                   const Tensor& dq, const Tensor& dk, const Tensor& dv);

// One key/value head of one sequence and its few query heads, in the caller's memory: q, out: [1, 1, rep, D], k, v:
// [1, S, 1, D] T; rep <= kFewRows; scratch: attention_few_scratch(D) floats on a cache line. Bitwise attention_fwd.
constexpr int64_t kFewRows = 8;
int64_t attention_few_scratch(int64_t D);
void attention_few(const Tensor& q, const Tensor& k, const Tensor& v, double scale, int64_t window, const Tensor& out,
                   const Tensor& lse, float* scratch);

// y = x W^T for 1 to 8 rows;  x: [R, C], weight: [V, C], y: [R, V] T
constexpr int64_t kGemvRows = 8;
void gemv(const Tensor& x, const Tensor& weight, const Tensor& y);
// ys[i] = x weights[i]^T for i in [0, count), in one loop over threads
void gemv_group(const Tensor& x, const Tensor* weights, const Tensor* ys, int count);

// out = a b, or added to it, by a kernel of oneDNN that torch exports;  a: [M, K], b: [K, N] T, of each one stride is
// 1; out: [M, N] T or float32, its last stride 1. float16 is multiplied in float32. has_brgemm: whether torch has that
// kernel for this processor, in bfloat16 (`half`) or float32. Raises std::runtime_error where the kernel fails.
bool has_brgemm(bool half);
void brgemm(const Tensor& a, const Tensor& b, const Tensor& out, bool accumulate);

// Asks for huge pages under an output of 4 MB or more: one that the allocator has just taken from the system is then
// faulted in by 2 MB instead of 4 kB. Advice only (madvise on Linux, nothing elsewhere); contents are not touched.
void use_huge_pages(const Tensor& out);

// y = x^T;  x: [R, C], y: [C, R] bfloat16 or float16
void transpose(const Tensor& x, const Tensor& y);

// best[r] = the place of the largest number of row r;  x: [R, V] T, V >= 1; best: [R] i64
void argmax(const Tensor& x, const Tensor& best);

// A step of a decode: one token of each of R rows, 1 to 8, through a whole model, in one loop over threads.
//
// embed, head: [V, C], norm1, norm2, norm: [C], wq: [H D, C], wk, wv: [G D, C], wo: [C, H D], wgate, wup: [F, C],
// wdown: [C, F], k_cache, v_cache: [R, S, G, D] T (float32, bfloat16 or float16); cos, sin: [P, D/2] f32. What a layer
// may have and not: biases bq: [H D], bk, bv: [G D], and gains normq, normk: [D] of the norms of each head. Raises
// std::invalid_argument where they do not fit each other, where H / G is above kFewRows, and for more than four rows of
// bfloat16 that leave the first cache, which the vendor's products multiply faster.
struct DecodeLayer {
  Tensor norm1, wq, wk, wv, wo, norm2, wgate, wup, wdown, bq, bk, bv, normq, normk, k_cache, v_cache;
  double eps;
  bool interleaved;
  int64_t window;
};

// The parts of a layer before and after its attention, of R rows, 1 to kGemvRows, the caches of `w` unused. Throw
// std::invalid_argument, with nothing written, where the plan of a decode would, but for H / G, which may be any.
// q [R, H D], k [R, G D] after rotary, v [R, G D]; cos, sin: [1 or B, T, D/2] f32, R = B T
void block_before(const Tensor& x, const DecodeLayer& w, const Tensor& cos, const Tensor& sin, const Tensor& q,
                  const Tensor& k, const Tensor& v);
// y [R, C] of the layer whose input was x and whose attention gave `out` [R, H D]
void block_after(const Tensor& out, const Tensor& x, const DecodeLayer& w, int64_t head_dim, const Tensor& y);

class DecodePlan {
 public:
  DecodePlan(const Tensor& embed, const Tensor& cos, const Tensor& sin, std::vector<DecodeLayer> layers,
             const Tensor& norm, double eps, const Tensor& head);
  // logits [R, V] T of tokens [R] i64 at position `used`, whose keys and values are written there. Row r attends to its
  // keys from starts[r] on, to all where `starts` is empty. False, with nothing written, where a token is outside
  // [0, V), the cache or the tables end before `used`, or a size differs. The caller sees to it that the memory of all
  // tensors is still what it was when the plan was made. Not for two threads at once.
  bool step(const Tensor& tokens, int64_t used, const std::vector<int64_t>& starts, const Tensor& logits);

 private:
  Tensor embed_, cos_, sin_, norm_, head_;
  double eps_;
  std::vector<DecodeLayer> layers_;
  std::vector<char> memory_;
};

// One chunk of rows of the linear cross-entropy: logits [R, V] T; targets [R] i64; loss, lse [R] f32 (written).
// With row_scale [R] f32 the logits are overwritten by d(sum_r row_scale[r] loss[r]) / d(logits); without, left alone.
// loss[r] = cross entropy with smoothing + z_loss lse[r]^2. Where targets[r] == ignore_index, loss, lse and the
// gradient are 0; where it is otherwise outside [0, V) they are NaN.
void cross_entropy_rows(const Tensor& logits, const Tensor& targets, const Tensor& row_scale, int64_t ignore_index,
                        double label_smoothing, double z_loss, const Tensor& loss, const Tensor& lse);

}  // namespace cpu
}  // namespace llama_fast
