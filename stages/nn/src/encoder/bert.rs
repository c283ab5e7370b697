//! The BERT network on the CPU: from tokens of many texts to a vector for each token (Devlin et al. 2018).
//!
//! Texts of any length go through every product together, one row a token; only attention knows which rows are one
//! text. Nothing is padded, so nothing has to be masked, and a text's vectors do not depend on the others.

use std::ops::Range;

use super::{Activation, BertConfig, config::POSITIONS};
use crate::{
    Error,
    cpu::{Accumulate, Panels, Rows, RowsMut, matmul, ops},
    qwen3::weights::{self, Tensor, Weights},
};

/// Query positions that are taken together, which bounds the memory for scores.
pub(super) const POSITIONS_AT_ONCE: usize = 64;

/// A BERT ready to compute.
pub struct Bert {
    config: BertConfig,
    /// Rows are read from the mapped file.
    words: Tensor,
    /// `[positions, hidden]`, with the first token type added: every text is one segment.
    positions: Vec<f32>,
    norm: Norm,
    layers: Vec<Layer>,
}

struct Layer {
    /// Queries, keys and values side by side.
    qkv: Linear,
    output: Linear,
    output_norm: Norm,
    up: Linear,
    down: Linear,
    down_norm: Norm,
}

struct Linear {
    weight: Panels,
    bias: Vec<f32>,
}

struct Norm {
    weight: Vec<f32>,
    bias: Vec<f32>,
}

impl Bert {
    /// Packs weights. Runs on the current rayon pool.
    ///
    /// # Errors
    /// As [`Weights::get`].
    pub fn load(config: BertConfig, weights: &Weights) -> Result<Self, Error> {
        let mut positions = weights.get(POSITIONS)?.vector();
        let mut segment = vec![0.0; config.hidden_size];
        weights.get("embeddings.token_type_embeddings.weight")?.read(0, &mut segment);
        for row in positions.chunks_exact_mut(config.hidden_size) {
            row.iter_mut().zip(&segment).for_each(|(x, s)| *x += s);
        }
        Ok(Self {
            words: weights.get("embeddings.word_embeddings.weight")?.clone(),
            positions,
            norm: Norm::load(weights, "embeddings.LayerNorm")?,
            layers: (0..config.layers).map(|l| Layer::load(weights, l)).collect::<Result<_, _>>()?,
            config,
        })
    }

    pub fn config(&self) -> &BertConfig {
        &self.config
    }

    /// The last layer's vectors of all tokens, `[tokens of all texts, hidden]`.
    ///
    /// # Errors
    /// A text is longer than the model's positions, or has a token that the model has not.
    pub fn read(&self, texts: &[&[u32]], threads: usize) -> Result<Vec<f32>, Error> {
        let c = &self.config;
        let width = c.hidden_size;
        let rows: usize = texts.iter().map(|t| t.len()).sum();
        let mut x = Vec::with_capacity(rows * width);
        let mut word = vec![0.0; width];
        let mut ranges: Vec<Range<usize>> = Vec::with_capacity(texts.len());
        for tokens in texts {
            c.check(tokens)?;
            let start = x.len() / width;
            for (place, token) in (c.first_position..).zip(*tokens) {
                self.words.read(*token as usize * width, &mut word);
                x.extend(word.iter().zip(&self.positions[place * width..]).map(|(w, p)| w + p));
            }
            ranges.push(start..start + tokens.len());
        }
        ops::layer_norm(&mut x, &self.norm.weight, &self.norm.bias, c.layer_norm_eps);
        let scale = 1.0 / (c.head_dim() as f32).sqrt();
        let mut qkv = vec![0.0; rows * 3 * width];
        let mut attended = vec![0.0; rows * width];
        let mut inner = vec![0.0; rows * c.intermediate_size];
        for layer in &self.layers {
            layer.qkv.apply(&x, &mut qkv, Accumulate::No, threads);
            for row in qkv.chunks_exact_mut(3 * width) {
                row[..width].iter_mut().for_each(|query| *query *= scale);
            }
            self.attend(&qkv, &ranges, &mut attended, threads);
            layer.output.apply(&attended, &mut x, Accumulate::Yes, threads);
            ops::layer_norm(&mut x, &layer.output_norm.weight, &layer.output_norm.bias, c.layer_norm_eps);
            layer.up.apply(&x, &mut inner, Accumulate::No, threads);
            match c.activation {
                Activation::Gelu => ops::gelu(&mut inner),
                Activation::GeluTanh => ops::gelu_tanh(&mut inner),
                Activation::Relu => inner.iter_mut().for_each(|v| *v = v.max(0.0)),
            }
            layer.down.apply(&inner, &mut x, Accumulate::Yes, threads);
            ops::layer_norm(&mut x, &layer.down_norm.weight, &layer.down_norm.bias, c.layer_norm_eps);
        }
        Ok(x)
    }

