//! What a SASRec model and its training are made of; read from `config.json`, written into it.
//!
//! Limits are checked here once; the rest of the module relies on them.

use serde::{Deserialize, Serialize};

use super::SasrecError;

/// The shape of a model, and how it scores items.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Architecture {
    /// Number of items, which are numbered from 0.
    pub items: usize,
    pub hidden: usize,
    pub layers: usize,
    pub heads: usize,
    /// Inner width of the feed-forward blocks.
    pub feed_forward: usize,
    /// Items of a history that the model looks at: the last ones.
    pub max_length: usize,
    pub activation: Activation,
    pub scoring: Scoring,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    /// In its tanh form.
    Gelu,
    Relu,
}

/// How the last hidden state of a history scores an item's embedding.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Scoring {
    /// Their dot product.
    Dot,
    /// Their cosine, divided by a temperature.
    Cosine { temperature: f32 },
}

/// What next-item training minimises.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Loss {
    /// Cross-entropy over all items.
    Full,
    /// Cross-entropy over the target and items drawn uniformly, once a batch for all its positions.
    Sampled {
        negatives: usize,
        /// Take the logarithm of how often an item is drawn off its score, so that the loss estimates the full one.
        log_q: bool,
    },
}

/// How a model is trained.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Training {
    pub loss: Loss,
    /// Leave the items that a user already had out of the loss, except where one is the target: for rankings that
    /// leave them out too.
    pub exclude_seen: bool,
    /// Users in a batch.
    pub batch: usize,
    /// The highest learning rate, reached after `warmup_steps`.
    pub learning_rate: f32,
    pub warmup_steps: u64,
    /// Steps over which the rate falls to 0 along a cosine; `None` keeps it.
    pub decay_steps: Option<u64>,
    /// Decoupled weight decay, on matrices and embeddings.
    pub weight_decay: f32,
    /// Share of embeddings, attention outputs and feed-forward activations that a step leaves out.
    pub dropout: f32,
    /// The same for attention probabilities.
    pub attention_dropout: f32,
    /// Share of the past that an exponential moving average of all parameters keeps at each step; the average is what
    /// is looked at in validation and what results. 0 turns it off.
    pub averaging: f32,
    pub seed: u64,
}

impl Architecture {
    /// # Errors
    /// The first limit that is not kept.
    pub fn check(&self) -> Result<(), SasrecError> {
        let limits = [
            (self.items == 0 || self.items > u32::MAX as usize, "`items` must be between 1 and 4294967295"),
            (self.hidden == 0 || self.hidden > 1 << 14, "`hidden` must be between 1 and 16384"),
            (self.layers > 1 << 8, "`layers` must be at most 256"),
            (self.heads == 0, "`heads` must be at least 1"),
            (self.heads > 0 && !self.hidden.is_multiple_of(self.heads), "`heads` must divide `hidden`"),
            (self.feed_forward == 0 || self.feed_forward > 1 << 16, "`feed_forward` must be between 1 and 65536"),
            (self.max_length == 0 || self.max_length > 1 << 16, "`max_length` must be between 1 and 65536"),
            (
                matches!(self.scoring, Scoring::Cosine { temperature } if !(temperature > 0.0 && temperature.is_finite())),
                "`temperature` must be greater than 0",
            ),
        ];
        first_broken(limits)
    }
}

impl Training {
    /// # Errors
    /// The first limit that is not kept.
    pub fn check(&self) -> Result<(), SasrecError> {
        let share = |p: f32| (0.0..1.0).contains(&p);
        first_broken([
            (self.batch == 0, "`batch` must be at least 1"),
            (!(self.learning_rate > 0.0 && self.learning_rate.is_finite()), "`lr` must be greater than 0"),
            (!(self.weight_decay >= 0.0 && self.weight_decay.is_finite()), "`weight_decay` must not be negative"),
            (!share(self.dropout), "`dropout` must be at least 0 and less than 1"),
            (!share(self.attention_dropout), "`attention_dropout` must be at least 0 and less than 1"),
            (!share(self.averaging), "`averaging` must be at least 0 and less than 1"),
            (matches!(self.loss, Loss::Sampled { negatives: 0, .. }), "`negatives` must be at least 1"),
        ])
    }
}

fn first_broken<const N: usize>(limits: [(bool, &'static str); N]) -> Result<(), SasrecError> {
    match limits.into_iter().find(|(broken, _)| *broken) {
        Some((_, message)) => Err(SasrecError::Config(message.to_owned())),
        None => Ok(()),
    }
}
