// Every CPU entry point over random shapes with tails, against naive loops in double; on each
// instruction set that this CPU runs. Meant for -fsanitize=address,undefined.
//
//   kernels_test [rounds]
#include <cstdlib>
#include <functional>

#include "kernels.h"

namespace quantkit::test {
namespace {

void serial_executor(int32_t threads, void (*body)(void*, int32_t), void* ctx) {
  for (int32_t i = 0; i < threads; ++i) body(ctx, i);
}

void repeat(const char* isa, const char* name, int64_t rounds, const std::function<void()>& test) {
  for (int64_t round = 0; round < rounds; ++round) {
    scene = std::string(isa) + " " + name + " round " + std::to_string(round);
    qk_set_num_threads(static_cast<int32_t>(pick(1, 3)));
    qk_set_executor(pick(0, 7) == 0 ? serial_executor : nullptr);
    test();
    qk_set_executor(nullptr);
  }
}

}  // namespace
}  // namespace quantkit::test

using namespace quantkit::test;

int main(int argc, char** argv) {
  const int64_t rounds = argc > 1 ? std::atoll(argv[1]) : 40;
  expect(qk_abi_version() == QK_ABI_VERSION, "ABI version");
  for (const char* isa : {"generic", "avx2", "avx512", "avx512bf16"}) {
    if (!qk_isa_supported(isa)) continue;
    expect(qk_set_isa(isa) == QK_OK && std::strcmp(qk_get_isa(), isa) == 0, "isa %s", isa);
    generator.seed(1);
    repeat(isa, "weight_only", 3 * rounds, test_weight_only);
    repeat(isa, "int8_linear", 3 * rounds, test_int8_linear);
    repeat(isa, "int8_extremes", 1, test_int8_extremes);
    repeat(isa, "quantize", rounds, test_quantize);
    repeat(isa, "gptq", rounds, test_gptq);
    repeat(isa, "descend", rounds, test_descend);
    repeat(isa, "rounding_errors", rounds, test_rounding_errors);
    repeat(isa, "syrk", rounds, test_syrk);
    repeat(isa, "rows", rounds, test_rows);
    repeat(isa, "attention", rounds, test_attention);
    repeat(isa, "decoder", rounds, test_decoder);
    repeat(isa, "decoder_nan", rounds, test_decoder_nan);
    repeat(isa, "refusals", 1, test_refusals);
    std::printf("%s: %d failures\n", isa, failures);
  }
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
