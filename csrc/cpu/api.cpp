// The C ABI: arguments checked, the instruction set chosen, calls handed to its kernels.
#include <dlfcn.h>
#include <pthread.h>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#if defined(_OPENMP)
#include <omp.h>
#endif

#include <atomic>
#include <cctype>
#include <cmath>
#include <cstdlib>
#include <exception>
#include <string>

#include "kernels.h"

namespace action_kernels {
namespace {

// ------------------------------------------------------------------------------ instruction sets

bool always() { return true; }

#if defined(__x86_64__)
// The compiler's run-time library asks the processor, and the system whether it saves the registers.
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); }
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_avx512bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
// Linux gives a process the tiles' registers when it asks for them.
bool has_amx() {
  unsigned a, b, c, d;
  constexpr unsigned bf16_and_tiles = 1u << 22 | 1u << 24;
  if (!has_avx512bf16() || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & bf16_and_tiles) != bf16_and_tiles) return false;
  constexpr long request_permission = 0x1023, tile_data = 18;
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}
#endif

struct Candidate {
  const KernelTable* kernels;
  bool (*supported)();
};

// Best first.
const Candidate candidates[] = {
#if defined(__x86_64__)
    {&amx_kernels, has_amx},
    {&avx512bf16_kernels, has_avx512bf16},
    {&avx512_kernels, has_avx512},
    {&avx2_kernels, has_avx2},
#elif defined(__aarch64__)
    {&neon_kernels, always},  // every 64-bit Arm processor has it
#endif
    {&portable_kernels, always},
#if defined(AK_TEST_EMULATED_AVX512)
    {&emulated_avx512_kernels, has_avx2},
    {&emulated_avx512bf16_kernels, has_avx2},
    {&emulated_amx_kernels, has_avx2},
#endif
};

const KernelTable* best() {
  for (const Candidate& candidate : candidates) {
    if (candidate.supported()) return candidate.kernels;
  }
  return &portable_kernels;
}

// Names are given by people, in the environment too: case and space around them do not matter.
std::string plain(const char* name) {
  std::string text;
  for (const char* c = name ? name : ""; *c; ++c) text += static_cast<char>(std::tolower(static_cast<unsigned char>(*c)));
  const char* space = " \t\r\n\v\f";
  text.erase(0, text.find_first_not_of(space));
  text.erase(text.find_last_not_of(space) + 1);
  return text;
}

int find(const char* given, const KernelTable** kernels) {
  const std::string name = plain(given);
  if (name.empty() || name == "auto") {
    *kernels = best();
    return AK_OK;
  }
  for (const Candidate& candidate : candidates) {
    if (name != candidate.kernels->name) continue;
    if (!candidate.supported()) return AK_UNSUPPORTED_ISA;
    *kernels = candidate.kernels;
    return AK_OK;
  }
  return AK_UNKNOWN_ISA;
}

struct Choice {
  std::atomic<const KernelTable*> kernels;
  int status;
  Choice() {
    const KernelTable* chosen = best();
    status = find(std::getenv("ACTION_KERNELS_CPU_ISA"), &chosen);
    kernels = chosen;
  }
};

Choice& choice() {
  static Choice the_choice;
  return the_choice;
}

const KernelTable& kernels() { return *choice().kernels.load(); }

// ------------------------------------------------------------------------------ threads after a fork

// GNU OpenMP's workers do not survive a fork and it does not notice: its next parallel region in the child
// would wait for them for ever. A forked child therefore works in one thread.
std::atomic<bool> is_forked_child{false};

struct ForkHandler {
  ForkHandler() {
    pthread_atfork(nullptr, nullptr, [] { is_forked_child = true; });
  }
} fork_handler;

int usable_threads(int threads) { return threads < 1 || is_forked_child ? 1 : threads; }

// ------------------------------------------------------------------------------ threads that pay

// A team of threads costs up to 15 microseconds to start and to end, a few times a call. That many multiply-adds,
// or elements read and written, take a thread about twice as long.
#if defined(AK_TEST_ALL_THREADS)
constexpr double products_a_thread = 1, elements_a_thread = 1;
#else
constexpr double products_a_thread = 1 << 21, elements_a_thread = 1 << 16;
#endif

