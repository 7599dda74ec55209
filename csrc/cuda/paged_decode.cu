// The C ABI of attention over pages.
#include "paged_decode.cuh"

namespace {

int check(const qk_cuda_paged_decode_args& a) {
  if (a.sequences < 0 || a.sequences > 65535 || a.page_stride <= 0) return QK_INVALID_ARGUMENT;
  if (a.kv_heads <= 0 || a.heads <= 0 || a.heads % a.kv_heads != 0) return QK_INVALID_ARGUMENT;
  if (a.softcap < 0 || a.window < 0) return QK_INVALID_ARGUMENT;
  if (a.head_dim != 64 && a.head_dim != 80 && a.head_dim != 96 && a.head_dim != 128) {
    return QK_UNSUPPORTED;
  }
  if (a.kv_dtype < QK_KV_BF16 || a.kv_dtype > QK_KV_FP8) return QK_UNSUPPORTED;
  return a.kv_dtype != QK_KV_BF16 && a.scale == nullptr ? QK_INVALID_ARGUMENT : QK_OK;
}

}  // namespace

int qk_cuda_paged_decode(const qk_cuda_paged_decode_args* args, void* stream) {
  using namespace quantkit::cuda;
  if (const int status = check(*args)) return status;
  if (args->sequences == 0) return QK_OK;
  const auto on = static_cast<cudaStream_t>(stream);
  switch (args->kv_dtype) {
    case QK_KV_BF16: return decode::paged_decode<decode::Bf16Pages>(*args, on);
    case QK_KV_INT8: return decode::paged_decode<decode::BytePages<Int8<bf16>>>(*args, on);
    default: return decode::paged_decode<decode::BytePages<Fp8<bf16>>>(*args, on);
  }
}

int64_t qk_cuda_paged_decode_partials(int64_t sequences, int64_t heads, int64_t head_dim,
                                      int64_t page_stride) {
  return sequences * heads * quantkit::cuda::decode::most_spans(page_stride) * (head_dim + 2);
}
