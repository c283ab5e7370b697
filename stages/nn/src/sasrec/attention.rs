//! Causal self-attention over a ragged batch: each sequence attends to itself only, and no place is spent on padding.
//!
//! Sequences here are short (9 items on average in Beauty, 50 at most), so plain loops over the lower triangle beat
//! batched matrix products. Vaswani et al., arXiv 1706.03762, section 3.2.

use std::ops::Range;

use super::kernels::{add_scaled, dot, exp, max, sum, vectorised};

/// Number of probabilities kept for a sequence of `len` and one head: its lower triangle.
pub fn triangle(len: usize) -> usize {
    len * (len + 1) / 2
}

/// The shape that all calls for one batch share.
#[derive(Debug, Clone, Copy)]
pub struct Shape<'a> {
    /// Rows of each sequence in the batch.
    pub sequences: &'a [Range<usize>],
    pub hidden: usize,
    pub heads: usize,
}

impl Shape<'_> {
    /// Number of probabilities kept for the whole batch.
    pub fn probabilities(&self) -> usize {
        self.sequences.iter().map(|s| triangle(s.len())).sum::<usize>() * self.heads
    }
}

vectorised! {
    /// `context: [rows, hidden]` from `qkv: [rows, 3 · hidden]` (queries, keys, values side by side). Keeps the
    /// probabilities before dropout; `mask` is empty or holds a factor for each.
    pub fn attend(context: &mut [f32], probabilities: &mut [f32], shape: Shape<'_>, qkv: &[f32], mask: &[f32]) {
        let Shape { sequences, hidden, heads } = shape;
        let width = hidden / heads;
        let scale = 1.0 / (width as f32).sqrt();
        let mut offset = 0;
        for sequence in sequences {
            for head in 0..heads {
                let part = |row: usize, which: usize| {
                    let at = row * 3 * hidden + which * hidden + head * width;
                    &qkv[at..at + width]
                };
                for (i, row) in sequence.clone().enumerate() {
                    let p = &mut probabilities[offset..offset + i + 1];
                    let query = part(row, 0);
                    for (p, key) in p.iter_mut().zip(sequence.clone()) {
                        *p = dot(query, part(key, 1)) * scale;
                    }
                    let top = max(p);
                    for x in p.iter_mut() {
                        *x = exp(*x - top);
                    }
                    let factor = 1.0 / sum(p);
                    let out = &mut context[row * hidden + head * width..][..width];
                    out.fill(0.0);
                    for (j, x) in p.iter_mut().enumerate() {
                        *x *= factor;
                        let kept = if mask.is_empty() { *x } else { *x * mask[offset + j] };
                        add_scaled(out, kept, part(sequence.start + j, 2));
                    }
                    offset += i + 1;
                }
            }
        }
    }
}

vectorised! {
    /// Writes the gradient of `qkv`, given that of `context`.
    pub fn attend_backward(
        qkv_grad: &mut [f32],
        shape: Shape<'_>,
        context_grad: &[f32],
        qkv: &[f32],
        probabilities: &[f32],
        mask: &[f32],
    ) {
        let Shape { sequences, hidden, heads } = shape;
        let width = hidden / heads;
        let scale = 1.0 / (width as f32).sqrt();
        qkv_grad.fill(0.0);
        let mut p_grad = Vec::new();
        let mut offset = 0;
        for sequence in sequences {
            for head in 0..heads {
                let place = |row: usize, which: usize| {
                    let at = row * 3 * hidden + which * hidden + head * width;
                    at..at + width
                };
                for (i, row) in sequence.clone().enumerate() {
                    let p = &probabilities[offset..offset + i + 1];
                    let out_grad = &context_grad[row * hidden + head * width..][..width];
                    p_grad.clear();
                    for (j, key) in sequence.clone().take(i + 1).enumerate() {
                        let factor = if mask.is_empty() { 1.0 } else { mask[offset + j] };
                        add_scaled(&mut qkv_grad[place(key, 2)], p[j] * factor, out_grad);
                        p_grad.push(dot(out_grad, &qkv[place(key, 2)]) * factor);
                    }
                    let mean = dot(p, &p_grad);
                    for (j, key) in sequence.clone().take(i + 1).enumerate() {
                        let logit_grad = p[j] * (p_grad[j] - mean) * scale;
                        add_scaled(&mut qkv_grad[place(row, 0)], logit_grad, &qkv[place(key, 1)]);
                        add_scaled(&mut qkv_grad[place(key, 1)], logit_grad, &qkv[place(row, 0)]);
                    }
                    offset += i + 1;
                }
            }
        }
    }
}
