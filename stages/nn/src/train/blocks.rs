//! Row-parallel steps between the matrix products of a layer: norms, rotary positions and the move of heads from
//! token-major to head-major order, residuals with dropout, and the activation; each with its backward pass.
//!
//! Work is cut into blocks of a fixed number of rows; sums over rows are taken block by block in order. Results
//! therefore do not depend on the number of threads.

use rayon::prelude::*;

use super::{
    attention::Heads,
    kernels::{Dropout, dot, inverse_rms, rms_norm_backward, swiglu, swiglu_backward, with_simd},
};

/// Rows that one task works on.
const ROWS: usize = 64;

/// `y = x · inverse · w` for rows of `w.len()`; keeps the inverse roots.
pub fn rms_norm(y: &mut [f32], inverse: &mut [f32], x: &[f32], w: &[f32], eps: f32) {
    let n = w.len();
    y.par_chunks_mut(ROWS * n).zip(inverse.par_chunks_mut(ROWS)).zip(x.par_chunks(ROWS * n)).for_each(
        |((y, inverse), x)| {
            with_simd(
                #[inline(always)]
                || {
                    for ((y, r), x) in y.chunks_exact_mut(n).zip(inverse).zip(x.chunks_exact(n)) {
                        *r = inverse_rms(x, eps);
                        for ((y, x), w) in y.iter_mut().zip(x).zip(w) {
                            *y = x * *r * w;
                        }
                    }
                },
            );
        },
    );
}

/// Adds the gradients of [`rms_norm`] to `dx` and, where the norm's weights are not frozen, to `dw`.
pub fn rms_norm_grad(dx: &mut [f32], dw: Option<&mut [f32]>, dy: &[f32], x: &[f32], w: &[f32], inverse: &[f32]) {
    let n = w.len();
    let partial: Vec<Vec<f32>> = dx
        .par_chunks_mut(ROWS * n)
        .zip(dy.par_chunks(ROWS * n))
        .zip(x.par_chunks(ROWS * n))
        .zip(inverse.par_chunks(ROWS))
        .map(|(((dx, dy), x), inverse)| {
            let mut dw = vec![0.0; n];
            with_simd(
                #[inline(always)]
                || {
                    let rows = dx.chunks_exact_mut(n).zip(dy.chunks_exact(n)).zip(x.chunks_exact(n)).zip(inverse);
                    for (((dx, dy), x), &r) in rows {
                        rms_norm_backward(dx, &mut dw, dy, x, w, r, true);
                    }
                },
            );
            dw
        })
        .collect();
    if let Some(dw) = dw {
        add_all(dw, &partial);
    }
}

fn add_all(sum: &mut [f32], parts: &[Vec<f32>]) {
    for part in parts {
        for (s, p) in sum.iter_mut().zip(part) {
            *s += p;
        }
    }
}

/// Cosines and sines of rotary positions (Su et al. 2021), `[positions, head_dim / 2]`.
pub struct Rotary {
    cos: Vec<f32>,
    sin: Vec<f32>,
    half: usize,
}

impl Rotary {
    pub fn new(positions: usize, head_dim: usize, theta: f64) -> Self {
        let half = head_dim / 2;
        let mut rotary = Self { cos: Vec::new(), sin: Vec::new(), half };
        for position in 0..positions {
            for i in 0..half {
                let angle = position as f64 / theta.powf(2.0 * i as f64 / head_dim as f64);
                rotary.cos.push(angle.cos() as f32);
                rotary.sin.push(angle.sin() as f32);
            }
        }
        rotary
    }

    /// Number of positions.
    pub fn positions(&self) -> usize {
        self.cos.len() / self.half.max(1)
    }

    /// Turns one head of one token forwards, or with `sign` −1 backwards.
    #[inline(always)]
    fn turn(&self, row: &mut [f32], position: usize, sign: f32) {
        let at = position * self.half..(position + 1) * self.half;
        let (first, second) = row.split_at_mut(self.half);
        for (((a, b), &c), &s) in first.iter_mut().zip(second).zip(&self.cos[at.clone()]).zip(&self.sin[at]) {
            let s = s * sign;
            (*a, *b) = (*a * c - *b * s, *b * c + *a * s);
        }
    }
}

/// The norms over each head of queries and keys (Qwen3's QK-norm), and their epsilon.
#[derive(Clone, Copy)]
pub struct HeadNorms<'a> {
    pub q: &'a [f32],
    pub k: &'a [f32],
    pub eps: f32,
}

