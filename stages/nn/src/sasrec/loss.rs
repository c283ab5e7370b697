//! Next-item losses with their gradients made in the forward pass; logits never exist for a whole batch.
//!
//! Both take hidden states and item vectors whose dot products are the logits (`scoring` has prepared them), and
//! parallelise over pieces of fixed size that each own their part of the result, so that the number of threads
//! changes nothing.

use std::ops::Range;

use rand::Rng;
use rayon::prelude::*;

use super::{
    kernels::{add_scaled_rows, add_to, dot_product, exp_shifted, row_max, scale_rows},
    matmul::{Into, Matrix, matmul},
};

/// Rows whose logits exist at one time.
const ROWS: usize = 256;
/// Items in a tile of logits.
const TILE: usize = 256;
/// The logit of an item that is left out; finite, so that a tile in which all are left out stays free of NaN.
const LEFT_OUT: f32 = -1e30;

/// A batch as a loss sees it: `hidden: [rows, width]` and the item that came next for each row.
#[derive(Debug, Clone, Copy)]
pub struct Batch<'a> {
    pub hidden: &'a [f32],
    pub targets: &'a [u32],
    pub width: usize,
    /// Items that the loss leaves out, row by row; a row's target always stays.
    pub seen: Option<Seen<'a>>,
}

/// What the user of each row had by then: `inputs[starts[row]..=row]`.
#[derive(Debug, Clone, Copy)]
pub struct Seen<'a> {
    /// The item that each row has as its input, sequence after sequence.
    pub inputs: &'a [u32],
    /// The first row of each row's sequence.
    pub starts: &'a [u32],
}

impl Batch<'_> {
    /// The items left out for a row.
    fn left_out(&self, row: usize) -> impl Iterator<Item = u32> + '_ {
        let target = self.targets[row];
        let seen = self.seen.map_or(&[][..], |s| &s.inputs[s.starts[row] as usize..=row]);
        seen.iter().copied().filter(move |item| *item != target)
    }
}

/// Buffers of [`full_softmax`], kept from batch to batch.
#[derive(Debug, Default)]
pub struct Tiles {
    tiles: Vec<Tile>,
}

#[derive(Debug, Default)]
struct Tile {
    /// `[rows, items of the tile]`: logits, then their exponentials, shifted by the row's `top`.
    exponentials: Vec<f32>,
    /// The largest logit of each row in this tile, and the sum of its exponentials.
    top: Vec<f32>,
    sum: Vec<f32>,
    /// `[rows, width]`: each row's exponentials times the items' vectors.
    mixed: Vec<f32>,
    /// `[rows, width]`: hidden states times what brings their exponentials to probabilities.
    weighted: Vec<f32>,
}

