//! `rows × packed matrix`, blocked for the caches and spread over threads, with one order of summation.

use std::cell::RefCell;

use rayon::prelude::*;

use super::{
    kernel::{INNER_PER_LINE, Kernel, MAX_ROWS, Tile, kernel, panels_at_once, rows_at_once},
    panels::{PanelsView, WIDTH},
};

/// Inner indices whose part of a panel stays in the first-level cache, beside the part that comes next.
const INNER_BLOCK: usize = 256;
/// Rows that are multiplied by a panel while it is there: their inner block stays in the second-level cache.
const ROWS_BLOCK: usize = 240;
/// Rows this many floats apart, or a multiple of it, share a few lines of the caches, and displace each other.
const BAD_STRIDE: usize = 512;
/// Multiply-adds below which a second thread costs more than it brings.
const WORTH_A_THREAD: usize = 1 << 19;

/// Rows to read: `[rows, width]` with `stride` floats from one row to the next.
#[derive(Clone, Copy)]
pub struct Rows<'a> {
    pub data: &'a [f32],
    pub stride: usize,
    pub rows: usize,
}

/// Rows to write.
pub struct RowsMut<'a> {
    pub data: &'a mut [f32],
    pub stride: usize,
}

/// Whether a product replaces or adds to the result.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accumulate {
    No,
    Yes,
}

impl<'a> Rows<'a> {
    /// Rows that lie side by side.
    pub fn dense(data: &'a [f32], width: usize) -> Self {
        Self { data, stride: width, rows: data.len().checked_div(width).unwrap_or(0) }
    }
}

/// The result's memory, shared by tasks that write different elements of it.
#[derive(Clone, Copy)]
struct Shared(*mut f32);
// SAFETY: tasks write disjoint rectangles of columns and rows (see `matmul`), and the borrow outlives them.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Shared {
    fn pointer(self) -> *mut f32 {
        self.0
    }
}

