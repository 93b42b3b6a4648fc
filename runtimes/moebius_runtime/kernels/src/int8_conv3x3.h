// INT8 3x3 convolution with stride 1 and padding 1, of the VAE: see int8_convolution.h. It competes with Winograd's
// filtering in float32 (winograd.h), which needs a quarter of the multiplications: it wins where bytes are multiplied
// more than four times as fast as floats, and where many output channels use each gathered value.
#pragma once

#include "int8_convolution.h"

namespace MOEBIUS_VARIANT {

inline void int8_conv3x3(const moebius::Int8Convolution& f, const moebius::Threads& threads) {
  ByteConvolution{f, 3, 1, 1, f.height, f.width}.run(threads);
}

}  // namespace MOEBIUS_VARIANT