/// Cross-entropy over all items, averaged over rows. Writes `hidden_grad`, adds to `items_grad: [items, width]`,
/// returns the sum of the rows' losses.
///
/// The probabilities are never written down: exponentials are kept as they are, and what would normalise them goes to
/// the narrow side of each product, as in FlashAttention (Dao et al., arXiv 2205.14135).
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
    for (block, ((hidden, targets), hidden_grad)) in blocks.enumerate() {
        let rows = targets.len();
        let hidden_matrix = Matrix::new(hidden, rows, width);
        let left_out: Vec<(usize, usize)> = (0..rows)
            .flat_map(|row| batch.left_out(block * ROWS + row).map(move |item| (row, item as usize)))
            .collect();

        tiles.tiles.par_iter_mut().zip(items.par_chunks(TILE * width)).enumerate().for_each(
            |(number, (tile, items))| {
                let count = items.len() / width;
                tile.exponentials.resize(rows * count, 0.0);
                let items = Matrix::new(items, count, width);
                matmul(&mut tile.exponentials, Into::Replace, hidden_matrix, items.transposed());
                for &(row, item) in &left_out {
                    if item / TILE == number {
                        tile.exponentials[row * count + item % TILE] = LEFT_OUT;
                    }
                }
                tile.top.clear();
                tile.sum.clear();
                for row in tile.exponentials.chunks_exact_mut(count) {
                    let top = row_max(row);
                    tile.top.push(top);
                    tile.sum.push(exp_shifted(row, top));
                }
                tile.mixed.resize(rows * width, 0.0);
                matmul(&mut tile.mixed, Into::Replace, Matrix::new(&tile.exponentials, rows, count), items);
            },
        );

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

        let parts = tiles.tiles.par_iter_mut().zip(items_grad.par_chunks_mut(TILE * width)).enumerate();
        parts.for_each(|(number, (tile, items_grad))| {
            let count = items_grad.len() / width;
            // From here on `top` holds the factor from exponentials to the loss's share of probabilities.
            for (top, log_sum) in tile.top.iter_mut().zip(&log_sums) {
                *top = (*top - log_sum).exp() * share;
            }
            tile.weighted.clear();
            tile.weighted.extend_from_slice(hidden);
            scale_rows(&mut tile.weighted, &tile.top);
            let exponentials = Matrix::new(&tile.exponentials, rows, count);
            matmul(items_grad, Into::Add, exponentials.transposed(), Matrix::new(&tile.weighted, rows, width));
            for (&target, state) in targets.iter().zip(hidden.chunks_exact(width)) {
                if target as usize / TILE == number {
                    add_to(&mut items_grad[target as usize % TILE * width..][..width], -share, state);
                }
            }
        });

        for (grad, &target) in hidden_grad.chunks_exact_mut(width).zip(targets) {
            grad.fill(0.0);
            add_to(grad, -share, &items[target as usize * width..][..width]);
        }
        for tile in &tiles.tiles {
            add_scaled_rows(hidden_grad, &tile.top, &tile.mixed);
        }
    }
    loss
}

