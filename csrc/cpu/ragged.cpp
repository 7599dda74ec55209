#include "ragged.h"

#include <cstddef>

namespace quantkit {
namespace {

struct Spans {
  int64_t first, end;
};

// The spans that a query at `position` looks at.
Spans spans_of(int64_t position, int64_t window) {
  constexpr int64_t kSpanTokens = kSpanPages * QK_PAGE_TOKENS;
  const int64_t oldest = window > 0 && position + 1 > window ? position + 1 - window : 0;
  return {oldest / kSpanTokens, position / kSpanTokens + 1};
}

int64_t new_tokens(const qk_sequences& s, int64_t i) { return s.starts[i + 1] - s.starts[i]; }

}  // namespace

int check_sequences(const qk_sequences& s, int64_t pages, int64_t max_positions) {
  if (s.count < 0) return QK_INVALID_ARGUMENT;
  if (s.count == 0) return QK_OK;
  if (s.starts == nullptr || s.past == nullptr || s.pages == nullptr || s.starts[0] != 0) {
    return QK_INVALID_ARGUMENT;
  }
  for (int64_t i = 0; i < s.count; ++i) {
    if (new_tokens(s, i) < 1 || s.past[i] < 0) return QK_INVALID_ARGUMENT;
    const int64_t end = s.past[i] + new_tokens(s, i);
    if (max_positions >= 0 && end > max_positions) return QK_INVALID_ARGUMENT;
    if (ceil_div(end, QK_PAGE_TOKENS) > s.page_stride) return QK_INVALID_ARGUMENT;
    for (int64_t p = 0; p < ceil_div(end, QK_PAGE_TOKENS); ++p) {
      const int32_t page = s.pages[i * s.page_stride + p];
      if (page < 0 || page >= pages) return QK_INVALID_ARGUMENT;
    }
  }
  return QK_OK;
}

RaggedRows::RaggedRows(const qk_sequences& s) {
  if (s.count == 0) return;
  sequence.reserve(static_cast<size_t>(s.starts[s.count]));
  position.reserve(static_cast<size_t>(s.starts[s.count]));
  for (int64_t i = 0; i < s.count; ++i) {
    for (int64_t t = 0; t < new_tokens(s, i); ++t) {
      sequence.push_back(i);
      position.push_back(s.past[i] + t);
    }
  }
}

int64_t AttentionPlan::measure(const qk_sequences& s, int64_t window) {
  int64_t single_spans = 0;
  for (int64_t i = 0; i < s.count; ++i) {
    if (new_tokens(s, i) != 1) continue;
    const Spans spans = spans_of(s.past[i], window);
    single_spans += spans.end - spans.first;
  }
  const int64_t wanted = num_threads() * kUnitsAThread;
  heads_a_unit_ = single_spans < wanted ? 1 : kv_heads_;
  const int64_t share = single_spans * (kv_heads_ / heads_a_unit_) / wanted;
  spans_a_unit_ = share < 1 ? 1 : share;
  own_spans_.assign(static_cast<size_t>(s.count), 0);
  own_offset_.assign(static_cast<size_t>(s.count), 0);
  int64_t floats = 0;
  for (int64_t i = 0; i < s.count; ++i) {
    if (new_tokens(s, i) != 1) continue;
    const Spans spans = spans_of(s.past[i], window);
    const int64_t count = spans.end - spans.first;
    if (count <= spans_a_unit_) continue;
    own_spans_[static_cast<size_t>(i)] = count;
    own_offset_[static_cast<size_t>(i)] = floats;
    floats += count * heads_ * state_floats();
  }
  return floats;
}

void AttentionPlan::cut(const qk_sequences& s, int64_t window, float* partials) {
  partials_ = partials;
  units_.clear();
  for (int64_t i = 0; i < s.count; ++i) {
    const int64_t token = s.starts[i], count = new_tokens(s, i);
    AttentionUnit unit{};
    unit.pages = s.pages + i * s.page_stride;
    if (count == 1) {
      const Spans spans = spans_of(s.past[i], window);
      unit.token = token;
      unit.tokens = 1;
      unit.position = s.past[i];
      unit.span_base = spans.first;
      if (own_spans_[static_cast<size_t>(i)] > 0) {
        unit.partials = partials + own_offset_[static_cast<size_t>(i)];
      }
      for (unit.kv_head = 0; unit.kv_head < kv_heads_; unit.kv_head += heads_a_unit_) {
        unit.end_head = unit.kv_head + heads_a_unit_;
        for (int64_t first = spans.first; first < spans.end; first += spans_a_unit_) {
          unit.first_span = first;
          unit.end_span = first + spans_a_unit_ < spans.end ? first + spans_a_unit_ : spans.end;
          units_.push_back(unit);
        }
      }
      continue;
    }
    // The last tokens first: they see the most keys, and long units should not come last.
    for (int64_t t = (count - 1) / kTokensAUnit * kTokensAUnit; t >= 0; t -= kTokensAUnit) {
      unit.token = token + t;
      unit.tokens = count - t < kTokensAUnit ? count - t : kTokensAUnit;
      unit.position = s.past[i] + t;
      unit.first_span = spans_of(unit.position, window).first;
      unit.end_span = spans_of(unit.position + unit.tokens - 1, window).end;
      for (unit.kv_head = 0; unit.kv_head < kv_heads_; ++unit.kv_head) {
        unit.end_head = unit.kv_head + 1;
        units_.push_back(unit);
      }
    }
  }
}

int AttentionPlan::run(const AttentionKernel& kernel, const AttentionJob& job) const {
  int status = QK_OK;
  parallel_for(static_cast<int64_t>(units_.size()), [&](int64_t i) {
    const AttentionUnit& unit = units_[static_cast<size_t>(i)];
    void* memory = scratch(kUnitSlot, kernel.scratch_bytes(job, unit.tokens));
    if (memory == nullptr) {
      __atomic_store_n(&status, QK_OUT_OF_MEMORY, __ATOMIC_RELAXED);
    } else {
      kernel.run(job, unit, static_cast<uint8_t*>(memory));
    }
  });
  return status;
}

void AttentionPlan::finish_row(const AttentionKernel& kernel, float* states, int64_t row,
                               int64_t sequence, float* out) const {
  const int64_t floats = state_floats(), spans = own_spans_[static_cast<size_t>(sequence)];
  float* state = states + row * heads_ * floats;
  for (int64_t h = 0; h < heads_; ++h, state += floats) {
    if (spans > 0) {
      kernel.clear_state(state, head_dim_);
      const float* part =
          partials_ + own_offset_[static_cast<size_t>(sequence)] + h * floats;
      for (int64_t i = 0; i < spans; ++i, part += heads_ * floats) {
        kernel.merge_state(state, part[0], part[1], part + kStateHeader, head_dim_);
      }
    }
    kernel.finish_state(state, head_dim_, out + h * head_dim_);
  }
}

}  // namespace quantkit
