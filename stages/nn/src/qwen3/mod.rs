//! Qwen3: the configuration that training and generation share, and the CPU inference engine.
//!
//! The engine reads prompts into [`Segment`]s of keys and values (a common beginning once for all prompts) and then
//! takes the beams of many prompts forward together, one token a [`Step`].

mod attention;
pub mod config;
mod kv;
mod model;
mod rotary;
pub mod weights;
mod work;

pub use attention::POSITIONS_AT_ONCE;
pub use config::Config;
pub use kv::{Branches, Segment};
pub use model::{GATES_AT_ONCE, HEAD_CHUNK, LOGITS_AT_ONCE, Prompt, Qwen3, Step, Wanted};
