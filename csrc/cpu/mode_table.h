// The tables behind `Modes`: the functions of each axis and the list of modes, made once for a size, a radius and a vector.
#pragma once

#include <numbers>
#include <vector>

#include "cpu/radial_filter_kernel.h"
#include "modes.h"

namespace spanet {

// Function k of an axis at i, not normalised.
template <class T> double function_value(const Axis<T>& axis, int64_t k, int64_t i) {
  const int64_t f = k < axis.nc ? k : k - axis.nc + 1;
  const double angle = 2 * std::numbers::pi / static_cast<double>(axis.n) * static_cast<double>(f * i % axis.n);
  return k < axis.nc ? std::cos(angle) : std::sin(angle);
}

// Zeros that start on a cache line.
template <class T> struct Lines {
  struct alignas(64) Line {
    T values[64 / sizeof(T)];
  };
  std::vector<Line> lines;
  explicit Lines(int64_t elements = 0) : lines((elements + 64 / sizeof(T) - 1) / (64 / sizeof(T))) {}
  T* data() { return lines.empty() ? nullptr : lines[0].values; }
};

// Values for n elements laid out in slots (Step in tiles.h): the last vector of several is moved back to end with the elements.
// Of those that stand there twice, `once` keeps the first and has zeros for the second. If they fit in half a vector, both halves
// have them.
template <class T, class F> void fill_slots(int64_t n, int64_t lanes, T* slots, T* once, F value) {
  const int64_t vectors = (n + lanes - 1) / lanes, width = vectors * lanes;
  for (int64_t slot = 0; slot < width; ++slot) {
    const bool moved = n >= lanes && slot / lanes == vectors - 1;
    const int64_t i = moved ? slot - (width - n) : 2 * n <= lanes ? slot % (lanes / 2) : slot;
    if (i >= n) continue;
    slots[slot] = value(i);
    if (!moved || i >= slot / lanes * lanes) once[slot] = value(i);
  }
}

template <class T> struct AxisTable {
  std::vector<T> table;
  Lines<T> functions, once, transposed;
  Axis<T> axis;

  AxisTable(int64_t n, int64_t radius_squared, int64_t lanes) {
    const int64_t count = axis_functions(n, radius_squared), nc = count / 2 + 1, ns = count - nc, padded = line_up(count);
    const int64_t vectors = (n + lanes - 1) / lanes, width = vectors * lanes;
    functions = Lines<T>(count * width);
    once = Lines<T>(count * width);
    transposed = Lines<T>(width * padded);
    table.resize((n / 2 + 1) * count);
    axis = {n, nc, ns, table.data(), functions.data(), once.data(), transposed.data(), width, padded};
    for (int64_t k = 0; k < count; ++k) {
      const auto value = [&](int64_t i) { return static_cast<T>(function_value(axis, k, i)); };
      for (int64_t i = 0; i <= n / 2; ++i) table[i * count + k] = value(i);
      fill_slots(n, lanes, functions.data() + k * width, once.data() + k * width, value);
      for (int64_t slot = 0; slot < width; ++slot) transposed.data()[slot * padded + k] = once.data()[k * width + slot];
    }
  }
};

// Which modes the separable functions make: those inside the disc, or all products of them.
enum class Extent { disc, square };

template <class T> struct ModeTable {
  AxisTable<T> rows, columns;
  std::vector<Mode> mode;
  std::vector<T> scales;
  Lines<T> flat;
  Modes<T> modes;

  ModeTable(int64_t h, int64_t w, int64_t radius_squared, Extent extent, int64_t lanes)
      : rows(h, radius_squared, lanes), columns(w, radius_squared, lanes) {
    const std::vector<int32_t> shell_of = shell_table(radius_squared);
    const auto frequency = [](const Axis<T>& axis, int64_t k) { return k < axis.nc ? k : k - axis.nc + 1; };
    for (int32_t a = 0; a < rows.axis.count(); ++a)
      for (int32_t b = 0; b < columns.axis.count(); ++b) {
        const int64_t u = frequency(rows.axis, a), v = frequency(columns.axis, b), squared = u * u + v * v;
        const double weight = (u == 0 || 2 * u == h ? 1.0 : 2.0) * (v == 0 || 2 * v == w ? 1.0 : 2.0);
        const int32_t width = static_cast<int32_t>(columns.axis.width);
        const double scale = weight / static_cast<double>(h * w);
        // the place of a function among 1, cos 1, sin 1, ...
        const auto place = [](const Axis<T>& axis, int64_t k, int64_t f) { return k < axis.nc ? (f ? 2 * f - 1 : 0) : 2 * f; };
        const int64_t index = place(rows.axis, a, u) * columns.axis.count() + place(columns.axis, b, v);
        if (extent == Extent::square) mode.push_back({a, b, static_cast<int32_t>(index), a * width, b * width, std::sqrt(scale)});
        else if (squared <= radius_squared) mode.push_back({a, b, shell_of[squared], a * width, b * width, scale});
      }
    for (const Mode& one : mode) scales.push_back(static_cast<T>(one.scale));
    modes = {rows.axis, columns.axis, mode.data(), scales.data(), static_cast<int64_t>(mode.size()), shell_count(radius_squared), nullptr};
    if (radius_squared != 0 && !(radius_squared == 1 && modes.on_axes())) return;
    if (h * w > flat_pixels) return;
    flat = Lines<T>(radius_squared == 0 ? 1 : (h * w + lanes - 1) / lanes * lanes * (modes.inside - 1));
    for (int64_t k = 1; k < modes.inside; ++k)
      for (int64_t i = 0; i < h * w; ++i)
        flat.data()[(i / lanes * (modes.inside - 1) + k - 1) * lanes + i % lanes] = static_cast<T>(
            function_value(rows.axis, mode[k].row, i / w) * function_value(columns.axis, mode[k].column, i % w));
    modes.flat = flat.data();
  }
};

}  // namespace spanet
