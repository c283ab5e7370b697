//! What the parameters of `train` choose among.

use grlm_nn::train::Target;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::artifact::ChatTemplate;

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
    /// One token for each beginning of a TID behind which the catalogue leaves a choice, and one for the whole TID: as
    /// few as tell it from the others, and the last is the item's own. Like `words`, from scratch on compact samples.
    Prefixes,
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
