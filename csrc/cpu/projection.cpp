#include "projection.h"

#include <cstring>

namespace quantkit {
namespace {

// The weights that a unit of a projection reads; nothing if it is empty or they are floats.
void look_ahead(const Projection& p, const BlockPlan& plan, int64_t unit, Range* range) {
  int64_t first, count;
  plan.unit(unit, &first, &count);
  if (count <= 0) return;
  for (const Part& part : p.parts) {
    if (first < part.blocks) {
      const Int8Job& job = part.integer;
      if (job.packed == nullptr) return;
      const int64_t blocks = count < part.blocks - first ? count : part.blocks - first;
      range->ahead = static_cast<const uint8_t*>(job.packed) +
                     packed_block(first, job.blocks, job.chunks).base;
      range->ahead_bytes = blocks * job.chunks * kChunkBytes;
      return;
    }
    first -= part.blocks;
  }
}

}  // namespace

int Projector::add(const qk_projection& from, int64_t n, int64_t k, Projection* out) {
  if (from.parts == nullptr || from.count < 1 || from.count > 3) return QK_INVALID_ARGUMENT;
  for (int i = 0; i < from.count; ++i) {
    if (from.parts[i].k != k) return QK_INVALID_ARGUMENT;
    if (const int status = add_linear(from.parts[i], out)) return status;
  }
  return out->n == n ? QK_OK : QK_INVALID_ARGUMENT;
}

int Projector::add_linear(const qk_linear& linear, Projection* out) {
  if (linear.n <= 0 || linear.k <= 0 || linear.group_size <= 0) return QK_INVALID_ARGUMENT;
  if (linear.packed == nullptr || linear.scale == nullptr) return QK_INVALID_ARGUMENT;
  if (linear.format < QK_W4 || linear.format > QK_F32W) return QK_UNSUPPORTED;
  if (linear.format == QK_W4 && linear.lut == nullptr) return QK_INVALID_ARGUMENT;
  if (linear.scale_dtype != QK_F32 && linear.scale_dtype != QK_BF16) return QK_UNSUPPORTED;
  if (linear.group_size < linear.k && linear.group_size % 16 != 0) return QK_INVALID_ARGUMENT;
  Part part;
  part.offset = out->n;
  part.blocks = ceil_div(linear.n, kBlockRows);
  Form form;
  form.activation = linear.activation;
  form.k = linear.k;
  form.act_group = linear.act_group <= 0 || linear.act_group > linear.k ? linear.k
                                                                        : linear.act_group;
  form.integer = linear.activation == QK_ACT_INT8 || linear.activation == QK_ACT_INT8_STATIC;
  if (linear.activation == QK_ACT_INT8_STATIC || linear.activation == QK_ACT_FP8_STATIC) {
    if (!(linear.act_scale > 0.0f)) return QK_INVALID_ARGUMENT;
    form.act_scale = linear.act_scale;  // 0 asks for a dynamic one
  }
  if (form.integer) {
    if (!make_int8_job({linear.format, linear.n, linear.k, linear.group_size, form.act_group,
                        linear.packed, linear.lut, linear.scale, linear.scale_dtype, 1,
                        linear.scale_stride, linear.zero, 1, linear.scale_stride},
                       table_->int8, &part.integer)) {
      return QK_UNSUPPORTED;
    }
    if (part.integer.step > 131071) return QK_INVALID_ARGUMENT;
    part.integer.bias = linear.bias;
    part.integer.bias_dtype = QK_F32;
    part.integer.y_dtype = QK_F32;
    form.padded_k = part.integer.padded_k;
    form.format = linear.format;
    form.step = part.integer.step;
    form.steps = part.integer.steps;
    form.unit = part.integer.unit;
  } else {
    const bool words_bf16 =
        bf16_ && table_->bf16.run != nullptr && linear.format != QK_F32W;
    part.kernel = words_bf16 ? &table_->bf16 : &table_->f32;
    part.args = qk_weight_only_args{};
    part.args.x_dtype = QK_F32;  // of y
    part.args.format = linear.format;
    part.args.n = linear.n;
    part.args.k = linear.k;
    part.args.group_size = linear.group_size;
    part.args.packed = linear.packed;
    part.args.lut = linear.lut;
    part.args.scale = linear.scale;
    part.args.scale_dtype = linear.scale_dtype;
    part.args.scale_stride_n = part.args.zero_stride_n = 1;
    part.args.scale_stride_g = part.args.zero_stride_g = linear.scale_stride;
    part.args.zero = linear.zero;
    part.args.bias = linear.bias;
    part.args.bias_dtype = QK_F32;
    part.job = WeightOnlyJob{};
    const int64_t codes = chunk_codes(linear.format);
    part.job.padded_k = ceil_div(linear.k, codes) * codes;
    part.job.groups = linear.group_size >= linear.k ? 1 : ceil_div(linear.k, linear.group_size);
    part.job.group_size = part.job.groups == 1 ? part.job.padded_k : linear.group_size;
    part.job.blocks = part.blocks;
    part.job.chunks = part.job.padded_k / codes;
    form.padded_k = part.job.padded_k;
    form.words_bf16 = words_bf16;
    form.sum_step = linear.zero == nullptr ? 0 : part.job.group_size;
  }
  for (part.form = 0; part.form < static_cast<int>(out->forms.size()); ++part.form) {
    if (out->forms[static_cast<size_t>(part.form)] == form) break;
  }
  if (part.form == static_cast<int>(out->forms.size())) out->forms.push_back(form);
  out->parts.push_back(part);
  out->n += linear.n;
  out->blocks += part.blocks;
  widest_ = form.padded_k > widest_ ? form.padded_k : widest_;
  return QK_OK;
}

void Projector::reserve(const Projection& p, int64_t m) {
  for (size_t i = 0; i < p.forms.size(); ++i) {
    const Form& form = p.forms[i];
    forms_[i].bytes.get<uint8_t>(m * form.row_bytes());
    if (form.integer) {
      forms_[i].scales.get<float>(m * form.steps);
      forms_[i].sums.get<int32_t>(m * form.steps);
    } else {
      forms_[i].sums.get<float>(m * form.sums());
    }
  }
}

void Projector::fill(const Projection& p, const float* x, int64_t m) {
  for (size_t i = 0; i < p.forms.size(); ++i) fill_form(p.forms[i], x, m, &forms_[i]);
}

void* Projector::unit_memory(int slot, int64_t bytes) {
  void* memory = scratch(slot, bytes);
  if (memory == nullptr && bytes > 0) __atomic_store_n(&lacks_memory_, true, __ATOMIC_RELAXED);
  return memory;
}

void Projector::check_memory() {
  if (__atomic_exchange_n(&lacks_memory_, false, __ATOMIC_RELAXED)) throw std::bad_alloc();
}

void Projector::fill_form(const Form& form, const float* x, int64_t m, FormMemory* memory) {
  const RowKernels& r = table_->rows;
  uint8_t* bytes = memory->bytes.get<uint8_t>(0) + m * form.row_bytes();
  // Room for a row of floats and one of bytes.
  float* spare = static_cast<float*>(unit_memory(kRowSlot, row_scratch()));
  if (spare == nullptr) return;
  if (form.integer) {
    int8_t* q = reinterpret_cast<int8_t*>(spare);
    float* scale = spare + widest_;
    r.int8(x, form.k, form.act_group, form.act_scale, q, scale);
    table_->int8.order_row(q, form.k, form.padded_k, form.format, bytes);
    r.int8_sums(q, form.k, form.step, memory->sums.get<int32_t>(0) + m * form.steps);
    float* out = memory->scales.get<float>(0) + m * form.steps;
    for (int64_t s = 0; s < form.steps; ++s) {
      out[s] = scale[s * form.step / form.act_group] / form.unit;
    }
    return;
  }
  if (form.activation != QK_ACT_FLOAT) {
    r.fp8(x, form.k, form.act_group, form.act_scale, spare);
    x = spare;
  }
  const int64_t padding = form.padded_k - form.k;
  if (form.words_bf16) {
    uint16_t* words = reinterpret_cast<uint16_t*>(bytes);
    r.bf16_words(x, form.k, words);
    std::memset(words + form.k, 0, static_cast<size_t>(padding) * 2);
  } else {
    float* words = reinterpret_cast<float*>(bytes);
    if (bf16_) {
      r.round_bf16(x, form.k, words);
    } else {
      std::memcpy(words, x, static_cast<size_t>(form.k) * 4);
    }
    std::memset(words + form.k, 0, static_cast<size_t>(padding) * 4);
  }
  if (form.sum_step > 0) {
    if (bf16_) {
      r.round_bf16(x, form.k, spare);
      x = spare;
    }
    r.float_sums(x, form.k, form.sum_step, memory->sums.get<float>(0) + m * form.sums());
  }
}

void Projector::project(Projection& p, int64_t m, float* out, int64_t ldy,
                        const Projection* next) {
  check_memory();
  if (m == 0) return;
  for (Part& part : p.parts) {
    const Form& form = p.forms[static_cast<size_t>(part.form)];
    FormMemory& memory = forms_[part.form];
    if (form.integer) {
      part.integer.codes = memory.bytes.get<uint8_t>(0);
      part.integer.row_bytes = form.row_bytes();
      part.integer.x_scale = memory.scales.get<float>(0);
      part.integer.x_sum = memory.sums.get<int32_t>(0);
      part.integer.y = out + part.offset;
      part.integer.ldy = ldy;
    } else {
      part.args.m = m;
      part.args.y = out + part.offset;
      part.args.ldy = ldy;
      part.job.args = &part.args;
      part.job.words = memory.bytes.get<uint8_t>(0);
      part.job.row_bytes = form.row_bytes();
      part.job.group_sums = form.sum_step > 0 ? memory.sums.get<float>(0) : nullptr;
    }
  }
  const BlockPlan plan(p.blocks, kBlocksTogether, m <= kFewRows);
  const BlockPlan next_plan((next == nullptr ? &p : next)->blocks, kBlocksTogether,
                            m <= kFewRows);
  const RowPlan row_plan(m);
  parallel_for(plan.units() * row_plan.units, [&](int64_t unit) {
    Range range;
    int64_t first, count;
    const int64_t place = unit / row_plan.units;
    plan.unit(place, &first, &count);
    row_plan.unit(unit % row_plan.units, &range.row, &range.rows);
    if (range.rows <= 0 || count <= 0) return;
    // Units of the same weights follow each other: only the last of them looks further.
    if (unit % row_plan.units == row_plan.units - 1) {
      const int64_t thread = place / plan.units_a_thread;
      if ((place + 1) % plan.units_a_thread != 0) look_ahead(p, plan, place + 1, &range);
      if (range.ahead == nullptr && next != nullptr && thread < next_plan.threads) {
        look_ahead(*next, next_plan, thread * next_plan.units_a_thread, &range);
      }
    }
    for (const Part& part : p.parts) {
      // The part's own blocks within [first, first + count).
      const int64_t from = first > 0 ? first : 0;
      const int64_t to = first + count < part.blocks ? first + count : part.blocks;
      first -= part.blocks;
      if (from >= to) continue;
      range.block = from;
      range.blocks = to - from;
      if (p.forms[static_cast<size_t>(part.form)].integer) {
        const int64_t bytes = table_->int8.scratch_bytes(part.integer);
        void* memory = unit_memory(kUnitSlot, bytes);
        if (memory == nullptr && bytes > 0) return;
        table_->int8.run(part.integer, range, static_cast<uint8_t*>(memory));
      } else {
        const int64_t bytes = part.kernel->scratch_bytes(part.job, range.rows);
        void* memory = unit_memory(kUnitSlot, bytes);
        if (memory == nullptr && bytes > 0) return;
        part.kernel->run(part.job, range, static_cast<uint8_t*>(memory));
      }
    }
  });
  check_memory();
}

}  // namespace quantkit
