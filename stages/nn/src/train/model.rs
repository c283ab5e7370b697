//! The differentiable Qwen3: one forward and one backward pass over packed segments, on the CPU.
//!
//! Formulas are those of Qwen3 as Hugging Face computes it: pre-norm layers, RMS norms over each head of queries
//! and keys, rotary positions, grouped-query attention, SwiGLU, tied or separate head. The backward pass is written
//! by hand, block by block; every block is checked against finite differences. What a layer needs for
//! it is kept on a tape whose memory is reused from batch to batch.

use super::{
    attention::{self, Heads},
    blocks::{
        HeadNorms, Rotary, activation, activation_grad, add_branch, apply_dropout, merge_heads, rms_norm,
        rms_norm_grad, split_heads, split_heads_grad, unmerge_heads,
    },
    cross_entropy::{self, cross_entropy},
    kernels::Dropout,
    layout::{LayerRanges, Layout},
    matrix::{Threads, matmul, view},
};
use crate::qwen3::Config;

/// Samples laid end to end. Attention never crosses from one to the next, and positions restart at each.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Batch {
    pub tokens: Vec<u32>,
    pub positions: Vec<u32>,
    /// Lengths of the samples.
    pub segments: Vec<usize>,
    /// Places whose next token is learned, and that token.
    pub targets: Vec<(usize, u32)>,
}

impl Batch {
    /// Adds a sample; the tokens from `learned_from` on are what the model learns to write.
    pub fn push(&mut self, tokens: &[u32], learned_from: usize) {
        let base = self.tokens.len();
        self.tokens.extend_from_slice(tokens);
        self.positions.extend(0..tokens.len() as u32);
        self.segments.push(tokens.len());
        self.targets.extend((learned_from.max(1)..tokens.len()).map(|i| (base + i - 1, tokens[i])));
    }

    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }
}

/// How much to drop while training, and the seed of which.
#[derive(Debug, Clone, Copy, Default)]
pub struct DropoutRates {
    /// Of embeddings and of every residual branch.
    pub residual: f32,
    pub seed: u64,
}

/// What one layer keeps for its backward pass.
#[derive(Default)]
struct Tape {
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

/// Memory for one batch, reused from batch to batch.
#[derive(Default)]
struct Workspace {
    tapes: Vec<Tape>,
    x: Vec<f32>,
    normed: Vec<f32>,
    inverse: Vec<f32>,
    branch: Vec<f32>,
    selected: Vec<f32>,
    d_selected: Vec<f32>,
    logits: Vec<f32>,
    dx: Vec<f32>,
    d_normed: Vec<f32>,
    d_wide: Vec<f32>,
    d_heads: Vec<f32>,
    d_attended: Vec<f32>,
}

/// A Qwen3's weights, and the memory to train them.
pub struct Model {
    config: Config,
    layout: Layout,
    heads: Heads,
    rotary: Rotary,
    pub weights: Vec<f32>,
    work: Workspace,
}

fn size(buffer: &mut Vec<f32>, len: usize) {
    buffer.resize(len, 0.0);
}

impl Model {
    /// A model with the given weights, laid out as [`Layout`] says; `context` is the longest segment.
    ///
    /// # Panics
    /// If `weights` has another length than the layout.
    pub fn new(config: Config, weights: Vec<f32>, context: usize) -> Self {
        let layout = Layout::new(&config);
        assert_eq!(weights.len(), layout.len, "weights must have the layout's length");
        let heads = Heads { kv: config.kv_heads, group: config.group(), dim: config.head_dim };
        let rotary = Rotary::new(context, config.head_dim, config.rope_theta);
        let mut work = Workspace::default();
        work.tapes.resize_with(config.layers, Tape::default);
        Self { config, layout, heads, rotary, weights, work }
    }

    pub fn config(&self) -> &Config {
        &self.config
    }

    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The longest segment.
    pub fn context(&self) -> usize {
        self.rotary.positions()
    }

    /// The sum of the losses of all targets, without gradients or dropout.
    pub fn loss(&mut self, batch: &Batch) -> f64 {
        self.forward(batch, DropoutRates::default());
        self.select(batch);
        let targets: Vec<u32> = batch.targets.iter().map(|t| t.1).collect();
        let head = &self.weights[self.layout.head.clone()];
        cross_entropy(&self.work.selected, head, self.config.hidden_size, &targets, &mut self.work.logits, None)
    }