int worth_threads(double work, double work_a_thread) {
  const double worth = 1 + work / work_a_thread;
  return worth < 1e6 ? static_cast<int>(worth) : 1000000;
}

int at_most(int threads, int worth) { return threads < 1 ? 1 : threads < worth ? threads : worth; }

// ------------------------------------------------------------------------------ checks

bool is_dtype(int dtype) { return dtype == AK_FLOAT32 || dtype == AK_BFLOAT16 || dtype == AK_FLOAT16; }

int check_rows(const ak_rows& rows, int64_t dim) {
  if (rows.rows < 0 || dim < 1 || (rows.rows > 1 && rows.row_stride < dim)) return AK_BAD_SHAPE;
  if (!is_dtype(rows.dtype)) return AK_BAD_DTYPE;
  if (rows.rows > 0 && !rows.data) return AK_MISSING_POINTER;
  return AK_OK;
}

int start_pair_call(const ak_rows* anchors, const ak_rows* keys, int64_t dim, int relation, int allow_bfloat16,
                    int pass, int threads, PairCall* call) {
  if (!anchors) return AK_MISSING_POINTER;
  if (int status = check_rows(*anchors, dim)) return status;
  if (keys) {
    if (int status = check_rows(*keys, dim)) return status;
  }
  if (relation < AK_ANY_CLASS || relation > AK_DIFFERENT_CLASS) return AK_BAD_RELATION;
  for (const ak_rows* rows : {anchors, keys}) {
    if (rows && rows->rows > 0 && (rows->labels != nullptr) != (relation != AK_ANY_CLASS)) return AK_BAD_RELATION;
  }
  call->anchors = *anchors;
  if (keys) call->keys = *keys;
  call->symmetric = !keys;
  call->relation = relation;
  call->dim = dim;
  call->allow_bfloat16 = allow_bfloat16 != 0;
  call->pass = pass;
  const double columns = keys ? static_cast<double>(keys->rows) : 0.5 * static_cast<double>(anchors->rows);
  const double products = static_cast<double>(anchors->rows) * columns * static_cast<double>(dim);
  call->threads_worth = worth_threads(products, products_a_thread);
  // Requested, not usable: the size of the workspace must not change between query and call.
  call->threads = at_most(threads, call->threads_worth);
  return AK_OK;
}

int finish_pair_call(double scale, void* workspace, PairCall* call) {
  if (!(std::isfinite(scale) && scale > 0)) return AK_BAD_SCALE;
  if (!workspace) return AK_MISSING_POINTER;
  call->scale = scale;
  call->workspace = workspace;
  call->threads = usable_threads(call->threads);
  return AK_OK;
}

// The gradients that a backward pass is asked for, checked.
int take_gradients(void* grad_anchors, void* grad_keys, PairCall* call) {
  if (call->symmetric && grad_keys) return AK_MISSING_POINTER;
  call->grad_anchors = grad_anchors;
  call->grad_keys = grad_keys;
  return AK_OK;
}

int pass_of(const void* grad_anchors, const void* grad_keys) {
  return (grad_anchors ? AK_GRAD_ANCHORS : 0) | (grad_keys ? AK_GRAD_KEYS : 0);
}

// A call on `count` centres with as many threads as were asked for.
int start_center_call(int64_t dim, int64_t count, int threads, CenterCall* call) {
  if (dim < 1 || count < 1) return AK_BAD_SHAPE;
  *call = CenterCall{};
  call->dim = dim;
  call->count = count;
  call->threads = threads < 1 ? 1 : threads;
  return AK_OK;
}

