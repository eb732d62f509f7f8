// Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1) over the paged latent cache.
#pragma once

#include "mla_decode.h"
#include "mla_prefill.h"
#include "mla_prepare.h"
