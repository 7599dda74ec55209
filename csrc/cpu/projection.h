// Linear layers side by side, and what a row of their input becomes before them.
//
// Layers that read one input are one projection: a region of units over all of their weights, whose
// outputs lie in one row. Each names the form that its kernel takes (codes with scales and sums, or
// words with sums), and a form that several share is filled once.
#pragma once

#include <cstdlib>
#include <new>
#include <vector>

#include "int8_job.h"
#include "kernel_table.h"
#include "quantkit/decoder.h"
#include "units.h"

namespace quantkit {

// Memory that grows and is never given back, aligned to cache lines.
class Buffer {
 public:
  ~Buffer() { std::free(memory_); }
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  template <class T>
  T* get(int64_t count) {
    const int64_t bytes = (count * static_cast<int64_t>(sizeof(T)) + 127) / 64 * 64;
    if (bytes > bytes_) {
      std::free(memory_);
      memory_ = std::aligned_alloc(64, static_cast<size_t>(bytes));
      bytes_ = memory_ == nullptr ? 0 : bytes;
      if (memory_ == nullptr) throw std::bad_alloc();
    }
    return static_cast<T*>(memory_);
  }

 private:
  void* memory_ = nullptr;
  int64_t bytes_ = 0;
};

// What a row must become before a product: codes with scales and sums, or words with sums.
struct Form {
  bool integer = false;
  int32_t activation = QK_ACT_FLOAT;
  int64_t k = 0, padded_k = 0;
  int64_t act_group = 0;
  float act_scale = 0.0f;
  int32_t format = 0;    // integer: the order of the codes
  int64_t step = 0, steps = 0;
  float unit = 1.0f;
  bool words_bf16 = false;
  int64_t sum_step = 0;  // floats: columns of a sum for zero points, 0 for none

  bool operator==(const Form& o) const {
    return integer == o.integer && activation == o.activation && k == o.k &&
           padded_k == o.padded_k && act_group == o.act_group && act_scale == o.act_scale &&
           format == o.format && step == o.step && steps == o.steps && unit == o.unit &&
           words_bf16 == o.words_bf16 && sum_step == o.sum_step;
  }
  int64_t row_bytes() const {
    const int64_t bytes = integer ? padded_k : padded_k * (words_bf16 ? 2 : 4);
    return ceil_div(bytes, 64) * 64;
  }
  int64_t sums() const { return sum_step > 0 ? ceil_div(padded_k, sum_step) : 0; }
};

struct FormMemory {
  Buffer bytes, scales, sums;
};

struct Part {
  int form = 0;
  int64_t offset = 0;  // columns of y before this part's
  int64_t blocks = 0;
  Int8Job integer{};   // of forms with integer == true; packed is NULL otherwise
  qk_weight_only_args args;
  WeightOnlyJob job;
  const WeightOnlyKernel* kernel = nullptr;
};

struct Projection {
  std::vector<Part> parts;
  std::vector<Form> forms;
  int64_t n = 0, blocks = 0;
};

// Makes projections, and computes them. One pass at a time.
class Projector {
 public:
  // bf16: floats are multiplied in bf16, where the kernels can.
  Projector(const KernelTable& table, bool bf16) : table_(&table), bf16_(bf16) {}

  // Columns of the widest input, with its padding.
  int64_t widest() const { return widest_; }

  // `from` as a projection of [n, k], or why not: a qk_status.
  int add(const qk_projection& from, int64_t n, int64_t k, Projection* out);

  // Room for the forms of m rows: before `fill`.
  void reserve(const Projection& p, int64_t m);

  // Row m of the input of a projection, in each form that its parts want. From any thread, so that
  // a lack of memory shows in `project`.
  void fill(const Projection& p, const float* x, int64_t m);

  // y[m, 0 .. p.n) for the rows in the forms. `next` is what will be projected then, or NULL.
  // Throws std::bad_alloc if a thread got no memory for this or for filling the forms.
  void project(Projection& p, int64_t m, float* out, int64_t ldy, const Projection* next);

 private:
  int add_linear(const qk_linear& linear, Projection* out);
  void fill_form(const Form& form, const float* x, int64_t m, FormMemory* memory);
  // A thread's memory of so many bytes, or NULL, which `check_memory` then throws.
  void* unit_memory(int slot, int64_t bytes);
  void check_memory();
  int64_t row_scratch() const { return 2 * (widest_ + 64) * static_cast<int64_t>(sizeof(float)); }

  const KernelTable* table_;
  bool bf16_;
  int64_t widest_ = 0;
  FormMemory forms_[3];  // a projection has three parts at most
  bool lacks_memory_ = false;  // a unit must not throw
};

}  // namespace quantkit
