// The filter and the gradients of its profile by real FFTs, which wide discs are for: their cost does not grow with the disc's.
#pragma once

#include "cpu/tensor.h"

namespace spanet {

// Whether FFTs cost less than the modes do for the filter, or the gradients of its profile, on planes like those of x; the same for any
// number of images.
bool fft_pays(const Tensor& x, int64_t radius_squared, bool gradients);

// The filter of x, whose profile fits.
Tensor filter_by_fft(const Tensor& x, const Tensor& base, const Tensor& gain, int64_t radius_squared);

// base_grad (C,) and gain_grad (S, C) of the profile, written.
void profile_gradients_by_fft(const Tensor& grad, const Tensor& x, int64_t radius_squared, const Tensor& base_grad, const Tensor& gain_grad);

}  // namespace spanet
