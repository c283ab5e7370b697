//! Qwen3: the configuration that training and generation share, and the inference engine.
//!
//! The engine reads prompts into [`Segment`]s of keys and values (a common beginning once for all prompts) and then
//! takes the beams of many prompts forward together, one token a [`Step`]. It has two networks behind one face: this
//! crate's kernels on the CPU, and candle's tensors on a CUDA device ([`Place`]).

mod attention;
pub mod config;
mod kv;
mod model;
mod packed;
mod place;
mod rotary;
mod tensors;
pub mod weights;
mod work;

pub use attention::POSITIONS_AT_ONCE;
pub use config::Config;
pub use kv::{Branches, Segment};
pub use model::{Prompt, Qwen3, Step, Wanted};
pub use packed::{GATES_AT_ONCE, HEAD_CHUNK, LOGITS_AT_ONCE};
pub use place::Place;
pub use weights::FloatType;
