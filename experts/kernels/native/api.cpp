// What Python calls: chooses the instruction set once, takes the lock, passes the call on.
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <stdlib.h>
#include <string.h>

#include <chrono>
#include <mutex>

#include "compact.h"
#include "thread_pool.h"

struct GateCall;
void select_experts(const GateCall* call);  // gate.cpp

namespace {

struct Choice {
  const char* name;
  const KernelTable* table;
};

#if defined(MOBULA_HAS_AMX)
// Whether the processor has AMX and the system lets this process use its registers, which has to be asked for once.
bool has_amx() {
#ifdef MOBULA_EMULATE_AMX
  return true;
#elif defined(__linux__)
  constexpr unsigned kTile = 1u << 24, kInt8 = 1u << 25, kBf16 = 1u << 22, kAll = kTile | kInt8 | kBf16;
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || (edx & kAll) != kAll) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

bool is_supported(const char* name) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                        __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi2");
  const bool has_vnni = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vnni");
#ifdef MOBULA_EMULATE_BF16
  const bool has_bf16 = has_vnni;
#else
  const bool has_bf16 = has_vnni && __builtin_cpu_supports("avx512bf16");
#endif
#ifdef MOBULA_HAS_AMX
  if (!strcmp(name, "amx")) return has_bf16 && has_amx();
#endif
  if (!strcmp(name, "avx512bf16")) return has_bf16;
  if (!strcmp(name, "avx512vnni")) return has_vnni;
  if (!strcmp(name, "avx2")) return has_avx2;
#endif
  return !strcmp(name, "portable");
}

const KernelTable* table_of(const char* name) {
#if defined(__x86_64__)
#ifdef MOBULA_HAS_AMX
  if (!strcmp(name, "amx")) return amx_table();
#endif
  if (!strcmp(name, "avx512bf16")) return avx512bf16_table();
  if (!strcmp(name, "avx512vnni")) return avx512vnni_table();
  if (!strcmp(name, "avx2")) return avx2_table();
#endif
  return portable_table();
}

const char* const kNames[] = {"amx", "avx512bf16", "avx512vnni", "avx2", "portable"};

// Intel's processors take more time for products of bfloat16 by AVX-512 than for those of fp32, which AVX512-VNNI's use.
bool is_slow(const char* name) {
#if defined(__x86_64__)
  return !strcmp(name, "avx512bf16") && __builtin_cpu_is("intel");
#else
  return false;
#endif
}

Choice best() {
  for (const char* name : kNames)
    if (is_supported(name) && !is_slow(name)) return {name, table_of(name)};
  abort();
}

Choice choice = best();
std::mutex calls;  // scratch memory and threads serve one call at a time

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

struct ReadProbe {
  const float* data;
  size_t count_per_task;
};

void read_task(void* context, int task, int) {
  const ReadProbe& probe = *(const ReadProbe*)context;
  volatile float sink = choice.table->read(probe.data + task * probe.count_per_task, probe.count_per_task);
  (void)sink;
}

struct PeakProbe {
  int format;
  long iterations;
  double operations[256];
};

void peak_task(void* context, int task, int) {
  PeakProbe& probe = *(PeakProbe*)context;
  probe.operations[task] = choice.table->peak(probe.format, probe.iterations);
}

// A panel of pairs of bfloat16 numbers from `count` rows; the others are zero.
void pack_bf16(const uint32_t* source, int pairs, int count, uint32_t* target) {
  for (int block = 0; block < pairs; block += 16)  // whole cache lines of each row at a time
    for (int j = 0; j < kPanelColumns; j++)
      for (int i = block; i < pairs && i < block + 16; i++)
        target[(size_t)i * kPanelColumns + j] = j < count ? source[(size_t)j * pairs + i] : 0;
}

