// The lanes cut of radial_filter_kernel.cpp: chunks of channels of an image side by side, as they lie in channels_last; those of NCHW are
// brought there a few rows at a time.
// Included once by a file that is compiled per instruction set.
#pragma once

#include "cpu/runs.h"

namespace spanet {
namespace SIMD_NAME {
namespace {

struct Chunk {
  int64_t first, lanes;
};

// Chunk number i of the channels.
inline Chunk chunk_of(int64_t channels, int64_t chunk, int64_t i) {
  const int64_t first = i * chunk;
  return {first, i == chunks_of(channels, chunk) - 1 ? channels - first : chunk};
}

// Rows of pixels of adjacent lanes.
template <class X> struct PixelRows {
  const X* data;
  int64_t h, w;
};

// s[l] = sum_j x[j,l] over a row of w pixels, and t[j,l] += x[j,l]. Whole vectors of lanes.
template <class T, class X> void sum_row(const X* x, int64_t stride, int64_t w, int64_t lanes, T* s, T* t) {
  for_lanes<T, max_vectors<T>>(lanes, [&](auto nv, int64_t l, int64_t last) {
    const Step<nv(), T> step{last, false};
    Vec<T> sum[step.vectors] = {};
    for (int64_t j = 0; j < w; ++j)
      UNROLL
      for (int v = 0; v < step.vectors; ++v) {
        const int64_t at = l + step.at(v);
        const Vec<T> pixel = step.read(x + j * stride + at);
        sum[v] += pixel;
        store<T>(t + j * lanes + at, load_raw<Vec<T>>(t + j * lanes + at) + pixel);
      }
    UNROLL
    for (int v = 0; v < step.vectors; ++v) store<T>(s + l + step.at(v), sum[v]);
  });
}

// y[j,l] = base[l] x[j,l] + s[l] + t[j,l] over a row.
template <Out OUT, class T, class IO, class Y>
void expand_row_sums(const T* s, const T* t, int64_t w, int64_t lanes, const Rows<T, IO, Y>& all) {
  for_lanes<T, max_vectors<T>>(lanes, [&](auto nv, int64_t l, int64_t last) {
    const Step<nv(), T> step{last, false};
    const Rows<T, IO, Y> rows = all + l;
    Vec<T> sum[step.vectors], scale[step.vectors];
    UNROLL
    for (int v = 0; v < step.vectors; ++v) {
      sum[v] = load_raw<Vec<T>>(s + l + step.at(v));
      scale[v] = load_raw<Vec<T>>(rows.base + step.at(v));
    }
    for (int64_t j = 0; j < w; ++j)
      UNROLL
      for (int v = 0; v < step.vectors; ++v)
        write_row<OUT>(rows, step, j, step.at(v), scale[v], sum[v] + load_raw<Vec<T>>(t + j * lanes + l + step.at(v)));
  });
}

// What the lanes cut works in, for up to 2 chunks of lanes and at least one vector of them; lanes beyond the chunk's are zeros.
// u has `sides` sides; z and the copies of a few rows have two, for the gradients; written are rows on their way to memory.
template <class T> struct LanesScratch {
  LanesScratch(const Modes<T>& m, int64_t channels, int64_t chunk, bool copies_rows, int sides)
      : most(channels < 2 * chunk ? (channels < lanes_of<T> ? lanes_of<T> : channels) : 2 * chunk),
        modes(m.rows.count() * m.columns.count()), few_rows(m.columns.n < 64 ? 64 / m.columns.n : 1),
        copied(copies_rows ? few_rows * m.columns.n * most : 0), summed(m.rows.n * m.columns.count() + m.columns.n),
        scratch((sides * summed + 3 * modes + 3 * (copies_rows ? few_rows * m.columns.n : 0) + 8) * line_up(most) + 256) {
    for (int side = 0; side < sides; ++side) u[side] = scratch.take(summed * most);
    gains = scratch.take(modes * most);
    for (T*& part : z) part = scratch.take(modes * most);
    for (T*& part : copies) part = scratch.take(copied);
    written = scratch.take(copied);
    base = scratch.zeros(most);
    partial = scratch.take(most);
    dots = reinterpret_cast<double*>(scratch.take(2 * most));
  }
  int64_t most, modes;
  int64_t few_rows;  // they are still in the first-level cache, and in dot products over them T rounds little
  int64_t copied;
  int64_t summed;  // in u: functions along the columns for every row, or sums along the rows and behind them along the columns
  Scratch<T> scratch;
  T *u[2], *gains, *base, *partial, *z[2], *copies[2], *written;
  double* dots;
};

// How the lanes of x are read: here they are adjacent, or they lie apart, or they are multiplied with others that are adjacent.
enum class Lanes { here, apart, times };

template <Lanes HOW, class T, class IO> using ReadRows = PixelRows<std::conditional_t<HOW == Lanes::here, Read<T, IO>, T>>;

// Rows of w pixels of `lanes` channels from x on: where they lie, or copies that are widened, brought side by side or multiplied with
// those of a map that lies like x.
template <Lanes HOW, class T, class IO>
ReadRows<HOW, T, IO> adjacent_lanes(const IO* x, [[maybe_unused]] const IO* factor, Planes<const IO> p, int64_t rows, int64_t w, int64_t lanes,
                                    [[maybe_unused]] T* copies) {
  if constexpr (HOW == Lanes::times) {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < w; ++j) {
        const int64_t at = i * p.h + j * p.w;
        for_lanes<T, 2>(lanes, [&](auto nv, int64_t l, int64_t last) {
          const Step<nv(), T> step{last, false};
          UNROLL
          for (int v = 0; v < step.vectors; ++v) {
            const int64_t lane = l + step.at(v);
            step.write(copies + (i * w + j) * lanes + lane, step.read(x + at + lane) * step.read(factor + at + lane), 0);
          }
        });
      }
    return {copies, w * lanes, lanes};
  } else if constexpr (HOW == Lanes::apart) {
    const bool together = p.h == w;
    for (int64_t i = 0; i < (together ? 1 : rows); ++i)
      gather_lanes<T>(x + i * p.h, p.c, lanes, together ? rows * w : w, copies + i * w * lanes);
    return {copies, w * lanes, lanes};
  } else if constexpr (widened<T, IO>) {
    const bool together = p.w == lanes;
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < (together ? 1 : w); ++j)
        read_run(x + i * p.h + j * p.w, together ? w * lanes : lanes, copies + (i * w + j) * lanes);
    return {copies, w * lanes, lanes};
  } else {
    return {x, p.h, p.w};
  }
}

// Where mode k stands in (A_H, A_W, wide).
template <class T> int64_t place_of(const Modes<T>& m, int64_t k, int64_t wide) {
  return (m.mode[k].row * m.columns.count() + m.mode[k].column) * wide;
}

// z (A_H, A_W, wide) of x = W^T c in a chunk, from the modes of c in image b.
template <class T, class IO>
void mix_modes(const Modes<T>& m, const Beside<T, IO>& beside, int64_t channels, int64_t b, Chunk part, int64_t wide, T* z) {
  constexpr int64_t few = 4;  // modes whose sums are in registers
  const T* modes = beside.modes + b * m.inside * channels;
  const IO* weight = beside.weight + part.first;
  std::memset(z, 0, m.rows.count() * m.columns.count() * wide * sizeof(T));
  for (int64_t first = 0; first < m.inside; first += few) {
    const int64_t count = m.inside - first < few ? m.inside - first : few;
    if constexpr (widened<T, IO>) {
      for (int64_t k = first; k < first + count; ++k)
        for (int64_t c = 0; c < channels; ++c)
          for (int64_t l = 0; l < part.lanes; ++l) z[place_of(m, k, wide) + l] += modes[k * channels + c] * T(widen(weight[c * channels + l]));
      continue;
    }
    const T* of[few];  // the last one again for those beyond it
    for (int64_t k = 0; k < few; ++k) of[k] = modes + (first + (k < count ? k : count - 1)) * channels;
    for_lanes<T, max_vectors<T>>(part.lanes, [&](auto nv, int64_t l, int64_t last) {
      const Step<nv(), T> step{last, false};
      Vec<T> sum[few][step.vectors] = {};
      for (int64_t c = 0; c < channels; ++c)
        UNROLL
        for (int v = 0; v < step.vectors; ++v) {
          const Vec<T> w = step.read(weight + c * channels + l + step.at(v));
          UNROLL
          for (int64_t k = 0; k < few; ++k) sum[k][v] += of[k][c] * w;
        }
      for (int64_t k = 0; k < count; ++k)
        UNROLL
        for (int v = 0; v < step.vectors; ++v) step.write(z + place_of(m, first + k, wide) + l + step.at(v), sum[k][v], 0);
    });
  }
}

// The modes of a chunk of image b, in z (A_H, A_W, wide), to (B, inside, C).
template <class T> void store_modes(const Modes<T>& m, const T* z, int64_t channels, int64_t b, Chunk part, int64_t wide, T* to) {
  for (int64_t k = 0; k < m.inside; ++k)
    std::memcpy(to + (b * m.inside + k) * channels + part.first, z + place_of(m, k, wide), part.lanes * sizeof(T));
}

// Units [begin, end) of the work, or one pass over them. between and WRITE as in over_columns; here z is (A_H, A_W, wide).
// beside x its first map is what x is multiplied by (Lanes::times).
// prepare(part, wide, base, gains) fills base (wide) and gains (like z), which are zeros before, or null in the pass that expands. It is
// called whenever the chunk is another one; if all channels have the same profile, whenever it has another number of lanes.
template <Lanes HOW, bool WRITE, class T, class IO, class Prepare, class Between>
void over_lanes(const Work<T>& work, const Modes<T>& m, Planes<const IO> x, Planes<IO> y, const Beside<T, IO>& beside, int64_t begin,
                int64_t end, bool same, Prepare prepare, Between between) {
  const int64_t h = m.rows.n, w = m.columns.n, columns = m.columns.count(), chunks = chunks_of(work.channels, work.chunk);
  const bool by_rows = work.pass == reduce_pass || work.pass == expand_pass;
  constexpr bool copies = HOW != Lanes::here || widened<T, IO>;
  LanesScratch<T> s(m, work.channels, work.chunk, copies, work.sums ? 0 : 1);
  Chunk prepared{-1, 0};
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t b = by_rows ? 0 : unit / chunks, first_row = by_rows ? unit / chunks : 0, end_row = by_rows ? first_row + 1 : h;
    const Chunk part = chunk_of(work.channels, work.chunk, unit % chunks);
    const int64_t wide = part.lanes < lanes_of<T> ? lanes_of<T> : part.lanes, row = columns * wide;
    const int64_t start = b * x.b + part.first * x.c;
    T* u = work.sums ? work.sums + h * columns * part.first : s.u[0];
    const bool axes = work.axes && part.lanes % lanes_of<T> == 0;
    const int64_t u_row = axes ? wide : row;
    T* t = axes ? u + h * wide : nullptr;
    if (work.pass != reduce_pass && (prepared.lanes != part.lanes || (!same && prepared.first != part.first))) {
      prepared = part;
      T* gains = work.pass & mix_pass ? s.gains : nullptr;
      for (int64_t i = 0; gains && i < m.rows.count() * row; ++i) gains[i] = T(0);
      prepare(part, wide, s.base, gains);
    }
    // f(rows as they are read, the first of them, their number) for a few rows at a time
    const auto for_rows = [&](auto f) {
      for (int64_t i = first_row; i < end_row; i += s.few_rows) {
        const int64_t rows = end_row - i < s.few_rows ? end_row - i : s.few_rows;
        const int64_t at = start + i * x.h;
        f(adjacent_lanes<HOW>(x.data + at, beside.a + at, x, rows, w, part.lanes, s.copies[0]), i, rows);
      }
    };
    if (axes) std::memset(t, 0, w * wide * sizeof(T));
    if (work.pass & reduce_pass && !beside.modes)
      for_rows([&](auto in, int64_t first, int64_t rows) {
        for (int64_t i = 0; i < rows; ++i)
          if (axes) sum_row(in.data + i * in.h, in.w, w, wide, u + (first + i) * u_row, t);
          else reduce(m.columns, in.data + i * in.h, in.w, part.lanes, false, u + (first + i) * u_row, wide);
      });
    if (work.pass & mix_pass) {
      if (beside.modes) {
        mix_modes(m, beside, work.channels, b, part, wide, s.z[0]);
      } else {
        if (axes) reduce(m.columns, t, wide, wide, false, s.z[0], wide);
        reduce(m.rows, u, u_row, u_row, false, s.z[0], row);
      }
      between(b, part, wide, s.z[0], s.gains);
      if constexpr (WRITE) {
        expand<Out::sum>(m.rows, s.z[0], row, u_row, false, Rows<T, T, T>{s.base, u, 0, u, u_row});
        if (axes) {  // the constant is in u
          std::memset(s.z[0], 0, wide * sizeof(T));
          expand<Out::sum>(m.columns, s.z[0], wide, wide, false, Rows<T, T, T>{s.base, t, 0, t, wide});
        }
      }
    }
    if constexpr (WRITE) {
      if (!(work.pass & expand_pass)) continue;
      IO* to = y.data + b * y.b + part.first * y.c;
      for_rows([&](auto in, int64_t first, int64_t rows) {
        const auto expand_row = [&](int64_t i, auto* out, int64_t stride) {
          const int64_t at = start + (first + i) * x.h;
          const T* of_row = u + (first + i) * u_row;
          const auto expanded = [&]<Out OUT>(std::integral_constant<Out, OUT>, const auto& rows) {
            if (axes) expand_row_sums<OUT>(of_row, t, w, wide, rows);
            else expand<OUT>(m.columns, of_row, wide, part.lanes, false, rows);
          };
          Rows rows{s.base, in.data + i * in.h, in.w, out, stride};
          if constexpr (!copies)
            if (beside.a) {
              rows.a = beside.a + at;
              rows.b = beside.b + at;
              return expanded(std::integral_constant<Out, Out::added>(), rows);
            }
          expanded(std::integral_constant<Out, Out::scaled>(), rows);
          if constexpr (copies)
            for (int64_t j = 0; beside.a && j < w; ++j)
              for (int64_t l = 0; l < part.lanes; ++l) {
                const int64_t place = at + j * x.w + l;
                out[j * stride + l] += T(widen(beside.a[place])) * T(widen(beside.b[place]));
              }
        };
        for (int64_t i = 0; i < rows; ++i) {
          IO* to_row = to + (first + i) * y.h;
          if constexpr (!copies) {
            expand_row(i, to_row, y.w);
            continue;
          }
          T* written = s.written + i * w * part.lanes;
          expand_row(i, written, part.lanes);
          for (int64_t j = 0; HOW != Lanes::apart && j < w; ++j) write_run(written + j * part.lanes, to_row + j * y.w, part.lanes, false);
        }
        if constexpr (HOW == Lanes::apart) scatter_lanes(s.written, part.lanes, rows * w, to + first * y.h, y.c);
      });
    }
  }
}