    /// The sum of the losses of all targets; adds `scale` times its gradient to `gradients`.
    pub fn loss_and_gradients(
        &mut self,
        batch: &Batch,
        scale: f32,
        dropout: DropoutRates,
        gradients: &mut [f32],
    ) -> f64 {
        self.forward(batch, dropout);
        self.select(batch);
        let h = self.config.hidden_size;
        let targets: Vec<u32> = batch.targets.iter().map(|t| t.1).collect();
        let work = &mut self.work;
        size(&mut work.d_selected, targets.len() * h);
        let loss = cross_entropy(
            &work.selected,
            &self.weights[self.layout.head.clone()],
            h,
            &targets,
            &mut work.logits,
            Some(cross_entropy::Gradients {
                d_hidden: &mut work.d_selected,
                d_head: &mut gradients[self.layout.head.clone()],
                scale,
            }),
        );
        self.backward(batch, dropout, gradients);
        loss
    }

    /// The logits at every place, `[tokens, vocabulary]`: for tests.
    pub fn logits(&mut self, batch: &Batch) -> Vec<f32> {
        self.forward(batch, DropoutRates::default());
        let (h, v) = (self.config.hidden_size, self.config.vocab_size);
        let mut logits = vec![0.0; batch.len() * v];
        let head = view(&self.weights[self.layout.head.clone()], v, h);
        matmul(&mut logits, view(&self.work.normed, batch.len(), h), head.t(), 1.0, false, Threads::Pool);
        logits
    }

    /// Where dropout is applied: 0 is the embedding, then two branches a layer.
    fn site(&self, rates: DropoutRates, site: usize) -> Option<Dropout> {
        Dropout::new(rates.residual, rates.seed, site as u64)
    }

    /// Leaves the final norm of every place in `work.normed`.
    fn forward(&mut self, batch: &Batch, rates: DropoutRates) {
        let (tokens, h) = (batch.len(), self.config.hidden_size);
        let sites: Vec<_> = (0..=2 * self.config.layers).map(|s| self.site(rates, s)).collect();
        let work = &mut self.work;
        size(&mut work.x, tokens * h);
        size(&mut work.branch, tokens * h);
        size(&mut work.normed, tokens * h);
        size(&mut work.inverse, tokens);

        let embedding = &self.weights[self.layout.embedding.clone()];
        for (row, &token) in work.branch.chunks_exact_mut(h).zip(&batch.tokens) {
            row.copy_from_slice(&embedding[token as usize * h..(token as usize + 1) * h]);
        }
        apply_dropout(&mut work.x, &work.branch, sites[0]);

        for (index, ranges) in self.layout.layers.iter().enumerate() {
            let layer = Layer {
                config: &self.config,
                heads: self.heads,
                rotary: &self.rotary,
                weights: &self.weights,
                ranges,
                dropout: [sites[2 * index + 1], sites[2 * index + 2]],
            };
            layer.forward(batch, &mut work.tapes[index], &mut work.x, &mut work.branch);
        }
        let w = &self.weights[self.layout.final_norm.clone()];
        rms_norm(&mut work.normed, &mut work.inverse, &work.x, w, self.config.rms_norm_eps as f32);
    }

    /// Gathers the rows that have a target.
    fn select(&mut self, batch: &Batch) {
        let h = self.config.hidden_size;
        let work = &mut self.work;
        size(&mut work.selected, batch.targets.len() * h);
        for (row, &(place, _)) in work.selected.chunks_exact_mut(h).zip(&batch.targets) {
            row.copy_from_slice(&work.normed[place * h..(place + 1) * h]);
        }
    }

