//! Causal attention over packed segments, forward and backward, without ever attending across segments.
//!
//! Heads lie one after another, `[heads, tokens, head_dim]`, so that the part of one head and one segment is a
//! contiguous slice and every task writes slices of its own. Query rows go in blocks, and only the keys that a
//! block may see are multiplied. The backward pass computes the probabilities again from the saved log-sums
//! (as FlashAttention does, Dao et al. 2022): memory is linear in the number of tokens.

use rayon::prelude::*;

use super::{
    kernels::{dot, exp_sum, max, with_simd},
    matrix::{Threads, matmul, view},
};

/// Query rows that are multiplied at once.
const BLOCK: usize = 64;

/// The heads of one layer: `group` query heads share one head of keys and values.
#[derive(Debug, Clone, Copy)]
pub struct Heads {
    pub kv: usize,
    pub group: usize,
    pub dim: usize,
}

/// What the forward pass reads, head-major.
#[derive(Clone, Copy)]
pub struct Qkv<'a> {
    pub q: &'a [f32],
    pub k: &'a [f32],
    pub v: &'a [f32],
}

/// One key-value head in one segment.
struct Task<'a> {
    head: usize,
    start: usize,
    len: usize,
    /// For each query head of the group.
    per_query: Vec<&'a mut [f32]>,
    /// Log-sums (forward) of the same heads.
    log_sums: Vec<&'a mut [f32]>,
    /// Gradients of keys and values (backward).
    dk: Option<&'a mut [f32]>,
    dv: Option<&'a mut [f32]>,
}

/// `out[h] = softmax(q[h]·k[h / group]ᵀ / √dim, causal)·v[h / group]` within each segment; `log_sums` is `[heads,
/// tokens]`. `segments` are lengths that sum to the number of tokens.
pub fn forward(heads: Heads, segments: &[usize], qkv: Qkv<'_>, out: &mut [f32], log_sums: &mut [f32]) {
    let tokens: usize = segments.iter().sum();
    let out = slices(out, heads.kv * heads.group, heads.dim, segments);
    let sums = slices(log_sums, heads.kv * heads.group, 1, segments);
    let tasks = tasks(heads, segments, out, sums, None);
    tasks.into_par_iter().for_each_init(Vec::new, |scores, mut task| {
        let d = heads.dim;
        let kv = (task.head * tokens + task.start) * d..(task.head * tokens + task.start + task.len) * d;
        let (k, v) = (&qkv.k[kv.clone()], &qkv.v[kv]);
        for g in 0..heads.group {
            let base = (task.head * heads.group + g) * tokens + task.start;
            let q = &qkv.q[base * d..(base + task.len) * d];
            for from in (0..task.len).step_by(BLOCK) {
                let to = (from + BLOCK).min(task.len);
                let (rows, seen) = (to - from, to);
                scores.resize(rows * seen, 0.0);
                let scale = 1.0 / (d as f32).sqrt();
                let q = view(&q[from * d..to * d], rows, d);
                matmul(scores, q, view(k, seen, d).t(), scale, false, Threads::One);
                let sums = &mut task.log_sums[g][from..to];
                with_simd(
                    #[inline(always)]
                    || softmax_causal(scores, from, seen, sums),
                );
                let out = &mut task.per_query[g][from * d..to * d];
                matmul(out, view(scores, rows, seen), view(v, seen, d), 1.0, false, Threads::One);
            }
        }
    });
}

/// Softmax of each row over the keys up to its own place; zero beyond. Row `i` is query `from + i`.
#[inline(always)]
fn softmax_causal(scores: &mut [f32], from: usize, seen: usize, log_sums: &mut [f32]) {
    for (i, (row, log_sum)) in scores.chunks_exact_mut(seen).zip(log_sums).enumerate() {
        let (live, masked) = row.split_at_mut(from + i + 1);
        let top = max(live);
        let sum = exp_sum(live, top);
        let inverse = 1.0 / sum;
        for p in live {
            *p *= inverse;
        }
        masked.fill(0.0);
        *log_sum = top + sum.ln();
    }
}

/// Gradients for the backward pass, all head-major and overwritten.
pub struct Gradients<'a> {
    pub dq: &'a mut [f32],
    pub dk: &'a mut [f32],
    pub dv: &'a mut [f32],
}