int finish_center_call(const ak_rows& rows, const float* centers, double scale, void* workspace, CenterCall* call) {
  if (!(std::isfinite(scale) && scale > 0)) return AK_BAD_SCALE;
  if (rows.rows > 0 && (!centers || !workspace)) return AK_MISSING_POINTER;
  call->rows = rows;
  call->centers = centers;
  call->scale = scale;
  call->workspace = workspace;
  const double elements = static_cast<double>(rows.rows) * static_cast<double>(call->dim);
  const double products = elements * static_cast<double>(call->count);
  const int worth = worth_threads(elements / elements_a_thread + products / products_a_thread, 1);
  call->threads = usable_threads(at_most(call->threads, worth));
  return AK_OK;
}

int start_prepare_call(const ak_map* map, int rows_dtype, int normalize, int threads, PrepareCall* call) {
  if (!map) return AK_MISSING_POINTER;
  if (map->batch < 0 || map->dim < 1 || map->pixels < 0) return AK_BAD_SHAPE;
  if (!is_dtype(map->dtype) || !is_dtype(rows_dtype)) return AK_BAD_DTYPE;
  if (map->batch * map->pixels > 0 && !map->data) return AK_MISSING_POINTER;
  *call = PrepareCall{};
  call->map = *map;
  call->normalize = normalize != 0;
  call->rows_dtype = rows_dtype;
  const double elements = static_cast<double>(map->batch * map->pixels) * static_cast<double>(map->dim);
  call->threads = usable_threads(at_most(threads, worth_threads(elements, elements_a_thread)));
  return AK_OK;
}

int start_sample_call(const ak_sampling* sampling, SampleCall* call) {
  if (!sampling) return AK_MISSING_POINTER;
  const ak_sampling& s = *sampling;
  const int64_t most_pixels = INT32_MAX, most_draws = int64_t{1} << 32;
  if (s.batch < 0 || s.pixels < 0 || s.classes < 1 || s.samples < 0) return AK_BAD_SHAPE;
  if (s.pixels > 0 && s.batch > most_pixels / s.pixels) return AK_BAD_SHAPE;
  if (s.classes > most_pixels || s.samples > most_draws / s.classes) return AK_BAD_SHAPE;
  if (s.scores && !is_dtype(s.scores_dtype)) return AK_BAD_DTYPE;
  if (s.labels_dtype < AK_INT64 || s.labels_dtype > AK_UINT8) return AK_BAD_DTYPE;
  if (s.batch * s.pixels > 0 && !s.labels) return AK_MISSING_POINTER;
  *call = SampleCall{};
  call->sampling = s;
  return AK_OK;
}

bool is_empty(const ak_neighbourhoods& what) { return what.batch == 0 || what.channels == 0; }

int start_features_call(const ak_neighbourhoods* what, int threads, FeaturesCall* call) {
  if (!what) return AK_MISSING_POINTER;
  if (what->count < 0 || what->batch < 0 || what->channels < 0) return AK_BAD_SHAPE;
  if (what->axes != 2 && what->axes != 3) return AK_BAD_SHAPE;
  if (!what->coarse || !what->fine) return AK_MISSING_POINTER;
  for (int axis = 0; axis < 3; ++axis) {
    if (what->coarse[axis] < 1 || what->fine[axis] < what->coarse[axis]) return AK_BAD_SHAPE;
  }
  if (what->axes == 2 && what->fine[0] != 1) return AK_BAD_SHAPE;
  if (!is_dtype(what->dtype)) return AK_BAD_DTYPE;
  if (what->count > 0 && !what->index) return AK_MISSING_POINTER;
  *call = FeaturesCall{};
  call->what = *what;
  call->threads = threads < 1 ? 1 : threads;
  return AK_OK;
}

int start_class_sums_call(const ak_class_maps* what, int threads, ClassSumsCall* call) {
  if (!what) return AK_MISSING_POINTER;
  if (what->batch < 0 || what->channels < 0 || what->classes < 0 || what->classes >= INT32_MAX) return AK_BAD_SHAPE;
  if (what->axes != 2 && what->axes != 3) return AK_BAD_SHAPE;
  if (!what->coarse || !what->fine) return AK_MISSING_POINTER;
  for (int axis = 0; axis < 3; ++axis) {
    if (what->coarse[axis] < 1 || what->fine[axis] < what->coarse[axis]) return AK_BAD_SHAPE;
  }
  if (what->axes == 2 && what->fine[0] != 1) return AK_BAD_SHAPE;
  if (!is_dtype(what->dtype)) return AK_BAD_DTYPE;
  *call = ClassSumsCall{};
  call->what = *what;
  call->threads = threads < 1 ? 1 : threads;
  return AK_OK;
}

