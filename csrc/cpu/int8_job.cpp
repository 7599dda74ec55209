#include "int8_job.h"

namespace quantkit {
namespace {

// A codebook as unsigned bytes: value * unit + offset, unit 1 or 2.
bool integer_table(const float* lut, Int8Job* job) {
  for (int unit = 1; unit <= 2; ++unit) {
    int value[16], low = 127, high = -128;
    bool whole = true;
    for (int i = 0; i < 16; ++i) {
      const float scaled = lut[i] * static_cast<float>(unit);
      if (!(scaled >= -128.0f && scaled <= 127.0f)) return false;
      value[i] = static_cast<int>(scaled);
      whole = whole && static_cast<float>(value[i]) == scaled;
      low = value[i] < low ? value[i] : low;
      high = value[i] > high ? value[i] : high;
    }
    if (!whole) continue;
    if (high - low > 127) return false;
    job->plain = true;
    for (int i = 0; i < 16; ++i) {
      job->table[i] = static_cast<uint8_t>(value[i] - low);
      job->plain = job->plain && job->table[i] == i;
    }
    job->offset = -low;
    job->unit = static_cast<float>(unit);
    return true;
  }
  return false;
}

}  // namespace

bool make_int8_job(const Int8Weight& w, const Int8Kernel& kernel, Int8Job* job) {
  if (w.format != QK_W4 && w.format != QK_I8) return false;
  *job = Int8Job{};
  job->format = w.format;
  job->n = w.n;
  const int64_t codes = chunk_codes(w.format);
  job->padded_k = ceil_div(w.k, codes) * codes;
  job->blocks = ceil_div(w.n, kBlockRows);
  job->chunks = job->padded_k / codes;
  job->packed = w.packed;
  if (w.format == QK_W4) {
    if (w.lut == nullptr || !integer_table(w.lut, job)) return false;
  } else {
    job->plain = true;
    job->offset = kernel.byte_offset;
    job->unit = 1.0f;
  }
  const int64_t group = w.group_size < w.k ? w.group_size : job->padded_k;
  const int64_t x_group = w.x_group_size < w.k ? w.x_group_size : job->padded_k;
  job->step = group < x_group ? group : x_group;
  const int64_t larger = group < x_group ? x_group : group;
  if (larger != job->padded_k && larger % job->step != 0) return false;
  if (job->step != job->padded_k && job->step % 16 != 0) return false;
  job->steps = ceil_div(job->padded_k, job->step);
  job->steps_a_group = group == job->padded_k ? job->steps : group / job->step;
  job->groups = group == job->padded_k ? 1 : ceil_div(w.k, group);
  job->scale = w.scale;
  job->scale_dtype = w.scale_dtype;
  job->scale_stride_n = w.scale_stride_n;
  job->scale_stride_g = w.scale_stride_g;
  job->zero = w.zero;
  job->zero_stride_n = w.zero_stride_n;
  job->zero_stride_g = w.zero_stride_g;
  return true;
}

}  // namespace quantkit
