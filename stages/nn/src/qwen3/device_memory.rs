//! What a Qwen3 takes of a device's memory, in bytes, where numbers are `element` bytes each: the formula by which
//! batches are sized there.
//!
//! ```text
//! peak = weights + tokens of a shared beginning + prompts × tokens of the longest with what it generates + work
//! ```
//!
//! A test compares it with the peak of a process.

use super::{Config, padded::SCORES_AT_ONCE, tensors::LOGITS_AT_ONCE};

const FLOAT: usize = size_of::<f32>();

/// What a device has free, and how its numbers are stored.
#[derive(Debug, Clone, Copy)]
pub struct DeviceMemory {
    pub free: usize,
    /// Bytes of a number.
    pub element: usize,
}

/// What goes through the network together.
#[derive(Debug, Clone, Copy)]
pub struct Rows {
    pub count: usize,
    /// Tokens that each of them can look at.
    pub seen: usize,
    /// Those whose logits are looked at.
    pub scored: usize,
}

/// Weights, the output head included.
pub fn weights(config: &Config, element: usize) -> usize {
    config.tensors().iter().map(|(_, shape)| shape.iter().product::<usize>()).sum::<usize>() * element
}

/// Keys and values of tokens.
pub fn tokens(config: &Config, tokens: usize, element: usize) -> usize {
    2 * config.layers * config.kv_width() * tokens * element
}

/// What lies between the products.
pub fn work(config: &Config, rows: Rows, element: usize) -> usize {
    // Gates, what is beside them, and both again apart and multiplied.
    let gates = 3 * config.hidden_size + config.query_width() + 5 * config.intermediate_size;
    // Scores in f32, with the mask, and their softmax; where it is not f32, as they come and as they are used.
    let of_score = 3 * FLOAT + if element < FLOAT { 2 * element } else { 0 };
    let scores = SCORES_AT_ONCE.min(config.heads * rows.count * rows.seen) * of_score;
    // Queries, keys and values as they come, and laid out for attention with its results.
    let attention = 2 * config.hidden_size + 5 * config.query_width() + 4 * config.kv_width();
    let layer = (rows.count * gates * element).max(rows.count * attention * element + scores);
    // In f32, less their maximum, and its exponentials.
    let logits = LOGITS_AT_ONCE.min(config.vocab_size * rows.scored) * (element + 3 * FLOAT);
    layer.max(logits)
}