int start_indexed_call(const ak_rows* queries, const ak_rows* bank, int64_t dim, int64_t runs, int64_t columns,
                       int threads, IndexedCall* call) {
  if (!queries || !bank) return AK_MISSING_POINTER;
  if (int status = check_rows(*queries, dim)) return status;
  if (int status = check_rows(*bank, dim)) return status;
  if (runs < 0 || columns < 0) return AK_BAD_SHAPE;
  if (runs == 0 ? queries->rows > 0 : queries->rows % runs != 0) return AK_BAD_SHAPE;
  *call = IndexedCall{};
  call->queries = *queries;
  call->bank = *bank;
  call->queries.mask = call->bank.mask = nullptr;
  call->dim = dim;
  call->runs = runs;
  call->columns = columns;
  call->threads = threads < 1 ? 1 : threads;
  return AK_OK;
}

// Runs a kernel; the threads' runtime may throw where the system refuses it memory or threads.
template <class Call>
int run(void (*kernel)(const Call&), const Call& call) {
  try {
    kernel(call);
  } catch (const std::exception&) {
    return AK_NO_MEMORY;
  }
  return AK_OK;
}

}  // namespace
}  // namespace action_kernels

using namespace action_kernels;

int ak_abi_version(void) { return AK_ABI_VERSION; }

const char* ak_status_message(int status) {
  switch (status) {
    case AK_OK: return "success";
    case AK_BAD_SHAPE: return "a count is negative, dim is below 1, or rows overlap";
    case AK_BAD_DTYPE: return "the dtype is not float32, bfloat16 or float16, or that of labels no integer";
    case AK_BAD_SCALE: return "scale must be finite and > 0";
    case AK_MISSING_POINTER: return "a required pointer is NULL";
    case AK_SMALL_WORKSPACE: return "the workspace is smaller than asked for";
    case AK_UNKNOWN_ISA: return "no such instruction set in this library";
    case AK_UNSUPPORTED_ISA: return "this processor or operating system lacks the instruction set";
    case AK_NO_MEMORY: return "the system refused memory or a thread";
    case AK_BAD_RELATION: return "the relation is unknown, or labels and relation do not go together";
  }
  return "unknown status";
}

const char* ak_cpu_isa(void) { return kernels().name; }

int ak_cpu_isa_status(void) { return choice().status; }

int ak_cpu_set_isa(const char* name) {
  const KernelTable* chosen = nullptr;
  const int status = find(name, &chosen);
  if (status == AK_OK) choice().kernels = chosen;
  return status;
}

const char* ak_cpu_supported_isas(void) {
  static const std::string names = [] {
    std::string list;
    for (const Candidate& candidate : candidates) {
      if (candidate.supported()) list += (list.empty() ? "" : ", ") + std::string(candidate.kernels->name);
    }
    return list;
  }();
  return names.c_str();
}

const char* ak_cpu_openmp_library(void) {
#if defined(_OPENMP)
  Dl_info info;
  if (dladdr(reinterpret_cast<void*>(&omp_get_thread_num), &info) && info.dli_fname) return info.dli_fname;
#endif
  return "none";
}