/// Given `out` and `log_sums` of [`forward`] and `d_out`, the gradient with respect to `out`:
/// `dV = Pᵀ·dO`, `dS = P ∘ (dO·Vᵀ − rowsum(dO ∘ O))`, `dQ = dS·K/√dim`, `dK = dSᵀ·Q/√dim`.
pub fn backward(
    heads: Heads,
    segments: &[usize],
    qkv: Qkv<'_>,
    out: &[f32],
    log_sums: &[f32],
    d_out: &[f32],
    into: Gradients<'_>,
) {
    let tokens: usize = segments.iter().sum();
    let dq = slices(into.dq, heads.kv * heads.group, heads.dim, segments);
    let dk = slices(into.dk, heads.kv, heads.dim, segments);
    let dv = slices(into.dv, heads.kv, heads.dim, segments);
    let tasks = tasks(heads, segments, dq, Vec::new(), Some((dk, dv)));
    tasks.into_par_iter().for_each_init(
        || (Vec::new(), Vec::new()),
        |(p, ds), mut task| {
            let d = heads.dim;
            let scale = 1.0 / (d as f32).sqrt();
            let kv = (task.head * tokens + task.start) * d..(task.head * tokens + task.start + task.len) * d;
            let (k, v) = (&qkv.k[kv.clone()], &qkv.v[kv]);
            let (Some(dk), Some(dv)) = (task.dk, task.dv) else { return };
            dk.fill(0.0);
            dv.fill(0.0);
            for g in 0..heads.group {
                let base = (task.head * heads.group + g) * tokens + task.start;
                let head = base * d..(base + task.len) * d;
                let (q, o, d_o) = (&qkv.q[head.clone()], &out[head.clone()], &d_out[head]);
                let sums = &log_sums[base..base + task.len];
                for from in (0..task.len).step_by(BLOCK) {
                    let to = (from + BLOCK).min(task.len);
                    let (rows, seen) = (to - from, to);
                    p.resize(rows * seen, 0.0);
                    ds.resize(rows * seen, 0.0);
                    let block = from * d..to * d;
                    let (q, o, d_o) = (&q[block.clone()], &o[block.clone()], &d_o[block.clone()]);
                    let (q_view, d_o_view) = (view(q, rows, d), view(d_o, rows, d));
                    matmul(p, q_view, view(k, seen, d).t(), scale, false, Threads::One);
                    matmul(ds, d_o_view, view(v, seen, d).t(), 1.0, false, Threads::One);
                    with_simd(
                        #[inline(always)]
                        || scores_backward(p, ds, from, seen, &sums[from..to], o, d_o, d),
                    );
                    matmul(&mut dv[..seen * d], view(p, rows, seen).t(), d_o_view, 1.0, true, Threads::One);
                    matmul(&mut dk[..seen * d], view(ds, rows, seen).t(), q_view, scale, true, Threads::One);
                    let dq = &mut task.per_query[g][block];
                    matmul(dq, view(ds, rows, seen), view(k, seen, d), scale, false, Threads::One);
                }
            }
        },
    );
}

/// Turns scores into probabilities in `p`, and `dO·Vᵀ` into the scores' gradient in `ds`.
#[inline(always)]
#[expect(clippy::too_many_arguments, reason = "one inner loop, apart only so that it is compiled for wide vectors")]
fn scores_backward(
    p: &mut [f32],
    ds: &mut [f32],
    from: usize,
    seen: usize,
    log_sums: &[f32],
    o: &[f32],
    d_o: &[f32],
    d: usize,
) {
    for (i, (p, ds)) in p.chunks_exact_mut(seen).zip(ds.chunks_exact_mut(seen)).enumerate() {
        let (live, masked) = p.split_at_mut(from + i + 1);
        exp_sum(live, log_sums[i]);
        masked.fill(0.0);
        let delta = dot(&o[i * d..(i + 1) * d], &d_o[i * d..(i + 1) * d]);
        for (s, &p) in ds.iter_mut().zip(&*p) {
            *s = p * (*s - delta);
        }
    }
}

/// Cuts `[heads, tokens, width]` into one slice for each head and segment: `result[head][segment]`.
fn slices<'a>(data: &'a mut [f32], heads: usize, width: usize, segments: &[usize]) -> Vec<Vec<&'a mut [f32]>> {
    let tokens: usize = segments.iter().sum();
    data[..heads * tokens * width]
        .chunks_exact_mut((tokens * width).max(1))
        .map(|mut rest| {
            segments
                .iter()
                .map(|len| {
                    let (part, tail) = std::mem::take(&mut rest).split_at_mut(len * width);
                    rest = tail;
                    part
                })
                .collect()
        })
        .collect()
}

/// Pieces of a matrix, by head and segment.
type Split<'a> = Vec<Vec<&'a mut [f32]>>;

/// One task for each key-value head and segment, the longest segments first, so that the threads end together.
fn tasks<'a>(
    heads: Heads,
    segments: &[usize],
    mut per_query: Split<'a>,
    mut log_sums: Split<'a>,
    mut kv: Option<(Split<'a>, Split<'a>)>,
) -> Vec<Task<'a>> {
    let mut tasks = Vec::with_capacity(heads.kv * segments.len());
    let mut start = 0;
    for (segment, &len) in segments.iter().enumerate() {
        for head in 0..heads.kv {
            let queries = head * heads.group..(head + 1) * heads.group;
            let take = |from: &mut Vec<Vec<&'a mut [f32]>>, head: usize| std::mem::take(&mut from[head][segment]);
            tasks.push(Task {
                head,
                start,
                len,
                per_query: queries.clone().map(|h| take(&mut per_query, h)).collect(),
                log_sums: if log_sums.is_empty() {
                    Vec::new()
                } else {
                    queries.map(|h| take(&mut log_sums, h)).collect()
                },
                dk: kv.as_mut().map(|(dk, _)| take(dk, head)),
                dv: kv.as_mut().map(|(_, dv)| take(dv, head)),
            });
        }
        start += len;
    }
    tasks.sort_by_key(|t| std::cmp::Reverse(t.len));
    tasks
}