    /// Every token of a text sees all of its text.
    fn attend(&self, qkv: &[f32], texts: &[Range<usize>], out: &mut [f32], threads: usize) {
        let (width, dim) = (self.config.hidden_size, self.config.head_dim());
        let stride = 3 * width;
        let (mut scores, mut head_out) = (Vec::new(), Vec::new());
        for rows in texts.iter().filter(|rows| !rows.is_empty()) {
            let length = rows.len();
            for head in 0..self.config.heads {
                let part = |row: usize, which: usize| {
                    let start = row * stride + which * width + head * dim;
                    &qkv[start..start + dim]
                };
                let (mut keys, mut values) = (Panels::zeros(dim, length), Panels::zeros(length, dim));
                for (index, row) in rows.clone().enumerate() {
                    keys.set_column(index, part(row, 1));
                    values.set_row(index, part(row, 2));
                }
                for start in rows.clone().step_by(POSITIONS_AT_ONCE) {
                    let count = POSITIONS_AT_ONCE.min(rows.end - start);
                    scores.resize(count * length, 0.0);
                    head_out.resize(count * dim, 0.0);
                    let queries = Rows { data: &qkv[start * stride + head * dim..], stride, rows: count };
                    let target = RowsMut { data: &mut scores, stride: length };
                    matmul(queries, keys.view(), target, Accumulate::No, threads);
                    scores.chunks_exact_mut(length).for_each(ops::softmax);
                    let target = RowsMut { data: &mut head_out, stride: dim };
                    matmul(Rows::dense(&scores, length), values.view(), target, Accumulate::No, threads);
                    for (row, values) in (start..).zip(head_out.chunks_exact(dim)) {
                        out[row * width + head * dim..][..dim].copy_from_slice(values);
                    }
                }
            }
        }
    }
}

impl Layer {
    fn load(weights: &Weights, layer: usize) -> Result<Self, Error> {
        let name = |part: &str| format!("encoder.layer.{layer}.{part}");
        let (query, key, value) =
            (name("attention.self.query"), name("attention.self.key"), name("attention.self.value"));
        Ok(Self {
            qkv: Linear::load(weights, &[&query, &key, &value])?,
            output: Linear::load(weights, &[&name("attention.output.dense")])?,
            output_norm: Norm::load(weights, &name("attention.output.LayerNorm"))?,
            up: Linear::load(weights, &[&name("intermediate.dense")])?,
            down: Linear::load(weights, &[&name("output.dense")])?,
            down_norm: Norm::load(weights, &name("output.LayerNorm"))?,
        })
    }
}

impl Linear {
    /// Layers of one input, side by side.
    fn load(weights: &Weights, names: &[&str]) -> Result<Self, Error> {
        let mut matrices = Vec::new();
        let mut bias = Vec::new();
        for name in names {
            matrices.push(weights.get(&format!("{name}.weight"))?);
            bias.extend(weights.get(&format!("{name}.bias"))?.vector());
        }
        Ok(Self { weight: weights::pack(&matrices), bias })
    }

    /// `out = x · Wᵀ + b`, or that added to `out`.
    fn apply(&self, x: &[f32], out: &mut [f32], accumulate: Accumulate, threads: usize) {
        for row in out.chunks_exact_mut(self.bias.len()) {
            match accumulate {
                Accumulate::No => row.copy_from_slice(&self.bias),
                Accumulate::Yes => row.iter_mut().zip(&self.bias).for_each(|(x, b)| *x += b),
            }
        }
        let target = RowsMut { data: out, stride: self.bias.len() };
        matmul(Rows::dense(x, self.weight.inner()), self.weight.view(), target, Accumulate::Yes, threads);
    }
}

impl Norm {
    fn load(weights: &Weights, name: &str) -> Result<Self, Error> {
        Ok(Self {
            weight: weights.get(&format!("{name}.weight"))?.vector(),
            bias: weights.get(&format!("{name}.bias"))?.vector(),
        })
    }
}