namespace {

// pairwise_lse and labelled_lse, which is the same with a relation.

int64_t lse_workspace(const ak_rows* anchors, const ak_rows* keys, int64_t dim, int relation, int allow_bfloat16,
                      int pass, int threads) {
  LseCall call{};
  if (int status = start_pair_call(anchors, keys, dim, relation, allow_bfloat16, pass, threads, &call)) return -status;
  return kernels().lse_workspace(call);
}

int lse_forward(LseCall& call, double scale, void* workspace, int64_t workspace_bytes) {
  const KernelTable& table = kernels();  // once: another thread may choose another one
  if (int status = finish_pair_call(scale, workspace, &call)) return status;
  if (table.lse_workspace(call) > workspace_bytes) return AK_SMALL_WORKSPACE;
  if (call.anchors.rows > 0 && !call.lse) return AK_MISSING_POINTER;
  return run(table.lse_forward, call);
}

int lse_backward(LseCall& call, double scale, void* grad_anchors, void* grad_keys, void* workspace,
                 int64_t workspace_bytes) {
  const KernelTable& table = kernels();  // once: another thread may choose another one
  if (int status = finish_pair_call(scale, workspace, &call)) return status;
  if (table.lse_workspace(call) > workspace_bytes) return AK_SMALL_WORKSPACE;
  if (call.anchors.rows > 0 && (!call.grad_lse || !call.saved_lse)) return AK_MISSING_POINTER;
  if (int status = take_gradients(grad_anchors, grad_keys, &call)) return status;
  return run(table.lse_backward, call);
}

}  // namespace

int64_t ak_cpu_pairwise_lse_workspace(const ak_rows* anchors, const ak_rows* keys, int64_t dim, int allow_bfloat16,
                                      int pass, int threads) {
  return lse_workspace(anchors, keys, dim, AK_ANY_CLASS, allow_bfloat16, pass, threads);
}

int64_t ak_cpu_pairwise_lse_kept(const ak_rows* anchors, const ak_rows* keys, int64_t dim, int allow_bfloat16,
                                 int threads) {
  LseCall call{};
  const int status = start_pair_call(anchors, keys, dim, AK_ANY_CLASS, allow_bfloat16, AK_FORWARD, threads, &call);
  return status ? -status : kernels().lse_kept(call);
}

int ak_cpu_pairwise_lse_forward(const ak_rows* anchors, const ak_rows* keys, int64_t dim, double scale,
                                int allow_bfloat16, float* lse, void* kept, int64_t kept_bytes, int threads,
                                void* workspace, int64_t workspace_bytes) {
  LseCall call{};
  const int status = start_pair_call(anchors, keys, dim, AK_ANY_CLASS, allow_bfloat16, AK_FORWARD, threads, &call);
  if (status) return status;
  call.lse = lse;
  call.kept = kept;
  call.kept_bytes = kept_bytes;
  return lse_forward(call, scale, workspace, workspace_bytes);
}

int ak_cpu_pairwise_lse_backward(const ak_rows* anchors, const ak_rows* keys, int64_t dim, double scale,
                                 int allow_bfloat16, const float* grad_lse, const float* lse, void* kept,
                                 int64_t kept_bytes, void* grad_anchors, void* grad_keys, int threads,
                                 void* workspace, int64_t workspace_bytes) {
  const int pass = pass_of(grad_anchors, grad_keys);
  if (pass == 0) return AK_OK;
  LseCall call{};
  const int status = start_pair_call(anchors, keys, dim, AK_ANY_CLASS, allow_bfloat16, pass, threads, &call);
  if (status) return status;
  call.grad_lse = grad_lse;
  call.saved_lse = lse;
  call.kept = kept;
  call.kept_bytes = kept_bytes;
  return lse_backward(call, scale, grad_anchors, grad_keys, workspace, workspace_bytes);
}

int64_t ak_cpu_labelled_lse_workspace(const ak_rows* anchors, const ak_rows* keys, int64_t dim, int allow_bfloat16,
                                      int pass, int threads) {
  return lse_workspace(anchors, keys, dim, AK_SAME_CLASS, allow_bfloat16, pass, threads);
}

int ak_cpu_labelled_lse_forward(const ak_rows* anchors, const ak_rows* keys, int64_t dim, double scale, int relation,
                                int allow_bfloat16, float* lse, int threads, void* workspace,
                                int64_t workspace_bytes) {
  LseCall call{};
  const int status = start_pair_call(anchors, keys, dim, relation, allow_bfloat16, AK_FORWARD, threads, &call);
  if (status) return status;
  call.lse = lse;
  return lse_forward(call, scale, workspace, workspace_bytes);
}

