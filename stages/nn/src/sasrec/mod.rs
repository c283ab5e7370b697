//! SASRec on few cores: ragged batches, fused kernels with hand-written gradients, deterministic training.
//!
//! | file | owns |
//! |---|---|
//! | `config` | shape, losses, training settings, their limits |
//! | `matmul`, `kernels`, `attention` | arithmetic over slices, forward and backward |
//! | `network` | the transformer between item embeddings and hidden states |
//! | `scoring` | from hidden states and embeddings to vectors whose dot product is the score |
//! | `loss` | full and sampled softmax |
//! | `adam` | the optimiser |
//! | `model` | parameters, and what they predict |
//! | `trainer` | batches and steps |
//! | `session` | epochs, validation, early stopping, checkpoints |
//! | `ranking` | places of targets, metrics, best items |
//! | `store` | model folders, files of tensors |
//!
//! Every piece of parallel work has a fixed size and results are added up in a fixed order: the same seed gives the
//! same bits for any number of threads. Work runs in the rayon pool that the caller installed. No autograd: candle's
//! element-wise operations run on one thread, and padding would be most of the work.

use std::{io, path::PathBuf};

mod adam;
mod attention;
mod config;
mod kernels;
mod loss;
mod matmul;
mod model;
mod network;
mod ranking;
mod scoring;
mod session;
mod store;
mod trainer;

pub use config::{Activation, Architecture, Loss, Scoring, Training};
pub use model::Model;
pub use ranking::{Metrics, Place, Placement, Query, Scored};
pub use session::{Advance, EpochReport, Schedule, Session, Validation};
pub use trainer::{Trainer, steps_per_epoch};

/// Why a model cannot be trained, saved or loaded.
#[derive(Debug, thiserror::Error)]
pub enum SasrecError {
    #[error("{0}")]
    Config(String),
    #[error("the loss is not a finite number at step {step}")]
    NotFinite { step: u64 },
    #[error("cannot {action} {}", path.display())]
    Io { action: &'static str, path: PathBuf, source: io::Error },
    #[error("{} is not a SASRec model of this kind: {reason}", path.display())]
    Format { path: PathBuf, reason: String },
}
