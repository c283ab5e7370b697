//! Why a stage failed, told apart so that the engine knows whether trying again can help.

use std::{io, path::PathBuf};

use serde::{Deserialize, Serialize};

/// The class of a failure; decides about retries and is what the run's journal records.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Failure {
    /// The stage's input or parameters are wrong: no retry helps.
    WrongInput,
    /// Device or host memory ran out: retried with the stage's own smaller batch.
    OutOfMemory,
    /// Ran longer than its `timeout`.
    Timeout,
    /// Ended by a signal that the engine did not send.
    Killed,
    /// Stopped on request after saving what it could.
    Stopped,
    /// Something outside the stage (disk, network) failed: retried.
    Environment,
    /// The program of a `command` stage ended with a non-zero status.
    Command,
    /// More rows failed than may; a rerun tries only those.
    FailedRows,
    /// A device stopped working: retried on others.
    DeviceLost,
    /// A defect in grlm.
    Bug,
}

/// An error of a stage. Messages are lower-case fragments; `help` says what to do next.
#[derive(Debug, thiserror::Error)]
pub enum StageError {
    #[error("{}{}: {message}", path.display(), line.map(|l| format!(":{l}")).unwrap_or_default())]
    Input { path: PathBuf, line: Option<u64>, message: String, help: Option<String> },
    #[error("{message}")]
    Params { message: String, help: Option<String> },
    #[error("cannot {action} {}", path.display())]
    Io { action: &'static str, path: PathBuf, source: io::Error },
    #[error("network: {message}")]
    Network { message: String, help: Option<String> },
    #[error("out of memory: {message}")]
    OutOfMemory { message: String, help: Option<String> },
    /// A device fell off the bus or was taken away, and what it had in memory is gone.
    #[error("a device was lost: {message}")]
    DeviceLost { message: String, help: Option<String> },
    /// More rows of a row stage failed than it allows.
    #[error("{message}")]
    FailedRows { message: String, help: Option<String> },
    #[error("stopped on request")]
    Stopped,
    #[error("{message}")]
    Command { message: String, help: Option<String> },
    /// The program of a `command` stage was ended by a signal that grlm did not send.
    #[error("{message}")]
    Killed { message: String, help: Option<String> },
    #[error("{message}")]
    Bug { message: String },
}

impl StageError {
    pub fn input(path: impl Into<PathBuf>, message: impl Into<String>) -> Self {
        Self::Input { path: path.into(), line: None, message: message.into(), help: None }
    }

    pub fn input_at(path: impl Into<PathBuf>, line: u64, message: impl Into<String>) -> Self {
        Self::Input { path: path.into(), line: Some(line), message: message.into(), help: None }
    }

    pub fn params(message: impl Into<String>) -> Self {
        Self::Params { message: message.into(), help: None }
    }

    pub fn io(action: &'static str, path: impl Into<PathBuf>, source: io::Error) -> Self {
        Self::Io { action, path: path.into(), source }
    }

    pub fn bug(message: impl Into<String>) -> Self {
        Self::Bug { message: message.into() }
    }

    /// Says what to do next; kept by the variants that have room for it.
    pub fn help(mut self, text: impl Into<String>) -> Self {
        match &mut self {
            Self::Input { help, .. }
            | Self::Params { help, .. }
            | Self::Network { help, .. }
            | Self::OutOfMemory { help, .. }
            | Self::DeviceLost { help, .. }
            | Self::FailedRows { help, .. }
            | Self::Killed { help, .. }
            | Self::Command { help, .. } => *help = Some(text.into()),
            Self::Io { .. } | Self::Stopped | Self::Bug { .. } => {}
        }
        self
    }

    pub fn help_text(&self) -> Option<&str> {
        match self {
            Self::Input { help, .. }
            | Self::Params { help, .. }
            | Self::Network { help, .. }
            | Self::OutOfMemory { help, .. }
            | Self::DeviceLost { help, .. }
            | Self::FailedRows { help, .. }
            | Self::Killed { help, .. }
            | Self::Command { help, .. } => help.as_deref(),
            Self::Io { .. } | Self::Stopped | Self::Bug { .. } => None,
        }
    }

    pub fn failure(&self) -> Failure {
        match self {
            Self::Input { .. } | Self::Params { .. } => Failure::WrongInput,
            Self::Io { .. } | Self::Network { .. } => Failure::Environment,
            Self::OutOfMemory { .. } => Failure::OutOfMemory,
            Self::DeviceLost { .. } => Failure::DeviceLost,
            Self::FailedRows { .. } => Failure::FailedRows,
            Self::Stopped => Failure::Stopped,
            Self::Command { .. } => Failure::Command,
            Self::Killed { .. } => Failure::Killed,
            Self::Bug { .. } => Failure::Bug,
        }
    }
}

/// The model engine's errors, told apart as a stage's are.
/// As CUDA and cuBLAS say it.
fn is_out_of_memory(text: &str) -> bool {
    let text = text.to_lowercase();
    ["out of memory", "out_of_memory", "cublas_status_alloc_failed"].iter().any(|words| text.contains(words))
}

impl From<grlm_nn::Error> for StageError {
    fn from(error: grlm_nn::Error) -> Self {
        match error {
            // A file of a model that is not there is the user's to mend; anything else the system's.
            grlm_nn::Error::Io { path, source, .. } if source.kind() == io::ErrorKind::NotFound => {
                Self::input(path, "no such file").help(
                    "a model's folder holds config.json, tokenizer.json and safetensors weights, all of one model",
                )
            }
            grlm_nn::Error::Io { action, path, source } => Self::Io { action, path, source },
            grlm_nn::Error::Model { path, message, help } => Self::Input { path, line: None, message, help },
            grlm_nn::Error::Argument { message, help } => Self::Params { message, help },
            grlm_nn::Error::Stopped => Self::Stopped,
            error @ grlm_nn::Error::NotFinite => Self::params(error.to_string()).help(
                "its weights are damaged, or not trained well; on a GPU in f16 they may be too large for `dtype`",
            ),
            error @ grlm_nn::Error::Candle(_) => match error.to_string() {
                text if is_out_of_memory(&text) => Self::OutOfMemory { message: text, help: None },
                text => Self::bug(text),
            },
        }
    }
}
