//! The network: what happens to rows of tokens from embedding to the last norm, and the output head.
//!
//! Rows of all prompts (or beams) of a batch go through every product together; only attention knows which row
//! belongs to whom. Nothing is padded.

use std::{ops::Range, path::Path};

use rayon::prelude::*;

use super::{
    Config,
    attention::{self, Buffers, Shape},
    kv::{Branches, Segment},
    rotary::Rotary,
    weights::{self, Tensor, Weights},
};
use crate::{
    Error,
    cpu::{Accumulate, Panels, Rows, RowsMut, matmul, ops},
};

/// Columns of the head that are computed and looked at together.
pub const HEAD_CHUNK: usize = 1024;

/// A Qwen3 ready to compute on the CPU.
pub struct Qwen3 {
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
    /// Gate and up side by side.
    gate_up: Panels,
    down: Panels,
}

/// A prompt to be read, after a segment that it may share with others.
pub struct Prompt<'a> {
    pub prefix: Option<&'a Segment>,
    pub tokens: &'a [u32],
}

/// Beams to go further, by one token or several.
pub struct Step<'a, 's> {
    pub branches: &'a mut Branches<'s>,
    /// The tokens to be computed.
    pub tokens: &'a [u32],
    /// The slots on the way to each token. They may be those of earlier tokens of this very step: that is how a beam
    /// takes several tokens at once.
    pub paths: &'a [Vec<u32>],
}

/// Which rows' hidden states are wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wanted {
    /// Of every token.
    All,
    /// Of the last token of every prompt.
    Last,
}

/// Queries, keys and values of a batch in one layer.
struct Projected<'a> {
    /// `[rows, query_width]`, normed, turned and scaled.
    queries: &'a [f32],
    /// `[rows, kv_width]`, normed and turned.
    keys: &'a [f32],
    values: &'a [f32],
}

