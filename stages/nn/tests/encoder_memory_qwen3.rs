//! The formula of `encoder::memory` beside the peak of a process that embeds with a Qwen3. Alone in its file: the peak is
//! the process's own.

use grlm_nn::{encoder::memory, qwen3::Config};

mod common;
#[path = "common/embedding.rs"]
mod embedding;
use common::write_model;
use embedding::assert_formula;

#[test]
fn the_formula_is_within_a_fifth_of_the_peak() {
    let folder = tempfile::tempdir().unwrap();
    let shape = Config {
        vocab_size: 4000,
        hidden_size: 512,
        intermediate_size: 1536,
        layers: 4,
        heads: 8,
        kv_heads: 4,
        head_dim: 64,
        max_positions: 1024,
        ..Config::default()
    };
    write_model(folder.path(), &shape.to_json("float32"), shape.tensors());
    assert_formula(folder.path(), "qwen3", memory::qwen3_weights(&shape));
}
