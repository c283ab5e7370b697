//! Low-rank adapters (LoRA, Hu et al. 2021): `y = W·x + α/r · B·A·dropout(x)` beside frozen matrices.
//!
//! Adapters of all layers lie in one flat array, as weights do. `A` starts as in PEFT (uniform, as
//! `kaiming_uniform(√5)`), `B` at zero, so that an untrained adapter changes nothing.

use std::ops::Range;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::{
    blocks::{add_dropped, apply_dropout},
    kernels::Dropout,
    layout::{Layout, Tensor},
    matrix::{Threads, View, matmul, matmul_columns, view},
};
use crate::qwen3::Config;

/// The matrices of a layer that can have an adapter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Target {
    Query,
    Key,
    Value,
    Output,
    Gate,
    Up,
    Down,
}

impl Target {
    pub const ALL: [Self; 7] = [Self::Query, Self::Key, Self::Value, Self::Output, Self::Gate, Self::Up, Self::Down];

    /// Hugging Face's name of the module.
    pub fn module(self) -> &'static str {
        match self {
            Self::Query => "q_proj",
            Self::Key => "k_proj",
            Self::Value => "v_proj",
            Self::Output => "o_proj",
            Self::Gate => "gate_proj",
            Self::Up => "up_proj",
            Self::Down => "down_proj",
        }
    }

    /// Numbers that adapters of this rank beside it have, in all layers.
    pub fn numbers(self, config: &Config, rank: usize) -> usize {
        let (inner, outer, _) = self.shape(config);
        config.layers * rank * (inner + outer)
    }

    fn block(self) -> &'static str {
        match self {
            Self::Query | Self::Key | Self::Value | Self::Output => "self_attn",
            Self::Gate | Self::Up | Self::Down => "mlp",
        }
    }

    /// `(in, out, first column within the joined product)`.
    fn shape(self, config: &Config) -> (usize, usize, usize) {
        let (h, q, kv, f) = (config.hidden_size, config.query_width(), config.kv_width(), config.intermediate_size);
        match self {
            Self::Query => (h, q, 0),
            Self::Key => (h, kv, q),
            Self::Value => (h, kv, q + kv),
            Self::Output => (q, h, 0),
            Self::Gate => (h, f, 0),
            Self::Up => (h, f, f),
            Self::Down => (f, h, 0),
        }
    }
}

/// Settings of the adapters.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraOptions {
    pub rank: usize,
    pub alpha: f64,
    /// Dropout of what goes into an adapter.
    pub dropout: f32,
    pub targets: Vec<Target>,
    pub seed: u64,
}

/// One adapter.
#[derive(Debug, Clone)]
pub struct Adapter {
    a: Range<usize>,
    b: Range<usize>,
    inner: usize,
    outer: usize,
    /// Where its outputs begin in the rows of a joined product.
    column: usize,
    /// Where dropout is applied: a number of its own.
    site: u64,
}

/// The adapters of one layer, by the product that they add to.
#[derive(Debug, Clone, Default)]
pub struct LayerAdapters {
    pub qkv: Vec<Adapter>,
    pub output: Vec<Adapter>,
    pub gate_up: Vec<Adapter>,
    pub down: Vec<Adapter>,
}

/// The adapters of a model.
pub struct Adapters {
    rank: usize,
    scale: f32,
    dropout: f32,
    pub tensors: Vec<Tensor>,
    pub layers: Vec<LayerAdapters>,
    pub values: Vec<f32>,
    /// The matrix that each adapter is beside, as ranges of the weights.
    merged_into: Vec<(Range<usize>, Adapter)>,
}

/// Numbers that adapters keep or borrow while a batch is computed.
#[derive(Default)]
pub struct Scratch {
    dropped: Vec<f32>,
    low: Vec<f32>,
    back: Vec<f32>,
}

impl Adapters {
    pub fn new(config: &Config, layout: &Layout, options: &LoraOptions) -> Self {
        let mut random = ChaCha8Rng::seed_from_u64(options.seed);
        let (mut tensors, mut values, mut layers, mut merged_into) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for layer in 0..config.layers {
            let mut adapters = LayerAdapters::default();
            for (number, target) in Target::ALL.into_iter().enumerate().filter(|(_, t)| options.targets.contains(t)) {
                let (inner, outer, column) = target.shape(config);
                let name = format!("model.layers.{layer}.{}.{}", target.block(), target.module());
                let bound = 1.0 / (inner as f32).sqrt();
                let a = values.len()..values.len() + options.rank * inner;
                values.extend((0..a.len()).map(|_| random.random_range(-bound..bound)));
                let b = values.len()..values.len() + outer * options.rank;
                values.resize(b.end, 0.0);
                tensors.push(Tensor {
                    name: format!("{name}.lora_A.weight"),
                    shape: vec![options.rank, inner],
                    range: a.clone(),
                });
                tensors.push(Tensor {
                    name: format!("{name}.lora_B.weight"),
                    shape: vec![outer, options.rank],
                    range: b.clone(),
                });
                let site = 1 << 32 | (layer * Target::ALL.len() + number) as u64;
                let adapter = Adapter { a, b, inner, outer, column, site };
                if let Some(matrix) = layout.tensors.iter().find(|t| t.name == format!("{name}.weight")) {
                    merged_into.push((matrix.range.clone(), adapter.clone()));
                }
                match target {
                    Target::Query | Target::Key | Target::Value => adapters.qkv.push(adapter),
                    Target::Output => adapters.output.push(adapter),
                    Target::Gate | Target::Up => adapters.gate_up.push(adapter),
                    Target::Down => adapters.down.push(adapter),
                }
            }
            layers.push(adapters);
        }
        let scale = (options.alpha / options.rank as f64) as f32;
        Self { rank: options.rank, scale, dropout: options.dropout, tensors, layers, values, merged_into }
    }

