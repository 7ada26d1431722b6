// The labels of rows of distances, as Python passes them.
#pragma once

#include <initializer_list>
#include <vector>

#include "array.h"
#include "ranking.h"

namespace vareid {

inline void check_labels(const Array& array, const char* name, std::initializer_list<int64_t> shape,
                         const Array& distances) {
  check_shape(array, name, shape);
  check_int64(array, name);
  check_contiguous(array, name);
  check_device(array, name, distances.device_type, distances.device_id);
}

// order, begin, end, junk, query_codes, gallery_codes: the labels of Q queries and G gallery images.
using Labels = std::vector<OptionalArray>;
inline RankingLabels make_labels(const Labels& arrays, int64_t Q, int64_t G, const Array& distances) {
  if (arrays.size() != 6 || !arrays[0] || !arrays[1] || !arrays[2])
    refuse("labels", "must be six arrays, three of them given");
  const OptionalArray &junk = arrays[3], &query_codes = arrays[4], &gallery_codes = arrays[5];
  check_labels(*arrays[0], "gallery_order", {G}, distances);
  check_labels(*arrays[1], "group_begin", {Q}, distances);
  check_labels(*arrays[2], "group_end", {Q}, distances);
  if (junk) {
    check_shape(*junk, "junk", {G});
    if (!junk->is_bool()) refuse("junk", "must be bool");
    check_contiguous(*junk, "junk");
    check_device(*junk, "junk", distances.device_type, distances.device_id);
  }
  if (query_codes.has_value() != gallery_codes.has_value()) refuse("query_codes", "both or neither array of codes");
  int64_t codes = 0;
  if (query_codes) {
    if (query_codes->ndim != 2) refuse("query_codes", "must have two dimensions");
    codes = query_codes->shape[1];
    check_labels(*query_codes, "query_codes", {Q, codes}, distances);
    check_labels(*gallery_codes, "gallery_codes", {G, codes}, distances);
  }
  return {arrays[0]->as<int64_t>(),
          arrays[1]->as<int64_t>(),
          arrays[2]->as<int64_t>(),
          junk ? junk->as<uint8_t>() : nullptr,
          query_codes ? query_codes->as<int64_t>() : nullptr,
          gallery_codes ? gallery_codes->as<int64_t>() : nullptr,
          codes};
}

}  // namespace vareid