// Rows [num_outputs][num_inputs] of bfloat16 numbers that become panels of a compact matrix from `first_panel` on.
struct CompactRows {
  const void* from;
  const Matrix* to;
  int first_panel, num_outputs;
  int num_panels() const { return (num_outputs + kPanelColumns - 1) / kPanelColumns; }
  // A panel of them as a plain one, in memory of the thread.
  const uint16_t* plain(int panel) const {
    const int pairs = to->num_inputs / 2, first = panel * kPanelColumns, left = num_outputs - first;
    uint32_t* packed = (uint32_t*)own_scratch((size_t)pairs * kPanelColumns * sizeof(uint32_t));
    pack_bf16((const uint32_t*)from + (size_t)first * pairs, pairs, left < kPanelColumns ? left : kPanelColumns, packed);
    return (const uint16_t*)packed;
  }
};

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

int mobula_abi() { return kAbi; }

const char* mobula_instruction_set() { return choice.name; }

// For tests: every set that this processor has gives the same answers within rounding. Returns 0, or -1 if it lacks it.
int mobula_use_instruction_set(const char* name) {
  std::lock_guard<std::mutex> lock(calls);
  for (const char* known : kNames)
    if (!strcmp(known, name) && is_supported(known)) {
      choice = {known, table_of(known)};
      return 0;
    }
  return -1;
}

void mobula_set_num_threads(int count) {
  std::lock_guard<std::mutex> lock(calls);
  set_num_threads(count);
}

int mobula_num_threads() { return num_threads(); }

void mobula_linear(const LinearCall* call) {
  std::lock_guard<std::mutex> lock(calls);
  choice.table->linear(call);
}

void mobula_heads(const HeadsCall* call) {
  std::lock_guard<std::mutex> lock(calls);
  choice.table->heads(call);
}

// The call's own pointer to the assignments is not read.
void mobula_experts(const ExpertsCall* call, const int32_t* assignments) {
  std::lock_guard<std::mutex> lock(calls);
  ExpertsCall complete = *call;
  complete.assignments = assignments;
  choice.table->experts(&complete);
}

void mobula_select_experts(const GateCall* call) {
  std::lock_guard<std::mutex> lock(calls);
  select_experts(call);
}

void mobula_rms_norm(const NormCall* call) {
  std::lock_guard<std::mutex> lock(calls);
  choice.table->rms_norm(call);
}

void mobula_mla_prepare(const MlaPrepareCall* call) {
  std::lock_guard<std::mutex> lock(calls);
  choice.table->mla_prepare(call);
}

void mobula_mla_decode(const MlaDecodeCall* call) {
  std::lock_guard<std::mutex> lock(calls);
  choice.table->mla_decode(call);
}

void mobula_mla_prefill(const MlaPrefillCall* call) {
  std::lock_guard<std::mutex> lock(calls);
  choice.table->mla_prefill(call);
}

void mobula_mla_layer(const MlaLayer* layer, const MlaStep* step, const MlaRows* rows) {
  std::lock_guard<std::mutex> lock(calls);
  mla_layer(*choice.table, MlaLayerCall{*layer, *step, *rows});
}

// Bytes a second that the pool's threads read from `data`, which should be larger than every cache.
double mobula_probe_read(const void* data, size_t num_bytes) {
  std::lock_guard<std::mutex> lock(calls);
  const int tasks = 64 * num_threads();
  ReadProbe probe = {(const float*)data, num_bytes / 4 / tasks / 64 * 64};
  const auto start = std::chrono::steady_clock::now();
  parallel_for(tasks, read_task, &probe);
  return 4.0 * probe.count_per_task * tasks / seconds_since(start);
}

// Operations a second of all threads together.
double mobula_probe_peak(int format, long iterations) {
  std::lock_guard<std::mutex> lock(calls);
  PeakProbe probe = {};
  probe.format = format;
  probe.iterations = iterations;
  const auto start = std::chrono::steady_clock::now();
  parallel_for(num_threads(), peak_task, &probe);
  double total = 0.0;
  for (int i = 0; i < num_threads(); i++) total += probe.operations[i];
  return total / seconds_since(start);
}

