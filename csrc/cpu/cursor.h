// Where a range of groups stands. Include after the Simd of a variant.
#pragma once

#include "convert.h"
#include "planes.h"

namespace hf_actnn {
namespace {

// Where a range of groups stands; groups follow each other in the values and in the codes.
struct Cursor {
  const Layout* layout;
  int64_t in_row, position, byte;

  Cursor(const Layout& at, int64_t first) : layout(&at) {
    const int64_t row = first / at.groups_per_row;
    in_row = first % at.groups_per_row;
    position = row * at.row_length + in_row * at.group;
    byte = row * at.row_bytes + in_row * at.group_bytes;
  }
  bool ends_row() const { return in_row == layout->groups_per_row - 1; }
  int64_t size() const { return ends_row() ? layout->tail : layout->group; }
  void next() {
    const bool last = ends_row();
    position += last ? layout->tail : layout->group;
    byte += last ? layout->tail_bytes : layout->group_bytes;
    in_row = last ? 0 : in_row + 1;
  }
};

}  // namespace
}  // namespace hf_actnn
