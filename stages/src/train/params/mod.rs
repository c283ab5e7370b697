//! The parameters of `train`: what they are called, what they default to, and which make no sense together.

use std::{collections::BTreeMap, path::Path};

use grlm_nn::{
    qwen3::Config,
    train::{AdamWOptions, Decay, LoraOptions, Stored, memory},
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::llamafactory;
use crate::{Compat, ParamIssue, artifact::ChatTemplate, generate::Normalize, model_folder};

mod choices;
mod groups;

pub use choices::{Backend, DecayKind, Deepspeed, Method, Precision, SavedType, TemplateChoice, TokensChoice};
pub use groups::Validation;
use groups::{Architecture, Llamafactory, Lora};

/// Parameters of `train`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Params {
    /// What is trained.
    pub method: Method,
    /// For `full` and `lora`: the model to start from, a folder or a repository of the hub (`Qwen/Qwen3-0.6B`, with
    /// `@REVISION` if need be). Without it, the input `model`.
    pub model: Option<String>,
    /// Who trains.
    pub backend: Backend,
    /// The shape of a model from scratch.
    pub architecture: Architecture,
    /// Settings of `method: lora`.
    pub lora: Lora,
    /// Settings of `backend: llamafactory`. There `batch` is one GPU's.
    pub llamafactory: Llamafactory,
    /// What a token is.
    pub tokens: TokensChoice,
    /// What stands around a sample.
    pub template: TemplateChoice,
    /// Tokens of the longest sample; longer ones are cut so that their answer stays.
    pub max_length: usize,
    /// How often an epoch takes the samples of each input, by the input's name: 0.5 takes a random half of them, 2 all
    /// of them twice. Inputs that are not named count 1.
    pub weights: BTreeMap<String, f64>,
    /// Learn to write the prompt too, and not only the response.
    pub train_on_prompt: bool,
    /// Times that the samples are gone through.
    pub epochs: f64,
    /// Optimiser steps, in place of `epochs`.
    pub steps: Option<u64>,
    /// Samples of a pass; they are packed, and never see each other.
    pub batch: usize,
    /// Passes of an optimiser step.
    pub accumulation: usize,
    /// The learning rate's peak: by default 1e-3 from scratch, 1e-4 for `full`, 2e-4 for `lora`.
    pub lr: Option<f64>,
    /// The learning rate after the warm-up.
    pub schedule: DecayKind,
    /// Share of the steps in which the learning rate rises.
    pub warmup: f64,
    /// The last step's share of `lr`.
    pub lr_floor: f64,
    /// Decoupled weight decay, on matrices only.
    pub weight_decay: f64,
    pub beta1: f64,
    pub beta2: f64,
    pub epsilon: f64,
    /// Gradients with a greater norm are scaled down to it; 0 clips nothing.
    pub clip: f64,
    /// Dropout of embeddings and residual branches.
    pub dropout: f32,
    /// Among what a word's loss is taken. `allowed` needs `id2meta` and a compact SFT file; rank with the same
    /// `normalize` in `generate`.
    pub normalize: Normalize,
    /// From scratch: keeps every embedding at length 1, so that a tied head scores words by cosine, as `sasrec` scores
    /// items. Frequent words are then not favoured for their length.
    pub unit_embeddings: bool,
    /// How much of the past an exponential moving average of the weights keeps at each step; the average is what is
    /// validated and saved. 0 turns it off.
    pub averaging: f32,
    /// Compute layers again in the backward pass in place of keeping them: less memory, about a third more work.
    pub gradient_checkpointing: bool,
    /// What is looked at beside the training loss.
    pub validation: Validation,
    /// Steps between two checkpoints to go on from after a kill.
    pub save_every: u64,
    /// The type of the saved weights, `f32` by default; training itself computes in f32. LlamaFactory saves what it
    /// trains in.
    pub save_as: Option<SavedType>,
    /// How `sft_rec` wrote the histories.
    pub compat: Compat,
    /// Seed of first weights, order and dropout.
    pub seed: u64,
}

