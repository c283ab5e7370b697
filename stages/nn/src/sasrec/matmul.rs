//! Safe matrix products over row-major `f32` slices, by the `gemm` crate on one thread.
//!
//! Owns the bounds checks that make the call safe. Threads are the callers' business: they split work into pieces of
//! fixed size, so that results do not depend on the number of threads.

use gemm::Parallelism;

/// A matrix over a slice, perhaps seen transposed.
#[derive(Debug, Clone, Copy)]
pub struct Matrix<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a> Matrix<'a> {
    /// `data` as `[rows, cols]`.
    ///
    /// # Panics
    /// If `data` does not have `rows * cols` elements.
    pub fn new(data: &'a [f32], rows: usize, cols: usize) -> Self {
        assert_eq!(data.len(), rows * cols, "a matrix of {rows} × {cols}");
        Self { data, rows, cols, row_stride: cols, col_stride: 1 }
    }

    /// The same numbers, seen as `[cols, rows]`.
    pub fn transposed(self) -> Self {
        Self {
            data: self.data,
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
        }
    }
}

/// What a product does with the numbers that are already in its destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Into {
    Replace,
    Add,
}

/// `out = a · b`, or `out += a · b`; `out` is `[a.rows, b.cols]`, row-major.
///
/// # Panics
/// If the shapes do not fit together.
pub fn matmul(out: &mut [f32], into: Into, a: Matrix, b: Matrix) {
    assert_eq!(a.cols, b.rows, "inner dimensions differ");
    assert_eq!(out.len(), a.rows * b.cols, "the destination has another size");
    if out.is_empty() {
        return;
    }
    // SAFETY: each matrix covers its slice exactly (checked in `Matrix::new`), `out` has `a.rows * b.cols` elements,
    // and borrows keep it apart from both operands.
    unsafe {
        gemm::gemm(
            a.rows,
            b.cols,
            a.cols,
            out.as_mut_ptr(),
            1,
            b.cols as isize,
            into == Into::Add,
            a.data.as_ptr(),
            a.col_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.col_stride as isize,
            b.row_stride as isize,
            1.0f32,
            1.0f32,
            false,
            false,
            false,
            Parallelism::None,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn naive(a: &Matrix, b: &Matrix) -> Vec<f32> {
        let at = |m: &Matrix, r: usize, c: usize| m.data[r * m.row_stride + c * m.col_stride];
        (0..a.rows * b.cols).map(|i| (0..a.cols).map(|k| at(a, i / b.cols, k) * at(b, k, i % b.cols)).sum()).collect()
    }

    #[test]
    fn products_agree_with_the_definition_for_every_layout() {
        let numbers = |n: usize| (0..n).map(|i| ((i * 37 % 19) as f32 - 9.0) / 4.0).collect::<Vec<_>>();
        let (left, right) = (numbers(5 * 7), numbers(7 * 3));
        let (left_t, right_t) = (numbers(7 * 5), numbers(3 * 7));
        for a in [Matrix::new(&left, 5, 7), Matrix::new(&left_t, 7, 5).transposed()] {
            for b in [Matrix::new(&right, 7, 3), Matrix::new(&right_t, 3, 7).transposed()] {
                let mut out = vec![f32::NAN; 15];
                matmul(&mut out, Into::Replace, a, b);
                let expected = naive(&a, &b);
                assert_eq!(out, expected, "small multiples of 1/4 are exact");
                matmul(&mut out, Into::Add, a, b);
                assert!(out.iter().zip(&expected).all(|(x, y)| *x == 2.0 * y));
            }
        }
    }
}
