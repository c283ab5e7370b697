//! The network on a device, by candle's tensors, in f32, bf16 or f16.
//!
//! It mirrors [`super::packed`]: rows of all prompts (or beams) go through every product together, attention knows which
//! row belongs to whom, and nothing is padded. Norms and softmax sum in f32 whatever the type of the weights. Hidden
//! states come back in f32; logits stay on the device where only a few of them are asked for.

use candle_core::{D, DType, Device, Tensor};
use candle_nn::{
    ops::{rms_norm, softmax_last_dim},
    rotary_emb::rope,
};

use super::{
    Config,
    kv::{LayerKv, Segment},
    model::{Batch, Prompt, Step},
    rotary::Rotary,
    weights::Weights,
};
use crate::Error;

/// What is computed together.
#[derive(Debug, Clone, Copy)]
struct AtOnce {
    /// Query positions of a prompt; it bounds the memory for scores.
    positions: usize,
    /// Logits, before any of them is looked at.
    logits: usize,
}

/// 64 MiB of logits in f32.
const AT_ONCE: AtOnce = AtOnce { positions: 512, logits: 1 << 24 };
/// Added to the scores of what must not be seen: its probability is 0, and a row that sees nothing is not NaN.
const HIDDEN: f32 = -1e30;

type Result<T> = std::result::Result<T, Error>;

/// Weights on a device.
pub struct Tensors {
    config: Config,
    device: Device,
    dtype: DType,
    /// `[vocabulary, hidden]`.
    embeddings: Tensor,
    layers: Vec<Layer>,
    norm: Tensor,
    /// `[vocabulary, hidden]`.
    head: Option<Tensor>,
    rotary: Rotary,
    at_once: AtOnce,
}

/// Matrices are `[out, in]`.
struct Layer {
    input_norm: Tensor,
    /// Queries, keys and values below each other.
    qkv: Tensor,
    query_norm: Tensor,
    key_norm: Tensor,
    output: Tensor,
    post_norm: Tensor,
    /// Gate and up below each other.
    gate_up: Tensor,
    down: Tensor,
}

/// What a layer's attention is given: all rows' queries, `[heads, rows, head_dim]`, keys and values.
struct Projected {
    queries: Tensor,
    kv: LayerKv,
}

/// A run of keys and values that queries look at.
struct Part<'a> {
    kv: &'a LayerKv,
    /// `[queries, length]`: 0 where a query may look, [`HIDDEN`] where not.
    mask: Option<&'a Tensor>,
}

impl Tensors {
    /// Copies weights to a device.
    ///
    /// # Errors
    /// As [`Weights::get`]; the device's memory is too small.
    pub fn load(config: Config, weights: &Weights, with_head: bool, device: Device, dtype: DType) -> Result<Self> {
        let get = |name: &str| -> Result<Tensor> { Ok(weights.get(name)?.on(&device, dtype)?) };
        let embeddings = get("model.embed_tokens.weight")?;
        let head = match (with_head && weights.has_head(&config), config.tied) {
            (false, _) => None,
            (true, true) => Some(embeddings.clone()),
            (true, false) => Some(get("lm_head.weight")?),
        };
        let layer = |layer: usize| -> Result<Layer> {
            let get = |name: &str| get(&format!("model.layers.{layer}.{name}.weight"));
            let below = |names: &[&str]| -> Result<Tensor> {
                let parts = names.iter().map(|name| get(name)).collect::<Result<Vec<_>>>()?;
                Ok(Tensor::cat(&parts, 0)?)
            };
            Ok(Layer {
                input_norm: get("input_layernorm")?,
                qkv: below(&["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"])?,
                query_norm: get("self_attn.q_norm")?,
                key_norm: get("self_attn.k_norm")?,
                output: get("self_attn.o_proj")?,
                post_norm: get("post_attention_layernorm")?,
                gate_up: below(&["mlp.gate_proj", "mlp.up_proj"])?,
                down: get("mlp.down_proj")?,
            })
        };
        let layers = (0..config.layers).map(layer).collect::<Result<_>>()?;
        let norm = get("model.norm.weight")?;
        let rotary = Rotary::new(&config);
        // Every thread has a stream of its own on the device: whoever computes must find the weights there.
        device.synchronize()?;
        Ok(Self { config, device, dtype, embeddings, layers, norm, head, rotary, at_once: AT_ONCE })
    }