impl Qwen3 {
    /// Loads a model folder: maps its weights and packs them. Runs on the current rayon pool.
    ///
    /// # Errors
    /// As [`Config::load`] and [`Weights::open`].
    pub fn load(folder: &Path) -> Result<Self, Error> {
        let config = Config::load(folder)?;
        let weights = Weights::open(folder, &config)?;
        let embeddings = weights.get("model.embed_tokens.weight")?.clone();
        let head = if weights.has_head(&config) {
            let rows = if config.tied { embeddings.clone() } else { weights.get("lm_head.weight")?.clone() };
            Some(Head { packed: weights::pack(&[&rows]), rows })
        } else {
            None
        };
        let layers = (0..config.layers).map(|l| Layer::load(&weights, l)).collect::<Result<_, _>>()?;
        let norm = weights.get("model.norm.weight")?.vector();
        let rotary = Rotary::new(&config);
        Ok(Self { config, embeddings, layers, norm, head, rotary })
    }

    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Reads prompts; returns their segments and the hidden states that are `wanted` (`[rows, hidden]`, after the
    /// last norm, in the order of prompts and tokens).
    ///
    /// # Errors
    /// A prompt is empty or longer than the model's positions, or has a token that the model has not.
    pub fn read(&self, prompts: &[Prompt], wanted: Wanted, threads: usize) -> Result<(Vec<Segment>, Vec<f32>), Error> {
        let mut tokens = Vec::new();
        let mut positions = Vec::new();
        let mut rows: Vec<Range<usize>> = Vec::with_capacity(prompts.len());
        for prompt in prompts {
            let before = prompt.prefix.map_or(0, Segment::length);
            self.check(prompt.tokens, before)?;
            rows.push(tokens.len()..tokens.len() + prompt.tokens.len());
            tokens.extend_from_slice(prompt.tokens);
            positions.extend(before..before + prompt.tokens.len());
        }
        let mut segments: Vec<Segment> = prompts.iter().map(|p| Segment::zeros(&self.config, p.tokens.len())).collect();
        let last: Vec<usize> = rows.iter().map(|r| r.end - 1).collect();
        let kept = (wanted == Wanted::Last).then_some(last.as_slice());
        let hidden = self.forward(&tokens, &positions, kept, threads, |layer, projected, out| {
            let width = self.config.kv_width();
            for (segment, rows) in segments.iter_mut().zip(&rows) {
                for (index, row) in rows.clone().enumerate() {
                    let at = row * width..(row + 1) * width;
                    segment.store(layer, index, &projected.keys[at.clone()], &projected.values[at]);
                }
            }
            self.attend(&rows, out, threads, |which, shape, buffers| {
                let prompt = &prompts[which];
                let before: Vec<_> = prompt.prefix.iter().map(|s| s.head(layer, shape.head)).collect();
                let queries = self.rows_of(projected.queries, &rows[which]);
                attention::over_prompt(shape, queries, &before, segments[which].head(layer, shape.head), buffers)
            });
        });
        Ok((segments, hidden))
    }

    /// Takes beams further; returns the new tokens' hidden states (`[rows, hidden]`, after the last norm). The new
    /// tokens take the next slots of their branches, in order.
    ///
    /// # Errors
    /// As [`Qwen3::read`].
    pub fn step(&self, steps: &mut [Step], threads: usize) -> Result<Vec<f32>, Error> {
        let mut tokens = Vec::new();
        let mut positions = Vec::new();
        let mut rows: Vec<Range<usize>> = Vec::with_capacity(steps.len());
        let mut paths: Vec<Vec<Vec<u32>>> = Vec::with_capacity(steps.len());
        for step in steps.iter() {
            let before = step.branches.prompt_length();
            for (token, path) in step.tokens.iter().zip(step.paths) {
                self.check(std::slice::from_ref(token), before + path.len())?;
                positions.push(before + path.len());
            }
            rows.push(tokens.len()..tokens.len() + step.tokens.len());
            tokens.extend_from_slice(step.tokens);
            let with_self = |(index, path): (usize, &Vec<u32>)| {
                let mut path = path.clone();
                path.push((step.branches.slots() + index) as u32);
                path
            };
            paths.push(step.paths.iter().enumerate().map(with_self).collect());
        }
        let hidden = self.forward(&tokens, &positions, None, threads, |layer, projected, out| {
            let width = self.config.kv_width();
            for (step, rows) in steps.iter_mut().zip(&rows) {
                let slots = step.branches.layer_mut(layer);
                slots.keys.extend_from_slice(&projected.keys[rows.start * width..rows.end * width]);
                slots.values.extend_from_slice(&projected.values[rows.start * width..rows.end * width]);
            }
            let steps = &*steps;
            self.attend(&rows, out, threads, |which, shape, buffers| {
                let branches = &steps[which].branches;
                let prompt: Vec<_> = branches.prompt().iter().map(|s| s.head(layer, shape.head)).collect();
                let paths: Vec<&[u32]> = paths[which].iter().map(Vec::as_slice).collect();
                let queries = self.rows_of(projected.queries, &rows[which]);
                attention::over_branches(shape, queries, &prompt, branches.layer(layer), &paths, buffers)
            });
        });
        for step in steps.iter_mut() {
            step.branches.add_slots(step.tokens.len());
        }
        Ok(hidden)
    }

    /// Hands out the logits of `hidden`'s rows in chunks of columns, always the same chunks in the same order:
    /// `visit(row, first token, logits)`.
    ///
    /// # Errors
    /// The model is an encoder without a head.
    pub fn visit_logits(
        &self,
        hidden: &[f32],
        threads: usize,
        mut visit: impl FnMut(usize, usize, &[f32]),
    ) -> Result<(), Error> {
        let packed = &self.head()?.packed;
        let rows = Rows::dense(hidden, self.config.hidden_size);
        let mut chunk = vec![0.0; rows.rows * HEAD_CHUNK];
        for start in (0..packed.cols()).step_by(HEAD_CHUNK) {
            let end = (start + HEAD_CHUNK).min(packed.cols());
            let stride = end - start;
            let target = RowsMut { data: &mut chunk, stride };
            matmul(rows, packed.view().columns(start, end), target, Accumulate::No, threads);
            for (row, logits) in chunk.chunks_exact(stride).take(rows.rows).enumerate() {
                visit(row, start, logits);
            }
        }
        Ok(())
    }

    /// All logits, `[rows, vocabulary]`.
    ///
    /// # Errors
    /// As [`Qwen3::visit_logits`].
    pub fn logits(&self, hidden: &[f32], threads: usize) -> Result<Vec<f32>, Error> {
        let vocabulary = self.config.vocab_size;
        let mut all = vec![0.0; hidden.len() / self.config.hidden_size * vocabulary];
        self.visit_logits(hidden, threads, |row, first, logits| {
            let start = row * vocabulary + first;
            all[start..start + logits.len()].copy_from_slice(logits);
        })?;
        Ok(all)
    }

    /// The logits of a few tokens for one row; summed in another order than [`Qwen3::visit_logits`].
    ///
    /// # Errors
    /// As [`Qwen3::visit_logits`].
    pub fn logits_of(
        &self,
        hidden: &[f32],
        tokens: impl IntoIterator<Item = u32>,
        out: &mut Vec<f32>,
    ) -> Result<(), Error> {
        let rows = &self.head()?.rows;
        let width = self.config.hidden_size;
        let mut row = vec![0.0; width];
        out.clear();
        for token in tokens {
            rows.read(token as usize * width, &mut row);
            out.push(ops::dot(hidden, &row));
        }
        Ok(())
    }

    fn head(&self) -> Result<&Head, Error> {
        self.head.as_ref().ok_or_else(|| {
            Error::argument("the model has no output head, and cannot generate")
                .help("it is an encoder; use it in `similarity`")
        })
    }

    fn check(&self, tokens: &[u32], before: usize) -> Result<(), Error> {
        if tokens.is_empty() {
            return Err(Error::argument("a prompt has no tokens"));
        }
        if let Some(token) = tokens.iter().find(|t| **t as usize >= self.config.vocab_size) {
            let size = self.config.vocab_size;
            return Err(Error::argument(format!("token {token} is not among the model's {size}"))
                .help("tokenizer.json and config.json are of different models"));
        }
        let (length, limit) = (before + tokens.len(), self.config.max_positions);
        if length > limit {
            return Err(Error::argument(format!("a prompt of {length} tokens, and the model has {limit} positions"))
                .help("shorten the histories"));
        }
        Ok(())
    }

    fn rows_of<'a>(&self, queries: &'a [f32], rows: &Range<usize>) -> &'a [f32] {
        let width = self.config.query_width();
        &queries[rows.start * width..rows.end * width]
    }

    /// Calls `one` for every owner of rows and every head of keys and values, and puts the results together.
    fn attend(
        &self,
        rows: &[Range<usize>],
        out: &mut [f32],
        threads: usize,
        one: impl Fn(usize, Shape, &mut Buffers) -> Vec<f32> + Sync,
    ) {
        let config = &self.config;
        let shape = |head| Shape {
            group: config.group(),
            head_dim: config.head_dim,
            query_width: config.query_width(),
            kv_width: config.kv_width(),
            head,
        };
        let tasks: Vec<(usize, usize)> =
            (0..rows.len()).flat_map(|which| (0..config.kv_heads).map(move |head| (which, head))).collect();
        let width = config.group() * config.head_dim;
        let mut put = |&(which, head): &(usize, usize), result: Vec<f32>| {
            for (row, values) in rows[which].clone().zip(result.chunks_exact(width)) {
                let start = row * config.query_width() + head * width;
                out[start..start + width].copy_from_slice(values);
            }
        };
        if threads == 1 {
            let mut buffers = Buffers::default();
            for task in &tasks {
                put(task, one(task.0, shape(task.1), &mut buffers));
            }
        } else {
            let results: Vec<Vec<f32>> = tasks
                .par_iter()
                .map_init(Buffers::default, |buffers, &(which, head)| one(which, shape(head), buffers))
                .collect();
            tasks.iter().zip(results).for_each(|(task, result)| put(task, result));
        }
    }

    /// From tokens to hidden states after the last norm; `attend` stores keys and values, and fills in attention.
    /// With `kept`, only those rows leave the last layer.
    fn forward(
        &self,
        tokens: &[u32],
        positions: &[usize],
        kept: Option<&[usize]>,
        threads: usize,
        mut attend: impl FnMut(usize, Projected, &mut [f32]),
    ) -> Vec<f32> {
        let c = &self.config;
        let (width, eps) = (c.hidden_size, c.rms_norm_eps as f32);
        let mut x = vec![0.0; tokens.len() * width];
        for (row, token) in x.chunks_exact_mut(width).zip(tokens) {
            self.embeddings.read(*token as usize * width, row);
        }
        let mut normed = vec![0.0; x.len()];
        let mut qkv = vec![0.0; tokens.len() * (c.query_width() + 2 * c.kv_width())];
        let (mut queries, mut keys, mut values) = (
            vec![0.0; tokens.len() * c.query_width()],
            vec![0.0; tokens.len() * c.kv_width()],
            vec![0.0; tokens.len() * c.kv_width()],
        );
        let mut attended = vec![0.0; tokens.len() * c.query_width()];
        let (mut gate_up, mut gated) = (Vec::new(), Vec::new());
        for (index, layer) in self.layers.iter().enumerate() {
            ops::rms_norm(&x, &layer.input_norm, eps, &mut normed);
            product(&normed, &layer.qkv, &mut qkv, Accumulate::No, threads);
            self.split(layer, &qkv, positions, &mut queries, &mut keys, &mut values);
            attend(index, Projected { queries: &queries, keys: &keys, values: &values }, &mut attended);
            if let Some(kept) = kept.filter(|_| index + 1 == self.layers.len()) {
                x = gather(&x, width, kept);
                attended = gather(&attended, c.query_width(), kept);
                normed.truncate(x.len());
            }
            product(&attended, &layer.output, &mut x, Accumulate::Yes, threads);
            ops::rms_norm(&x, &layer.post_norm, eps, &mut normed);
            let rows = x.len() / width;
            gate_up.resize(rows * 2 * c.intermediate_size, 0.0);
            gated.resize(rows * c.intermediate_size, 0.0);
            product(&normed, &layer.gate_up, &mut gate_up, Accumulate::No, threads);
            ops::gate(&gate_up, c.intermediate_size, &mut gated);
            product(&gated, &layer.down, &mut x, Accumulate::Yes, threads);
        }
        ops::rms_norm(&x, &self.norm, eps, &mut normed);
        normed
    }

    /// Takes queries, keys and values apart, norms and turns the heads of the first two, and scales the queries.
    fn split(
        &self,
        layer: &Layer,
        qkv: &[f32],
        positions: &[usize],
        queries: &mut [f32],
        keys: &mut [f32],
        values: &mut [f32],
    ) {
        let c = &self.config;
        let (q, kv, eps) = (c.query_width(), c.kv_width(), c.rms_norm_eps as f32);
        let scale = 1.0 / (c.head_dim as f32).sqrt();
        let mut buffer = Vec::new();
        for (row, position) in positions.iter().enumerate() {
            let source = &qkv[row * (q + 2 * kv)..(row + 1) * (q + 2 * kv)];
            let query = &mut queries[row * q..(row + 1) * q];
            let key = &mut keys[row * kv..(row + 1) * kv];
            query.copy_from_slice(&source[..q]);
            key.copy_from_slice(&source[q..q + kv]);
            values[row * kv..(row + 1) * kv].copy_from_slice(&source[q + kv..]);
            let (cos, sin) = self.rotary.at(*position, &mut buffer);
            for head in query.chunks_exact_mut(c.head_dim) {
                ops::norm_and_rotate(head, &layer.query_norm, eps, cos, sin, scale);
            }
            for head in key.chunks_exact_mut(c.head_dim) {
                ops::norm_and_rotate(head, &layer.key_norm, eps, cos, sin, 1.0);
            }
        }
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
            gate_up: weights::pack(&[get("mlp.gate_proj")?, get("mlp.up_proj")?]),
            down: weights::pack(&[get("mlp.down_proj")?]),
        })
    }
}

fn product(x: &[f32], w: &Panels, out: &mut [f32], accumulate: Accumulate, threads: usize) {
    let target = RowsMut { data: out, stride: w.cols() };
    matmul(Rows::dense(x, w.inner()), w.view(), target, accumulate, threads);
}

/// The rows of these numbers.
fn gather(rows: &[f32], width: usize, kept: &[usize]) -> Vec<f32> {
    kept.iter().flat_map(|row| &rows[row * width..(row + 1) * width]).copied().collect()
}
