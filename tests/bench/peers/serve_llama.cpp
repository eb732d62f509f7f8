// llama.cpp as a peer. Compiled against its headers and libllama by llama.py; says and reads what
// serve_transformers.py says and reads.
//
//     serve_llama MODEL.gguf NUM_THREADS
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "llama.h"

namespace {

constexpr int kMaxSequences = 128;
constexpr int kMaxTokens = 10240;  // a prompt and its answer, or those of all sequences together
constexpr int kMicroBatch = 512;

class Model {
 public:
  Model(const char* path, int num_threads) {
    llama_log_set([](ggml_log_level, const char*, void*) {}, nullptr);
    llama_backend_init();
    model_ = llama_model_load_from_file(path, llama_model_default_params());
    if (!model_) fail("the model cannot be read");
    llama_context_params params = llama_context_default_params();
    params.n_ctx = 2 * kMaxTokens;
    params.n_batch = kMaxTokens;
    params.n_ubatch = kMicroBatch;
    params.n_seq_max = kMaxSequences;
    params.n_threads = params.n_threads_batch = num_threads;
    params.kv_unified = true;
    params.no_perf = true;
    context_ = llama_init_from_model(model_, params);
    if (!context_) fail("no context");
    vocab_size_ = llama_vocab_n_tokens(llama_model_get_vocab(model_));
    batch_ = llama_batch_init(kMaxTokens, 0, 1);
  }

  double prefill(int num_tokens, int seed) {
    start(seed);
    for (int position = 0; position < num_tokens; ++position) add(random_token(), position, 0, position + 1 == num_tokens);
    const auto begin = std::chrono::steady_clock::now();
    run();
    return num_tokens / seconds_since(begin);
  }

  double decode(int num_sequences, int context, int num_steps, int seed) {
    start(seed);
    for (int sequence = 0; sequence < num_sequences; ++sequence) {
      for (int position = 0; position < context; ++position) add(random_token(), position, sequence, position + 1 == context);
      if (batch_.n_tokens + context > kMaxTokens / 4) run();
    }
    run();
    std::vector<int> last(num_sequences, 100);
    const auto begin = std::chrono::steady_clock::now();
    for (int step = 0; step < num_steps; ++step) {
      for (int sequence = 0; sequence < num_sequences; ++sequence) add(last[sequence], context + step, sequence, true);
      run();
      for (int sequence = 0; sequence < num_sequences; ++sequence) {
        const float* logits = llama_get_logits_ith(context_, sequence);
        last[sequence] = static_cast<int>(std::max_element(logits, logits + vocab_size_) - logits);
      }
    }
    return num_sequences * num_steps / seconds_since(begin);
  }

 private:
  [[noreturn]] static void fail(const char* why) {
    std::fprintf(stderr, "serve_llama: %s\n", why);
    std::exit(1);
  }

  static double seconds_since(std::chrono::steady_clock::time_point begin) {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  }

  int random_token() { return 10 + static_cast<int>(generator_() % (vocab_size_ - 10)); }

  void start(int seed) {
    generator_.seed(seed);
    llama_memory_clear(llama_get_memory(context_), true);
    batch_.n_tokens = 0;
  }

  void add(int token, int position, int sequence, bool has_logits) {
    const int row = batch_.n_tokens++;
    batch_.token[row] = token;
    batch_.pos[row] = position;
    batch_.n_seq_id[row] = 1;
    batch_.seq_id[row][0] = sequence;
    batch_.logits[row] = has_logits;
  }

  void run() {
    if (batch_.n_tokens == 0) return;
    if (llama_decode(context_, batch_)) fail("a step failed");
    llama_synchronize(context_);
    batch_.n_tokens = 0;
  }

  llama_model* model_ = nullptr;
  llama_context* context_ = nullptr;
  llama_batch batch_{};
  int vocab_size_ = 0;
  std::mt19937 generator_;
};

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  Model model(argv[1], std::atoi(argv[2]));
  model.prefill(16, 0);
  std::puts("@@ {\"ready\": true, \"version\": \"\"}");
  std::fflush(stdout);
  std::string line;
  while (std::getline(std::cin, line)) {
    std::istringstream words(line);
    std::string what;
    int numbers[4] = {};
    words >> what;
    for (int& number : numbers) words >> number;
    const double rate = what == "prefill" ? model.prefill(numbers[0], numbers[1])
                                          : model.decode(numbers[0], numbers[1], numbers[2], numbers[3]);
    std::printf("@@ {\"tokens_per_s\": %.6f}\n", rate);
    std::fflush(stdout);
  }
}
