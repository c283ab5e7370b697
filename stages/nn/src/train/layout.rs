//! Where each tensor of a Qwen3 lies in one flat array of numbers.
//!
//! Weights, gradients and the optimiser's moments are arrays of this one layout, which keeps clipping, AdamW,
//! checkpoints and exact resume trivial. The order is [`Config::tensors`]'s, in which the matrices of queries, keys and
//! values, and those of gate and up, follow one another: each group is one matrix product.

use std::ops::Range;

use crate::qwen3::Config;

/// A tensor's name (as in Hugging Face files), shape and place.
#[derive(Debug, Clone)]
pub struct Tensor {
    pub name: String,
    pub shape: Vec<usize>,
    pub range: Range<usize>,
}

impl Tensor {
    /// Norm weights are vectors; everything else is a matrix, and decays.
    pub fn is_matrix(&self) -> bool {
        self.shape.len() > 1
    }
}

/// The tensors of one transformer layer.
#[derive(Debug, Clone)]
pub struct LayerRanges {
    pub input_norm: Range<usize>,
    /// Queries, keys and values: `[(heads + 2 · kv_heads) · head_dim, hidden]`.
    pub qkv: Range<usize>,
    pub output: Range<usize>,
    pub q_norm: Range<usize>,
    pub k_norm: Range<usize>,
    pub post_norm: Range<usize>,
    /// Gate and up: `[2 · intermediate, hidden]`.
    pub gate_up: Range<usize>,
    pub down: Range<usize>,
}

/// The layout of a whole model.
#[derive(Debug, Clone)]
pub struct Layout {
    pub tensors: Vec<Tensor>,
    pub embedding: Range<usize>,
    pub layers: Vec<LayerRanges>,
    pub final_norm: Range<usize>,
    /// The same as `embedding` in a tied model.
    pub head: Range<usize>,
    pub len: usize,
}

impl Layout {
    pub fn new(config: &Config) -> Self {
        let mut tensors = Vec::new();
        let mut at = 0;
        for (name, shape) in config.tensors() {
            let size: usize = shape.iter().product();
            tensors.push(Tensor { name, shape, range: at..at + size });
            at += size;
        }
        let find = |name: String| {
            tensors.iter().find(|t| t.name == name).map(|t| t.range.clone()).expect("`Config::tensors` lists it")
        };
        let layers = (0..config.layers)
            .map(|layer| {
                let of = |name: &str| find(format!("model.layers.{layer}.{name}.weight"));
                LayerRanges {
                    input_norm: of("input_layernorm"),
                    qkv: joined(&[of("self_attn.q_proj"), of("self_attn.k_proj"), of("self_attn.v_proj")]),
                    output: of("self_attn.o_proj"),
                    q_norm: of("self_attn.q_norm"),
                    k_norm: of("self_attn.k_norm"),
                    post_norm: of("post_attention_layernorm"),
                    gate_up: joined(&[of("mlp.gate_proj"), of("mlp.up_proj")]),
                    down: of("mlp.down_proj"),
                }
            })
            .collect();
        let embedding = find("model.embed_tokens.weight".into());
        let head = if config.tied { embedding.clone() } else { find("lm_head.weight".into()) };
        Self { embedding, layers, final_norm: find("model.norm.weight".into()), head, len: at, tensors }
    }
}

/// One range over tensors that follow one another.
fn joined(ranges: &[Range<usize>]) -> Range<usize> {
    assert!(ranges.windows(2).all(|w| w[0].end == w[1].start), "`Config::tensors` keeps these together");
    ranges[0].start..ranges[ranges.len() - 1].end
}
