// The launches of axial_conv for every dtype.
#include "axial_conv.cuh"

namespace spanet {

template struct AxialConv<double>;
template struct AxialConv<float>;
template struct AxialConv<__half>;
template struct AxialConv<__nv_bfloat16>;

}  // namespace spanet
