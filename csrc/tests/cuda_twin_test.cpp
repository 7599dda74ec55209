// The CUDA kernels, run by their host twin, against the CPU kernels: the same C ABI on both sides.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "quantkit/quantkit.h"

namespace {

std::mt19937 generator(1);

float uniform(float low, float high) {
  return std::uniform_real_distribution<float>(low, high)(generator);
}

uint16_t bf16(float f) {
  uint32_t u;
  __builtin_memcpy(&u, &f, 4);
  return static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

float widen(uint16_t h) {
  const uint32_t u = static_cast<uint32_t>(h) << 16;
  float f;
  __builtin_memcpy(&f, &u, 4);
  return f;
}

struct Case {
  int format;
  int64_t m, n, k, group_size;
  bool zero, bias, padded_rows, dense_scale;
};

// Relative Frobenius distance of the two results; both are rounded to bf16.
double distance(const Case& c, bool dequantize) {
  const int64_t groups = (c.k + c.group_size - 1) / c.group_size;
  const int64_t ldx = c.k + (c.padded_rows ? 3 : 0);
  std::vector<uint8_t> codes(c.n * c.k), packed(qk_packed_bytes(c.format, c.n, c.k));
  for (auto& code : codes) {
    code = static_cast<uint8_t>(generator());
    if (c.format == QK_F8 && (code & 0x7f) == 0x7f) code = 0;
  }
  if (c.format == QK_W4) {
    qk_pack_w4(codes.data(), c.k, c.n, c.k, packed.data());
  } else {
    qk_pack_w8(codes.data(), c.k, c.n, c.k, packed.data());
  }
  std::vector<uint16_t> x(c.m * ldx + 8), y_cpu, y_gpu, bias(c.n);
  std::vector<float> scale(c.n * groups), zero(c.n * groups), lut(16);
  for (auto& v : x) v = bf16(uniform(-1, 1));
  for (auto& v : bias) v = bf16(uniform(-1, 1));
  for (auto& v : scale) v = uniform(0.01f, 0.1f);
  for (auto& v : zero) v = uniform(-8, 8);
  for (auto& v : lut) v = uniform(-8, 8);
  // The CPU rounds a codebook to bf16, the GPU does not: compare on values that bf16 holds.
  for (auto& v : lut) v = widen(bf16(v));

  qk_weight_only_args a{};
  a.x = x.data();
  a.ldx = ldx;
  a.x_dtype = QK_BF16;
  a.format = c.format;
  a.m = dequantize ? c.n : c.m;
  a.n = c.n;
  a.k = c.k;
  a.group_size = c.group_size;
  a.packed = packed.data();
  a.lut = c.format == QK_W4 ? lut.data() : nullptr;
  a.scale = scale.data();
  a.scale_stride_n = c.dense_scale ? 1 : groups;
  a.scale_stride_g = c.dense_scale ? c.n : 1;
  if (c.zero) {
    a.zero = zero.data();
    a.zero_stride_n = a.scale_stride_n;
    a.zero_stride_g = a.scale_stride_g;
  }
  if (c.bias) {
    a.bias = bias.data();
    a.bias_dtype = QK_BF16;
  }
  a.ldy = dequantize ? c.k : c.n;
  const size_t size = static_cast<size_t>(a.m * a.ldy);
  y_cpu.assign(size, 0x7fc0);  // NaN: an output left unwritten shows
  y_gpu.assign(size, 0x7fc0);
  a.y = y_cpu.data();
  int status = dequantize ? qk_dequantize(&a) : qk_weight_only_linear(&a);
  a.y = y_gpu.data();
  status |= dequantize ? qk_cuda_dequantize(&a, nullptr) : qk_cuda_weight_only_linear(&a, nullptr);
  if (status != QK_OK) return INFINITY;
  double difference = 0, norm = 0;
  for (size_t i = 0; i < size; ++i) {
    const double cpu = widen(y_cpu[i]), gpu = widen(y_gpu[i]);
    difference += (cpu - gpu) * (cpu - gpu);
    norm += cpu * cpu;
  }
  return std::sqrt(difference / (norm + 1e-30));
}

}  // namespace

int main() {
  int failures = 0, cases = 0;
  const int64_t shapes[][4] = {{1, 16, 64, 64},   {1, 33, 576, 64},  {2, 48, 200, 32},
                               {3, 17, 1000, 96}, {5, 16, 7, 7},     {8, 20, 129, 129},
                               {16, 16, 256, 16}, {17, 31, 320, 128}, {1, 1, 1, 1},
                               {2, 150, 72, 72}};
  for (int format = QK_W4; format <= QK_F8; ++format) {
    for (const auto& s : shapes) {
      for (int bits = 0; bits < 16; bits += 5) {  // 0, 5, 10, 15: each flag both ways
        const Case c{format, s[0], s[1], s[2], s[3],
                     (bits & 1) != 0, (bits & 2) != 0, (bits & 4) != 0, (bits & 8) != 0};
        for (const bool dequantize : {false, true}) {
          const double error = distance(c, dequantize);
          ++cases;
          if (!(error < 3e-3)) {
            ++failures;
            std::printf("FAILED %s format %d m %ld n %ld k %ld group %ld zero %d bias %d "
                        "padded %d dense %d: relative error %.2e\n",
                        dequantize ? "dequantize" : "linear", format, long(c.m), long(c.n),
                        long(c.k), long(c.group_size), c.zero, c.bias, c.padded_rows,
                        c.dense_scale, error);
          }
        }
      }
    }
  }
  std::printf("%d cases, %d failures\n", cases, failures);
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
