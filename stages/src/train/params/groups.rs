//! Groups of parameters of `train`: the shape of a new model, LoRA, validation, LlamaFactory.

use std::collections::BTreeMap;

use grlm_nn::qwen3::Config;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::choices::{Deepspeed, LoraTarget, Precision};

/// The shape of a model from scratch: a Qwen3.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Architecture {
    /// Width of embeddings and hidden states.
    pub hidden: usize,
    /// Inner width of the gated blocks.
    pub intermediate: usize,
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Heads of keys and values; must divide `heads`.
    pub kv_heads: usize,
    /// Width of a head; even.
    pub head_dim: usize,
    /// Tokens at most, where a tokenizer is learned on the samples; a vocabulary of words is as large as it is.
    pub vocabulary: usize,
    /// Whether the output head is the embedding matrix.
    pub tied: bool,
    /// Base of the rotary positions.
    pub rope_theta: f64,
    /// Standard deviation of the first weights.
    pub init_std: f64,
}

impl Default for Architecture {
    fn default() -> Self {
        Self {
            hidden: 128,
            intermediate: 384,
            layers: 4,
            heads: 4,
            kv_heads: 4,
            head_dim: 32,
            vocabulary: 8192,
            tied: true,
            rope_theta: 10_000.0,
            init_std: 0.02,
        }
    }
}

impl Architecture {
    pub fn config(&self, vocab_size: usize, max_positions: usize) -> Config {
        Config {
            vocab_size,
            hidden_size: self.hidden,
            intermediate_size: self.intermediate,
            layers: self.layers,
            heads: self.heads,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            max_positions,
            rope_theta: self.rope_theta,
            rms_norm_eps: 1e-6,
            tied: self.tied,
            bos_token: None,
            eos_tokens: Vec::new(),
            pad_token: None,
            initializer_range: self.init_std,
        }
    }
}

/// Settings of `method: lora`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Lora {
    pub rank: usize,
    /// Adapters are scaled by `alpha / rank`.
    pub alpha: f64,
    /// Dropout of what goes into an adapter.
    pub dropout: f32,
    /// The matrices that get an adapter.
    pub targets: Vec<LoraTarget>,
}

impl Default for Lora {
    fn default() -> Self {
        Self { rank: 16, alpha: 32.0, dropout: 0.0, targets: LoraTarget::ALL.to_vec() }
    }
}

/// What is looked at beside the training loss, and when. With the inputs `holdout` and `id2meta` it is each user's
/// validation item; with the input `valid`, those samples; with `share`, samples that are then not trained on.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Validation {
    /// Steps between two looks; an epoch's worth if not given.
    pub every: Option<u64>,
    /// Users (or samples) at most, chosen by `seed`.
    pub users: usize,
    /// Share of the samples that is held out where neither `holdout` nor `valid` is connected.
    pub share: f64,
    /// Looks without a better value after which training stops; the best model is kept in any case.
    pub patience: Option<u64>,
    /// Choose the best model by recall@10 of the held-out items, found by constrained beam search, and not by loss.
    pub recall: bool,
    /// Beams of that search.
    pub beams: usize,
}

impl Default for Validation {
    fn default() -> Self {
        Self { every: None, users: 1000, share: 0.0, patience: None, recall: false, beams: 20 }
    }
}

/// Settings of `backend: llamafactory`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Llamafactory {
    /// The program, by name or path.
    pub command: String,
    /// The type in which it trains and saves.
    pub precision: Precision,
    /// How the model is shared out over GPUs.
    pub deepspeed: Deepspeed,
    /// Several samples a row, without attention from one to another (LlamaFactory's `neat_packing`).
    pub packing: bool,
    /// Steps between two lines of the curve.
    pub logging_steps: u64,
    /// Further arguments of LlamaFactory, as they stand in its files.
    pub extra: BTreeMap<String, Value>,
}

impl Default for Llamafactory {
    fn default() -> Self {
        Self {
            command: "llamafactory-cli".into(),
            precision: Precision::Bf16,
            deepspeed: Deepspeed::None,
            packing: false,
            logging_steps: 10,
            extra: BTreeMap::new(),
        }
    }
}
