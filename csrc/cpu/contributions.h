// Gradients that are not sums of rows: what each id adds to a learned scale, or to the step or bias
// of packed rows; what each bag adds to a head; and per-sample weights.

#pragma once

#include "output_gradient.h"

namespace embcompress {

// Numbers that an id adds to the row it touches through a use that is no row and no head, and the
// first column they are added to.
int64_t contribution_width(const Lookup& lookup, const Use& use);
int64_t contribution_column(const Lookup& lookup, const Use& use);

// Adds what ids [begin, end) of the use's feature contribute: id number i to out + (i - begin) *
// stride. False for an id outside the vocabulary.
bool add_contributions(const OutputGradient& gradient, const Use& use, int64_t begin, int64_t end,
                       RowBlock& block, float* out, int64_t stride);

// Adds what samples [begin, end) contribute to the head of a feature, (width, out_width): its
// transpose. False for an id outside the vocabulary.
bool add_head_gradient(const OutputGradient& gradient, int64_t feature, int64_t begin, int64_t end,
                       float* out);

}  // namespace embcompress