/// Normalises and turns queries and keys, and moves all heads from `qkv`, `[tokens, (heads + 2 · kv) · dim]`, to
/// `heads_out`, `[heads + 2 · kv, tokens, dim]`.
pub fn split_heads(
    heads_out: &mut [f32],
    qkv: &[f32],
    heads: Heads,
    positions: &[u32],
    rotary: &Rotary,
    norms: HeadNorms<'_>,
) {
    let (tokens, d) = (positions.len(), heads.dim);
    let (queries, width) = (heads.kv * heads.group, (heads.kv * heads.group + 2 * heads.kv) * d);
    heads_out.par_chunks_mut(tokens * d).enumerate().for_each(|(head, out)| {
        out.par_chunks_mut(ROWS * d).enumerate().for_each(|(block, out)| {
            with_simd(
                #[inline(always)]
                || {
                    for (i, out) in out.chunks_exact_mut(d).enumerate() {
                        let token = block * ROWS + i;
                        let x = &qkv[token * width + head * d..token * width + (head + 1) * d];
                        if head >= queries + heads.kv {
                            out.copy_from_slice(x);
                            continue;
                        }
                        let w = if head < queries { norms.q } else { norms.k };
                        let r = inverse_rms(x, norms.eps);
                        for ((o, x), w) in out.iter_mut().zip(x).zip(w) {
                            *o = x * r * w;
                        }
                        rotary.turn(out, positions[token] as usize, 1.0);
                    }
                },
            );
        });
    });
}

/// The backward pass of [`split_heads`]: `d_heads` (head-major) to `d_qkv` (token-major, overwritten); adds to the
/// gradients of the two norms.
#[expect(clippy::too_many_arguments, reason = "the mirror image of `split_heads`, with two more gradients")]
pub fn split_heads_grad(
    d_qkv: &mut [f32],
    dq_norm: &mut [f32],
    dk_norm: &mut [f32],
    d_heads: &[f32],
    qkv: &[f32],
    heads: Heads,
    positions: &[u32],
    rotary: &Rotary,
    norms: HeadNorms<'_>,
) {
    let (tokens, d) = (positions.len(), heads.dim);
    let queries = heads.kv * heads.group;
    let count = queries + 2 * heads.kv;
    let width = count * d;
    let partial: Vec<(Vec<f32>, Vec<f32>)> = d_qkv
        .par_chunks_mut(ROWS * width)
        .enumerate()
        .map(|(block, d_qkv)| {
            let (mut dq, mut dk, mut dy) = (vec![0.0; d], vec![0.0; d], vec![0.0; d]);
            with_simd(
                #[inline(always)]
                || {
                    for (i, d_row) in d_qkv.chunks_exact_mut(width).enumerate() {
                        let token = block * ROWS + i;
                        for (head, dx) in d_row.chunks_exact_mut(d).enumerate() {
                            let from = (head * tokens + token) * d;
                            if head >= queries + heads.kv {
                                dx.copy_from_slice(&d_heads[from..from + d]);
                                continue;
                            }
                            dy.copy_from_slice(&d_heads[from..from + d]);
                            rotary.turn(&mut dy, positions[token] as usize, -1.0);
                            let x = &qkv[token * width + head * d..token * width + (head + 1) * d];
                            let (w, dw) = if head < queries { (norms.q, &mut dq) } else { (norms.k, &mut dk) };
                            rms_norm_backward(dx, dw, &dy, x, w, inverse_rms(x, norms.eps), false);
                        }
                    }
                },
            );
            (dq, dk)
        })
        .collect();
    for (dq, dk) in &partial {
        add_all(dq_norm, std::slice::from_ref(dq));
        add_all(dk_norm, std::slice::from_ref(dk));
    }
}

/// `[heads, tokens, dim]` to `[tokens, heads · dim]`.
pub fn merge_heads(out: &mut [f32], heads_in: &[f32], heads: usize, dim: usize) {
    let tokens = out.len() / (heads * dim);
    out.par_chunks_mut(ROWS * heads * dim).enumerate().for_each(|(block, out)| {
        for (i, row) in out.chunks_exact_mut(heads * dim).enumerate() {
            for (head, part) in row.chunks_exact_mut(dim).enumerate() {
                let from = (head * tokens + block * ROWS + i) * dim;
                part.copy_from_slice(&heads_in[from..from + dim]);
            }
        }
    });
}

/// The inverse of [`merge_heads`].
pub fn unmerge_heads(heads_out: &mut [f32], rows: &[f32], heads: usize, dim: usize) {
    let tokens = rows.len() / (heads * dim);
    heads_out.par_chunks_mut(tokens * dim).enumerate().for_each(|(head, out)| {
        for (token, part) in out.chunks_exact_mut(dim).enumerate() {
            let from = (token * heads + head) * dim;
            part.copy_from_slice(&rows[from..from + dim]);
        }
    });
}

