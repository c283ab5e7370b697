//! What the tests of an encoder's memory share.

use std::{fs, path::Path};

use grlm_nn::encoder::{Encoder, TOKENS_AT_ONCE};

use crate::common::peak;

/// Embeds long texts with the model of `folder`, whose weights take `weights` bytes, and the tokenizer of the fixture
/// `like`; the formula must be within a fifth of what the process then took.
pub fn assert_formula(folder: &Path, like: &str, weights: usize) {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/encoders");
    fs::copy(fixtures.join(like).join("tokenizer.json"), folder.join("tokenizer.json")).unwrap();
    let texts: Vec<String> = (0..6).map(|t| format!("soap {t} for hair and hand, ").repeat(200)).collect();
    let Some(before) = peak() else {
        eprintln!("skipped: this system does not say how much memory a process took");
        return;
    };
    let encoder = Encoder::load(folder, None, 512).unwrap();
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    let vectors = pool.install(|| encoder.encode(&texts, 1)).unwrap();
    assert_eq!((vectors.len(), vectors[0].len()), (6, 512));
    let measured = (peak().unwrap() - before) as f64;
    let stated = (weights + encoder.bytes_of_work(TOKENS_AT_ONCE)) as f64;
    let mib = |bytes: f64| bytes / f64::from(1 << 20);
    println!("stated {:.1} MiB, measured {:.1} MiB", mib(stated), mib(measured));
    assert!((stated / measured - 1.0).abs() < 0.2, "stated {:.1} MiB, measured {:.1} MiB", mib(stated), mib(measured));
}