impl Default for Params {
    fn default() -> Self {
        let optimizer = AdamWOptions::default();
        Self {
            method: Method::Scratch,
            model: None,
            backend: Backend::Grlm,
            architecture: Architecture::default(),
            lora: Lora::default(),
            llamafactory: Llamafactory::default(),
            tokens: TokensChoice::Auto,
            template: TemplateChoice::Auto,
            max_length: 1024,
            weights: BTreeMap::new(),
            train_on_prompt: false,
            epochs: 3.0,
            steps: None,
            batch: 32,
            accumulation: 1,
            lr: None,
            schedule: DecayKind::Cosine,
            warmup: 0.1,
            lr_floor: 0.0,
            weight_decay: optimizer.weight_decay,
            beta1: optimizer.beta1,
            beta2: optimizer.beta2,
            epsilon: optimizer.epsilon,
            clip: optimizer.clip,
            dropout: 0.0,
            normalize: Normalize::Full,
            unit_embeddings: false,
            averaging: 0.0,
            gradient_checkpointing: false,
            validation: Validation::default(),
            save_every: 200,
            save_as: None,
            compat: Compat::Fixed,
            seed: 42,
        }
    }
}

/// Samples of a step at most, so that counting them never overflows.
const MOST_SAMPLES: usize = 10_000_000;
/// Positions at most: the angles of all of them are kept.
const MOST_POSITIONS: usize = 1 << 18;
/// Tokens of the largest pass, unless a single sample is longer: more are computed in parts.
pub const PASS_TOKENS: usize = 8192;

impl Params {
    pub fn learning_rate(&self) -> f64 {
        self.lr.unwrap_or(match self.method {
            Method::Scratch => 1e-3,
            Method::Full => 1e-4,
            Method::Lora => 2e-4,
        })
    }

    pub fn optimizer(&self) -> AdamWOptions {
        AdamWOptions {
            beta1: self.beta1,
            beta2: self.beta2,
            epsilon: self.epsilon,
            weight_decay: self.weight_decay,
            clip: self.clip,
        }
    }

    pub fn decay(&self) -> Decay {
        match self.schedule {
            DecayKind::Cosine => Decay::Cosine,
            DecayKind::Linear => Decay::Linear,
            DecayKind::Constant => Decay::Constant,
        }
    }

    pub fn lora_options(&self) -> LoraOptions {
        LoraOptions {
            rank: self.lora.rank,
            alpha: self.lora.alpha,
            dropout: self.lora.dropout,
            targets: self.lora.targets.iter().map(|t| t.engine()).collect(),
            seed: self.seed,
        }
    }

    pub fn stored(&self) -> Stored {
        match self.save_as {
            None | Some(SavedType::F32) => Stored::F32,
            Some(SavedType::Bf16) => Stored::Bf16,
        }
    }

    /// Tokens of a pass after so many attempts that ran out of memory; one that is longer than this is a pass alone.
    pub fn pass_tokens(&self, out_of_memory: u32) -> usize {
        (PASS_TOKENS >> out_of_memory.min(8)).min(self.batch.saturating_mul(self.max_length)).max(1)
    }

    /// Bytes that a run needs, where that is known before the run; 0 elsewhere.
    pub fn memory(&self) -> u64 {
        self.config_at_hand().map_or(0, |config| self.memory_of(&config, self.max_length, 0))
    }

    /// The shape of the model where it is known before the run: from scratch, or from a folder on this machine.
    pub fn config_at_hand(&self) -> Option<Config> {
        match (&self.model, self.method) {
            _ if self.backend != Backend::Grlm => None,
            (_, Method::Scratch) => Some(self.architecture.config(self.architecture.vocabulary, self.max_length)),
            (Some(folder), _) if model_folder::is_at_hand(folder) => Config::load(Path::new(folder)).ok(),
            _ => None,
        }
    }

    /// Bytes that a run with this model needs, whose longest sample has so many tokens.
    pub fn memory_of(&self, config: &Config, longest: usize, out_of_memory: u32) -> u64 {
        let weights: usize = config.tensors().iter().map(|(_, shape)| shape.iter().product::<usize>()).sum();
        let trained = match self.method {
            Method::Lora => self.lora.targets.iter().map(|t| t.engine().numbers(config, self.lora.rank)).sum(),
            _ => weights,
        };
        let need = memory::Need {
            trained,
            averaged: self.averaging > 0.0,
            pass_tokens: self.pass_tokens(out_of_memory).max(longest),
            positions: self.max_length,
            recompute: self.gradient_checkpointing,
        };
        memory::bytes(config, need)
    }