    /// From `work.d_selected` to `gradients`.
    fn backward(&mut self, batch: &Batch, rates: DropoutRates, gradients: &mut [f32]) {
        let (tokens, h) = (batch.len(), self.config.hidden_size);
        let sites: Vec<_> = (0..=2 * self.config.layers).map(|s| self.site(rates, s)).collect();
        let work = &mut self.work;
        size(&mut work.d_normed, tokens * h);
        work.d_normed.fill(0.0);
        for (row, &(place, _)) in work.d_selected.chunks_exact(h).zip(&batch.targets) {
            work.d_normed[place * h..(place + 1) * h].copy_from_slice(row);
        }
        size(&mut work.dx, tokens * h);
        work.dx.fill(0.0);
        let range = self.layout.final_norm.clone();
        let w = &self.weights[range.clone()];
        rms_norm_grad(&mut work.dx, &mut gradients[range], &work.d_normed, &work.x, w, &work.inverse);

        for (index, ranges) in self.layout.layers.iter().enumerate().rev() {
            let layer = Layer {
                config: &self.config,
                heads: self.heads,
                rotary: &self.rotary,
                weights: &self.weights,
                ranges,
                dropout: [sites[2 * index + 1], sites[2 * index + 2]],
            };
            let scratch = Scratch {
                branch: &mut work.branch,
                normed: &mut work.d_normed,
                wide: &mut work.d_wide,
                heads: &mut work.d_heads,
                attended: &mut work.d_attended,
            };
            layer.backward(batch, &mut work.tapes[index], &mut work.dx, scratch, gradients);
        }

        apply_dropout(&mut work.branch, &work.dx, sites[0]);
        let embedding = &mut gradients[self.layout.embedding.clone()];
        for (row, &token) in work.branch.chunks_exact(h).zip(&batch.tokens) {
            let into = &mut embedding[token as usize * h..(token as usize + 1) * h];
            into.iter_mut().zip(row).for_each(|(e, d)| *e += d);
        }
    }
}

/// Memory that all layers share in the backward pass.
struct Scratch<'a> {
    branch: &'a mut Vec<f32>,
    normed: &'a mut Vec<f32>,
    wide: &'a mut Vec<f32>,
    heads: &'a mut Vec<f32>,
    attended: &'a mut Vec<f32>,
}

/// One transformer layer at work.
struct Layer<'a> {
    config: &'a Config,
    heads: Heads,
    rotary: &'a Rotary,
    weights: &'a [f32],
    ranges: &'a LayerRanges,
    dropout: [Option<Dropout>; 2],
}

