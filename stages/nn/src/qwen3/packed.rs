//! The network on the CPU, by this crate's own kernels, in f32.
//!
//! Rows of all prompts (or beams) of a batch go through every product together; only attention knows which row
//! belongs to whom. Nothing is padded.

use std::ops::Range;

use rayon::prelude::*;

use super::{
    Config,
    attention::{self, Beams, Out, Queries, Shape},
    kv::{HeadKv, PackedPrompt, PackedPrompts, Segment},
    model::{Batch, Step},
    rotary::Rotary,
    weights::{self, Tensor, Weights},
    work::{SCORES, WORK, room},
};
use crate::{
    Error,
    cpu::{Accumulate, Panels, Rows, RowsMut, WIDTH, matmul, ops},
};

/// Columns of the head that are looked at together.
pub const HEAD_CHUNK: usize = 256;
/// Logits that a thread computes before they are looked at, or a chunk of every row: they stay in the cache.
pub const LOGITS_AT_ONCE: usize = 1 << 16;
/// Gates (and as many values beside them) that a thread computes before they are applied.
pub const GATES_AT_ONCE: usize = 1 << 15;

/// Weights packed for the kernels.
pub struct Packed {
    config: Config,
    /// Rows are read from the mapped file.
    embeddings: Tensor,
    layers: Vec<Layer>,
    norm: Vec<f32>,
    head: Option<Head>,
    rotary: Rotary,
}

/// The output head, packed for all tokens at once and as rows for a few.
struct Head {
    packed: Panels,
    rows: Tensor,
}

struct Layer {
    input_norm: Vec<f32>,
    /// Queries, keys and values side by side.
    qkv: Panels,
    query_norm: Vec<f32>,
    key_norm: Vec<f32>,
    output: Panels,
    post_norm: Vec<f32>,
    gate: Panels,
    up: Panels,
    down: Panels,
}

/// Queries, keys and values of a batch in one layer, side by side in each row: queries normed, turned and scaled, keys
/// normed and turned.
#[derive(Clone, Copy)]
struct Projected<'a> {
    rows: &'a [f32],
    query_width: usize,
    kv_width: usize,
}

impl<'a> Projected<'a> {
    fn width(&self) -> usize {
        self.query_width + 2 * self.kv_width
    }

    /// The rows from `row` on, which begin with their queries.
    fn queries(&self, row: usize) -> Queries<'a> {
        Queries { data: &self.rows[row * self.width()..], stride: self.width() }
    }

    fn key(&self, row: usize) -> &'a [f32] {
        &self.rows[row * self.width() + self.query_width..][..self.kv_width]
    }

    fn value(&self, row: usize) -> &'a [f32] {
        &self.rows[row * self.width() + self.query_width + self.kv_width..][..self.kv_width]
    }
}

impl Packed {
    /// Packs weights. Runs on the current rayon pool.
    ///
    /// # Errors
    /// As [`Weights::get`].
    pub fn load(config: Config, weights: &Weights, with_head: bool) -> Result<Self, Error> {
        let embeddings = weights.get("model.embed_tokens.weight")?.clone();
        let head = if with_head && weights.has_head(&config) {
            let rows = if config.tied { embeddings.clone() } else { weights.get("lm_head.weight")?.clone() };
            Some(Head { packed: weights::pack(&[&rows]), rows })
        } else {
            None
        };
        let layers = (0..config.layers).map(|l| Layer::load(weights, l)).collect::<Result<_, _>>()?;
        let norm = weights.get("model.norm.weight")?.vector();
        let rotary = Rotary::new(&config);
        Ok(Self { config, embeddings, layers, norm, head, rotary })
    }

    pub fn has_head(&self) -> bool {
        self.head.is_some()
    }

