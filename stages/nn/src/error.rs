//! What can go wrong with models and their files. Messages are lower-case fragments; `help` says what to do next.

use std::{
    io,
    path::{Path, PathBuf},
};

/// An error of the model engine.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file of a model cannot be read or written.
    #[error("cannot {action} {}", path.display())]
    Io { action: &'static str, path: PathBuf, source: io::Error },
    /// A file of a model is there, and wrong.
    #[error("{}: {message}", path.display())]
    Model { path: PathBuf, message: String, help: Option<String> },
    /// A value asked of the engine makes no sense (0 beams, a prompt longer than the model's positions).
    #[error("{message}")]
    Argument { message: String, help: Option<String> },
    /// Hidden states are no numbers: weights are, or they grew beyond what their type holds.
    #[error("the model computes NaN or infinity")]
    NotFinite,
    /// The caller's stop flag was set.
    #[error("stopped on request")]
    Stopped,
    /// candle failed: a defect, or a device that is out of memory.
    #[error("tensor computation failed: {0}")]
    Candle(#[from] candle_core::Error),
}

impl Error {
    pub fn io(action: &'static str, path: impl Into<PathBuf>, source: io::Error) -> Self {
        Self::Io { action, path: path.into(), source }
    }

    pub fn model(path: impl Into<PathBuf>, message: impl Into<String>) -> Self {
        Self::Model { path: path.into(), message: message.into(), help: None }
    }

    pub fn argument(message: impl Into<String>) -> Self {
        Self::Argument { message: message.into(), help: None }
    }

    /// The same, naming the model's folder where no caller's value is to blame but the model.
    pub fn of_model(self, folder: &Path) -> Self {
        match self {
            Self::Argument { message, help } => Self::Model { path: folder.to_owned(), message, help },
            other => other,
        }
    }

    /// Says what to do next; kept by the variants that have room for it.
    pub fn help(mut self, text: impl Into<String>) -> Self {
        if let Self::Model { help, .. } | Self::Argument { help, .. } = &mut self {
            *help = Some(text.into());
        }
        self
    }
}