    /// Computes in parts so small that a test of a few tokens has several.
    pub fn in_small_parts(&mut self) {
        self.at_once = AtOnce { positions: 16, logits: 1000 };
    }

    pub fn has_head(&self) -> bool {
        self.head.is_some()
    }

    /// [`super::Qwen3::read`]; `kept` are the only rows whose hidden states are wanted.
    ///
    /// # Errors
    /// The device fails.
    pub fn read(&self, prompts: &[Prompt], batch: &Batch, kept: Option<&[usize]>) -> Result<(Vec<Segment>, Vec<f32>)> {
        let longest = batch.rows.iter().map(|rows| rows.len()).max().unwrap_or(0);
        let future = self.future(longest)?;
        let mut own: Vec<Vec<LayerKv>> = vec![Vec::with_capacity(self.layers.len()); prompts.len()];
        let hidden = self.forward(batch, kept, |layer, projected| {
            let last_only = kept.is_some() && layer + 1 == self.layers.len();
            let mut results = Vec::new();
            for ((prompt, rows), own) in prompts.iter().zip(&batch.rows).zip(&mut own) {
                let kv = projected.kv.part(rows.start, rows.len())?;
                let first = if last_only { rows.len() - 1 } else { 0 };
                for start in (first..rows.len()).step_by(self.at_once.positions) {
                    let count = self.at_once.positions.min(rows.len() - start);
                    let seen = kv.part(0, start + count)?;
                    let mask = future.narrow(0, start, count)?.narrow(1, 0, start + count)?;
                    let before = prompt.prefix.map(|segment| Part { kv: segment.layer(layer), mask: None });
                    let parts: Vec<Part> = before.into_iter().chain([Part { kv: &seen, mask: Some(&mask) }]).collect();
                    let queries = projected.queries.narrow(1, rows.start + start, count)?;
                    results.push(self.attend(&queries, &parts)?);
                }
                own.push(kv);
            }
            Ok(Tensor::cat(&results, 0)?)
        })?;
        let segment = |(kv, prompt): (_, &Prompt)| Segment::tensors(prompt.tokens.len(), kv);
        Ok((own.into_iter().zip(prompts).map(segment).collect(), hidden))
    }

    /// [`super::Qwen3::step`].
    ///
    /// # Errors
    /// The device fails.
    pub fn step(&self, steps: &mut [Step], batch: &Batch) -> Result<Vec<f32>> {
        let masks = steps.iter().map(|step| self.mask_of_paths(step)).collect::<Result<Vec<_>>>()?;
        self.forward(batch, None, |layer, projected| {
            let mut results = Vec::with_capacity(steps.len());
            for ((step, rows), mask) in steps.iter_mut().zip(&batch.rows).zip(&masks) {
                let new = projected.kv.part(rows.start, rows.len())?;
                let slots = match step.branches.tensors_mut(layer).take() {
                    Some(before) => before.followed_by(&new)?,
                    None => new,
                };
                *step.branches.tensors_mut(layer) = Some(slots.clone());
                let prompt = step.branches.prompt().iter().map(|s| Part { kv: s.layer(layer), mask: None });
                let parts: Vec<Part> = prompt.chain([Part { kv: &slots, mask: Some(mask) }]).collect();
                results.push(self.attend(&projected.queries.narrow(1, rows.start, rows.len())?, &parts)?);
            }
            Ok(Tensor::cat(&results, 0)?)
        })
    }