    fn site(&self, adapter: &Adapter, seed: Option<u64>) -> Option<Dropout> {
        seed.and_then(|seed| Dropout::new(self.dropout, seed, adapter.site))
    }

    /// Adds the adapters' part of a product: `out` is `[tokens, width]`, `x` `[tokens, in]`. `seed` of dropout, none
    /// outside training.
    pub fn forward(
        &self,
        adapters: &[Adapter],
        out: &mut [f32],
        width: usize,
        x: &[f32],
        seed: Option<u64>,
        scratch: &mut Scratch,
    ) {
        for adapter in adapters {
            let tokens = x.len() / adapter.inner;
            let x = self.input(adapter, x, seed, &mut scratch.dropped);
            scratch.low.resize(tokens * self.rank, 0.0);
            let (a, b) = (self.a(adapter), self.b(adapter));
            matmul(&mut scratch.low, view(x, tokens, adapter.inner), a.t(), 1.0, false, Threads::Pool);
            let low = view(&scratch.low, tokens, self.rank);
            matmul_columns(out, width, adapter.column, low, b.t(), self.scale, Threads::Pool);
        }
    }

    /// Given `d_out`, the gradient of the product, adds to `dx` and to the adapters' `gradients`.
    #[expect(clippy::too_many_arguments, reason = "the mirror image of `forward`, with two more gradients")]
    pub fn backward(
        &self,
        adapters: &[Adapter],
        d_out: &[f32],
        width: usize,
        x: &[f32],
        dx: &mut [f32],
        gradients: &mut [f32],
        seed: Option<u64>,
        scratch: &mut Scratch,
    ) {
        for adapter in adapters {
            let tokens = x.len() / adapter.inner;
            let site = self.site(adapter, seed);
            let (a, b) = (self.a(adapter), self.b(adapter));
            let d_out = view(d_out, tokens, width).columns(adapter.column, adapter.outer);
            let x = self.input(adapter, x, seed, &mut scratch.dropped);
            let x = view(x, tokens, adapter.inner);
            scratch.low.resize(tokens * self.rank, 0.0);
            matmul(&mut scratch.low, x, a.t(), 1.0, false, Threads::Pool);
            let low = view(&scratch.low, tokens, self.rank);
            matmul(&mut gradients[adapter.b.clone()], d_out.t(), low, self.scale, true, Threads::Pool);
            matmul(&mut scratch.low, d_out, b, self.scale, false, Threads::Pool);
            let d_low = view(&scratch.low, tokens, self.rank);
            matmul(&mut gradients[adapter.a.clone()], d_low.t(), x, 1.0, true, Threads::Pool);
            match site {
                None => matmul(dx, d_low, a, 1.0, true, Threads::Pool),
                Some(_) => {
                    scratch.back.resize(tokens * adapter.inner, 0.0);
                    matmul(&mut scratch.back, d_low, a, 1.0, false, Threads::Pool);
                    add_dropped(dx, &scratch.back, site);
                }
            }
        }
    }

    fn input<'a>(&self, adapter: &Adapter, x: &'a [f32], seed: Option<u64>, dropped: &'a mut Vec<f32>) -> &'a [f32] {
        match self.site(adapter, seed) {
            None => x,
            site => {
                dropped.resize(x.len(), 0.0);
                apply_dropout(dropped, x, site);
                dropped
            }
        }
    }

    fn a(&self, adapter: &Adapter) -> View<'_> {
        view(&self.values[adapter.a.clone()], self.rank, adapter.inner)
    }

    fn b(&self, adapter: &Adapter) -> View<'_> {
        view(&self.values[adapter.b.clone()], adapter.outer, self.rank)
    }

    /// Adds every adapter to the matrix that it is beside: a model without adapters that computes the same.
    pub fn merge_into(&self, weights: &mut [f32]) {
        for (matrix, adapter) in &self.merged_into {
            matmul(&mut weights[matrix.clone()], self.b(adapter), self.a(adapter), self.scale, true, Threads::Pool);
        }
    }
}
