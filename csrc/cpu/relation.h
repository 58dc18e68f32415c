// Which pairs of rows a pass counts, by their classes.
//
// Rows are packed in the order of their classes, so that a row's class is a run of columns: of most blocks of
// scores all pairs count or none does, and the others are told by two comparisons a pair. Blocks and tiles
// in which none counts are not computed.
#pragma once

#include "../include/action_kernels.h"
#include "classes.h"

namespace {

enum class Share { none, part, all };

struct Relation {
  int kind = AK_ANY_CLASS;  // ak_relation
  bool symmetric = false;   // no row is paired with itself
  // Of each packed row: the packed columns of its class are first … last − 1.
  int64_t* first = nullptr;
  int64_t* last = nullptr;
  int64_t rows = 0;  // those that take part
  int64_t columns = 0;

  // Not where the columns are the rows: nothing is said of row == column.
  bool counts(int64_t row, int64_t column) const {
    if (kind == AK_ANY_CLASS) return true;
    const bool same = column >= first[row] && column < last[row];
    return same == (kind == AK_SAME_CLASS);
  }

  // How many pairs of a block count; ends may lie beyond the last row and column.
  Share share(int64_t row_begin, int64_t row_end, int64_t column_begin, int64_t column_end) const {
    if (kind == AK_ANY_CLASS) return Share::all;
    row_end = row_end < rows ? row_end : rows;
    column_end = column_end < columns ? column_end : columns;
    if (row_begin >= row_end || column_begin >= column_end) return Share::none;
    const int64_t run_begin = first[row_begin], run_end = last[row_end - 1];
    const bool apart = column_end <= run_begin || run_end <= column_begin;
    const bool one_class = first[row_end - 1] == run_begin && last[row_begin] == run_end;
    const bool alike = one_class && run_begin <= column_begin && column_end <= run_end;
    if (!apart && !alike) return Share::part;
    return alike == (kind == AK_SAME_CLASS) ? Share::all : Share::none;
  }

  // Whether a row has any pair.
  bool has_pair(int64_t row) const {
    const int64_t run = last[row] - first[row];
    return kind == AK_SAME_CLASS ? run > (symmetric ? 1 : 0) : run < columns;
  }
};

}  // namespace
