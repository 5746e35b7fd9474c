// Which group a lane works on, and where its values and codes lie.
#pragma once

#include "device.cuh"

namespace hf_actnn {

// The cut of a tensor as kernels need it. In the even kind all groups are full, of a whole number of runs of 32
// elements, and no more than 256.
struct Groups {
  Layout at;
  int bits;
  int64_t per_sample;  // groups
  const int64_t* places;
};

inline Groups groups_of(const Cut& cut) {
  Groups groups;
  // With widths the sizes in bytes are no more than a place holder.
  groups.at = make_layout(cut.numel, cut.row_length, cut.group_size, cut.places == nullptr ? cut.bits : 1);
  groups.bits = cut.bits;
  groups.per_sample = cut.places == nullptr ? groups.at.n_groups : groups.at.n_groups / cut.samples;
  groups.places = cut.places;
  return groups;
}

inline bool even(const Groups& groups) {
  return groups.at.tail == groups.at.group && groups.at.group % 32 == 0 && groups.at.group <= kDitherBlock;
}

// Where the codes of a group's sample begin, the sample's first group and the bits of its codes.
struct Sample {
  int64_t byte, first;
  int bits;
};

__device__ __forceinline__ Sample sample_of(const Groups& groups, int64_t group) {
  if (groups.places == nullptr) return Sample{0, 0, groups.bits};
  const int64_t sample = quotient(group, groups.per_sample);
  const int64_t place = groups.places[sample];
  return Sample{place >> 4, sample * groups.per_sample, (int)(place & 15)};
}

// A group of any kind.
struct Spot {
  int64_t position, byte;  // of its first value and code
  int size;                // elements; 0 behind the last group
  int bits;
};

__device__ __forceinline__ Spot spot_of(const Groups& groups, int64_t group) {
  if (group >= groups.at.n_groups) return Spot{0, 0, 0, 1};
  const Layout& at = groups.at;
  const Sample sample = sample_of(groups, group);
  const int64_t row = quotient(group, at.groups_per_row), in_row = group - row * at.groups_per_row;
  const int64_t in_sample = row - quotient(sample.first, at.groups_per_row);
  const int64_t full = group_bytes(at.group, sample.bits), tail = group_bytes(at.tail, sample.bits);
  Spot spot;
  spot.position = row * at.row_length + in_row * at.group;
  spot.byte = sample.byte + in_sample * ((at.groups_per_row - 1) * full + tail) + in_row * full;
  spot.size = (int)(in_row == at.groups_per_row - 1 ? at.tail : at.group);
  spot.bits = sample.bits;
  return spot;
}

// As many lanes as a group of this size keeps busy: a power of two, no more than a warp.
inline int lanes_for(int64_t group) {
  int lanes = 1;
  while (lanes < kWarp && lanes * 8 < group) lanes *= 2;
  return lanes;
}

}  // namespace hf_actnn
