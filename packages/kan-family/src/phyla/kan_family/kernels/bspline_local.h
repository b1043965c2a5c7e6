// B-splines on large grids: only order + 1 functions are not zero at a point. For every input the rows are sorted by the cell that their
// points fall in; the rows of a cell share order + 1 functions, so that each cell is a small dense product.
#pragma once

#include "basis_tile.h"

namespace kan {

constexpr int64_t kLocalOrder = 4;  // the highest

struct LocalShape {
  int64_t rows, inputs, outputs;
};

// y (rows, O) = the curves at x (rows, I) with coefficients (O, I, K).
template <class T>
void local_forward(const BasisArguments<T>& a, const LocalShape& shape, const T* x, const T* coef, T* y);
// d_coef (O, I, K) and d_x (rows, I) of the product with g (rows, O); either may be null.
template <class T>
void local_backward(const BasisArguments<T>& a, const LocalShape& shape, const T* x, const T* coef, const T* g, T* d_coef, T* d_x);

}  // namespace kan
