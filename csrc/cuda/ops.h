// The CUDA ops: the signatures of csrc/ops.h with the stream at the end. Callers have checked shapes and dtypes.
// A launcher queues its kernels on the stream and returns; it raises std::runtime_error, naming the op, where the
// driver refuses a launch. Temporary storage is given by the caller: a launcher allocates nothing.
#pragma once

#include "../ops.h"

namespace llama_fast::cuda {

struct Stream {
  int device = 0;
  void* handle = nullptr;  // cudaStream_t
};

// Whether every launch is waited for, so that a fault in a kernel is reported by its own op.
void set_synchronous(bool value);

// The architecture, 80 or 90, whose kernels the emulator runs: 80 unless set.
void set_architecture(int value);
// The multiprocessors of its device, by which kernels choose their blocks: 4 unless set.
void set_multiprocessors(int value);

// y[r,c] = x[r,c] rstd[r] weight[c];  x, y: [R, C] T; weight: [C] T; rstd: [R] f32
void rms_norm_fwd(const Tensor& x, const Tensor& weight, double eps, const Tensor& y, const Tensor& rstd, Stream s);
// scratch: [norm_scratch] f32 of any content: parts that sum dweight over some rows each, and a number a row.
void rms_norm_bwd(const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& rstd, const Tensor& dx,
                  const Tensor& dweight, const Tensor& scratch, Stream s);
void add_rms_norm_fwd(const Tensor& x, const Tensor& residual, const Tensor& weight, double eps, const Tensor& y,
                      const Tensor& sum, const Tensor& rstd, Stream s);
void add_rms_norm_bwd(const Tensor& dy, const Tensor& dsum, const Tensor& sum, const Tensor& weight, const Tensor& rstd,
                      const Tensor& dx, const Tensor& dweight, const Tensor& scratch, Stream s);
// Elements of `scratch` for R rows of C columns of `item` bytes on a device.
int64_t norm_scratch(int64_t R, int64_t C, int64_t item, int device);

// y = silu(gate) up;  all [R, F] T
void swiglu_fwd(const Tensor& gate, const Tensor& up, const Tensor& y, Stream s);
void swiglu_bwd(const Tensor& dy, const Tensor& gate, const Tensor& up, const Tensor& dgate, const Tensor& dup,
                Stream s);

// q: [B, T, H, D], k: [B, T, G, D] T; cos, sin: [1 or B, T, D/2] f32. bwd turns the other way.
void rope_fwd(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin, bool interleaved,
              const Tensor& q_out, const Tensor& k_out, Stream s);
void rope_bwd(const Tensor& dq_out, const Tensor& dk_out, const Tensor& cos, const Tensor& sin, bool interleaved,
              const Tensor& dq, const Tensor& dk, Stream s);

// One chunk of rows: logits [R, V] T, overwritten by the gradient where row_scale [R] f32 is given; see csrc/ops.h.
void cross_entropy_rows(const Tensor& logits, const Tensor& targets, const Tensor& row_scale, int64_t ignore_index,
                        double label_smoothing, double z_loss, const Tensor& loss, const Tensor& lse, Stream s);
// Some classes of some rows: logits [B, k] T of the classes from `first` on of V, overwritten by the gradient. lse and
// row_scale [B] f32 as above; dtarget [B] T, contiguous: the gradient at the target, as cross_entropy_rows rounded it.
void cross_entropy_piece(const Tensor& logits, const Tensor& targets, const Tensor& dtarget, const Tensor& lse,
                         const Tensor& row_scale, int64_t first, int64_t V, int64_t ignore_index,
                         double label_smoothing, double z_loss, Stream s);

// q, out: [B, T, H, D], k, v: [B, S, G, D] bf16 | f16; lse: [B, H, T] f32, natural logarithm; see csrc/ops.h.
// scratch: at least attention_fwd_scratch bytes, aligned to 4, of any content.
void attention_fwd(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens, double scale,
                   bool causal, int64_t window, const Tensor& out, const Tensor& lse, const Tensor& scratch, Stream s);
int64_t attention_fwd_scratch();
// scratch: at least attention_bwd_scratch bytes, aligned to 16, of any content.
void attention_bwd(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                   const Tensor& lse, const Tensor& cu_seqlens, double scale, bool causal, int64_t window,
                   const Tensor& dq, const Tensor& dk, const Tensor& dv, const Tensor& scratch, Stream s);
int64_t attention_bwd_scratch(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens, double scale,
                              int device);

}  // namespace llama_fast::cuda