int ak_cpu_labelled_lse_backward(const ak_rows* anchors, const ak_rows* keys, int64_t dim, double scale, int relation,
                                 int allow_bfloat16, const float* grad_lse, const float* lse, void* grad_anchors,
                                 void* grad_keys, int threads, void* workspace, int64_t workspace_bytes) {
  const int pass = pass_of(grad_anchors, grad_keys);
  if (pass == 0) return AK_OK;
  LseCall call{};
  const int status = start_pair_call(anchors, keys, dim, relation, allow_bfloat16, pass, threads, &call);
  if (status) return status;
  call.grad_lse = grad_lse;
  call.saved_lse = lse;
  return lse_backward(call, scale, grad_anchors, grad_keys, workspace, workspace_bytes);
}

int64_t ak_cpu_pairwise_softplus_workspace(const ak_rows* anchors, const ak_rows* keys, int64_t dim,
                                           int allow_bfloat16, int pass, int threads) {
  SoftplusCall call{};
  const int status = start_pair_call(anchors, keys, dim, AK_SAME_CLASS, allow_bfloat16, pass, threads, &call);
  return status ? -status : kernels().softplus_workspace(call);
}

int ak_cpu_pairwise_softplus_forward(const ak_rows* anchors, const ak_rows* keys, int64_t dim, double scale,
                                     int relation, int allow_bfloat16, const float* offsets, float* values,
                                     int threads, void* workspace, int64_t workspace_bytes) {
  SoftplusCall call{};
  if (relation == AK_ANY_CLASS) return AK_BAD_RELATION;
  int status = start_pair_call(anchors, keys, dim, relation, allow_bfloat16, AK_FORWARD, threads, &call);
  if (status) return status;
  const KernelTable& table = kernels();  // once: another thread may choose another one
  if ((status = finish_pair_call(scale, workspace, &call))) return status;
  if (table.softplus_workspace(call) > workspace_bytes) return AK_SMALL_WORKSPACE;
  if (anchors->rows > 0 && (!offsets || !values)) return AK_MISSING_POINTER;
  call.offsets = offsets;
  call.values = values;
  return run(table.softplus_forward, call);
}

int ak_cpu_pairwise_softplus_backward(const ak_rows* anchors, const ak_rows* keys, int64_t dim, double scale,
                                      int relation, int allow_bfloat16, const float* offsets,
                                      const float* grad_values, void* grad_anchors, void* grad_keys,
                                      float* grad_offsets, int threads, void* workspace, int64_t workspace_bytes) {
  SoftplusCall call{};
  if (relation == AK_ANY_CLASS) return AK_BAD_RELATION;
  const int pass = pass_of(grad_anchors, grad_keys) | (grad_offsets ? AK_GRAD_OFFSETS : 0);
  if (pass == 0) return AK_OK;
  int status = start_pair_call(anchors, keys, dim, relation, allow_bfloat16, pass, threads, &call);
  if (status) return status;
  const KernelTable& table = kernels();  // once: another thread may choose another one
  if ((status = finish_pair_call(scale, workspace, &call))) return status;
  if (table.softplus_workspace(call) > workspace_bytes) return AK_SMALL_WORKSPACE;
  if (anchors->rows > 0 && (!offsets || !grad_values)) return AK_MISSING_POINTER;
  if ((status = take_gradients(grad_anchors, grad_keys, &call))) return status;
  call.offsets = offsets;
  call.grad_values = grad_values;
  call.grad_offsets = grad_offsets;
  return run(table.softplus_backward, call);
}

int64_t ak_cpu_center_lse_workspace(int64_t dim, int64_t count, int threads) {
  CenterCall call;
  if (int status = start_center_call(dim, count, threads, &call)) return -status;
  return kernels().center_workspace(call);
}

