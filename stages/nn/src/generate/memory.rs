//! What generation takes of the memory, in bytes: the formula by which batches are sized.
//!
//! ```text
//! peak = weights + prefix + threads × (batch × prompt + work)
//!
//! weights = packed matrices (columns filled up to 16) and vectors in f32, and the mapped embeddings
//! prefix  = keys and values of the shared beginning: 2 × layers × tokens × kv_width × 4 (keys filled up to 16 tokens)
//! prompt  = the same for the tokens behind it, and for every token that beams generate
//! work    = what lies between the products, for the rows that go through the network at once
//! ```
//!
//! A test compares it with the peak of a process. On a device it is that of [`device_memory`].

use super::{
    Trie,
    session::{ROWS_AT_ONCE, ROWS_ON_DEVICE},
};
use crate::{
    cpu::WIDTH,
    qwen3::{
        Branches, Config, DeviceMemory, GATES_AT_ONCE, HEAD_CHUNK, LOGITS_AT_ONCE, POSITIONS_AT_ONCE, Segment,
        device_memory,
    },
};

const FLOAT: usize = size_of::<f32>();

/// Weights as the engine holds them, whose file has elements of `stored` bytes.
pub fn weights(config: &Config, stored: usize) -> usize {
    let packed: usize = config
        .tensors()
        .iter()
        .map(|(_, shape)| match shape.as_slice() {
            [out, inner] => inner * out.div_ceil(WIDTH) * WIDTH,
            other => other.iter().product(),
        })
        .sum();
    let embeddings = config.vocab_size * config.hidden_size;
    // Tied embeddings are packed as the head; what is mapped comes on top. Others are only mapped.
    let packed = if config.tied { packed } else { packed - embeddings };
    packed * FLOAT + embeddings * stored
}

/// Keys and values of `tokens` prompt tokens.
pub fn tokens(config: &Config, tokens: usize) -> usize {
    Segment::bytes(config, tokens)
}

/// One prompt in work: `length` tokens behind the shared beginning, and `slots` generated ones.
pub fn prompt(config: &Config, length: usize, slots: usize) -> usize {
    Segment::bytes(config, length) + Branches::bytes(config, slots)
}

/// What one thread has between the products, where no prompt is longer than `longest` tokens.
pub fn work(config: &Config, longest: usize) -> usize {
    let rows = ROWS_AT_ONCE.max(longest);
    let (q, kv) = (config.query_width(), config.kv_width());
    let row = 4 * config.hidden_size + 2 * q + 2 * kv + config.intermediate_size;
    let gates = (2 * GATES_AT_ONCE).max(8 * WIDTH * rows).min(2 * config.intermediate_size * rows);
    let logits = LOGITS_AT_ONCE.max(HEAD_CHUNK * ROWS_AT_ONCE).min(config.vocab_size * ROWS_AT_ONCE);
    (rows * row + gates + logits + POSITIONS_AT_ONCE * longest) * FLOAT
}

/// Prompts that one thread may have in work within `bytes` beside the weights, at least 1.
pub fn prompts_within(config: &Config, bytes: usize, length: usize, slots: usize) -> usize {
    (bytes.saturating_sub(work(config, length)) / prompt(config, length, slots).max(1)).max(1)
}

/// Tokens that beams over a catalogue can generate for one prompt.
pub fn catalogue_slots(trie: &Trie, beams: usize) -> usize {
    beams.min(trie.entries()) * (trie.longest() - 1)
}

/// Tokens that unconstrained beams can generate for one prompt.
pub fn free_slots(beams: usize, max_new: usize) -> usize {
    beams * (max_new - 1)
}

/// Prompts that half of a device's free memory holds, and at least 1; `prefix` are the tokens of the shared beginning, and
/// `longest` those of the longest prompt behind it with what it can generate.
pub fn prompts_on_device(config: &Config, device: DeviceMemory, prefix: usize, longest: usize) -> usize {
    let rows = device_memory::Rows { count: ROWS_ON_DEVICE.max(longest), seen: prefix + longest, scored: ROWS_AT_ONCE };
    let room = (device.free / 2).saturating_sub(device_memory::work(config, rows, device.element));
    (room / device_memory::tokens(config, longest, device.element).max(1)).max(1)
}

/// What generation is asked for, as far as it takes memory.
#[derive(Debug, Clone, Copy)]
pub struct Load {
    /// Bytes of an element in the file of the weights.
    pub stored: usize,
    /// Tokens of the shared beginning.
    pub prefix: usize,
    pub threads: usize,
    /// Prompts in work on each thread.
    pub batch: usize,
    /// Tokens of the longest prompt behind the beginning.
    pub longest: usize,
    /// Tokens that beams can generate for one prompt.
    pub slots: usize,
}

/// The whole peak of generation.
pub fn peak(config: &Config, load: Load) -> usize {
    weights(config, load.stored)
        + tokens(config, load.prefix)
        + load.threads * (load.batch * prompt(config, load.longest, load.slots) + work(config, load.longest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_many_prompts_as_there_is_room_for() {
        let config = Config::default();
        let within = |bytes| prompts_within(&config, bytes, 300, 16);
        let (one, beside) = (prompt(&config, 300, 16), work(&config, 300));
        assert_eq!((within(0), within(beside + one), within(beside + 5 * one + one / 2)), (1, 1, 5));
    }

    #[test]
    fn prompts_fill_half_of_a_device() {
        let (config, prefix, longest) = (Config::default(), 310, 700);
        let fitting = |free| prompts_on_device(&config, DeviceMemory { free, element: 2 }, prefix, longest);
        let rows = device_memory::Rows { count: ROWS_ON_DEVICE, seen: prefix + longest, scored: ROWS_AT_ONCE };
        let taken =
            |prompts| device_memory::work(&config, rows, 2) + prompts * device_memory::tokens(&config, longest, 2);
        let half = 3 << 30;
        let prompts = fitting(2 * half);
        assert!(prompts > 1 && taken(prompts) <= half && taken(prompts + 1) > half, "{prompts} prompts");
        assert_eq!(fitting(0), 1, "what does not fit is tried");
    }
}