    /// [`super::Qwen3::read`]; `kept` are the only rows whose hidden states are wanted.
    pub fn read(
        &self,
        prefix: Option<&Segment>,
        kv: &mut PackedPrompts,
        batch: &Batch,
        kept: Option<&[usize]>,
        threads: usize,
    ) -> Vec<f32> {
        let rows = &batch.rows;
        let first = kv.prompts.len();
        kv.prompts.extend(rows.iter().map(|rows| PackedPrompt::with_room(&self.config, rows.len(), kv.slots)));
        let prompts = &mut kv.prompts[first..];
        self.forward(batch, kept, threads, |layer, projected, out| {
            for (prompt, rows) in prompts.iter_mut().zip(rows) {
                let heads = prompt.own.layer_mut(layer);
                for (index, row) in rows.clone().enumerate() {
                    HeadKv::store(heads, index, projected.key(row), projected.value(row));
                }
            }
            let prompts = &*prompts;
            // Of the last layer only what is kept is looked at.
            let last_only = kept.is_some() && layer + 1 == self.layers.len();
            self.attend(rows, out, threads, |which, shape, out, scores| {
                let before = prefix.map(|s| s.head(layer, shape.head));
                let own = prompts[which].own.head(layer, shape.head);
                let first = if last_only { rows[which].len() - 1 } else { 0 };
                let queries = projected.queries(rows[which].start);
                attention::over_prompt(shape, queries, before, own, first, out, scores);
            });
        })
    }

    /// [`super::Qwen3::step`].
    pub fn step(
        &self,
        prefix: Option<&Segment>,
        kv: &mut PackedPrompts,
        steps: &[Step],
        batch: &Batch,
        threads: usize,
    ) -> Vec<f32> {
        let rows = &batch.rows;
        let prompts = &mut kv.prompts;
        let hidden = self.forward(batch, None, threads, |layer, projected, out| {
            for (step, rows) in steps.iter().zip(rows) {
                let slots = &mut prompts[step.prompt].layers[layer];
                for row in rows.clone() {
                    slots.keys.extend_from_slice(projected.key(row));
                    slots.values.extend_from_slice(projected.value(row));
                }
            }
            let prompts = &*prompts;
            self.attend(rows, out, threads, |which, shape, out, scores| {
                let step = &steps[which];
                let PackedPrompt { extent, own, layers } = &prompts[step.prompt];
                let prefix = prefix.map(|s| s.head(layer, shape.head));
                let prompt: Vec<_> = prefix.into_iter().chain([own.head(layer, shape.head)]).collect();
                let beams = Beams { slots: &layers[layer], paths: step.paths, next: extent.slots };
                attention::over_branches(shape, projected.queries(rows[which].start), &prompt, beams, out, scores);
            });
        });
        for step in steps {
            kv.prompts[step.prompt].extent.slots += step.tokens.len();
        }
        hidden
    }

    /// [`super::Qwen3::visit_logits`]; nothing without a head.
    pub fn visit_logits(&self, hidden: &[f32], threads: usize, mut visit: impl FnMut(usize, usize, &[f32])) {
        let Some(Head { packed, .. }) = &self.head else { return };
        let rows = Rows::dense(hidden, self.config.hidden_size);
        let chunks = (threads * LOGITS_AT_ONCE / rows.rows.max(1) / HEAD_CHUNK).max(1);
        let mut work = WORK.take();
        for start in (0..packed.cols()).step_by(chunks * HEAD_CHUNK) {
            let end = (start + chunks * HEAD_CHUNK).min(packed.cols());
            let stride = end - start;
            let block = room(&mut work.logits, rows.rows * stride);
            let target = RowsMut { data: &mut *block, stride };
            matmul(rows, packed.view().columns(start, end), target, Accumulate::No, threads);
            for chunk in (0..stride).step_by(HEAD_CHUNK) {
                let columns = chunk..(chunk + HEAD_CHUNK).min(stride);
                for (row, logits) in block.chunks_exact(stride).enumerate() {
                    visit(row, start + chunk, &logits[columns.clone()]);
                }
            }
        }
        WORK.set(work);
    }

