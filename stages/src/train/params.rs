//! The parameters of `train`: what they are called, what they default to, and which make no sense together.

use std::collections::BTreeMap;

use grlm_nn::{
    qwen3::Config,
    train::{AdamWOptions, Decay, LoraOptions, Stored, Target, memory},
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::llamafactory;
use crate::{Compat, ParamIssue, artifact::ChatTemplate, generate::Normalize, model_folder};

/// What is trained.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Method {
    /// A new model of the given `architecture`, with a tokenizer made from the samples.
    #[default]
    Scratch,
    /// All weights of the model at the input `model`.
    Full,
    /// Low-rank adapters beside the frozen weights of the model at the input `model`; merged at the end.
    Lora,
}

impl Method {
    pub fn name(self) -> &'static str {
        match self {
            Self::Scratch => "scratch",
            Self::Full => "full",
            Self::Lora => "lora",
        }
    }
}

/// Who trains.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Backend {
    /// This program, on the CPU.
    #[default]
    Grlm,
    /// `llamafactory-cli`, on the leased GPUs.
    Llamafactory,
}

/// What a model from scratch writes and reads.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum TokensChoice {
    /// `words` from scratch on compact samples, else `model`.
    #[default]
    Auto,
    /// One token for every word of a TID.
    Words,
    /// Subwords: of the model's own tokenizer or, from scratch, of one learned on the samples.
    Model,
}

/// What stands around a sample.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum TemplateChoice {
    /// `none` from scratch, else what the model was trained with before, else `qwen3_nothink`.
    #[default]
    #[serde(rename = "auto")]
    Auto,
    /// Nothing but instruction, input and response.
    #[serde(rename = "none")]
    None,
    /// Qwen3's chat markup: right for Instruct-2507 models.
    #[serde(rename = "qwen3_nothink")]
    Qwen3Nothink,
    /// Qwen3's chat markup with an empty think block in the response: right for hybrid Qwen3 models.
    #[serde(rename = "qwen3")]
    Qwen3,
}

impl TemplateChoice {
    pub fn fixed(self) -> Option<ChatTemplate> {
        match self {
            Self::Auto => None,
            Self::None => Some(ChatTemplate::None),
            Self::Qwen3Nothink => Some(ChatTemplate::Qwen3Nothink),
            Self::Qwen3 => Some(ChatTemplate::Qwen3),
        }
    }
}

/// The shape of the learning rate after the warm-up.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum DecayKind {
    #[default]
    Cosine,
    Linear,
    Constant,
}

/// The type of the saved weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum SavedType {
    F32,
    Bf16,
}

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

/// A matrix of a layer, by its usual name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[expect(clippy::enum_variant_names, reason = "the names that PEFT and LlamaFactory know them by")]
pub enum LoraTarget {
    QProj,
    KProj,
    VProj,
    OProj,
    GateProj,
    UpProj,
    DownProj,
}

impl LoraTarget {
    pub const ALL: [Self; 7] =
        [Self::QProj, Self::KProj, Self::VProj, Self::OProj, Self::GateProj, Self::UpProj, Self::DownProj];

    pub fn engine(self) -> Target {
        match self {
            Self::QProj => Target::Query,
            Self::KProj => Target::Key,
            Self::VProj => Target::Value,
            Self::OProj => Target::Output,
            Self::GateProj => Target::Gate,
            Self::UpProj => Target::Up,
            Self::DownProj => Target::Down,
        }
    }
}

/// Settings of `method: lora`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
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

/// The type in which LlamaFactory trains and saves.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Precision {
    #[default]
    Bf16,
    F32,
}

/// How DeepSpeed shares a model out over GPUs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Deepspeed {
    /// Every GPU holds all.
    #[default]
    None,
    /// Gradients and optimiser states are shared out.
    Zero2,
    /// Weights too.
    Zero3,
}

impl Deepspeed {
    pub fn is_on(self) -> bool {
        self != Self::None
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

    /// Tokens of a pass after so many attempts that ran out of memory.
    pub fn pass_tokens(&self, out_of_memory: u32) -> usize {
        (PASS_TOKENS >> out_of_memory.min(8)).min(self.batch.saturating_mul(self.max_length)).max(1)
    }

    /// Bytes that a run needs, where that is known before the run: from scratch.
    pub fn memory(&self) -> u64 {
        if self.method != Method::Scratch || self.backend != Backend::Grlm {
            return 0;
        }
        let config = self.architecture.config(self.architecture.vocabulary, self.max_length);
        self.memory_of(&config, 0)
    }

    /// Bytes that a run with this model needs.
    pub fn memory_of(&self, config: &Config, out_of_memory: u32) -> u64 {
        let weights: usize = config.tensors().iter().map(|(_, shape)| shape.iter().product::<usize>()).sum();
        let trained = match self.method {
            Method::Lora => self.lora.targets.iter().map(|t| t.engine().numbers(config, self.lora.rank)).sum(),
            _ => weights,
        };
        let need = memory::Need {
            trained,
            pass_tokens: self.pass_tokens(out_of_memory),
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
        refuse(a.kv_heads > 0 && !a.heads.is_multiple_of(a.kv_heads), "architecture.kv_heads", "must divide `heads`");
        refuse(a.head_dim == 0 || !a.head_dim.is_multiple_of(2), "architecture.head_dim", "must be even");
        refuse(a.vocabulary < 512, "architecture.vocabulary", "must be at least 512");
        refuse(a.init_std.is_nan() || a.init_std <= 0.0, "architecture.init_std", "must be greater than 0");
        refuse(a.rope_theta.is_nan() || a.rope_theta <= 0.0, "architecture.rope_theta", "must be greater than 0");
        refuse(self.max_length < 16, "max_length", "must be at least 16");
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
            let bad = !(*weight >= 0.0 && weight.is_finite());
            refuse(bad, &format!("weights.{name}"), "must not be negative");
        }
        let words = self.tokens == TokensChoice::Words;
        refuse(words && self.method != Method::Scratch, "tokens", "`words` is for models from scratch");
        let template = self.template.fixed().unwrap_or(ChatTemplate::None);
        refuse(words && template != ChatTemplate::None, "template", "`tokens: words` has no template");
        let new = self.method == Method::Scratch;
        refuse(self.unit_embeddings && !new, "unit_embeddings", "is for models from scratch");
        refuse(
            self.normalize == Normalize::Allowed && self.train_on_prompt,
            "train_on_prompt",
            "under `normalize: allowed` only TIDs are learned",
        );
        refuse(new && self.model.is_some(), "model", "`method: scratch` starts from nothing");
        refuse(self.llamafactory.logging_steps == 0, "llamafactory.logging_steps", "must be at least 1");
        issues.extend(self.model.as_ref().and_then(|name| model_folder::issue("model", name)));
        issues.extend(llamafactory::settings::check(self));
        issues
    }
}
