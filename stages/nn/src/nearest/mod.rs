//! Exact nearest neighbours by dot product: every row of a matrix against every other.
//!
//! Rows are compared in square blocks, each one matrix product whose scores stay in the cache until the best of them
//! are taken. The matrix of scores is symmetric (a fused multiply-add does not care which factor comes first), so only
//! one half of it is computed, and every block is looked at along its rows and along its columns. A score is one
//! chain of additions over the columns, and of equal scores the lower index wins: results depend neither on the
//! number of threads nor on the order in which blocks are finished.

use std::sync::{Mutex, PoisonError};

use rayon::prelude::*;

use crate::{
    Error,
    cpu::{Accumulate, Panels, Rows, RowsMut, matmul, ops},
    qwen3::Place,
};

pub(crate) mod best;
mod device;

pub use best::Best;

/// Rows of a block; the scores of two blocks fill half a megabyte.
const BLOCK: usize = 384;

/// The best neighbours so far of the rows of one block.
struct Block {
    best: Vec<Best>,
    /// The bar of each of them, side by side.
    bars: Vec<f32>,
}

/// For each of the rows in `rows` (`[n, dim]`, row-major, of unit length where cosine is meant), the `k` other rows
/// with the largest dot product, best first, equal ones in order of index. Runs on the current rayon pool.
pub fn top_k(rows: &[f32], dim: usize, k: usize) -> Vec<Vec<(u32, f32)>> {
    if dim == 0 {
        return Vec::new();
    }
    let n = rows.len() / dim;
    let blocks: Vec<Mutex<Block>> = (0..n.div_ceil(BLOCK)).map(|b| Mutex::new(Block::new(rows_of(b, n), k))).collect();
    // The column of blocks with the most work first.
    (0..blocks.len()).into_par_iter().rev().with_max_len(1).for_each_init(Scratch::default, |scratch, column| {
        let count = rows_of(column, n);
        let mut panels = Panels::zeros(dim, count);
        for (index, row) in rows[column * BLOCK * dim..].chunks_exact(dim).take(count).enumerate() {
            panels.set_column(index, row);
        }
        for row in 0..=column {
            let part = Rows::dense(&rows[row * BLOCK * dim..(row * BLOCK + rows_of(row, n)) * dim], dim);
            scratch.scores.resize(part.rows * count, 0.0);
            let target = RowsMut { data: &mut scratch.scores, stride: count };
            matmul(part, panels.view(), target, Accumulate::No, 1);
            if row == column {
                // No row is its own neighbour.
                (0..count).for_each(|i| scratch.scores[i * (count + 1)] = f32::NAN);
            }
            locked(&blocks[row]).offer_rows(column * BLOCK, count, scratch);
            if row != column {
                locked(&blocks[column]).offer_columns(row * BLOCK, count, scratch);
            }
        }
    });
    blocks
        .into_iter()
        .flat_map(|block| block.into_inner().unwrap_or_else(PoisonError::into_inner).best)
        .map(Best::into_sorted)
        .collect()
}

/// [`top_k`], computed in `place`. Elsewhere than on the CPU, scores that are equal up to rounding may change places.
///
/// # Errors
/// There is no such device; it fails, or its memory is too small.
pub fn top_k_on(place: Place, rows: &[f32], dim: usize, k: usize) -> Result<Vec<Vec<(u32, f32)>>, Error> {
    match place.device()? {
        Some((device, _)) if dim > 0 => device::top_k(&device, rows, dim, k),
        _ => Ok(top_k(rows, dim, k)),
    }
}

/// How many of `n` rows are in this block.
fn rows_of(block: usize, n: usize) -> usize {
    BLOCK.min(n - block * BLOCK)
}

/// A panic of another task ends the whole search anyway.
fn locked(block: &Mutex<Block>) -> std::sync::MutexGuard<'_, Block> {
    block.lock().unwrap_or_else(PoisonError::into_inner)
}