// Packs rows [num_outputs][num_inputs] (outputs from `first_panel` on) of the matrix's format; int8 and int4 come as one
// int8 a number. `scales`: [num_outputs][num_inputs / group_size]. Padding outputs are zero.
void mobula_pack(const void* from, const float* scales, const Matrix* to, int first_panel, int num_outputs) {
  std::lock_guard<std::mutex> lock(calls);
  struct Pack {
    const void* from;
    const float* scales;
    const Matrix* to;
    int first_panel, num_outputs;
  } pack = {from, scales, to, first_panel, num_outputs};
  parallel_for((num_outputs + kPanelColumns - 1) / kPanelColumns, [](void* context, int task, int) {
    const Pack& p = *(const Pack*)context;
    const Matrix& m = *p.to;
    const int k = m.num_inputs, first = task * kPanelColumns, panel = p.first_panel + task;
    const int left = p.num_outputs - first, count = left < kPanelColumns ? left : kPanelColumns;
    if (m.format == kFloat32) {
      const float* source = (const float*)p.from + (size_t)first * k;
      float* target = (float*)m.data + (size_t)panel * k * kPanelColumns;
      for (int i = 0; i < k; i++)
        for (int j = 0; j < kPanelColumns; j++) target[(size_t)i * kPanelColumns + j] = j < count ? source[(size_t)j * k + i] : 0.0f;
    } else if (m.format == kBfloat16) {
      pack_bf16((const uint32_t*)p.from + (size_t)first * (k / 2), k / 2, count,
                (uint32_t*)m.data + (size_t)panel * (k / 2) * kPanelColumns);
    } else {
      const int8_t* source = (const int8_t*)p.from + (size_t)first * k;
      const bool is_int4 = m.format == kInt4;
      uint8_t* target = (uint8_t*)m.data + (size_t)panel * k * kPanelColumns / (is_int4 ? 2 : 1);
      for (int i = 0; i < k; i++)
        for (int j = 0; j < kPanelColumns; j++) {
          const int number = j < count ? source[(size_t)j * k + i] : 0;
          if (!is_int4)
            target[(size_t)(i / 4) * 128 + j * 4 + i % 4] = (uint8_t)(number + 128);
          else if (j < 16)
            target[(size_t)(i / 4) * 64 + j * 4 + i % 4] = (uint8_t)(number + 8);
          else
            target[(size_t)(i / 4) * 64 + (j - 16) * 4 + i % 4] |= (uint8_t)((number + 8) << 4);
        }
      const int groups = k / m.group_size;
      float* target_scales = (float*)m.scales + (size_t)panel * groups * kPanelColumns;
      for (int group = 0; group < groups; group++)
        for (int j = 0; j < kPanelColumns; j++)
          target_scales[group * kPanelColumns + j] = j < count ? p.scales[(size_t)(first + j) * groups + group] : 0.0f;
    }
  }, &pack);
}

// Chooses the dictionaries of these rows' panels; returns how many exceptions they have, the first of which is the
// matrix's `first_exception`th. Of the matrix only the dictionaries' memory is used.
int mobula_choose_dictionaries(const void* from, const Matrix* to, int first_panel, int num_outputs, int first_exception) {
  std::lock_guard<std::mutex> lock(calls);
  CompactRows rows = {from, to, first_panel, num_outputs};
  parallel_for(rows.num_panels(), [](void* context, int panel, int) {
    const CompactRows& r = *(const CompactRows*)context;
    choice.table->choose_dictionary(r.plain(panel), r.to->num_inputs, (Dictionary*)r.to->dictionaries + r.first_panel + panel);
  }, &rows);
  int num_exceptions = 0;
  for (int panel = first_panel; panel < first_panel + rows.num_panels(); panel++) {
    Dictionary& dictionary = ((Dictionary*)to->dictionaries)[panel];
    dictionary.first_exception = first_exception + num_exceptions;
    num_exceptions += dictionary.num_exceptions;
  }
  return num_exceptions;
}

// Packs these rows; their dictionaries are chosen, and all memory of the matrix is there.
void mobula_pack_compact(const void* from, const Matrix* to, int first_panel, int num_outputs) {
  std::lock_guard<std::mutex> lock(calls);
  CompactRows rows = {from, to, first_panel, num_outputs};
  parallel_for(rows.num_panels(), [](void* context, int panel, int) {
    const CompactRows& r = *(const CompactRows*)context;
    choice.table->compact_panel(r.plain(panel), r.first_panel + panel, r.to);
  }, &rows);
}

}  // extern "C"
#pragma GCC visibility pop
