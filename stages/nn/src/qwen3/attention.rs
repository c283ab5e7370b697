//! Grouped-query attention for one head of keys and values: for each of the query heads that share it, the positions
//! (or beams) are the rows of one product. Queries are read, and results written, where they lie.

use super::{
    kv::{HeadKv, SlotKv},
    work::room,
};
use crate::cpu::{Accumulate, Rows, RowsMut, matmul, ops};

/// Query positions of a prompt that are taken together; it bounds the memory for scores, and how much of the
/// future is computed in vain.
pub const POSITIONS_AT_ONCE: usize = 48;

/// The heads of this attention inside rows of queries and keys.
#[derive(Clone, Copy)]
pub struct Shape {
    /// Query heads that share this head of keys and values.
    pub group: usize,
    pub head_dim: usize,
    /// Width of a row of keys (or values) of a slot.
    pub kv_width: usize,
    /// Which head of keys and values this is.
    pub head: usize,
}

impl Shape {
    /// Where the group's queries begin in a row of all heads.
    pub fn first_query(&self) -> usize {
        self.head * self.group * self.head_dim
    }
}

/// Rows that begin with the queries of all heads, already scaled.
#[derive(Clone, Copy)]
pub struct Queries<'a> {
    pub data: &'a [f32],
    pub stride: usize,
}

impl<'a> Queries<'a> {
    /// One query head of `count` rows from `first` on.
    fn of(&self, shape: Shape, member: usize, first: usize, count: usize) -> Rows<'a> {
        let start = first * self.stride + shape.first_query() + member * shape.head_dim;
        Rows { data: &self.data[start..], stride: self.stride, rows: count }
    }
}

/// Where the group's results belong: rows of which this group's part comes first.
pub struct Out<'a> {
    pub data: &'a mut [f32],
    pub stride: usize,
}

/// Attention of a prompt's own tokens from `first` on: each sees what stands `before` whole, and of `own` itself and
/// what is before it. `queries` begin with the prompt's first token.
pub fn over_prompt(
    shape: Shape,
    queries: Queries,
    before: Option<&HeadKv>,
    own: &HeadKv,
    first: usize,
    out: Out,
    scores: &mut Vec<f32>,
) {
    let (rows, dim) = (own.keys.cols(), shape.head_dim);
    let earlier = before.map_or(0, |kv| kv.keys.cols());
    for start in (first..rows).step_by(POSITIONS_AT_ONCE) {
        let count = POSITIONS_AT_ONCE.min(rows - start);
        let seen = start + count;
        let total = earlier + seen;
        let segments = || before.map(|kv| (kv, earlier)).into_iter().chain([(own, seen)]);
        for member in 0..shape.group {
            let heads = queries.of(shape, member, start, count);
            let scores = room(scores, count * total);
            score(heads, dim, segments(), scores, total);
            for (index, row) in scores.chunks_exact_mut(total).enumerate() {
                // What comes after the position gets probability 0, and adds nothing to any sum.
                let (visible, hidden) = row.split_at_mut(earlier + start + index + 1);
                ops::softmax(visible);
                hidden.fill(0.0);
            }
            let place = &mut out.data[start * out.stride + member * dim..];
            let probabilities = Rows::dense(scores, total);
            weigh(probabilities, segments(), dim, RowsMut { data: place, stride: out.stride });
        }
    }
}

/// The generated tokens of a prompt's beams.
#[derive(Clone, Copy)]
pub struct Beams<'a> {
    pub slots: &'a SlotKv,
    /// The slots before each row's own, which is `next` for the first row, and so on.
    pub paths: &'a [Vec<u32>],
    pub next: usize,
}

impl Beams<'_> {
    /// Where the keys (and values) begin that a row sees of this head, its own at the end.
    fn seen(&self, shape: Shape, row: usize) -> impl Iterator<Item = usize> {
        let slots = self.paths[row].iter().map(|slot| *slot as usize).chain([self.next + row]);
        slots.map(move |slot| slot * shape.kv_width + shape.head * shape.head_dim)
    }
}

/// Attention of beams: every row sees all of `prompt` and the slots of its own path, the last of which is itself.
pub fn over_branches(
    shape: Shape,
    queries: Queries,
    prompt: &[&HeadKv],
    beams: Beams,
    out: Out,
    scores: &mut Vec<f32>,
) {
    let (rows, dim) = (beams.paths.len(), shape.head_dim);
    let earlier: usize = prompt.iter().map(|kv| kv.keys.cols()).sum();
    let longest = beams.paths.iter().map(Vec::len).max().unwrap_or(0) + 1;
    let total = earlier + longest;
    let segments = || prompt.iter().map(|kv| (*kv, kv.keys.cols()));
    let starts: Vec<usize> = (0..rows).flat_map(|row| beams.seen(shape, row)).collect();
    let mut ends = 0..0;
    let seen: Vec<&[usize]> = beams
        .paths
        .iter()
        .map(|path| {
            ends = ends.end..ends.end + path.len() + 1;
            &starts[ends.clone()]
        })
        .collect();
    for member in 0..shape.group {
        let heads = queries.of(shape, member, 0, rows);
        let scores = room(scores, rows * total);
        score(heads, dim, segments(), scores, total);
        for ((row, seen), query) in scores.chunks_exact_mut(total).zip(&seen).zip(heads.data.chunks(heads.stride)) {
            let row = &mut row[..earlier + seen.len()];
            ops::dots(&query[..dim], &beams.slots.keys, seen, &mut row[earlier..]);
            ops::softmax(row);
        }
        let place = &mut out.data[member * dim..];
        let target = RowsMut { data: &mut *place, stride: out.stride };
        weigh(Rows { data: scores, stride: total, rows }, segments(), dim, target);
        for ((row, seen), out) in scores.chunks_exact(total).zip(&seen).zip(place.chunks_mut(out.stride)) {
            ops::add_scaled(&mut out[..dim], &row[earlier..], &beams.slots.values, seen);
        }
    }
}

/// `scores = queries · keys` of segments and how many of their tokens count, side by side in rows of `total`.
fn score<'a>(
    queries: Rows,
    dim: usize,
    segments: impl Iterator<Item = (&'a HeadKv, usize)>,
    scores: &mut [f32],
    total: usize,
) {
    let mut at = 0;
    for (kv, length) in segments {
        let target = RowsMut { data: &mut scores[at..], stride: total };
        matmul(queries, kv.keys.view().first(dim, length), target, Accumulate::No, 1);
        at += length;
    }
}

/// `out = probabilities · values` of segments and how many of their tokens count.
fn weigh<'a>(probabilities: Rows, segments: impl Iterator<Item = (&'a HeadKv, usize)>, dim: usize, out: RowsMut) {
    let (mut at, mut accumulate) = (0, Accumulate::No);
    for (kv, length) in segments {
        let part = Rows { data: &probabilities.data[at..], ..probabilities };
        let target = RowsMut { data: &mut *out.data, stride: out.stride };
        matmul(part, kv.values.view().first(length, dim), target, accumulate, 1);
        at += length;
        accumulate = Accumulate::Yes;
    }
}
