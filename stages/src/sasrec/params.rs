//! The parameters of `sasrec`, and what they mean to the engine.

use grlm_nn::sasrec::{Activation, Architecture, Loss, Scoring, Training};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{ParamIssue, artifact::Split};

/// What next-item training minimises.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum LossKind {
    /// Cross-entropy over all items.
    #[default]
    Full,
    /// Cross-entropy over the target and `negatives` random items; for large catalogues.
    Sampled,
}

/// How a history's state scores an item.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ScoringKind {
    /// By cosine with the item's embedding, divided by `temperature`.
    #[default]
    Cosine,
    /// By dot product, as in the original paper.
    Dot,
}

/// The non-linearity of the feed-forward blocks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ActivationKind {
    #[default]
    Gelu,
    Relu,
}

/// The learning rate after the warm-up.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum LrSchedule {
    #[default]
    Constant,
    /// Down to 0 along half a cosine.
    Cosine,
}

/// Parameters of `sasrec`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Params {
    /// Width of embeddings and hidden states.
    pub hidden: usize,
    /// Transformer blocks.
    pub layers: usize,
    /// Attention heads; must divide `hidden`.
    pub heads: usize,
    /// Inner width of the feed-forward blocks.
    pub feed_forward: usize,
    /// Items of a history that the model looks at: the last ones.
    pub max_length: usize,
    /// The non-linearity of the feed-forward blocks.
    pub activation: ActivationKind,
    /// How a history's state scores an item.
    pub scoring: ScoringKind,
    /// For `scoring: cosine`: lower is sharper.
    pub temperature: f32,
    /// What training minimises.
    pub loss: LossKind,
    /// For `loss: sampled`: random items a batch, shared by all its users.
    pub negatives: usize,
    /// For `loss: sampled`: take the logarithm of how often an item is drawn off its score, so that the loss estimates
    /// the full one.
    pub log_q: bool,
    /// Users in a batch.
    pub batch: usize,
    /// Leaves what the user already had out of the loss, as `exclude_seen` leaves it out of the rankings. Better for
    /// rankings that do, worse for those that do not.
    pub mask_seen: bool,
    /// Adam's learning rate.
    pub lr: f32,
    /// Steps over which the learning rate rises from 0.
    pub warmup_steps: u64,
    /// How the learning rate goes on after that, over `epochs`.
    pub schedule: LrSchedule,
    /// Decoupled weight decay.
    pub weight_decay: f32,
    /// Dropout on embeddings, attention outputs and feed-forward blocks.
    pub dropout: f32,
    /// Dropout on attention probabilities.
    pub attention_dropout: f32,
    /// How much of the past an exponential moving average of the weights keeps at each step; the average is what is
    /// validated and used. 0 turns it off.
    pub averaging: f32,
    /// Epochs at most.
    pub epochs: u64,
    /// Epochs between two looks at validation.
    pub evaluate_every: u64,
    /// Looks at validation without a better NDCG@10 after which training stops; the best model is kept.
    pub patience: u64,
    /// After validation has fixed the number of steps, trains a second model for as many steps on the validation items
    /// too. It is the one that ranks the test items; the report has the figures of both.
    pub refit: bool,
    /// Leaves out what the user had before the target, in validation and in rankings.
    pub exclude_seen: bool,
    /// The held-out items to rank for; `valid` too where a later stage tunes on it.
    pub splits: Vec<Split>,
    /// Items in each user's list.
    pub top_n: usize,
    /// Similar items of each item.
    pub similar: usize,
    /// Seed of the parameters' first values, the order of users, dropout and negatives.
    pub seed: u64,
}

impl Default for Params {
    fn default() -> Self {
        Self {
            hidden: 64,
            layers: 2,
            heads: 1,
            feed_forward: 64,
            max_length: 50,
            activation: ActivationKind::Gelu,
            scoring: ScoringKind::Cosine,
            temperature: 0.08,
            loss: LossKind::Full,
            negatives: 512,
            log_q: false,
            batch: 256,
            mask_seen: false,
            lr: 1e-3,
            warmup_steps: 0,
            schedule: LrSchedule::Constant,
            weight_decay: 0.0,
            dropout: 0.5,
            attention_dropout: 0.5,
            averaging: 0.998,
            epochs: 60,
            evaluate_every: 2,
            patience: 3,
            refit: false,
            exclude_seen: true,
            splits: vec![Split::Test],
            top_n: 50,
            similar: 20,
            seed: 42,
        }
    }
}

impl Params {
    pub fn architecture(&self, items: usize) -> Architecture {
        Architecture {
            items,
            hidden: self.hidden,
            layers: self.layers,
            heads: self.heads,
            feed_forward: self.feed_forward,
            max_length: self.max_length,
            activation: match self.activation {
                ActivationKind::Gelu => Activation::Gelu,
                ActivationKind::Relu => Activation::Relu,
            },
            scoring: match self.scoring {
                ScoringKind::Dot => Scoring::Dot,
                ScoringKind::Cosine => Scoring::Cosine { temperature: self.temperature },
            },
        }
    }

    /// How a model is trained, given the number of steps that an epoch has.
    pub fn training(&self, steps_per_epoch: usize) -> Training {
        let steps = self.epochs.saturating_mul(steps_per_epoch as u64);
        Training {
            loss: match self.loss {
                LossKind::Full => Loss::Full,
                LossKind::Sampled => Loss::Sampled { negatives: self.negatives, log_q: self.log_q },
            },
            exclude_seen: self.mask_seen,
            batch: self.batch,
            learning_rate: self.lr,
            warmup_steps: self.warmup_steps,
            decay_steps: (self.schedule == LrSchedule::Cosine).then_some(steps),
            weight_decay: self.weight_decay,
            dropout: self.dropout,
            attention_dropout: self.attention_dropout,
            averaging: self.averaging,
            seed: self.seed,
        }
    }

    pub fn check(&self) -> Vec<ParamIssue> {
        let mut issues: Vec<ParamIssue> = [self.architecture(1).check(), self.training(1).check()]
            .into_iter()
            .filter_map(|checked| checked.err().map(|e| ParamIssue::new("", e.to_string())))
            .collect();
        let counts = [
            ("epochs", self.epochs == 0),
            ("evaluate_every", self.evaluate_every == 0),
            ("patience", self.patience == 0),
            ("top_n", self.top_n == 0),
            ("similar", self.similar == 0),
        ];
        issues.extend(
            counts.into_iter().filter(|(_, zero)| *zero).map(|(name, _)| ParamIssue::new(name, "must be at least 1")),
        );
        if self.splits.is_empty() {
            issues.push(ParamIssue::new("splits", "nothing to rank for").help("give `test`, `valid` or both"));
        }
        if self.splits.iter().enumerate().any(|(i, split)| self.splits[..i].contains(split)) {
            issues.push(ParamIssue::new("splits", "a split stands twice"));
        }
        issues
    }
}
