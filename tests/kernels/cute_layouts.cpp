// The emulator's tables against the same in CuTe (CUTLASS), on the host. Prints one line a table: its name and in how
// many places the two differ.
#include <cstdint>
#include <cstdio>

#include <cute/atom/copy_traits_sm75.hpp>
#include <cute/atom/mma_traits_sm80.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/tensor.hpp>

#include "emulator/semantics.h"

using namespace cute;
namespace e = llama_fast::emulator;
using bf16 = cutlass::bfloat16_t;

// CuTe's layouts give, of (thread, value), the index in the matrix, the first of its coordinates fastest.
template <class Layout, class Ours>
void fragment(const char* name, Layout layout, int threads, int values, int rows, Ours ours) {
  int wrong = 0;
  for (int t = 0; t < threads; ++t)
    for (int v = 0; v < values; ++v) {
      const auto [row, column] = ours(t, v);
      wrong += static_cast<int>(layout(t, v)) != row + rows * column;
    }
  std::printf("%s %d\n", name, wrong);
}

// Element (mn, k) of a tile of bf16 in shared memory, through a descriptor of the 16 k that it belongs to.
template <class Layout, class Start>
void tile(const char* name, Layout of_pointers, e::Swizzle swizzle, bool mn_major, uint32_t leading, uint32_t stride,
          Start start) {
  const auto layout = as_position_independent_swizzle_layout(of_pointers);
  int wrong = 0;
  for (int mn = 0; mn < size<0>(layout); ++mn)
    for (int k = 0; k < size<1>(layout); ++k) {
      const e::MatrixDescriptor d{start(k / 16), leading, stride, 0, swizzle};
      const int in = mn_major ? mn % 8 : k % 8;
      const uint32_t address = e::chunk_address(d, mn_major ? mn - in : mn, k % 16 - (mn_major ? 0 : in), mn_major);
      wrong += static_cast<uint32_t>(layout(mn, k)) * 2 != address + 2 * in;
    }
  std::printf("%s %d\n", name, wrong);
}

int main() {
  using Mma = MMA_Traits<SM80_16x8x16_F32BF16BF16F32_TN>;
  fragment("mma.A", Mma::ALayout{}, 32, 8, 16, [](int t, int v) { return e::fragment_a(t, v / 2, v % 2); });
  fragment("mma.B", Mma::BLayout{}, 32, 4, 8, [](int t, int v) {
    const auto [k, n] = e::fragment_b(t, v / 2, v % 2);
    return e::Place{n, k};
  });
  fragment("mma.D", Mma::CLayout{}, 32, 4, 16, [](int t, int v) { return e::fragment_d(t, v); });
  fragment("wgmma.A", SM90::GMMA::ALayout_64x16{}, 128, 8, 64,
           [](int t, int v) { return e::fragment_a(t, v / 2, v % 2); });
  fragment("wgmma.D64", SM90::GMMA::CLayout_64x64{}, 128, 32, 64, [](int t, int v) { return e::fragment_d(t, v); });
  fragment("wgmma.D256", SM90::GMMA::CLayout_64x256{}, 128, 128, 64, [](int t, int v) { return e::fragment_d(t, v); });

  // ldmatrix: bit b of what lane l receives comes from bit (row, b') of the rows that the lanes give
  for (const bool transposed : {false, true}) {
    uint16_t memory[32][8];
    const uint16_t* rows[32];
    uint32_t r[32][4], *out[32];
    for (int i = 0; i < 32; ++i) {
      rows[i] = memory[i];
      out[i] = r[i];
      for (int j = 0; j < 8; ++j) memory[i][j] = static_cast<uint16_t>(8 * i + j);
    }
    e::ldmatrix(4, transposed, rows, out);
    int wrong = 0;
    for (int lane = 0; lane < 32; ++lane)
      for (int v = 0; v < 8; ++v) {
        const int bit = 16 * v;  // of the lane's 128
        const auto index = [&](auto traits) {
          using Traits = decltype(traits);
          // both layouts are of the same reference order: the source's (lane, bit) with the destination's place
          const int place = typename Traits::DstLayout{}(lane, bit);
          for (int from = 0; from < 32; ++from)
            for (int j = 0; j < 8; ++j)
              if (typename Traits::SrcLayout{}(from, 16 * j) == place) return 8 * from + j;
          return -1;
        };
        const int theirs =
            transposed ? index(Copy_Traits<SM75_U16x8_LDSM_T>{}) : index(Copy_Traits<SM75_U32x4_LDSM_N>{});
        wrong += theirs != static_cast<int>(r[lane][v / 2] >> (16 * (v % 2)) & 0xFFFF);
      }
    std::printf("ldmatrix%s %d\n", transposed ? ".trans" : "", wrong);
  }

  namespace g = SM90::GMMA;
  const auto along = [](uint32_t step) { return [step](int k16) { return k16 * step; }; };
  tile("K.sw128", tile_to_shape(g::Layout_K_SW128_Atom<bf16>{}, Shape<_64, _64>{}), e::Swizzle::bytes128, false, 16,
       1024, along(32));
  tile("K.sw64", tile_to_shape(g::Layout_K_SW64_Atom<bf16>{}, Shape<_64, _32>{}), e::Swizzle::bytes64, false, 16, 512,
       along(32));
  tile("K.sw32", tile_to_shape(g::Layout_K_SW32_Atom<bf16>{}, Shape<_64, _16>{}), e::Swizzle::bytes32, false, 16, 256,
       along(32));
  tile("K.none", tile_to_shape(g::Layout_K_INTER_Atom<bf16>{}, Shape<_64, _16>{}), e::Swizzle::none, false, 1024, 128,
       along(0));
  tile("MN.sw128", tile_to_shape(g::Layout_MN_SW128_Atom<bf16>{}, Shape<_128, _64>{}), e::Swizzle::bytes128, true, 1024,
       2048, along(4096));
  tile("MN.sw64", tile_to_shape(g::Layout_MN_SW64_Atom<bf16>{}, Shape<_64, _32>{}), e::Swizzle::bytes64, true, 512,
       1024, along(2048));
  tile("MN.sw32", tile_to_shape(g::Layout_MN_SW32_Atom<bf16>{}, Shape<_64, _32>{}), e::Swizzle::bytes32, true, 256,
       1024, along(2048));
  tile("MN.none", tile_to_shape(g::Layout_MN_INTER_Atom<bf16>{}, Shape<_64, _32>{}), e::Swizzle::none, true, 1024, 128,
       along(2048));
}