/// Items that stand for all others in one batch.
#[derive(Debug, Clone, Default)]
pub struct Negatives {
    /// Item numbers, ascending, with repetition.
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
        self.items.sort_unstable();
        self.log_expected = if log_q { (count as f32 / items as f32).ln() } else { 0.0 };
    }

    /// Where an item stands among the negatives.
    fn places(&self, item: u32) -> Range<usize> {
        let start = self.items.partition_point(|&i| i < item);
        let count = self.items[start..].iter().take_while(|&&i| i == item).count();
        start..start + count
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
        .enumerate()
        .map_init(Vec::new, |exponentials: &mut Vec<f32>, (block, ((hidden, targets), hidden_grad))| {
            let rows = targets.len();
            let hidden_matrix = Matrix::new(hidden, rows, width);
            exponentials.resize(rows * count, 0.0);
            matmul(exponentials, Into::Replace, hidden_matrix, vectors.transposed());
            let mut part =
                Part { loss: 0.0, negatives_grad: vec![0.0; count * width], target_weights: Vec::with_capacity(rows) };
            // From exponentials to the loss's share of probabilities.
            let mut factors = Vec::with_capacity(rows);
            for (row, ((logits, &target), state)) in
                exponentials.chunks_exact_mut(count).zip(targets).zip(hidden.chunks_exact(width)).enumerate()
            {
                for item in batch.left_out(block * ROWS + row).chain([target]) {
                    logits[negatives.places(item)].fill(LEFT_OUT);
                }
                // The correction is the same for all negatives: taking it off them is adding it to the target.
                let positive = dot_product(state, of(target)) + negatives.log_expected;
                let top = row_max(logits).max(positive);
                let negative_sum = exp_shifted(logits, top);
                let positive_part = (positive - top).exp();
                let sum = negative_sum + positive_part;
                part.loss += f64::from(top + sum.ln() - positive);
                factors.push(share / sum);
                part.target_weights.push((positive_part / sum - 1.0) * share);
            }
            let exponentials = Matrix::new(exponentials, rows, count);
            matmul(hidden_grad, Into::Replace, exponentials, vectors);
            scale_rows(hidden_grad, &factors);
            let mut weighted = hidden.to_vec();
            scale_rows(&mut weighted, &factors);
            let weighted = Matrix::new(&weighted, rows, width);
            matmul(&mut part.negatives_grad, Into::Replace, exponentials.transposed(), weighted);
            for ((grad, &target), &weight) in hidden_grad.chunks_exact_mut(width).zip(targets).zip(&part.target_weights)
            {
                add_to(grad, weight, of(target));
            }
            part
        })
        .collect();

    let mut loss = 0.0;
    let rows = batch.hidden.chunks(ROWS * width).zip(batch.targets.chunks(ROWS));
    for (part, (hidden, targets)) in parts.iter().zip(rows) {
        loss += part.loss;
        for (&item, grad) in negatives.items.iter().zip(part.negatives_grad.chunks_exact(width)) {
            add_to(&mut items_grad[item as usize * width..][..width], 1.0, grad);
        }
        for ((&item, state), &weight) in targets.iter().zip(hidden.chunks_exact(width)).zip(&part.target_weights) {
            add_to(&mut items_grad[item as usize * width..][..width], weight, state);
        }
    }
    loss
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn several_tiles_and_blocks_are_one_loss() {
        // 700 items are three tiles, 300 rows two blocks; the last tile's items were all seen by the second row.
        let (items, rows, width) = (700usize, 300usize, 4usize);
        let wave = |i: usize| ((i * 37 % 101) as f32 / 50.0 - 1.0) * if i.is_multiple_of(13) { 9.0 } else { 1.0 };
        let vectors: Vec<f32> = (0..items * width).map(wave).collect();
        let hidden: Vec<f32> = (0..rows * width).map(|i| wave(i + 7)).collect();
        let targets: Vec<u32> = (0..rows as u32).map(|r| r * 17 % 700).collect();
        let inputs: Vec<u32> = (0..rows as u32).map(|r| 512 + r % 188).collect();
        let starts = vec![0; rows];
        let seen = Some(Seen { inputs: &inputs, starts: &starts });
        let batch = Batch { hidden: &hidden, targets: &targets, width, seen };
        let (mut hidden_grad, mut items_grad) = (vec![0.0; hidden.len()], vec![0.0; vectors.len()]);
        let loss = full_softmax(&mut Tiles::default(), batch, &vectors, &mut hidden_grad, &mut items_grad);

        let (mut expected, mut hidden_wanted) = (0.0, vec![0.0f64; hidden.len()]);
        let mut items_wanted = vec![0.0f64; vectors.len()];
        for row in 0..rows {
            let state = &hidden[row * width..][..width];
            let vector = |item: usize| &vectors[item * width..][..width];
            let logit = |item: usize| state.iter().zip(vector(item)).map(|(a, b)| f64::from(a * b)).sum::<f64>();
            let target = targets[row] as usize;
            let kept: Vec<usize> =
                (0..items).filter(|&i| i == target || !inputs[..=row].contains(&(i as u32))).collect();
            let sum: f64 = kept.iter().map(|&i| logit(i).exp()).sum();
            expected += sum.ln() - logit(target);
            for &item in &kept {
                let slope = (logit(item).exp() / sum - f64::from(u8::from(item == target))) / rows as f64;
                for i in 0..width {
                    hidden_wanted[row * width + i] += slope * f64::from(vector(item)[i]);
                    items_wanted[item * width + i] += slope * f64::from(state[i]);
                }
            }
        }
        assert!((loss / expected - 1.0).abs() < 1e-5, "{loss} and {expected}");
        let close = |a: &[f32], b: &[f64]| a.iter().zip(b).all(|(a, b)| (f64::from(*a) - b).abs() < 1e-5);
        assert!(close(&hidden_grad, &hidden_wanted) && close(&items_grad, &items_wanted));
    }
}