/// `out = x + dropout(branch)`.
pub fn add_branch(out: &mut [f32], x: &[f32], branch: &[f32], dropout: Option<Dropout>) {
    const BLOCK: usize = 1 << 13;
    out.par_chunks_mut(BLOCK).zip(x.par_chunks(BLOCK)).zip(branch.par_chunks(BLOCK)).enumerate().for_each(
        |(block, ((out, x), branch))| {
            with_simd(
                #[inline(always)]
                || match dropout {
                    None => out.iter_mut().zip(x).zip(branch).for_each(|((o, x), b)| *o = x + b),
                    Some(dropout) => {
                        for (i, ((o, x), b)) in out.iter_mut().zip(x).zip(branch).enumerate() {
                            *o = x + b * dropout.factor((block * BLOCK + i) as u32);
                        }
                    }
                },
            );
        },
    );
}

/// `out = x · dropout`: dropout of a whole tensor, and the gradient of the branch in [`add_branch`].
pub fn apply_dropout(out: &mut [f32], x: &[f32], dropout: Option<Dropout>) {
    const BLOCK: usize = 1 << 13;
    let Some(dropout) = dropout else { return out.copy_from_slice(x) };
    out.par_chunks_mut(BLOCK).zip(x.par_chunks(BLOCK)).enumerate().for_each(|(block, (out, x))| {
        with_simd(
            #[inline(always)]
            || {
                for (i, (o, x)) in out.iter_mut().zip(x).enumerate() {
                    *o = x * dropout.factor((block * BLOCK + i) as u32);
                }
            },
        );
    });
}

/// `out += x · dropout`.
pub fn add_dropped(out: &mut [f32], x: &[f32], dropout: Option<Dropout>) {
    const BLOCK: usize = 1 << 13;
    out.par_chunks_mut(BLOCK).zip(x.par_chunks(BLOCK)).enumerate().for_each(|(block, (out, x))| {
        with_simd(
            #[inline(always)]
            || {
                for (i, (o, x)) in out.iter_mut().zip(x).enumerate() {
                    *o += x * dropout.map_or(1.0, |d| d.factor((block * BLOCK + i) as u32));
                }
            },
        );
    });
}

/// SwiGLU on rows of gate and up side by side: `[tokens, 2 · width]` to `[tokens, width]`.
pub fn activation(out: &mut [f32], gate_up: &[f32], width: usize) {
    out.par_chunks_mut(ROWS * width).zip(gate_up.par_chunks(ROWS * 2 * width)).for_each(|(out, gate_up)| {
        with_simd(
            #[inline(always)]
            || {
                for (out, row) in out.chunks_exact_mut(width).zip(gate_up.chunks_exact(2 * width)) {
                    let (gate, up) = row.split_at(width);
                    swiglu(out, gate, up);
                }
            },
        );
    });
}

/// Replaces `gate_up` by its gradient, given `d`, the gradient of [`activation`]'s result.
pub fn activation_grad(gate_up: &mut [f32], d: &[f32], width: usize) {
    gate_up.par_chunks_mut(ROWS * 2 * width).zip(d.par_chunks(ROWS * width)).for_each(|(gate_up, d)| {
        with_simd(
            #[inline(always)]
            || {
                for (row, d) in gate_up.chunks_exact_mut(2 * width).zip(d.chunks_exact(width)) {
                    let (gate, up) = row.split_at_mut(width);
                    swiglu_backward(gate, up, d);
                }
            },
        );
    });
}

/// Brings every row to length 1. Those of length 0 stay.
pub fn unit_rows(rows: &mut [f32], width: usize) {
    rows.par_chunks_exact_mut(width).with_min_len(64).for_each(|row| {
        let length = dot(row, row).sqrt();
        if length > 0.0 {
            row.iter_mut().for_each(|x| *x /= length);
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_are_moved_and_moved_back() {
        let rows: Vec<f32> = (0..130 * 6).map(|i| i as f32).collect();
        let (mut heads, mut back) = (vec![0.0; rows.len()], vec![0.0; rows.len()]);
        unmerge_heads(&mut heads, &rows, 3, 2);
        assert_eq!(&heads[..4], &[0.0, 1.0, 6.0, 7.0]);
        merge_heads(&mut back, &heads, 3, 2);
        assert_eq!(rows, back);
    }

    #[test]
    fn turning_back_undoes_a_turn() {
        let rotary = Rotary::new(10, 4, 1e4);
        let mut row = [1.0, 2.0, 3.0, 4.0];
        rotary.turn(&mut row, 7, 1.0);
        assert!((row[0] - 1.0).abs() > 0.1);
        rotary.turn(&mut row, 7, -1.0);
        for (a, b) in row.iter().zip([1.0, 2.0, 3.0, 4.0]) {
            assert!((a - b).abs() < 1e-5);
        }
    }
}