// The profile of a chunk: base (wide) and, with the scales of the modes, gains (A_H, A_W, wide) if they are wanted.
template <class T> void prepare_profile(const Modes<T>& m, const Profile<T>& p, Chunk part, int64_t wide, T* base, T* gains) {
  for (int64_t l = 0; l < part.lanes; ++l) base[l] = p.base[(part.first + l) * p.base_stride];
  for (int64_t k = 0; gains && k < m.inside; ++k) {
    const Mode& mode = m.mode[k];
    T* to = gains + place_of(m, k, wide);
    const T* gain = p.gain + mode.index * p.gain_shell + part.first * p.gain_channel;
    for (int64_t l = 0; l < part.lanes; ++l) to[l] = T(mode.scale * gain[l * p.gain_channel]);
  }
}

template <Lanes HOW, class T, class IO>
void filter_lanes(const Work<T>& work, const Modes<T>& m, Planes<const IO> x, Planes<IO> y, const Profile<T>& p,
                  const Beside<T, IO>& beside, int64_t begin, int64_t end) {
  over_lanes<HOW, true>(
      work, m, x, y, beside, begin, end, p.base_stride == 0 && p.gain_channel == 0,
      [&](Chunk part, int64_t wide, T* base, T* gains) { prepare_profile(m, p, part, wide, base, gains); },
      [&](int64_t b, Chunk part, int64_t wide, T* z, const T* gains) {
        for (int64_t i = 0; i < m.rows.count() * m.columns.count() * wide; ++i) z[i] *= gains[i];
        if (beside.added) store_modes(m, z, work.channels, b, part, wide, beside.added);
      });
}

