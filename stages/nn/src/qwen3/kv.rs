//! Keys and values: of a beginning that prompts share, and of many prompts with what their beams have generated.

use candle_core::Tensor;

use super::{Config, store::Store};
use crate::cpu::Panels;

/// Keys and values of tokens that any number of prompts begin with, for all layers. Read-only.
pub struct Segment {
    length: usize,
    kv: SegmentKv,
}

/// As the network that read the segment has them.
enum SegmentKv {
    Packed(PackedKv),
    /// Per layer, `[kv_heads, length, head_dim]`.
    Tensors(Vec<LayerKv>),
}

/// All layers of a run of tokens, packed so that attention over it is one product.
pub struct PackedKv {
    /// Per layer and head of keys and values, in that order.
    heads: Vec<HeadKv>,
    kv_heads: usize,
}

/// One head of one layer.
pub struct HeadKv {
    /// `[head_dim, length]`: a product with queries gives scores.
    pub keys: Panels,
    /// `[length, head_dim]`: a product with probabilities gives the output.
    pub values: Panels,
}

/// One layer on a device.
pub struct LayerKv {
    pub keys: Tensor,
    pub values: Tensor,
}

impl HeadKv {
    /// Stores a token's keys and values (as wide as all of a layer's `heads` together) at `index`.
    pub fn store(heads: &mut [Self], index: usize, keys: &[f32], values: &[f32]) {
        let dim = keys.len() / heads.len();
        for ((head, key), value) in heads.iter_mut().zip(keys.chunks_exact(dim)).zip(values.chunks_exact(dim)) {
            head.keys.set_column(index, key);
            head.values.set_row(index, value);
        }
    }
}

impl PackedKv {
    /// Room for `length` tokens.
    pub fn zeros(config: &Config, length: usize) -> Self {
        let head =
            || HeadKv { keys: Panels::zeros(config.head_dim, length), values: Panels::zeros(length, config.head_dim) };
        Self { heads: (0..config.layers * config.kv_heads).map(|_| head()).collect(), kv_heads: config.kv_heads }
    }

    pub fn head(&self, layer: usize, head: usize) -> &HeadKv {
        &self.heads[layer * self.kv_heads + head]
    }

    pub fn layer_mut(&mut self, layer: usize) -> &mut [HeadKv] {
        &mut self.heads[layer * self.kv_heads..(layer + 1) * self.kv_heads]
    }
}

impl Segment {
    pub(super) fn packed(length: usize, kv: PackedKv) -> Self {
        Self { length, kv: SegmentKv::Packed(kv) }
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
            SegmentKv::Packed(kv) => kv.head(layer, head),
            SegmentKv::Tensors(_) => unreachable!("{OTHERS}"),
        }
    }

    pub(super) fn layer(&self, layer: usize) -> &LayerKv {
        match &self.kv {
            SegmentKv::Tensors(layers) => &layers[layer],
            SegmentKv::Packed(_) => unreachable!("{OTHERS}"),
        }
    }
}

pub(super) const OTHERS: &str = "keys and values are used by the network that made them";

/// Prompts and what their beams have generated so far. A generated token has a *slot*, counted for each prompt from 0; a
/// beam is a path of slots, so beams that share a beginning share its keys and values, and reordering beams copies
/// nothing.
pub struct Branches<'a> {
    /// What stands before every prompt.
    pub(super) prefix: Option<&'a Segment>,
    pub(super) kv: BranchesKv,
}

/// As the network that computes them has them.
pub(super) enum BranchesKv {
    Packed(PackedPrompts),
    Tensors(Store),
}

/// Prompts on the CPU.
pub(super) struct PackedPrompts {
    pub prompts: Vec<PackedPrompt>,
    /// Generated tokens of a prompt that memory is taken for at once; further ones grow it.
    pub slots: usize,
}

pub(super) struct PackedPrompt {
    pub extent: Extent,
    pub own: PackedKv,
    /// Per layer.
    pub layers: Vec<SlotKv>,
}

/// Keys and values of one layer's slots, `[slots, kv_heads × head_dim]` each.
pub(super) struct SlotKv {
    pub keys: Vec<f32>,
    pub values: Vec<f32>,
}

/// How many tokens of a prompt there are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Extent {
    /// Its own, behind the prefix.
    pub length: usize,
    /// Generated ones.
    pub slots: usize,
}

/// What memory is taken for before prompts are read.
#[derive(Debug, Clone, Copy)]
pub struct Room {
    pub prompts: usize,
    /// Tokens of the longest prompt.
    pub longest: usize,
    /// Tokens that may be generated for one prompt; more of them grow it.
    pub slots: usize,
}

impl Room {
    /// For these prompts.
    pub fn of(prompts: &[&[u32]], slots: usize) -> Self {
        Self { prompts: prompts.len(), longest: prompts.iter().map(|tokens| tokens.len()).max().unwrap_or(0), slots }
    }
}

impl PackedPrompt {
    pub fn with_room(config: &Config, length: usize, slots: usize) -> Self {
        let room = slots * config.kv_width();
        let layer = || SlotKv { keys: Vec::with_capacity(room), values: Vec::with_capacity(room) };
        Self {
            extent: Extent { length, slots: 0 },
            own: PackedKv::zeros(config, length),
            layers: (0..config.layers).map(|_| layer()).collect(),
        }
    }
}

impl Branches<'_> {
    /// Bytes of `slots` generated tokens on the CPU.
    pub fn bytes(config: &Config, slots: usize) -> usize {
        2 * config.layers * slots * config.kv_width() * size_of::<f32>()
    }

    /// The next slot of a prompt to be given out.
    pub fn slots(&self, prompt: usize) -> usize {
        self.extent(prompt).slots
    }

    /// Tokens of a prompt, with those of the prefix.
    pub(super) fn prompt_length(&self, prompt: usize) -> usize {
        self.prefix_length() + self.extent(prompt).length
    }

    pub(super) fn prefix_length(&self) -> usize {
        self.prefix.map_or(0, Segment::length)
    }

    fn extent(&self, prompt: usize) -> Extent {
        match &self.kv {
            BranchesKv::Packed(kv) => kv.prompts[prompt].extent,
            BranchesKv::Tensors(store) => store.extent(prompt),
        }
    }
}
