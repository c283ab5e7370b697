//! Next-item losses with their gradients made in the forward pass; logits never exist for a whole batch.
//!
//! Both take hidden states and item vectors whose dot products are the logits (`scoring` has prepared them), and
//! parallelise over pieces of fixed size that each own their part of the result, so that the number of threads
//! changes nothing.

use rand::Rng;
use rayon::prelude::*;

use super::{
    kernels::{add, dot_product, exp_shifted, row_max, scale},
    matmul::{Into, Matrix, matmul},
};

/// Rows whose logits exist at one time.
const ROWS: usize = 256;
/// Items in a tile of logits.
const TILE: usize = 512;

/// A batch as a loss sees it: `hidden: [rows, width]` and the item that came next for each row.
#[derive(Debug, Clone, Copy)]
pub struct Batch<'a> {
    pub hidden: &'a [f32],
    pub targets: &'a [u32],
    pub width: usize,
}

/// Buffers of [`full_softmax`], kept from batch to batch.
#[derive(Debug, Default)]
pub struct Tiles {
    tiles: Vec<Tile>,
}

#[derive(Debug, Default)]
struct Tile {
    /// `[rows, items of the tile]`: logits, then exponentials, then the logits' gradient.
    logits: Vec<f32>,
    top: Vec<f32>,
    sum: Vec<f32>,
    /// `[rows, width]`: this tile's part of the hidden states' gradient.
    hidden_grad: Vec<f32>,
}

/// Cross-entropy over all items, averaged over rows. Writes `hidden_grad`, adds to `items_grad: [items, width]`,
/// returns the sum of the rows' losses.
pub fn full_softmax(
    tiles: &mut Tiles,
    batch: Batch,
    items: &[f32],
    hidden_grad: &mut [f32],
    items_grad: &mut [f32],
) -> f64 {
    let width = batch.width;
    let share = 1.0 / batch.targets.len() as f32;
    tiles.tiles.resize_with((items.len() / width).div_ceil(TILE), Tile::default);
    let mut loss = 0.0;
    let blocks =
        batch.hidden.chunks(ROWS * width).zip(batch.targets.chunks(ROWS)).zip(hidden_grad.chunks_mut(ROWS * width));
    for ((hidden, targets), hidden_grad) in blocks {
        let rows = targets.len();
        let hidden_matrix = Matrix::new(hidden, rows, width);

        tiles.tiles.par_iter_mut().zip(items.par_chunks(TILE * width)).for_each(|(tile, items)| {
            let count = items.len() / width;
            tile.logits.resize(rows * count, 0.0);
            matmul(&mut tile.logits, Into::Replace, hidden_matrix, Matrix::new(items, count, width).transposed());
            tile.top.clear();
            tile.sum.clear();
            for row in tile.logits.chunks_exact_mut(count) {
                let top = row_max(row);
                tile.top.push(top);
                tile.sum.push(exp_shifted(row, top));
            }
        });

        let log_sums: Vec<f32> = (0..rows)
            .map(|row| {
                let top = tiles.tiles.iter().map(|t| t.top[row]).fold(f32::NEG_INFINITY, f32::max);
                let sum: f32 = tiles.tiles.iter().map(|t| t.sum[row] * (t.top[row] - top).exp()).sum();
                top + sum.ln()
            })
            .collect();
        for ((&target, row), log_sum) in targets.iter().zip(hidden.chunks_exact(width)).zip(&log_sums) {
            loss += f64::from(log_sum - dot_product(row, &items[target as usize * width..][..width]));
        }

        let parts = tiles
            .tiles
            .par_iter_mut()
            .zip(items.par_chunks(TILE * width))
            .zip(items_grad.par_chunks_mut(TILE * width))
            .enumerate();
        parts.for_each(|(number, ((tile, items), items_grad))| {
            let count = items.len() / width;
            for (row, logits) in tile.logits.chunks_exact_mut(count).enumerate() {
                scale(logits, (tile.top[row] - log_sums[row]).exp() * share);
                if let Some(x) = (targets[row] as usize).checked_sub(number * TILE).and_then(|i| logits.get_mut(i)) {
                    *x -= share;
                }
            }
            let grad = Matrix::new(&tile.logits, rows, count);
            matmul(items_grad, Into::Add, grad.transposed(), hidden_matrix);
            tile.hidden_grad.resize(rows * width, 0.0);
            matmul(&mut tile.hidden_grad, Into::Replace, grad, Matrix::new(items, count, width));
        });

        hidden_grad.fill(0.0);
        for tile in &tiles.tiles {
            add(hidden_grad, &tile.hidden_grad);
        }
    }
    loss
}

