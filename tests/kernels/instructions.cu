// Every function of the ptx headers, each result written down: tests/test_emulator_ptx.py runs the kernel as g++
// compiles it for the emulator, and as nvcc compiles it to PTX, and wants the same bits. So what the asm says is what
// the emulated function does.
#include "cuda/launch.cuh"
#include "cuda/tensor_map.cuh"

namespace llama_fast::cuda {

constexpr int kThreads = 128, kTileBytes = 64 * 128;  // [64, 64] halves
constexpr int kBytes = 4 * kTileBytes + 64;

// Thread t's n-th value goes to out[n, t].
class Writer {
 public:
  LLAMA_FAST_DEVICE explicit Writer(Global<uint32_t> out) : out_(out + threadIdx.x) {}
  LLAMA_FAST_DEVICE void put(uint32_t value) {
    *out_ = value;
    out_ += kThreads;
  }
  LLAMA_FAST_DEVICE void put(float value) { put(bit_cast<uint32_t>(value)); }
  LLAMA_FAST_DEVICE void put(const uint4& v) { put(v.x), put(v.y), put(v.z), put(v.w); }
  template <class T, int kCount>
  LLAMA_FAST_DEVICE void put(const T (&values)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) put(values[i]);
  }

 private:
  Global<uint32_t> out_;
};

// in: [64, 64] T, 4 tiles; out: written from the start
template <class T>
__global__ void __launch_bounds__(kThreads)
    sm80_kernel(Global<const T> in, Global<uint32_t> out, Global<uint32_t> copied) {
  LLAMA_FAST_DYNAMIC_SHARED(shared);
  const uint32_t tiles = shared_address(shared);
  const int tid = threadIdx.x, lane = tid % 32;
  Writer writer(out);

  for (int i = tid; i < kTileBytes / 16; i += kThreads) ptx::cp_async_16(tiles + 16 * i, in + 8 * i);
  ptx::cp_async_commit_group();
  ptx::cp_async_16(tiles + kTileBytes + 16 * tid, in + 8 * tid, 6);
  ptx::cp_async_16(tiles + kTileBytes + 2048 + 16 * tid, in, 0);
  ptx::cp_async_commit_group();
  ptx::cp_async_wait_group<1>();
  __syncthreads();
  writer.put(ptx::ld_shared(tiles + 4 * tid));
  ptx::cp_async_wait_group<0>();
  writer.put(ptx::ld_shared_v4(tiles + kTileBytes + 16 * tid));
  writer.put(ptx::ld_shared_v4(tiles + kTileBytes + 2048 + 16 * tid));

  uint32_t r1[1], r2[2], t2[2], r4[4], t4[4];
  ptx::ldmatrix_x1(r1, tiles + lane % 8 * 128);
  ptx::ldmatrix_x2(r2, tiles + lane % 16 * 128 + 16);
  ptx::ldmatrix_x2_trans(t2, tiles + lane % 16 * 128 + 32);
  ptx::ldmatrix_x4(r4, tiles + lane * 128 + 48);
  ptx::ldmatrix_x4_trans(t4, tiles + lane * 128 + 64);
  writer.put(r1), writer.put(r2), writer.put(t2), writer.put(r4), writer.put(t4);
  float c[4] = {1.0f, 2.0f, 3.0f, 4.0f}, d[4];
  ptx::mma_m16n8k16<T>(d, r4, t2, c);
  writer.put(d);

  __syncthreads();
  ptx::st_shared(tiles + 4 * tid, static_cast<uint32_t>(7 * tid));
  ptx::st_shared_v4(tiles + kTileBytes + 16 * tid, make_uint4(tid, 1, 2, 3));
  __syncthreads();
  writer.put(ptx::ld_shared(tiles + 4 * (127 - tid)));
  writer.put(ptx::ld_shared_v4(tiles + kTileBytes + 16 * (127 - tid)));
  const uint2 two = ptx::ld_shared_v2(tiles + kTileBytes + 16 * (127 - tid) + 8);
  writer.put(two.x), writer.put(two.y);

  writer.put(ptx::ld_global_nc_v4(in + 8 * tid));
  writer.put(ptx::ld_global_nc_no_allocate_v4(in + 8 * tid + 8));
  writer.put(ptx::ld_global_v4(in + 8 * tid + 16));
  ptx::st_global_v4(copied + 8 * tid, r4[0] != 0 ? make_uint4(r4[0], r4[1], r4[2], r4[3]) : make_uint4(0, 0, 0, 0));
  ptx::st_global_cs_v4(copied + 8 * tid + 4, make_uint4(t4[0], t4[1], t4[2], t4[3]));

  const float x = ptx::cvt_f32<T>(in[tid]);
  writer.put(x);
  writer.put(ptx::ex2(x)), writer.put(ptx::ex2(-__builtin_huge_valf())), writer.put(ptx::lg2(x * x));
  writer.put(ptx::cvt_rn_x2<T>(x * 1.2345f, x * 1e-6f));
  writer.put(static_cast<uint32_t>(ptx::cvt_rn<T>(x * 7.77f).bits));

  if (tid < 64)
    ptx::bar_arrive(3, 128);
  else
    ptx::bar_sync(3, 128);

  writer.put(__shfl_sync(~0u, x, lane * 5)), writer.put(__shfl_sync(~0u, x, 3, 8));
  writer.put(__shfl_xor_sync(~0u, x, 9)), writer.put(__shfl_down_sync(~0u, x, 7)),
      writer.put(__shfl_up_sync(~0u, x, 3));
  writer.put(__shfl_down_sync(~0u, x, 3, 8)), writer.put(__shfl_up_sync(~0u, x, 3, 16));
  writer.put(__ballot_sync(~0u, x > 0.0f));
  writer.put(static_cast<uint32_t>(__any_sync(~0u, x > 2.0f))),
      writer.put(static_cast<uint32_t>(__all_sync(~0u, x > -2.0f)));
}

