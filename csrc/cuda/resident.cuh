// What kernels share that keep the two lowest frequencies of a plane in registers: radial_filter (resident_filter.cuh) and the
// reductions (resident_modes.cuh), for r^2 <= 4 and small planes.
//
// A thread owns a word, VEC adjacent elements, in every row of a plane: contiguous, VEC columns; channels_last, VEC channels of one
// column. It sums its rows in pairs m, H - m, which share their cosines and, up to sign, their sines; the sums over columns follow by
// shuffles. Cosines come from the host with the launch, as operands in constant memory.
#pragma once

#include "tile.cuh"

namespace spanet {

constexpr int kResidentPairs = 31;    // row pairs m, H - m with 0 < m < H / 2, at most
constexpr int kResidentColumns = 64;
constexpr int kRound = 7;             // row pairs that a reduction loads at a time
constexpr int kResidentWarps = 4;     // of a block
constexpr int kResidentWords = 8;     // of channels in a block, channels_last: a sector of memory
constexpr int kSlots = 16;            // modes of the disc, in groups of four: shell 0 (one mode), 1, 2 and 4

using Wave4 = Pack<float, 4>;         // cos 1, sin 1, cos 2, sin 2

struct Resident {
  unsigned planes;                    // of this launch
  int channels, height, width, pairs;
  int words, shift;                   // words of a row; 2^shift lanes to a plane
  int pitch_x, pitch_y;               // bytes from row to row
  int shells;
  int chunks;                         // channels_last: blocks side by side in the channels of an image
  int functions_h, functions_w;
  bool middle;                        // row H / 2 exists
  float weight[kSlots];               // squared amplitude of the modes, 0 for what is none
  float amplitude[25];                // of functions a and b at 5 a + b
  Wave4 rows[kResidentPairs + kRound], columns[kResidentColumns];  // 0 where there is no pair
};

// What the compiler knows of a plane: that it has SIZE rows, and that they are SIZE elements each without gaps; or up to SIZE rows.
enum Known : int { kNothing, kHeight, kRows };

// Where the rows of a plane are.
template <typename T, int SIZE, int KNOWN>
struct Place {
  static constexpr bool EXACT = KNOWN != kNothing;
  char *first, *end;  // row 0, and row H if it existed
  int pitch, pairs;   // in bytes; -1 pairs where the thread has no word
  bool middle;

