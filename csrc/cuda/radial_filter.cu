// The launches of radial_filter for every dtype.
#include "radial_filter_plan.cuh"

namespace spanet {

template struct RadialFilter<double>;
template struct RadialFilter<float>;
template struct RadialFilter<__half>;
template struct RadialFilter<__nv_bfloat16>;

}  // namespace spanet