template <class T, int kN>
LLAMA_FAST_DEVICE void products(Writer& writer, uint32_t a, uint32_t b) {
  // as if transposed or not: the tiles hold numbers, and no one asks what they mean
  const uint64_t a_rows = ptx::matrix_descriptor(a, 16, 1024),
                 b_rows = ptx::matrix_descriptor(b, 16, kN > 64 ? 512 : 1024);
  const uint64_t a_columns = ptx::matrix_descriptor(a, 8192, 1024), b_columns = ptx::matrix_descriptor(b, 1024, 1024);
  const uint32_t fragment[4] = {0x3C003C00u + threadIdx.x, 0x3F803F00u, 0x40004100u, 0xBC003C01u};
  float d[kN / 2];
#pragma unroll
  for (int i = 0; i < kN / 2; ++i) d[i] = static_cast<float>(i);
  ptx::wgmma_fence();
  ptx::wgmma_ss<T, kN, false, false>(d, a_rows, b_rows, 1);
  ptx::wgmma_ss<T, kN, true, false>(d, a_columns, b_rows, 1);
  ptx::wgmma_ss<T, kN, false, true>(d, a_rows, b_columns, 1);
  ptx::wgmma_rs<T, kN, false>(d, fragment, b_rows, 1);
  ptx::wgmma_rs<T, kN, true>(d, fragment, b_columns, 1);
  ptx::wgmma_commit_group();
  ptx::wgmma_wait_group<0>();
  ptx::wgmma_use(d);
  writer.put(d);
  ptx::wgmma_fence();
  ptx::wgmma_rs<T, kN, false>(d, fragment, b_rows, 0);
  ptx::wgmma_commit_group();
  ptx::wgmma_wait_group<0>();
  ptx::wgmma_use(d);
  writer.put(d[0]), writer.put(d[kN / 2 - 1]);
}

