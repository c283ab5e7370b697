//! The formula of `encoder::memory` beside the peak of a process that embeds with a BERT. Alone in its file: the peak is
//! the process's own.

use std::fs;

use grlm_nn::encoder::{BertConfig, Encoder, TOKENS_AT_ONCE, memory};

mod common;
use common::{peak, write_model};

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
    let weights = memory::bert_weights(&shape);
    let fixture = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/encoders/bert/tokenizer.json");
    fs::copy(fixture, folder.path().join("tokenizer.json")).unwrap();
    let texts: Vec<String> = (0..6).map(|t| format!("soap {t} for hair and hand, ").repeat(200)).collect();
    let Some(before) = peak() else {
        eprintln!("skipped: this system does not say how much memory a process took");
        return;
    };
    let encoder = Encoder::load(folder.path(), None, 512).unwrap();
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    let vectors = pool.install(|| encoder.encode(&texts, 1)).unwrap();
    assert_eq!((vectors.len(), vectors[0].len()), (6, 512));
    let measured = (peak().unwrap() - before) as f64;
    let stated = (weights + encoder.bytes_of_work(TOKENS_AT_ONCE)) as f64;
    let mib = |bytes: f64| bytes / f64::from(1 << 20);
    println!("stated {:.1} MiB, measured {:.1} MiB", mib(stated), mib(measured));
    assert!((stated / measured - 1.0).abs() < 0.2, "stated {:.1} MiB, measured {:.1} MiB", mib(stated), mib(measured));
}
