// The launches of mode_coefficients for every dtype.
#include "mode_coefficients.cuh"

namespace spanet {

template struct ModeCoefficients<double>;
template struct ModeCoefficients<float>;
template struct ModeCoefficients<__half>;
template struct ModeCoefficients<__nv_bfloat16>;

}  // namespace spanet