// map2, map3, map4: `in` [4, 2, 32, 64] T as [256, 64], [8, 32, 64] and whole; copies2, copies3, copies4: the same of
// `copied`
struct Maps {
  ptx::TensorMap map2, map3, map4, copies2, copies3, copies4;
};
template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    sm90_kernel(const __grid_constant__ Maps maps, Global<const T> in, Global<float> sums, Global<uint32_t> moved,
                Global<int> count, Global<uint32_t> out) {
  LLAMA_FAST_DYNAMIC_SHARED(shared);
  const uint32_t tiles = shared_address(shared), barrier = tiles + 4 * kTileBytes, waited = barrier + 8;
  const int tid = threadIdx.x, lane = tid % 32;
  Writer writer(out);
  if (tid == 0) {
    ptx::prefetch_tensormap(maps.map2);
    ptx::mbarrier_init(barrier, 1);
    ptx::mbarrier_init(waited, kThreads);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  ptx::setmaxnreg_dec<104>();
  ptx::setmaxnreg_inc<240>();
  if (tid < 32 && ptx::elect_sync()) {
    ptx::mbarrier_arrive_expect_tx(barrier, 4 * kTileBytes);
    ptx::tma_load_2d(tiles, maps.map2, barrier, 0, -3);
    ptx::tma_load_3d(tiles + kTileBytes, maps.map3, barrier, 0, 1, 2);
    ptx::tma_load_4d(tiles + 2 * kTileBytes, maps.map4, barrier, 0, 30, 0, 1);
    ptx::bulk_load(tiles + 3 * kTileBytes, in, kTileBytes, barrier);
  }
  __syncwarp();
  ptx::mbarrier_wait(barrier, 0);
  for (int i = 0; i < 4 * kTileBytes / 16 / kThreads; ++i)
    writer.put(ptx::ld_shared_v4(tiles + 16 * (i * kThreads + tid)));

  products<T, 8>(writer, tiles, tiles + kTileBytes);
  products<T, 16>(writer, tiles, tiles + kTileBytes);
  products<T, 32>(writer, tiles, tiles + kTileBytes);
  products<T, 48>(writer, tiles, tiles + kTileBytes);
  products<T, 64>(writer, tiles, tiles + kTileBytes);
  products<T, 80>(writer, tiles, tiles + kTileBytes);
  products<T, 96>(writer, tiles, tiles + kTileBytes);
  products<T, 112>(writer, tiles, tiles + kTileBytes);
  products<T, 128>(writer, tiles, tiles + kTileBytes);
  products<T, 144>(writer, tiles, tiles + kTileBytes);
  products<T, 160>(writer, tiles, tiles + kTileBytes);
  products<T, 176>(writer, tiles, tiles + kTileBytes);
  products<T, 192>(writer, tiles, tiles + kTileBytes);
  products<T, 224>(writer, tiles, tiles + kTileBytes);
  products<T, 256>(writer, tiles, tiles + kTileBytes);

  ptx::mbarrier_arrive(waited);
  ptx::mbarrier_wait(waited, 0);
  const uint32_t numbers[4] = {0x3C003D00u + lane, 0x3F803E00u, 0x40004100u, 0x3C003C01u};
  ptx::stmatrix_x2(tiles + lane % 16 * 128 + tid / 32 * 2048, {numbers[0], numbers[1]});
  ptx::stmatrix_x4(tiles + kTileBytes + (lane + tid / 32 * 16 % 32) * 128 + tid / 32 * 16, numbers);
  ptx::stmatrix_x4_trans(tiles + 2 * kTileBytes + lane * 128 + tid / 32 * 16, numbers);
  ptx::fence_proxy_async();
  __syncthreads();
  if (tid == 0) {
    ptx::red_release_gpu_add(count, 5);
    while (ptx::ld_acquire_gpu(count) < 5) ptx::nanosleep(20);
    writer.put(static_cast<uint32_t>(ptx::ld_acquire_gpu(count)));
    ptx::fence_proxy_async_global();
    ptx::tma_store_2d(maps.copies2, tiles, 0, 1);
    ptx::tma_store_3d(maps.copies3, tiles + kTileBytes, 0, 2, 3);
    ptx::tma_store_4d(maps.copies4, tiles + 2 * kTileBytes, 0, 0, 1, 3);
    ptx::bulk_commit_group();
    ptx::bulk_store(moved, tiles, 1024);
    ptx::bulk_reduce_add_f32(sums, tiles + kTileBytes, 1024);
    ptx::bulk_commit_group();
    ptx::bulk_wait_group_read<1>();
    ptx::bulk_wait_group<0>();
  }
}

}  // namespace llama_fast::cuda

