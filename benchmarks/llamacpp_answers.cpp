// What llama.cpp makes of prompts, for llamacpp_answers.py; llamacpp_build.py compiles this file.
//
//   llamacpp_answers MODEL.gguf PROMPTS NEW STOP THREADS > ANSWERS
//
// PROMPTS holds int32: for each prompt how many token ids it has, two at least, and these. Each is a
// sequence of its own from position 0, with the library's defaults. A line comes out for each: the
// log-probability of its ids but the first, nats a token, then the ids of its greedy continuation, NEW
// at most, up to and without STOP.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "llama.h"

static void fail(const char* what) {
  std::fprintf(stderr, "llamacpp_answers: %s\n", what);
  std::exit(1);
}

static std::vector<std::vector<llama_token>> read_prompts(const char* path) {
  std::FILE* file = std::fopen(path, "rb");
  if (!file) fail("cannot read PROMPTS");
  std::vector<std::vector<llama_token>> prompts;
  for (int32_t count; std::fread(&count, sizeof(count), 1, file) == 1;) {
    if (count < 2) fail("a prompt has fewer than two tokens");
    std::vector<llama_token>& ids = prompts.emplace_back(count);
    if (std::fread(ids.data(), sizeof(llama_token), count, file) != size_t(count)) {
      fail("PROMPTS ends within a prompt");
    }
  }
  std::fclose(file);
  return prompts;
}

static void decode(llama_context* context, llama_batch& batch, const llama_token* ids, int count,
                   int position) {
  batch.n_tokens = count;
  for (int i = 0; i < count; ++i) {
    batch.token[i] = ids[i];
    batch.pos[i] = position + i;
    batch.n_seq_id[i] = 1;
    batch.seq_id[i][0] = 0;
    batch.logits[i] = true;
  }
  if (llama_decode(context, batch) != 0) fail("llama_decode failed");
}

static double log_probability(const float* logits, int vocabulary, llama_token id) {
  const float largest = *std::max_element(logits, logits + vocabulary);
  double sum = 0;
  for (int i = 0; i < vocabulary; ++i) sum += std::exp(double(logits[i]) - largest);
  return double(logits[id]) - largest - std::log(sum);
}

int main(int argc, char** argv) {
  if (argc != 6) fail("usage: llamacpp_answers MODEL.gguf PROMPTS NEW STOP THREADS");
  const auto prompts = read_prompts(argv[2]);
  const int most = std::atoi(argv[3]), threads = std::atoi(argv[5]);
  const llama_token stop = std::atoi(argv[4]);
  size_t longest = 0;
  for (const auto& ids : prompts) longest = std::max(longest, ids.size());

  llama_log_set(  // only what goes wrong
      [](ggml_log_level level, const char* text, void*) {
        if (level >= GGML_LOG_LEVEL_ERROR && level != GGML_LOG_LEVEL_CONT) std::fputs(text, stderr);
      },
      nullptr);
  llama_backend_init();
  llama_model* model = llama_model_load_from_file(argv[1], llama_model_default_params());
  if (!model) fail("cannot load the model");
  llama_context_params params = llama_context_default_params();
  params.n_ctx = params.n_batch = params.n_ubatch = longest + most;
  params.n_threads = params.n_threads_batch = threads;
  llama_context* context = llama_init_from_model(model, params);
  if (!context) fail("cannot make a context");

  const int vocabulary = llama_vocab_n_tokens(llama_model_get_vocab(model));
  llama_batch batch = llama_batch_init(longest, 0, 1);
  for (const auto& ids : prompts) {
    const int count = ids.size();
    llama_memory_clear(llama_get_memory(context), true);
    decode(context, batch, ids.data(), count, 0);
    double sum = 0;
    for (int i = 0; i + 1 < count; ++i) {
      sum += log_probability(llama_get_logits_ith(context, i), vocabulary, ids[i + 1]);
    }
    if (!std::isfinite(sum)) fail("the logits hold NaN or infinity");
    std::printf("%.9g", sum / (count - 1));
    int last = count - 1;  // of the batch: what predicts the next token
    for (int written = 0; written < most; ++written) {
      const float* logits = llama_get_logits_ith(context, last);
      const llama_token next = std::max_element(logits, logits + vocabulary) - logits;
      if (next == stop) break;
      std::printf(" %d", next);
      if (written + 1 == most) break;
      decode(context, batch, &next, 1, count + written);
      last = 0;
    }
    std::puts("");
  }
  llama_batch_free(batch);
  llama_free(context);
  llama_model_free(model);
}