    /// Hands out logits row by row, some rows' whole vocabulary at a time.
    ///
    /// # Errors
    /// The device fails.
    pub fn visit_logits(&self, hidden: &[f32], mut visit: impl FnMut(usize, usize, &[f32])) -> Result<()> {
        self.of_rows(hidden, |first, logits| {
            for (row, logits) in logits.to_vec2::<f32>()?.iter().enumerate() {
                visit(first + row, 0, logits);
            }
            Ok(())
        })
    }

    /// [`super::Qwen3::likeliest`].
    ///
    /// # Errors
    /// The device fails.
    pub fn likeliest(&self, hidden: &[f32]) -> Result<Vec<u32>> {
        let mut best = Vec::new();
        self.of_rows(hidden, |_, logits| {
            best.extend(logits.argmax(D::Minus1)?.to_vec1::<u32>()?);
            Ok(())
        })?;
        Ok(best)
    }

    /// [`super::Qwen3::log_probabilities`].
    ///
    /// # Errors
    /// The device fails.
    pub fn log_probabilities(&self, hidden: &[f32], wanted: &[&[u32]]) -> Result<Vec<Vec<f32>>> {
        let mut found: Vec<f32> = Vec::with_capacity(wanted.len());
        self.of_rows(hidden, |_, logits| {
            found.extend(logits.log_sum_exp(D::Minus1)?.to_vec1::<f32>()?);
            Ok(())
        })?;
        // In a short type logits are rounded: in the sum that evens out, between two beams it would decide.
        let mut wanted = self.logits_of(hidden, wanted)?;
        for (logits, sum) in wanted.iter_mut().zip(found) {
            logits.iter_mut().for_each(|logit| *logit -= sum);
        }
        Ok(wanted)
    }

    /// [`super::Qwen3::logits_of`].
    ///
    /// # Errors
    /// The device fails.
    pub fn logits_of(&self, hidden: &[f32], wanted: &[&[u32]]) -> Result<Vec<Vec<f32>>> {
        let Some(head) = &self.head else { return Ok(Vec::new()) };
        let tokens: Vec<u32> = wanted.concat();
        let rows: Vec<u32> = wanted.iter().zip(0..).flat_map(|(t, row)| std::iter::repeat_n(row, t.len())).collect();
        if tokens.is_empty() {
            return Ok(vec![Vec::new(); wanted.len()]);
        }
        let hidden = self.upload(hidden)?;
        let mut logits = Vec::with_capacity(tokens.len());
        let at_once = (self.at_once.logits / self.config.hidden_size).max(1);
        for (tokens, rows) in tokens.chunks(at_once).zip(rows.chunks(at_once)) {
            let rows = hidden.index_select(&self.numbers(rows)?, 0)?.to_dtype(DType::F32)?;
            let tokens = head.index_select(&self.numbers(tokens)?, 0)?.to_dtype(DType::F32)?;
            logits.extend((rows * tokens)?.sum(D::Minus1)?.to_vec1::<f32>()?);
        }
        let mut logits = logits.into_iter();
        Ok(wanted.iter().map(|tokens| logits.by_ref().take(tokens.len()).collect()).collect())
    }

    /// Calls `each` with the logits (f32, `[rows, vocabulary]`) of some rows after the other, and the first row's
    /// number.
    fn of_rows(&self, hidden: &[f32], mut each: impl FnMut(usize, Tensor) -> Result<()>) -> Result<()> {
        let Some(head) = &self.head else { return Ok(()) };
        let at_once = (self.at_once.logits / self.config.vocab_size).max(1);
        for (part, hidden) in hidden.chunks(at_once * self.config.hidden_size).enumerate() {
            let logits = self.upload(hidden)?.matmul(&head.t()?)?.to_dtype(DType::F32)?;
            each(part * at_once, logits)?;
        }
        Ok(())
    }