/// Items that stand for all others in one batch.
#[derive(Debug, Clone, Default)]
pub struct Negatives {
    /// Item numbers, with repetition.
    pub items: Vec<u32>,
    /// How often each item was to be expected among `items`, as a logarithm that is taken off its logit: their
    /// exponentials then estimate the sum over all items without bias. 0 leaves logits as they are.
    pub log_expected: f32,
}

impl Negatives {
    /// Draws uniformly from `0..items`.
    pub fn draw(&mut self, count: usize, items: usize, log_q: bool, rng: &mut impl Rng) {
        self.items.clear();
        self.items.extend((0..count).map(|_| rng.random_range(0..items as u32)));
        self.log_expected = if log_q { (count as f32 / items as f32).ln() } else { 0.0 };
    }
}

/// Cross-entropy over the target and the negatives, which are the same for every row; a negative that is the row's
/// target is left out. Writes `hidden_grad`, adds to `items_grad`, returns the sum of the rows' losses.
pub fn sampled_softmax(
    batch: Batch,
    items: &[f32],
    negatives: &Negatives,
    hidden_grad: &mut [f32],
    items_grad: &mut [f32],
) -> f64 {
    let width = batch.width;
    let share = 1.0 / batch.targets.len() as f32;
    let of = |item: u32| &items[item as usize * width..][..width];
    let count = negatives.items.len();
    let vectors: Vec<f32> = negatives.items.iter().flat_map(|&item| of(item)).copied().collect();
    let vectors = Matrix::new(&vectors, count, width);

    struct Part {
        loss: f64,
        negatives_grad: Vec<f32>,
        target_weights: Vec<f32>,
    }
    let parts: Vec<Part> = batch
        .hidden
        .par_chunks(ROWS * width)
        .zip(batch.targets.par_chunks(ROWS))
        .zip(hidden_grad.par_chunks_mut(ROWS * width))
        .map(|((hidden, targets), hidden_grad)| {
            let rows = targets.len();
            let hidden_matrix = Matrix::new(hidden, rows, width);
            let mut logits = vec![0.0; rows * count];
            matmul(&mut logits, Into::Replace, hidden_matrix, vectors.transposed());
            let mut part =
                Part { loss: 0.0, negatives_grad: vec![0.0; count * width], target_weights: Vec::with_capacity(rows) };
            for ((logits, &target), state) in
                logits.chunks_exact_mut(count).zip(targets).zip(hidden.chunks_exact(width))
            {
                for (logit, &negative) in logits.iter_mut().zip(&negatives.items) {
                    *logit = if negative == target { f32::NEG_INFINITY } else { *logit - negatives.log_expected };
                }
                let positive = dot_product(state, of(target));
                let top = row_max(logits).max(positive);
                let negative_sum = exp_shifted(logits, top);
                let positive_part = (positive - top).exp();
                let sum = negative_sum + positive_part;
                part.loss += f64::from(top + sum.ln() - positive);
                scale(logits, share / sum);
                part.target_weights.push((positive_part / sum - 1.0) * share);
            }
            let grad = Matrix::new(&logits, rows, count);
            matmul(&mut part.negatives_grad, Into::Replace, grad.transposed(), hidden_matrix);
            matmul(hidden_grad, Into::Replace, grad, vectors);
            for ((hidden_grad, &target), &weight) in
                hidden_grad.chunks_exact_mut(width).zip(targets).zip(&part.target_weights)
            {
                for (g, x) in hidden_grad.iter_mut().zip(of(target)) {
                    *g += weight * x;
                }
            }
            part
        })
        .collect();

    let mut loss = 0.0;
    let rows = batch.hidden.chunks(ROWS * width).zip(batch.targets.chunks(ROWS));
    for (part, (hidden, targets)) in parts.iter().zip(rows) {
        loss += part.loss;
        for (&item, grad) in negatives.items.iter().zip(part.negatives_grad.chunks_exact(width)) {
            add(&mut items_grad[item as usize * width..][..width], grad);
        }
        for ((&item, state), &weight) in targets.iter().zip(hidden.chunks_exact(width)).zip(&part.target_weights) {
            for (g, x) in items_grad[item as usize * width..][..width].iter_mut().zip(state) {
                *g += weight * x;
            }
        }
    }
    loss
}
