//! The output head and cross-entropy as one: gradients are made while the loss is computed, in chunks of rows, so
//! that the logits of a whole batch (`[targets, vocabulary]`) never exist.

use rayon::prelude::*;

use super::{
    kernels::{exp_sum, max, with_simd},
    matrix::{Threads, matmul, view},
};

/// Numbers of logits that are held at once (4 MiB: they stay in the cache between products).
const CHUNK: usize = 1 << 20;

/// Gradients to fill: `d_hidden` (`[targets, hidden]`) is overwritten, `d_head` (`[vocabulary, hidden]`) added to
/// unless the head is frozen.
pub struct Gradients<'a> {
    pub d_hidden: &'a mut [f32],
    pub d_head: Option<&'a mut [f32]>,
    /// What each target's loss is multiplied by.
    pub scale: f32,
}

/// `Σ −log softmax(hidden·headᵀ)[target]` over the rows of `hidden` (`[targets, width]`).
pub fn cross_entropy(
    hidden: &[f32],
    head: &[f32],
    width: usize,
    targets: &[u32],
    logits: &mut Vec<f32>,
    mut gradients: Option<Gradients<'_>>,
) -> f64 {
    let vocabulary = head.len() / width;
    let rows_at_once = (CHUNK / vocabulary).clamp(16, 1024);
    let head = view(head, vocabulary, width);
    let mut total = 0.0;
    for (chunk, targets) in targets.chunks(rows_at_once).enumerate() {
        let rows = targets.len();
        let at = chunk * rows_at_once * width..(chunk * rows_at_once + rows) * width;
        let hidden = view(&hidden[at.clone()], rows, width);
        logits.resize(rows * vocabulary, 0.0);
        matmul(logits, hidden, head.t(), 1.0, false, Threads::Pool);
        let scale = gradients.as_ref().map(|g| g.scale);
        let losses: Vec<f64> = logits
            .par_chunks_exact_mut(vocabulary)
            .zip(targets)
            .with_min_len(4)
            .map(|(row, &target)| {
                with_simd(
                    #[inline(always)]
                    || row_loss(row, target as usize, scale),
                )
            })
            .collect();
        total += losses.iter().sum::<f64>();
        if let Some(g) = &mut gradients {
            let d_logits = view(logits, rows, vocabulary);
            matmul(&mut g.d_hidden[at], d_logits, head, 1.0, false, Threads::Pool);
            if let Some(d_head) = &mut g.d_head {
                matmul(d_head, d_logits.t(), hidden, 1.0, true, Threads::Pool);
            }
        }
    }
    total
}

/// The loss of one row of logits, which become its gradient if `scale` is given.
#[inline(always)]
pub fn row_loss(row: &mut [f32], target: usize, scale: Option<f32>) -> f64 {
    let at_target = row[target];
    let top = max(row);
    let sum = exp_sum(row, top);
    if let Some(scale) = scale {
        let factor = scale / sum;
        for p in row.iter_mut() {
            *p *= factor;
        }
        row[target] -= scale;
    }
    f64::from(top - at_target) + f64::from(sum).ln()
}