    /// Hidden states, `[rows, hidden]`.
    fn upload(&self, hidden: &[f32]) -> Result<Tensor> {
        let shape = (hidden.len() / self.config.hidden_size, self.config.hidden_size);
        Ok(Tensor::from_slice(hidden, shape, &self.device)?.to_dtype(self.dtype)?)
    }

    fn numbers(&self, numbers: &[u32]) -> Result<Tensor> {
        Ok(Tensor::from_slice(numbers, numbers.len(), &self.device)?)
    }

    /// `[length, length]`: [`HIDDEN`] where the column comes after the row.
    fn future(&self, length: usize) -> Result<Tensor> {
        let past = Tensor::tril2(length, DType::F32, &self.device)?;
        Ok(((1.0 - past)? * f64::from(HIDDEN))?)
    }

    /// `[tokens, slots]` of a step: 0 for the slots of each token's path and its own.
    fn mask_of_paths(&self, step: &Step) -> Result<Tensor> {
        let (rows, before) = (step.tokens.len(), step.branches.slots());
        let slots = before + rows;
        let mut mask = vec![HIDDEN; rows * slots];
        for (index, (row, path)) in mask.chunks_exact_mut(slots).zip(step.paths).enumerate() {
            path.iter().for_each(|slot| row[*slot as usize] = 0.0);
            row[before + index] = 0.0;
        }
        Ok(Tensor::from_vec(mask, (rows, slots), &self.device)?)
    }

    /// Attention of queries `[heads, n, head_dim]` over parts that follow each other; `[n, heads × head_dim]`.
    fn attend(&self, queries: &Tensor, parts: &[Part]) -> Result<Tensor> {
        let c = &self.config;
        let (heads, count, dim) = queries.dims3()?;
        let (kv_heads, group) = (c.kv_heads, c.group());
        // Query heads that share a head of keys and values are neighbours, and become rows of one product.
        let queries = queries.contiguous()?.reshape((kv_heads, group * count, dim))?;
        let queries = (queries * (1.0 / (dim as f64).sqrt()))?;
        let mut scores = Vec::with_capacity(parts.len());
        for Part { kv, mask } in parts {
            let length = kv.keys.dim(1)?;
            let part = queries.matmul(&kv.keys.t()?)?.to_dtype(DType::F32)?;
            scores.push(match mask {
                Some(mask) => {
                    let apart = part.reshape((kv_heads, group, count, length))?;
                    apart.broadcast_add(mask)?.reshape((kv_heads, group * count, length))?
                }
                None => part,
            });
        }
        let probabilities = softmax_last_dim(&Tensor::cat(&scores, 2)?)?.to_dtype(self.dtype)?;
        let (mut at, mut sum) = (0, None);
        for Part { kv, .. } in parts {
            let length = kv.values.dim(1)?;
            let part = probabilities.narrow(2, at, length)?.contiguous()?.matmul(&kv.values)?;
            at += length;
            sum = Some(match sum {
                Some(sum) => (sum + part)?,
                None => part,
            });
        }
        let out = sum.ok_or_else(|| Error::argument("attention over nothing"))?;
        Ok(out.reshape((heads, count, dim))?.transpose(0, 1)?.contiguous()?.reshape((count, heads * dim))?)
    }

