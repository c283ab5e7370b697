//! The formula of `qwen3::device_memory` beside the peak of a process, whose memory is here the device's. Alone in its
//! file: the peak is the process's own.

use grlm_nn::qwen3::{
    FloatType, Place,
    device_memory::{Rows, tokens, weights, work},
};

mod common;
#[path = "common/generation.rs"]
mod generation;
use generation::{BATCH, BEAMS, PREFIX, PROMPT, assert_formula, config};

#[test]
fn the_formula_is_within_a_fifth_of_the_peak() {
    let folder = tempfile::tempdir().unwrap();
    let (config, element) = (config(), 4);
    assert_formula(folder.path(), Place::CpuTensors { dtype: FloatType::F32 }, |slots| {
        let rows = Rows { count: BATCH * PROMPT, seen: PREFIX + PROMPT, scored: BATCH * BEAMS };
        // The mapped file counts as well.
        2 * weights(&config, element)
            + tokens(&config, PREFIX + BATCH * (PROMPT + slots), element)
            + work(&config, rows, element)
    });
}
