//! The network on a device, by candle's tensors, in f32, bf16 or f16.
//!
//! It mirrors [`super::packed`]: rows of all prompts (or beams) go through every product together, without padding; only
//! for attention they are padded ([`super::padded`]). Norms and softmax sum in f32 whatever the type of the weights. Hidden
//! states come back in f32; logits stay on the device where only a few of them are asked for.

use candle_core::{D, DType, Device, Tensor};
use candle_nn::{ops::rms_norm, rotary_emb::rope_thd};

use super::{
    Config, DeviceMemory,
    kv::{LayerKv, Room, Segment},
    model::{Batch, Step},
    padded::Attention,
    place,
    rotary::Rotary,
    store::{Rectangle, Store},
    weights::Weights,
};
use crate::Error;

/// Logits that are computed before any of them is looked at: 64 MiB in f32.
pub const LOGITS_AT_ONCE: usize = 1 << 24;

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
    attention: Attention,
    logits_at_once: usize,
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

/// What a layer's attention is given, `[rows, heads, head_dim]` each.
struct Projected {
    queries: Tensor,
    kv: LayerKv,
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
        let (attention, logits_at_once) = (Attention::new(&config, &device, dtype), LOGITS_AT_ONCE);
        Ok(Self { config, device, dtype, embeddings, layers, norm, head, rotary, attention, logits_at_once })
    }

    /// Computes in parts so small that a test of a few tokens has several.
    pub fn in_small_parts(&mut self) {
        self.attention.scores_at_once = 5000;
        self.logits_at_once = 1000;
    }

    /// `None` where the device does not say how much it has.
    pub fn memory(&self) -> Option<DeviceMemory> {
        Some(DeviceMemory { free: place::free_memory(&self.device)?, element: self.dtype.size_in_bytes() })
    }

    pub fn has_head(&self) -> bool {
        self.head.is_some()
    }

    /// Takes memory for the keys and values of prompts.
    ///
    /// # Errors
    /// The device's memory is too small.
    pub fn store(&self, room: Room) -> Result<Store> {
        Store::zeros(&self.config, room, &self.device, self.dtype)
    }

    /// [`super::Qwen3::read`]; `kept` are the only rows whose hidden states are wanted.
    ///
    /// # Errors
    /// The device fails.
    pub fn read(
        &self,
        prefix: Option<&Segment>,
        store: &mut Store,
        batch: &Batch,
        kept: Option<&[usize]>,
    ) -> Result<Vec<f32>> {
        let before = prefix.map_or(0, Segment::length);
        let owned = store.add(&batch.rows);
        let whole = Rectangle::new(owned.first, &owned.rows, &self.device)?;
        let all = self.attention.of_prompts(before, &owned)?;
        let last = kept.map(|kept| self.attention.of_last(before, &owned, kept)).transpose()?;
        self.forward(batch, kept, |layer, Projected { queries, kv }| {
            store.write_prompts(layer, &whole, &kv)?;
            let plan = last.as_ref().filter(|_| layer + 1 == self.layers.len()).unwrap_or(&all);
            self.attention.over(plan, &queries, prefix.map(|s| s.layer(layer)), store.layer(layer))
        })
    }

    /// [`super::Qwen3::step`].
    ///
    /// # Errors
    /// The device fails.
    pub fn step(&self, prefix: Option<&Segment>, store: &mut Store, steps: &[Step], batch: &Batch) -> Result<Vec<f32>> {
        let before = prefix.map_or(0, Segment::length);
        let (owned, paths) = store.owned(steps, &batch.rows);
        let new = Rectangle::new(owned.first, &owned.rows, &self.device)?;
        let columns = store.columns(&owned, &new)?;
        let plan = self.attention.of_beams(before, store, &owned, &paths)?;
        let hidden = self.forward(batch, None, |layer, Projected { queries, kv }| {
            store.write_slots(layer, &new, &columns, &kv)?;
            self.attention.over(&plan, &queries, prefix.map(|s| s.layer(layer)), store.layer(layer))
        })?;
        store.count(steps);
        Ok(hidden)
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
        let at_once = (self.logits_at_once / self.config.hidden_size).max(1);
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
        let at_once = (self.logits_at_once / self.config.vocab_size).max(1);
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
            Ok(rope_thd(&rms_norm(&x, norm, eps)?.unsqueeze(0)?, cos, sin)?.squeeze(0)?)
        };
        let (q, kv) = (c.query_width(), c.kv_width());
        let queries = turned(heads(0, c.heads)?, &layer.query_norm)?;
        let keys = turned(heads(q, c.kv_heads)?, &layer.key_norm)?;
        let values = heads(q + kv, c.kv_heads)?;
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