int ak_cpu_center_lse_forward(const ak_rows* rows, int64_t dim, const float* centers, int64_t count, double scale,
                              float* lse, float* probabilities, int threads, void* workspace,
                              int64_t workspace_bytes) {
  CenterCall call;
  if (!rows) return AK_MISSING_POINTER;
  if (int status = start_center_call(dim, count, threads, &call)) return status;
  if (int status = check_rows(*rows, dim)) return status;
  if (int status = finish_center_call(*rows, centers, scale, workspace, &call)) return status;
  if (rows->rows == 0) return AK_OK;
  const KernelTable& table = kernels();  // once: another thread may choose another one
  if (!lse || !probabilities) return AK_MISSING_POINTER;
  if (table.center_workspace(call) > workspace_bytes) return AK_SMALL_WORKSPACE;
  call.lse = lse;
  call.probabilities = probabilities;
  return run(table.center_forward, call);
}

int ak_cpu_center_lse_backward(int64_t rows, int64_t dim, const uint8_t* mask, const float* centers, int64_t count,
                               double scale, const float* grad_lse, const float* probabilities, void* grad_rows,
                               int dtype, int threads, void* workspace, int64_t workspace_bytes) {
  CenterCall call;
  const ak_rows form = {grad_rows, mask, rows, dim, dtype, nullptr};
  if (int status = start_center_call(dim, count, threads, &call)) return status;
  if (int status = check_rows(form, dim)) return status;
  if (int status = finish_center_call(form, centers, scale, workspace, &call)) return status;
  if (rows == 0) return AK_OK;
  const KernelTable& table = kernels();  // once: another thread may choose another one
  if (!grad_lse || !probabilities) return AK_MISSING_POINTER;
  if (table.center_workspace(call) > workspace_bytes) return AK_SMALL_WORKSPACE;
  call.grad_lse = grad_lse;
  call.saved_probabilities = probabilities;
  call.grad_rows = grad_rows;
  return run(table.center_backward, call);
}

int ak_cpu_prepare_rows_forward(const ak_map* map, const uint8_t* mask, int normalize, void* rows, int rows_dtype,
                                float* factors, int threads) {
  PrepareCall call;
  if (int status = start_prepare_call(map, rows_dtype, normalize, threads, &call)) return status;
  if (map->batch * map->pixels == 0) return AK_OK;
  if (!rows || !factors) return AK_MISSING_POINTER;
  call.mask = mask;
  call.rows = rows;
  call.factors = factors;
  return run(kernels().prepare_forward, call);
}

int ak_cpu_prepare_rows_backward(const ak_map* map, const void* grad_rows, int rows_dtype, const float* factors,
                                 int normalize, void* grad_map, int threads) {
  PrepareCall call;
  if (int status = start_prepare_call(map, rows_dtype, normalize, threads, &call)) return status;
  if (map->batch * map->pixels == 0) return AK_OK;
  if (!grad_rows || !factors || !grad_map) return AK_MISSING_POINTER;
  call.grad_rows = grad_rows;
  call.saved_factors = factors;
  call.grad_map = grad_map;
  return run(kernels().prepare_backward, call);
}

int64_t ak_cpu_sample_pixels_workspace(const ak_sampling* sampling) {
  SampleCall call;
  if (int status = start_sample_call(sampling, &call)) return -status;
  return kernels().sample_workspace(call);
}

int ak_cpu_sample_pixels(const ak_sampling* sampling, int64_t* index, int64_t* counts, int threads, void* workspace,
                         int64_t workspace_bytes) {
  SampleCall call;
  if (int status = start_sample_call(sampling, &call)) return status;
  const KernelTable& table = kernels();  // once: another thread may choose another one
  if (!counts || !workspace || (sampling->samples > 0 && !index)) return AK_MISSING_POINTER;
  if (table.sample_workspace(call) > workspace_bytes) return AK_SMALL_WORKSPACE;
  call.threads = usable_threads(threads);
  call.index = index;
  call.counts = counts;
  call.workspace = workspace;
  return run(table.sample_pixels, call);
}

