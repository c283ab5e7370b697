//! The formula of `encoder::memory` beside the peak of a process that embeds with a BERT. Alone in its file: the peak is
//! the process's own.

use std::fs;

use grlm_nn::encoder::{BertConfig, memory};

mod common;
#[path = "common/embedding.rs"]
mod embedding;
use common::write_model;
use embedding::assert_formula;

#[test]
fn the_formula_is_within_a_fifth_of_the_peak() {
    let folder = tempfile::tempdir().unwrap();
    let config = serde_json::json!({
        "model_type": "bert", "vocab_size": 4000, "hidden_size": 512, "intermediate_size": 2048,
        "num_hidden_layers": 3, "num_attention_heads": 8, "hidden_act": "gelu", "max_position_embeddings": 512,
        "type_vocab_size": 2,
    });
    fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    let shape = BertConfig::load(folder.path()).unwrap();
    write_model(folder.path(), &config, shape.tensors());
    assert_formula(folder.path(), "bert", memory::bert_weights(&shape));
}
