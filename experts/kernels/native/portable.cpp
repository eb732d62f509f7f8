// The kernels for every other processor.
#include "simd_portable.h"
#include "table.h"

const KernelTable* portable_table() { return &kTable; }