impl Layer<'_> {
    fn norms(&self) -> HeadNorms<'_> {
        HeadNorms {
            q: &self.weights[self.ranges.q_norm.clone()],
            k: &self.weights[self.ranges.k_norm.clone()],
            eps: self.config.rms_norm_eps as f32,
        }
    }

    /// `x` becomes the layer's result; `branch` is scratch.
    fn forward(&self, batch: &Batch, tape: &mut Tape, x: &mut [f32], branch: &mut [f32]) {
        let c = self.config;
        let (tokens, h, f, d) = (batch.len(), c.hidden_size, c.intermediate_size, c.head_dim);
        let (queries, all) = (c.heads, c.heads + 2 * c.kv_heads);
        let eps = c.rms_norm_eps as f32;
        let weight = |range: &std::ops::Range<usize>| &self.weights[range.clone()];
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

        tape.x.copy_from_slice(x);
        rms_norm(&mut tape.norm1, &mut tape.inverse1, &tape.x, weight(&self.ranges.input_norm), eps);
        let w = view(weight(&self.ranges.qkv), all * d, h);
        matmul(&mut tape.qkv, view(&tape.norm1, tokens, h), w.t(), 1.0, false, Threads::Pool);
        split_heads(&mut tape.heads, &tape.qkv, self.heads, &batch.positions, self.rotary, self.norms());
        let qkv = split_qkv(&tape.heads, tokens, self.heads);
        attention::forward(self.heads, &batch.segments, qkv, &mut tape.attended, &mut tape.log_sums);
        merge_heads(&mut tape.merged, &tape.attended, queries, d);
        let w = view(weight(&self.ranges.output), h, queries * d);
        matmul(branch, view(&tape.merged, tokens, queries * d), w.t(), 1.0, false, Threads::Pool);
        add_branch(&mut tape.x2, &tape.x, branch, self.dropout[0]);

        rms_norm(&mut tape.norm2, &mut tape.inverse2, &tape.x2, weight(&self.ranges.post_norm), eps);
        let w = view(weight(&self.ranges.gate_up), 2 * f, h);
        matmul(&mut tape.gate_up, view(&tape.norm2, tokens, h), w.t(), 1.0, false, Threads::Pool);
        activation(&mut tape.active, &tape.gate_up, f);
        let w = view(weight(&self.ranges.down), h, f);
        matmul(branch, view(&tape.active, tokens, f), w.t(), 1.0, false, Threads::Pool);
        add_branch(x, &tape.x2, branch, self.dropout[1]);
    }

    /// `dx`, the gradient of the layer's result, becomes that of its input. Uses up the tape.
    fn backward(&self, batch: &Batch, tape: &mut Tape, dx: &mut [f32], s: Scratch<'_>, gradients: &mut [f32]) {
        let c = self.config;
        let (tokens, h, f, d) = (batch.len(), c.hidden_size, c.intermediate_size, c.head_dim);
        let (queries, all) = (c.heads, c.heads + 2 * c.kv_heads);
        let weight = |range: &std::ops::Range<usize>| &self.weights[range.clone()];

        // The gated branch.
        apply_dropout(s.branch, dx, self.dropout[1]);
        let d_branch = view(s.branch, tokens, h);
        let w = view(weight(&self.ranges.down), h, f);
        size(s.wide, tokens * f);
        matmul(s.wide, d_branch, w, 1.0, false, Threads::Pool);
        let d_down = &mut gradients[self.ranges.down.clone()];
        matmul(d_down, d_branch.t(), view(&tape.active, tokens, f), 1.0, true, Threads::Pool);
        activation_grad(&mut tape.gate_up, s.wide, f);
        let d_gate_up = view(&tape.gate_up, tokens, 2 * f);
        let w = view(weight(&self.ranges.gate_up), 2 * f, h);
        matmul(s.normed, d_gate_up, w, 1.0, false, Threads::Pool);
        let into = &mut gradients[self.ranges.gate_up.clone()];
        matmul(into, d_gate_up.t(), view(&tape.norm2, tokens, h), 1.0, true, Threads::Pool);
        let into = &mut gradients[self.ranges.post_norm.clone()];
        rms_norm_grad(dx, into, s.normed, &tape.x2, weight(&self.ranges.post_norm), &tape.inverse2);

        // Attention.
        apply_dropout(s.branch, dx, self.dropout[0]);
        let d_branch = view(s.branch, tokens, h);
        let w = view(weight(&self.ranges.output), h, queries * d);
        size(s.wide, tokens * all.max(queries) * d);
        matmul(s.wide, d_branch, w, 1.0, false, Threads::Pool);
        let into = &mut gradients[self.ranges.output.clone()];
        matmul(into, d_branch.t(), view(&tape.merged, tokens, queries * d), 1.0, true, Threads::Pool);
        size(s.attended, tokens * queries * d);
        unmerge_heads(s.attended, &s.wide[..tokens * queries * d], queries, d);
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
            gradients[range.clone()].iter_mut().zip(d).for_each(|(g, d)| *g += d);
        }
        let d_qkv = view(s.wide, tokens, all * d);
        let w = view(weight(&self.ranges.qkv), all * d, h);
        matmul(s.normed, d_qkv, w, 1.0, false, Threads::Pool);
        let into = &mut gradients[self.ranges.qkv.clone()];
        matmul(into, d_qkv.t(), view(&tape.norm1, tokens, h), 1.0, true, Threads::Pool);
        let into = &mut gradients[self.ranges.input_norm.clone()];
        rms_norm_grad(dx, into, s.normed, &tape.x, weight(&self.ranges.input_norm), &tape.inverse1);
    }
}

