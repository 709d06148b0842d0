// The native ops: what each one takes and gives. This header knows pointers, sizes, strides and a dtype tag; no torch.
//
// One function a primitive, the name and the order of arguments as in llama_fast/ops/table.py: gradients, tensors,
// saved statistics, scalars, then the outputs, which the caller has allocated. Strides are in elements; the last
// dimension of every tensor is contiguous (stride 1). Callers have checked shapes and dtypes; a launcher does not check
// again. A tensor that is absent has `data == nullptr`.
#pragma once

#include <cstdint>

namespace llama_fast {

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

// y = x W^T for 1 to 4 rows;  x: [R, C], weight: [V, C], y: [R, V] T
void gemv(const Tensor& x, const Tensor& weight, const Tensor& y);
// ys[i] = x weights[i]^T for i in [0, count), in one loop over threads
void gemv_group(const Tensor& x, const Tensor* weights, const Tensor* ys, int count);

// One LLaMA block on R = B T rows, 1 to 4, of a decode: x, y [B, T, C] contiguous; wq [H D, C], wk and wv [G D, C],
// wo [C, H D], wgate and wup [F, C], wdown [C, F]; cos, sin [1 or B, T, D/2] f32. The keys and values of these rows are
// written to k_cache and v_cache [B, S_max, G, D] at `used`. Gives false, with nothing written, where a tensor is of
// another dtype than x (float32 or bfloat16; cos and sin float32), of another shape, or has gaps in its last dimension.
bool decode_block(const Tensor& x, const Tensor& norm1, const Tensor& wq, const Tensor& wk, const Tensor& wv,
                  const Tensor& wo, const Tensor& norm2, const Tensor& wgate, const Tensor& wup, const Tensor& wdown,
                  const Tensor& cos, const Tensor& sin, const Tensor& k_cache, const Tensor& v_cache, int64_t used,
                  double eps, bool interleaved, int64_t window, const Tensor& y);

// One chunk of rows of the linear cross-entropy: logits [R, V] T; targets [R] i64; loss, lse [R] f32 (written).
// With row_scale [R] f32 the logits are overwritten by d(sum_r row_scale[r] loss[r]) / d(logits); without, left alone.
// loss[r] = cross entropy with smoothing + z_loss lse[r]^2. Where targets[r] == ignore_index, loss, lse and the
// gradient are 0; where it is otherwise outside [0, V) they are NaN.
void cross_entropy_rows(const Tensor& logits, const Tensor& targets, const Tensor& row_scale, int64_t ignore_index,
                        double label_smoothing, double z_loss, const Tensor& loss, const Tensor& lse);

}  // namespace cpu
}  // namespace llama_fast
