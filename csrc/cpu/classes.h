// Rows in the order of their classes. Compiled once, for every processor: it uses the standard library, which
// files of an instruction set may not (parallel.h).
#pragma once

#include <cstdint>

namespace action_kernels {

// order[0 … count): the rows of label ≥ 0, by label, those of one label in ascending order. Returns count.
int64_t order_by_class(const int64_t* labels, int64_t rows, int64_t* order);

// Rows of one side in the order of their classes.
struct OrderedRows {
  const int64_t* labels;
  const int64_t* order;
  int64_t count;

  int64_t label(int64_t place) const { return labels[order[place]]; }
};

// For each place among `rows`, the run first … last − 1 of places among `others` that hold its label; where
// there is none, first and last are the place that it would have. Neither falls from a row to the next.
void find_runs(const OrderedRows& rows, const OrderedRows& others, int64_t* first, int64_t* last);

}  // namespace action_kernels