    /// The logits of a few tokens for one row; summed in another order than [`Packed::visit_logits`]. Nothing without
    /// a head.
    pub fn logits_of(&self, hidden: &[f32], tokens: &[u32]) -> Vec<f32> {
        let Some(Head { rows, .. }) = &self.head else { return Vec::new() };
        let width = self.config.hidden_size;
        let mut row = vec![0.0; width];
        let mut logit = |token: &u32| {
            rows.read(*token as usize * width, &mut row);
            ops::dot(hidden, &row)
        };
        tokens.iter().map(&mut logit).collect()
    }

    /// Calls `one` for every owner of rows and every head of keys and values, each with its place in `out` (`[rows,
    /// query_width]`) and a buffer.
    fn attend(
        &self,
        rows: &[Range<usize>],
        out: &mut [f32],
        threads: usize,
        one: impl Fn(usize, Shape, Out, &mut Vec<f32>) + Sync,
    ) {
        let config = &self.config;
        let stride = config.query_width();
        let shape =
            |head| Shape { group: config.group(), head_dim: config.head_dim, kv_width: config.kv_width(), head };
        if threads == 1 {
            SCORES.with_borrow_mut(|scores| {
                for (which, rows) in rows.iter().enumerate() {
                    for head in 0..config.kv_heads {
                        let data = &mut out[rows.start * stride + shape(head).first_query()..];
                        one(which, shape(head), Out { data, stride }, scores);
                    }
                }
            });
            return;
        }
        let tasks: Vec<(usize, usize)> =
            (0..rows.len()).flat_map(|which| (0..config.kv_heads).map(move |head| (which, head))).collect();
        let width = config.group() * config.head_dim;
        let apart = |&(which, head): &(usize, usize)| {
            let mut data = vec![0.0; rows[which].len() * width];
            let place = Out { data: &mut data, stride: width };
            SCORES.with_borrow_mut(|scores| one(which, shape(head), place, scores));
            data
        };
        let results: Vec<Vec<f32>> = tasks.par_iter().map(apart).collect();
        for (&(which, head), result) in tasks.iter().zip(results) {
            for (row, values) in rows[which].clone().zip(result.chunks_exact(width)) {
                let start = row * stride + shape(head).first_query();
                out[start..start + width].copy_from_slice(values);
            }
        }
    }

    /// From tokens to hidden states after the last norm; `attend` stores keys and values, and fills in attention.
    /// With `kept` (ascending), only those rows leave the last layer.
    fn forward(
        &self,
        batch: &Batch,
        kept: Option<&[usize]>,
        threads: usize,
        mut attend: impl FnMut(usize, Projected, &mut [f32]),
    ) -> Vec<f32> {
        let c = &self.config;
        let (width, eps) = (c.hidden_size, c.rms_norm_eps as f32);
        let (query_width, kv_width) = (c.query_width(), c.kv_width());
        let mut work = WORK.take();
        let Batch { tokens, positions, .. } = batch;
        let mut count = tokens.len();
        let mut x = room(&mut work.x, count * width);
        for (row, token) in x.chunks_exact_mut(width).zip(tokens) {
            self.embeddings.read(*token as usize * width, row);
        }
        let mut normed = room(&mut work.normed, count * width);
        let qkv = room(&mut work.qkv, count * (query_width + 2 * kv_width));
        let mut attended = room(&mut work.attended, count * query_width);
        for (index, layer) in self.layers.iter().enumerate() {
            ops::rms_norm(x, &layer.input_norm, eps, normed);
            product(normed, &layer.qkv, qkv, Accumulate::No, threads);
            self.turn(layer, qkv, positions);
            attend(index, Projected { rows: qkv, query_width, kv_width }, attended);
            if let Some(kept) = kept.filter(|_| index + 1 == self.layers.len()) {
                count = kept.len();
                x = gather(x, width, kept);
                attended = gather(attended, query_width, kept);
                normed = &mut normed[..count * width];
            }
            product(attended, &layer.output, x, Accumulate::Yes, threads);
            ops::rms_norm(x, &layer.post_norm, eps, normed);
            let gated = room(&mut work.gated, count * c.intermediate_size);
            gate(layer, normed, count, &mut work.gate_up, gated, threads);
            product(gated, &layer.down, x, Accumulate::Yes, threads);
        }
        ops::rms_norm(x, &self.norm, eps, normed);
        let hidden = normed.to_vec();
        WORK.set(work);
        hidden
    }