template <class T, class IO>
void mode_rows(const Work<T>& work, const Modes<T>& m, Planes<const IO> x, const IO* factor, const Profile<T>* p, T* out, int64_t begin,
               int64_t end) {
  const auto over = [&](auto how) {
    over_lanes<how(), false>(
        work, m, x, Planes<IO>{}, Beside<T, IO>{.a = factor}, begin, end, p == nullptr,
        [&](Chunk part, int64_t wide, T* base, T* gains) {
          if (p) prepare_profile(m, *p, part, wide, base, gains);
        },
        [&](int64_t b, Chunk part, int64_t wide, T* z, const T* gains) {
          for (int64_t i = 0; p && i < m.rows.count() * m.columns.count() * wide; ++i) z[i] *= gains[i];
          store_modes(m, z, work.channels, b, part, wide, out);
        });
  };
  if (factor) over(std::integral_constant<Lanes, Lanes::times>());
  else over(std::integral_constant<Lanes, Lanes::here>());
}

template <Lanes HOW, class T, class IO>
void mode_coefficients_lanes(const Work<T>& work, const Modes<T>& m, Planes<const IO> x, T* out, int64_t begin, int64_t end) {
  over_lanes<HOW, false>(
      work, m, x, Planes<IO>{}, Beside<T, IO>{}, begin, end, true, [](Chunk, int64_t, T*, T*) {},
      [&](int64_t b, Chunk part, int64_t wide, T* z, const T*) {
        for (int64_t k = 0; k < m.inside; ++k) {
          const T* from = z + place_of(m, k, wide);
          T* to = out + (b * work.channels + part.first) * m.inside + m.mode[k].index;
          for (int64_t l = 0; l < part.lanes; ++l) to[l * m.inside] = T(from[l] * m.mode[k].scale);
        }
      });
}

