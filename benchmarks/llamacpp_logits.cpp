// llama.cpp's logits of given token ids, for vs_llamacpp.py; llamacpp_build.py compiles this file.
//
//   llamacpp_logits MODEL.gguf IDS LENGTH THREADS > LOGITS
//   llamacpp_logits        what the library says that it was built for
//
// IDS holds int32 token ids, windows of LENGTH one after the other; each is a sequence of its own
// from position 0, in one batch, with the library's defaults. Standard output gets the width of
// the vocabulary as int32, then fp32 logits [windows, LENGTH, vocabulary].
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "llama.h"

static void fail(const char* what) {
  std::fprintf(stderr, "llamacpp_logits: %s\n", what);
  std::exit(1);
}

static std::vector<llama_token> read_ids(const char* path) {
  std::FILE* file = std::fopen(path, "rb");
  if (!file) fail("cannot read IDS");
  std::vector<llama_token> ids;
  llama_token chunk[1024];
  for (size_t n; (n = std::fread(chunk, sizeof(llama_token), 1024, file)) > 0;) {
    ids.insert(ids.end(), chunk, chunk + n);
  }
  std::fclose(file);
  return ids;
}

static void write_all(const void* data, size_t bytes) {
  if (std::fwrite(data, 1, bytes, stdout) != bytes) fail("cannot write");
}

int main(int argc, char** argv) {
  if (argc == 1) {
    std::puts(llama_print_system_info());
    return 0;
  }
  if (argc != 5) fail("usage: llamacpp_logits MODEL.gguf IDS LENGTH THREADS");
  const int length = std::atoi(argv[3]), threads = std::atoi(argv[4]);
  const std::vector<llama_token> ids = read_ids(argv[2]);
  if (length < 1 || ids.empty() || ids.size() % length) fail("IDS is not whole windows");

  llama_log_set(  // only what goes wrong
      [](ggml_log_level level, const char* text, void*) {
        if (level >= GGML_LOG_LEVEL_ERROR && level != GGML_LOG_LEVEL_CONT) std::fputs(text, stderr);
      },
      nullptr);
  llama_backend_init();
  llama_model_params model_params = llama_model_default_params();
  llama_model* model = llama_model_load_from_file(argv[1], model_params);
  if (!model) fail("cannot load the model");
  llama_context_params params = llama_context_default_params();
  params.n_ctx = params.n_batch = params.n_ubatch = length;
  params.n_threads = params.n_threads_batch = threads;
  llama_context* context = llama_init_from_model(model, params);
  if (!context) fail("cannot make a context");

  const int32_t vocabulary = llama_vocab_n_tokens(llama_model_get_vocab(model));
  write_all(&vocabulary, sizeof(vocabulary));
  llama_batch batch = llama_batch_init(length, 0, 1);
  for (size_t first = 0; first < ids.size(); first += length) {
    llama_memory_clear(llama_get_memory(context), true);
    batch.n_tokens = length;
    for (int i = 0; i < length; ++i) {
      batch.token[i] = ids[first + i];
      batch.pos[i] = i;
      batch.n_seq_id[i] = 1;
      batch.seq_id[i][0] = 0;
      batch.logits[i] = true;
    }
    if (llama_decode(context, batch) != 0) fail("llama_decode failed");
    for (int i = 0; i < length; ++i) {
      const float* logits = llama_get_logits_ith(context, i);
      if (!logits) fail("a position has no logits");
      write_all(logits, sizeof(float) * vocabulary);
    }
  }
  std::fflush(stdout);
  llama_batch_free(batch);
  llama_free(context);
  llama_model_free(model);
}
