//! What embedding takes of the memory, in bytes: the formula by which tokens are taken together.
//!
//! ```text
//! peak = weights + threads × work
//!
//! weights = packed matrices (columns filled up to 16) and vectors in f32; the mapped rows of words that texts have
//! work    = what lies between the products for the tokens that go through the network together, and of a Qwen3 their
//!           keys and values in all layers
//! ```
//!
//! A test compares it with the peak of a process.

use super::{BertConfig, TOKENS_ON_DEVICE};
use crate::{
    cpu::WIDTH,
    qwen3::{Config, GATES_AT_ONCE, POSITIONS_AT_ONCE, Qwen3, Segment, device_memory},
};

const FLOAT: usize = size_of::<f32>();

/// The matrices of these shapes `[out, in]`, packed, and the vectors.
fn packed<'a>(shapes: impl Iterator<Item = &'a [usize]>) -> usize {
    let floats = |shape: &[usize]| match shape {
        [out, inner] => inner * out.div_ceil(WIDTH) * WIDTH,
        other => other.iter().product(),
    };
    shapes.map(floats).sum::<usize>() * FLOAT
}

/// The weights of a Qwen3 without its output head. Rows of words stay in the file, which is mapped.
pub fn qwen3_weights(config: &Config) -> usize {
    let tensors = config.tensors();
    let computed = tensors.iter().filter(|(name, _)| name != "model.embed_tokens.weight" && name != "lm_head.weight");
    packed(computed.map(|(_, shape)| shape.as_slice()))
}

/// The weights of a BERT. Rows of words stay in the file, which is mapped.
pub fn bert_weights(config: &BertConfig) -> usize {
    let tensors = config.tensors();
    let positions = config.positions * config.hidden_size * FLOAT;
    let computed = tensors.iter().filter(|(name, _)| !name.starts_with("embeddings."));
    positions + packed(computed.map(|(_, shape)| shape.as_slice()))
}

/// What one thread of a Qwen3 has in work, with `at_once` tokens (or one text of at most `longest`) together.
pub fn qwen3_work(config: &Config, at_once: usize, longest: usize) -> usize {
    let rows = at_once.max(longest);
    let (q, kv) = (config.query_width(), config.kv_width());
    let row = 3 * config.hidden_size + 2 * q + 2 * kv + config.intermediate_size;
    let gates = (2 * GATES_AT_ONCE).max(8 * WIDTH * rows).min(2 * config.intermediate_size * rows);
    (rows * row + gates + POSITIONS_AT_ONCE * longest) * FLOAT + Segment::bytes(config, rows)
}

/// Tokens that half of the free memory of a Qwen3's device holds, in texts of at most `longest`; not all that it could.
pub fn tokens_on_device(model: &Qwen3, longest: usize) -> usize {
    let Some(device) = model.device_memory() else { return TOKENS_ON_DEVICE };
    let taken = |count| {
        let rows = device_memory::Rows { count, seen: longest, scored: 0 };
        device_memory::tokens(model.config(), count, device.element)
            + device_memory::work(model.config(), rows, device.element)
    };
    let mut tokens = TOKENS_ON_DEVICE;
    while tokens > longest && taken(tokens) > device.free / 2 {
        tokens /= 2;
    }
    tokens
}

/// What one thread of a BERT has in work, with `at_once` tokens (or one text of at most `longest`) together.
pub fn bert_work(config: &BertConfig, at_once: usize, longest: usize) -> usize {
    let rows = at_once.max(longest);
    let row = 5 * config.hidden_size + config.intermediate_size;
    let head = super::bert::POSITIONS_AT_ONCE * (longest + config.head_dim()) + 2 * longest * config.head_dim();
    (rows * row + head) * FLOAT
}
