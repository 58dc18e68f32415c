#include "classes.h"

#include <algorithm>
#include <vector>

namespace action_kernels {
namespace {

struct LabelRange {
  int64_t lowest, highest;  // of the labels ≥ 0
  int64_t count;            // rows that have one
};

LabelRange range_of(const int64_t* labels, int64_t rows) {
  LabelRange range = {INT64_MAX, -1, 0};
  for (int64_t row = 0; row < rows; ++row) {
    if (labels[row] < 0) continue;
    range.lowest = std::min(range.lowest, labels[row]);
    range.highest = std::max(range.highest, labels[row]);
    ++range.count;
  }
  return range;
}

// Labels close together: by counting.
void order_by_counting(const int64_t* labels, int64_t rows, const LabelRange& range, int64_t* order) {
  std::vector<int64_t> places(range.highest - range.lowest + 2);
  for (int64_t row = 0; row < rows; ++row) {
    if (labels[row] >= 0) ++places[labels[row] - range.lowest + 1];
  }
  for (size_t label = 1; label < places.size(); ++label) places[label] += places[label - 1];
  for (int64_t row = 0; row < rows; ++row) {
    if (labels[row] >= 0) order[places[labels[row] - range.lowest]++] = row;
  }
}

}  // namespace

int64_t order_by_class(const int64_t* labels, int64_t rows, int64_t* order) {
  const LabelRange range = range_of(labels, rows);
  if (range.count == 0) return 0;
  if (range.highest - range.lowest < 4 * rows + 1024) {
    order_by_counting(labels, rows, range, order);
    return range.count;
  }
  int64_t place = 0;
  for (int64_t row = 0; row < rows; ++row) {
    if (labels[row] >= 0) order[place++] = row;
  }
  std::sort(order, order + place, [labels](int64_t a, int64_t b) {
    return labels[a] != labels[b] ? labels[a] < labels[b] : a < b;
  });
  return place;
}

void find_runs(const OrderedRows& rows, const OrderedRows& others, int64_t* first, int64_t* last) {
  int64_t begin = 0, end = 0;
  for (int64_t place = 0; place < rows.count; ++place) {
    const int64_t label = rows.label(place);
    while (begin < others.count && others.label(begin) < label) ++begin;
    end = std::max(begin, end);
    while (end < others.count && others.label(end) == label) ++end;
    first[place] = begin;
    last[place] = end;
  }
}

}  // namespace action_kernels