/// Queries, keys and values in `[heads + 2 · kv, tokens, dim]`.
fn split_qkv(heads_major: &[f32], tokens: usize, heads: Heads) -> attention::Qkv<'_> {
    let (q, rest) = heads_major.split_at(heads.kv * heads.group * tokens * heads.dim);
    let (k, v) = rest.split_at(heads.kv * tokens * heads.dim);
    attention::Qkv { q, k, v }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(tied: bool) -> Config {
        Config {
            vocab_size: 23,
            hidden_size: 20,
            intermediate_size: 36,
            layers: 2,
            heads: 4,
            kv_heads: 2,
            head_dim: 6,
            max_positions: 128,
            rope_theta: 1e4,
            rms_norm_eps: 1e-6,
            tied,
            bos_token: None,
            eos_tokens: Vec::new(),
            pad_token: None,
            initializer_range: 0.02,
        }
    }

    /// Numbers between −1 and 1 from a fixed sequence.
    fn noise(len: usize, seed: u32) -> Vec<f32> {
        let dropout = Dropout::new(0.5, u64::from(seed), 1).unwrap();
        (0..len as u32).map(|i| (0..12).map(|j| dropout.factor(i * 12 + j) - 1.0).sum::<f32>() / 6.0).collect()
    }

    fn model(tied: bool) -> Model {
        let config = config(tied);
        let layout = Layout::new(&config);
        let mut weights = noise(layout.len, 1);
        for tensor in &layout.tensors {
            let scale = if tensor.is_matrix() { 0.6 } else { 0.3 };
            let shift = if tensor.is_matrix() { 0.0 } else { 1.0 };
            weights[tensor.range.clone()].iter_mut().for_each(|w| *w = *w * scale + shift);
        }
        Model::new(config, weights, 128)
    }

    /// Segments of one token, of a few, and of more than one attention block.
    fn batch() -> Batch {
        let mut batch = Batch::default();
        for (len, learned_from) in [(5, 0), (1, 0), (90, 3), (17, 9)] {
            let tokens: Vec<u32> = (0..len).map(|i| (i * i * 7 + len) % 23).collect();
            batch.push(&tokens, learned_from);
        }
        batch
    }

    fn check_gradients(tied: bool, rates: DropoutRates) {
        let (mut model, batch) = (model(tied), batch());
        let mut gradients = vec![0.0; model.weights.len()];
        model.loss_and_gradients(&batch, 1.0, rates, &mut gradients);
        let mut ignored = vec![0.0; gradients.len()];
        let weights = model.weights.clone();
        for tensor in model.layout.tensors.clone() {
            let own = &gradients[tensor.range.clone()];
            let length = own.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
            assert!(length > 1e-3, "{} has no gradient", tensor.name);
            // Along the gradient, and in some other direction.
            let along: Vec<f32> = own.iter().map(|g| (f64::from(*g) / length) as f32).collect();
            let other = noise(own.len(), 5);
            for direction in [along, other] {
                let norm = direction.iter().map(|d| f64::from(*d).powi(2)).sum::<f64>().sqrt();
                let step = 4e-3 / norm;
                let mut at = |sign: f64| {
                    for (i, d) in tensor.range.clone().zip(&direction) {
                        model.weights[i] = (f64::from(weights[i]) + sign * step * f64::from(*d)) as f32;
                    }
                    let loss = model.loss_and_gradients(&batch, 1.0, rates, &mut ignored);
                    model.weights.copy_from_slice(&weights);
                    loss
                };
                let numeric = (at(1.0) - at(-1.0)) / (2.0 * step);
                let exact: f64 = own.iter().zip(&direction).map(|(g, d)| f64::from(*g) * f64::from(*d)).sum();
                let error = (numeric - exact).abs() / (length * norm);
                assert!(error < 3e-3, "{}: {numeric} by differences, {exact} computed", tensor.name);
            }
        }
    }

    #[test]
    fn gradients_agree_with_finite_differences() {
        check_gradients(true, DropoutRates::default());
    }

    #[test]
    fn gradients_agree_with_an_untied_head_and_dropout() {
        check_gradients(false, DropoutRates { residual: 0.25, seed: 3 });
    }

    #[test]
    fn packing_changes_nothing() {
        let mut model = model(true);
        let all = batch();
        let mut one_by_one = 0.0;
        let mut places = 0;
        for (start, len) in all.segments.iter().scan(0, |at, len| {
            *at += len;
            Some((*at - len, *len))
        }) {
            let mut single = Batch::default();
            single.push(&all.tokens[start..start + len], 0);
            single.targets = all.targets.iter().filter(|t| (start..start + len).contains(&t.0)).copied().collect();
            single.targets.iter_mut().for_each(|t| t.0 -= start);
            places += single.targets.len();
            one_by_one += model.loss(&single);
        }
        assert_eq!(places, all.targets.len());
        let packed = model.loss(&all);
        assert!((packed - one_by_one).abs() < 1e-3 * packed, "{packed} {one_by_one}");
    }

    #[test]
    fn the_number_of_threads_changes_no_bit() {
        let run = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let mut model = model(true);
            let mut gradients = vec![0.0; model.weights.len()];
            let rates = DropoutRates { residual: 0.1, seed: 1 };
            let loss = pool.install(|| model.loss_and_gradients(&batch(), 0.5, rates, &mut gradients));
            (loss.to_bits(), gradients.iter().map(|g| g.to_bits()).collect::<Vec<_>>())
        };
        assert_eq!(run(1), run(3));
    }
}
