//! Matrices packed for products: columns in panels of 16, so that the kernel reads memory in order.
//!
//! A matrix `[inner, cols]` is stored as `ceil(cols / 16)` panels; a panel holds, for every inner index, its 16
//! columns side by side (the last panel is filled up with zeros). Weights are packed when a model is loaded; keys
//! and values are written straight into this form, so that attention is the same product.

/// Columns of a panel.
pub const WIDTH: usize = 16;

/// A cache line, so that panels begin on one.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([f32; 16]);

const LINES: usize = WIDTH / 16;

/// A packed matrix that owns its memory.
pub struct Panels {
    inner: usize,
    cols: usize,
    lines: Vec<Line>,
}

/// A packed matrix, or its first rows and columns.
#[derive(Clone, Copy)]
pub struct PanelsView<'a> {
    data: &'a [f32],
    /// Floats from one panel to the next.
    stride: usize,
    inner: usize,
    cols: usize,
}

impl Panels {
    /// A matrix `[inner, cols]` of zeros.
    pub fn zeros(inner: usize, cols: usize) -> Self {
        Self { inner, cols, lines: vec![Line([0.0; 16]); cols.div_ceil(WIDTH) * inner * LINES] }
    }

    pub fn inner(&self) -> usize {
        self.inner
    }

    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Bytes of a matrix `[inner, cols]`.
    pub fn bytes(inner: usize, cols: usize) -> usize {
        cols.div_ceil(WIDTH) * WIDTH * inner * size_of::<f32>()
    }

    fn data(&self) -> &[f32] {
        // SAFETY: a `Line` is 16 floats without padding (`repr(C)`, size 64), and the slice covers all lines.
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast(), self.lines.len() * 16) }
    }

    fn data_mut(&mut self) -> &mut [f32] {
        // SAFETY: as in `data`; the borrow is unique.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), self.lines.len() * 16) }
    }

    /// One mutable slice `[inner, 16]` per panel.
    pub fn panels_mut(&mut self) -> impl Iterator<Item = &mut [f32]> {
        let size = self.inner * WIDTH;
        self.data_mut().chunks_exact_mut(size.max(1))
    }

    /// Writes `column` (`[inner]`) as column `index`.
    pub fn set_column(&mut self, index: usize, column: &[f32]) {
        let (inner, lane) = (self.inner, index % WIDTH);
        let start = index / WIDTH * inner * WIDTH;
        let panel = &mut self.data_mut()[start..start + inner * WIDTH];
        for (slot, value) in panel.iter_mut().skip(lane).step_by(WIDTH).zip(column) {
            *slot = *value;
        }
    }

    /// Writes `row` (`[cols]`) as inner row `index`.
    pub fn set_row(&mut self, index: usize, row: &[f32]) {
        let inner = self.inner;
        for (panel, part) in self.data_mut().chunks_exact_mut(inner * WIDTH).zip(row.chunks(WIDTH)) {
            panel[index * WIDTH..index * WIDTH + part.len()].copy_from_slice(part);
        }
    }

    pub fn view(&self) -> PanelsView<'_> {
        PanelsView { data: self.data(), stride: self.inner * WIDTH, inner: self.inner, cols: self.cols }
    }
}

impl<'a> PanelsView<'a> {
    /// Only the first `inner` rows and `cols` columns.
    pub fn first(self, inner: usize, cols: usize) -> Self {
        assert!(inner <= self.inner && cols <= self.cols, "a view cannot be larger than its matrix");
        Self { inner, cols, ..self }
    }

    /// Columns `start..end`; `start` must be the first column of a panel.
    pub fn columns(self, start: usize, end: usize) -> Self {
        assert!(start.is_multiple_of(WIDTH) && start <= end && end <= self.cols, "panels are taken whole");
        Self { data: &self.data[start / WIDTH * self.stride..], cols: end - start, ..self }
    }

    pub fn inner(&self) -> usize {
        self.inner
    }

    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The memory of panel `index`, `[inner, 16]`.
    #[inline]
    pub fn panel(&self, index: usize) -> &'a [f32] {
        let start = index * self.stride;
        &self.data[start..start + self.inner * WIDTH]
    }

    /// Floats from one panel to the next.
    #[inline]
    pub fn stride(&self) -> usize {
        self.stride
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_and_columns_land_at_the_same_places() {
        let (inner, cols) = (3, 70);
        let value = |i: usize, c: usize| (i * 100 + c) as f32;
        let mut by_rows = Panels::zeros(inner, cols);
        let mut by_columns = Panels::zeros(inner, cols);
        for i in 0..inner {
            by_rows.set_row(i, &(0..cols).map(|c| value(i, c)).collect::<Vec<_>>());
        }
        for c in 0..cols {
            by_columns.set_column(c, &(0..inner).map(|i| value(i, c)).collect::<Vec<_>>());
        }
        assert_eq!(by_rows.data(), by_columns.data());
        assert_eq!(by_rows.view().panel(4)[WIDTH + 5], value(1, 69));
        assert_eq!(by_rows.view().columns(64, 70).panel(0)[WIDTH + 5], value(1, 69));
        assert_eq!(by_rows.data().as_ptr() as usize % 64, 0);
    }
}
