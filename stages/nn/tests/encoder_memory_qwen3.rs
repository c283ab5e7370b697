//! The formula of `encoder::memory` beside the peak of a process that embeds with a Qwen3. Alone in its file: the peak is
//! the process's own.

use std::fs;

use grlm_nn::{
    encoder::{Encoder, TOKENS_AT_ONCE, memory},
    qwen3::Config,
};

mod common;
use common::{peak, write_model};

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
        rope_theta: 1e6,
        rms_norm_eps: 1e-6,
        tied: true,
        bos_token: None,
        eos_tokens: Vec::new(),
        pad_token: None,
        initializer_range: 0.02,
    };
    write_model(folder.path(), &shape.to_json("float32"), shape.tensors());
    let weights = memory::qwen3_weights(&shape);
    let fixture = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/encoders/qwen3/tokenizer.json");
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
