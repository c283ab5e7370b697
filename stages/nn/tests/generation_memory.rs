//! The formula of `generate::memory` beside the peak of a process. Alone in its file: the peak is the process's own.

use grlm_nn::{generate::memory, qwen3::Place};

mod common;
#[path = "common/generation.rs"]
mod generation;
use generation::{BATCH, PREFIX, PROMPT, assert_formula, config};

#[test]
fn the_formula_is_within_a_fifth_of_the_peak() {
    let folder = tempfile::tempdir().unwrap();
    assert_formula(folder.path(), Place::Cpu, |slots| {
        let load = memory::Load { stored: 4, prefix: PREFIX, threads: 1, batch: BATCH, longest: PROMPT, slots };
        memory::peak(&config(), load)
    });
}