int ak_cpu_sampled_features_forward(const ak_neighbourhoods* what, const void* features, const int64_t* strides,
                                    void* out, int threads) {
  FeaturesCall call;
  if (int status = start_features_call(what, threads, &call)) return status;
  if (is_empty(*what) || what->count == 0) return AK_OK;
  if (!features || !strides || !out) return AK_MISSING_POINTER;
  call.features = features;
  for (int axis = 0; axis < 5; ++axis) call.strides[axis] = strides[axis];
  call.out = out;
  call.threads = usable_threads(call.threads);
  return run(kernels().features_forward, call);
}

int64_t ak_cpu_sampled_features_workspace(const ak_neighbourhoods* what, int threads) {
  FeaturesCall call;
  if (int status = start_features_call(what, threads, &call)) return -status;
  return is_empty(*what) ? 0 : kernels().features_workspace(call);
}

int ak_cpu_sampled_features_backward(const ak_neighbourhoods* what, const void* grad, int channels_last,
                                     void* gradient, int threads, void* workspace, int64_t workspace_bytes) {
  FeaturesCall call;
  if (int status = start_features_call(what, threads, &call)) return status;
  if (is_empty(*what)) return AK_OK;
  const KernelTable& table = kernels();  // once: another thread may choose another one
  if (!gradient || !workspace || (what->count > 0 && !grad)) return AK_MISSING_POINTER;
  call.threads = usable_threads(call.threads);
  if (table.features_workspace(call) > workspace_bytes) return AK_SMALL_WORKSPACE;
  call.grad = grad;
  call.gradient = gradient;
  call.channels_last = channels_last != 0;
  call.workspace = workspace;
  return run(table.features_backward, call);
}

int64_t ak_cpu_class_sums_workspace(const ak_class_maps* what, int threads) {
  ClassSumsCall call;
  if (int status = start_class_sums_call(what, threads, &call)) return -status;
  return what->channels == 0 || what->classes == 0 ? 0 : kernels().class_sums_workspace(call);
}

int ak_cpu_class_sums(const ak_class_maps* what, const void* features, const int64_t* strides, float* sums, int threads,
                      void* workspace, int64_t workspace_bytes) {
  ClassSumsCall call;
  if (int status = start_class_sums_call(what, threads, &call)) return status;
  if (what->channels == 0 || what->classes == 0) return AK_OK;
  const KernelTable& table = kernels();  // once: another thread may choose another one
  if (!strides || !sums || !workspace) return AK_MISSING_POINTER;
  if (what->batch > 0 && (!features || !what->labels)) return AK_MISSING_POINTER;
  call.threads = usable_threads(call.threads);
  if (table.class_sums_workspace(call) > workspace_bytes) return AK_SMALL_WORKSPACE;
  call.features = features;
  for (int axis = 0; axis < 5; ++axis) call.strides[axis] = strides[axis];
  call.sums = sums;
  call.workspace = workspace;
  return run(table.class_sums, call);
}

int64_t ak_cpu_indexed_lse_workspace(const ak_rows* queries, const ak_rows* bank, int64_t dim, int64_t runs,
                                     int64_t columns, int threads) {
  IndexedCall call;
  if (int status = start_indexed_call(queries, bank, dim, runs, columns, threads, &call)) return -status;
  return kernels().indexed_workspace(call);
}

int ak_cpu_indexed_lse(const ak_rows* queries, const ak_rows* bank, int64_t dim, const int64_t* index, int64_t runs,
                       int64_t columns, double scale, float* lse, float* mean, int threads, void* workspace,
                       int64_t workspace_bytes) {
  IndexedCall call;
  if (int status = start_indexed_call(queries, bank, dim, runs, columns, threads, &call)) return status;
  if (!(std::isfinite(scale) && scale > 0)) return AK_BAD_SCALE;
  if (queries->rows == 0) return AK_OK;
  const KernelTable& table = kernels();  // once: another thread may choose another one
  if (!lse || !workspace || (columns > 0 && !index)) return AK_MISSING_POINTER;
  call.threads = usable_threads(call.threads);
  if (table.indexed_workspace(call) > workspace_bytes) return AK_SMALL_WORKSPACE;
  call.index = index;
  call.scale = scale;
  call.lse = lse;
  call.mean = mean;
  call.workspace = workspace;
  return run(table.indexed_lse, call);
}
