//! Qwen3: the configuration that training and generation share, and the inference engine.
//!
//! The engine reads a common beginning into a [`Segment`] of keys and values, once for all prompts, and the prompts behind
//! it into [`Branches`]; then it takes the beams of many prompts forward together, a [`Step`] for each. It has two
//! networks behind one face: this crate's kernels on the CPU, and candle's tensors on a CUDA device ([`Place`]).

mod attention;
pub mod config;
pub mod device_memory;
mod kv;
mod model;
mod packed;
mod padded;
mod place;
mod rotary;
mod store;
mod tensors;
pub mod weights;
mod work;

pub use attention::POSITIONS_AT_ONCE;
pub use config::Config;
pub use device_memory::DeviceMemory;
pub use kv::{Branches, Room, Segment};
pub use model::{Qwen3, Step, Wanted};
pub use packed::{GATES_AT_ONCE, HEAD_CHUNK, LOGITS_AT_ONCE};
pub use place::Place;
pub use weights::FloatType;
