//! Keys and values: of a run of tokens, packed so that attention over it is one product, and of the tokens that
//! beams have generated.

use candle_core::Tensor;

use super::Config;
use crate::cpu::Panels;

/// Keys and values of a run of prompt tokens, for all layers. Read-only once written: any number of prompts share
/// the segment of their common beginning, and all beams of a prompt share its segments.
pub struct Segment {
    length: usize,
    kv: SegmentKv,
}

/// As the network that read the segment has them.
enum SegmentKv {
    /// Per layer and head of keys and values, in that order.
    Packed { heads: Vec<HeadKv>, kv_heads: usize },
    /// Per layer.
    Tensors(Vec<LayerKv>),
}

/// One head of one layer.
pub struct HeadKv {
    /// `[head_dim, length]`: a product with queries gives scores.
    pub keys: Panels,
    /// `[length, head_dim]`: a product with probabilities gives the output.
    pub values: Panels,
}

/// One layer on a device, `[kv_heads, length, head_dim]` each.
#[derive(Clone)]
pub struct LayerKv {
    pub keys: Tensor,
    pub values: Tensor,
}

impl HeadKv {
    /// Room for `length` tokens, in all layers and heads.
    pub fn zeros(config: &Config, length: usize) -> Vec<Self> {
        let head =
            || HeadKv { keys: Panels::zeros(config.head_dim, length), values: Panels::zeros(length, config.head_dim) };
        (0..config.layers * config.kv_heads).map(|_| head()).collect()
    }

    /// Stores a token's keys and values (as wide as all of a layer's `heads` together) at `index`.
    pub fn store(heads: &mut [Self], index: usize, keys: &[f32], values: &[f32]) {
        let dim = keys.len() / heads.len();
        for ((head, key), value) in heads.iter_mut().zip(keys.chunks_exact(dim)).zip(values.chunks_exact(dim)) {
            head.keys.set_column(index, key);
            head.values.set_row(index, value);
        }
    }
}

impl Segment {
    pub(super) fn packed(length: usize, heads: Vec<HeadKv>, config: &Config) -> Self {
        Self { length, kv: SegmentKv::Packed { heads, kv_heads: config.kv_heads } }
    }

    pub(super) fn tensors(length: usize, layers: Vec<LayerKv>) -> Self {
        Self { length, kv: SegmentKv::Tensors(layers) }
    }

    /// Bytes of a segment of `length` tokens on the CPU.
    pub fn bytes(config: &Config, length: usize) -> usize {
        let head = Panels::bytes(config.head_dim, length) + Panels::bytes(length, config.head_dim);
        config.layers * config.kv_heads * head
    }

    /// Tokens.
    pub fn length(&self) -> usize {
        self.length
    }

    pub(super) fn head(&self, layer: usize, head: usize) -> &HeadKv {
        match &self.kv {
            SegmentKv::Packed { heads, kv_heads } => &heads[layer * kv_heads + head],
            SegmentKv::Tensors(_) => unreachable!("{OTHERS}"),
        }
    }

    pub(super) fn layer(&self, layer: usize) -> &LayerKv {
        match &self.kv {
            SegmentKv::Tensors(layers) => &layers[layer],
            SegmentKv::Packed { .. } => unreachable!("{OTHERS}"),
        }
    }
}

const OTHERS: &str = "a segment is used by the network that read it";

/// A prompt and what its beams have generated so far. A generated token has a *slot*; a beam is a path of slots, so
/// beams that share a beginning share its keys and values, and reordering beams copies nothing.
pub struct Branches<'a> {
    /// The prompt, in order: the shared beginning, then the rest.
    prompt: Vec<&'a Segment>,
    layers: Vec<SlotKv>,
    /// The same on a device; `None` before the first token.
    tensors: Vec<Option<LayerKv>>,
    slots: usize,
}

/// Keys and values of one layer's slots, `[slots, kv_heads × head_dim]` each.
pub(super) struct SlotKv {
    pub keys: Vec<f32>,
    pub values: Vec<f32>,
}

impl<'a> Branches<'a> {
    pub fn new(config: &Config, prompt: impl IntoIterator<Item = &'a Segment>) -> Self {
        Self::with_room(config, prompt, 0)
    }

    /// Takes the memory of `slots` generated tokens at once; further ones grow it.
    pub fn with_room(config: &Config, prompt: impl IntoIterator<Item = &'a Segment>, slots: usize) -> Self {
        let room = slots * config.kv_width();
        let layer = || SlotKv { keys: Vec::with_capacity(room), values: Vec::with_capacity(room) };
        Self {
            prompt: prompt.into_iter().collect(),
            layers: (0..config.layers).map(|_| layer()).collect(),
            tensors: vec![None; config.layers],
            slots: 0,
        }
    }

    /// Bytes of `slots` generated tokens.
    pub fn bytes(config: &Config, slots: usize) -> usize {
        2 * config.layers * slots * config.kv_width() * size_of::<f32>()
    }

    pub fn prompt(&self) -> &[&'a Segment] {
        &self.prompt
    }

    pub fn prompt_length(&self) -> usize {
        self.prompt.iter().map(|s| s.length()).sum()
    }

    /// The next slot to be given out.
    pub fn slots(&self) -> usize {
        self.slots
    }

    pub(super) fn layer(&self, layer: usize) -> &SlotKv {
        &self.layers[layer]
    }

    pub(super) fn layer_mut(&mut self, layer: usize) -> &mut SlotKv {
        &mut self.layers[layer]
    }

    pub(super) fn tensors_mut(&mut self, layer: usize) -> &mut Option<LayerKv> {
        &mut self.tensors[layer]
    }

    pub(super) fn add_slots(&mut self, count: usize) {
        self.slots += count;
    }
}
