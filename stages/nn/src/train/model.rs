//! The differentiable Qwen3: one forward and one backward pass over packed segments, on the CPU.
//!
//! Formulas are those of Qwen3 as Hugging Face computes it: pre-norm layers, RMS norms over each head of queries
//! and keys, rotary positions, grouped-query attention, SwiGLU, tied or separate head. The backward pass is written
//! by hand, block by block; every block is checked against finite differences. What a layer needs for
//! it is kept on a tape whose memory is reused from batch to batch.

use std::borrow::Cow;

use super::{
    allowed::cross_entropy_allowed,
    attention::Heads,
    batch::{Batch, DropoutRates, Mode},
    blocks::{Rotary, apply_dropout, rms_norm, rms_norm_grad, unit_rows},
    cross_entropy::{self, cross_entropy},
    layer::{Adapted, Layer, Scratch, Sink, Tape, size},
    layout::{LayerRanges, Layout, Tensor},
    lora::{Adapters, LoraOptions},
    matrix::{Threads, matmul, view},
    workspace::Workspace,
};
use crate::{generate::Trie, qwen3::Config};

/// A Qwen3's weights, adapters beside them if there are any, and the memory to train them.
pub struct Model {
    config: Config,
    layout: Layout,
    heads: Heads,
    rotary: Rotary,
    pub weights: Vec<f32>,
    adapters: Option<Adapters>,
    recompute: bool,
    allowed: Option<Trie>,
    work: Workspace,
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
        let work = Workspace::default();
        Self { config, layout, heads, rotary, weights, adapters: None, recompute: false, allowed: None, work }
    }

    /// Keeps only each layer's input for the backward pass, and computes the rest again there: about a third more
    /// work, and the same gradients to the bit.
    pub fn recompute(&mut self, recompute: bool) {
        self.recompute = recompute;
    }

    /// Takes losses among what this catalogue allows: learned tokens are its entries, one after another.
    pub fn choose_among(&mut self, trie: Trie) {
        self.allowed = Some(trie);
    }

    /// The catalogue that losses are taken among.
    pub fn allowed(&self) -> Option<&Trie> {
        self.allowed.as_ref()
    }

    /// Brings every embedding to length 1. Those of length 0 stay.
    pub fn normalize_embeddings(&mut self) {
        unit_rows(&mut self.weights[self.layout.embedding.clone()], self.config.hidden_size);
    }

    /// Freezes the weights and puts adapters beside them.
    pub fn adapt(&mut self, options: &LoraOptions) {
        self.adapters = Some(Adapters::new(&self.config, &self.layout, options));
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

    /// What is trained: the adapters where there are any, else all weights.
    pub fn trainable(&self) -> &[f32] {
        self.adapters.as_ref().map_or(&self.weights, |a| &a.values)
    }

    pub fn trainable_mut(&mut self) -> &mut [f32] {
        self.adapters.as_mut().map_or(&mut self.weights, |a| &mut a.values)
    }

    /// Names, shapes and places of what is trained.
    pub fn trainable_tensors(&self) -> &[Tensor] {
        self.adapters.as_ref().map_or(&self.layout.tensors, |a| &a.tensors)
    }

    /// The weights of a plain model that computes the same: adapters merged into their matrices.
    pub fn merged(&self) -> Cow<'_, [f32]> {
        match &self.adapters {
            None => Cow::Borrowed(&self.weights),
            Some(adapters) => {
                let mut weights = self.weights.clone();
                adapters.merge_into(&mut weights);
                Cow::Owned(weights)
            }
        }
    }

    /// The sum of the losses of all targets, without gradients or dropout.
    pub fn loss(&mut self, batch: &Batch) -> f64 {
        self.forward(batch, Mode { rates: None });
        self.select(batch);
        self.head_loss(batch, None)
    }

    /// The sum of the losses of all targets; adds `scale` times its gradient with respect to what is trained to
    /// `gradients`.
    pub fn loss_and_gradients(
        &mut self,
        batch: &Batch,
        scale: f32,
        dropout: DropoutRates,
        gradients: &mut [f32],
    ) -> f64 {
        let mode = Mode { rates: Some(dropout) };
        let mut sink = match self.adapters {
            None => Sink::Weights(gradients),
            Some(_) => Sink::Adapters(gradients),
        };
        self.forward(batch, mode);
        self.select(batch);
        let mut d_selected = std::mem::take(&mut self.work.d_selected);
        size(&mut d_selected, batch.targets.len() * self.config.hidden_size);
        let head = sink.weights(self.layout.head.clone());
        let wanted = cross_entropy::Gradients { d_hidden: &mut d_selected, d_head: head, scale };
        let loss = self.head_loss(batch, Some(wanted));
        self.work.d_selected = d_selected;
        self.backward(batch, mode, &mut sink);
        loss
    }

    /// The head and its loss, from `work.selected`.
    fn head_loss(&mut self, batch: &Batch, gradients: Option<cross_entropy::Gradients<'_>>) -> f64 {
        let (h, head) = (self.config.hidden_size, &self.weights[self.layout.head.clone()]);
        let work = &mut self.work;
        match &self.allowed {
            Some(trie) => cross_entropy_allowed(trie, batch, &work.selected, head, h, &mut work.logits, gradients),
            None => {
                let targets: Vec<u32> = batch.targets.iter().map(|t| t.1).collect();
                cross_entropy(&work.selected, head, h, &targets, &mut work.logits, gradients)
            }
        }
    }

    /// The logits at every place, `[tokens, vocabulary]`.
    pub fn logits(&mut self, batch: &Batch) -> Vec<f32> {
        self.forward(batch, Mode { rates: None });
        let (h, v) = (self.config.hidden_size, self.config.vocab_size);
        let mut logits = vec![0.0; batch.len() * v];
        let head = view(&self.weights[self.layout.head.clone()], v, h);
        matmul(&mut logits, view(&self.work.normed, batch.len(), h), head.t(), 1.0, false, Threads::Pool);
        logits
    }

    /// Leaves the final norm of every place in `work.normed`.
    fn forward(&mut self, batch: &Batch, mode: Mode) {
        let (tokens, h) = (batch.len(), self.config.hidden_size);
        let work = &mut self.work;
        size(&mut work.x, tokens * h);
        size(&mut work.branch, tokens * h);
        size(&mut work.normed, tokens * h);
        size(&mut work.inverse, tokens);
        let layers = self.config.layers;
        work.tapes.resize_with(if self.recompute { 1 } else { layers }, Tape::default);
        work.inputs.resize_with(if self.recompute { layers } else { 0 }, Vec::new);

        let embedding = &self.weights[self.layout.embedding.clone()];
        for (row, &token) in work.branch.chunks_exact_mut(h).zip(&batch.tokens) {
            row.copy_from_slice(&embedding[token as usize * h..(token as usize + 1) * h]);
        }
        apply_dropout(&mut work.x, &work.branch, mode.site(0));

        for (index, ranges) in self.layout.layers.iter().enumerate() {
            let layer = layer(
                &self.config,
                self.heads,
                &self.rotary,
                &self.weights,
                ranges,
                self.adapters.as_ref(),
                index,
                mode,
            );
            let tape = match work.inputs.get_mut(index) {
                Some(input) => {
                    input.clear();
                    input.extend_from_slice(&work.x);
                    &mut work.tapes[0]
                }
                None => &mut work.tapes[index],
            };
            layer.forward(batch, tape, &mut work.x, &mut work.branch, &mut work.lora);
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

    /// From `work.d_selected` to the gradients.
    fn backward(&mut self, batch: &Batch, mode: Mode, sink: &mut Sink) {
        let (tokens, h) = (batch.len(), self.config.hidden_size);
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
        rms_norm_grad(&mut work.dx, sink.weights(range), &work.d_normed, &work.x, w, &work.inverse);

        for (index, ranges) in self.layout.layers.iter().enumerate().rev() {
            let layer = layer(
                &self.config,
                self.heads,
                &self.rotary,
                &self.weights,
                ranges,
                self.adapters.as_ref(),
                index,
                mode,
            );
            let tape = match work.inputs.get(index) {
                Some(input) => {
                    work.again.clear();
                    work.again.extend_from_slice(input);
                    let tape = &mut work.tapes[0];
                    layer.forward(batch, tape, &mut work.again, &mut work.branch, &mut work.lora);
                    tape
                }
                None => &mut work.tapes[index],
            };
            let scratch = Scratch {
                branch: &mut work.branch,
                normed: &mut work.d_normed,
                wide: &mut work.d_wide,
                heads: &mut work.d_heads,
                attended: &mut work.d_attended,
                lora: &mut work.lora,
            };
            layer.backward(batch, tape, &mut work.dx, scratch, sink);
        }

        if let Some(embedding) = sink.weights(self.layout.embedding.clone()) {
            apply_dropout(&mut work.branch, &work.dx, mode.site(0));
            for (row, &token) in work.branch.chunks_exact(h).zip(&batch.tokens) {
                let into = &mut embedding[token as usize * h..(token as usize + 1) * h];
                into.iter_mut().zip(row).for_each(|(e, d)| *e += d);
            }
        }
    }

    /// Numbers held for the batches so far.
    #[cfg(test)]
    pub fn workspace_len(&self) -> usize {
        self.work.len()
    }
}

/// The layer of this number, ready to work. Apart from [`Model`], whose workspace is borrowed meanwhile.
#[expect(clippy::too_many_arguments, reason = "the parts of a model that a layer reads, and nothing else")]
fn layer<'a>(
    config: &'a Config,
    heads: Heads,
    rotary: &'a Rotary,
    weights: &'a [f32],
    ranges: &'a LayerRanges,
    adapters: Option<&'a Adapters>,
    index: usize,
    mode: Mode,
) -> Layer<'a> {
    Layer {
        config,
        heads,
        rotary,
        weights,
        ranges,
        dropout: [mode.site(2 * index + 1), mode.site(2 * index + 2)],
        adapted: adapters.map(|all| Adapted { all, layer: &all.layers[index], seed: mode.seed() }),
    }
}

#[cfg(test)]
mod tests;
