//! Training a Qwen3: the differentiable model, AdamW, packing, and the loop with validation and exact resume.
//!
//! All of it is written over flat `f32` slices with hand-made backward passes: on a CPU this is several times
//! faster than a general autograd, and nothing is kept that is not needed. Samples are packed end to end, without
//! padding. Results do not depend on the number of threads.

pub mod adamw;
pub mod allowed;
mod attention;
mod batch;
mod blocks;
mod cross_entropy;
pub mod data;
pub mod export;
pub mod init;
mod kernels;
mod layer;
pub mod layout;
pub mod lora;
mod matrix;
pub mod memory;
pub mod model;
pub mod schedule;
pub mod session;
pub mod store;
mod workspace;

pub use adamw::{AdamW, AdamWOptions};
pub use batch::{Batch, DropoutRates};
pub use data::{Corpus, Sample, Source};
pub use layout::Layout;
pub use lora::{LoraOptions, Target};
pub use model::Model;
pub use schedule::{Decay, Schedule};
pub use session::{Session, Settings};
pub use store::Stored;