#ifdef LLAMA_FAST_EMULATE
#include "report.h"

using namespace llama_fast;

// in: [256, 64] T; copied: as large, or a kilobyte; out: enough
extern "C" const char* run_sm80(const void* in, void* out, size_t out_bytes, void* copied, size_t copied_bytes,
                                bool is_bf16) {
  return report([=] {
    const Mapping mi(in, 256 * 128, "in"), mo(out, out_bytes, "out"), mc(copied, copied_bytes, "copied");
    const auto go = [&](auto t) {
      using T = decltype(t);
      cuda::launch({"sm80", dim3(1), dim3(cuda::kThreads), cuda::kBytes}, cuda::sm80_kernel<T>,
                   static_cast<const T*>(mi.data()), static_cast<uint32_t*>(mo.data()),
                   static_cast<uint32_t*>(mc.data()));
    };
    is_bf16 ? go(bf16{}) : go(f16{});
  });
}

extern "C" const char* run_sm90(const void* in, void* out, size_t out_bytes, void* copied, void* sums, void* moved,
                                void* count, bool is_bf16) {
  return report([=] {
    const Mapping mi(in, 256 * 128, "in"), mo(out, out_bytes, "out"), mc(copied, 256 * 128, "copied"),
        ms(sums, 1024, "sums"), mm(moved, 1024, "moved"), mn(count, 4, "count");
    const DType type = is_bf16 ? DType::bf16 : DType::f16;
    const auto maps_of = [type](void* data, auto& map2, auto& map3, auto& map4) {
      const Tensor as2{data, type, 2, {256, 64}, {64, 1}}, as3{data, type, 3, {8, 32, 64}, {2048, 64, 1}},
          as4{data, type, 4, {4, 2, 32, 64}, {4096, 2048, 64, 1}};
      map2 = cuda::make_tensor_map<2>("sm90", as2, {1, 0}, {64, 64});
      map3 = cuda::make_tensor_map<3>("sm90", as3, {2, 1, 0}, {64, 16, 4});
      map4 = cuda::make_tensor_map<4>("sm90", as4, {3, 2, 1, 0}, {64, 16, 2, 2});
    };
    cuda::Maps maps;
    maps_of(mi.data(), maps.map2, maps.map3, maps.map4);
    maps_of(mc.data(), maps.copies2, maps.copies3, maps.copies4);
    const auto go = [&](auto t) {
      using T = decltype(t);
      cuda::launch({"sm90", dim3(1), dim3(cuda::kThreads), cuda::kBytes}, cuda::sm90_kernel<T>, maps,
                   static_cast<const T*>(mi.data()), static_cast<float*>(ms.data()), static_cast<uint32_t*>(mm.data()),
                   static_cast<int*>(mn.data()), static_cast<uint32_t*>(mo.data()));
    };
    is_bf16 ? go(bf16{}) : go(f16{});
  });
}
#else
template __global__ void llama_fast::cuda::sm80_kernel<llama_fast::bf16>(Global<const bf16>, Global<uint32_t>,
                                                                         Global<uint32_t>);
template __global__ void llama_fast::cuda::sm80_kernel<llama_fast::f16>(Global<const f16>, Global<uint32_t>,
                                                                        Global<uint32_t>);
template __global__ void llama_fast::cuda::sm90_kernel<llama_fast::bf16>(const __grid_constant__ Maps,
                                                                         Global<const bf16>, Global<float>,
                                                                         Global<uint32_t>, Global<int>,
                                                                         Global<uint32_t>);
template __global__ void llama_fast::cuda::sm90_kernel<llama_fast::f16>(const __grid_constant__ Maps, Global<const f16>,
                                                                        Global<float>, Global<uint32_t>, Global<int>,
                                                                        Global<uint32_t>);
#endif