    /// Norms and turns the heads of queries and keys, and scales the queries.
    fn turn(&self, layer: &Layer, qkv: &mut [f32], positions: &[usize]) {
        let c = &self.config;
        let (q, kv, eps) = (c.query_width(), c.kv_width(), c.rms_norm_eps as f32);
        let scale = 1.0 / (c.head_dim as f32).sqrt();
        let mut buffer = Vec::new();
        for (row, position) in qkv.chunks_exact_mut(q + 2 * kv).zip(positions) {
            let (cos, sin) = self.rotary.at(*position, &mut buffer);
            let (queries, keys) = row[..q + kv].split_at_mut(q);
            ops::norm_and_rotate(queries, &layer.query_norm, eps, cos, sin, scale);
            ops::norm_and_rotate(keys, &layer.key_norm, eps, cos, sin, 1.0);
        }
    }
}

/// `out = silu(x · gate) · (x · up)`, some columns at a time, so that what is between stays in the cache.
fn gate(layer: &Layer, x: &[f32], rows: usize, gate_up: &mut Vec<f32>, out: &mut [f32], threads: usize) {
    let width = layer.gate.cols();
    let columns = (threads * GATES_AT_ONCE / rows.max(1) / WIDTH).max(4) * WIDTH;
    let x = Rows::dense(x, layer.gate.inner());
    for start in (0..width).step_by(columns) {
        let end = (start + columns).min(width);
        let (count, stride) = (end - start, 2 * (end - start));
        let both = room(gate_up, rows * stride);
        matmul(x, layer.gate.view().columns(start, end), RowsMut { data: both, stride }, Accumulate::No, threads);
        let beside = RowsMut { data: &mut both[count..], stride };
        matmul(x, layer.up.view().columns(start, end), beside, Accumulate::No, threads);
        ops::gate(both, count, &mut out[start..], width);
    }
}

impl Layer {
    fn load(weights: &Weights, layer: usize) -> Result<Self, Error> {
        let get = |name: &str| weights.get(&format!("model.layers.{layer}.{name}.weight"));
        Ok(Self {
            input_norm: get("input_layernorm")?.vector(),
            qkv: weights::pack(&[get("self_attn.q_proj")?, get("self_attn.k_proj")?, get("self_attn.v_proj")?]),
            query_norm: get("self_attn.q_norm")?.vector(),
            key_norm: get("self_attn.k_norm")?.vector(),
            output: weights::pack(&[get("self_attn.o_proj")?]),
            post_norm: get("post_attention_layernorm")?.vector(),
            gate: weights::pack(&[get("mlp.gate_proj")?]),
            up: weights::pack(&[get("mlp.up_proj")?]),
            down: weights::pack(&[get("mlp.down_proj")?]),
        })
    }
}

fn product(x: &[f32], w: &Panels, out: &mut [f32], accumulate: Accumulate, threads: usize) {
    let target = RowsMut { data: out, stride: w.cols() };
    matmul(Rows::dense(x, w.inner()), w.view(), target, accumulate, threads);
}

/// Moves the rows of these numbers (ascending) to the front, and leaves the others out.
fn gather<'a>(rows: &'a mut [f32], width: usize, kept: &[usize]) -> &'a mut [f32] {
    for (to, from) in kept.iter().enumerate() {
        rows.copy_within(from * width..(from + 1) * width, to * width);
    }
    &mut rows[..kept.len() * width]
}