  __device__ Place(const Resident& plan, bool active, const View& view, int64_t offset, int row_pitch)
      : first(static_cast<char*>(view.data) + offset * static_cast<int64_t>(sizeof(T))), pitch(row_pitch), pairs(active ? plan.pairs : -1),
        middle(active && plan.middle) {
    keep(pitch);
    keep(pairs);
    end = first + static_cast<int64_t>(plan.height) * pitch;
    keep(end);
  }
  __device__ bool has(int m) const { return EXACT ? pairs >= 0 : m <= pairs; }
  __device__ bool has_middle() const { return EXACT ? SIZE % 2 == 0 && pairs >= 0 : middle; }
  __device__ T* up(int m) const {
    return reinterpret_cast<T*>(first + (KNOWN == kRows ? m * SIZE * static_cast<int64_t>(sizeof(T)) : static_cast<int64_t>(m) * pitch));
  }
  __device__ T* low(int m) const { return KNOWN == kRows ? up(SIZE - m) : reinterpret_cast<T*>(end - static_cast<int64_t>(m) * pitch); }
  __device__ T* half(const Resident& plan) const { return EXACT ? up(SIZE / 2) : up(plan.height / 2); }
};

// v[a], the sums of function a times the words of the rows, from those of the rows without a partner, 0 and H / 2, which is 0 where there is none.
template <int VEC>
__device__ void start_sums(const float (&first)[VEC], const float (&middle)[VEC], float (&v)[5][VEC]) {
#pragma unroll
  for (int k = 0; k < VEC; ++k) {
    v[0][k] = v[3][k] = first[k] + middle[k];
    v[1][k] = first[k] - middle[k];
    v[2][k] = v[4][k] = 0;
  }
}

// And the words of a pair of rows with this wave.
template <int VEC>
__device__ void add_pair(const Wave4& wave, const float (&up)[VEC], const float (&low)[VEC], float (&v)[5][VEC]) {
#pragma unroll
  for (int k = 0; k < VEC; ++k) {
    const float even = up[k] + low[k], odd = up[k] - low[k];
    v[0][k] += even;
    v[1][k] += wave.v[0] * even;
    v[2][k] += wave.v[1] * odd;
    v[3][k] += wave.v[2] * even;
    v[4][k] += wave.v[3] * odd;
  }
}

// x = base x + sum over a of function a times u[a]: in row 0 (sign 1) or H / 2 (sign -1), and in a pair of rows.
template <int VEC>
__device__ void correct_edge(float sign, const float (&base)[VEC], const float (&u)[5][VEC], float (&x)[VEC]) {
#pragma unroll
  for (int k = 0; k < VEC; ++k) x[k] = base[k] * x[k] + (u[0][k] + sign * u[1][k] + u[3][k]);
}
template <int VEC>
__device__ void correct_pair(const Wave4& wave, const float (&base)[VEC], const float (&u)[5][VEC], float (&up)[VEC], float (&low)[VEC]) {
#pragma unroll
  for (int k = 0; k < VEC; ++k) {
    const float even = u[0][k] + wave.v[0] * u[1][k] + wave.v[2] * u[3][k];
    const float odd = wave.v[1] * u[2][k] + wave.v[3] * u[4][k];
    up[k] = base[k] * up[k] + (even + odd);
    low[k] = base[k] * low[k] + (even - odd);
  }
}

// A word in the rows of a plane; rows that do not exist are 0 and stay unwritten.
template <typename T, int VEC, int SIZE, int KNOWN>
struct Rows {
  static constexpr bool EXACT = KNOWN != kNothing;
  static constexpr int PAIRS = (SIZE - 1) / 2;
  using Word = Columns<T, VEC>;
  using Where = Place<T, SIZE, KNOWN>;
  Word up[PAIRS + 1], low[PAIRS + 1];  // rows m and H - m; low[0] is row H / 2

  __device__ void load(const Resident& plan, const Where& from) {
    up[0].load(from.up(0));
#pragma unroll
    for (int m = 1; m <= PAIRS; ++m)
      if (EXACT || from.has(m)) {
        up[m].load(from.up(m));
        low[m].load(from.low(m));
      }
    if (EXACT ? SIZE % 2 == 0 : from.middle) low[0].load(from.half(plan));
  }

  // v[a] = sum over the rows of function a times the word.
  __device__ void sum(const Resident& plan, float (&v)[5][VEC]) const {
    float first[VEC], middle[VEC];
    up[0].get(first);
    low[0].get(middle);
    start_sums(first, middle, v);
#pragma unroll
    for (int m = 1; m <= PAIRS; ++m) {
      float x[VEC], mirrored[VEC];
      up[m].get(x);
      low[m].get(mirrored);
      add_pair(plan.rows[m], x, mirrored, v);
    }
  }

  __device__ void keep_words() {
#pragma unroll
    for (int m = 0; m <= PAIRS; ++m)
#pragma unroll
      for (auto& word : up[m].words.v) keep(word);
#pragma unroll
    for (int m = 0; m <= PAIRS; ++m)
#pragma unroll
      for (auto& word : low[m].words.v) keep(word);
  }