    pub fn check(&self) -> Vec<ParamIssue> {
        let mut issues = Vec::new();
        let mut refuse = |bad: bool, path: &str, message: &str| {
            if bad {
                issues.push(ParamIssue::new(path, message));
            }
        };
        let a = &self.architecture;
        for (path, value) in [
            ("architecture.hidden", a.hidden),
            ("architecture.intermediate", a.intermediate),
            ("architecture.layers", a.layers),
            ("architecture.heads", a.heads),
            ("architecture.kv_heads", a.kv_heads),
            ("lora.rank", self.lora.rank),
            ("batch", self.batch),
            ("accumulation", self.accumulation),
            ("validation.users", self.validation.users),
            ("validation.beams", self.validation.beams),
            ("save_every", self.save_every as usize),
            ("steps", self.steps.unwrap_or(1) as usize),
            ("validation.every", self.validation.every.unwrap_or(1) as usize),
            ("validation.patience", self.validation.patience.unwrap_or(1) as usize),
        ] {
            refuse(value == 0, path, "must be at least 1");
        }
        let shared = format!("`kv_heads` ({}) must divide `heads` ({})", a.kv_heads, a.heads);
        refuse(a.kv_heads > 0 && !a.heads.is_multiple_of(a.kv_heads), "architecture.kv_heads", &shared);
        refuse(a.head_dim == 0 || !a.head_dim.is_multiple_of(2), "architecture.head_dim", "must be even");
        refuse(a.vocabulary < 512, "architecture.vocabulary", "must be at least 512");
        refuse(a.init_std.is_nan() || a.init_std <= 0.0, "architecture.init_std", "must be greater than 0");
        refuse(a.rope_theta.is_nan() || a.rope_theta <= 0.0, "architecture.rope_theta", "must be greater than 0");
        refuse(self.max_length < 16, "max_length", "must be at least 16");
        refuse(self.max_length > MOST_POSITIONS, "max_length", "must be at most 262144");
        let step = self.batch.saturating_mul(self.accumulation);
        refuse(step > MOST_SAMPLES, "batch", "`batch` × `accumulation` must be at most 10 million");
        refuse(!(self.epochs > 0.0 && self.epochs.is_finite()), "epochs", "must be greater than 0");
        refuse(!(self.learning_rate() > 0.0 && self.learning_rate().is_finite()), "lr", "must be greater than 0");
        refuse(self.lora.targets.is_empty(), "lora.targets", "nothing would be trained");
        refuse(!(self.lora.alpha > 0.0 && self.lora.alpha.is_finite()), "lora.alpha", "must be greater than 0");
        for (path, value) in [
            ("dropout", f64::from(self.dropout)),
            ("averaging", f64::from(self.averaging)),
            ("lora.dropout", f64::from(self.lora.dropout)),
            ("validation.share", self.validation.share),
            ("beta1", self.beta1),
            ("beta2", self.beta2),
        ] {
            refuse(!(0.0..1.0).contains(&value), path, "must be at least 0 and less than 1");
        }
        for (path, value) in [("warmup", self.warmup), ("lr_floor", self.lr_floor)] {
            refuse(!(0.0..=1.0).contains(&value), path, "must be between 0 and 1");
        }
        for (path, value) in [("weight_decay", self.weight_decay), ("clip", self.clip), ("epsilon", self.epsilon)] {
            refuse(!(value >= 0.0 && value.is_finite()), path, "must not be negative");
        }
        for (name, weight) in &self.weights {
            let bad = !(0.0..=1000.0).contains(weight);
            refuse(bad, &format!("weights.{name}"), "must be between 0 and 1000");
        }
        let words = matches!(self.tokens, TokensChoice::Words | TokensChoice::Prefixes);
        refuse(words && self.method != Method::Scratch, "tokens", "`words` and `prefixes` are for models from scratch");
        let template = self.template.fixed().unwrap_or(ChatTemplate::None);
        refuse(words && template != ChatTemplate::None, "template", "tokens that are whole words have no template");
        let new = self.method == Method::Scratch;
        refuse(self.unit_embeddings && !new, "unit_embeddings", "is for models from scratch");
        refuse(
            self.normalize == Normalize::Allowed && self.train_on_prompt,
            "train_on_prompt",
            "under `normalize: allowed` only TIDs are learned",
        );
        refuse(new && self.model.is_some(), "model", "`method: scratch` starts from nothing");
        refuse(new && self.lora != Lora::default(), "lora", "is for `method: lora`, and `method` is `scratch`");
        refuse(self.llamafactory.logging_steps == 0, "llamafactory.logging_steps", "must be at least 1");
        issues.extend(self.model.as_ref().and_then(|name| model_folder::issue("model", name)));
        issues.extend(llamafactory::settings::check(self));
        issues
    }
}