    /// From tokens to hidden states after the last norm, in f32; `attend` keeps keys and values, and returns attention
    /// (`[rows, heads × head_dim]`). With `kept`, only those rows leave the last layer, where `attend` returns no other.
    fn forward(
        &self,
        batch: &Batch,
        kept: Option<&[usize]>,
        mut attend: impl FnMut(usize, Projected) -> Result<Tensor>,
    ) -> Result<Vec<f32>> {
        let eps = self.config.rms_norm_eps as f32;
        let mut x = self.embeddings.index_select(&self.numbers(&batch.tokens)?, 0)?;
        let (cos, sin) = self.angles(&batch.positions)?;
        for (index, layer) in self.layers.iter().enumerate() {
            let normed = rms_norm(&x, &layer.input_norm, eps)?;
            let attended = attend(index, self.project(layer, &normed, &cos, &sin)?)?;
            if let Some(kept) = kept.filter(|_| index + 1 == self.layers.len()) {
                let kept: Vec<u32> = kept.iter().map(|row| *row as u32).collect();
                x = x.index_select(&self.numbers(&kept)?, 0)?;
            }
            x = (x + attended.matmul(&layer.output.t()?)?)?;
            let normed = rms_norm(&x, &layer.post_norm, eps)?;
            let both = normed.matmul(&layer.gate_up.t()?)?;
            let width = both.dim(1)? / 2;
            let gate = both.narrow(1, 0, width)?.contiguous()?.silu()?;
            let gated = (gate * both.narrow(1, width, width)?.contiguous()?)?;
            x = (x + gated.matmul(&layer.down.t()?)?)?;
        }
        Ok(rms_norm(&x, &self.norm, eps)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?)
    }

    /// Queries and keys normed and turned, and values, of rows `[n, hidden]`.
    fn project(&self, layer: &Layer, normed: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Projected> {
        let c = &self.config;
        let (rows, eps) = (normed.dim(0)?, c.rms_norm_eps as f32);
        let qkv = normed.matmul(&layer.qkv.t()?)?;
        let heads = |from: usize, heads: usize| -> Result<Tensor> {
            Ok(qkv.narrow(1, from, heads * c.head_dim)?.contiguous()?.reshape((rows, heads, c.head_dim))?)
        };
        let turned = |x: Tensor, norm: &Tensor| -> Result<Tensor> {
            let x = rms_norm(&x, norm, eps)?.transpose(0, 1)?.contiguous()?.unsqueeze(0)?;
            Ok(rope(&x, cos, sin)?.squeeze(0)?)
        };
        let (q, kv) = (c.query_width(), c.kv_width());
        let queries = turned(heads(0, c.heads)?, &layer.query_norm)?;
        let keys = turned(heads(q, c.kv_heads)?, &layer.key_norm)?;
        let values = heads(q + kv, c.kv_heads)?.transpose(0, 1)?.contiguous()?;
        Ok(Projected { queries, kv: LayerKv { keys, values } })
    }

    /// Cosines and sines of each row's position, `[rows, head_dim / 2]`.
    fn angles(&self, positions: &[usize]) -> Result<(Tensor, Tensor)> {
        let half = self.config.head_dim / 2;
        let (mut cos, mut sin) =
            (Vec::with_capacity(positions.len() * half), Vec::with_capacity(positions.len() * half));
        let mut buffer = Vec::new();
        for position in positions {
            let (of_cos, of_sin) = self.rotary.at(*position, &mut buffer);
            cos.extend_from_slice(of_cos);
            sin.extend_from_slice(of_sin);
        }
        let tensor = |values: Vec<f32>| -> Result<Tensor> {
            Ok(Tensor::from_vec(values, (positions.len(), half), &self.device)?.to_dtype(self.dtype)?)
        };
        Ok((tensor(cos)?, tensor(sin)?))
    }
}

impl LayerKv {
    /// `count` tokens from `first` on.
    fn part(&self, first: usize, count: usize) -> Result<Self> {
        let part = |tensor: &Tensor| -> Result<Tensor> { Ok(tensor.narrow(1, first, count)?.contiguous()?) };
        Ok(Self { keys: part(&self.keys)?, values: part(&self.values)? })
    }

    fn followed_by(&self, next: &Self) -> Result<Self> {
        let both = |a: &Tensor, b: &Tensor| -> Result<Tensor> { Ok(Tensor::cat(&[a, b], 1)?) };
        Ok(Self { keys: both(&self.keys, &next.keys)?, values: both(&self.values, &next.values)? })
    }
}