template <Lanes HOW, class T, class IO>
void backward_lanes(const Modes<T>& m, Planes<const IO> grad, Planes<const IO> x, double* sums, int64_t images, int64_t blocks,
                    int64_t channels, int64_t chunk, int64_t begin, int64_t end) {
  const int64_t h = m.rows.n, w = m.columns.n, chunks = chunks_of(channels, chunk);
  LanesScratch<T> s(m, channels, chunk, HOW == Lanes::apart || widened<T, IO>, 2);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t block = unit / chunks;
    const Chunk part = chunk_of(channels, chunk, unit % chunks);
    const int64_t lanes = part.lanes, wide = lanes < lanes_of<T> ? lanes_of<T> : lanes, row = m.columns.count() * wide;
    double* to = sums + block * (m.inside + 1) * channels + part.first;
    for (int64_t l = 0; l < lanes; ++l) s.dots[l] = 0;
    for (int64_t b = block * images / blocks; b < (block + 1) * images / blocks; ++b) {
      const IO* g = grad.data + b * grad.b + part.first * grad.c;
      const IO* f = x.data + b * x.b + part.first * x.c;
      for (int64_t first = 0; first < h; first += s.few_rows) {
        const int64_t rows = h - first < s.few_rows ? h - first : s.few_rows;
        const IO* none = nullptr;
        const ReadRows<HOW, T, IO> from[2] = {adjacent_lanes<HOW>(g + first * grad.h, none, grad, rows, w, lanes, s.copies[0]),
                                              adjacent_lanes<HOW>(f + first * x.h, none, x, rows, w, lanes, s.copies[1])};
        for (int64_t i = 0; i < rows; ++i)
          for (int side = 0; side < 2; ++side)
            reduce(m.columns, from[side].data + i * from[side].h, from[side].w, lanes, false, s.u[side] + (first + i) * row, wide);
        add_dots(from[0].data, from[0].h, from[0].w, from[1].data, from[1].h, from[1].w, rows, w, lanes, s.partial, s.dots);
      }
      for (int side = 0; side < 2; ++side) reduce(m.rows, s.u[side], row, row, false, s.z[side], row);
      for (int64_t k = 0; k < m.inside; ++k) {
        const int64_t at = m.mode[k].row * row + m.mode[k].column * wide;
        for (int64_t l = 0; l < lanes; ++l) to[k * channels + l] += double(s.z[0][at + l]) * double(s.z[1][at + l]);
      }
    }
    for (int64_t l = 0; l < lanes; ++l) to[m.inside * channels + l] += s.dots[l];
  }
}

}  // namespace
}  // namespace SIMD_NAME
}  // namespace spanet
