//! Every stage kind of the GRLM pipeline, one file or folder each, and the registry that lists them.
//!
//! A stage sees typed parameters and paths, nothing else: no store, no keys, no scheduler. Reading this folder's
//! listing in the order of the paper gives the method: `similarity`, `tid`, `id2meta`, the `sft_*` builders,
//! `sasrec`, `train`, `generate`, `evaluate`.

pub mod artifact;
pub mod compat;
pub mod compute;
pub mod context;
mod endpoint;
pub mod error;
pub mod event;
pub mod hub;
pub mod lm;
pub mod machine;
pub mod method;
pub mod model_folder;
pub mod prompts;
pub mod registry;
pub mod rows;
pub mod sampling;
pub mod sft;
pub mod similarity;
pub mod stage;
pub mod terms;
pub mod threads;

mod command;
pub mod evaluate;
mod fetch;
mod fuse;
pub mod generate;
mod id2meta;
mod import_items;
mod import_prompts;
mod import_tids;
mod item_knn;
mod leave_one_out;
pub mod paired;
pub mod popularity;
mod python;
mod rankings;
pub mod sasrec;
mod synth;
#[cfg(test)]
mod testing;
pub mod tid;
mod train;

pub use artifact::Artifact;
pub use compat::Compat;
pub use context::{Device, StageContext, StopFlag};
pub use error::{Failure, StageError};
pub use event::WorkerEvent;
pub use registry::{StageKind, code_digest, kind, kinds};
pub use stage::{Input, Output, ParamIssue, Ports, Resources, Stage};