  // to = base x + sum over a of function a times u[a], by rows.
  __device__ void apply(const Resident& plan, const Where& to, const float (&base)[VEC], const float (&u)[5][VEC]) const {
    const auto edge = [&](const Word& word, float sign, T* at) {
      float x[VEC];
      word.get(x);
      correct_edge(sign, base, u, x);
      Word result;
      result.set(x);
      result.store(at);
    };
    if (to.has(0)) edge(up[0], 1, to.up(0));
#pragma unroll
    for (int m = 1; m <= PAIRS; ++m) {
      if (m % 13 == 0) sync_warp();  // rows beyond are not unpacked before: registers
      if (to.has(m)) {
        float x[VEC], mirrored[VEC];
        up[m].get(x);
        low[m].get(mirrored);
        correct_pair(plan.rows[m], base, u, x, mirrored);
        Word above, below;
        above.set(x);
        below.set(mirrored);
        above.store(to.up(m));
        below.store(to.low(m));
      }
    }
    if (to.has_middle()) edge(low[0], -1, to.half(plan));
  }
};

// z += the modes of the disc at one column: sums v over its rows times its wave w. Slots 1, 2 and 3 are free.
__device__ inline void add_modes(const float (&v)[5], const Wave4& w, float (&z)[kSlots]) {
  z[0] += v[0];
  z[4] += w.v[0] * v[0];
  z[5] += w.v[1] * v[0];
  z[6] += v[1];
  z[7] += v[2];
  z[8] += w.v[0] * v[1];
  z[9] += w.v[1] * v[1];
  z[10] += w.v[0] * v[2];
  z[11] += w.v[1] * v[2];
  z[12] += w.v[2] * v[0];
  z[13] += w.v[3] * v[0];
  z[14] += v[3];
  z[15] += v[4];
}

// u[a] = sum over the modes (a, b) of z times function b at a column with wave w.
__device__ inline void waves_of_column(const float (&z)[kSlots], const Wave4& w, float (&u)[5]) {
  u[0] = z[0] + w.v[0] * z[4] + w.v[1] * z[5] + w.v[2] * z[12] + w.v[3] * z[13];
  u[1] = z[6] + w.v[0] * z[8] + w.v[1] * z[9];
  u[2] = z[7] + w.v[0] * z[10] + w.v[1] * z[11];
  u[3] = z[14];
  u[4] = z[15];
}

// Half of the sums z[0 .. 2 HALF) go to the lanes with this bit, the other half stays with those without it.
template <int HALF, int COUNT>
__device__ void halve(int mask, float (&z)[COUNT]) {
  const bool upper = threadIdx.x & mask;
#pragma unroll
  for (int k = 0; k < HALF; ++k) {
    const float other = exchange(upper ? z[k] : z[k + HALF], mask);
    z[k] = (upper ? z[k + HALF] : z[k]) + other;
  }
}

// Sums z over the lanes of a plane, 2^shift >= 8 of them; each keeps COUNT / 8 sums, from COUNT / 8 (lane mod 8) on, in z[0], z[1], ...
template <int COUNT>
__device__ void share_sums(int shift, float (&z)[COUNT]) {
  halve<COUNT / 2>(4, z);
  halve<COUNT / 4>(2, z);
  halve<COUNT / 8>(1, z);
  for (int mask = 8; mask < 1 << shift; mask *= 2)
#pragma unroll
    for (int k = 0; k < COUNT / 8; ++k) z[k] += exchange(z[k], mask);
}

// The sums z of every column of the block, [word v][slot], added up over its columns: emit(channel of the block, slot, sum). For
// all threads of the block; memory holds 8 VEC COUNT floats of each warp.
template <int VEC, int COUNT, typename Emit>
__device__ void sum_columns(float (&z)[VEC * COUNT], float* memory, Emit emit) {
  constexpr int kSums = VEC * COUNT, kShare = kSums / 4, kAll = kResidentWords * kSums;
  const int lane = threadIdx.x % 32, part = (lane & 16 ? 2 : 0) + (lane & 8 ? 1 : 0), warps = blockDim.x / 32;
  halve<kSums / 2>(16, z);
  halve<kSums / 4>(8, z);
  float* own = memory + threadIdx.x / 32 * kAll + (lane & 7) * kSums + part * kShare;
#pragma unroll
  for (int k = 0; k < kShare; ++k) own[k] = z[k];
  __syncthreads();
  for (int k = threadIdx.x; k < kAll; k += blockDim.x) {
    float sum[4] = {};  // four chains: fewer roundings, shorter latency
    for (int warp = 0; warp < warps; warp += 4)
#pragma unroll
      for (int chain = 0; chain < 4; ++chain)
        if (warp + chain < warps) sum[chain] += memory[(warp + chain) * kAll + k];
    emit(k / kSums * VEC + k % kSums / COUNT, k % COUNT, (sum[0] + sum[1]) + (sum[2] + sum[3]));
  }
}

__device__ inline void load_waves(const Resident& plan, Wave4* columns) {
  for (int j = threadIdx.x; j < plan.width; j += blockDim.x) columns[j] = plan.columns[j];
  __syncthreads();
}

}  // namespace spanet
