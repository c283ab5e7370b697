//! One transformer layer at work: forward with a tape of what it will need, and backward from it.
//!
//! Gradients go to the weights or, where those are frozen, to the adapters beside them.

use std::ops::Range;

use super::{
    attention::{self, Heads},
    batch::Batch,
    blocks::{
        HeadNorms, Rotary, activation, activation_grad, add_branch, apply_dropout, merge_heads, rms_norm,
        rms_norm_grad, split_heads, split_heads_grad, unmerge_heads,
    },
    kernels::Dropout,
    layout::LayerRanges,
    lora::{self, Adapter, Adapters, LayerAdapters},
    matrix::{Threads, matmul, view},
};
use crate::qwen3::Config;

/// What one layer keeps for its backward pass.
#[derive(Default)]
pub struct Tape {
    x: Vec<f32>,
    norm1: Vec<f32>,
    inverse1: Vec<f32>,
    qkv: Vec<f32>,
    heads: Vec<f32>,
    attended: Vec<f32>,
    log_sums: Vec<f32>,
    merged: Vec<f32>,
    x2: Vec<f32>,
    norm2: Vec<f32>,
    inverse2: Vec<f32>,
    gate_up: Vec<f32>,
    active: Vec<f32>,
}

impl Tape {
    /// Numbers that a tape keeps for each token.
    pub fn numbers_per_token(c: &Config) -> usize {
        let all = c.query_width() + 2 * c.kv_width();
        4 * c.hidden_size + 2 * all + 2 * c.query_width() + c.heads + 2 + 3 * c.intermediate_size
    }

    #[cfg(test)]
    pub fn len(&self) -> usize {
        let Self { x, norm1, inverse1, qkv, heads, attended, log_sums, merged, x2, norm2, inverse2, gate_up, active } =
            self;
        let all = [x, norm1, inverse1, qkv, heads, attended, log_sums, merged, x2, norm2, inverse2, gate_up, active];
        all.iter().map(|v| v.len()).sum()
    }
}

pub fn size(buffer: &mut Vec<f32>, len: usize) {
    buffer.resize(len, 0.0);
}

/// Memory that all layers share in the backward pass.
pub struct Scratch<'a> {
    pub branch: &'a mut Vec<f32>,
    pub normed: &'a mut Vec<f32>,
    pub wide: &'a mut Vec<f32>,
    pub heads: &'a mut Vec<f32>,
    pub attended: &'a mut Vec<f32>,
    pub lora: &'a mut lora::Scratch,
}

/// Where gradients go.
pub enum Sink<'a> {
    /// To all weights, in their layout.
    Weights(&'a mut [f32]),
    /// To the adapters; the weights are frozen.
    Adapters(&'a mut [f32]),
}

impl Sink<'_> {
    /// The gradient of weights that are not frozen.
    pub fn weights(&mut self, range: Range<usize>) -> Option<&mut [f32]> {
        match self {
            Self::Weights(all) => Some(&mut all[range]),
            Self::Adapters(_) => None,
        }
    }
}

/// The adapters of one layer, and the seed of their dropout while training.
#[derive(Clone, Copy)]
pub struct Adapted<'a> {
    pub all: &'a Adapters,
    pub layer: &'a LayerAdapters,
    pub seed: Option<u64>,
}

/// One transformer layer at work.
pub struct Layer<'a> {
    pub config: &'a Config,
    pub heads: Heads,
    pub rotary: &'a Rotary,
    pub weights: &'a [f32],
    pub ranges: &'a LayerRanges,
    pub dropout: [Option<Dropout>; 2],
    pub adapted: Option<Adapted<'a>>,
}

/// One of a layer's products: its weights, their widths, and the adapters beside them.
struct Product<'a> {
    range: &'a Range<usize>,
    inner: usize,
    outer: usize,
    adapters: &'a [Adapter],
}

