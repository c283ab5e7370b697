//! How many users one thread has in work, by what they take of the memory that is there.

use grlm_nn::{
    generate::{Trie, memory},
    qwen3::Config,
};

use super::{Decoding, Params};
use crate::machine;

/// Users that are handed to the CPU at a time: what a kill may cost.
pub const PIECE: usize = 32;
/// More users at once bring no speed on the CPU: the products run at their best long before.
const MOST: usize = 16;
/// The part of the free memory that is taken.
const SHARE: f64 = 0.5;

/// Users in work on each of `threads` threads, at least 1. `longest` is the longest prompt behind the shared beginning.
pub fn batch(params: &Params, config: &Config, trie: &Trie, longest: usize, threads: usize) -> usize {
    let slots = match params.decoding {
        Decoding::Catalogue => memory::catalogue_slots(trie, params.beams),
        Decoding::Free => memory::free_slots(params.beams, params.max_new_tokens),
        Decoding::Exact => 0,
    };
    let Some(free) = machine::available_memory() else { return MOST };
    let budget = (free as f64 * SHARE) as usize / threads;
    let room = budget.saturating_sub(memory::work(config, longest));
    (room / memory::prompt(config, longest, slots).max(1)).clamp(1, MOST)
}
