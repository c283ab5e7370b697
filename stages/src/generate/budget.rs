//! How many users one thread has in work, by what they take of the memory that is there.

use grlm_nn::{
    generate::{Trie, memory},
    qwen3::Config,
};

use super::{Decoding, Params};
use crate::rows::RowDevice;

/// Users that are handed to the CPU at a time: what a kill may cost.
pub const PIECE: usize = 32;
/// More users at once bring no speed on the CPU: the products run at their best long before.
const MOST: usize = 16;
/// The part of the free memory that is taken.
const SHARE: f64 = 0.5;

/// Users in work on each of the device's threads, at least 1. `longest` is the longest prompt behind the shared
/// beginning, `room` the longest answer, both in tokens.
pub fn batch(params: &Params, room: usize, config: &Config, trie: &Trie, longest: usize, device: &RowDevice) -> usize {
    let slots = match params.decoding {
        Decoding::Catalogue => memory::catalogue_slots(trie, params.beams),
        Decoding::Free => memory::free_slots(params.beams, room),
        Decoding::Exact => 0,
    };
    let Some(free) = device.free_memory() else { return MOST };
    let each = (free as f64 * SHARE) as usize / device.threads;
    memory::prompts_within(config, each, longest, slots).min(MOST)
}