#[derive(Default)]
struct Scratch {
    /// `[rows, columns]` of two blocks.
    scores: Vec<f32>,
    candidates: Vec<u32>,
}

impl Block {
    fn new(rows: usize, k: usize) -> Self {
        Self { best: (0..rows).map(|_| Best::new(k)).collect(), bars: vec![f32::NEG_INFINITY; rows] }
    }

    /// Offers every row its scores, `[own rows, count]`; the columns are numbered from `first` on.
    fn offer_rows(&mut self, first: usize, count: usize, scratch: &mut Scratch) {
        let Scratch { scores, candidates } = scratch;
        for (row, (best, bar)) in scores.chunks_exact(count).zip(self.best.iter_mut().zip(&mut self.bars)) {
            ops::not_below(row, *bar, candidates);
            for c in candidates.iter() {
                best.offer((first + *c as usize) as u32, row[*c as usize]);
            }
            *bar = best.bar();
        }
    }

    /// Offers every row its scores, `[others, own rows]`; the others are numbered from `first` on.
    fn offer_columns(&mut self, first: usize, count: usize, scratch: &mut Scratch) {
        let Scratch { scores, candidates } = scratch;
        for (other, row) in scores.chunks_exact(count).enumerate() {
            ops::not_below_each(row, &self.bars, candidates);
            for c in candidates.iter() {
                let best = &mut self.best[*c as usize];
                best.offer((first + other) as u32, row[*c as usize]);
                self.bars[*c as usize] = best.bar();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Small whole numbers: every order of summation gives the same.
    fn small(n: usize, dim: usize, seed: u32) -> Vec<f32> {
        let value = |i: u32| f32::from((i.wrapping_mul(2_654_435_761).wrapping_add(seed * 97) >> 28) as u8) - 7.0;
        (0..(n * dim) as u32).map(value).collect()
    }

    fn all_pairs(rows: &[f32], dim: usize, k: usize) -> Vec<Vec<(u32, f32)>> {
        let row = |i: usize| &rows[i * dim..(i + 1) * dim];
        let n = rows.len() / dim;
        (0..n)
            .map(|i| {
                let mut all: Vec<(u32, f32)> = (0..n)
                    .filter(|j| *j != i)
                    .map(|j| (j as u32, row(i).iter().zip(row(j)).map(|(a, b)| a * b).sum()))
                    .collect();
                all.sort_by(|a, b| b.1.partial_cmp(&a.1).unwrap());
                all.truncate(k);
                all
            })
            .collect()
    }

    proptest! {
        #[test]
        fn equals_comparing_all_pairs(n in 1usize..90, dim in 1usize..70, k in 0usize..8, seed in 0u32..1000) {
            let rows = small(n, dim, seed);
            prop_assert_eq!(top_k(&rows, dim, k), all_pairs(&rows, dim, k));
        }
    }

    #[test]
    fn several_blocks_equal_comparing_all_pairs_on_any_number_of_threads() {
        // Many equal scores, so that their order is put to the test.
        let rows = small(2 * BLOCK + 77, 3, 5);
        let wanted = all_pairs(&rows, 3, 5);
        for threads in [1, 3] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            assert_eq!(pool.install(|| top_k(&rows, 3, 5)), wanted);
        }
    }

    #[test]
    fn no_rows_and_no_columns() {
        assert!(top_k(&[], 3, 5).is_empty());
        assert!(top_k(&[], 0, 5).is_empty());
        assert_eq!(top_k(&[1.0, 2.0], 2, 5), [vec![]]);
    }

    #[test]
    fn rows_that_are_not_numbers_are_no_ones_neighbours() {
        let rows = [1.0, 0.0, f32::NAN, 0.0, 0.5, 0.5];
        assert_eq!(top_k(&rows, 2, 5), [vec![(2, 0.5)], vec![], vec![(0, 0.5)]]);
    }
}
