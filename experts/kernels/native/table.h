// The kernels of one instruction set as a table. Included last by its file, after its Simd.
#pragma once

#include "experts.h"
#include "mla.h"

namespace {

const KernelTable kTable = {linear,      heads,
                            experts,     rms_norm,
                            mla_prepare, mla_decode,
                            mla_prefill, choose_dictionary,
                            compact_panel, peak,
                            read_through};

}  // namespace