impl<'a> Layer<'a> {
    fn norms(&self) -> HeadNorms<'_> {
        HeadNorms {
            q: &self.weights[self.ranges.q_norm.clone()],
            k: &self.weights[self.ranges.k_norm.clone()],
            eps: self.config.rms_norm_eps as f32,
        }
    }

    fn weight(&self, range: &Range<usize>) -> &[f32] {
        &self.weights[range.clone()]
    }

    fn product(&self, which: impl Fn(&'a LayerRanges) -> &'a Range<usize>, inner: usize, outer: usize) -> Product<'a> {
        Product { range: which(self.ranges), inner, outer, adapters: &[] }
    }

    /// Queries, keys and values; output; gate and up; down.
    fn products(&self) -> [Product<'a>; 4] {
        let c = self.config;
        let (h, f) = (c.hidden_size, c.intermediate_size);
        let mut products = [
            self.product(|r| &r.qkv, h, c.query_width() + 2 * c.kv_width()),
            self.product(|r| &r.output, c.query_width(), h),
            self.product(|r| &r.gate_up, h, 2 * f),
            self.product(|r| &r.down, f, h),
        ];
        if let Some(adapted) = self.adapted {
            let l = adapted.layer;
            for (product, adapters) in products.iter_mut().zip([&l.qkv, &l.output, &l.gate_up, &l.down]) {
                product.adapters = adapters;
            }
        }
        products
    }

    /// `out = x · Wᵀ`, with the adapters' part.
    fn forward_product(&self, p: &Product, out: &mut [f32], x: &[f32], lora: &mut lora::Scratch) {
        let tokens = x.len() / p.inner;
        let w = view(self.weight(p.range), p.outer, p.inner);
        matmul(out, view(x, tokens, p.inner), w.t(), 1.0, false, Threads::Pool);
        if let Some(adapted) = self.adapted {
            adapted.all.forward(p.adapters, out, p.outer, x, adapted.seed, lora);
        }
    }

    /// `dx = d_out · W`, and the gradients of the weights or the adapters.
    fn backward_product(
        &self,
        p: &Product,
        d_out: &[f32],
        x: &[f32],
        dx: &mut [f32],
        sink: &mut Sink,
        lora: &mut lora::Scratch,
    ) {
        let tokens = x.len() / p.inner;
        let w = view(self.weight(p.range), p.outer, p.inner);
        let d = view(d_out, tokens, p.outer);
        matmul(dx, d, w, 1.0, false, Threads::Pool);
        match sink {
            Sink::Weights(all) => {
                matmul(&mut all[p.range.clone()], d.t(), view(x, tokens, p.inner), 1.0, true, Threads::Pool);
            }
            Sink::Adapters(gradients) => {
                if let Some(adapted) = self.adapted {
                    adapted.all.backward(p.adapters, d_out, p.outer, x, dx, gradients, adapted.seed, lora);
                }
            }
        }
    }

    /// `x` becomes the layer's result; `branch` is scratch.
    pub fn forward(&self, batch: &Batch, tape: &mut Tape, x: &mut [f32], branch: &mut [f32], lora: &mut lora::Scratch) {
        let c = self.config;
        let (tokens, h, f, d) = (batch.len(), c.hidden_size, c.intermediate_size, c.head_dim);
        let (queries, all) = (c.heads, c.heads + 2 * c.kv_heads);
        let eps = c.rms_norm_eps as f32;
        size(&mut tape.x, tokens * h);
        size(&mut tape.norm1, tokens * h);
        size(&mut tape.inverse1, tokens);
        size(&mut tape.qkv, tokens * all * d);
        size(&mut tape.heads, tokens * all * d);
        size(&mut tape.attended, tokens * queries * d);
        size(&mut tape.log_sums, tokens * queries);
        size(&mut tape.merged, tokens * queries * d);
        size(&mut tape.x2, tokens * h);
        size(&mut tape.norm2, tokens * h);
        size(&mut tape.inverse2, tokens);
        size(&mut tape.gate_up, tokens * 2 * f);
        size(&mut tape.active, tokens * f);
        let [qkv, output, gate_up, down] = self.products();

        tape.x.copy_from_slice(x);
        rms_norm(&mut tape.norm1, &mut tape.inverse1, &tape.x, self.weight(&self.ranges.input_norm), eps);
        self.forward_product(&qkv, &mut tape.qkv, &tape.norm1, lora);
        split_heads(&mut tape.heads, &tape.qkv, self.heads, &batch.positions, self.rotary, self.norms());
        let heads = split_qkv(&tape.heads, tokens, self.heads);
        attention::forward(self.heads, &batch.segments, heads, &mut tape.attended, &mut tape.log_sums);
        merge_heads(&mut tape.merged, &tape.attended, queries, d);
        self.forward_product(&output, branch, &tape.merged, lora);
        add_branch(&mut tape.x2, &tape.x, branch, self.dropout[0]);

        rms_norm(&mut tape.norm2, &mut tape.inverse2, &tape.x2, self.weight(&self.ranges.post_norm), eps);
        self.forward_product(&gate_up, &mut tape.gate_up, &tape.norm2, lora);
        activation(&mut tape.active, &tape.gate_up, f);
        self.forward_product(&down, branch, &tape.active, lora);
        add_branch(x, &tape.x2, branch, self.dropout[1]);
    }

    /// `dx`, the gradient of the layer's result, becomes that of its input. Uses up the tape.
    pub fn backward(&self, batch: &Batch, tape: &mut Tape, dx: &mut [f32], s: Scratch<'_>, sink: &mut Sink) {
        let c = self.config;
        let (tokens, f, d) = (batch.len(), c.intermediate_size, c.head_dim);
        let (queries, all) = (c.heads, c.heads + 2 * c.kv_heads);
        let [qkv, output, gate_up, down] = self.products();

        // The gated branch.
        apply_dropout(s.branch, dx, self.dropout[1]);
        size(s.wide, tokens * f);
        self.backward_product(&down, s.branch, &tape.active, s.wide, sink, s.lora);
        activation_grad(&mut tape.gate_up, s.wide, f);
        self.backward_product(&gate_up, &tape.gate_up, &tape.norm2, s.normed, sink, s.lora);
        let range = &self.ranges.post_norm;
        let dw = sink.weights(range.clone());
        rms_norm_grad(dx, dw, s.normed, &tape.x2, self.weight(range), &tape.inverse2);

        // Attention.
        apply_dropout(s.branch, dx, self.dropout[0]);
        size(s.wide, tokens * all.max(queries) * d);
        let d_merged = &mut s.wide[..tokens * queries * d];
        self.backward_product(&output, s.branch, &tape.merged, d_merged, sink, s.lora);
        size(s.attended, tokens * queries * d);
        unmerge_heads(s.attended, d_merged, queries, d);
        size(s.heads, tokens * all * d);
        let (dq, rest) = s.heads.split_at_mut(tokens * queries * d);
        let (dk, dv) = rest.split_at_mut(tokens * c.kv_heads * d);
        attention::backward(
            self.heads,
            &batch.segments,
            split_qkv(&tape.heads, tokens, self.heads),
            &tape.attended,
            &tape.log_sums,
            s.attended,
            attention::Gradients { dq, dk, dv },
        );
        let (mut dq_norm, mut dk_norm) = (vec![0.0; d], vec![0.0; d]);
        let (norms, positions) = (self.norms(), &batch.positions);
        let (dq, dk) = (&mut dq_norm, &mut dk_norm);
        split_heads_grad(s.wide, dq, dk, s.heads, &tape.qkv, self.heads, positions, self.rotary, norms);
        for (range, d) in [(&self.ranges.q_norm, dq_norm), (&self.ranges.k_norm, dk_norm)] {
            if let Some(gradient) = sink.weights(range.clone()) {
                gradient.iter_mut().zip(d).for_each(|(g, d)| *g += d);
            }
        }
        self.backward_product(&qkv, s.wide, &tape.norm1, s.normed, sink, s.lora);
        let range = &self.ranges.input_norm;
        let dw = sink.weights(range.clone());
        rms_norm_grad(dx, dw, s.normed, &tape.x, self.weight(range), &tape.inverse1);
    }
}

/// Queries, keys and values in `[heads + 2 · kv, tokens, dim]`.
fn split_qkv(heads_major: &[f32], tokens: usize, heads: Heads) -> attention::Qkv<'_> {
    let (q, rest) = heads_major.split_at(heads.kv * heads.group * tokens * heads.dim);
    let (k, v) = rest.split_at(heads.kv * tokens * heads.dim);
    attention::Qkv { q, k, v }
}
