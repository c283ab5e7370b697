//! Matrix products over plain slices, on top of the `gemm` crate.
//!
//! Products run on the threads of the current rayon pool. `gemm` never splits the inner dimension over threads, so
//! a result does not depend on how many there are.

/// A read-only view of an `[rows, cols]` matrix.
#[derive(Clone, Copy)]
pub struct View<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

/// `data` as a contiguous row-major `[rows, cols]` matrix.
pub fn view(data: &[f32], rows: usize, cols: usize) -> View<'_> {
    assert!(data.len() >= rows * cols, "a matrix of {rows} by {cols} needs more than {} numbers", data.len());
    View { data, rows, cols, row_stride: cols, col_stride: 1 }
}

impl View<'_> {
    /// The transposed view.
    pub fn t(self) -> Self {
        Self {
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
            data: self.data,
        }
    }

    /// Some of the columns of a row-major view.
    pub fn columns(self, first: usize, count: usize) -> Self {
        assert!(self.col_stride == 1 && first + count <= self.cols, "columns beyond the end");
        let data = if self.rows == 0 { self.data } else { &self.data[first..] };
        Self { data, cols: count, ..self }
    }
}

/// Who computes a product.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Threads {
    /// The calling thread alone: inside a loop that is already parallel.
    One,
    /// All threads of the current rayon pool.
    Pool,
}

/// `c = alpha · a · b`, or `c += alpha · a · b` with `accumulate`; `c` is contiguous and row-major.
pub fn matmul(c: &mut [f32], a: View<'_>, b: View<'_>, alpha: f32, accumulate: bool, threads: Threads) {
    let n = b.cols;
    product(c, n, a, b, alpha, accumulate, threads);
}

/// Adds `alpha · a · b` to the columns from `first` on of `c`, whose rows are `width` wide.
pub fn matmul_columns(
    c: &mut [f32],
    width: usize,
    first: usize,
    a: View<'_>,
    b: View<'_>,
    alpha: f32,
    threads: Threads,
) {
    assert!(first + b.cols <= width, "columns beyond the end");
    if a.rows > 0 {
        product(&mut c[first..], width, a, b, alpha, true, threads);
    }
}

fn product(c: &mut [f32], stride: usize, a: View<'_>, b: View<'_>, alpha: f32, accumulate: bool, threads: Threads) {
    assert_eq!(a.cols, b.rows, "inner dimensions differ");
    let (m, n, k) = (a.rows, b.cols, a.cols);
    if m == 0 || n == 0 {
        return;
    }
    assert!(c.len() >= (m - 1) * stride + n, "the result has no room");
    let parallelism = match threads {
        Threads::Pool if rayon::current_num_threads() > 1 => gemm::Parallelism::Rayon(rayon::current_num_threads()),
        _ => gemm::Parallelism::None,
    };
    // SAFETY: `view` and the asserts above hold every offset that `gemm` computes within `a`, `b` and `c`, and `c`
    // is borrowed mutably, so it overlaps neither.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            c.as_mut_ptr(),
            1,
            stride as isize,
            accumulate,
            a.data.as_ptr(),
            a.col_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.col_stride as isize,
            b.row_stride as isize,
            1.0,
            alpha,
            false,
            false,
            false,
            parallelism,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_of_views_and_transposed_views() {
        let a = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]; // [2, 3]
        let b = [1.0, 0.0, 2.0, 1.0, 0.0, 3.0]; // [3, 2]
        let mut c = [0.0; 4];
        matmul(&mut c, view(&a, 2, 3), view(&b, 3, 2), 1.0, false, Threads::One);
        assert_eq!(c, [5.0, 11.0, 14.0, 23.0]);
        let mut d = [1.0; 4];
        matmul(&mut d, view(&b, 3, 2).t(), view(&a, 2, 3).t(), 2.0, true, Threads::Pool);
        assert_eq!(d, [11.0, 29.0, 23.0, 47.0]);
    }

    #[test]
    fn products_of_some_columns_into_some_columns() {
        let a = [9.0, 1.0, 2.0, 9.0, 3.0, 4.0]; // columns 1 and 2 are [[1, 2], [3, 4]]
        let mut c = [1.0; 6];
        matmul_columns(&mut c, 3, 2, view(&a, 2, 3).columns(1, 2), view(&[1.0, 10.0], 2, 1), 1.0, Threads::One);
        assert_eq!(c, [1.0, 1.0, 22.0, 1.0, 1.0, 44.0]);
    }
}
