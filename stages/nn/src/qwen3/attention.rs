//! Grouped-query attention for one head of keys and values: the queries that share it are rows of one product.

use super::kv::{HeadKv, SlotKv};
use crate::cpu::{Accumulate, Rows, RowsMut, matmul, ops};

/// Query positions of a prompt that are taken together; it bounds the memory for scores, and how much of the
/// future is computed in vain.
pub const POSITIONS_AT_ONCE: usize = 32;

/// The heads of this attention inside rows of queries and keys.
#[derive(Clone, Copy)]
pub struct Shape {
    /// Query heads that share this head of keys and values.
    pub group: usize,
    pub head_dim: usize,
    /// Width of a row of queries: all heads.
    pub query_width: usize,
    /// Width of a row of keys (or values) of a slot.
    pub kv_width: usize,
    /// Which head of keys and values this is.
    pub head: usize,
}

impl Shape {
    fn group_width(&self) -> usize {
        self.group * self.head_dim
    }

    /// This group's part of a row of queries.
    fn of_row<'a>(&self, queries: &'a [f32], row: usize) -> &'a [f32] {
        let start = row * self.query_width + self.head * self.group_width();
        &queries[start..start + self.group_width()]
    }
}

/// Buffers that are used again from call to call.
#[derive(Default)]
pub struct Buffers {
    queries: Vec<f32>,
    scores: Vec<f32>,
}

/// Attention of a prompt's own tokens: `queries` (rows of all heads, already scaled) see the segments in `before`
/// whole, and of `own` themselves and what is before them. Returns `[rows, group × head_dim]`.
pub fn over_prompt(shape: Shape, queries: &[f32], before: &[&HeadKv], own: &HeadKv, buffers: &mut Buffers) -> Vec<f32> {
    let rows = queries.len() / shape.query_width;
    let mut out = vec![0.0; rows * shape.group_width()];
    let earlier: usize = before.iter().map(|kv| kv.keys.cols()).sum();
    for (block, out) in out.chunks_mut(POSITIONS_AT_ONCE * shape.group_width()).enumerate() {
        let start = block * POSITIONS_AT_ONCE;
        let count = out.len() / shape.group_width();
        let seen = start + count;
        let total = earlier + seen;
        buffers.queries.clear();
        for row in start..start + count {
            buffers.queries.extend_from_slice(shape.of_row(queries, row));
        }
        let heads = Rows::dense(&buffers.queries, shape.head_dim);
        buffers.scores.resize(count * shape.group * total, 0.0);
        let mut at = 0;
        for (kv, length) in with_lengths(before, own, seen) {
            let target = RowsMut { data: &mut buffers.scores[at..], stride: total };
            matmul(heads, kv.keys.view().first(shape.head_dim, length), target, Accumulate::No, 1);
            at += length;
        }
        for (index, row) in buffers.scores.chunks_exact_mut(total).enumerate() {
            // What comes after the position gets probability 0, and adds nothing to any sum.
            let (visible, hidden) = row.split_at_mut(earlier + start + index / shape.group + 1);
            ops::softmax(visible);
            hidden.fill(0.0);
        }
        weigh_values(shape, &buffers.scores, total, with_lengths(before, own, seen), out);
    }
    out
}

/// The segments and how many of their tokens count.
fn with_lengths<'a>(
    before: &'a [&'a HeadKv],
    own: &'a HeadKv,
    seen: usize,
) -> impl Iterator<Item = (&'a HeadKv, usize)> {
    before.iter().map(|kv| (*kv, kv.keys.cols())).chain(std::iter::once((own, seen)))
}

/// `out = probabilities · values`, where `out`'s rows are single heads side by side.
fn weigh_values<'a>(
    shape: Shape,
    probabilities: &[f32],
    stride: usize,
    segments: impl Iterator<Item = (&'a HeadKv, usize)>,
    out: &mut [f32],
) {
    let rows = out.len() / shape.head_dim;
    let (mut at, mut accumulate) = (0, Accumulate::No);
    for (kv, length) in segments {
        let part = Rows { data: &probabilities[at..], stride, rows };
        let target = RowsMut { data: &mut *out, stride: shape.head_dim };
        matmul(part, kv.values.view().first(length, shape.head_dim), target, accumulate, 1);
        at += length;
        accumulate = Accumulate::Yes;
    }
}

/// Attention of beams: every row sees all of `prompt` and the slots of its own path, the last of which is itself.
/// Returns `[rows, group × head_dim]`.
pub fn over_branches(
    shape: Shape,
    queries: &[f32],
    prompt: &[&HeadKv],
    slots: &SlotKv,
    paths: &[&[u32]],
    buffers: &mut Buffers,
) -> Vec<f32> {
    let (rows, dim) = (queries.len() / shape.query_width, shape.head_dim);
    let depth = paths.iter().map(|p| p.len()).max().unwrap_or(0);
    let earlier: usize = prompt.iter().map(|kv| kv.keys.cols()).sum();
    let total = earlier + depth;
    buffers.queries.clear();
    for row in 0..rows {
        buffers.queries.extend_from_slice(shape.of_row(queries, row));
    }
    buffers.scores.resize(rows * shape.group * total, 0.0);
    let heads = Rows::dense(&buffers.queries, dim);
    let mut at = 0;
    for kv in prompt {
        let target = RowsMut { data: &mut buffers.scores[at..], stride: total };
        matmul(heads, kv.keys.view(), target, Accumulate::No, 1);
        at += kv.keys.cols();
    }
    let slot = |store: &'_ [f32], index: u32| -> std::ops::Range<usize> {
        let start = index as usize * shape.kv_width + shape.head * dim;
        debug_assert!(start + dim <= store.len());
        start..start + dim
    };
    let mut out = vec![0.0; rows * shape.group_width()];
    let each = |index: usize| (&buffers.queries[index * dim..(index + 1) * dim], paths[index / shape.group]);
    for (index, row) in buffers.scores.chunks_exact_mut(total).enumerate() {
        let (query, path) = each(index);
        for (score, s) in row[earlier..].iter_mut().zip(path) {
            *score = ops::dot(query, &slots.keys[slot(&slots.keys, *s)]);
        }
        ops::softmax(&mut row[..earlier + path.len()]);
    }
    weigh_values(shape, &buffers.scores, total, prompt.iter().map(|kv| (*kv, kv.keys.cols())), &mut out);
    for (index, (row, out)) in buffers.scores.chunks_exact(total).zip(out.chunks_exact_mut(dim)).enumerate() {
        let (_, path) = each(index);
        for (probability, s) in row[earlier..].iter().zip(path) {
            ops::add_scaled(out, *probability, &slots.values[slot(&slots.values, *s)]);
        }
    }
    out
}
