//! `grlm.json` in a checkpoint folder: what the model was trained on and how its samples were written, so that
//! `generate` continues a history exactly where training left it.
//!
//! The weights, `config.json` and `tokenizer.json` beside it are plain Hugging Face files; other programs may
//! ignore this one.

use std::{
    fs,
    path::{Path, PathBuf},
};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::StageError;

/// The version of [`CheckpointInfo`] that this program writes, and the newest that it reads.
pub const CHECKPOINT_VERSION: u32 = 1;

/// How the SFT samples of a model are laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum SftFormat {
    /// Instruction, titles and terms, as in the paper.
    Text,
    /// Only the words of the items' term identifiers.
    Compact,
}

/// How a term identifier becomes tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum TokenKind {
    /// One token a word, and nothing between items.
    Words,
    /// One token for each beginning of a TID that leaves a choice, and one for the whole TID.
    Prefixes,
    /// The model's own subword tokens.
    Model,
}

/// What stands around a sample.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum ChatTemplate {
    /// Nothing: `bos`, then instruction and input, then the response.
    #[serde(rename = "none")]
    None,
    /// Qwen3's chat markup without a think block.
    #[serde(rename = "qwen3_nothink")]
    Qwen3Nothink,
    /// Qwen3's chat markup with an empty think block in the response.
    #[serde(rename = "qwen3")]
    Qwen3,
}

/// The content of `grlm.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CheckpointInfo {
    pub version: u32,
    pub format: SftFormat,
    pub tokens: TokenKind,
    pub template: ChatTemplate,
    /// The token that every sample starts with, as spelled in `tokenizer.json`.
    #[serde(default)]
    pub bos: Option<String>,
    /// The instruction of the recommendation samples; empty where they had none.
    #[serde(default)]
    pub instruction: String,
    /// The longest sample, in tokens, that training saw: longer histories lose their oldest items.
    pub max_length: usize,
    /// `scratch`, `full` or `lora`.
    pub method: String,
    /// Facts about the training run, for people: samples, tokens, steps, losses, base model.
    #[serde(default)]
    pub trained_from: Map<String, Value>,
}

impl CheckpointInfo {
    /// Where it stands in the checkpoint folder `folder`.
    pub fn path(folder: &Path) -> PathBuf {
        folder.join("grlm.json")
    }

    /// Reads `grlm.json` of the checkpoint folder `folder`.
    ///
    /// # Errors
    /// It is missing, is not valid, or was written by a newer version of the program.
    pub fn read(folder: &Path) -> Result<Self, StageError> {
        let path = Self::path(folder);
        let text = fs::read_to_string(&path).map_err(|e| match e.kind() {
            std::io::ErrorKind::NotFound => StageError::input(&path, "the checkpoint has no grlm.json")
                .help("grlm.json is written by the stage `train`; give the folder that it wrote"),
            _ => StageError::io("read", &path, e),
        })?;
        let value: Value = serde_json::from_str(&text)
            .map_err(|e| StageError::input_at(&path, e.line() as u64, format!("not valid JSON: {e}")))?;
        // The version first: a newer file may differ in any other field.
        if let Some(version) = value.get("version").and_then(Value::as_u64)
            && version > u64::from(CHECKPOINT_VERSION)
        {
            return Err(StageError::input(
                &path,
                format!("version {version} is newer than this program's {CHECKPOINT_VERSION}"),
            )
            .help("use the version of grlm that trained the checkpoint, or train again"));
        }
        serde_path_to_error::deserialize(&value)
            .map_err(|e| StageError::input(&path, format!("`{}`: {}", e.path(), e.inner())))
    }

    /// Writes `grlm.json` into the checkpoint folder `folder`.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write(&self, folder: &Path) -> Result<(), StageError> {
        let path = Self::path(folder);
        let mut text = serde_json::to_string_pretty(self).map_err(|e| StageError::bug(e.to_string()))?;
        text.push('\n');
        fs::write(&path, text).map_err(|e| StageError::io("write", &path, e))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info() -> CheckpointInfo {
        CheckpointInfo {
            version: CHECKPOINT_VERSION,
            format: SftFormat::Compact,
            tokens: TokenKind::Words,
            template: ChatTemplate::None,
            bos: Some("<s>".into()),
            instruction: String::new(),
            max_length: 256,
            method: "scratch".into(),
            trained_from: Map::from_iter([("samples".to_owned(), Value::from(7))]),
        }
    }

    #[test]
    fn what_was_written_is_read() {
        let folder = tempfile::tempdir().unwrap();
        info().write(folder.path()).unwrap();
        assert_eq!(CheckpointInfo::read(folder.path()).unwrap(), info());
        let text = fs::read_to_string(CheckpointInfo::path(folder.path())).unwrap();
        assert!(text.contains("\"template\": \"none\"") && text.contains("\"tokens\": \"words\""), "{text}");
    }

    #[test]
    fn what_is_wrong_is_said() {
        let folder = tempfile::tempdir().unwrap();
        let error = |text: &str| {
            fs::write(CheckpointInfo::path(folder.path()), text).unwrap();
            CheckpointInfo::read(folder.path()).unwrap_err().to_string()
        };
        assert!(error(r#"{"version": 2, "format": "novel"}"#).contains("newer"));
        assert!(error(r#"{"version": 1, "format": "novel"}"#).contains("`format`"));
        assert!(error("{").contains(":1: not valid JSON"));
        fs::remove_file(CheckpointInfo::path(folder.path())).unwrap();
        assert!(CheckpointInfo::read(folder.path()).unwrap_err().help_text().is_some_and(|h| h.contains("train")));
    }
}