thread_local! {
    static COPIED: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// `out[r, c] = Σ_k x[r, k] · w[k, c]` for all rows of `x` and columns of `w`; with [`Accumulate::Yes`] the sum goes
/// on from what `out` holds. The chain over `k` is the same whatever the number of rows and `threads`.
///
/// # Panics
/// When a slice is shorter than its stated shape: a defect of the caller.
pub fn matmul(x: Rows, w: PanelsView, out: RowsMut, accumulate: Accumulate, threads: usize) {
    let (rows, inner, cols) = (x.rows, w.inner(), w.cols());
    if rows == 0 || cols == 0 || inner == 0 {
        return;
    }
    assert!((rows - 1) * x.stride + inner <= x.data.len(), "rows are shorter than the inner dimension");
    assert!((rows - 1) * out.stride + cols <= out.data.len(), "the result is too small");
    assert!(cols <= out.stride || rows == 1, "rows of the result overlap");
    let shared = Shared(out.data.as_mut_ptr());
    let tasks = threads.min(rows * inner * cols / WORTH_A_THREAD).max(1);
    let panels = cols.div_ceil(WIDTH);
    let job = |row_range: (usize, usize), panel_range: (usize, usize)| {
        block(x, w, shared.pointer(), out.stride, accumulate == Accumulate::Yes, row_range, panel_range);
    };
    if tasks == 1 {
        job((0, rows), (0, panels));
    } else if panels >= 4 * tasks {
        // A few pieces more than threads, so that one slow thread does not hold up the others.
        let pieces = (tasks * 4).min(panels / 4).max(tasks);
        (0..pieces).into_par_iter().for_each(|i| job((0, rows), piece(panels, pieces, i)));
    } else {
        let tiles = rows.div_ceil(MAX_ROWS);
        let pieces = tasks.min(tiles);
        (0..pieces).into_par_iter().for_each(|i| {
            let (from, to) = piece(tiles, pieces, i);
            job((from * MAX_ROWS, (to * MAX_ROWS).min(rows)), (0, panels));
        });
    }
}

/// Piece `index` of `pieces` nearly equal parts of `0..total`.
fn piece(total: usize, pieces: usize, index: usize) -> (usize, usize) {
    (total * index / pieces, total * (index + 1) / pieces)
}

/// One task: the rows `row_range` by the panels `panel_range`.
fn block(
    x: Rows,
    w: PanelsView,
    out: *mut f32,
    out_stride: usize,
    accumulate: bool,
    row_range: (usize, usize),
    panel_range: (usize, usize),
) {
    let inner = w.inner();
    let (rows, most) = (row_range.1 - row_range.0, rows_at_once());
    // A single tile uses every panel once: nothing is gained by leaving one halfway.
    let depth = if rows <= most { inner } else { INNER_BLOCK };
    let copied = rows > 2 * most && x.stride.is_multiple_of(BAD_STRIDE);
    let blocks = rows.div_ceil(ROWS_BLOCK).max(1);
    for index in 0..blocks {
        let (first, end) = piece(rows, blocks, index);
        let first = row_range.0 + first;
        let count = row_range.0 + end - first;
        for start in (0..inner).step_by(depth.max(1)) {
            let length = depth.min(inner - start);
            // SAFETY: `matmul` checked the sizes, and gives every element of `out` to one task.
            let run = |a: *const f32, a_stride: usize| unsafe {
                let rows = RowsBlock { a, a_stride, count, start, length };
                multiply(rows, w, out.add(first * out_stride), out_stride, accumulate || start > 0, panel_range);
            };
            let source = &x.data[first * x.stride + start..];
            if copied {
                COPIED.with_borrow_mut(|copy| run(copy_rows(source, x.stride, count, length, copy), length + WIDTH));
            } else {
                run(source.as_ptr(), x.stride);
            }
        }
    }
}

/// Copies the first `length` floats of `count` rows, a little apart from each other; returns where they are.
fn copy_rows(source: &[f32], stride: usize, count: usize, length: usize, copy: &mut Vec<f32>) -> *const f32 {
    let apart = length + WIDTH;
    if copy.len() < count * apart {
        copy.resize(count * apart, 0.0);
    }
    for (to, from) in copy.chunks_exact_mut(apart).zip(source.chunks(stride)).take(count) {
        to[..length].copy_from_slice(&from[..length]);
    }
    copy.as_ptr()
}

/// An inner block of some rows.
#[derive(Clone, Copy)]
struct RowsBlock {
    a: *const f32,
    a_stride: usize,
    /// Rows.
    count: usize,
    /// The block's inner indices.
    start: usize,
    length: usize,
}

/// # Safety
/// `rows` are valid for their count and length, and their inner indices lie in `w`; `out` is valid for as many rows of
/// `w`'s columns, and nothing else writes the columns of `panel_range` meanwhile.
unsafe fn multiply(
    rows: RowsBlock,
    w: PanelsView,
    out: *mut f32,
    out_stride: usize,
    accumulate: bool,
    panel_range: (usize, usize),
) {
    let cols = w.cols();
    let full = cols / WIDTH;
    let tiles = rows.count.div_ceil(rows_at_once());
    // Rows are shared out evenly: the first tiles have one more than the others.
    let (low, high) = (rows.count / tiles, rows.count.div_ceil(tiles));
    let wide = panels_at_once(high);
    let (several, single): ([Kernel; 2], [Kernel; 2]) =
        ([kernel(low, wide), kernel(high, wide)], [kernel(low, 1), kernel(high, 1)]);
    let mut panel = panel_range.0;
    while panel < panel_range.1 {
        let together = if panel + wide <= panel_range.1.min(full) { wide } else { 1 };
        let kernels = if together == wide { several } else { single };
        let b = w.panel(panel)[rows.start * WIDTH..].as_ptr();
        let ahead = b.wrapping_add(together * w.stride());
        let mut first = 0;
        for tile in 0..tiles {
            let higher = usize::from(tile < rows.count - low * tiles);
            let height = low + higher;
            // Each of the first tiles asks for its part of the next panel.
            let share = tile % INNER_PER_LINE * (rows.length / INNER_PER_LINE) * WIDTH;
            // SAFETY: the tile lies inside the rows, `w` and `out` by the sizes above; a panel that is only partly
            // filled goes through a buffer of its own.
            unsafe {
                let t = Tile {
                    inner: rows.length,
                    a: rows.a.add(first * rows.a_stride),
                    a_stride: rows.a_stride,
                    b,
                    b_stride: w.stride(),
                    c: out.add(first * out_stride + panel * WIDTH),
                    c_stride: out_stride,
                    accumulate,
                    ahead: ahead.wrapping_add(share),
                };
                if panel < full {
                    kernels[higher](t);
                } else {
                    partial(kernels[higher], t, height, cols - full * WIDTH);
                }
            }
            first += height;
        }
        panel += together;
    }
}

/// A tile of which only the first `cols` columns exist in the result.
///
/// # Safety
/// As for the kernel, for those columns.
unsafe fn partial(run: unsafe fn(Tile), tile: Tile, height: usize, cols: usize) {
    let mut buffer = [0.0f32; MAX_ROWS * WIDTH];
    // SAFETY: the buffer holds a whole tile; `tile.c` is valid for `cols` columns of `height` rows.
    unsafe {
        for r in 0..height {
            std::ptr::copy_nonoverlapping(tile.c.add(r * tile.c_stride), buffer[r * WIDTH..].as_mut_ptr(), cols);
        }
        run(Tile { c: buffer.as_mut_ptr(), c_stride: WIDTH, ..tile });
        for r in 0..height {
            std::ptr::copy_nonoverlapping(buffer[r * WIDTH..].as_ptr(), tile.c.add(r * tile.c_stride), cols);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{super::panels::Panels, *};

    fn noise(seed: usize) -> impl FnMut() -> f32 {
        let mut state = seed as u64 * 2 + 1;
        move || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        }
    }

    fn product(x: &[f32], inner: usize, w: &Panels, threads: usize) -> Vec<f32> {
        let rows = x.len() / inner;
        let mut out = vec![0.5; rows * w.cols()];
        let target = RowsMut { data: &mut out, stride: w.cols() };
        matmul(Rows::dense(x, inner), w.view(), target, Accumulate::Yes, threads);
        out
    }

    #[test]
    fn equals_the_plain_sum_bit_for_bit_in_any_batch() {
        for (inner, cols) in [(1, 1), (16, 33), (300, 100), (513, 260)] {
            let mut random = noise(inner + cols);
            let x: Vec<f32> = (0..40 * inner).map(|_| random()).collect();
            let plain: Vec<f32> = (0..inner * cols).map(|_| random()).collect();
            let mut w = Panels::zeros(inner, cols);
            for (i, row) in plain.chunks(cols).enumerate() {
                w.set_row(i, row);
            }
            let mut wanted = vec![0.5f32; 40 * cols];
            for (r, out) in wanted.chunks_mut(cols).enumerate() {
                for (c, out) in out.iter_mut().enumerate() {
                    for k in 0..inner {
                        *out = x[r * inner + k].mul_add(plain[k * cols + c], *out);
                    }
                }
            }
            for rows in [1, 2, 3, 7, 12, 13, 32, 40] {
                for threads in [1, 2, 3] {
                    let got = product(&x[..rows * inner], inner, &w, threads);
                    assert_eq!(got, wanted[..rows * cols], "{rows} rows, {inner} × {cols}, {threads} threads");
                }
            }
        }
    }

    #[test]
    fn large_products_are_split_without_changing_a_bit() {
        let (inner, cols, rows) = (256, 1000, 150);
        let mut random = noise(9);
        let x: Vec<f32> = (0..rows * inner).map(|_| random()).collect();
        let mut w = Panels::zeros(inner, cols);
        for i in 0..inner {
            w.set_row(i, &(0..cols).map(|_| random()).collect::<Vec<_>>());
        }
        let one = product(&x, inner, &w, 1);
        assert_eq!(product(&x, inner, &w, 4), one);
        assert_eq!(product(&x[inner..2 * inner], inner, &w, 4), one[cols..2 * cols]);
        let narrow = Panels::zeros(inner, 40);
        assert_eq!(product(&x, inner, &narrow, 4), vec![0.5; rows * 40]);
    }
}
