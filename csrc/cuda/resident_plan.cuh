// Which calls the kernels on registers take, and their launches. Runs on the host.
#pragma once

#include "channels_filter.cuh"
#include "moves.cuh"
#include "pixels_filter.cuh"
#include "resident_filter.cuh"

namespace spanet {

// c[0..3]: cos 1, sin 1, cos 2, sin 2 at position i of an axis of length n, correctly rounded.
inline Wave4 wave_at(int64_t i, int64_t n) {
  Wave4 wave{};
  for (int f = 1; f <= 2; ++f) {
    // the nearest multiple of a quarter turn comes off first: exact zeros and ones
    const int64_t turn = f * i % n, quarter = (4 * turn + n / 2) / n;
    const double angle = (4 * turn - quarter * n) * (M_PI / 2) / static_cast<double>(n), c = std::cos(angle), s = std::sin(angle);
    const double cosines[4] = {c, -s, -c, s};
    wave.v[2 * f - 2] = static_cast<float>(cosines[quarter % 4]);
    wave.v[2 * f - 1] = static_cast<float>(cosines[(quarter + 3) % 4]);
  }
  return wave;
}

// What does not depend on the layout.
inline Resident make_resident(const Shape& shape, int64_t radius_squared) {
  Resident plan{};
  plan.channels = static_cast<int>(shape.channels);
  plan.height = static_cast<int>(shape.height);
  plan.width = static_cast<int>(shape.width);
  plan.pairs = static_cast<int>((shape.height - 1) / 2);
  plan.middle = shape.height % 2 == 0;
  const int frequencies[kSlots][2] = {{0, 0}, {9, 9}, {9, 9}, {9, 9}, {0, 1}, {0, 1}, {1, 0}, {1, 0},
                                      {1, 1}, {1, 1}, {1, 1}, {1, 1}, {0, 2}, {0, 2}, {2, 0}, {2, 0}};  // 9: a free slot
  for (int k = 0; k < kSlots; ++k) {
    const auto [u, v] = frequencies[k];
    if (2 * u > shape.height || 2 * v > shape.width || u * u + v * v > radius_squared) continue;
    const int twice = (u == 0 || 2 * u == shape.height ? 1 : 2) * (v == 0 || 2 * v == shape.width ? 1 : 2);
    plan.weight[k] = static_cast<float>(twice / (static_cast<double>(shape.height) * static_cast<double>(shape.width)));
  }
  for (int m = 0; m <= plan.pairs; ++m) plan.rows[m] = wave_at(m, shape.height);
  for (int j = 0; j < shape.width; ++j) plan.columns[j] = wave_at(j, shape.width);
  plan.shells = static_cast<int>(shell_count(std::min<int64_t>(spectrum_limit(shape, radius_squared), 4)));
  return plan;
}

// Whether words of VEC elements lie side by side in the rows of every plane, at strides that suit them.
inline bool words_in_rows(const Shape& shape, const View& view, int64_t size, int vec) {
  const bool aligned = reinterpret_cast<uintptr_t>(view.data) % (vec * size) == 0 && shape.width % vec == 0;
  const bool strides = (shape.batch == 1 || view.b % vec == 0) && (shape.channels == 1 || view.c % vec == 0) &&
                       (shape.height == 1 || view.h % vec == 0);
  return aligned && strides && (shape.width == 1 || view.w == 1) && std::abs(view.h) <= INT32_MAX / size;
}

template <int VALUE> using Constant = std::integral_constant<int, VALUE>;

// Whether words of VEC channels lie side by side in every pixel.
inline bool words_in_pixels(const Shape& shape, const View& view, int64_t size, int vec) {
  const bool aligned = reinterpret_cast<uintptr_t>(view.data) % (vec * size) == 0 && shape.channels % vec == 0;
  const bool strides = (shape.batch == 1 || view.b % vec == 0) && (shape.height == 1 || view.h % vec == 0) && (shape.width == 1 || view.w % vec == 0);
  return aligned && strides && (shape.channels == 1 || view.c == 1) && std::abs(view.h) <= INT32_MAX / size;
}

// Launches run(first image, planes) of at most 2^30 planes and whole images.
template <typename Run>
void in_images(const Shape& shape, Run run) {
  const int64_t images = std::max<int64_t>(1, (int64_t{1} << 30) / shape.channels);
  for (int64_t first = 0; first < shape.batch; first += images) run(first, std::min(images, shape.batch - first) * shape.channels);
}

inline View from_image(View view, int64_t image, int64_t size) {
  view.data = static_cast<char*>(view.data) + image * view.b * size;
  return view;
}

// Bytes from row to row; a single row has none.
inline int row_pitch(const Shape& shape, const View& view, int64_t size) { return shape.height == 1 ? 0 : static_cast<int>(view.h * size); }

// Lanes of a plane: 8, 16 or 32.
inline void share_lanes(Resident& plan, int words) {
  plan.words = words;
  for (plan.shift = 3; 1 << plan.shift < words; ++plan.shift) {}
}

template <typename T, int VEC, int SIZE, int TEAMS, bool LAST>
bool run_pixels(const Shape& shape, Resident plan, const View& x, const View& y, const Profile<float>& profile, const Device& device) {
  in_images(shape, [&](int64_t image, int64_t count) {
    plan.planes = static_cast<unsigned>(count / VEC);
    launch(pixels_kernel<T, VEC, SIZE, TEAMS, LAST>, ceil_div(plan.planes, kPixelThreads / TEAMS), kPixelThreads, 0, device.stream, plan,
           from_image(x, image, sizeof(T)), from_image(y, image, sizeof(T)), profile);
  });
  return true;
}

template <typename T>
bool run_channels_filter(const Shape& shape, const View& x, const View& y, const Profile<float>& profile, int64_t radius_squared,
                         const Device& device) {
  constexpr int VEC = sizeof(T) == 2 ? 2 : 1, kChannels = kResidentWords * VEC;
  const int64_t size = std::max(shape.height, shape.width);
  if (size > 56 || !words_in_pixels(shape, x, sizeof(T), VEC) || !words_in_pixels(shape, y, sizeof(T), VEC)) return false;
  Resident plan = make_resident(shape, radius_squared);
  plan.pitch_x = row_pitch(shape, x, sizeof(T));
  plan.pitch_y = row_pitch(shape, y, sizeof(T));
  plan.words = static_cast<int>(shape.channels / VEC);
  plan.chunks = static_cast<int>(ceil_div(shape.channels, kChannels));
  const auto by_chunks = [&](auto kernel, int64_t columns, int64_t tile_bytes) {  // columns: to a word
    const int threads = static_cast<int>(ceil_div(columns * kResidentWords, 32)) * 32;
    const int64_t floats = shape.width * 4 + kChannels * kSlots * (1 + threads / 32), bytes = floats * sizeof(float) + tile_bytes;
    const int64_t reserved = 1 << 10;  // by the system, of every block
    if (tile_bytes > 0 && 2 * (bytes + reserved) > device.shared_limit + reserved) return false;
    in_images(shape, [&](int64_t image, int64_t count) {
      launch(kernel, count / shape.channels * plan.chunks, threads, static_cast<int>(bytes), device.stream, plan, from_image(x, image, sizeof(T)),
             from_image(y, image, sizeof(T)), profile);
    });
    return true;
  };
  const auto in_registers = [&](auto rows, auto known) {
    return by_chunks(channels_kernel<T, VEC, decltype(rows)::value, decltype(known)::value>, shape.width, 0);
  };
  using Some = Constant<kNothing>;
  using Exact = Constant<kHeight>;
  const bool square = shape.height == shape.width && spectrum_limit(shape, radius_squared) <= 1;
  const auto pixels = [&](auto rows, auto teams) {
    return run_pixels<T, VEC, decltype(rows)::value, decltype(teams)::value, true>(shape, plan, x, y, profile, device);
  };
  if (square && size == 7) return pixels(Constant<7>{}, Constant<1>{});
  if (square && size == 14) return pixels(Constant<14>{}, Constant<2>{});
  if (size <= 7) return shape.height == 7 ? in_registers(Constant<7>{}, Exact{}) : in_registers(Constant<14>{}, Some{});
  if (size <= 14) return shape.height == 14 ? in_registers(Constant<14>{}, Exact{}) : in_registers(Constant<14>{}, Some{});
  if (size <= 28) return shape.height == 28 ? in_registers(Constant<28>{}, Exact{}) : in_registers(Constant<28>{}, Some{});
  const int64_t tile_bytes = shape.height * shape.width * kChannels * sizeof(T);
  const bool staged = words_in_pixels(shape, x, sizeof(T), 16 / sizeof(T)) && by_chunks(staged_kernel<T, VEC>, (shape.width + 1) / 2, tile_bytes);
  return staged || in_registers(Constant<56>{}, Some{});
}

// False where another kernel has to do it.
template <typename T>
bool run_resident_filter(const Shape& shape, const View& x, const View& y, const Profile<float>& profile, int64_t radius_squared,
                         const Device& device) {
  if (spectrum_limit(shape, radius_squared) > 4) return false;
  if (shape.channels_last) return run_channels_filter<T>(shape, x, y, profile, radius_squared, device);
  if (shape.width > kResidentColumns) return false;
  const auto run = [&](auto vec, auto rows, auto known) {
    constexpr int VEC = decltype(vec)::value, SIZE = decltype(rows)::value;
    Resident plan = make_resident(shape, radius_squared);
    plan.pitch_x = row_pitch(shape, x, sizeof(T));
    plan.pitch_y = row_pitch(shape, y, sizeof(T));
    share_lanes(plan, static_cast<int>(shape.width) / VEC);
    const int planes = 32 * kResidentWarps >> plan.shift, bytes = static_cast<int>(shape.width * sizeof(Wave4) + planes * kSlots * sizeof(float));
    in_images(shape, [&](int64_t image, int64_t count) {
      plan.planes = static_cast<unsigned>(count);
      launch(resident_kernel<T, VEC, SIZE, decltype(known)::value>, ceil_div(count, planes), 32 * kResidentWarps, bytes, device.stream, plan,
             from_image(x, image, sizeof(T)), from_image(y, image, sizeof(T)), profile);
    });
    return true;
  };
  const auto run_of_words = [&](const View& view) { return is_run(shape, view) && reinterpret_cast<uintptr_t>(view.data) % 16 == 0; };
  if (shape.height == shape.width && spectrum_limit(shape, radius_squared) <= 1 && run_of_words(x) && run_of_words(y)) {
    Resident plan = make_resident(shape, radius_squared);
    plan.words = plan.channels;
    if (shape.height == 7) return run_pixels<T, 1, 7, 1, false>(shape, plan, x, y, profile, device);
    if (shape.height == 14) return run_pixels<T, 1, 14, 2, false>(shape, plan, x, y, profile, device);
  }
  const auto words = [&](int vec) { return words_in_rows(shape, x, sizeof(T), vec) && words_in_rows(shape, y, sizeof(T), vec); };
  const bool two = words(2), one = words(1) && shape.width <= 32;
  const auto exact = [&](int size) { return shape.height == size && shape.width == size && x.h == size && y.h == size; };
  using Some = Constant<kNothing>;
  using Exact = Constant<kRows>;
  if (two && exact(56)) return run(Constant<2>{}, Constant<56>{}, Exact{});
  if (two && exact(28)) return run(Constant<2>{}, Constant<28>{}, Exact{});
  if (two && exact(14)) return run(Constant<2>{}, Constant<14>{}, Exact{});
  if (one && exact(7)) return run(Constant<1>{}, Constant<7>{}, Exact{});
  if (two && shape.height <= 14) return run(Constant<2>{}, Constant<14>{}, Some{});
  if (two && shape.height <= 28) return run(Constant<2>{}, Constant<28>{}, Some{});
  if (two && shape.height <= 56) return run(Constant<2>{}, Constant<56>{}, Some{});
  if (one && shape.height <= 14) return run(Constant<1>{}, Constant<14>{}, Some{});
  if (one && shape.height <= 28) return run(Constant<1>{}, Constant<28>{}, Some{});
  return false;
}

}  // namespace spanet
